//! A machine that runs an image from its memory. dm-verity checks each block when it is read, as it does on a
//! disk, against a root hash that the fleet signed ([`signed_root`]).

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::process::Command;

use fleet::Ticket;
use fleet::netboot::{Run, signed_root};

use super::command::{output, run};
use super::progress::ProgressPrinter;
use super::server::Server;
use super::trust;
use crate::error::{Error, Result};

/// A file system of its own: /run has no room for it.
const MEMORY: &str = "/run/bakehouse-root";
const IMAGE: &str = "/run/bakehouse-root/image";
const ROOT: &str = "/sysroot";
/// From where systemd takes credentials into the system that the initrd leads to.
const CREDENTIALS: &str = "/run/credentials/@initrd";
const CHUNK: usize = 1 << 20;

/// Makes /sysroot of what comes over the network. What a failed attempt left is taken away first.
///
/// # Errors
/// The fleet did not sign the image's root hash; the image can't be loaded or mounted.
pub(super) fn prepare(server: &Server, errand: &Run, ticket: &[u8]) -> Result<()> {
    let roothash = signed_root(&trust::load(Path::new("/"))?, errand)?;
    clear();
    fetch(server, errand)?;
    let device = output(Command::new("/usr/sbin/losetup").args(["--find", "--show", "--read-only", IMAGE]), "losetup")?;
    let mut verity = Command::new("/usr/lib/systemd/systemd-veritysetup");
    verity.args(["attach", "root", &device, &device, &roothash]);
    run(verity.arg(format!("hash-offset={}", errand.root.size)), "systemd-veritysetup")?;
    mount(&["-t", "erofs", "-o", "ro", "/dev/mapper/root", ROOT])?;
    let var = format!("{ROOT}/var");
    match &errand.var {
        None => mount(&["-t", "tmpfs", "-o", "nosuid,nodev,mode=0755,size=50%", "var", &var])?,
        Some(disk) => {
            own_disk(disk)?;
            mount(&["-t", "ext4", "-o", "nosuid,nodev", "/dev/disk/by-partlabel/var", &var])?;
        }
    }
    give(ticket)
}

/// Into the system that is in /sysroot; this one ends.
pub(super) fn enter() -> Result<()> {
    run(
        Command::new("/usr/bin/systemctl").args(["--no-block", "isolate", "initrd-switch-root.target"]),
        "systemctl isolate",
    )
}

fn clear() {
    let _ = Command::new("/usr/bin/umount").args(["--quiet", "--recursive", ROOT]).output();
    let _ = Command::new("/usr/lib/systemd/systemd-veritysetup").args(["detach", "root"]).output();
    let _ = Command::new("/usr/sbin/losetup").arg("--detach-all").output();
    let _ = Command::new("/usr/bin/umount").args(["--quiet", MEMORY]).output();
}

/// The root and its hash tree, one after the other.
fn fetch(server: &Server, errand: &Run) -> Result<()> {
    fs::create_dir_all(MEMORY).map_err(Error::io("create", Path::new(MEMORY)))?;
    let size = errand.root.size + errand.verity.size;
    // Room for the file system's own needs, too.
    let options = format!("nosuid,nodev,noexec,mode=0700,size={}", size + size / 64 + (1 << 20));
    mount(&["-t", "tmpfs", "-o", &options, "root", MEMORY])?;
    let told = || Error::io("write", Path::new(IMAGE));
    let mut file = File::create(IMAGE).map_err(told())?;
    let mut chunk = vec![0; CHUNK];
    let mut tenths = ProgressPrinter::of(size);
    for extent in [errand.root, errand.verity] {
        let mut body = server.read(&errand.image, extent)?;
        let mut left = extent.size;
        while left > 0 {
            let part = CHUNK.min(usize::try_from(left).unwrap_or(CHUNK));
            body.read_exact(&mut chunk[..part]).map_err(|e| server.failed(e))?;
            file.write_all(&chunk[..part]).map_err(told())?;
            left -= part as u64;
            tenths.advance(server, part as u64);
        }
    }
    Ok(())
}

/// /var's partition, on a disk that has nothing else, or that has it since an earlier start.
fn own_disk(disk: &str) -> Result<()> {
    const DEFINITIONS: &str = "/etc/repart.d";
    let partlabel = Path::new("/dev/disk/by-partlabel/var");
    if partlabel.exists() {
        return Ok(());
    }
    let mut repart = Command::new("/usr/bin/systemd-repart");
    repart.args(["--dry-run=no", "--empty=require", "--definitions", DEFINITIONS, disk]);
    run(&mut repart, &format!("systemd-repart, on {disk}, which must be blank (wipefs -a),"))?;
    run(Command::new("/usr/bin/udevadm").args(["settle", "--timeout=30", "--exit-if-exists"]).arg(partlabel), "udevadm")
}

/// The ticket, to who comes after.
fn give(ticket: &[u8]) -> Result<()> {
    let dir = Path::new(CREDENTIALS);
    DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(Error::io("create", dir))?;
    let path = dir.join(Ticket::CREDENTIAL);
    let mut options = OpenOptions::new();
    let file = options.write(true).create(true).truncate(true).mode(0o400).open(&path);
    file.and_then(|mut f| f.write_all(ticket)).map_err(Error::io("write", &path))
}

fn mount(args: &[&str]) -> Result<()> {
    run(Command::new("/usr/bin/mount").args(args), "mount")
}
