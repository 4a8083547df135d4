//! Quick HA in containers: the images' own services run at the host's speed, so no limit is scaled. Three nodes start
//! from empty folders, then a rehearsal injects each single failure while clients write to the database and read from
//! Odoo.

use std::time::Instant;

use bakehouse_tests::{Machine, TestFleet};
use serde_json::Value;

#[test]
fn quick_ha_containers_survive_single_failures() {
    let lab = TestFleet::of_fleet("containers", "quick-ha");
    // `Drop` switches them off when the test ends, also after a panic.
    let machines = ["front-1", "data-1", "work-1"].map(|name| Machine::of(&lab, name));
    let begun = Instant::now();
    lab.ok(&["up", "--containers"]);
    println!("from empty folders to ready: {:.0} s", begun.elapsed().as_secs_f64());
    for machine in &machines {
        assert_eq!(machine.ok("systemd-detect-virt"), "container-other");
        assert_eq!(machine.ok("systemctl --failed --no-legend --plain"), "");
        // The early filter protects the node before its own rules are loaded.
        let since = |unit: &str| {
            let began = machine.ok(&format!("systemctl show -p ActiveEnterTimestampMonotonic --value {unit}"));
            began.parse::<u64>().expect("microseconds")
        };
        assert!(since("early-filter") > 0 && since("early-filter") < since("systemd-networkd"));
        assert!(machine.ok("nft list chain inet bakehouse from_mesh").contains("\"mesh_dropped\" drop"));
    }
    let opened = "journalctl -b -u patroni -o cat | grep -q 'INFO: Watchdog .* activated with 15 second timeout'";
    assert!(machines.iter().any(|m| m.exec(opened).status == 0), "the primary has no watchdog");
    // `up` without `--containers` must not start the same nodes as virtual machines.
    let refused = lab.run(&["up"]);
    assert_ne!(refused.status, 0);
    assert!(
        refused.err.contains("runs as a container; to have it as a machine, `bakehouse down` first"),
        "{}",
        refused.err
    );

    // While no hub holds the VIP, a connection times out. "No route to host" would make clients give up.
    let everywhere = |what: &str| machines.iter().for_each(|m| drop(m.ok(&format!("systemctl {what} keepalived"))));
    everywhere("stop");
    let connect = "import socket; s = socket.socket(); s.settimeout(4)\ntry: s.connect(('10.10.0.100', 443))\n\
        except OSError as e: print(e)";
    assert_eq!(machines[0].ok(&format!("python3 -c \"{connect}\"")), "timed out");
    everywhere("start");

    // A setting of an earlier version: the next primary replaces it by the one of its image.
    let patronictl = "patronictl -c /run/bakehouse/patroni.yml";
    machines[1].ok(&format!("{patronictl} edit-config --quiet --force --set ttl=21"));
    let settings = || machines[1].ok(&format!("{patronictl} show-config"));
    assert!(settings().contains("ttl: 21"));

    let played = lab.run(&["rehearse", "hub", "db", "app", "--json"]);
    println!("{}{}", played.err, played.out);
    assert_eq!(played.status, 0, "the rehearsal missed a limit");
    let outcomes: Vec<Value> = serde_json::from_str(&played.out).expect("JSON");
    assert_eq!(outcomes.len(), 3, "{outcomes:?}");
    for outcome in &outcomes {
        let count = |of: &str| outcome[of].as_u64().expect("a number");
        assert!(count("acknowledged") > 100, "no client wrote: {outcome}");
        assert_eq!((count("lost"), count("logouts"), count("primaries")), (0, 0, 1), "{outcome}");
        assert!(outcome["http"].is_f64(), "no client read from Odoo: {outcome}");
    }
    assert!(settings().contains("ttl: 20"), "{}", settings());
    // A fleet that began with one database has synchronous mode off: the next primary turns it on.
    machines[1].ok(&format!(
        "{patronictl} edit-config --quiet --force --set synchronous_mode=false && {patronictl} switchover --force"
    ));
    for what in ["show-config | grep 'synchronous_mode: true'", "list | grep 'Sync Standby'"] {
        machines[1].ok(&format!("for i in $(seq 60); do {patronictl} {what} && exit; sleep 1; done; exit 1"));
    }

    // `down` also ends a database that cannot archive its last WAL because the backup node stopped first.
    lab.run(&["down"]);
    assert!(lab.ok(&["status"]).out.lines().all(|line| line.contains(" off")), "{}", lab.ok(&["status"]).out);
}
