//! Quick HA as its user meets it: three machines from blank disks to ready, and then each thing
//! that may die does, under clients that write and look at Odoo.

use std::time::Instant;

use bakehouse_tests::{Lab, Machine};

#[test]
fn three_machines_from_blank_disks_outlive_what_may_die() {
    let lab = Lab::of_fleet("quick-ha", "quick-ha");
    // Switched off when the test ends, however it does.
    let machines = ["front-1", "data-1", "work-1"].map(|name| Machine::of(&lab, name));
    let begun = Instant::now();
    lab.ok(&["up"]);
    println!("from nothing to ready: {:.0} s", begun.elapsed().as_secs_f64());
    for machine in &machines {
        assert_eq!(machine.ok("systemctl --failed --no-legend --plain"), "");
    }

    let played = lab.run(&["rehearse", "hub", "db", "app", "--json"]);
    println!("{}{}", played.err, played.out);
    assert_eq!(played.status, 0, "a promise was not kept");
    let outcomes: serde_json::Value = serde_json::from_str(&played.out).expect("JSON");
    let outcomes = outcomes.as_array().expect("a list");
    assert_eq!(outcomes.len(), 3, "{outcomes:?}");
    for outcome in outcomes {
        let count = |of: &str| outcome[of].as_u64().expect("a number");
        assert!(count("acknowledged") > 100, "nobody wrote: {outcome}");
        assert_eq!((count("lost"), count("logouts"), count("primaries")), (0, 0, 1), "{outcome}");
        assert!(outcome["http"].is_f64(), "nobody looked at Odoo: {outcome}");
    }
}
