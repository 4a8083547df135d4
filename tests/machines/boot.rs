//! The hub image in a virtual machine: boots, verified root, Secure Boot, and exported disks.

use std::fs::{self, OpenOptions};
use std::io::Read as _;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use bakehouse_tests::{Machine, TestFleet, first_difference};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const READY: &str = "bakehouse: ready (hub-1)";
const FAILED_CLOSED: &str = "bakehouse: the root file system could not be verified or mounted; restarting";

/// First characters of a base64 credential that is encrypted with systemd's null key.
const SEALED_BY_NULL: &str = "BYRp2vb1QySABUnaD46i";
const ESP: &str = "/dev/disk/by-partlabel/esp";

fn lab(name: &str) -> TestFleet {
    let lab = TestFleet::of_fleet(name, "ha");
    lab.ok(&["build", "hub"]);
    lab
}

#[test]
fn hub_boots_starts_its_role_and_keeps_its_identity() {
    // A disk from `bakehouse flash`: the image with the node's ticket.
    let lab = lab("boot");
    lab.init();
    let disk = lab.dir.join("hub-1.raw");
    let flashed = lab.ok(&["flash", "hub-1", disk.to_str().expect("a UTF-8 path"), "--json"]);
    assert!(flashed.out.lines().any(|l| l.contains("\"step\":\"verify\"")), "{}", flashed.out);
    assert_eq!((&flashed.result()["group"], &flashed.result()["ticket"]["to"]), (&"hub".into(), &"hub-1".into()));
    let on_disk = |text: &str| {
        let disk = fs::read(&disk).expect("a disk");
        disk.windows(text.len()).any(|bytes| bytes == text.as_bytes())
    };
    assert!(on_disk(SEALED_BY_NULL), "the flashed disk has no ticket");
    let mut hub = Machine::alone(&lab, "hub-1");
    let tpm = lab.dir.join("tpm");
    let _ = fs::remove_dir_all(&tpm);
    hub.has_tpm(Some(&tpm));
    hub.start_flashed(&disk);
    hub.wait_for(&[READY]);
    // A stolen disk has no ticket, and its state is sealed for the TPM.
    assert_eq!(hub.ok("find /efi/loader -name '*.cred*'"), "");
    // The clusters of the deleted file are overwritten.
    assert_eq!(hub.ok(&format!("grep -ac {SEALED_BY_NULL} {ESP} || :")), "0");
    assert_eq!(hub.ok("cd /var/lib/bakehouse; grep -l '\"sealed\"' *; ! grep -rl PRIVATE ."), "keys.json\nstate.json");
    // The state is sealed without systemd's host key, which a boot in another machine would replace.
    hub.ok("! test -e /var/lib/systemd/credential.secret && ! test -e /run/systemd/credential.secret");
    assert_eq!(hub.ok("systemctl is-active firstboot"), "active");

    // The root is erofs on dm-verity, and read-only.
    assert_eq!(hub.ok("findmnt -no SOURCE,FSTYPE /"), "/dev/mapper/root erofs");
    assert!(hub.ok("findmnt -no OPTIONS /").split(',').any(|o| o == "ro"));
    assert!(hub.ok("dmsetup table root").contains(" verity 1 "));
    assert!(hub.ok("dmsetup status root").ends_with(" V"), "dm-verity has found a corrupted block");
    for path in ["/usr/x", "/etc/x"] {
        assert_ne!(hub.exec(&format!("touch {path}")).status, 0, "{path} is writable");
    }

    // /var has a partition that fills the disk. The partitions of root B exist.
    let var = hub.ok("findmnt -no SOURCE,FSTYPE /var");
    assert!(var.starts_with("/dev/vda") && var.ends_with(" ext4"), "{var}");
    let size: u64 = hub.ok("findmnt -bno SIZE /var").trim().parse().expect("a number");
    assert!(size > 4 << 30, "/var was not grown, it has {size} bytes");
    assert_eq!(hub.ok("lsblk -no PARTLABEL /dev/vda | grep -c _empty"), "2");

    // No unit failed, and the agent has started the role.
    hub.exec("systemctl is-system-running --wait");
    assert_eq!(hub.ok("systemctl --failed --no-legend --plain"), "");
    hub.ok("systemctl is-system-running");
    for unit in
        ["firstboot", "role-hub.target", "role-voter.target", "nftables", "bird", "keepalived", "haproxy", "etcd"]
    {
        assert_eq!(hub.ok(&format!("systemctl is-active {unit}")), "active", "{unit}");
    }
    assert_eq!(hub.ok("hostname"), "hub-1");
    assert!(hub.ok("birdc show protocols").contains("workers"));
    assert!(hub.ok("nft list chain inet bakehouse input").contains("policy drop"));
    assert!(hub.ok("journalctl -b -u firstboot -o cat").contains("hub-1 of the fleet ha"));

    // The boot becomes good once all units have run for some time: the entry's name loses its tries.
    hub.ok("for i in $(seq 90); do bootctl list --no-pager | grep -q ha-hub_1.efi && exit; sleep 2; done; exit 1");
    let release = hub.ok("cat /usr/lib/os-release");
    assert!(release.contains("IMAGE_ID=\"ha-hub\"") && release.contains("IMAGE_VERSION=\"1\""), "{release}");

    let machine_id = hub.ok("cat /etc/machine-id");
    let state = hub.ok("stat -c '%a %Y %i' /var/lib/bakehouse/state.json; sha256sum /var/lib/bakehouse/state.json");
    assert!(state.starts_with("600 "), "{state}");
    let partitions = hub.ok("lsblk -no PARTUUID,SIZE /dev/vda");

    // A power cut: the second boot must not repeat the first one's work. The journal of this boot is read after it.
    hub.ok("journalctl --sync");
    hub.cut_power();
    hub.start_flashed(&disk);
    // The host stops the machine for 100 s while it waits for its disk. The boot must not time out.
    hub.wait_for(&["Starting systemd-udevd.service"]);
    kill(qemu(&lab), Signal::SIGSTOP).expect("QEMU runs");
    thread::sleep(Duration::from_secs(100));
    kill(qemu(&lab), Signal::SIGCONT).expect("QEMU runs");
    hub.wait_for(&[READY]);
    assert!(!hub.console().contains(FAILED_CLOSED), "{}", hub.console());
    assert_eq!(hub.ok("cat /etc/machine-id"), machine_id);
    assert_eq!(
        hub.ok("stat -c '%a %Y %i' /var/lib/bakehouse/state.json; sha256sum /var/lib/bakehouse/state.json"),
        state
    );
    assert_eq!(hub.ok("lsblk -no PARTUUID,SIZE /dev/vda"), partitions);
    assert!(hub.ok("journalctl -b -u firstboot -o cat").contains("hub-1 since an earlier boot"));
    // The journal persists under the same machine id.
    assert!(hub.ok("journalctl -b -1 -u firstboot -o cat").contains("hub-1 of the fleet ha"));
    hub.ok("systemctl is-system-running --wait");

    // Emulation sometimes loses a timer and the machine hangs. A waiting test then switches the machine off and on.
    let lost = "Possible timer handling issue";
    hub.ok(&format!("echo 'rcu: {lost} on cpu=0' >/dev/console"));
    hub.wait_for(&[lost]);
    kill(qemu(&lab), Signal::SIGSTOP).expect("QEMU runs");
    hub.wait_until("ready after the power cycle", |console| {
        console.split_once("have stopped; switched off and on").is_some_and(|(_, rest)| rest.contains(READY))
    });
    assert_eq!(hub.ok("cat /etc/machine-id"), machine_id);

    // The disk in a machine without this machine's TPM.
    hub.cut_power();
    hub.has_tpm(None);
    hub.start_flashed(&disk);
    hub.wait_for(&["bakehouse: state.json was sealed for the TPM of another machine"]);

    // If the kernel cannot mount /var, the machine prints the reason and restarts without an operator at its console.
    hub.ok("dd if=/dev/zero of=$(findmnt -no SOURCE /var) bs=1M count=200 conv=notrunc oflag=direct");
    hub.cut_power();
    hub.start_flashed(&disk);
    hub.wait_for(&["bakehouse: this machine cannot start, see above; restarting in 30 s"]);
    hub.wait_until("a second boot", |console| console.matches("Linux version").count() > 1);
}

