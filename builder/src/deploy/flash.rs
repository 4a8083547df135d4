//! `bakehouse flash`: writes an image and the node's ticket to a disk or a file.
//!
//! After the write, the command reads the image back from the medium and compares it. Ranges of zeros become holes in a
//! file. On a disk, the kernel zeroes them with the device's own command if the device has one.

use std::fs::{self, File, OpenOptions};
use std::io::{self, IsTerminal as _, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use fleet::{Ticket, Topology};
use nix::fcntl::{FallocateFlags, PosixFadviseAdvice, fallocate, posix_fadvise};
use nix::libc;
use schemars::JsonSchema;
use serde::Serialize;

use crate::assemble::layout::ESP_START;
use crate::error::{Error, Result, fail};
use crate::format::systemd_credential::seal;
use crate::progress::Progress;
use crate::toolchain::Tools;
use crate::util::process::run;

const CHUNK: usize = 4 << 20;
/// Bytes between two calls of `on_progress`.
const EVENT_INTERVAL: u64 = 64 << 20;

/// Target of a write, and the operator's options.
pub(crate) struct FlashOptions<'a> {
    /// Node or group, for messages.
    pub to: &'a str,
    /// A disk or a file.
    pub target: &'a Path,
    /// Overwrites without a question.
    pub yes: bool,
    /// Kernel name of a device that may be overwritten although it is in use or is a partition.
    pub force: Option<&'a str>,
    /// Gets the progress of each pass, every 64 MiB.
    pub on_progress: &'a dyn Fn(PassProgress),
}

/// Progress of a pass over the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub(crate) struct PassProgress {
    /// Name of the pass: `write` or `verify`.
    pub step: &'static str,
    /// Bytes that are done.
    pub bytes: u64,
    /// Bytes of the image.
    pub of: u64,
}

/// Writes `image`, verifies it, and writes the ticket. Returns the number of bytes.
///
/// # Errors
/// If the target must not be overwritten, cannot be read or written, or returns other bytes than it was given.
pub(crate) fn flash(
    image: &Path,
    ticket: Option<&TicketFile>,
    options: &FlashOptions,
    progress: &Progress,
) -> Result<u64> {
    let source = File::open(image).map_err(Error::io("open", image))?;
    let size = source.metadata().map_err(Error::io("read", image))?.len();
    let checked = check(options.target, options.force, size)?;
    let device = match &checked {
        CheckedTarget::New => None,
        CheckedTarget::File(_) => Some("a file"),
        CheckedTarget::Disk { shown, .. } => Some(shown.as_str()),
    };
    if let Some(device) = device {
        confirm(options, device)?;
    }
    let target = checked.open(options.target)?;
    let is_disk = matches!(checked, CheckedTarget::Disk { .. });
    if !is_disk {
        if ticket.is_some() {
            // An existing file may be readable by others.
            let private = fs::Permissions::from_mode(0o600);
            target.set_permissions(private).map_err(Error::io("make private", options.target))?;
        }
        target.set_len(0).and_then(|()| target.set_len(size)).map_err(Error::io("resize", options.target))?;
    }
    let context = Error::io("write", options.target);
    let pass = CopyPass { size, on_progress: options.on_progress, progress };
    pass.over(&source, "write", |at, bytes| write(&target, at, bytes, is_disk)).map_err(context)?;
    target.sync_all().map_err(Error::io("write", options.target))?;
    // Drops the page cache, so that the kernel reads from the medium.
    posix_fadvise(&target, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)
        .map_err(|e| Error::io("read", options.target)(e.into()))?;
    let mut back = vec![0; CHUNK];
    pass.over(&source, "verify", |at, bytes| {
        let back = &mut back[..bytes.len()];
        target.read_exact_at(back, at)?;
        if back == bytes {
            return Ok(());
        }
        let first = bytes.iter().zip(back.iter()).position(|(a, b)| a != b).unwrap_or(0) as u64;
        Err(io::Error::other(format!("byte {} differs from what was written: the medium is damaged", at + first)))
    })
    .map_err(Error::io("verify", options.target))?;
    if let Some(ticket) = ticket {
        put_ticket(&target, options.target, ticket)?;
    }
    Ok(size)
}

/// A ticket for the EFI partition of a disk.
pub(crate) struct TicketFile<'a> {
    /// The ticket.
    pub ticket: &'a Ticket,
    /// Whether the machine uses Secure Boot.
    pub secure: bool,
    /// Toolchain with mtools.
    pub tools: &'a Tools,
}

