//! Writes the disk image: a GPT with the EFI system partition, root A and its verity tree, and GRUB in front of them.
//! systemd-repart creates root B and /var at the node's first boot. The builder needs no mounts, no loop devices and no
//! root.

use std::collections::BTreeMap;
use std::fs::{self, File, FileTimes, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use gpt::partition::Partition;
use gpt::partition_types::{BIOS, EFI, LINUX_ROOT_X64, OperatingSystem, Type};
use uuid::{Uuid, uuid};

use crate::assemble::grub::{BootSector, CORE_SECTOR};
use crate::assemble::layout::{ESP_SIZE, ESP_START, PartitionSizes, ROOT_START};
use crate::error::{Error, Result, fail};
use crate::toolchain::Tools;
use crate::util::process::run;

const MIB: u64 = 1 << 20;
const SECTOR: u64 = 512;
const ROOT_VERITY_X64: Type = Type { guid: uuid!("2c7357ed-ebd2-46d9-aec1-23d437ec2bf5"), os: OperatingSystem::Linux };
const DISK_GUID: Uuid = uuid!("ba4e4005-e000-4000-8000-0000000000d1");
const ESP_GUID: Uuid = uuid!("ba4e4005-e000-4000-8000-0000000000e5");
const BIOS_GUID: Uuid = uuid!("ba4e4005-e000-4000-8000-0000000000b5");
/// The flag "read-only" of the Discoverable Partitions Specification:
/// <https://uapi-group.org/specifications/specs/discoverable_partitions_specification/>.
const READ_ONLY: u64 = 1 << 60;

/// Contents of the disk.
pub(crate) struct Content<'a> {
    /// Prefix of the partition labels: `name_version`.
    pub label: &'a str,
    /// File system of root A, a file.
    pub root: &'a Path,
    /// Hash tree of `root`.
    pub verity: &'a [u8],
    /// Root hash of `verity`, in hex. The partitions get their UUIDs from it.
    pub roothash: &'a str,
    /// The code that a legacy BIOS starts.
    pub bios: BootSector,
    /// Files of the ESP: path → content.
    pub esp: BTreeMap<String, Vec<u8>>,
    /// Modification time of the files of the ESP, in seconds since 1970.
    pub epoch: u64,
}

/// Writes the image.
///
/// # Errors
/// If the content does not fit its partition, a tool fails, or the image cannot be written.
pub(crate) fn write(out: &Path, slots: PartitionSizes, content: &Content, tools: &Tools, scratch: &Path) -> Result<()> {
    let file = OpenOptions::new()
        .create(true)
        .truncate(true)
        .read(true)
        .write(true)
        .open(out)
        .map_err(Error::io("create", out))?;
    file.set_len(slots.disk()).map_err(Error::io("size", out))?;
    let esp = ESP_START;
    let (root, verity) = (ROOT_START, slots.verity_start());
    partitions(&file, slots, content, [esp, root, verity]).map_err(Error::cannot("write the GPT"))?;
    copy_to(&file, root, content.root).map_err(Error::io("write", out))?;
    let mut at = &file;
    at.seek(SeekFrom::Start(verity)).and_then(|_| at.write_all(content.verity)).map_err(Error::io("write", out))?;
    drop(file);
    boot_files(out, esp, content, tools, scratch)
}

