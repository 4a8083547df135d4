use super::*;
use crate::join::PROTOCOL;
use crate::schema::Fleet;

/// Hubs and nodes of other versions read these names.
#[test]
fn wire_format_keeps_its_names() {
    let json = |state: &UpdateState| serde_json::to_string(state).unwrap();
    let available = UpdateState::Available { image: "2".into(), leads: false, primary: false, unwell: false };
    assert!(json(&available).starts_with(r#"{"wants":{"image":"2","#));
    assert_eq!(json(&UpdateState::RolledBack { from: "3".into() }), r#"{"went_back":{"from":"3"}}"#);
    assert_eq!(json(&UpdateState::Serving), r#""serving""#);
    let pause = RolloutOrder::Pause { why: "w".into() };
    assert_eq!(serde_json::to_string(&pause).unwrap(), r#"{"pause":{"why":"w"}}"#);
    let decision = UpdateDecision { granted: true, why: String::new() };
    assert_eq!(serde_json::to_string(&decision).unwrap(), r#"{"go":true,"why":""}"#);
}

fn topology() -> Topology {
    let toml = b"name=\"x\"\n[groups]\nhub.count=3\ndb.count=2\napp.count=2\nmonitor.count=1\n";
    Topology::from_fleet(&Fleet::parse("f", toml).unwrap())
}

fn report_of(image: &str, doing: UpdateState) -> Report {
    Report { version: PROTOCOL, image: image.to_owned(), doing }
}

fn offered(leads: bool) -> Report {
    report_of("1", UpdateState::Available { image: "2".to_owned(), leads, primary: false, unwell: false })
}

/// All nodes run version 1 and are offered version 2.
fn all_available(topology: &Topology) -> Rollout {
    let members: BTreeSet<String> = topology.nodes.iter().map(|n| n.name.clone()).collect();
    let leads = |name: &str| name == "hub-2" || name == "db-1";
    let nodes = members.iter().map(|m| (m.clone(), offered(leads(m)))).collect();
    Rollout { nodes, members, ..Rollout::default() }
}

#[test]
fn one_node_at_a_time_and_leaders_last() {
    let topology = topology();
    let mut fleet = all_available(&topology);
    let mut order = Vec::new();
    while order.len() < 8 {
        let may: Vec<String> = (fleet.nodes.iter())
            .filter(|(slot, report)| matches!(fleet.decide(&topology, slot, report), Verdict::Take(_)))
            .map(|(slot, _)| slot.clone())
            .collect();
        let slot = may.first().unwrap_or_else(|| panic!("no node may change after {order:?}")).clone();
        let turn = UpdateLock { slot: slot.clone(), from: "1".to_owned(), to: "2".to_owned() };
        fleet.turn = Some(turn);
        fleet.held = true;
        // All other nodes wait for the node. The node itself may ask again.
        for (other, report) in &fleet.nodes {
            let verdict = fleet.decide(&topology, other, report);
            assert_eq!(matches!(verdict, Verdict::Go), *other == slot, "{other}: {verdict:?}");
            assert!(!matches!(verdict, Verdict::Take(_)), "{other}");
        }
        let starting = report_of("2", UpdateState::Starting);
        assert!(matches!(fleet.decide(&topology, &slot, &starting), Verdict::Wait(_)));
        let done = report_of("2", UpdateState::Serving);
        assert_eq!(fleet.decide(&topology, &slot, &done), Verdict::Release);
        fleet.turn = None;
        fleet.nodes.insert(slot.clone(), done);
        order.push(slot);
    }
    assert_eq!(order, ["monitor-1", "app-1", "app-2", "db-2", "db-1", "hub-1", "hub-3", "hub-2"]);
}

/// In quick-ha one machine can hold the VIP and another have the primary.
#[test]
fn primary_moves_once() {
    let toml = b"name=\"x\"\n[groups]\nhub.count=3\nhub.roles=[\"hub\",\"db\"]\n";
    let topology = Topology::from_fleet(&Fleet::parse("f", toml).unwrap());
    let mut fleet = all_available(&topology);
    let primary =
        report_of("1", UpdateState::Available { image: "2".into(), leads: true, primary: true, unwell: false });
    fleet.nodes.insert("hub-1".into(), primary.clone());
    let holder = offered(true);
    assert_eq!(fleet.decide(&topology, "hub-1", &primary), Verdict::Wait("hub-2 goes first".into()));
    assert_eq!(fleet.decide(&topology, "hub-2", &holder), Verdict::Wait("hub-3 goes first".into()));
    fleet.nodes.insert("hub-3".into(), report_of("2", UpdateState::Serving));
    assert!(matches!(fleet.decide(&topology, "hub-2", &holder), Verdict::Take(_)));
    fleet.nodes.insert("hub-2".into(), report_of("2", UpdateState::Serving));
    assert!(matches!(fleet.decide(&topology, "hub-1", &primary), Verdict::Take(_)));
    // An older agent reports only `leads`.
    let older: UpdateState = serde_json::from_str(r#"{"wants":{"image":"2","leads":true}}"#).unwrap();
    assert_eq!(older, holder.doing);
}

#[test]
fn first_failure_stops_the_rollout() {
    let topology = topology();
    let mut fleet = all_available(&topology);
    fleet.turn = Some(UpdateLock { slot: "app-1".into(), from: "1".into(), to: "2".into() });
    fleet.held = true;
    let back = report_of("1", UpdateState::RolledBack { from: "2".into() });
    // Only the holder of the lock can deny a version, and only the version of the lock.
    assert_eq!(fleet.decide(&topology, "app-2", &back), Verdict::Wait(String::new()));
    let other = report_of("1", UpdateState::RolledBack { from: "3".into() });
    assert_eq!(fleet.decide(&topology, "app-1", &other), Verdict::Release);
    let Verdict::Deny { image, why } = fleet.decide(&topology, "app-1", &back) else { panic!() };
    assert_eq!(image, "2");
    fleet.denied.insert(image, why);
    fleet.turn = None;
    assert_eq!(fleet.decide(&topology, "app-1", &back), Verdict::Wait(String::new()));
    fleet.nodes.insert("app-1".into(), back);
    for (slot, report) in &fleet.nodes {
        assert!(matches!(fleet.decide(&topology, slot, report), Verdict::Wait(_)), "{slot}");
    }
    // A later version is not denied.
    let next =
        report_of("1", UpdateState::Available { image: "3".into(), leads: false, primary: false, unwell: false });
    fleet.nodes.insert("app-2".into(), next.clone());
    assert!(matches!(fleet.decide(&topology, "monitor-1", &next), Verdict::Take(_)));
}

/// A compromised node asks for a version that was never published, to deny it.
#[test]
fn version_of_one_node_alone_gets_no_lock() {
    let topology = topology();
    let mut fleet = all_available(&topology);
    for unwell in [false, true] {
        let made_up =
            report_of("1", UpdateState::Available { image: "999".into(), leads: false, primary: false, unwell });
        let verdict = fleet.decide(&topology, "monitor-1", &made_up);
        assert!(matches!(&verdict, Verdict::Wait(why) if why.contains("--allow 999")), "{verdict:?}");
    }
    let made_up =
        report_of("1", UpdateState::Available { image: "999".into(), leads: false, primary: false, unwell: false });
    // The report of a node that is not a member does not count.
    fleet.nodes.insert("stranger-1".into(), made_up.clone());
    assert!(matches!(fleet.decide(&topology, "monitor-1", &made_up), Verdict::Wait(_)));
    fleet.allowed.insert("999".into());
    assert!(matches!(fleet.decide(&topology, "monitor-1", &made_up), Verdict::Take(_)));
    // In a fleet of one node, no other node can confirm a version.
    let alone = Rollout { members: ["hub-1".to_owned()].into(), ..Rollout::default() };
    assert!(matches!(alone.decide(&topology, "hub-1", &made_up), Verdict::Take(_)));
}

#[test]
fn skipped_node_blocks_no_node_and_gets_no_lock() {
    let topology = topology();
    for doing in [None, Some(UpdateState::Starting)] {
        let mut fleet = all_available(&topology);
        let unwell = UpdateState::Available { image: "2".into(), leads: false, primary: false, unwell: true };
        for doing in [doing.clone(), Some(unwell)] {
            match &doing {
                Some(doing) => drop(fleet.nodes.insert("db-2".into(), report_of("1", doing.clone()))),
                None => drop(fleet.nodes.remove("db-2")),
            }
            fleet.skipped.clear();
            assert!(matches!(fleet.decide(&topology, "monitor-1", &offered(false)), Verdict::Wait(_)), "{doing:?}");
            fleet.skipped.insert("db-2".into(), 1);
            assert!(matches!(fleet.decide(&topology, "monitor-1", &offered(false)), Verdict::Take(_)), "{doing:?}");
        }
        assert!(
            matches!(fleet.decide(&topology, "db-2", &offered(false)), Verdict::Wait(why) if why.contains("skips"))
        );
    }
}

#[test]
fn rollout_is_blocked_if_nodes_wait_and_none_changes() {
    let topology = topology();
    let mut fleet = all_available(&topology);
    assert!(fleet.is_blocked());
    fleet.paused = Some("month's end".into());
    assert!(!fleet.is_blocked());
    fleet.paused = None;
    fleet.turn = Some(UpdateLock { slot: "app-1".into(), from: "1".into(), to: "2".into() });
    assert!(!fleet.is_blocked() && !Rollout::default().is_blocked());
    // Hubs of the previous version leave the new fields out.
    let old = r#"{"turn":null,"held":false,"paused":null,"denied":{},"nodes":{},"members":["hub-1"]}"#;
    assert!(serde_json::from_str::<Rollout>(old).unwrap().skipped.is_empty());
}

#[test]
fn node_that_does_not_return_in_time_denies_the_version() {
    let topology = topology();
    let mut fleet = all_available(&topology);
    fleet.turn = Some(UpdateLock { slot: "app-1".into(), from: "1".into(), to: "2".into() });
    fleet.nodes.remove("app-1");
    let verdict = fleet.decide(&topology, "hub-1", &report_of("1", UpdateState::Serving));
    assert!(matches!(verdict, Verdict::Deny { ref image, .. } if image == "2"), "{verdict:?}");
    // If the node returns later, the hub only releases the lock.
    assert_eq!(fleet.decide(&topology, "app-1", &report_of("2", UpdateState::Serving)), Verdict::Release);
}

/// Version 2 counts as good on app-1, but a role is down. Version 3 may fix it.
#[test]
fn unwell_node_takes_the_newer_version_first() {
    let topology = topology();
    let mut fleet = all_available(&topology);
    fleet.turn = Some(UpdateLock { slot: "app-1".into(), from: "1".into(), to: "2".into() });
    fleet.held = true;
    let unwell =
        |image: &str| UpdateState::Available { image: image.into(), leads: false, primary: false, unwell: true };
    let report = report_of("2", unwell("3"));
    fleet.nodes.insert("app-1".into(), report.clone());
    let Verdict::Deny { image, why } = fleet.decide(&topology, "app-1", &report) else { panic!() };
    assert_eq!((image.as_str(), why.as_str()), ("2", "with it app-1 is not well"));
    fleet.denied.insert(image, why);
    fleet.turn = None;
    let of_three = UpdateState::Available { image: "3".into(), leads: false, primary: false, unwell: false };
    let monitor = report_of("1", of_three);
    assert_eq!(fleet.decide(&topology, "monitor-1", &monitor), Verdict::Wait("app-1 is not well".into()));
    // An unwell node does not wait for another unwell node, but for a starting one.
    fleet.nodes.insert("hub-1".into(), report_of("1", unwell("3")));
    assert!(matches!(fleet.decide(&topology, "app-1", &report), Verdict::Take(turn) if turn.to == "3"));
    fleet.nodes.insert("db-1".into(), report_of("1", UpdateState::Starting));
    assert_eq!(fleet.decide(&topology, "app-1", &report), Verdict::Wait("db-1 is starting".into()));
    // An older hub ignores `unwell`.
    let json = serde_json::to_string(&unwell("3")).unwrap();
    assert_eq!(json, r#"{"wants":{"image":"3","leads":false,"unwell":true}}"#);
}

#[test]
fn no_node_changes_while_another_is_missing_or_the_rollout_is_paused() {
    let topology = topology();
    let mut fleet = all_available(&topology);
    let monitor = |fleet: &Rollout| fleet.decide(&topology, "monitor-1", &offered(false));
    assert!(matches!(monitor(&fleet), Verdict::Take(_)));
    fleet.nodes.insert("db-2".into(), report_of("1", UpdateState::Starting));
    assert_eq!(monitor(&fleet), Verdict::Wait("db-2 is starting".into()));
    fleet.nodes.remove("db-2");
    assert_eq!(monitor(&fleet), Verdict::Wait("db-2 is silent".into()));
    // A slot without an owner is not missing.
    fleet.members.remove("db-2");
    assert!(matches!(monitor(&fleet), Verdict::Take(_)));
    fleet.paused = Some("month's end".into());
    assert!(matches!(monitor(&fleet), Verdict::Wait(why) if why.contains("month's end")));
}

#[test]
fn the_last_node_of_a_role_that_is_not_drained_waits() {
    let topology = topology();
    let mut fleet = all_available(&topology);
    // Otherwise it goes first.
    fleet.nodes.insert("monitor-1".into(), report_of("2", UpdateState::Serving));
    fleet.drained = [("app-2".to_owned(), 1)].into();
    let of = |fleet: &Rollout, slot: &str| fleet.decide(&topology, slot, &offered(false));
    let why = "app-1 is the last app node that is not drained; to continue: `bakehouse undrain app-2`";
    assert_eq!(of(&fleet, "app-1"), Verdict::Wait(why.to_owned()));
    // A drained node updates as usual, and a role with another node has its reserve.
    assert!(matches!(of(&fleet, "app-2"), Verdict::Take(_)));
    fleet.drained = [("hub-1".to_owned(), 1), ("monitor-1".to_owned(), 1)].into();
    assert!(matches!(of(&fleet, "app-1"), Verdict::Take(_)));
    // A slot without an owner is no reserve. A fleet with one node of a role has none anyway.
    fleet.drained = [("hub-1".to_owned(), 1)].into();
    fleet.members.remove("hub-3");
    assert!(matches!(of(&fleet, "hub-2"), Verdict::Wait(why) if why.contains("undrain hub-1")));
    fleet.members.remove("hub-1");
    assert!(!matches!(of(&fleet, "hub-2"), Verdict::Wait(why) if why.contains("undrain")));
    // Hubs of the previous version read the state, and leave the key out.
    let json = serde_json::to_value(Rollout::default()).unwrap();
    assert!(json.get("drained").is_none());
    assert_eq!(serde_json::from_value::<Rollout>(json).unwrap(), Rollout::default());
}
