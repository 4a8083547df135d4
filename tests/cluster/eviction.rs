//! Hubs and workers neither accept requests of an evicted node nor trust its replies, also while etcd has no quorum.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bakehouse_tests::network::in_own_network;
use bakehouse_tests::rogue_hub::{Captured, RogueHub};
use bakehouse_tests::site::{HUB_PORT, TestCluster, TestJoiner, departure, hub_address, scope};
use builder::deploy::hub_client::Hubs as Operator;
use builder::keys::authority::FleetKey;
use firstboot::member::follow_hubs;
use firstboot::node::hubs::Hubs;
use firstboot::node::neighbours::PeerTable;
use fleet::{
    Departure, Grant, Introduction, JoinReply, MeshKey, PROTOCOL, Peers, PrivateKey, Report, Secrets, SignedOrder,
    SlotRecord, UpdateDecision, UpdateState,
};
use fleet_https::{Connection, Identity, request};
use serde_json::json;

const ATTACKER: MeshKey = MeshKey([66; 32]);

/// Returns the false replies of a compromised hub: the client is fenced, and the hubs have the attacker's keys.
fn lies(request: &Captured) -> Vec<u8> {
    let mut hubs: BTreeMap<String, String> = BTreeMap::new();
    let mut keys: BTreeMap<String, MeshKey> = BTreeMap::new();
    for hub in ["hub-1", "hub-2", "hub-3"] {
        hubs.insert(hub.to_owned(), "the attacker's".to_owned());
        keys.insert(hub.to_owned(), ATTACKER);
    }
    let vacant = ["hub-1", "hub-3", "db-1"].map(String::from).into();
    let said = match request.target().1.as_str() {
        "/v1/peers" => serde_json::to_vec(&Peers {
            keys,
            hubs,
            epoch: 9,
            fenced: Some(99_999),
            leaving: true,
            vacant,
            evicted: Vec::new(),
            revoked_operators: Vec::new(),
        }),
        "/v1/turn" => serde_json::to_vec(&UpdateDecision { granted: true, why: String::new() }),
        "/v1/renew" => serde_json::to_vec(&JoinReply::Granted(Grant {
            slot: "db-1".to_owned(),
            epoch: 99_999,
            cert: String::new(),
            secrets: fleet::Secrets::default(),
            hubs: keys,
        })),
        _ => Ok(Vec::new()),
    };
    said.expect("JSON")
}

/// The operator evicts a compromised hub, which keeps its address, its key and its issuer, and keeps replying.
#[test]
fn workers_drop_evicted_hub_within_a_minute_and_ignore_its_replies() {
    in_own_network(async {
        let mut site = TestCluster::open("db.count = 1\n");
        site.register_hubs().await;
        let (node, grant) = site.members("db", 1).await.remove(0);
        // Each worker asks two random hubs at a time.
        let workers: Vec<Worker> = (0..8).map(|_| Worker::start(&site, &node, &grant)).collect();
        until(30, "a worker lacks a hub's key", || workers.iter().all(|w| w.known.pins().len() == 3)).await;
        let before = workers[0].known.keys();

        // Compromised, and not evicted yet: its replies contradict those of the other two hubs.
        let key = site.keys[1].clone();
        site.hubs.remove(1).abort();
        tokio::time::sleep(Duration::from_millis(200)).await;
        let at = hub_address(2);
        let rogue = RogueHub::start(&site.topology, &site.root, ("hub-2", &key), at, lies).await;
        until(60, "no worker asked the attacker", || rogue.captured().iter().any(|r| r.target().1 == "/v1/peers"))
            .await;
        let order = departure("hub-2", true, None).with_scope(scope(Departure::PATH, "hub-1"));
        site.order(0, Departure::PATH, &order, &site.root).await.expect("a hub accepts the order");
        let evicted = Instant::now();
        let has_forgotten = |w: &Worker| !w.known.pins().contains_key("hub-2") && !w.known.keys().contains_key("hub-2");
        until(60, "a worker knows the evicted hub", || workers.iter().all(has_forgotten)).await;
        println!("the last of 8 workers dropped it after {:.1} s", evicted.elapsed().as_secs_f64());

        // Its replies had no effect, and no worker asks it any more.
        let are_unharmed = |what: &str| {
            for worker in &workers {
                assert!(!worker.task.is_finished(), "{what}: the attacker stopped a worker");
                for hub in ["hub-1", "hub-3"] {
                    assert_eq!(worker.known.keys().get(hub), before.get(hub), "{what}: {hub}");
                    assert_ne!(worker.known.pins()[hub], "the attacker's", "{what}");
                }
            }
        };
        are_unharmed("as the hub that it was");
        let hubs = &workers[0].hubs;
        let asked = rogue.captured().len();
        let report = Report { version: PROTOCOL, image: "1".to_owned(), doing: UpdateState::Serving };
        for _ in 0..12 {
            assert!(!hubs.turn(&report).await.expect("a hub answers").granted, "the attacker granted the update lock");
        }
        assert_eq!(rogue.captured().len(), asked, "a worker asked the evicted hub");
        // With certificates of its own issuer the attacker cannot impersonate the other hubs.
        drop(rogue);
        for (i, name) in [(0, "hub-1"), (1, "hub-3")] {
            site.hubs[i].abort();
            let key = PrivateKey::generate().expect("randomness");
            tokio::time::sleep(Duration::from_millis(200)).await;
            let at = hub_address(if i == 0 { 1 } else { 3 });
            std::mem::forget(RogueHub::start(&site.topology, &site.root, (name, &key), at, lies).await);
        }
        let e = hubs.turn(&report).await.expect_err("the attacker granted the lock as another hub");
        assert!(e.chain().contains("another key"), "{e}");
        tokio::time::sleep(Duration::from_secs(40)).await;
        are_unharmed("as every other hub");
    });
}

