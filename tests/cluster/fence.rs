//! The hubs' fence protocol, with a real etcd on loopback.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bakehouse_tests::network::in_own_network;
use bakehouse_tests::site::TestCluster;
use firstboot::client::etcd::{Compare, Etcd, Op};
use firstboot::hub::fence::{self, Fence, FenceState};
use firstboot::node::neighbours::PeerTable;
use fleet::MeshKey;

/// A majority of the hubs deletes the leader key, and only if a reachable synchronous standby can take over.
#[test]
fn majority_of_hubs_deletes_leader_key_of_unreachable_primary() {
    in_own_network(async {
        let site = TestCluster::open_with("db.count = 3\n", |topology| topology.database.ttl = TTL);
        let dir = tempfile::tempdir().expect("a folder");
        let etcds: Vec<Etcd> = (0..3).map(|i| site.etcd(i)).collect();
        let neighbourhoods: Vec<Arc<PeerTable>> = (0..3)
            .map(|i| {
                let own = dir.path().join(i.to_string());
                fs::create_dir(&own).expect("a folder");
                let keys =
                    BTreeMap::from([("db-1".to_owned(), MeshKey([1; 32])), ("db-2".to_owned(), MeshKey([2; 32]))]);
                let all = Arc::new(PeerTable::load(&own, keys));
                // Stands in for the kernel's WireGuard and confirms each change immediately.
                let (mesh, mut changes) = (all.clone(), all.follow());
                tokio::spawn(async move {
                    loop {
                        mesh.are_out(mesh.out());
                        changes.changed().await.expect("the sender exists");
                    }
                });
                all
            })
            .collect();
        let hub = |i: usize| Fence {
            etcd: &etcds[i],
            topology: &site.topology,
            own: &site.topology.hubs[i],
            neighbourhood: &neighbourhoods[i],
            slow: 1,
        };
        let shut: [FenceState; 3] = Default::default();
        let put = async |what: &str, value: &str| {
            let key = format!("/bakehouse/acme/{what}");
            // etcd may not serve yet.
            while etcds[0].transact(&[], &[Op::Put(&key, value.as_bytes())]).await.is_err() {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        let leader = async || {
            let found = etcds[2].get(&["/bakehouse/acme/leader"]).await.expect("etcd");
            String::from_utf8(found[0].value.clone()).expect("text")
        };
        let reached = BTreeSet::from(["db-2".to_owned()]);
        let none_reached = BTreeSet::new();

        // The hubs do not act on a lost standby. A primary without a reachable synchronous standby keeps its leader
        // key.
        put("leader", "db-3").await;
        put("sync", r#"{"leader":"db-3","sync_standby":"db-2"}"#).await;
        assert!(hub(0).release_leader_key("db-1", &reached, &shut[0]).await.expect("etcd"));
        put("leader", "db-1").await;
        assert!(!hub(0).release_leader_key("db-1", &reached, &shut[0]).await.expect("etcd"));
        put("sync", r#"{"leader":"db-1","sync_standby":"db-2"}"#).await;
        assert!(!hub(0).release_leader_key("db-1", &none_reached, &shut[0]).await.expect("etcd"));
        for (i, shut) in shut.iter().enumerate() {
            assert!(
                !hub(i).release_leader_key("db-1", &reached, shut).await.expect("etcd"),
                "deleted a young leader key"
            );
        }
        tokio::time::sleep(AGE).await;
        assert!(!hub(0).release_leader_key("db-1", &none_reached, &shut[0]).await.expect("etcd"));
        assert!(neighbourhoods[0].out().is_empty() && !shut[0].contains("db-1"));

        // One hub alone fences the node and never deletes the leader key.
        for _ in 0..3 {
            assert!(!hub(0).release_leader_key("db-1", &reached, &shut[0]).await.expect("etcd"));
        }
        let out = neighbourhoods[0].out();
        assert_eq!(neighbourhoods[0].keys_without(&out).into_keys().collect::<Vec<_>>(), ["db-2"]);
        assert_eq!(neighbourhoods[0].keys().len(), 2, "the hub no longer distributes the node's key");
        // An expired record does not count, nor does one of a node that is not a hub or one for another slot.
        let said = ["/bakehouse/shut/db-1/hub-1", "/bakehouse/shut/db-1/db-2", "/bakehouse/shut/db-11/hub-3"];
        let then = [Op::Delete(said[0]), Op::Put(said[1], b""), Op::Put(said[2], b"")];
        etcds[0].transact(&[], &then).await.expect("etcd");
        assert!(!hub(1).release_leader_key("db-1", &reached, &shut[1]).await.expect("etcd"));
        assert_eq!(leader().await, "db-1");
        // Two of three hubs delete the leader key. They must not delete the key of its next owner.
        assert!(hub(2).release_leader_key("db-1", &reached, &shut[2]).await.expect("etcd"));
        assert_eq!(leader().await, "");
        put("leader", "db-2").await;
        for (i, shut) in shut.iter().enumerate() {
            assert!(hub(i).release_leader_key("db-1", &reached, shut).await.expect("etcd"));
        }
        assert_eq!(leader().await, "db-2");
        neighbourhoods[2].unfence_node("db-1");
        assert_eq!(neighbourhoods[2].keys_without(&neighbourhoods[2].out()).len(), 2);
    });
}

/// The etcd member that a hub uses may be on the unreachable machine. The client must then use another member.
#[test]
fn client_switches_from_hung_etcd_member_to_the_next() {
    in_own_network(async {
        let site = TestCluster::open("db.count = 2\n");
        let etcd = site.etcd(0).with_timeout(fence::ANSWER);
        while etcd.get(&["/bakehouse/acme/leader"]).await.is_err() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        // A frozen member keeps its connections open.
        site.cluster.freeze(0);
        let asked = Instant::now();
        while etcd.get(&["/bakehouse/acme/leader"]).await.is_err() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        // The other members may need an election. A client that waits for the frozen member would wait for 10 s.
        assert!(asked.elapsed() < fleet_https::TIMEOUT, "{:?}", asked.elapsed());
    });
}

/// An idle fleet changes no key for minutes. Its hubs must not take that for a hung member.
#[test]
fn watch_of_idle_etcd_lasts() {
    in_own_network(async {
        let site = TestCluster::open("db.count = 2\n");
        let etcd = site.etcd(0);
        let (revision, _) = loop {
            match etcd.list("/bakehouse/slots/").await {
                Ok(listed) => break listed,
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        };
        let mut watch = etcd.watch("/bakehouse/slots/", revision).await.expect("etcd answers");
        let waited = tokio::time::timeout(Duration::from_secs(15), etcd.next(&mut watch)).await;
        assert!(waited.is_err(), "the watch ended or changed: {waited:?}");
        let slot = "/bakehouse/slots/hub-1";
        etcd.transact(&[], &[Op::Put(slot, b"{}")]).await.expect("etcd answers");
        let changes = etcd.next(&mut watch).await.expect("etcd answers").expect("the watch continues");
        assert_eq!(changes.iter().map(|c| c.key.as_str()).collect::<Vec<_>>(), [slot]);
    });
}

/// etcd fails after a hub has fenced the primary and before the hub has recorded it.
#[test]
fn hub_retries_to_record_an_exclusion() {
    in_own_network(async {
        let site = Arc::new(TestCluster::open_with("db.count = 2\n", |topology| topology.database.ttl = TTL));
        let dir = tempfile::tempdir().expect("a folder");
        let etcd = site.etcd(0).with_timeout(fence::ANSWER);
        let keys = BTreeMap::from([("db-1".to_owned(), MeshKey([1; 32]))]);
        let neighbourhood = Arc::new(PeerTable::load(dir.path(), keys));
        let (mesh, mut changes, cut) = (neighbourhood.clone(), neighbourhood.follow(), site.clone());
        tokio::spawn(async move {
            changes.changed().await.expect("the sender exists");
            (0..3).for_each(|i| cut.cluster.freeze(i));
            loop {
                mesh.are_out(mesh.out());
                changes.changed().await.expect("the sender exists");
            }
        });
        let hub = Fence {
            etcd: &etcd,
            topology: &site.topology,
            own: &site.topology.hubs[0],
            neighbourhood: &neighbourhood,
            slow: 1,
        };
        let sync: &[u8] = br#"{"leader":"db-1","sync_standby":"db-2"}"#;
        let then = [Op::Put("/bakehouse/acme/leader", b"db-1"), Op::Put("/bakehouse/acme/sync", sync)];
        while etcd.transact(&[], &then).await.is_err() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let (reached, shut) = (BTreeSet::from(["db-2".to_owned()]), FenceState::default());
        assert!(!hub.release_leader_key("db-1", &reached, &shut).await.expect("etcd"));
        tokio::time::sleep(AGE).await;
        hub.release_leader_key("db-1", &reached, &shut).await.expect_err("etcd is frozen");
        assert!(neighbourhood.out().contains("db-1") && shut.contains("db-1"));

        (0..3).for_each(|i| site.cluster.thaw(i));
        // One of three hubs is no majority and must not delete the leader key.
        while !matches!(hub.release_leader_key("db-1", &reached, &shut).await, Ok(false)) {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let said = etcd.get(&["/bakehouse/shut/db-1/hub-1"]).await.expect("etcd");
        assert_ne!(said[0].revision, 0, "the hub recorded no exclusion");
    });
}

/// Seconds: the lease of the hubs' records, and the minimum age of a leader key that hubs delete.
const TTL: u16 = 8;
const AGE: Duration = Duration::from_millis(8100);
const LEADER: &str = "/bakehouse/acme/leader";
const SYNC: &str = "/bakehouse/acme/sync";
const FOLLOWED: &[u8] = br#"{"leader":"db-1","sync_standby":"db-2"}"#;
const ALONE: &[u8] = br#"{"leader":"db-1","sync_standby":null}"#;

/// One hub of the test cluster, with its own etcd client and mesh.
struct TestHub {
    site: Arc<TestCluster>,
    number: usize,
    etcd: Etcd,
    neighbourhood: Arc<PeerTable>,
    exclusions: FenceState,
    _dir: tempfile::TempDir,
}

impl TestHub {
    /// Creates a hub that runs `first` before its mesh drops the packets of db-1.
    fn with<F: Future<Output = ()> + Send + 'static>(
        site: &Arc<TestCluster>,
        number: usize,
        first: impl Fn(Etcd) -> F + Send + Sync + 'static,
    ) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let keys = BTreeMap::from([("db-1".to_owned(), MeshKey([1; 32])), ("db-2".to_owned(), MeshKey([2; 32]))]);
        let neighbourhood = Arc::new(PeerTable::load(dir.path(), keys));
        let (mesh, mut changes, of) = (neighbourhood.clone(), neighbourhood.follow(), site.clone());
        tokio::spawn(async move {
            while changes.changed().await.is_ok() {
                if mesh.out().contains("db-1") {
                    first(of.etcd(number)).await;
                }
                mesh.are_out(mesh.out());
            }
        });
        let etcd = site.etcd(number).with_timeout(fence::ANSWER);
        Self { site: site.clone(), number, etcd, neighbourhood, exclusions: FenceState::default(), _dir: dir }
    }

    fn new(site: &Arc<TestCluster>, number: usize) -> Self {
        Self::with(site, number, |_| std::future::ready(()))
    }

    fn fence(&self) -> Fence<'_> {
        let topology = &self.site.topology;
        let (own, neighbourhood) = (&topology.hubs[self.number], self.neighbourhood.as_ref());
        Fence { etcd: &self.etcd, topology, own, neighbourhood, slow: 1 }
    }

    /// Lets the hubs read the leader key, and waits until it is old enough to be deleted.
    async fn wait(hubs: &[&Self]) {
        for hub in hubs {
            assert!(!hub.release_leader_key().await && !hub.excludes("db-1"), "acted on a young leader key");
        }
        tokio::time::sleep(AGE).await;
    }

    async fn release_leader_key(&self) -> bool {
        let reached = BTreeSet::from(["db-2".to_owned()]);
        self.fence().release_leader_key("db-1", &reached, &self.exclusions).await.expect("etcd answers")
    }

    fn excludes(&self, slot: &str) -> bool {
        self.neighbourhood.out().contains(slot)
    }

    /// Runs the agent's task until the hub excludes db-1, for at most `long`. Returns whether it does.
    async fn keep(&self, long: Duration) -> bool {
        let excluded = async {
            while !self.excludes("db-1") {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let fence = self.fence();
        tokio::select! {
            ended = fence.keep() => panic!("the task ended: {ended:?}"),
            () = excluded => true,
            () = tokio::time::sleep(long) => false,
        }
    }
}

/// Starts a test cluster in which db-1 is primary and db-2 its synchronous standby.
async fn led_by_db_1() -> (Arc<TestCluster>, Etcd) {
    let site = Arc::new(TestCluster::open_with("db.count = 2\n", |topology| topology.database.ttl = TTL));
    let etcd = site.etcd(0);
    let then = [Op::Put(LEADER, b"db-1"), Op::Put(SYNC, FOLLOWED)];
    while etcd.transact(&[], &then).await.is_err() {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    (site, etcd)
}

/// Attack: a cycle of the old primary's Patroni loads all keys, the hubs depose the primary, the network path recovers,
/// and the cycle removes the standby from `sync`. The comparison in its transaction must fail.
#[test]
fn patroni_cycle_older_than_the_deposition_cannot_write_sync() {
    in_own_network(async {
        let (site, etcd) = led_by_db_1().await;
        let loaded = etcd.get(&[SYNC]).await.expect("etcd answers")[0].clone();
        let mut events = etcd.watch("/bakehouse/acme/", loaded.revision).await.expect("etcd answers");
        let (one, two) = (TestHub::new(&site, 0), TestHub::new(&site, 1));
        TestHub::wait(&[&one, &two]).await;
        assert!(!one.release_leader_key().await && two.release_leader_key().await);

        let found = etcd.get(&[LEADER, SYNC]).await.expect("etcd answers");
        assert_eq!(found[0].revision, 0, "the leader key exists");
        assert_eq!(found[1].value, FOLLOWED, "the standby is no longer eligible");
        assert!(found[1].revision > loaded.revision, "sync keeps its revision");
        let stale = [Compare::Unchanged(SYNC, loaded.revision)];
        assert!(!etcd.transact(&stale, &[Op::Put(SYNC, ALONE)]).await.expect("etcd answers"));
        // Patroni's cache applies events one by one, and a cycle may read it between two of them. The old primary must not
        // see the new revision while its cache has the leader key.
        let mut keys = Vec::new();
        while keys.len() < 2 {
            keys.extend(etcd.next(&mut events).await.expect("etcd answers").expect("the watch continues"));
        }
        assert_eq!([&keys[0].key[..], &keys[1].key[..]], [LEADER, SYNC]);
        assert!(keys[0].value.is_none() && keys[1].value.is_some());
        let heir = [Compare::Unchanged(SYNC, found[1].revision), Compare::Unchanged(LEADER, 0)];
        assert!(etcd.transact(&heir, &[Op::Put(LEADER, b"db-2")]).await.expect("etcd answers"));
    });
}

/// Attack: the standby leaves `sync` while the hubs exclude the primary. Deleting the leader key then would
/// leave the fleet without a database until the exclusion ends, though the primary lives.
#[test]
fn primary_whose_standby_left_meanwhile_keeps_its_leader_key_and_is_readmitted() {
    in_own_network(async {
        let (site, etcd) = led_by_db_1().await;
        let one = TestHub::new(&site, 0);
        let two = TestHub::with(&site, 1, |etcd| async move {
            etcd.transact(&[], &[Op::Put(SYNC, ALONE)]).await.expect("etcd answers");
        });
        TestHub::wait(&[&one, &two]).await;
        assert!(!one.release_leader_key().await && !two.release_leader_key().await);
        let found = etcd.get(&[LEADER, SYNC]).await.expect("etcd answers");
        assert_eq!((&found[0].value[..], &found[1].value[..]), (&b"db-1"[..], ALONE));
        assert!(one.excludes("db-1") && two.excludes("db-1"));

        for hub in [&one, &two] {
            assert!(!hub.release_leader_key().await);
            assert!(!hub.excludes("db-1") && !hub.exclusions.contains("db-1"));
        }
        assert!(etcd.list("/bakehouse/shut/").await.expect("etcd answers").1.is_empty());
        // The hubs can depose it again.
        etcd.transact(&[], &[Op::Put(SYNC, FOLLOWED)]).await.expect("etcd answers");
        let two = TestHub::new(&site, 1);
        TestHub::wait(&[&two]).await;
        assert!(!one.release_leader_key().await && two.release_leader_key().await);
        assert_eq!(etcd.get(&[LEADER]).await.expect("etcd answers")[0].revision, 0);
    });
}

/// Attack: the old primary reconnects through the third hub, which has had a route to it the whole time.
#[test]
fn every_hub_excludes_a_node_that_a_majority_excludes() {
    in_own_network(async {
        let (site, etcd) = led_by_db_1().await;
        let mut third = TestHub::new(&site, 2);
        // etcd requires authentication, as in a real fleet.
        etcd.put_user("root", "secret").await.expect("etcd answers");
        etcd.grant_role("root", "root").await.expect("etcd answers");
        etcd.enable_auth().await.expect("etcd answers");
        let etcd = etcd.with_user("root", "secret");
        third.etcd = third.etcd.with_user("root", "secret");
        // One hub, a node that is not a hub, and a hub's record for another slot are no majority.
        let others = ["/bakehouse/shut/db-1/hub-1", "/bakehouse/shut/db-1/db-2", "/bakehouse/shut/db-11/hub-2"];
        etcd.transact(&[], &others.map(|key| Op::Put(key, b""))).await.expect("etcd answers");
        assert!(!third.keep(Duration::from_millis(1500)).await);
        // Another node has the leader key by then.
        let then = [Op::Put("/bakehouse/shut/db-1/hub-2", b""), Op::Put(LEADER, b"db-2")];
        etcd.transact(&[], &then).await.expect("etcd answers");
        assert!(third.keep(Duration::from_secs(6)).await);
        assert!(!third.excludes("db-2"));
        assert_eq!(
            third.neighbourhood.keys_without(&third.neighbourhood.out()).into_keys().collect::<Vec<_>>(),
            ["db-2"]
        );
        let own = etcd.get(&["/bakehouse/shut/db-1/hub-3"]).await.expect("etcd answers");
        assert_eq!(own[0].revision, 0, "the hub recorded an exclusion of its own");
    });
}

/// Attack: the agent of a hub that excludes the old primary restarts.
#[test]
fn restarted_agent_still_excludes_the_old_primary() {
    in_own_network(async {
        let (site, etcd) = led_by_db_1().await;
        let (one, two) = (TestHub::new(&site, 0), TestHub::new(&site, 1));
        TestHub::wait(&[&one, &two]).await;
        assert!(!one.release_leader_key().await && two.release_leader_key().await);
        drop(one);
        let restarted = TestHub::new(&site, 0);
        assert!(!restarted.excludes("db-1"));
        assert!(restarted.keep(Duration::from_secs(6)).await);
        let recorded = etcd.list("/bakehouse/shut/db-1/").await.expect("etcd answers").1;
        assert_eq!(recorded.len(), 2, "the restart removed a recorded exclusion");

        // The restarted hub excludes the node also if no other hub does.
        etcd.transact(&[], &[Op::Delete("/bakehouse/shut/db-1/hub-2")]).await.expect("etcd answers");
        assert!(TestHub::new(&site, 0).keep(Duration::from_secs(6)).await);
        assert!(!TestHub::new(&site, 2).keep(Duration::from_secs(1)).await);
    });
}
