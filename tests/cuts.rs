//! The power fails at every stage of an update: the node always boots, always is one version or the
//! other, whole, and in the end the newer one.

use std::thread::sleep;
use std::time::Instant;

use bakehouse_tests::Machine;
use bakehouse_tests::updates::{comes_up, is_blessed, lab_of_one, runs, version};

const CUTS: u32 = 20;

#[test]
fn whenever_the_power_fails_a_node_is_one_version_or_the_other() {
    let (lab, _server) = lab_of_one("cuts");
    lab.ok(&["build"]);
    let updates = lab.dir.join("updates");
    let dir = updates.to_str().expect("a path of letters");
    let hub = Machine::of(&lab, "hub-1");
    hub.start();
    comes_up(&hub, 1);
    is_blessed(&hub);
    let kept = "sha256sum /var/lib/bakehouse/*.json /etc/machine-id";
    let identity = hub.ok(kept);
    let look = "systemctl start firstboot-check; cat /run/bakehouse/offer";

    // With nothing in its way: what there is to interrupt.
    version(&lab, "1", "2");
    lab.ok(&["publish", dir]);
    let begun = Instant::now();
    assert_eq!(hub.ok(look), "2");
    comes_up(&hub, 2);
    is_blessed(&hub);
    let whole = begun.elapsed();
    println!("an update takes {:.0} s here", whole.as_secs_f64());

    let mut newest = 2;
    for cut in 0..CUTS {
        let before = runs(&hub);
        if before == newest.to_string() {
            newest += 1;
            version(&lab, &before, &newest.to_string());
            lab.ok(&["publish", dir]);
        }
        hub.ok(look);
        // Every twentieth once, in no order: 7 and 20 have no common divisor.
        let when = whole * (cut * 7 % CUTS) / CUTS + whole / (2 * CUTS);
        sleep(when);
        hub.cut_power();
        hub.start();
        comes_up(&hub, 1);
        let after = runs(&hub);
        println!("cut {:>2}, after {:>5.1} s: {before} → {after}, of {newest}", cut + 1, when.as_secs_f64());
        assert!(after == before || after == newest.to_string(), "{before} → {after}, of {newest}");
        is_blessed(&hub);
        assert_eq!(hub.ok(kept), identity);
        assert_eq!(hub.ok("systemctl --failed --no-legend --plain"), "");
        // Every block of it is what was signed.
        hub.ok("dd if=/dev/mapper/root of=/dev/null bs=1M status=none");
    }
    if runs(&hub) != newest.to_string() {
        assert_eq!(hub.ok(look), newest.to_string());
        let last = hub.console().matches(bakehouse_tests::updates::READY).count() + 1;
        comes_up(&hub, last);
    }
    assert_eq!(runs(&hub), newest.to_string());
    hub.shut_down();
}
