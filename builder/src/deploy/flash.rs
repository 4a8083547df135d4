//! An image onto a disk or into a file, with the ticket of the node it is to be.
//!
//! What is written is read back from the medium and compared. Ranges of zeros are not written to
//! a file, and are left to the device's own way of zeroing on a disk.

use std::fs::{self, File, OpenOptions};
use std::io::{self, IsTerminal as _, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use fleet::{Ticket, Topology};
use nix::fcntl::{FallocateFlags, PosixFadviseAdvice, fallocate, posix_fadvise};
use nix::libc;
use serde_json::json;

use crate::assemble::layout::ESP_START;
use crate::error::{Error, Result, fail};
use crate::format::systemd_credential::seal;
use crate::progress::{Progress, event};
use crate::toolchain::Tools;
use crate::util::process::run;

const CHUNK: usize = 4 << 20;
/// Progress as JSON: a line for so many bytes.
const TOLD: u64 = 64 << 20;

/// What may be overwritten, and how it is told.
pub struct FlashOptions<'a> {
    pub target: &'a Path,
    /// Nobody is asked.
    pub yes: bool,
    /// The device's own name, where it is mounted or is a partition and that is known.
    pub force: Option<&'a str>,
    /// Lines of JSON on standard output.
    pub json: bool,
}

/// Writes `image`, checks what was written, and puts the ticket in.
///
/// # Errors
/// The target is not what it should be, or can't be written, or does not keep what was written.
pub fn flash(image: &Path, ticket: Option<&TicketFile>, order: &FlashOptions, progress: &Progress) -> Result<()> {
    let source = File::open(image).map_err(Error::io("open", image))?;
    let size = source.metadata().map_err(Error::io("read", image))?.len();
    let judged = judge(order.target, order.force, size)?;
    let device = match &judged {
        Judged::New => None,
        Judged::File(_) => Some("a file"),
        Judged::Disk { shown, .. } => Some(shown.as_str()),
    };
    if let Some(device) = device {
        ask(order, device)?;
    }
    let target = judged.open(order.target)?;
    let is_disk = matches!(judged, Judged::Disk { .. });
    if !is_disk {
        if ticket.is_some() {
            // A file that was there has a mode of its own.
            let private = fs::Permissions::from_mode(0o600);
            target.set_permissions(private).map_err(Error::io("make private", order.target))?;
        }
        target.set_len(0).and_then(|()| target.set_len(size)).map_err(Error::io("size", order.target))?;
    }
    let told = Error::io("write", order.target);
    let pass = CopyPass { size, json: order.json, progress };
    pass.over(&source, "write", |at, bytes| write(&target, at, bytes, is_disk)).map_err(told)?;
    target.sync_all().map_err(Error::io("write", order.target))?;
    // From the medium, not from memory.
    posix_fadvise(&target, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)
        .map_err(|e| Error::io("read", order.target)(e.into()))?;
    let mut back = vec![0; CHUNK];
    pass.over(&source, "verify", |at, bytes| {
        let back = &mut back[..bytes.len()];
        target.read_exact_at(back, at)?;
        if back == bytes {
            return Ok(());
        }
        let first = bytes.iter().zip(back.iter()).position(|(a, b)| a != b).unwrap_or(0) as u64;
        Err(io::Error::other(format!("byte {} is not what was written: the medium is damaged", at + first)))
    })
    .map_err(Error::io("verify", order.target))?;
    if let Some(ticket) = ticket {
        put_ticket(&target, order.target, ticket)?;
    }
    if order.json {
        event(&json!({ "done": order.target, "bytes": size }));
    }
    Ok(())
}

/// A ticket that goes with a disk.
pub struct TicketFile<'a> {
    pub ticket: &'a Ticket,
    /// Whether the machine has Secure Boot.
    pub secure: bool,
    pub tools: &'a Tools,
}

impl TicketFile<'_> {
    /// Its path on the EFI partition, and what is there: where systemd's EFI stub looks for credentials;
    /// with Secure Boot, where the agent looks.
    ///
    /// # Errors
    /// No randomness.
    pub fn file(ticket: &Ticket, secure: bool) -> Result<(String, Vec<u8>)> {
        let text = serde_json::to_vec(ticket).map_err(|e| Error::Failed(e.to_string()))?;
        if secure {
            return Ok((Ticket::FILE.to_owned(), text));
        }
        let path = format!("loader/credentials/{}.cred", Ticket::CREDENTIAL);
        Ok((path, BASE64.encode(seal(Ticket::CREDENTIAL, &text)?).into_bytes()))
    }
}