impl TicketFile<'_> {
    /// Returns the ticket's path on the EFI partition and the file's content: a credential for systemd's EFI stub. With
    /// Secure Boot, systemd ignores credentials from the EFI partition, so the agent reads the ticket from another
    /// path.
    ///
    /// # Errors
    /// If the kernel returns no random bytes.
    pub(crate) fn file(ticket: &Ticket, secure: bool) -> Result<(String, Vec<u8>)> {
        let text = serde_json::to_vec(ticket).map_err(Error::Json)?;
        if secure {
            return Ok((Ticket::FILE.to_owned(), text));
        }
        let path = format!("loader/credentials/{}.cred", Ticket::CREDENTIAL);
        Ok((path, BASE64.encode(seal(Ticket::CREDENTIAL, &text)?).into_bytes()))
    }
}

/// Writes a ticket to the EFI partition of an open disk; `shown` is the disk's name in messages.
///
/// # Errors
/// If mtools does not find the partition, or cannot write to it.
pub(crate) fn put_ticket(disk: &File, shown: &Path, ticket: &TicketFile) -> Result<()> {
    let TicketFile { ticket, secure, tools } = ticket;
    let (path, content) = TicketFile::file(ticket, *secure)?;
    let mut file = tempfile::NamedTempFile::new().map_err(Error::io("create", "a temporary file"))?;
    file.write_all(&content).map_err(Error::io("write", file.path()))?;
    // mtools gets the open disk as standard input, because another disk may have its path by now.
    let image = format!("/proc/self/fd/0@@{ESP_START}");
    let tool = |program: &str| {
        let mut command = tools.command(program);
        command.env("MTOOLS_SKIP_CHECK", "1").args(["-i", &image]);
        let disk = disk.try_clone().map_err(Error::io("open", shown))?;
        command.stdin(disk);
        Ok::<_, Error>(command)
    };
    if path.contains('/') {
        run(tool("usr/bin/mmd")?.arg("::/loader/credentials"), "mmd")?;
    }
    run(tool("usr/bin/mcopy")?.arg("-o").arg(file.path()).arg(format!("::/{path}")), "mcopy")?;
    // The operator may remove a memory card as soon as the command returns.
    disk.sync_all().map_err(Error::io("write", shown))
}

/// One pass over the image.
struct CopyPass<'a> {
    size: u64,
    on_progress: &'a dyn Fn(PassProgress),
    progress: &'a Progress,
}

impl CopyPass<'_> {
    fn over(
        &self,
        mut source: &File,
        name: &'static str,
        mut each: impl FnMut(u64, &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let step = self.progress.bytes(name, self.size);
        source.seek(SeekFrom::Start(0))?;
        let mut chunk = vec![0; CHUNK];
        let mut at = 0;
        while at < self.size {
            let want = CHUNK.min(usize::try_from(self.size - at).unwrap_or(CHUNK));
            source.read_exact(&mut chunk[..want])?;
            each(at, &chunk[..want])?;
            step.advance(want as u64);
            if (at + want as u64) / EVENT_INTERVAL != at / EVENT_INTERVAL {
                (self.on_progress)(PassProgress { step: name, bytes: at + want as u64, of: self.size });
            }
            at += want as u64;
        }
        step.done(&format!("{:.0} MB", self.size as f64 / 1e6));
        Ok(())
    }
}

fn write(target: &File, at: u64, bytes: &[u8], device: bool) -> io::Result<()> {
    if bytes.iter().any(|b| *b != 0) {
        return target.write_all_at(bytes, at);
    }
    if device {
        let how = FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        if fallocate(target, how, at.cast_signed(), bytes.len().cast_signed() as i64).is_err() {
            // The device has no command to zero a range.
            return target.write_all_at(bytes, at);
        }
    }
    Ok(())
}

/// A target that passed the checks, and that the operator has seen.
#[derive(Debug)]
enum CheckedTarget {
    /// A file that does not exist.
    New,
    /// An existing file: device and inode.
    File((u64, u64)),
    Disk {
        /// Device number.
        rdev: u64,
        /// Name, model and size, for messages.
        shown: String,
    },
}

impl CheckedTarget {
    /// Opens the target. Refuses another file or disk that has got the same path since the check: the kernel may
    /// reuse the name of a disk that was unplugged.
    ///
    /// # Errors
    /// If the target cannot be opened, or another file or disk has its path.
    fn open(&self, target: &Path) -> Result<File> {
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        match self {
            // Private, because the file may contain a ticket.
            Self::New => options.create_new(true).mode(0o600),
            Self::File(_) => &mut options,
            // With O_EXCL, the kernel refuses a disk that has been mounted since the check (EBUSY).
            Self::Disk { .. } => options.custom_flags(libc::O_EXCL),
        };
        let file = options.open(target).map_err(Error::io("open", target))?;
        let meta = file.metadata().map_err(Error::io("read", target))?;
        let is_same = match self {
            Self::New => true,
            Self::File(inode) => (meta.dev(), meta.ino()) == *inode,
            Self::Disk { rdev, .. } => meta.file_type().is_block_device() && meta.rdev() == *rdev,
        };
        if is_same {
            return Ok(file);
        }
        fail(format!(
            "{} changed to another disk or file after the check; nothing was written\n  help: run the command again",
            target.display()
        ))
    }
}

