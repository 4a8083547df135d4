//! Rolling updates of whole fleets while clients write to the database and read from Odoo, and rollouts that stop at a
//! version whose Odoo fails. Quick HA runs in virtual machines, the fleet `ha` in containers.

use std::thread::sleep;
use std::time::{Duration, Instant};

use bakehouse_tests::updates::{LOOK, is_blessed, is_denied, offer, prepare, runs, serve_updates};
use bakehouse_tests::{Machine, TestFleet};
use builder::project::Project;
use fleet::Node;

#[test]
fn three_machines_update_under_load() {
    changes_under_load("rolling", "quick-ha", &["up"]);
}

#[test]
fn eight_containers_update_under_load() {
    changes_under_load("rolling-containers", "ha", &["up", "--containers"]);
}

#[test]
fn three_machines_stop_rollout_of_failing_version() {
    stops_at_what_does_not_work("broken", "quick-ha", &["up"]);
}

#[test]
fn eight_containers_stop_rollout_of_failing_version() {
    stops_at_what_does_not_work("broken-containers", "ha", &["up", "--containers"]);
}

/// Returns the fleet's nodes. `Drop` switches their machines off when the test ends, also after a panic.
fn machines(lab: &TestFleet) -> Vec<(Node, Machine)> {
    let nodes = Project::load(&lab.dir).expect("a valid fleet.toml").topology.nodes;
    nodes.into_iter().map(|node| (node.clone(), Machine::for_node(lab, &node.name))).collect()
}

fn changes_under_load(name: &str, fleet: &str, up: &[&str]) {
    let lab = TestFleet::of_fleet(name, fleet);
    let _server = serve_updates(&lab);
    let machines = machines(&lab);
    prepare(&lab, "overlays/haproxy/run/bakehouse/haproxy.cfg.j2", "# HAProxy of", "# Changed. HAProxy of");
    lab.ok(up);

    offer(&lab);
    let begun = Instant::now();
    let played = lab.run(&["rehearse", "upgrade", "--json"]);
    println!("{}{}after {:.0} s", played.err, played.out, begun.elapsed().as_secs_f64());
    assert_eq!(played.status, 0, "the rehearsal missed a limit");
    assert!(played.out.contains("\"upgrade\""), "the scenario did not run");
    for (node, machine) in &machines {
        assert_eq!(runs(machine), "2");
        is_blessed(machine);
        if node.has_role("hub") {
            assert!(machine.ok("cat /run/bakehouse/haproxy.cfg").starts_with("# Changed."));
        }
        assert_eq!(machine.ok("systemctl --failed --no-legend --plain"), "");
    }
}

fn stops_at_what_does_not_work(name: &str, fleet: &str, up: &[&str]) {
    let lab = TestFleet::of_fleet(name, fleet);
    let _server = serve_updates(&lab);
    let machines = machines(&lab);
    // Odoo accepts this configuration, but PostgreSQL rejects the password in it.
    let password = "db_password = {{ secrets.odoo }}";
    prepare(&lab, "overlays/odoo/run/bakehouse/odoo.conf.j2", password, &format!("{password}-of-yesterday"));
    lab.ok(up);

    offer(&lab);
    for (_, machine) in &machines {
        assert_eq!(machine.ok(LOOK), "2");
    }
    // Each of the three boots may take 10 min, the limit of the health check.
    let back = |(node, machine): &&(Node, Machine)| {
        let console = machine.console();
        let (tries, last) = (console.matches("this image is not well").count(), console.rsplit("not well").next());
        tries == 3 && last.is_some_and(|rest| rest.contains(&format!("bakehouse: ready ({})", node.name)))
    };
    let looked = Instant::now();
    let (failed, _) = loop {
        if let Some(found) = machines.iter().find(back) {
            break found;
        }
        assert!(looked.elapsed() < Duration::from_secs(4000), "no node rolled back version 2");
        sleep(Duration::from_secs(5));
    };
    println!("{} rolled back {:.0} s after the first check", failed.name, looked.elapsed().as_secs_f64());
    assert!(failed.has_role("app"));
    let hub = machines.iter().find(|(node, _)| node.has_role("hub")).map(|(_, machine)| machine);
    assert!(is_denied(hub.expect("a hub"), "2").contains(&format!("did not come up on {}", failed.name)));
    for (node, machine) in &machines {
        let runs = runs(machine);
        println!("{} runs version {runs}", node.name);
        // Nodes without Odoo may have updated before.
        let may_have_changed =
            !node.has_role("app") && fleet::disruption_order(node) <= fleet::disruption_order(failed);
        assert!(runs == "1" || may_have_changed && runs == "2", "{}: {runs}", node.name);
        let unwell = machine.console().matches("this image is not well").count();
        assert_eq!(unwell, if node.name == failed.name { 3 } else { 0 }, "{}", node.name);
    }
    // The fleet still serves Odoo.
    let login = "import ssl, urllib.request as r; tls = ssl.create_default_context(cafile='/run/bakehouse/tls/ca.crt'); \
        print(r.urlopen('https://10.10.0.100/web/login', timeout=300, context=tls).status)";
    let app = machines.iter().rev().find(|(node, _)| node.has_role("app")).map(|(_, machine)| machine);
    assert_eq!(app.expect("a fleet with Odoo").ok(&format!("python3 -c \"{login}\"")), "200");
}
