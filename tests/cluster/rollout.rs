//! Update decisions of three hubs, with a real etcd on loopback.

use std::collections::BTreeSet;

use bakehouse_tests::network::in_own_network;
use bakehouse_tests::site::TestCluster;
use fleet::{Issuer, PROTOCOL, Report, RolloutOrder, UpdateDecision, UpdateState};

/// All nodes request the update lock from all hubs at the same time. One node holds the lock until it releases it.
#[test]
fn one_node_at_a_time_updates() {
    in_own_network(async {
        let site = TestCluster::open("app.count = 3\n");
        let members = site.members("app", 3).await;
        let says = async |i: usize, hub: usize, image: &str, doing: UpdateState| -> Result<UpdateDecision, String> {
            let report = Report { version: PROTOCOL, image: image.to_owned(), doing };
            let (asker, grant) = &members[i];
            let body = serde_json::to_vec(&report).expect("JSON");
            let answer = site.member(hub, (asker, grant), ("POST", "/v1/turn"), body).await?;
            Ok(serde_json::from_slice(&answer).expect("a reply"))
        };
        let wants = |image: &str| UpdateState::Available {
            image: image.to_owned(),
            leads: false,
            primary: false,
            unwell: false,
        };
        // The hubs grant nothing before every node has reported.
        assert!(says(0, 0, "1", wants("2")).await.expect("a reply").why.ends_with("is silent"));
        for (i, hub) in [(1, 1), (2, 2)] {
            says(i, hub, "1", UpdateState::Serving).await.expect("a reply");
        }
        // Only the root's key signs valid orders.
        let other = Issuer::root("acme").expect("randomness");
        let pause = RolloutOrder::Pause { why: "month's end".to_owned() };
        assert!(site.rollout(pause.clone(), &other).await.is_err());
        assert_eq!(site.rollout(pause, &site.root).await.expect("a reply").paused.as_deref(), Some("month's end"));
        assert!(says(0, 0, "1", wants("2")).await.expect("a reply").why.contains("month's end"));
        site.rollout(RolloutOrder::Resume, &site.root).await.expect("a reply");

        let mut done = BTreeSet::new();
        while done.len() < 2 {
            let waiting: Vec<usize> = (0..3).filter(|i| !done.contains(i)).collect();
            let asked = waiting.iter().flat_map(|i| (0..3).map(move |hub| (*i, hub)));
            let answers =
                asked.map(async |(i, hub)| (i, says(i, hub, "1", wants("2")).await.expect("a reply").granted));
            let answers = futures_util::future::join_all(answers).await;
            let may: BTreeSet<usize> = answers.into_iter().filter(|(_, go)| *go).map(|(i, _)| i).collect();
            assert_eq!(may.len(), 1, "{may:?} update at the same time");
            let turn = *may.first().expect("one");
            says(turn, 0, "2", UpdateState::Starting).await.expect("a reply");
            let left = *waiting.iter().find(|i| **i != turn).expect("another");
            assert!(!says(left, 1, "1", wants("2")).await.expect("a reply").granted, "two nodes have the update lock");
            says(turn, 2, "2", UpdateState::Serving).await.expect("a reply");
            done.insert(turn);
        }
        // The last node rolls back: the hubs deny that version and release the update lock.
        let last = (0..3).find(|i| !done.contains(i)).expect("one");
        assert!(says(last, 0, "1", wants("2")).await.expect("a reply").granted);
        says(last, 1, "1", UpdateState::RolledBack { from: "2".to_owned() }).await.expect("a reply");
        assert!(says(last, 2, "1", wants("2")).await.expect("a reply").why.contains("version 2 is denied"));
        let seen = site.rollout(RolloutOrder::Tell, &site.root).await.expect("a reply");
        assert_eq!((seen.turn, seen.held), (None, false));
        // A version that only one node reports as available is not granted.
        let why = says(last, 0, "1", wants("3")).await.expect("a reply").why;
        assert!(why.contains("no other node is offered version 3"), "{why}");
        let other = *done.first().expect("one");
        says(other, 1, "3", UpdateState::Serving).await.expect("a reply");
        assert!(says(last, 0, "1", wants("3")).await.expect("a reply").granted);
        says(other, 1, "3", wants("4")).await.expect("a reply");
        // A node that is unhealthy after its update gets the next version first, because that may repair it.
        let unwell = UpdateState::Available { image: "4".to_owned(), leads: false, primary: false, unwell: true };
        assert!(says(last, 1, "3", unwell).await.expect("a reply").granted);
        let seen = site.rollout(RolloutOrder::Tell, &site.root).await.expect("a reply");
        assert_eq!(seen.turn.map(|turn| turn.to).as_deref(), Some("4"));
        assert!(seen.denied["3"].contains("is not well"), "{:?}", seen.denied);
    });
}

