//! Updates and rollbacks of a node, with real systemd-sysupdate over HTTP and power cuts. The container test covers
//! which updates a node accepts and refuses, the machine test what involves the firmware and the boot loader.

use std::fs;
use std::process::Command;
use std::time::Duration;

use bakehouse_tests::updates::{
    LOOK, READY, broken, comes_up, converting, goes_back, is_blessed, is_denied, lab_of_one, publish, repaired, runs,
    version,
};
use bakehouse_tests::{Machine, TestFleet};

/// Identity of the node. Its peer table may change during a test.
const KEPT: &str = "sha256sum /var/lib/bakehouse/keys.json /var/lib/bakehouse/state.json /etc/machine-id";

#[test]
fn machine_rolls_back_failing_update_and_takes_the_next() {
    let (lab, _server) = lab_of_one("upgrade");
    let hub = Machine::for_node(&lab, "hub-1");
    hub.start();
    comes_up(&hub, 1);
    is_blessed(&hub);
    let identity = hub.ok(KEPT);

    // A version that fails its health check: after three boots the node rolls back, and the hub denies the version.
    version(&lab, "1", "2");
    broken(&lab);
    publish(&lab);
    assert_eq!(hub.ok(LOOK), "2");
    hub.wait_for(&["restarting with version 2"]);
    goes_back(&hub);
    assert_eq!(runs(&hub), "1");
    assert!(is_denied(&hub, "2").contains("did not come up on hub-1"));
    assert_eq!(hub.ok(LOOK), "", "the node was offered the denied version");
    // systemd stopped keepalived in order, so it released the VIP before the reboot.
    assert!(hub.ok("journalctl -o cat -u keepalived --no-pager").contains("Stopped keepalived.service"));
    loaded_little(&hub, "2");

    // The next version works. The power fails during its download, and the node installs it afterwards.
    version(&lab, "2", "3");
    repaired(&lab);
    lab.edit("overlays/haproxy/run/bakehouse/haproxy.cfg.j2", "# HAProxy of", "# Changed. HAProxy of");
    converting(&lab);
    publish(&lab);
    is_taken_through_a_power_cut(&hub, "1", "3");
    assert_eq!(hub.ok(KEPT), identity);
    assert!(hub.ok("cat /run/bakehouse/haproxy.cfg").starts_with("# Changed."));
    assert_eq!(hub.ok("cat /var/lib/converted"), "converted");
    assert_eq!(hub.ok("systemctl --failed --no-legend --plain"), "");
    hub.shut_down();
}

/// Asserts that the node downloaded less than 8 MB of root and kernel. It copies the other blocks from disk.
fn loaded_little(hub: &Machine, version: &str) {
    let loaded = format!(
        "journalctl -o cat -u firstboot-install --no-pager | sed -n 's/^up-hub_{version}[_.].*: \\([0-9.]*\\) of .* downloaded$/\\1/p'"
    );
    let loaded = hub.ok(&loaded);
    let megabytes: Vec<f64> = loaded.lines().map(|n| n.parse().expect("a number")).collect();
    assert!(megabytes.len() == 2 && megabytes.iter().sum::<f64>() < 8.0, "root and kernel: {loaded}");
}

/// Cuts the power during the download of a version, and waits until the node runs that version.
fn is_taken_through_a_power_cut(hub: &Machine, from: &str, to: &str) {
    let changes = |console: &str| console.matches(&format!("changing from version {from} to {to}")).count();
    let before = changes(&hub.console());
    hub.exec(LOOK);
    hub.wait_until("the update begins", |console| changes(console) > before);
    std::thread::sleep(Duration::from_secs(5));
    hub.cut_power();
    hub.start();
    comes_up(hub, 1);
    if runs(hub) == from {
        is_blessed(hub);
        hub.exec(LOOK);
        comes_up(hub, 2);
    }
    assert_eq!(runs(hub), to);
    is_blessed(hub);
}

