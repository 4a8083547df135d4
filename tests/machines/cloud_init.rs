//! A cloud passes the ticket to its machine as user data on a config drive.

use std::fs;
use std::process::Command;

use bakehouse_tests::{Machine, TestFleet};

#[test]
fn reads_ticket_from_config_drive() {
    let lab = TestFleet::of_fleet("config-drive", "ha");
    lab.init();
    lab.ok(&["build", "hub"]);
    // The layout of OpenStack's config drive, which other clouds use too.
    let drive = lab.dir.join("drive");
    fs::create_dir_all(drive.join("openstack/latest")).expect("the lab is writable");
    let ticket = drive.join("openstack/latest/user_data");
    lab.ok(&["ticket", "hub-1", "-o", ticket.to_str().expect("a UTF-8 path")]);
    fs::write(drive.join("openstack/latest/meta_data.json"), "{\"hostname\": \"instance-7\"}").expect("a file");
    let iso = lab.dir.join("drive.iso");
    let mut make = Command::new("xorriso");
    make.args(["-as", "mkisofs", "-quiet", "-J", "-r", "-V", "config-2", "-o"]).arg(&iso).arg(&drive);
    assert!(make.status().expect("xorriso").success());

    let mut hub = Machine::alone(&lab, "hub-1");
    hub.start_seeded(&lab.dir.join("build/hub/ha-hub_1.raw"), &iso);
    hub.wait_for(&["bakehouse: ready (hub-1)"]);
    assert!(hub.ok("journalctl -b -o cat -u 'firstboot-seed@*'").contains("user data"));
    // The host name comes from the slot and not from the cloud's metadata.
    assert_eq!(hub.ok("hostname"), "hub-1");
    assert_eq!(hub.ok("systemctl --failed --no-legend --plain"), "");
}