fn partitions(file: &File, slots: PartitionSizes, content: &Content, starts: [u64; 3]) -> Result<()> {
    let half = |range: std::ops::Range<usize>| {
        Uuid::parse_str(&content.roothash[range]).map_err(Error::at("the root hash is invalid"))
    };
    let partition = |kind: Type, id: Uuid, start: u64, size: u64, flags: u64, name: String| Partition {
        part_type_guid: kind,
        part_guid: id,
        first_lba: start / SECTOR,
        last_lba: (start + size) / SECTOR - 1,
        flags,
        name,
    };
    let label = content.label;
    let [esp, root, verity] = starts;
    // systemd finds the root and its verity tree by the two halves of the root hash.
    let mut table = BTreeMap::from([
        (1, partition(EFI, ESP_GUID, esp, ESP_SIZE, 0, "esp".to_owned())),
        (2, partition(LINUX_ROOT_X64, half(0..32)?, root, slots.root, READ_ONLY, label.to_owned())),
        (3, partition(ROOT_VERITY_X64, half(32..64)?, verity, slots.verity, READ_ONLY, format!("{label}_verity"))),
    ]);
    let core = CORE_SECTOR * SECTOR;
    if !content.bios.core.is_empty() {
        let room = ESP_START - core;
        if content.bios.core.len() as u64 > room {
            return fail(format!(
                "GRUB needs {} bytes, but there are {room} bytes in front of the partitions",
                content.bios.core.len()
            ));
        }
        table.insert(4, partition(BIOS, BIOS_GUID, core, room, 0, "bios".to_owned()));
    }
    let mut file = file;
    let sectors = u32::try_from(slots.disk() / SECTOR - 1).unwrap_or(u32::MAX);
    let mut record = gpt::mbr::ProtectiveMBR::with_lb_size(sectors);
    record.set_bootcode(content.bios.record);
    record.overwrite_lba0(&mut file).map_err(Error::cannot("write the first sector"))?;
    let mut disk = gpt::GptConfig::new()
        .writable(true)
        .create_from_device(file, Some(DISK_GUID))
        .map_err(Error::cannot("write the partitions"))?;
    disk.update_partitions(table).map_err(Error::cannot("write the partitions"))?;
    disk.write().map_err(Error::cannot("write the partitions"))?;
    file.seek(SeekFrom::Start(core))
        .and_then(|_| file.write_all(&content.bios.core))
        .map_err(Error::cannot("write the partitions"))
}

/// Copies a file into the image. Blocks of zeros remain holes.
fn copy_to(out: &File, at: u64, from: &Path) -> std::io::Result<()> {
    let mut from = File::open(from)?;
    let mut out = out;
    let mut buffer = vec![0; MIB as usize];
    let mut offset = at;
    loop {
        let n = from.read(&mut buffer)?;
        if n == 0 {
            return Ok(());
        }
        if buffer[..n].iter().any(|b| *b != 0) {
            out.seek(SeekFrom::Start(offset))?;
            out.write_all(&buffer[..n])?;
        }
        offset += n as u64;
    }
}

/// Creates the ESP in the image. mkfs.vfat and mtools write at an offset, so that no loop device is needed.
fn boot_files(out: &Path, esp: u64, content: &Content, tools: &Tools, scratch: &Path) -> Result<()> {
    let used: u64 = content.esp.values().map(|f| f.len() as u64).sum();
    if used + 4 * MIB > ESP_SIZE {
        return fail(format!(
            "the boot files need {:.1} MB, but the EFI partition has {:.1} MB",
            used as f64 / 1e6,
            ESP_SIZE as f64 / 1e6
        ));
    }
    let staging = scratch.join("esp");
    let mut dirs: Vec<PathBuf> = Vec::new();
    let time = SystemTime::UNIX_EPOCH + Duration::from_secs(content.epoch);
    for (path, bytes) in &content.esp {
        let full = staging.join(path);
        if let Some(parent) = full.parent() {
            fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
        }
        let mut file = File::create(&full).map_err(Error::io("create", &full))?;
        file.write_all(bytes).map_err(Error::io("write", &full))?;
        file.set_times(FileTimes::new().set_modified(time).set_accessed(time)).map_err(Error::io("date", &full))?;
        let parents = Path::new(path).ancestors().skip(1).filter(|p| !p.as_os_str().is_empty());
        dirs.extend(parents.map(Path::to_owned));
    }
    dirs.sort();
    dirs.dedup();
    let epoch = content.epoch.to_string();
    let tool = |program: &str| {
        let mut command = tools.command(program);
        command.env("SOURCE_DATE_EPOCH", &epoch).env("MTOOLS_SKIP_CHECK", "1");
        command
    };
    run(
        tool("usr/sbin/mkfs.vfat")
            // Clusters of 2 KiB: with larger ones, the ESP has too few clusters for a FAT32.
            .args(["-F", "32", "-s", "4", "--invariant", "-n", "ESP", "-S", "512", "--offset"])
            .arg((esp / SECTOR).to_string())
            .arg(out)
            .arg((ESP_SIZE / 1024).to_string()),
        "mkfs.vfat",
    )?;
    let image = format!("{}@@{esp}", out.display());
    let inside = |path: &Path| format!("::{}", path.display());
    run(tool("usr/bin/mmd").args(["-i", &image]).args(dirs.iter().map(|d| inside(d))), "mmd")?;
    for path in content.esp.keys() {
        let path = Path::new(path);
        run(tool("usr/bin/mcopy").args(["-m", "-i", &image]).arg(staging.join(path)).arg(inside(path)), "mcopy")?;
    }
    Ok(())
}