/// Returns the process id of hub-1's QEMU.
fn qemu(lab: &TestFleet) -> Pid {
    Pid::from_raw(lab.read("build/vm/hub-1/pid").trim().parse().expect("a number"))
}

/// Boots a disk under a legacy BIOS and returns its screen's text, after `last` has appeared or 60 s have passed.
fn by_bios(image: &Path, last: &str) -> String {
    // SeaBIOS with its screen on the serial line.
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-machine", "q35,graphics=off", "-accel", "tcg", "-nodefaults", "-display", "none", "-snapshot"]);
    qemu.args(["-serial", "stdio", "-drive"]).arg(format!("if=virtio,format=raw,file={}", image.display()));
    let mut machine = qemu.stdout(Stdio::piped()).stdin(Stdio::null()).spawn().expect("qemu");
    let mut screen = machine.stdout.take().expect("a pipe");
    let (send, receive) = mpsc::channel();
    let last = last.to_owned();
    thread::spawn(move || {
        let (mut said, mut part) = (Vec::new(), [0; 4096]);
        while let Ok(n @ 1..) = screen.read(&mut part) {
            said.extend_from_slice(&part[..n]);
            let text = String::from_utf8_lossy(&said).into_owned();
            let whole = text.contains(&last);
            if send.send(text).is_err() || whole {
                return;
            }
        }
    });
    let until = Instant::now() + Duration::from_secs(60);
    let mut said = String::new();
    while let Ok(text) = receive.recv_timeout(until.saturating_duration_since(Instant::now())) {
        said = text;
    }
    machine.kill().and_then(|()| machine.wait()).expect("a child");
    said
}