/// The evicted one of two hubs claims that the other one has left. The operator's signed order, which the remaining hub
/// distributes, decides. Without an order, neither hub can remove the other.
#[test]
fn signed_order_decides_which_of_two_hubs_is_evicted() {
    in_own_network(async {
        let mut site = TestCluster::open_with("db.count = 1\n", |topology| {
            topology.nodes.retain(|node| node.name != "hub-3");
            topology.hubs.retain(|hub| hub.name != "hub-3");
            topology.voters = vec!["hub-1".to_owned(), "hub-2".to_owned()];
        });
        site.register_hubs().await;
        let (node, grant) = site.members("db", 1).await.remove(0);
        let workers: Vec<Worker> = (0..4).map(|_| Worker::start(&site, &node, &grant)).collect();
        until(30, "a worker lacks a hub's key", || workers.iter().all(|w| w.known.pins().len() == 2)).await;
        let before = workers[0].known.keys();

        let key = site.keys[1].clone();
        site.hubs.remove(1).abort();
        tokio::time::sleep(Duration::from_millis(200)).await;
        let at = hub_address(2);
        let rogue = RogueHub::start(&site.topology, &site.root, ("hub-2", &key), at, lies).await;
        let asked = || rogue.captured().iter().filter(|r| r.target().1 == "/v1/peers").count();
        until(60, "the workers did not ask the attacker", || asked() >= 8).await;
        for worker in &workers {
            assert_eq!(worker.known.pins().len(), 2, "a hub of two removed the other");
            assert!(!worker.task.is_finished(), "the attacker stopped a worker");
        }

        let order = Departure {
            tls_key: Some(fleet::encoding::encode(key.public().expect("a key").as_bytes())),
            ..departure("hub-2", true, None)
        };
        let order = order.with_scope(scope(Departure::PATH, "hub-1"));
        site.order(0, Departure::PATH, &order, &site.root).await.expect("a hub accepts the order");
        let evicted = Instant::now();
        let has_forgotten = |w: &Worker| !w.known.pins().contains_key("hub-2") && !w.known.keys().contains_key("hub-2");
        until(60, "a worker knows the evicted hub", || workers.iter().all(has_forgotten)).await;
        println!("the last of 4 workers dropped it after {:.1} s", evicted.elapsed().as_secs_f64());
        for worker in &workers {
            assert!(!worker.task.is_finished(), "the attacker stopped a worker");
            assert_eq!(worker.known.keys().get("hub-1"), before.get("hub-1"));
            assert_ne!(worker.known.pins()["hub-1"], "the attacker's");
        }
    });
}

/// The evicted hub's etcd member leads the cluster: etcd elects another leader while the order is carried out.
#[test]
fn the_hub_whose_etcd_member_leads_is_evicted_by_one_order() {
    in_own_network(async {
        let site = TestCluster::open("db.count = 1\n");
        site.register_hubs().await;
        site.lead_etcd("hub-2").await;
        let authority = json!({ "fleet": "acme", "root": site.root, "secrets": Secrets::sample() });
        let topology = site.topology.clone();
        let evicted = tokio::task::spawn_blocking(move || {
            let authority: FleetKey = serde_json::from_value(authority).expect("a fleet key");
            Operator { authority, topology: &topology, endpoints: BTreeMap::new(), help: None }.leave("hub-2", true)
        });
        evicted.await.expect("no panic").expect("one of the hubs evicts hub-2");
        let etcd = site.etcd(0);
        let members = etcd.members().await.expect("etcd has a leader");
        assert!(members.iter().all(|member| member.name != "hub-2"), "hub-2 still has its vote");
        let found = etcd.get(&["/bakehouse/slots/hub-2"]).await.expect("etcd has a leader");
        let record: SlotRecord = serde_json::from_slice(&found[0].value).expect("JSON");
        assert!(record.vacant && record.eviction.is_some(), "{record:?}");
    });
}

