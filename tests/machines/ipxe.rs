//! Network boot of a machine whose network card has iPXE.

use bakehouse_tests::rack::NetbootRack;
use bakehouse_tests::{Machine, TestFleet};
use builder::vm::Netboot;

#[test]
fn ipxe_starts_the_installer() {
    let lab = TestFleet::empty("ipxe");
    lab.write(
        "fleet.toml",
        "name = \"ipxe\"\nversion = \"1\"\n[netboot]\ntrust_lan = true\n[netboot.machines]\n\"52:54:00:12:00:01\" = \"hub-1\"\n\
         [groups.hub]\ncount = 1\nendpoints = [\"198.18.0.1\"]\n",
    );
    lab.init();
    lab.ok(&["lock"]);
    lab.ok(&["build"]);
    let mut hub = Machine::alone(&lab, "hub-1");
    let mut rack = NetbootRack::open(&lab, &hub.lan());
    rack.serve(&lab, &[]);
    hub.start_bare_by(&lab, Netboot::Ipxe);
    hub.wait_for(&["bakehouse.ipxe... ok"]);
    hub.wait_for(&["bakehouse: hub-1 is on /dev/vda; restarting from there"]);
    hub.wait_for(&["bakehouse: ready (hub-1)"]);
    assert_eq!(hub.ok("systemctl --failed --no-legend --plain"), "");
}