#[test]
fn boot_fails_closed_on_one_changed_byte_of_the_root() {
    let lab = lab("tamper");
    let image = lab.dir.join("build/hub/ha-hub_1.raw");
    let tampered = lab.dir.join("tampered.raw");
    let copied = Command::new("cp").arg("--sparse=always").args([&image, &tampered]).status();
    assert!(copied.expect("cp").success());
    // A byte of the volume name in the superblock, which erofs ignores, so only dm-verity can detect the change.
    let at = (1 << 20) + (256 << 20) + 1024 + 0x40;
    let disk = OpenOptions::new().read(true).write(true).open(&tampered).expect("the copy");
    let mut byte = [0];
    disk.read_exact_at(&mut byte, at).expect("the byte");
    disk.write_all_at(&[byte[0] ^ 1], at).expect("the byte");
    drop(disk);

    let hub = Machine::alone(&lab, "hub-1").with_image(&tampered);
    hub.start();
    assert_eq!(hub.wait_for(&[FAILED_CLOSED, READY]), FAILED_CLOSED);
    let console = hub.console();
    assert!(!console.contains("Reached target multi-user.target"), "{console}");
    // The boot fails immediately, without waiting for the device's timeout.
    assert!(!console.contains("Timed out waiting for device"), "{console}");
    hub.cut_power();
    fs::remove_file(&tampered).expect("the copy");
}

#[test]
fn secure_boot_rejects_modified_kernel_image() {
    let lab = TestFleet::empty("secure");
    lab.write(
        "fleet.toml",
        "name = \"safe\"\nversion = \"1\"\n[secure_boot]\n[groups.hub]\ncount = 1\nendpoints = [\"hub.example.net\"]\n",
    );
    lab.init();
    lab.ok(&["lock"]);
    lab.ok(&["build"]);
    // Signed images are reproducible, too.
    let built = lab.dir.join("build/hub");
    let first = lab.dir.join("first");
    fs::rename(&built, &first).expect("the built image");
    lab.ok(&["build"]);
    let names = ["safe-hub_1.efi", "safe-hub_1.raw"].map(str::to_owned);
    assert_eq!(first_difference(&first, &built, &names), None);
    // A legacy BIOS would verify no signature, so the disk refuses to boot there.
    let said = by_bios(&built.join("safe-hub_1.raw"), "firmware settings.");
    assert!(said.contains("this disk needs UEFI firmware"), "{said}");

    // Firmware in setup mode enrols the fleet's keys and enforces them afterwards.
    let disk = lab.dir.join("hub-1.raw");
    lab.ok(&["flash", "hub-1", disk.to_str().expect("a UTF-8 path")]);
    let mut hub = Machine::alone(&lab, "hub-1");
    hub.start_flashed(&disk);
    hub.wait_for(&[READY]);
    let status = hub.ok("bootctl status --no-pager 2>/dev/null | sed -n 's/^ *Secure Boot: //p'");
    assert_eq!(status, "enabled (user)");
    assert_eq!(hub.ok("find /efi -name '*ticket*'"), "");
    assert_eq!(hub.ok(&format!("grep -ac '\"founder\"' {ESP} || :")), "0");
    assert_eq!(hub.ok("systemctl --failed --no-legend --plain"), "");

    // One changed byte of the unified kernel image.
    hub.ok("uki=$(ls /efi/EFI/Linux/*.efi); printf '\\001' | dd of=$uki bs=1 seek=9000000 conv=notrunc; sync");
    hub.cut_power();
    hub.start_flashed(&disk);
    let said = ["Security violation", "Security Violation", "Access denied", "Access Denied"];
    assert_ne!(hub.wait_for(&[&said[..], &[READY]].concat()), READY);
    assert!(!hub.console().contains("Linux version"), "{}", hub.console());
    hub.cut_power();
}