/// The part of a worker's agent that asks hubs for peers.
struct Worker {
    known: Arc<PeerTable>,
    hubs: Arc<Hubs>,
    task: tokio::task::JoinHandle<firstboot::error::Result<()>>,
    _dir: tempfile::TempDir,
}

impl Worker {
    fn start(site: &TestCluster, node: &TestJoiner, grant: &Grant) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let known = Arc::new(PeerTable::load(dir.path(), grant.hubs.clone()));
        let own = Identity { cert: &grant.cert, key: node.tls.pem() };
        let tls = fleet_https::client(site.root.certificate(), Some(own)).expect("a certificate");
        let hubs = Hubs::new(&site.topology, &BTreeMap::new(), &grant.slot, tls);
        let hubs = hubs.known_by(known.clone()).with_root(site.root.certificate()).over_mesh();
        let hubs = Arc::new(hubs);
        let (asked, told, slot, epoch) = (hubs.clone(), known.clone(), grant.slot.clone(), grant.epoch);
        let task = tokio::spawn(async move { follow_hubs(&asked, &told, (&slot, epoch)).await });
        Self { known, hubs, task, _dir: dir }
    }
}

/// etcd has no quorum, a hub's agent has just restarted, and an evicted founder claims to be owner 99 of its slot.
#[test]
fn restarted_hub_refuses_evicted_founder_without_quorum() {
    in_own_network(async {
        let mut site = TestCluster::open("db.count = 1\n");
        site.register_hubs().await;
        let order = departure("hub-2", true, None).with_scope(scope(Departure::PATH, "hub-1"));
        site.order(0, Departure::PATH, &order, &site.root).await.expect("a hub accepts the order");
        let records = site.state(0).join("slots.json");
        until(10, "the hub has not stored the eviction", || {
            let text = std::fs::read_to_string(&records).unwrap_or_default();
            let slots: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
            slots["slots"]["hub-2"]["vacant"] == true && slots["slots"]["hub-3"]["epoch"] == 1
        })
        .await;
        (0..3).for_each(|i| site.cluster.freeze(i));
        site.hubs[0].abort();
        tokio::time::sleep(Duration::from_millis(200)).await;
        site.hubs[0] = site.hub(0);
        tokio::time::sleep(Duration::from_millis(500)).await;

        // The evicted founder, and a blank machine with the founder's ticket of another hub.
        for (i, slot, key) in
            [(1, "hub-2", site.keys[1].clone()), (2, "hub-3", PrivateKey::generate().expect("randomness"))]
        {
            let issuer = site.root.issuer("acme", slot).expect("a root");
            let cert =
                issuer.node(&site.topology, &site.topology.hubs[i], &key.public().expect("a key")).expect("a key");
            let own = Identity { cert: &cert, key: key.pem() };
            let tls = fleet_https::client(site.root.certificate(), Some(own)).expect("a certificate");
            let ask = async |method: &str, path: &str, body: Vec<u8>| {
                let mut hub = Connection::open("127.0.0.1", HUB_PORT, "hub-1", &tls).await.expect("a hub");
                hub.ask(request(method, "hub", path, &[], body.into()).expect("HTTP"), 1 << 16).await
            };
            let read = |answer: bytes::Bytes| serde_json::from_slice::<Peers>(&answer).expect("JSON");
            let said = Introduction { version: PROTOCOL, mesh_key: ATTACKER, epoch: 99 };
            let peers =
                read(ask("POST", "/v1/introduce", serde_json::to_vec(&said).expect("JSON")).await.expect("a reply"));
            assert!(peers.fenced.is_some(), "{slot}: {peers:?}");
            assert!(
                !peers.keys.values().any(|key| *key == ATTACKER),
                "the attacker's key is in the mesh as {slot}: {peers:?}"
            );
            let peers = read(ask("GET", "/v1/peers", Vec::new()).await.expect("a reply"));
            assert!(peers.fenced.is_some() && !peers.keys.values().any(|key| *key == ATTACKER), "{slot}: {peers:?}");
            let report = Report { version: PROTOCOL, image: "1".to_owned(), doing: UpdateState::Serving };
            let e = ask("POST", "/v1/turn", serde_json::to_vec(&report).expect("JSON"))
                .await
                .expect_err("the hub accepted the report");
            let text = fleet::ErrorChain::new(&e).to_string();
            assert!(text.contains("another machine has owned"), "{text}");
        }
        (0..3).for_each(|i| site.cluster.thaw(i));
    });
}

async fn until(seconds: u64, what: &str, is: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(seconds);
    while !is() {
        assert!(Instant::now() < end, "{what} after {seconds} s");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[test]
fn last_voter_cannot_leave() {
    in_own_network(async {
        let lonely = TestCluster::open_with("db.count = 1\n", |topology| topology.voters = vec!["hub-1".to_owned()]);
        let e = lonely.leave("hub-1", false, &lonely.root).await.expect_err("the last voter");
        assert!(e.contains("the fleet's only vote"), "{e}");
    });
}