/// Puts a ticket on the EFI partition of a disk that is open; `shown` is its name in messages.
///
/// # Errors
/// mtools does not find the partition, or can't write it.
pub(crate) fn put_ticket(disk: &File, shown: &Path, carried: &TicketFile) -> Result<()> {
    let TicketFile { ticket, secure, tools } = carried;
    let (path, content) = TicketFile::file(ticket, *secure)?;
    let mut file = tempfile::NamedTempFile::new().map_err(Error::io("create", "a temporary file"))?;
    file.write_all(&content).map_err(Error::io("write", file.path()))?;
    // The disk that is open, whatever has its path by now. Nothing is asked on standard input: -o.
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
    // A card pulled out now has it.
    disk.sync_all().map_err(Error::io("write", shown))
}

/// One walk over the image.
struct CopyPass<'a> {
    size: u64,
    json: bool,
    progress: &'a Progress,
}

impl CopyPass<'_> {
    fn over(
        &self,
        mut source: &File,
        name: &str,
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
            if self.json && (at + want as u64) / TOLD != at / TOLD {
                event(&json!({ "step": name, "bytes": at + want as u64, "of": self.size }));
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
            // It has no way of its own.
            return target.write_all_at(bytes, at);
        }
    }
    Ok(())
}

/// What is to be overwritten, as it was judged and shown to the operator.
#[derive(Debug)]
enum Judged {
    New,
    /// Device and inode.
    File((u64, u64)),
    Disk {
        /// Its number.
        rdev: u64,
        /// For a person: name, model, size.
        shown: String,
    },
}

impl Judged {
    /// Opens what was judged, and nothing that took its path since: the kernel gives a disk another name when it is
    /// plugged in again.
    ///
    /// # Errors
    /// It can't be opened; another file or disk has its path now.
    fn open(&self, target: &Path) -> Result<File> {
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        match self {
            // It may hold a ticket.
            Self::New => options.create_new(true).mode(0o600),
            Self::File(_) => &mut options,
            // A program that mounted it since has it for itself: the kernel then says that it is busy.
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
            "{} is another disk or file than a moment ago; nothing was written, begin again",
            target.display()
        ))
    }
}

/// What the target is; refuses what should not be overwritten.
fn judge(target: &Path, force: Option<&str>, size: u64) -> Result<Judged> {
    let meta = match fs::metadata(target) {
        Ok(meta) => meta,
        Err(e) if e.kind() == io::ErrorKind::NotFound && !target.starts_with("/dev") => return Ok(Judged::New),
        Err(e) => return Err(Error::io("find", target)(e)),
    };
    let shown = target.display();
    if meta.is_file() {
        return Ok(Judged::File((meta.dev(), meta.ino())));
    }
    if !meta.file_type().is_block_device() {
        return Err(Error::Usage(format!("{shown} is neither a disk nor a file")));
    }
    let number = format!("{}:{}", nix::sys::stat::major(meta.rdev()), nix::sys::stat::minor(meta.rdev()));
    let sys = fs::canonicalize(Path::new("/sys/dev/block").join(&number)).map_err(Error::io("find", target))?;
    let name = sys.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let forced = force == Some(&name);
    let advice = format!("if you are sure: --force {name}");
    if sys.join("partition").exists() && !forced {
        return Err(Error::Usage(format!("{shown} is a partition: a node takes the whole disk; {advice}")));
    }
    for used in users(&sys)? {
        if used == "/" || used.starts_with("/boot") {
            return Err(Error::Usage(format!("this machine runs from {shown} (mounted at {used})")));
        }
        if !forced {
            return Err(Error::Usage(format!("{shown} is in use ({used}): unmount it; {advice}")));
        }
    }
    let room =
        File::open(target).and_then(|mut disk| disk.seek(SeekFrom::End(0))).map_err(Error::io("size", target))?;
    if room < size {
        return Err(Error::Usage(format!("{shown} has {} MB, the image {} MB", room / 1_000_000, size / 1_000_000)));
    }
    let read = |file: &str| fs::read_to_string(sys.join(file)).unwrap_or_default().trim().to_owned();
    let model = [read("device/vendor"), read("device/model")].join(" ");
    let shown = format!("{name}, {} {:.1} GB", model.trim(), room as f64 / 1e9);
    Ok(Judged::Disk { rdev: meta.rdev(), shown })
}

/// Where a disk or one of its partitions is mounted, swapped to, or part of something else.
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
            let mut words = line.split(' ').skip(2);
            (words.next()? == number.trim()).then(|| words.nth(1).unwrap_or_default().to_owned())
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
    // What the system runs from says so first.
    found.sort_by_key(|used| used != "/");
    Ok(found)
}