/// A compromised member requests the update lock for versions that do not exist, reports a rollback of every version,
/// and never finishes its start. The operator's orders override its reports.
#[test]
fn operator_overrides_denials_of_a_compromised_node() {
    in_own_network(async {
        let site = TestCluster::open("app.count = 3\n");
        let members = site.members("app", 3).await;
        let says = async |i: usize, image: &str, doing: UpdateState| -> UpdateDecision {
            let report = Report { version: PROTOCOL, image: image.to_owned(), doing };
            let (asker, grant) = &members[i];
            let body = serde_json::to_vec(&report).expect("JSON");
            let answer = site.member(0, (asker, grant), ("POST", "/v1/turn"), body).await.expect("a reply");
            serde_json::from_slice(&answer).expect("a reply")
        };
        let wants = |image: &str, unwell| UpdateState::Available {
            image: image.to_owned(),
            leads: false,
            primary: false,
            unwell,
        };
        let order = async |order: RolloutOrder| site.rollout(order, &site.root).await.expect("a hub accepts the order");
        for i in [1, 2] {
            says(i, "1", UpdateState::Serving).await;
        }
        for version in ["7", "8"] {
            for unwell in [true, false] {
                assert!(
                    !says(0, "1", wants(version, unwell)).await.granted,
                    "granted a version that no other node is offered"
                );
            }
            says(0, "1", UpdateState::RolledBack { from: version.to_owned() }).await;
        }
        let seen = order(RolloutOrder::Tell).await;
        assert_eq!((seen.denied.len(), seen.turn), (0, None));

        // The version is published. The compromised node gets the lock, denies the version, and the operator allows it.
        says(1, "1", wants("7", false)).await;
        assert!(says(0, "1", wants("7", false)).await.granted);
        says(0, "1", UpdateState::RolledBack { from: "7".to_owned() }).await;
        assert!(says(1, "1", wants("7", false)).await.why.contains("version 7 is denied"));
        let seen = order(RolloutOrder::Allow { version: "7".to_owned() }).await;
        assert!(seen.denied.is_empty() && seen.allowed.contains("7"));
        // It reports an endless start. After the operator skips it, it blocks no other node and gets no lock.
        says(0, "1", UpdateState::Starting).await;
        assert!(says(1, "1", wants("7", false)).await.why.contains("app-1 is starting"));
        let seen = order(RolloutOrder::Skip { node: "app-1".to_owned() }).await;
        assert!(seen.skipped["app-1"] > 1_700_000_000, "{seen:?}");
        assert!(says(1, "1", wants("7", false)).await.granted);
        says(1, "7", UpdateState::Serving).await;
        assert!(says(0, "1", wants("7", true)).await.why.contains("skips app-1"));
        assert!(says(0, "1", wants("7", false)).await.granted, "the hubs skip a healthy node");
        assert!(order(RolloutOrder::Tell).await.skipped.is_empty());
        let unknown = RolloutOrder::Skip { node: "app-9".to_owned() };
        assert!(site.rollout(unknown, &site.root).await.expect_err("an unknown node").contains("no node `app-9`"));
    });
}
