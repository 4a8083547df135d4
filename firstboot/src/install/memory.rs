//! Runs an image from memory. dm-verity verifies each block on reading, as on a disk, against a root hash that the
//! fleet signed ([`signed_root`]).

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

/// Mount point of a tmpfs for the image, because /run is too small.
const MEMORY: &str = "/run/bakehouse-root";
const IMAGE: &str = "/run/bakehouse-root/image";
const ROOT: &str = "/sysroot";
/// Folder from which systemd passes credentials of the initrd to the host system.
const CREDENTIALS: &str = "/run/credentials/@initrd";
const CHUNK: usize = 1 << 20;

/// Downloads the image, and mounts it at /sysroot. Removes the remains of a failed attempt first.
///
/// # Errors
/// If the fleet did not sign the image's root hash, or the image cannot be downloaded or mounted.
pub(super) fn prepare(server: &Server, assignment: &Run, ticket: &[u8]) -> Result<()> {
    let roothash = signed_root(&trust::load(Path::new("/"))?, assignment)?;
    clear();
    fetch(server, assignment)?;
    let device = output(Command::new("/usr/sbin/losetup").args(["--find", "--show", "--read-only", IMAGE]), "losetup")?;
    let mut verity = Command::new("/usr/lib/systemd/systemd-veritysetup");
    verity.args(["attach", "root", &device, &device, &roothash]);
    run(verity.arg(format!("hash-offset={}", assignment.root.size)), "systemd-veritysetup")?;
    mount(&["-t", "erofs", "-o", "ro", "/dev/mapper/root", ROOT])?;
    let var = format!("{ROOT}/var");
    match &assignment.var {
        None => mount(&["-t", "tmpfs", "-o", "nosuid,nodev,mode=0755,size=50%", "var", &var])?,
        Some(disk) => {
            make_var(disk)?;
            mount(&["-t", "ext4", "-o", "nosuid,nodev", "/dev/disk/by-partlabel/var", &var])?;
        }
    }
    pass_ticket(ticket)
}

/// Switches to the system in /sysroot, which ends the installer.
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

/// Downloads the root file system, and its hash tree after it.
fn fetch(server: &Server, assignment: &Run) -> Result<()> {
    fs::create_dir_all(MEMORY).map_err(Error::io("create", Path::new(MEMORY)))?;
    let size = assignment.root.size + assignment.verity.size;
    // Add space for the file system's metadata.
    let options = format!("nosuid,nodev,noexec,mode=0700,size={}", size + size / 64 + (1 << 20));
    mount(&["-t", "tmpfs", "-o", &options, "root", MEMORY])?;
    let failed = || Error::io("write", Path::new(IMAGE));
    let mut file = File::create(IMAGE).map_err(failed())?;
    let mut chunk = vec![0; CHUNK];
    let mut progress = ProgressPrinter::new(size);
    for extent in [assignment.root, assignment.verity] {
        let mut body = server.read(&assignment.image, extent)?;
        let mut left = extent.size;
        while left > 0 {
            let part = CHUNK.min(usize::try_from(left).unwrap_or(CHUNK));
            body.read_exact(&mut chunk[..part]).map_err(|e| server.failed(e))?;
            file.write_all(&chunk[..part]).map_err(failed())?;
            left -= part as u64;
            progress.advance(server, part as u64);
        }
    }
    Ok(())
}

/// Makes the partition of /var on a blank disk, unless an earlier start has made it.
fn make_var(disk: &str) -> Result<()> {
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

/// Passes the ticket to the host system as a credential.
fn pass_ticket(ticket: &[u8]) -> Result<()> {
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
