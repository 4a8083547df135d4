//! `bakehouse flash` to a loop device.

use std::fs;
use std::path::Path;
use std::process::Command;

use bakehouse_tests::TestFleet;

/// A loop device, which is a block device like a disk.
struct Disk(String);

impl Disk {
    fn new(file: &Path, size: u64) -> Self {
        // Filled with 0xff, so that zeros in the image must be written, too.
        let before = "head -c \"$1\" /dev/zero | tr '\\0' '\\377' > \"$0\"";
        let made = Command::new("sh").args(["-c", before]).arg(file).arg(size.to_string()).status();
        assert!(made.expect("sh").success());
        let attached = Command::new("losetup").args(["--show", "-f"]).arg(file).output().expect("losetup");
        assert!(attached.status.success(), "{}", String::from_utf8_lossy(&attached.stderr));
        Self(String::from_utf8_lossy(&attached.stdout).trim().to_owned())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}

#[test]
fn flash_writes_the_image_and_rejects_mounted_or_small_disks() {
    const ESP_END: u64 = 257 << 20;
    let lab = TestFleet::of_fleet("disk", "ha");
    lab.init();
    lab.ok(&["build", "hub"]);
    let image = lab.dir.join("build/hub/ha-hub_1.raw");
    let size = fs::metadata(&image).expect("the built image").len();
    let small = Disk::new(&lab.dir.join("small"), 64 << 20);
    lab.run(&["flash", "hub-1", &small.0, "--yes"]).fails(2, &["has 67 MB, the image"]);

    let disk = Disk::new(&lab.dir.join("disk"), size + (1 << 20));
    let run = |program: &str, args: &[&str]| {
        assert!(Command::new(program).args(args).status().expect("a program").success(), "{program} {args:?}");
    };
    let mounted = lab.dir.join("mounted");
    fs::create_dir(&mounted).expect("the lab is writable");
    run("mkfs.ext4", &["-q", "-F", &disk.0]);
    run("mount", &[&disk.0, mounted.to_str().expect("a UTF-8 path")]);
    let refused = lab.run(&["flash", "hub-1", &disk.0, "--yes"]);
    run("umount", &[mounted.to_str().expect("a UTF-8 path")]);
    refused.fails(2, &["is in use", "unmount it", "--force loop"]);

    lab.run(&["flash", "hub-1", &disk.0]).fails(2, &["would be overwritten", "add --yes"]);
    lab.ok(&["flash", "hub-1", &disk.0, "--yes"]);
    // Beyond the EFI partition, which has the ticket, the disk equals the image byte for byte.
    let (from, count) = (ESP_END.to_string(), (size - ESP_END).to_string());
    run("cmp", &["-i", &from, "-n", &count, &disk.0, image.to_str().expect("a UTF-8 path")]);
    drop(disk);
    fs::remove_dir_all(&lab.dir).expect("the lab is writable");
}