/// Identifies the target. Refuses a partition, a disk in use, and a disk that is too small.
fn check(target: &Path, force: Option<&str>, size: u64) -> Result<CheckedTarget> {
    let meta = match fs::metadata(target) {
        Ok(meta) => meta,
        Err(e) if e.kind() == io::ErrorKind::NotFound && !target.starts_with("/dev") => return Ok(CheckedTarget::New),
        Err(e) => return Err(Error::io("find", target)(e)),
    };
    let shown = target.display();
    if meta.is_file() {
        return Ok(CheckedTarget::File((meta.dev(), meta.ino())));
    }
    if !meta.file_type().is_block_device() {
        return Err(Error::Usage(format!("{shown} is neither a disk nor a file")));
    }
    let number = format!("{}:{}", nix::sys::stat::major(meta.rdev()), nix::sys::stat::minor(meta.rdev()));
    let sys = fs::canonicalize(Path::new("/sys/dev/block").join(&number)).map_err(Error::io("find", target))?;
    let name = sys.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let forced = force == Some(&name);
    if sys.join("partition").exists() && !forced {
        return Err(Error::Usage(format!(
            "{shown} is a partition, and a node needs a whole disk\n  help: to overwrite the partition, add --force \
             {name}"
        )));
    }
    for used in users(&sys)? {
        if used == "/" || used.starts_with("/boot") {
            return Err(Error::Usage(format!("this machine runs from {shown} (mounted at {used})")));
        }
        if !forced {
            return Err(Error::Usage(format!(
                "{shown} is in use ({used})\n  help: unmount it; to overwrite it nevertheless, add --force {name}"
            )));
        }
    }
    let capacity = File::open(target)
        .and_then(|mut disk| disk.seek(SeekFrom::End(0)))
        .map_err(Error::io("get the size of", target))?;
    if capacity < size {
        return Err(Error::Usage(format!(
            "{shown} has {} MB, the image {} MB",
            capacity / 1_000_000,
            size / 1_000_000
        )));
    }
    let read = |file: &str| fs::read_to_string(sys.join(file)).unwrap_or_default().trim().to_owned();
    let model = [read("device/vendor"), read("device/model")].join(" ");
    let parts = [name, model.trim().to_owned(), format!("{:.1} GB", capacity as f64 / 1e9)];
    let shown = parts.iter().filter(|part| !part.is_empty()).map(String::as_str).collect::<Vec<_>>().join(", ");
    Ok(CheckedTarget::Disk { rdev: meta.rdev(), shown })
}

/// Returns the uses of a disk and its partitions: mount points, swap, and devices above it such as LVM or RAID.
fn users(sys: &Path) -> Result<Vec<String>> {
    let mut parts: Vec<PathBuf> = vec![sys.to_owned()];
    let entries = fs::read_dir(sys).map_err(Error::io("read", sys))?;
    parts.extend(entries.flatten().map(|e| e.path()).filter(|p| p.join("partition").exists()));
    let text = |path: &str| fs::read_to_string(path).map_err(Error::io("read", path));
    let (mounts, swaps) = (text("/proc/self/mountinfo")?, text("/proc/swaps")?);
    let mut found = Vec::new();
    for part in parts {
        let number = fs::read_to_string(part.join("dev")).unwrap_or_default();
        let mounted = mounts.lines().filter_map(|line| {
            let mut fields = line.split(' ').skip(2);
            (fields.next()? == number.trim()).then(|| fields.nth(1).unwrap_or_default().to_owned())
        });
        found.extend(mounted);
        let name = part.file_name().map(|n| format!("/dev/{} ", n.to_string_lossy())).unwrap_or_default();
        if swaps.lines().any(|l| l.starts_with(&name)) {
            found.push("swap".to_owned());
        }
        let holders = fs::read_dir(part.join("holders")).into_iter().flatten().flatten();
        for holder in holders {
            let below = users(&fs::canonicalize(holder.path()).map_err(Error::io("find", holder.path()))?)?;
            found.push(format!("held by {}", holder.file_name().to_string_lossy()));
            found.extend(below);
        }
    }
    // The root file system first, because it matters most to the operator.
    found.sort_by_key(|used| used != "/");
    Ok(found)
}

