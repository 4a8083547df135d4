//! Quick HA as its user meets it, in containers: the images' own services as fast as this host is, without a factor
//! on any promise. Three nodes from nothing to ready, and then each thing that may die does, under clients that write
//! and look at Odoo.

use std::time::Instant;

use bakehouse_tests::{Lab, Machine};
use serde_json::Value;

#[test]
fn three_containers_from_nothing_outlive_what_may_die() {
    let lab = Lab::of_fleet("containers", "quick-ha");
    // Switched off when the test ends, however it does.
    let machines = ["front-1", "data-1", "work-1"].map(|name| Machine::of(&lab, name));
    let begun = Instant::now();
    lab.ok(&["up", "--containers"]);
    println!("from nothing to ready: {:.0} s", begun.elapsed().as_secs_f64());
    for machine in &machines {
        assert_eq!(machine.ok("systemd-detect-virt"), "container-other");
        assert_eq!(machine.ok("systemctl --failed --no-legend --plain"), "");
        // A filter is there before the network is, then the node's own.
        let since = |unit: &str| {
            let began = machine.ok(&format!("systemctl show -p ActiveEnterTimestampMonotonic --value {unit}"));
            began.parse::<u64>().expect("microseconds")
        };
        assert!(since("early-filter") > 0 && since("early-filter") < since("systemd-networkd"));
        assert!(machine.ok("nft list chain inet bakehouse from_mesh").contains("\"mesh_dropped\" drop"));
    }
    let opened = "journalctl -b -u patroni -o cat | grep -q 'INFO: Watchdog .* activated with 15 second timeout'";
    assert!(machines.iter().any(|m| m.exec(opened).status == 0), "the primary has no watchdog");
    // They are no machines by mistake.
    let refused = lab.run(&["up"]);
    assert_ne!(refused.status, 0);
    assert!(
        refused.err.contains("runs as a container; to have it as a machine, `bakehouse down` first"),
        "{}",
        refused.err
    );

    // While the VIP is nowhere, who connects is not told that there is no such host, and tries again.
    let everywhere = |what: &str| machines.iter().for_each(|m| drop(m.ok(&format!("systemctl {what} keepalived"))));
    everywhere("stop");
    let connect = "import socket; s = socket.socket(); s.settimeout(4)\ntry: s.connect(('10.10.0.100', 443))\n\
        except OSError as e: print(e)";
    assert_eq!(machines[0].ok(&format!("python3 -c \"{connect}\"")), "timed out");
    everywhere("start");

    // As an earlier version had it: the next primary's image says otherwise.
    let patronictl = "patronictl -c /run/bakehouse/patroni.yml";
    machines[1].ok(&format!("{patronictl} edit-config --quiet --force --set ttl=21"));
    let settings = || machines[1].ok(&format!("{patronictl} show-config"));
    assert!(settings().contains("ttl: 21"));

    let played = lab.run(&["rehearse", "hub", "db", "app", "--json"]);
    println!("{}{}", played.err, played.out);
    assert_eq!(played.status, 0, "a promise was not kept");
    let outcomes: Vec<Value> = serde_json::from_str(&played.out).expect("JSON");
    assert_eq!(outcomes.len(), 3, "{outcomes:?}");
    for outcome in &outcomes {
        let count = |of: &str| outcome[of].as_u64().expect("a number");
        assert!(count("acknowledged") > 100, "nobody wrote: {outcome}");
        assert_eq!((count("lost"), count("logouts"), count("primaries")), (0, 0, 1), "{outcome}");
        assert!(outcome["http"].is_f64(), "nobody looked at Odoo: {outcome}");
    }
    assert!(settings().contains("ttl: 20"), "{}", settings());
    // And as a fleet has it that began with one database: the next primary has a synchronous standby again.
    machines[1].ok(&format!(
        "{patronictl} edit-config --quiet --force --set synchronous_mode=false && {patronictl} switchover --force"
    ));
    for what in ["show-config | grep 'synchronous_mode: true'", "list | grep 'Sync Standby'"] {
        machines[1].ok(&format!("for i in $(seq 60); do {patronictl} {what} && exit; sleep 1; done; exit 1"));
    }

    // A database that can't hand over its last WAL, as the backups' host went first, is switched off in the end.
    lab.run(&["down"]);
    assert!(lab.ok(&["status"]).out.lines().all(|line| line.contains(" off")), "{}", lab.ok(&["status"]).out);
}
