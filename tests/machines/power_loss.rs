//! Power loss at every step of joining and at every stage of an update. A machine completes its join with one slot and
//! one use of its ticket. A node always boots, runs a complete version, and finally the newer one, also if one boot
//! entry cannot start.

use std::collections::BTreeMap;
use std::thread::sleep;
use std::time::{Duration, Instant};

use bakehouse_tests::updates::{LOOK, comes_up, is_blessed, is_denied, lab_of_one, publish, runs, version};
use bakehouse_tests::{ETCDCTL, Machine, TestFleet};
use builder::keys::authority::FleetKey;
use builder::keys::ticket::{TicketTerms, mint};
use builder::project::Project;

const CUTS: u32 = 20;

#[test]
fn interrupted_join_completes_after_power_loss() {
    let lab = TestFleet::empty("joins");
    lab.write(
        "fleet.toml",
        "name = \"cut\"\n[groups.hub]\ncount = 1\nendpoints = [\"hub1.example.net\"]\n[groups.edge]\ncount = 1\n",
    );
    lab.has_idle_role("edge", false);
    lab.init();
    lab.ok(&["lock"]);
    lab.ok(&["build"]);
    let kept = |file: &str| format!("/var/lib/bakehouse/{file}.json");

    // A founder, cut after it stored its keys, its state, and its member of a new etcd cluster.
    let hub = Machine::for_node(&lab, "hub-1");
    let ticket = lab.ok(&["ticket", "hub-1"]).out;
    for step in [kept("keys"), kept("state"), "/var/lib/etcd/cut/member".to_owned()] {
        hub.start_cut_at(&ticket, &step);
        println!("power cut of hub-1 at {step}");
    }
    hub.start_with(&ticket);
    hub.wait_for(&["bakehouse: ready (hub-1)"]);
    // etcd starts to serve some seconds after its process.
    assert_eq!(hub.ok(&format!("{ETCDCTL} --command-timeout=120s member list | grep -c started")), "1");
    let ask = |what: &str| hub.ok(&format!("{ETCDCTL} get --print-value-only {what}"));

    // An expired and a revoked ticket: the agent prints the reason and stores no state.
    let edge = Machine::for_node(&lab, "edge-1");
    let expired = expired_ticket(&lab, "edge");
    let revoked = lab.ok(&["ticket", "edge"]).out;
    let noted = lab.read("tickets.jsonl");
    let claims: serde_json::Value = serde_json::from_str(noted.lines().last().expect("a line")).expect("JSON");
    // The key that a hub writes when the operator revokes a ticket.
    hub.ok(&format!("{ETCDCTL} put /bakehouse/revoked/{} ''", claims["id"].as_str().expect("a number")));
    for (ticket, why) in [(expired, "the token has expired"), (revoked, "the token was revoked")] {
        edge.start_with(&ticket);
        edge.wait_for(&[why]);
        assert_eq!(edge.ok("ls /var/lib/bakehouse"), "keys.json");
        edge.cut_power();
    }
    edge.wipe();

    // A worker with a ticket for one machine, cut after it stored its keys, its peer table, and its state.
    let ticket = lab.ok(&["ticket", "edge"]).out;
    edge.start_cut_at(&ticket, &kept("keys"));
    assert_eq!(ask("/bakehouse/slots/edge-1"), "", "a hub granted a slot without a claim");
    edge.start_cut_at(&ticket, &kept("neighbours"));
    let granted = ask("/bakehouse/slots/edge-1");
    assert_ne!(granted, "");
    edge.start_cut_at(&ticket, &kept("state"));
    edge.start_with(&ticket);
    edge.wait_for(&["bakehouse: ready (edge-1)"]);
    assert_eq!(ask("/bakehouse/slots/edge-1"), granted, "the slot's record changed");
    let key = edge.ok("wg show all public-key | cut -f 2");
    assert!(granted.contains(&format!("\"{key}\"")), "{key} is not the key of {granted}");
    assert!(edge.ok("firstboot status --json").contains(r#""epoch":1"#));
    assert_eq!(ask("--prefix /bakehouse/tokens/"), "1", "the ticket was used more than once");
    assert_eq!(hub.ok(&format!("{ETCDCTL} get --prefix --keys-only /bakehouse/slots/edge- | grep -c /")), "1");
    assert_eq!(hub.ok(&format!("{ETCDCTL} get --prefix --keys-only /bakehouse/audit/edge-1/ | grep -c /")), "1");
    for node in [&hub, &edge] {
        assert_eq!(node.ok("systemctl --failed --no-legend --plain"), "");
    }
    edge.cut_power();
    edge.wipe();
    edge.start_with(&ticket);
    edge.wait_for(&["all uses of the token are spent (1 of 1)"]);
    assert_eq!(ask("/bakehouse/slots/edge-1"), granted);
}

/// A TPM counts a shutdown without `TPM2_Shutdown` as a failed authorisation, and a virtual TPM locks after three.
#[test]
fn tpm_unseals_state_after_many_power_cuts() {
    let lab = TestFleet::empty("tpm");
    lab.write("fleet.toml", "name = \"sealed\"\n[groups.hub]\ncount = 1\nendpoints = [\"hub1.example.net\"]\n");
    lab.init();
    lab.ok(&["lock"]);
    lab.ok(&["build"]);
    let mut hub = Machine::for_node(&lab, "hub-1");
    let tpm = lab.dir.join("tpm");
    hub.has_tpm(Some(&tpm));
    for _ in 0..6 {
        hub.start();
        hub.wait_for(&["bakehouse: ready (hub-1)"]);
        assert!(hub.ok("cat /var/lib/bakehouse/state.json").contains("\"sealed\""));
        hub.cut_power();
    }
    hub.start();
    hub.wait_for(&["bakehouse: ready (hub-1)"]);
    let said = hub.ok("journalctl -b -o cat -u firstboot-tpm --no-pager");
    assert!(said.contains("Finished firstboot-tpm.service") && !said.contains("cannot reset"), "{said}");
    assert!(hub.exposure("firstboot-tpm.service") < 3.0);
    assert_eq!(hub.ok("systemctl --failed --no-legend --plain"), "");
}

#[test]
fn power_loss_during_update_leaves_a_complete_version() {
    let (lab, _server) = lab_of_one("cuts");
    let hub = Machine::for_node(&lab, "hub-1");
    hub.start();
    comes_up(&hub, 1);
    is_blessed(&hub);
    let kept = "sha256sum /var/lib/bakehouse/*.json /etc/machine-id";
    let identity = hub.ok(kept);

    // An undisturbed update, whose duration the cuts divide.
    version(&lab, "1", "2");
    publish(&lab);
    let begun = Instant::now();
    assert_eq!(hub.ok(LOOK), "2");
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
            publish(&lab);
        }
        hub.ok(LOOK);
        // Visits every twentieth of the duration once, in a mixed order, because 7 and 20 are coprime.
        let when = whole * (cut * 7 % CUTS) / CUTS + whole / (2 * CUTS);
        sleep(when);
        hub.cut_power();
        hub.start();
        comes_up(&hub, 1);
        let after = runs(&hub);
        println!("cut {:>2}, after {:>5.1} s: {before} → {after}, newest {newest}", cut + 1, when.as_secs_f64());
        assert!(after == before || after == newest.to_string(), "{before} → {after}, newest {newest}");
        is_blessed(&hub);
        assert_eq!(hub.ok(kept), identity);
        assert_eq!(hub.ok("systemctl --failed --no-legend --plain"), "");
        // dm-verity verifies every block of the root.
        hub.ok("dd if=/dev/mapper/root of=/dev/null bs=1M status=none");
    }
    if runs(&hub) != newest.to_string() {
        assert_eq!(hub.ok(LOOK), newest.to_string());
        let last = hub.console().matches(bakehouse_tests::updates::READY).count() + 1;
        comes_up(&hub, last);
    }
    assert_eq!(runs(&hub), newest.to_string());
    hub.shut_down();
}