fn confirm(options: &FlashOptions, device: &str) -> Result<()> {
    if options.yes {
        return Ok(());
    }
    let shown = options.target.display();
    if !io::stdin().is_terminal() {
        return Err(Error::Usage(format!(
            "{shown} ({device}) would be overwritten\n  help: to overwrite it, add --yes"
        )));
    }
    eprint!("This overwrites {shown} ({device}) with the image of {}. Continue? [y/N] ", options.to);
    let mut answer = String::new();
    io::stdin().read_line(&mut answer).map_err(Error::io("read", "the answer"))?;
    if matches!(answer.trim(), "y" | "Y" | "yes") { Ok(()) } else { fail("cancelled; nothing was written") }
}

/// Returns the group of a node, or `to` itself if it is a group.
///
/// # Errors
/// If the fleet has no such node or group.
pub(crate) fn group_of<'a>(topology: &'a Topology, to: &'a str) -> Result<&'a str> {
    let node = topology.node(to).map(|n| n.group.as_str());
    node.or_else(|| topology.nodes.iter().any(|n| n.group == to).then_some(to)).ok_or_else(|| {
        let known: Vec<&str> = topology.nodes.iter().map(|n| n.name.as_str()).collect();
        Error::Usage(format!("there is no node or group `{to}`; nodes are: {}", known.join(", ")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flashed(dir: &Path, image: &[u8], target: &str, yes: bool) -> Result<PathBuf> {
        let (from, to) = (dir.join("image"), dir.join(target));
        fs::write(&from, image).unwrap();
        let options = FlashOptions { to: "hub-1", target: &to, yes, force: None, on_progress: &|_| () };
        flash(&from, None, &options, &Progress::new(true, false)).map(|_| to)
    }

    #[test]
    fn a_new_file_is_sparse_and_private() {
        let dir = tempfile::tempdir().unwrap();
        let mut image = vec![0; 3 * CHUNK + 5];
        image[7] = 1;
        *image.last_mut().unwrap() = 2;
        let made = flashed(dir.path(), &image, "disk", false).unwrap();
        assert!(fs::read(&made).unwrap() == image);
        let meta = fs::metadata(&made).unwrap();
        assert!(meta.blocks() * 512 < image.len() as u64);
        assert_eq!(meta.mode() & 0o777, 0o600, "it may contain a ticket");
    }

    #[test]
    fn overwrites_a_file_only_with_yes() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("disk"), b"precious, and longer than the image").unwrap();
        let e = flashed(dir.path(), b"image", "disk", false).unwrap_err();
        assert!(e.chain().contains("add --yes"), "{e}");
        assert!(fs::read(dir.path().join("disk")).unwrap().starts_with(b"precious"));
        let made = flashed(dir.path(), b"image", "disk", true).unwrap();
        assert_eq!(fs::read(made).unwrap(), b"image");
    }

    /// The path names another disk after the operator's answer: somebody replugged a disk.
    #[test]
    fn rejects_a_target_that_changed_after_the_check() {
        let dir = tempfile::tempdir().unwrap();
        let (path, other) = (dir.path().join("disk"), dir.path().join("other"));
        fs::write(&path, b"image").unwrap();
        fs::write(&other, b"precious").unwrap();
        let checked = check(&path, None, 1).unwrap();
        fs::rename(&other, &path).unwrap();
        let e = checked.open(&path).unwrap_err().to_string();
        assert!(e.contains("changed to another disk or file after the check"), "{e}");
        // A path that did not exist at the check must not be a link to an existing file now.
        let checked = check(&other, None, 1).unwrap();
        std::os::unix::fs::symlink(&path, &other).unwrap();
        assert!(checked.open(&other).is_err());
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        // Two disks of this host, if it has loop devices.
        let rdev = |name: &str| fs::metadata(name).ok().filter(|m| m.file_type().is_block_device()).map(|m| m.rdev());
        if let (Some(rdev), Some(_)) = (rdev("/dev/loop0"), rdev("/dev/loop1")) {
            let checked = CheckedTarget::Disk { rdev, shown: "loop0".to_owned() };
            let opened = checked.open(Path::new("/dev/loop1"));
            assert!(opened.is_err(), "it opened a disk with another device number");
        }
    }

    #[test]
    fn rejects_targets_that_are_not_disks() {
        for (target, message) in [("/dev/null", "neither a disk nor a file"), ("/dev/no-such-disk", "No such file")] {
            let e = check(Path::new(target), None, 1).unwrap_err();
            assert!(e.chain().contains(message), "{e}");
        }
    }

    #[test]
    fn finds_the_disk_with_the_root_file_system() {
        let root = fs::metadata("/").unwrap().dev();
        let number = format!("{}:{}", nix::sys::stat::major(root), nix::sys::stat::minor(root));
        // The root of a container is not on a disk.
        let Ok(sys) = fs::canonicalize(Path::new("/sys/dev/block").join(number)) else { return };
        assert_eq!(users(&sys).unwrap().first().map(String::as_str), Some("/"));
    }
}
