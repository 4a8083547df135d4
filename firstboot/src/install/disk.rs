//! Writes an image to a disk.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek as _, SeekFrom};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Component, Path, PathBuf};
use std::process::Command;

use fleet::encoding::decode;
use fleet::netboot::{Extent, Install};
use nix::fcntl::{FallocateFlags, PosixFadviseAdvice, fallocate, posix_fadvise};
use nix::libc;
use sha2::{Digest as _, Sha256};

use super::command::run;
use super::server::Server;
use crate::error::{Error, Result};

const CHUNK: usize = 1 << 20;
const SECTOR: usize = 512;
/// Size of the areas at a disk's beginning and end that have partition tables and nothing else, in bytes.
const EDGE: u64 = 1 << 20;

/// A disk and the image to install on it.
pub(super) struct Target<'a> {
    install: &'a Install,
    path: PathBuf,
    file: File,
    size: u64,
}

impl<'a> Target<'a> {
    /// Opens the disk exclusively.
    ///
    /// # Errors
    /// If the disk cannot be opened, or is in use.
    pub(super) fn open(install: &'a Install) -> Result<Self> {
        let path = PathBuf::from(&install.disk);
        let mut options = OpenOptions::new();
        let mut file =
            options.read(true).write(true).custom_flags(libc::O_EXCL).open(&path).map_err(Error::io("open", &path))?;
        let size = file.seek(SeekFrom::End(0)).map_err(Error::io("size", &path))?;
        Ok(Self { install, path, file, size })
    }

    /// Erases the disk. No firmware starts from it until [`Self::finish`].
    pub(super) fn clear(&self) -> Result<()> {
        // Firmware can restore a missing partition table from the copy at the disk's end, so erase the copy first.
        self.zero(self.size.saturating_sub(EDGE), EDGE.min(self.size))?;
        self.zero(0, EDGE.min(self.size))?;
        self.file.sync_all().map_err(Error::io("write", &self.path))?;
        let mut end = EDGE;
        for Extent { start, size } in &self.install.extents {
            self.zero(end, start.saturating_sub(end))?;
            end = start + size;
        }
        self.zero(end, self.install.size.saturating_sub(end))
    }

    fn zero(&self, start: u64, size: u64) -> Result<()> {
        if size == 0 {
            return Ok(());
        }
        let how = FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        if fallocate(&self.file, how, start.cast_signed(), size.cast_signed()).is_ok() {
            return Ok(());
        }
        // The device does not support FALLOC_FL_ZERO_RANGE.
        let zeros = vec![0; CHUNK];
        let mut at = start;
        while at < start + size {
            let part = CHUNK.min(usize::try_from(start + size - at).unwrap_or(CHUNK));
            self.file.write_all_at(&zeros[..part], at).map_err(Error::io("write", &self.path))?;
            at += part as u64;
        }
        Ok(())
    }

    /// Writes the image except for the partition table. Calls `progress` with the size of each part, in bytes.
    pub(super) fn write(&self, server: &Server, mut progress: impl FnMut(u64)) -> Result<()> {
        let mut hash = Sha256::new();
        let mut chunk = vec![0; CHUNK];
        for extent in &self.install.extents {
            let mut body = server.read(&self.install.image, *extent)?;
            let mut at = extent.start;
            let end = extent.start + extent.size;
            while at < end {
                let part = CHUNK.min(usize::try_from(end - at).unwrap_or(CHUNK));
                body.read_exact(&mut chunk[..part]).map_err(|e| server.failed(e))?;
                hash.update(&chunk[..part]);
                self.file.write_all_at(&chunk[..part], at).map_err(Error::io("write", &self.path))?;
                at += part as u64;
                progress(part as u64);
            }
        }
        self.check_sum(hash, "the downloaded image")?;
        self.file.sync_all().map_err(Error::io("write", &self.path))
    }

    /// Reads the image back from the disk, and compares its hash.
    pub(super) fn verify(&self) -> Result<()> {
        // Drop the page cache, to read from the medium.
        posix_fadvise(&self.file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)
            .map_err(|e| Error::io("read", &self.path)(e.into()))?;
        let mut hash = Sha256::new();
        let mut chunk = vec![0; CHUNK];
        for Extent { start, size } in &self.install.extents {
            let mut at = *start;
            while at < start + size {
                let part = CHUNK.min(usize::try_from(start + size - at).unwrap_or(CHUNK));
                self.file.read_exact_at(&mut chunk[..part], at).map_err(Error::io("read", &self.path))?;
                hash.update(&chunk[..part]);
                at += part as u64;
            }
        }
        self.check_sum(hash, "the image on the disk")
    }

    fn check_sum(&self, hash: Sha256, what: &str) -> Result<()> {
        let sum: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
        if sum == self.install.sha256 {
            return Ok(());
        }
        Err(Error::Failed(format!("{what} has another SHA-256 than the server's image; the installer tries again")))
    }

    /// Writes the ticket to the EFI partition.
    pub(super) fn put_ticket(&self, ticket: &[u8]) -> Result<()> {
        let plain = |c| matches!(c, Component::Normal(_));
        if !Path::new(&self.install.ticket_path).components().all(plain) {
            return Err(Error::Failed(format!(
                "the server's path of the ticket is invalid: `{}`",
                self.install.ticket_path
            )));
        }
        let dir = Path::new("/run/bakehouse-esp");
        fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
        let Extent { start, size } = self.install.esp;
        let mut mount = Command::new("/usr/bin/mount");
        mount.args(["-t", "vfat", "-o", &format!("loop,offset={start},sizelimit={size}")]).arg(&self.path).arg(dir);
        run(&mut mount, "mount")?;
        let path = dir.join(&self.install.ticket_path);
        let put = fs::create_dir_all(path.parent().unwrap_or(dir)).and_then(|()| {
            let file = File::create(&path)?;
            file.write_all_at(ticket, 0)?;
            file.sync_all()
        });
        run(Command::new("/usr/bin/umount").arg(dir), "umount")?;
        put.map_err(Error::io("write", &path))
    }

    /// Writes the partition table. From then on firmware starts from the disk.
    pub(super) fn finish(&self) -> Result<()> {
        let table = decode(&self.install.table).filter(|t| t.len() as u64 <= EDGE);
        let table = table.filter(|t| t.len() > SECTOR);
        let table = table.ok_or_else(|| Error::Failed("the server's partition table is invalid".to_owned()))?;
        // UEFI and legacy BIOS both read the first sector first, and a disk writes a sector atomically.
        let (first, rest) = table.split_at(SECTOR);
        let write = |bytes: &[u8], at| self.file.write_all_at(bytes, at).and_then(|()| self.file.sync_all());
        write(rest, SECTOR as u64).and_then(|()| write(first, 0)).map_err(Error::io("write", &self.path))
    }
}