#[test]
fn exported_disks_are_valid_and_boot_under_legacy_bios_with_user_data() {
    let lab = lab("export");
    lab.init();
    let out = lab.dir.join("out");
    let dir = out.to_str().expect("a UTF-8 path");
    let run = |program: &str, args: &[&str]| {
        let done = Command::new(program).args(args).output().unwrap_or_else(|e| panic!("{program}: {e}"));
        let said = String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "{program} {args:?}: {said}");
        said
    };
    for (format, driver) in [("qcow2", "qcow2"), ("vmdk", "vmdk"), ("vhd", "vpc"), ("raw", "raw")] {
        lab.ok(&["vm", "hub-1", "--format", format, "-o", dir]);
        let disk = format!("{dir}/hub-1.{format}");
        assert!(run("qemu-img", &["info", "-f", driver, &disk]).contains(&format!("file format: {driver}")));
        if matches!(format, "qcow2" | "vmdk") {
            run("qemu-img", &["check", "-f", driver, &disk]);
        }
        // Every format has the content of the image.
        let image = lab.dir.join("build/hub/ha-hub_1.raw");
        let image = image.to_str().expect("a UTF-8 path");
        assert!(run("qemu-img", &["compare", "-f", driver, "-F", "raw", &disk, image]).contains("identical"));
        fs::remove_file(&disk).expect("the exported disk");
        // libvirt accepts the definition and keeps the ticket in it.
        let defined = run("virsh", &["-q", "-c", "test:///default", &format!("define {dir}/hub-1.xml; dumpxml hub-1")]);
        assert!(defined.contains("io.systemd.credential.binary:bakehouse.ticket="), "{defined}");
        run("sh", &["-n", &format!("{dir}/hub-1.proxmox.sh")]);
    }
    lab.ok(&["vm", "hub-1", "--format", "qcow2", "--ticket", "disk", "-o", dir]);
    // A machine may run from the disk.
    let again = ["vm", "hub-1", "--format", "qcow2", "-o", dir];
    lab.run(&again).fails(2, &["hub-1.qcow2 exists", "add --yes"]);
    for file in ["hub-1.xml", "hub-1.proxmox.sh", "hub-1.qcow2"] {
        let mode = fs::metadata(out.join(file)).expect("an exported file").permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{file} contains a ticket");
    }

    // A cloud with user data as the only source of the ticket, and a legacy BIOS.
    lab.ok(&["vm", "hub-1", "--format", "raw", "--ticket", "seed", "-o", dir]);
    let mut hub = Machine::alone(&lab, "hub-1").with_bios();
    hub.start_seeded(&out.join("hub-1.raw"), &out.join("hub-1-seed.img"));
    hub.wait_for(&[READY]);
    assert!(hub.ok("journalctl -b -o cat -u 'firstboot-seed@*'").contains("user data"));
    hub.ok("! test -e /sys/firmware/efi");
    assert_eq!(hub.ok("findmnt -no SOURCE,FSTYPE /"), "/dev/mapper/root erofs");
    assert_eq!(hub.ok("lsblk -no PARTLABEL /dev/vda | grep -c _empty"), "2");
    hub.exec("systemctl is-system-running --wait");
    assert_eq!(hub.ok("systemctl --failed --no-legend --plain"), "");
    for unit in ["firstboot-grub.service", "firstboot-good.service"] {
        assert!(hub.exposure(unit) < 2.0, "{unit}");
    }
    // The boot becomes good, as under UEFI.
    hub.ok("for i in $(seq 90); do [ -e /efi/EFI/Linux/ha-hub_1.efi ] && exit; sleep 2; done; exit 1");
}