fn ask(order: &FlashOptions, what: &str) -> Result<()> {
    if order.yes {
        return Ok(());
    }
    let shown = order.target.display();
    if !io::stdin().is_terminal() {
        return Err(Error::Usage(format!("{shown} ({what}) would be overwritten; say --yes")));
    }
    eprint!("Everything on {shown} ({what}) is lost. Go on? [y/N] ");
    let mut answer = String::new();
    io::stdin().read_line(&mut answer).map_err(Error::io("read", "the answer"))?;
    if matches!(answer.trim(), "y" | "Y" | "yes") { Ok(()) } else { fail("nothing was written") }
}

/// The group of what is to be flashed: a node's, or its own.
///
/// # Errors
/// No such node or group.
pub fn group_of<'a>(topology: &'a Topology, to: &'a str) -> Result<&'a str> {
    let node = topology.node(to).map(|n| n.group.as_str());
    node.or_else(|| topology.nodes.iter().any(|n| n.group == to).then_some(to)).ok_or_else(|| {
        let known: Vec<&str> = topology.nodes.iter().map(|n| n.name.as_str()).collect();
        Error::Usage(format!("there is no node or group `{to}`; there are: {}", known.join(", ")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flashed(dir: &Path, image: &[u8], target: &str, yes: bool) -> Result<PathBuf> {
        let (from, to) = (dir.join("image"), dir.join(target));
        fs::write(&from, image).unwrap();
        let order = FlashOptions { target: &to, yes, force: None, json: false };
        flash(&from, None, &order, &Progress::new(true, false)).map(|()| to)
    }

    #[test]
    fn a_file_gets_the_images_bytes_and_no_more_blocks() {
        let dir = tempfile::tempdir().unwrap();
        let mut image = vec![0; 3 * CHUNK + 5];
        image[7] = 1;
        *image.last_mut().unwrap() = 2;
        let made = flashed(dir.path(), &image, "disk", false).unwrap();
        assert!(fs::read(&made).unwrap() == image);
        let meta = fs::metadata(&made).unwrap();
        assert!(meta.blocks() * 512 < image.len() as u64);
        assert_eq!(meta.mode() & 0o777, 0o600, "it will hold a ticket");
    }

    #[test]
    fn what_is_there_is_not_overwritten_unasked() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("disk"), b"precious, and longer than the image").unwrap();
        let e = flashed(dir.path(), b"image", "disk", false).unwrap_err();
        assert!(e.to_string().contains("say --yes"), "{e}");
        assert!(fs::read(dir.path().join("disk")).unwrap().starts_with(b"precious"));
        let made = flashed(dir.path(), b"image", "disk", true).unwrap();
        assert_eq!(fs::read(made).unwrap(), b"image");
    }

    /// A path that leads elsewhere between the question and the writing: a disk that was plugged in again.
    #[test]
    fn what_took_the_path_since_is_not_written() {
        let dir = tempfile::tempdir().unwrap();
        let (path, other) = (dir.path().join("disk"), dir.path().join("other"));
        fs::write(&path, b"image").unwrap();
        fs::write(&other, b"precious").unwrap();
        let judged = judge(&path, None, 1).unwrap();
        fs::rename(&other, &path).unwrap();
        let e = judged.open(&path).unwrap_err().to_string();
        assert!(e.contains("another disk or file than a moment ago"), "{e}");
        // A file that is new to the operator is new to the kernel.
        let judged = judge(&other, None, 1).unwrap();
        std::os::unix::fs::symlink(&path, &other).unwrap();
        assert!(judged.open(&other).is_err());
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        // Two disks of this host, where it has loop devices.
        let rdev = |name: &str| fs::metadata(name).ok().filter(|m| m.file_type().is_block_device()).map(|m| m.rdev());
        if let (Some(rdev), Some(_)) = (rdev("/dev/loop0"), rdev("/dev/loop1")) {
            let judged = Judged::Disk { rdev, shown: "loop0".to_owned() };
            let opened = judged.open(Path::new("/dev/loop1"));
            assert!(opened.is_err(), "a disk of another number");
        }
    }

    #[test]
    fn what_is_no_disk_is_refused() {
        for (target, words) in [("/dev/null", "neither a disk nor a file"), ("/dev/no-such-disk", "No such file")] {
            let e = judge(Path::new(target), None, 1).unwrap_err();
            assert!(e.to_string().contains(words), "{e}");
        }
    }

    #[test]
    fn the_disk_this_machine_runs_from_is_refused() {
        let root = fs::metadata("/").unwrap().dev();
        let number = format!("{}:{}", nix::sys::stat::major(root), nix::sys::stat::minor(root));
        // A container's root is no disk at all.
        let Ok(sys) = fs::canonicalize(Path::new("/sys/dev/block").join(number)) else { return };
        assert_eq!(users(&sys).unwrap().first().map(String::as_str), Some("/"));
    }
}
