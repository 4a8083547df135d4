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
        Ok(serde_json::from_slice(&answer).expect("an answer"))
    };
    let wants = |image: &str| Doing::Wants { image: image.to_owned(), leads: false, primary: false, unwell: false };
    // Nobody, as long as not everybody has spoken.
    assert!(says(0, 0, "1", wants("2")).await.expect("an answer").why.ends_with("is silent"));
    for (i, hub) in [(1, 1), (2, 2)] {
        says(i, hub, "1", Doing::Serving).await.expect("an answer");
    }
    // Only who has the root gives orders.
    let other = Issuer::root("acme").expect("randomness");
    let pause = RolloutOrder::Pause { why: "month's end".to_owned() };
    assert!(site.rollout(pause.clone(), &other).await.is_err());
    assert_eq!(site.rollout(pause, &site.root).await.expect("an answer").paused.as_deref(), Some("month's end"));
    assert!(says(0, 0, "1", wants("2")).await.expect("an answer").why.contains("month's end"));
    site.rollout(RolloutOrder::Resume, &site.root).await.expect("an answer");

    let mut done = BTreeSet::new();
    while done.len() < 2 {
        let waiting: Vec<usize> = (0..3).filter(|i| !done.contains(i)).collect();
        let asked = waiting.iter().flat_map(|i| (0..3).map(move |hub| (*i, hub)));
        let answers = asked.map(async |(i, hub)| (i, says(i, hub, "1", wants("2")).await.expect("an answer").go));
        let answers = futures_util::future::join_all(answers).await;
        let may: BTreeSet<usize> = answers.into_iter().filter(|(_, go)| *go).map(|(i, _)| i).collect();
        assert_eq!(may.len(), 1, "{may:?} change at the same time");
        let turn = *may.first().expect("one");
        says(turn, 0, "2", Doing::Starting).await.expect("an answer");
        let left = *waiting.iter().find(|i| **i != turn).expect("another");
        assert!(!says(left, 1, "1", wants("2")).await.expect("an answer").go, "its turn is not over");
        says(turn, 2, "2", Doing::Serving).await.expect("an answer");
        done.insert(turn);
    }
    // The last one fails: nobody tries that version again, and the turn is free for the next.
    let last = (0..3).find(|i| !done.contains(i)).expect("one");
    assert!(says(last, 0, "1", wants("2")).await.expect("an answer").go);
    says(last, 1, "1", Doing::WentBack { from: "2".to_owned() }).await.expect("an answer");
    assert!(says(last, 2, "1", wants("2")).await.expect("an answer").why.contains("nobody takes version 2"));
    let seen = site.rollout(RolloutOrder::Tell, &site.root).await.expect("an answer");
    assert_eq!((seen.turn, seen.held), (None, false));
    assert!(says(last, 0, "1", wants("3")).await.expect("an answer").go);
    // It comes up, is taken for a good one, and does not do its work: what may mend it is for it first.
    let unwell = Doing::Wants { image: "4".to_owned(), leads: false, primary: false, unwell: true };
    assert!(says(last, 1, "3", unwell).await.expect("an answer").go);
    let seen = site.rollout(RolloutOrder::Tell, &site.root).await.expect("an answer");
    assert_eq!(seen.turn.map(|turn| turn.to).as_deref(), Some("4"));
    assert!(seen.denied["3"].contains("is not well"), "{:?}", seen.denied);
}