#[test]
fn skipped_boot_entry_is_downloaded_again_and_then_denied() {
    let (lab, _server) = lab_of_one("passed-over");
    let hub = Machine::for_node(&lab, "hub-1");
    hub.start();
    comes_up(&hub, 1);
    is_blessed(&hub);
    version(&lab, "1", "2");
    publish(&lab);
    // A power cut leaves a truncated file on FAT.
    hub.ok("head -c 200000 /efi/EFI/Linux/up-hub_1.efi > /efi/EFI/Linux/up-hub_2+3-0.efi; sync");
    hub.cut_power();
    hub.start();
    comes_up(&hub, 1);
    assert_eq!(runs(&hub), "1");
    hub.wait_for(&["restarting with version 2"]);
    comes_up(&hub, 2);
    assert_eq!(runs(&hub), "2");
    is_blessed(&hub);

    // An entry that is damaged after each download.
    hub.cut_power();
    let damage =
        "head -c 200000 /efi/EFI/Linux/up-hub_3+3-0.efi >/efi/half; mv /efi/half /efi/EFI/Linux/up-hub_3+3-0.efi";
    hub.start_changed("firstboot-install.service", &format!("[Service]\nExecStart=/usr/bin/sh -c '{damage}; sync'\n"));
    comes_up(&hub, 1);
    is_blessed(&hub);
    version(&lab, "2", "3");
    publish(&lab);
    assert_eq!(hub.ok(LOOK), "3");
    hub.wait_until("three boots of version 3", |console| console.matches("restarting with version 3").count() == 3);
    comes_up(&hub, 4);
    assert_eq!(runs(&hub), "2");
    assert!(is_denied(&hub, "3").contains("did not come up on hub-1"));
    assert_eq!(hub.ok("systemctl --failed --no-legend --plain"), "");
    hub.shut_down();
}

/// Mints a ticket that has expired already, which the command line refuses.
fn expired_ticket(lab: &TestFleet, group: &str) -> String {
    let project = Project::load(&lab.dir).expect("a fleet");
    let key = FleetKey::of_vms(&project).expect("a fleet key");
    let terms = TicketTerms { uses: 1, lasts: Duration::ZERO, replace: false };
    let ticket = mint(&key, &project.topology, group, &terms, BTreeMap::new()).expect("a ticket");
    serde_json::to_string(&ticket).expect("JSON")
}
