//! Who may change its image now, as a real etcd and three hubs on loopback say.

use std::collections::BTreeSet;

use bakehouse_tests::site::Site;
use fleet::{Answer, Doing, Issuer, PROTOCOL, Report, RolloutOrder};

/// Members ask for their turn of every hub at once: one has it, until it gives it back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_node_at_a_time_changes_its_image() {
    let site = Site::open(22_300, "app.count = 3\n");
    let members = site.members("app", 3).await;
    let says = async |i: usize, hub: usize, image: &str, doing: Doing| -> Result<Answer, String> {
        let report = Report { version: PROTOCOL, image: image.to_owned(), doing };
        let (asker, grant) = &members[i];
        let body = serde_json::to_vec(&report).expect("JSON");
        let answer = site.member(hub, (asker, grant), ("POST", "/v1/turn"), body).await?;
        Ok(serde_json::from_slice(&answer).expect("a reply"))
    };
    let wants = |image: &str| Doing::Wants { image: image.to_owned(), leads: false, primary: false, unwell: false };
    // Nobody, as long as not everybody has spoken.
    assert!(says(0, 0, "1", wants("2")).await.expect("a reply").why.ends_with("is silent"));
    for (i, hub) in [(1, 1), (2, 2)] {
        says(i, hub, "1", Doing::Serving).await.expect("a reply");
    }
    // Only who has the root gives orders.
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
        let answers = asked.map(async |(i, hub)| (i, says(i, hub, "1", wants("2")).await.expect("a reply").go));
        let answers = futures_util::future::join_all(answers).await;
        let may: BTreeSet<usize> = answers.into_iter().filter(|(_, go)| *go).map(|(i, _)| i).collect();
        assert_eq!(may.len(), 1, "{may:?} change at the same time");
        let turn = *may.first().expect("one");
        says(turn, 0, "2", Doing::Starting).await.expect("a reply");
        let left = *waiting.iter().find(|i| **i != turn).expect("another");
        assert!(!says(left, 1, "1", wants("2")).await.expect("a reply").go, "its turn is not over");
        says(turn, 2, "2", Doing::Serving).await.expect("a reply");
        done.insert(turn);
    }
    // The last one fails: nobody tries that version again, and the turn is free for the next.
    let last = (0..3).find(|i| !done.contains(i)).expect("one");
    assert!(says(last, 0, "1", wants("2")).await.expect("a reply").go);
    says(last, 1, "1", Doing::WentBack { from: "2".to_owned() }).await.expect("a reply");
    assert!(says(last, 2, "1", wants("2")).await.expect("a reply").why.contains("nobody takes version 2"));
    let seen = site.rollout(RolloutOrder::Tell, &site.root).await.expect("a reply");
    assert_eq!((seen.turn, seen.held), (None, false));
    // Offered to one node alone, it is nobody's.
    let why = says(last, 0, "1", wants("3")).await.expect("a reply").why;
    assert!(why.contains("no other node is offered version 3"), "{why}");
    let other = *done.first().expect("one");
    says(other, 1, "3", Doing::Serving).await.expect("a reply");
    assert!(says(last, 0, "1", wants("3")).await.expect("a reply").go);
    says(other, 1, "3", wants("4")).await.expect("a reply");
    // It comes up, is taken for a good one, and does not do its work: what may mend it is for it first.
    let unwell = Doing::Wants { image: "4".to_owned(), leads: false, primary: false, unwell: true };
    assert!(says(last, 1, "3", unwell).await.expect("a reply").go);
    let seen = site.rollout(RolloutOrder::Tell, &site.root).await.expect("a reply");
    assert_eq!(seen.turn.map(|turn| turn.to).as_deref(), Some("4"));
    assert!(seen.denied["3"].contains("is not well"), "{:?}", seen.denied);
}

/// A member that was taken over wants to keep every version from the fleet: it asks for turns of
/// versions that exist nowhere, denies what it had a turn for, and holds the others up. The operator has
/// the last word.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_node_alone_keeps_no_version_from_the_fleet() {
    let site = Site::open(25_900, "app.count = 3\n");
    let members = site.members("app", 3).await;
    let says = async |i: usize, image: &str, doing: Doing| -> Answer {
        let report = Report { version: PROTOCOL, image: image.to_owned(), doing };
        let (asker, grant) = &members[i];
        let body = serde_json::to_vec(&report).expect("JSON");
        let answer = site.member(0, (asker, grant), ("POST", "/v1/turn"), body).await.expect("a reply");
        serde_json::from_slice(&answer).expect("a reply")
    };
    let wants = |image: &str, unwell| Doing::Wants { image: image.to_owned(), leads: false, primary: false, unwell };
    let order = async |order: RolloutOrder| site.rollout(order, &site.root).await.expect("a hub accepts the order");
    for i in [1, 2] {
        says(i, "1", Doing::Serving).await;
    }
    for version in ["7", "8"] {
        for unwell in [true, false] {
            assert!(!says(0, "1", wants(version, unwell)).await.go, "a turn for a version that is nowhere");
        }
        says(0, "1", Doing::WentBack { from: version.to_owned() }).await;
    }
    let seen = order(RolloutOrder::Tell).await;
    assert_eq!((seen.denied.len(), seen.turn), (0, None));

    // The version is published. It takes its turn, as it may, and denies it: the operator allows it.
    says(1, "1", wants("7", false)).await;
    assert!(says(0, "1", wants("7", false)).await.go);
    says(0, "1", Doing::WentBack { from: "7".to_owned() }).await;
    assert!(says(1, "1", wants("7", false)).await.why.contains("nobody takes version 7"));
    let seen = order(RolloutOrder::Allow { version: "7".to_owned() }).await;
    assert!(seen.denied.is_empty() && seen.allowed.contains("7"));
    // It starts, without end; skipped, it holds nobody up, and has no turn.
    says(0, "1", Doing::Starting).await;
    assert!(says(1, "1", wants("7", false)).await.why.contains("app-1 is starting"));
    let seen = order(RolloutOrder::Skip { node: "app-1".to_owned() }).await;
    assert!(seen.skipped["app-1"] > 1_700_000_000, "{seen:?}");
    assert!(says(1, "1", wants("7", false)).await.go);
    says(1, "7", Doing::Serving).await;
    assert!(says(0, "1", wants("7", true)).await.why.contains("skips app-1"));
    assert!(says(0, "1", wants("7", false)).await.go, "it is well again");
    assert!(order(RolloutOrder::Tell).await.skipped.is_empty());
    let nobody = RolloutOrder::Skip { node: "app-9".to_owned() };
    assert!(site.rollout(nobody, &site.root).await.expect_err("there is none").contains("no node `app-9`"));
}
