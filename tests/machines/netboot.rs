//! Network boot of bare machines with blank disks, by the firmware's own PXE client and dnsmasq. The installer writes
//! one machine's disk, one machine is diskless, and one runs from memory with /var on its disk.

use bakehouse_tests::rack::NetbootRack;
use bakehouse_tests::{Machine, TestFleet};
use builder::vm::Netboot;

const MAC: &str = "52:54:00:12:00:01";

/// `edge` and `shed` are roles without services. The role `edge` has /var in memory.
const FLEET: &str = r#"
name = "rack"
version = "1"

[netboot]
diskless = ["edge", "shed"]
trust_lan = true

[netboot.machines]
"52:54:00:00:00:99" = "hub-1"
"52:54:00:12:00:32" = "shed-1"

[groups.hub]
count = 1
endpoints = ["198.18.0.1"]

[groups.edge]
count = 2
first = "10.10.0.40"

[groups.shed]
count = 1
first = "10.10.0.50"
"#;

#[test]
fn bare_machines_become_the_nodes_that_fleet_toml_assigns() {
    let lab = TestFleet::empty("netboot");
    lab.write("fleet.toml", FLEET);
    lab.has_idle_role("edge", true);
    lab.has_idle_role("shed", false);
    lab.init();
    lab.ok(&["lock"]);
    lab.ok(&["build"]);
    let mut hub = Machine::alone(&lab, "hub-1");
    let mut rack = NetbootRack::open(&lab, &hub.lan());

    // No rule matches the machine: the server assigns nothing, and both sides print the reason.
    rack.serve(&lab, &[]);
    hub.start_bare(&lab);
    let refusal = format!("no rule in fleet.toml names this machine; set [netboot.machines] \"{MAC}\"");
    hub.wait_for(&[&refusal]);
    rack.hears(&refusal);

    // The operator adds the rule. The power fails during the download: the firmware must not boot the incomplete image,
    // and the next boot installs again.
    lab.edit("fleet.toml", "52:54:00:00:00:99", MAC);
    lab.edit("fleet.toml", "diskless =", "others = \"edge\"\ndiskless =");
    rack.serve(&lab, &[]);
    hub.wait_for(&["bakehouse: 50 % of"]);
    hub.cut_power();
    hub.start_bare(&lab);
    hub.wait_for(&["bakehouse: hub-1 is on /dev/vda; restarting from there"]);
    rack.hears("hub-1: is installed");
    hub.wait_for(&["bakehouse: ready (hub-1)"]);

    // Like a flashed disk: the ticket is used and no longer on the disk.
    assert_eq!(hub.ok("find /efi/loader -name '*.cred'"), "");
    assert_eq!(hub.ok("findmnt -no SOURCE,FSTYPE /"), "/dev/mapper/root erofs");
    assert_eq!(hub.ok("lsblk -no PARTLABEL /dev/vda | grep -c _empty"), "2");
    assert_eq!(hub.ok("systemctl --failed --no-legend --plain"), "");
    let audit = lab.read("build/netboot/audit.jsonl");
    assert!(audit.contains("is to be hub-1, on /dev/vda") && audit.contains("has hub-1 on its disk"), "{audit}");

    // A machine that only `others` matches gets the first free slot, runs from memory, and leaves its disk unchanged.
    let mut edge = Machine::alone(&lab, "edge-1");
    edge.start_bare(&lab);
    edge.wait_for(&["bakehouse: ready (edge-1)"]);
    assert_eq!(edge.ok("findmnt -no SOURCE,FSTYPE /"), "/dev/mapper/root erofs");
    assert!(edge.ok("dmsetup table root").contains(" verity 1 "));
    assert_eq!(edge.ok("findmnt -no FSTYPE /var"), "tmpfs");
    assert_eq!(edge.ok("head -c 64M /dev/vda | tr -d '\\0' | wc -c"), "0");
    assert_eq!(edge.ok("systemctl --failed --no-legend --plain"), "");
    let machine_id = edge.ok("cat /etc/machine-id");
    let keys = edge.ok("sha256sum /var/lib/bakehouse/keys.json");
    // After a restart it is the same slot with other keys, and the hubs fence the previous owner.
    edge.cut_power();
    edge.start_bare_by(&lab, Netboot::Http);
    edge.wait_for(&["HTTP Boot over IPv4"]);
    edge.wait_for(&["bakehouse: ready (edge-1)"]);
    assert!(edge.ok("firstboot status --json").contains(r#""epoch":2"#));
    assert_eq!(edge.ok("cat /etc/machine-id"), machine_id);
    assert_ne!(edge.ok("sha256sum /var/lib/bakehouse/keys.json"), keys);
    edge.cut_power();

    // A role with persistent data gets a /var on the machine's disk.
    let mut shed = Machine::alone(&lab, "shed-1");
    shed.start_bare(&lab);
    shed.wait_for(&["bakehouse: ready (shed-1)"]);
    assert_eq!(shed.ok("findmnt -no SOURCE,FSTYPE /var"), "/dev/vda1 ext4");
    assert_eq!(shed.ok("systemctl --failed --no-legend --plain"), "");
    let keys = shed.ok("sha256sum /var/lib/bakehouse/keys.json; sync");
    shed.cut_power();
    // Another DHCP server gives out the addresses, and `bakehouse netboot` only answers as a proxy DHCP server.
    rack.has_dhcp();
    rack.serve(&lab, &[]);
    shed.start_bare(&lab);
    shed.wait_for(&["bakehouse: ready (shed-1)"]);
    assert_eq!(shed.ok("sha256sum /var/lib/bakehouse/keys.json"), keys);
    assert!(shed.ok("firstboot status --json").contains(r#""epoch":1"#));
    shed.ok(r"grep -q '198\.18\.64\.' /proc/net/fib_trie");
    let audit = lab.read("build/netboot/audit.jsonl");
    for line in ["is to be edge-1, in memory\"", "is to be shed-1, in memory, with /var on /dev/vda", "runs as edge-1"]
    {
        assert!(audit.contains(line), "{line}: {audit}");
    }
}
