//! A node takes newer images by itself, and goes back by itself: real systemd-sysupdate over HTTP, power cuts. In a
//! container all that is refused and taken; in a machine what its firmware and boot loader have a part in.

use std::fs;
use std::process::Command;
use std::time::Duration;

use bakehouse_tests::updates::{
    LOOK, READY, broken, comes_up, converting, goes_back, is_blessed, is_denied, lab_of_one, mended, publish, runs,
    version,
};
use bakehouse_tests::{Lab, Machine};

/// Who it is. (Whom it knows it may hear later.)
const KEPT: &str = "sha256sum /var/lib/bakehouse/keys.json /var/lib/bakehouse/state.json /etc/machine-id";

#[test]
fn a_machine_goes_back_from_what_does_not_work_and_on_to_what_does() {
    let (lab, _server) = lab_of_one("upgrade");
    let hub = Machine::of(&lab, "hub-1");
    hub.start();
    comes_up(&hub, 1);
    is_blessed(&hub);
    let identity = hub.ok(KEPT);

    // An image that builds and does not work: three tries, and it is back, and nobody else tries.
    version(&lab, "1", "2");
    broken(&lab);
    publish(&lab);
    assert_eq!(hub.ok(LOOK), "2");
    hub.wait_for(&["restarting with version 2"]);
    goes_back(&hub);
    assert_eq!(runs(&hub), "1");
    assert!(is_denied(&hub, "2").contains("did not come up on hub-1"));
    assert_eq!(hub.ok(LOOK), "", "a version that failed is tried again");
    // Nothing was killed: whoever has the VIP says that it goes.
    assert!(hub.ok("journalctl -o cat -u keepalived --no-pager").contains("Stopped keepalived.service"));
    loaded_little(&hub, "2");

    // A version that mends it. The power goes while it is loaded; then it is taken.
    version(&lab, "2", "3");
    mended(&lab);
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

/// Of root and kernel little was loaded: what runs has the rest.
fn loaded_little(hub: &Machine, version: &str) {
    let loaded = format!(
        "journalctl -o cat -u firstboot-install --no-pager | sed -n 's/^up-hub_{version}[_.].*: \\([0-9.]*\\) of .* loaded$/\\1/p'"
    );
    let loaded = hub.ok(&loaded);
    let megabytes: Vec<f64> = loaded.lines().map(|n| n.parse().expect("a number")).collect();
    assert!(megabytes.len() == 2 && megabytes.iter().sum::<f64>() < 8.0, "root and kernel: {loaded}");
}

/// The power goes while a version is loaded; then it is taken.
fn is_taken_through_a_power_cut(hub: &Machine, from: &str, to: &str) {
    let changes = |console: &str| console.matches(&format!("changing from version {from} to {to}")).count();
    let before = changes(&hub.console());
    hub.exec(LOOK);
    hub.wait_until("it begins to change", |console| changes(console) > before);
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
fn containers_take_what_is_good_and_leave_what_is_not() {
    let (lab, _server) = lab_of_one("upgrade-containers");
    lab.is_of_containers();
    let updates = lab.dir.join("updates/hub");
    let updates_dir = lab.dir.join("updates");
    let dir = updates_dir.to_str().expect("a UTF-8 path");
    let hub = Machine::of(&lab, "hub-1");
    hub.start();
    comes_up(&hub, 1);
    is_blessed(&hub);
    let identity = hub.ok(KEPT);

    for unit in ["firstboot-check.service", "firstboot-install.service", "firstboot-seed@vdb.service"] {
        assert!(hub.exposure(unit) < 5.0, "{unit}");
    }

    // What is published is what the plan said.
    publish(&lab);
    version(&lab, "1", "2");
    lab.edit("overlays/haproxy/run/bakehouse/haproxy.cfg.j2", "# HAProxy of", "# Changed. HAProxy of");
    converting(&lab);
    let plan = lab.ok(&["plan", dir]).out;
    assert!(plan.contains("one way  the migration `lines` converts what nodes keep"), "{plan}");
    assert!(
        plan.contains("version 1 → 2") && plan.contains("~ /usr/lib/bakehouse/templates/run/bakehouse/haproxy.cfg"),
        "{plan}"
    );
    assert!(plan.contains("order: hub-1 (") && plan.contains("time:  about 1 min"), "{plan}");
    assert_eq!(hub.ok(LOOK), "", "the version that runs is no news");

    // Whoever has the server has not the fleet: another key's signature, and none.
    let thief = Lab::empty("upgrade-thief");
    fs::copy(lab.dir.join("fleet.toml"), thief.dir.join("fleet.toml")).expect("a copy");
    thief.edit("fleet.toml", "overlays = [\"converting\"]\n", "");
    fs::copy(lab.dir.join("bakehouse.lock"), thief.dir.join("bakehouse.lock")).expect("a copy");
    thief.init();
    thief.ok(&["publish", dir]);
    assert_eq!(hub.ok(LOOK), "", "a foreign signature was believed");
    assert!(hub.ok("journalctl -b -u firstboot-check --no-pager").contains("ignature"));
    fs::remove_file(updates.join("SHA256SUMS.gpg")).expect("it was there");
    assert_eq!(hub.ok(LOOK), "", "no signature was believed");
    fs::remove_dir_all(&updates).expect("it was there");

    // The fleet's own signature, on another group's image.
    let (fleet, lock) = (lab.read("fleet.toml"), lab.read("bakehouse.lock"));
    let group = "[groups.other]\nroles = [\"hub\"]";
    lab.write("fleet.toml", &fleet.replace("[groups.hub]", group).replace("version = \"2\"", "version = \"9\""));
    lab.write("bakehouse.lock", &lock.replace("[images.hub]", "[images.other]"));
    publish(&lab);
    lab.write("fleet.toml", &fleet);
    lab.write("bakehouse.lock", &lock);
    fs::rename(updates_dir.join("other"), &updates).expect("it was published");
    assert_eq!(hub.ok(LOOK), "", "another group's image was offered");
    assert!(hub.ok("journalctl -I -o cat -u firstboot-check --no-pager").contains("Good signature"));
    fs::remove_dir_all(&updates).expect("it was there");

    // A file that is not what was signed.
    publish(&lab);
    let root = fs::read_dir(&updates).expect("a folder").filter_map(Result::ok).map(|e| e.path());
    let root =
        root.into_iter().find(|p| p.to_string_lossy().contains("_2_") && p.to_string_lossy().ends_with(".root.raw"));
    let root = root.expect("it was published");
    let whole = fs::read(&root).expect("a file");
    fs::write(&root, &whole[..whole.len() / 2]).expect("a file");
    assert_eq!(hub.ok(LOOK), "2");
    hub.wait_for(&["version 2 was not loaded"]);
    assert_eq!(hub.ok("ls /efi/EFI/Linux"), "up-hub_1.efi");
    fs::write(&root, &whole).expect("a file");

    is_taken_through_a_power_cut(&hub, "1", "2");
    assert_eq!(hub.ok(KEPT), identity);
    assert!(hub.ok("cat /run/bakehouse/haproxy.cfg").starts_with("# Changed."));
    assert_eq!(hub.ok("systemctl --failed --no-legend --plain"), "");
    assert_eq!(hub.ok("cat /var/lib/converted"), "converted");
    let second = lab.dir.join("second");
    assert!(Command::new("cp").arg("-a").args([&updates, &second]).status().expect("cp").success());

    // An image that builds and does not work: three tries, and it is back, and nobody else tries.
    version(&lab, "2", "3");
    broken(&lab);
    publish(&lab);
    assert_eq!(hub.ok(LOOK), "3");
    hub.wait_for(&["restarting with version 3"]);
    goes_back(&hub);
    assert_eq!(runs(&hub), "2");
    assert!(is_denied(&hub, "3").contains("did not come up on hub-1"));
    assert_eq!(hub.ok(LOOK), "", "a version that failed is tried again");
    let told = lab.ok(&["rollout", "--endpoint", "local"]).out;
    assert!(told.contains("hub-1          version 2, serving"), "{told}");
    assert!(told.contains("nobody takes version 3: it did not come up on hub-1"), "{told}");

    // A version that mends it goes on from there.
    version(&lab, "3", "4");
    mended(&lab);
    publish(&lab);
    let before = hub.console().matches(READY).count();
    assert_eq!(hub.ok(LOOK), "4");
    comes_up(&hub, before + 1);
    assert_eq!(runs(&hub), "4");
    let said = hub.ok("journalctl -b -1 -o cat -u keepalived --no-pager");
    assert!(said.contains("Stopped keepalived.service"), "it was killed, and nobody was told that the VIP goes");
    // What version 2 has is not loaded again.
    loaded_little(&hub, "4");
    is_blessed(&hub);
    assert_eq!(hub.ok(KEPT), identity);
    // Once, however many starts and versions came after.
    assert_eq!(hub.ok("cat /var/lib/converted"), "converted");

    // Whoever has the server has what was published before, with its signature.
    fs::remove_dir_all(&updates).expect("it was there");
    fs::rename(&second, &updates).expect("it was kept");
    let entries = hub.ok("ls /efi/EFI/Linux");
    assert_eq!(hub.ok(LOOK), "", "an older version was offered");
    hub.exec("systemctl start firstboot-install.service");
    assert_eq!(hub.ok("ls /efi/EFI/Linux"), entries);
    assert!(hub.ok("journalctl -I -o cat -u firstboot-check --no-pager").contains("Good signature"));
    hub.shut_down();
}