#[test]
fn containers_install_valid_updates_and_refuse_others() {
    let (lab, _server) = lab_of_one("upgrade-containers");
    lab.is_of_containers();
    let updates = lab.dir.join("updates/hub");
    let updates_dir = lab.dir.join("updates");
    let dir = updates_dir.to_str().expect("a UTF-8 path");
    let hub = Machine::for_node(&lab, "hub-1");
    hub.start();
    comes_up(&hub, 1);
    is_blessed(&hub);
    let identity = hub.ok(KEPT);

    for unit in ["firstboot-check.service", "firstboot-install.service", "firstboot-seed@vdb.service"] {
        assert!(hub.exposure(unit) < 5.0, "{unit}");
    }

    // `bakehouse plan` describes the version that is published next.
    publish(&lab);
    version(&lab, "1", "2");
    lab.edit("overlays/haproxy/run/bakehouse/haproxy.cfg.j2", "# HAProxy of", "# Changed. HAProxy of");
    converting(&lab);
    let plan = lab.ok(&["plan", dir]).out;
    assert!(plan.contains("one way  the migration `lines` converts the nodes' data"), "{plan}");
    assert!(
        plan.contains("version 1 → 2") && plan.contains("~ /usr/lib/bakehouse/templates/run/bakehouse/haproxy.cfg"),
        "{plan}"
    );
    assert!(plan.contains("order: hub-1 (") && plan.contains("time:  about 1 min"), "{plan}");
    assert_eq!(hub.ok(LOOK), "", "the node was offered the running version");

    // An attacker who controls the update server: a signature of another key, and no signature.
    let thief = TestFleet::empty("upgrade-thief");
    fs::copy(lab.dir.join("fleet.toml"), thief.dir.join("fleet.toml")).expect("a copy");
    thief.edit("fleet.toml", "overlays = [\"converting\"]\n", "");
    fs::copy(lab.dir.join("bakehouse.lock"), thief.dir.join("bakehouse.lock")).expect("a copy");
    thief.init();
    thief.ok(&["publish", dir]);
    assert_eq!(hub.ok(LOOK), "", "the node accepted another key's signature");
    assert!(hub.ok("journalctl -b -u firstboot-check --no-pager").contains("ignature"));
    fs::remove_file(updates.join("SHA256SUMS.gpg")).expect("a signature");
    assert_eq!(hub.ok(LOOK), "", "the node accepted a missing signature");
    fs::remove_dir_all(&updates).expect("published files");

    // Another group's image with the fleet's own signature.
    let (fleet, lock) = (lab.read("fleet.toml"), lab.read("bakehouse.lock"));
    let group = "[groups.other]\nroles = [\"hub\"]";
    lab.write("fleet.toml", &fleet.replace("[groups.hub]", group).replace("version = \"2\"", "version = \"9\""));
    lab.write("bakehouse.lock", &lock.replace("[images.hub]", "[images.other]"));
    publish(&lab);
    lab.write("fleet.toml", &fleet);
    lab.write("bakehouse.lock", &lock);
    fs::rename(updates_dir.join("other"), &updates).expect("published files");
    assert_eq!(hub.ok(LOOK), "", "the node was offered another group's image");
    assert!(hub.ok("journalctl -I -o cat -u firstboot-check --no-pager").contains("Good signature"));
    fs::remove_dir_all(&updates).expect("published files");

    // A truncated file, whose hash differs from the signed one.
    publish(&lab);
    let root = fs::read_dir(&updates).expect("a folder").filter_map(Result::ok).map(|e| e.path());
    let root =
        root.into_iter().find(|p| p.to_string_lossy().contains("_2_") && p.to_string_lossy().ends_with(".root.raw"));
    let root = root.expect("a published root");
    let whole = fs::read(&root).expect("a file");
    fs::write(&root, &whole[..whole.len() / 2]).expect("a file");
    assert_eq!(hub.ok(LOOK), "2");
    hub.wait_for(&["version 2 was not downloaded"]);
    assert_eq!(hub.ok("ls /efi/EFI/Linux"), "up-hub_1.efi");
    fs::write(&root, &whole).expect("a file");

    is_taken_through_a_power_cut(&hub, "1", "2");
    assert_eq!(hub.ok(KEPT), identity);
    assert!(hub.ok("cat /run/bakehouse/haproxy.cfg").starts_with("# Changed."));
    assert_eq!(hub.ok("systemctl --failed --no-legend --plain"), "");
    assert_eq!(hub.ok("cat /var/lib/converted"), "converted");
    let second = lab.dir.join("second");
    assert!(Command::new("cp").arg("-a").args([&updates, &second]).status().expect("cp").success());

    // A version that fails its health check: after three boots the node rolls back, and the hub denies the version.
    version(&lab, "2", "3");
    broken(&lab);
    publish(&lab);
    assert_eq!(hub.ok(LOOK), "3");
    hub.wait_for(&["restarting with version 3"]);
    goes_back(&hub);
    assert_eq!(runs(&hub), "2");
    assert!(is_denied(&hub, "3").contains("did not come up on hub-1"));
    assert_eq!(hub.ok(LOOK), "", "the node was offered the denied version");
    let told = lab.ok(&["rollout", "--endpoint", "local"]).out;
    assert!(told.contains("hub-1          version 2, serving"), "{told}");
    assert!(told.contains("no node takes version 3: it did not come up on hub-1"), "{told}");

    // The next version works.
    version(&lab, "3", "4");
    repaired(&lab);
    publish(&lab);
    let before = hub.console().matches(READY).count();
    assert_eq!(hub.ok(LOOK), "4");
    comes_up(&hub, before + 1);
    assert_eq!(runs(&hub), "4");
    let said = hub.ok("journalctl -b -1 -o cat -u keepalived --no-pager");
    assert!(said.contains("Stopped keepalived.service"), "keepalived was killed and did not release the VIP");
    // The node copies unchanged blocks from version 2.
    loaded_little(&hub, "4");
    is_blessed(&hub);
    assert_eq!(hub.ok(KEPT), identity);
    // The migration ran once, although boots and versions followed.
    assert_eq!(hub.ok("cat /var/lib/converted"), "converted");

    // Downgrade attack: the server publishes an older version with its valid signature.
    fs::remove_dir_all(&updates).expect("published files");
    fs::rename(&second, &updates).expect("the copy of version 2");
    let entries = hub.ok("ls /efi/EFI/Linux");
    assert_eq!(hub.ok(LOOK), "", "the node was offered an older version");
    hub.exec("systemctl start firstboot-install.service");
    assert_eq!(hub.ok("ls /efi/EFI/Linux"), entries);
    assert!(hub.ok("journalctl -I -o cat -u firstboot-check --no-pager").contains("Good signature"));
    hub.shut_down();
}
