//! Updates and rollback on a machine with a legacy BIOS, where GRUB counts the boot attempts.

use bakehouse_tests::Machine;
use bakehouse_tests::updates::{
    LOOK, READY, broken, comes_up, goes_back, is_blessed, is_denied, lab_of_one, publish, repaired, runs, version,
};

#[test]
fn legacy_bios_updates_and_rolls_back() {
    let (lab, _server) = lab_of_one("bios-update");
    // GRUB passes the ticket from the disk to the kernel as a credential.
    let disk = lab.dir.join("hub-1.raw");
    lab.ok(&["flash", "hub-1", disk.to_str().expect("a UTF-8 path")]);
    let mut hub = Machine::for_node(&lab, "hub-1").with_bios();
    hub.start_flashed(&disk);
    comes_up(&hub, 1);
    hub.ok("! test -e /sys/firmware/efi");
    assert_eq!(hub.ok("find /efi -name '*ticket*'"), "");
    is_blessed(&hub);

    version(&lab, "1", "2");
    publish(&lab);
    assert_eq!(hub.ok(LOOK), "2");
    comes_up(&hub, 2);
    assert_eq!(runs(&hub), "2");
    is_blessed(&hub);
    // GRUB no longer counts attempts of a version that is marked good.
    hub.cut_power();
    hub.start();
    comes_up(&hub, 1);
    assert_eq!(runs(&hub), "2");
    assert!(hub.ok("journalctl -b -u firstboot -o cat").contains("hub-1 since an earlier boot"));
    assert!(hub.ok("cat /efi/grub/grubenv").contains("\ngood=up-hub_2\nnext=\ntries=0\n"));

    version(&lab, "2", "3");
    broken(&lab);
    publish(&lab);
    assert_eq!(hub.ok(LOOK), "3");
    goes_back(&hub);
    assert_eq!(runs(&hub), "2");
    is_denied(&hub, "3");
    assert_eq!(hub.ok("ls /efi/EFI/Linux"), "up-hub_2.efi\nup-hub_3+0-3.efi");

    version(&lab, "3", "4");
    repaired(&lab);
    publish(&lab);
    let before = hub.console().matches(READY).count();
    assert_eq!(hub.ok(LOOK), "4");
    comes_up(&hub, before + 1);
    assert_eq!(runs(&hub), "4");
    is_blessed(&hub);
    assert_eq!(hub.ok("systemctl --failed --no-legend --plain"), "");
    hub.shut_down();
}
