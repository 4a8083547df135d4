//! A rack with Secure Boot: firmware that enforces signatures starts the fleet's installer, and no
//! other.

use std::os::unix::fs::PermissionsExt as _;

use bakehouse_tests::rack::Rack;
use bakehouse_tests::{Lab, Machine};

const MAC: &str = "52:54:00:12:00:01";

fn fleet(secure: &str) -> String {
    format!(
        "name = \"safe\"\nversion = \"1\"\n{secure}[netboot.machines]\n\"{MAC}\" = \"hub-1\"\n\
         [groups.hub]\ncount = 1\nendpoints = [\"198.18.0.1\"]\n"
    )
}

/// Confirms the code on the machine's console, as the operator does from a second terminal; returns it.
fn confirm(lab: &Lab, hub: &Machine, not: Option<&str>) -> String {
    let shown = |console: &str| {
        let codes = console.split("bakehouse netboot --approve ").skip(1).filter_map(|rest| rest.get(..19));
        codes.map(str::to_owned).find(|code| Some(code.as_str()) != not)
    };
    hub.wait_until("a code", |console| shown(console).is_some());
    let code = shown(&hub.console()).expect("it was there");
    assert!(!lab.dir.join("build/netboot/machines.json").exists(), "a ticket was minted before the code was confirmed");
    lab.ok(&["netboot", "--approve", &code]);
    code
}

#[test]
fn firmware_that_enforces_signatures_starts_the_fleets_installer_and_no_other() {
    let lab = Lab::empty("secure-rack");
    lab.write("fleet.toml", &fleet("[secure_boot]\n"));
    lab.init();
    lab.ok(&["lock"]);
    lab.ok(&["build"]);
    // Somebody else's fleet, made before there is no way to an archive.
    let stranger = Lab::empty("secure-rack-stranger");
    stranger.write("fleet.toml", &fleet(""));
    stranger.init();
    stranger.ok(&["lock"]);
    stranger.ok(&["build"]);
    let mut hub = Machine::alone(&lab, "hub-1");
    let mut rack = Rack::open(&lab, &hub.wire());
    let ready = "bakehouse: ready (hub-1)";
    let status = "bootctl status --no-pager 2>/dev/null | sed -n 's/^ *Secure Boot: //p'";

    // Firmware without a key: the installed disk's boot loader gives it the fleet's.
    rack.serve(&lab, &[]);
    hub.start_bare(&lab);
    let code = confirm(&lab, &hub, None);
    hub.wait_for(&[ready]);
    assert_eq!(hub.ok(status), "enabled (user)");
    // What the machine is made of is its owner's on this host.
    for (path, mode) in [("build/vm", 0o700), ("build/vm/hub-1", 0o700), ("build/vm/hub-1/disk.qcow2", 0o600)] {
        let meta = std::fs::metadata(lab.dir.join(path)).expect("it runs");
        assert_eq!(meta.permissions().mode() & 0o777, mode, "{path}");
    }
    let kept = lab.read("build/netboot/machines.json");
    assert!(!kept.contains("founder"), "the ticket is kept after the disk has it: {kept}");
    assert_eq!(hub.ok("find /efi -name '*ticket*'"), "");

    // From now on it enforces. Its disk is lost, and with it all there was of a fleet of one: it begins anew.
    hub.ok("dd if=/dev/zero of=/dev/vda bs=1M count=64 oflag=direct");
    hub.cut_power();
    std::fs::remove_dir_all(lab.dir.join("build/netboot")).expect("the record of what was installed");
    rack.serve(&lab, &[]);
    hub.start_bare(&lab);
    // Another boot, another key, another code.
    confirm(&lab, &hub, Some(&code));
    hub.wait_for(&["bakehouse: hub-1 is on /dev/vda; restarting from there"]);
    hub.wait_for(&[ready]);
    assert_eq!(hub.ok(status), "enabled (user)");
    assert_eq!(hub.ok("systemctl --failed --no-legend --plain"), "");

    // Somebody else's server on the same wire.
    hub.ok("dd if=/dev/zero of=/dev/vda bs=1M count=64 oflag=direct");
    hub.cut_power();
    rack.serve(&stranger, &[]);
    hub.start_bare(&lab);
    hub.wait_for(&["Access Denied", "Access denied", "Security Violation"]);
    assert!(!hub.console().contains("Linux version"), "{}", hub.console());
    hub.cut_power();
}
