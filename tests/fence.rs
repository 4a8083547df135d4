//! A primary that the hubs shut out, by a real etcd on loopback.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bakehouse_tests::site::Site;
use firstboot::etcd::{Etcd, Then};
use firstboot::https;
use firstboot::hub::fence::{self, Fence, Shut};
use firstboot::neighbours::Neighbourhood;
use fleet::MeshKey;

/// The hubs depose a primary together: most of them, or nobody; and only where another can follow it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_that_most_hubs_have_shut_out_loses_its_place() {
    let site = Site::open(24_100, "db.count = 3\n");
    let dir = tempfile::tempdir().expect("a folder");
    let etcds: Vec<Etcd> = (0..3).map(|i| site.etcd(i)).collect();
    let neighbourhoods: Vec<Arc<Neighbourhood>> = (0..3)
        .map(|i| {
            let own = dir.path().join(i.to_string());
            fs::create_dir(&own).expect("a folder");
            let keys = BTreeMap::from([("db-1".to_owned(), MeshKey([1; 32])), ("db-2".to_owned(), MeshKey([2; 32]))]);
            let all = Arc::new(Neighbourhood::load(&own, keys));
            // The kernel's part: it does what it is told at once.
            let (mesh, mut changes) = (all.clone(), all.follow());
            tokio::spawn(async move {
                loop {
                    mesh.are_out(mesh.out());
                    changes.changed().await.expect("it lives as long");
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
    let mut shut: [BTreeMap<String, Shut>; 3] = Default::default();
    let put = async |what: &str, value: &str| {
        let key = format!("/bakehouse/acme/{what}");
        // It has only just started.
        while etcds[0].transact(&[], &[Then::Put(&key, value.as_bytes())]).await.is_err() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let leader = async || {
        let found = etcds[2].get(&["/bakehouse/acme/leader"]).await.expect("etcd");
        String::from_utf8(found[0].value.clone()).expect("text")
    };
    let reached = BTreeSet::from(["db-2".to_owned()]);
    let nobody = BTreeSet::new();

    // A standby that is lost is Patroni's business; a primary without an heir keeps its place, and its key.
    put("leader", "db-3").await;
    put("sync", r#"{"leader":"db-3","sync_standby":"db-2"}"#).await;
    assert!(hub(0).depose("db-1", &reached, &mut shut[0]).await.expect("etcd"));
    put("leader", "db-1").await;
    assert!(!hub(0).depose("db-1", &reached, &mut shut[0]).await.expect("etcd"));
    put("sync", r#"{"leader":"db-1","sync_standby":"db-2"}"#).await;
    assert!(!hub(0).depose("db-1", &nobody, &mut shut[0]).await.expect("etcd"));
    assert!(neighbourhoods[0].out().is_empty() && shut[0].is_empty());

    // One hub alone shuts it out and changes nothing, however often it looks.
    for _ in 0..3 {
        assert!(!hub(0).depose("db-1", &reached, &mut shut[0]).await.expect("etcd"));
    }
    let out = neighbourhoods[0].out();
    assert_eq!(neighbourhoods[0].keys_without(&out).into_keys().collect::<Vec<_>>(), ["db-2"]);
    assert_eq!(neighbourhoods[0].keys().len(), 2, "others are told of its key as before");
    // What it said has ended, and what a stranger says does not count.
    let said = ["/bakehouse/shut/db-1/hub-1", "/bakehouse/shut/db-1/db-2", "/bakehouse/shut/db-11/hub-3"];
    let then = [Then::Delete(said[0]), Then::Put(said[1], b""), Then::Put(said[2], b"")];
    etcds[0].transact(&[], &then).await.expect("etcd");
    assert!(!hub(1).depose("db-1", &reached, &mut shut[1]).await.expect("etcd"));
    assert_eq!(leader().await, "db-1");
    // Two of three: its place is free, and whoever takes it stays.
    assert!(hub(2).depose("db-1", &reached, &mut shut[2]).await.expect("etcd"));
    assert_eq!(leader().await, "");
    put("leader", "db-2").await;
    for (i, shut) in shut.iter_mut().enumerate() {
        assert!(hub(i).depose("db-1", &reached, shut).await.expect("etcd"));
    }
    assert_eq!(leader().await, "db-2");
    neighbourhoods[2].let_in("db-1");
    assert_eq!(neighbourhoods[2].keys_without(&neighbourhoods[2].out()).len(), 2);
}

/// The member of etcd that a hub asks may be on the machine that is gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_does_not_answer_is_given_up_for_the_next() {
    let site = Site::open(24_300, "db.count = 2\n");
    let etcd = site.etcd(0).with_patience(fence::ANSWER);
    while etcd.get(&["/bakehouse/acme/leader"]).await.is_err() {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    // Its connections stand.
    site.cluster.freeze(0);
    let asked = Instant::now();
    while etcd.get(&["/bakehouse/acme/leader"]).await.is_err() {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    // Others may have to choose a leader; whoever waits for the frozen one does for ten seconds.
    assert!(asked.elapsed() < https::PATIENCE, "{:?}", asked.elapsed());
}

/// etcd is gone just when a hub has shut the primary out and is about to say so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_could_not_be_said_is_said_again() {
    let site = Arc::new(Site::open(24_500, "db.count = 2\n"));
    let dir = tempfile::tempdir().expect("a folder");
    let etcd = site.etcd(0).with_patience(fence::ANSWER);
    let keys = BTreeMap::from([("db-1".to_owned(), MeshKey([1; 32]))]);
    let neighbourhood = Arc::new(Neighbourhood::load(dir.path(), keys));
    let (mesh, mut changes, cut) = (neighbourhood.clone(), neighbourhood.follow(), site.clone());
    tokio::spawn(async move {
        changes.changed().await.expect("it lives as long");
        (0..3).for_each(|i| cut.cluster.freeze(i));
        loop {
            mesh.are_out(mesh.out());
            changes.changed().await.expect("it lives as long");
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
    let then = [Then::Put("/bakehouse/acme/leader", b"db-1"), Then::Put("/bakehouse/acme/sync", sync)];
    while etcd.transact(&[], &then).await.is_err() {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let (reached, mut shut) = (BTreeSet::from(["db-2".to_owned()]), BTreeMap::new());
    hub.depose("db-1", &reached, &mut shut).await.expect_err("etcd was there");
    assert!(neighbourhood.out().contains("db-1") && shut.contains_key("db-1"));

    (0..3).for_each(|i| site.cluster.thaw(i));
    // It is one of three, and deposes nobody.
    while !matches!(hub.depose("db-1", &reached, &mut shut).await, Ok(false)) {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let said = etcd.get(&["/bakehouse/shut/db-1/hub-1"]).await.expect("etcd");
    assert_ne!(said[0].revision, 0, "nobody was told");
}
