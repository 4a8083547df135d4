//! A cloud gives its machines user data on a disk, and nothing else.

use std::fs;
use std::process::Command;

use bakehouse_tests::{Lab, Machine};

#[test]
fn a_config_drive_brings_the_ticket() {
    let lab = Lab::of_fleet("config-drive", "ha");
    lab.init();
    lab.ok(&["build", "hub"]);
    // As OpenStack lays it out, and others that learned it from there.
    let drive = lab.dir.join("drive");
    fs::create_dir_all(drive.join("openstack/latest")).expect("the lab is writable");
    let ticket = drive.join("openstack/latest/user_data");
    lab.ok(&["ticket", "hub-1", "-o", ticket.to_str().expect("a path of letters")]);
    fs::write(drive.join("openstack/latest/meta_data.json"), "{\"hostname\": \"instance-7\"}").expect("a file");
    let iso = lab.dir.join("drive.iso");
    let mut make = Command::new("xorriso");
    make.args(["-as", "mkisofs", "-quiet", "-J", "-r", "-V", "config-2", "-o"]).arg(&iso).arg(&drive);
    assert!(make.status().expect("xorriso").success());

    let mut hub = Machine::alone(&lab, "hub-1");
    hub.start_seeded(&lab.dir.join("build/hub/ha-hub_1.raw"), &iso);
    hub.wait_for(&["bakehouse: ready (hub-1)"]);
    assert!(hub.ok("journalctl -b -o cat -u 'firstboot-seed@*'").contains("user data"));
    // The machine's name is the node's, not the cloud's.
    assert_eq!(hub.ok("hostname"), "hub-1");
    assert_eq!(hub.ok("systemctl --failed --no-legend --plain"), "");
}
