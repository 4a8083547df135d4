//! Quick HA in virtual machines: three nodes start from blank disks, then a rehearsal injects each single failure while
//! clients write to the database and read from Odoo.

use std::time::Instant;

use bakehouse_tests::{Machine, TestFleet};

#[test]
fn quick_ha_machines_survive_single_failures() {
    let lab = TestFleet::of_fleet("quick-ha", "quick-ha");
    // `Drop` switches them off when the test ends, also after a panic.
    let machines = ["front-1", "data-1", "work-1"].map(|name| Machine::for_node(&lab, name));
    let begun = Instant::now();
    lab.ok(&["up"]);
    println!("from blank disks to ready: {:.0} s", begun.elapsed().as_secs_f64());
    for machine in &machines {
        assert_eq!(machine.ok("systemctl --failed --no-legend --plain"), "");
    }

    let played = lab.run(&["rehearse", "hub", "db", "app", "--json"]);
    println!("{}{}", played.err, played.out);
    assert_eq!(played.status, 0, "the rehearsal missed a limit");
    let outcomes = played.result();
    let outcomes = outcomes.as_array().expect("a list");
    assert_eq!(outcomes.len(), 3, "{outcomes:?}");
    for outcome in outcomes {
        let count = |of: &str| outcome[of].as_u64().expect("a number");
        assert!(count("acknowledged") > 100, "no client wrote: {outcome}");
        assert_eq!((count("lost"), count("logouts"), count("primaries")), (0, 0, 1), "{outcome}");
        assert!(outcome["http"].is_f64(), "no client read from Odoo: {outcome}");
    }
}
