//! Quick HA changes its images under clients that write and look at Odoo; and stops at a version
//! whose Odoo does not work.

use std::thread::sleep;
use std::time::{Duration, Instant};

use bakehouse_tests::updates::{LOOK, is_blessed, is_denied, offer, prepare, runs, serve_updates};
use bakehouse_tests::{Lab, Machine};

const NODES: [&str; 3] = ["front-1", "data-1", "work-1"];

#[test]
fn three_machines_change_under_load() {
    let lab = Lab::of_fleet("rolling", "quick-ha");
    let _server = serve_updates(&lab);
    // Switched off when the test ends, however it does.
    let machines = NODES.map(|name| Machine::of(&lab, name));
    prepare(&lab, "overlays/haproxy/run/bakehouse/haproxy.cfg.j2", "# HAProxy of", "# Changed. HAProxy of");
    lab.ok(&["up"]);

    offer(&lab);
    let begun = Instant::now();
    let played = lab.run(&["rehearse", "upgrade", "--json"]);
    println!("{}{}after {:.0} s", played.err, played.out, begun.elapsed().as_secs_f64());
    assert_eq!(played.status, 0, "a promise was not kept");
    for machine in &machines {
        assert_eq!(runs(machine), "2");
        is_blessed(machine);
        assert!(machine.ok("cat /run/bakehouse/haproxy.cfg").starts_with("# Changed."));
        assert_eq!(machine.ok("systemctl --failed --no-legend --plain"), "");
    }
}

#[test]
fn three_machines_stop_at_what_does_not_work() {
    let lab = Lab::of_fleet("broken", "quick-ha");
    let _server = serve_updates(&lab);
    let machines = NODES.map(|name| Machine::of(&lab, name));
    // Odoo's configuration is one it reads, and with it nobody gets into the database.
    let password = "db_password = {{ secrets.odoo }}";
    prepare(&lab, "overlays/odoo/run/bakehouse/odoo.conf.j2", password, &format!("{password}-of-yesterday"));
    lab.ok(&["up"]);

    offer(&lab);
    for machine in &machines {
        assert_eq!(machine.ok(LOOK), "2");
    }
    // One without Odoo may have changed before; each of the three tries may take the ten minutes that a boot has
    // to prove itself.
    let back = |console: &str, name: &str| {
        let (tries, last) = (console.matches("this image is not well").count(), console.rsplit("not well").next());
        tries == 3 && last.is_some_and(|rest| rest.contains(&format!("bakehouse: ready ({name})")))
    };
    let looked = Instant::now();
    let failed = loop {
        if let Some(i) = (0..3).find(|i| back(&machines[*i].console(), NODES[*i])) {
            break i;
        }
        assert!(looked.elapsed() < Duration::from_secs(4000), "nobody came back from version 2");
        sleep(Duration::from_secs(5));
    };
    println!("{} went back, {:.0} s after the first look", NODES[failed], looked.elapsed().as_secs_f64());
    assert_ne!(NODES[failed], "data-1");
    assert!(is_denied(&machines[failed], "2").contains(&format!("did not come up on {}", NODES[failed])));
    for (machine, name) in machines.iter().zip(NODES) {
        let runs = runs(machine);
        println!("{name} runs version {runs}");
        assert!(runs == "1" || name == "data-1" && runs == "2", "{name}: {runs}");
        assert!(
            machine.console().matches("this image is not well").count() == if name == NODES[failed] { 3 } else { 0 }
        );
    }
    // It serves as before.
    let login = "import ssl, urllib.request as r; tls = ssl.create_default_context(cafile='/run/bakehouse/tls/ca.crt'); \
        print(r.urlopen('https://10.10.0.100/web/login', timeout=300, context=tls).status)";
    assert_eq!(machines[2].ok(&format!("python3 -c \"{login}\"")), "200");
}
