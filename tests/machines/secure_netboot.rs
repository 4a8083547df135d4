//! Network boot with Secure Boot: firmware that enforces signatures starts only the fleet's own installer.

use std::os::unix::fs::PermissionsExt as _;

use bakehouse_tests::rack::NetbootRack;
use bakehouse_tests::{Machine, TestFleet};

const MAC: &str = "52:54:00:12:00:01";

fn fleet(secure: &str) -> String {
    format!(
        "name = \"safe\"\nversion = \"1\"\n{secure}[netboot.machines]\n\"{MAC}\" = \"hub-1\"\n\
         [groups.hub]\ncount = 1\nendpoints = [\"198.18.0.1\"]\n"
    )
}

/// Approves the code on the machine's console, as the operator does from a second terminal. Returns the code.
fn confirm(lab: &TestFleet, hub: &Machine, not: Option<&str>) -> String {
    let shown = |console: &str| {
        let codes = console.split("bakehouse netboot --approve ").skip(1).filter_map(|rest| rest.get(..19));
        codes.map(str::to_owned).find(|code| Some(code.as_str()) != not)
    };
    hub.wait_until("a code", |console| shown(console).is_some());
    let code = shown(&hub.console()).expect("a code on the console");
    assert!(!lab.dir.join("build/netboot/machines.json").exists(), "a ticket was minted before the code was confirmed");
    lab.ok(&["netboot", "--approve", &code]);
    code
}

#[test]
fn secure_boot_firmware_starts_only_the_fleets_installer() {
    let lab = TestFleet::empty("secure-rack");
    lab.write("fleet.toml", &fleet("[secure_boot]\n"));
    lab.init();
    lab.ok(&["lock"]);
    lab.ok(&["build"]);
    // Another fleet. It is built now because the rack's network namespace has no route to a Debian archive.
    let stranger = TestFleet::empty("secure-rack-stranger");
    stranger.write("fleet.toml", &fleet(""));
    stranger.init();
    stranger.ok(&["lock"]);
    stranger.ok(&["build"]);
    let mut hub = Machine::alone(&lab, "hub-1");
    let mut rack = NetbootRack::open(&lab, &hub.lan());
    let ready = "bakehouse: ready (hub-1)";
    let status = "bootctl status --no-pager 2>/dev/null | sed -n 's/^ *Secure Boot: //p'";

    // Firmware in setup mode: the boot loader on the installed disk enrols the fleet's keys.
    rack.serve(&lab, &[]);
    hub.start_bare(&lab);
    let code = confirm(&lab, &hub, None);
    hub.wait_for(&[ready]);
    assert_eq!(hub.ok(status), "enabled (user)");
    // Other users of this host must not read the machine's disk.
    for (path, mode) in [("build/vm", 0o700), ("build/vm/hub-1", 0o700), ("build/vm/hub-1/disk.qcow2", 0o600)] {
        let meta = std::fs::metadata(lab.dir.join(path)).expect("a file of the machine");
        assert_eq!(meta.permissions().mode() & 0o777, mode, "{path}");
    }
    let kept = lab.read("build/netboot/machines.json");
    assert!(!kept.contains("founder"), "the ticket is still in machines.json after the installation: {kept}");
    assert_eq!(hub.ok("find /efi -name '*ticket*'"), "");

    // The firmware enforces signatures now. The disk of the only node is erased, so the test installs the fleet again.
    hub.ok("dd if=/dev/zero of=/dev/vda bs=1M count=64 oflag=direct");
    hub.cut_power();
    std::fs::remove_dir_all(lab.dir.join("build/netboot")).expect("the record of what was installed");
    rack.serve(&lab, &[]);
    hub.start_bare(&lab);
    // Each boot has a new key and therefore a new code.
    confirm(&lab, &hub, Some(&code));
    hub.wait_for(&["bakehouse: hub-1 is on /dev/vda; restarting from there"]);
    hub.wait_for(&[ready]);
    assert_eq!(hub.ok(status), "enabled (user)");
    assert_eq!(hub.ok("systemctl --failed --no-legend --plain"), "");

    // A server of another fleet on the same network.
    hub.ok("dd if=/dev/zero of=/dev/vda bs=1M count=64 oflag=direct");
    hub.cut_power();
    rack.serve(&stranger, &[]);
    hub.start_bare(&lab);
    hub.wait_for(&["Access Denied", "Access denied", "Security Violation"]);
    assert!(!hub.console().contains("Linux version"), "{}", hub.console());
    hub.cut_power();
}
