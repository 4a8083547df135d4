//! The node's disks, for operators: file systems, partitions, and the sizes of PostgreSQL's data.

use std::fs;
use std::path::Path;
use std::time::Duration;

use fleet::node_api::{DatabaseSize, DiskStatus, FileSystem, PartitionStatus};
use nix::sys::statvfs::statvfs;
use tokio::time::timeout;

use super::NodeApi;
use crate::client::metrics::{Sample, samples};
use crate::error::{Error, Result};

/// Mount points of an image.
const MOUNTS: [&str; 4] = ["/", "/efi", "/var", "/run"];
/// Block devices.
const BLOCK: &str = "/sys/class/block";
/// Unit of sizes in `/sys`, in bytes.
const SECTOR: u64 = 512;
/// Port of PostgreSQL's exporter.
const POSTGRESQL_EXPORTER: u16 = 9187;
/// Time limit of each part.
const PART: Duration = Duration::from_secs(4);

/// Returns the state of the node's disks.
pub(super) async fn status(api: &NodeApi) -> DiskStatus {
    let mut status = DiskStatus { node: api.node.name.clone(), ..DiskStatus::default() };
    let prefix = format!("{}-{}_", api.topology.name, api.node.group);
    let running = format!("{prefix}{}", api.image);
    let disks = async {
        // A read may hang with its disk, and then no further one begins.
        let busy = || Error::Failed("an earlier read has not ended".to_owned());
        let permit = api.tasks.disks.clone().try_acquire_owned().map_err(|_| busy())?;
        let read = move || {
            let found = (file_systems(&MOUNTS), partitions(Path::new(BLOCK), &prefix, &running));
            drop(permit);
            found
        };
        tokio::task::spawn_blocking(read).await.map_err(Error::cannot("read the file systems"))
    };
    let database = async {
        if !api.node.has_role("db") {
            return Ok(None);
        }
        let host = api.node.address.to_string();
        database(&samples(&host, POSTGRESQL_EXPORTER, &["pg_database_size_bytes", "pg_wal_size_bytes"]).await?)
            .map(Some)
    };
    let (disks, database) = tokio::join!(within(disks), within(database));
    match disks {
        Ok((file_systems, partitions)) => (status.file_systems, status.partitions) = (file_systems, partitions),
        Err(e) => status.missing.push(format!("file systems: {}", e.chain())),
    }
    match database {
        Ok(database) => status.postgresql = database,
        Err(e) => status.missing.push(format!("sizes of PostgreSQL's data: {}", e.chain())),
    }
    status
}

async fn within<T>(part: impl Future<Output = Result<T>>) -> Result<T> {
    let late = |_| Err(Error::Failed(format!("no answer within {} s", PART.as_secs())));
    timeout(PART, part).await.unwrap_or_else(late)
}

fn file_systems(mounts: &[&str]) -> Vec<FileSystem> {
    let mounted = mounts.iter().filter(|mount| Path::new(mount).is_dir());
    let sizes = mounted.filter_map(|mount| {
        let found = statvfs(*mount).ok()?;
        let block = found.fragment_size();
        Some(FileSystem {
            mount: (*mount).to_owned(),
            total: found.blocks() * block,
            used: found.blocks().saturating_sub(found.blocks_free()) * block,
            available: found.blocks_available() * block,
            inodes: found.files(),
            inodes_used: found.files().saturating_sub(found.files_free()),
        })
    });
    sizes.collect()
}

/// Returns the partitions of the disk that has the running image, in their order. `prefix` is what labels of images
/// begin with, and `running` is the label of the running one. Other disks of the machine are no part of the node.
fn partitions(block: &Path, prefix: &str, running: &str) -> Vec<PartitionStatus> {
    let devices = fs::read_dir(block).into_iter().flatten().flatten();
    let all: Vec<(String, PartitionStatus)> =
        devices.filter_map(|entry| partition(&entry.path(), prefix, running)).collect();
    let Some(disk) = all.iter().find(|(_, partition)| partition.running).map(|(disk, _)| disk.clone()) else {
        return Vec::new();
    };
    let mut own: Vec<_> = all.into_iter().filter(|(of, _)| *of == disk).map(|(_, partition)| partition).collect();
    own.sort_by_key(|partition| partition.number);
    own
}

/// Reads a partition, and the path of its disk; `None` for a whole disk.
fn partition(device: &Path, prefix: &str, running: &str) -> Option<(String, PartitionStatus)> {
    let event = fs::read_to_string(device.join("uevent")).ok()?;
    let value = |key: &str| event.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
    let number = value("PARTN")?.parse().ok()?;
    let label = value("PARTNAME").unwrap_or_default().to_owned();
    let sectors: u64 = fs::read_to_string(device.join("size")).ok()?.trim().parse().ok()?;
    // The device is a link to a folder within the folder of its disk.
    let disk = fs::canonicalize(device).ok()?.parent()?.to_string_lossy().into_owned();
    let image = label.strip_prefix(prefix).filter(|rest| !rest.is_empty() && !rest.ends_with("_verity"));
    let partition = PartitionStatus {
        device: value("DEVNAME")?.to_owned(),
        number,
        bytes: sectors * SECTOR,
        image: image.map(str::to_owned),
        running: label == running,
        label,
    };
    Some((disk, partition))
}

/// Returns the sizes in the exporter's metrics.
///
/// # Errors
/// If PostgreSQL does not answer the exporter: there are no sizes then.
fn database(samples: &[Sample]) -> Result<DatabaseSize> {
    let of_databases = samples.iter().filter(|s| s.name == "pg_database_size_bytes");
    let databases = of_databases.map(|s| (s.label("datname").to_owned(), s.count())).collect();
    let wal = samples.iter().find(|s| s.name == "pg_wal_size_bytes").map(Sample::count);
    let size = DatabaseSize { databases, wal };
    if size == DatabaseSize::default() {
        return Err(Error::Failed("PostgreSQL does not answer its exporter".to_owned()));
    }
    Ok(size)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::metrics::parse;
    use std::os::unix::fs::symlink;

    #[test]
    fn file_systems_have_sizes_and_inodes() {
        let found = file_systems(&["/", "/no-such-folder"]);
        let [root] = &found[..] else { panic!("{found:?}") };
        assert!(root.used > 0 && root.used + root.available <= root.total, "{root:?}");
        assert!(root.inodes_used <= root.inodes, "{root:?}");
    }

    #[test]
    fn root_slots_have_the_versions_of_their_images() {
        let dir = tempfile::tempdir().unwrap();
        let block = dir.path().join("block");
        fs::create_dir(&block).unwrap();
        let device = |disk: &str, name: &str, event: &str, sectors: &str| {
            let path = dir.path().join("devices").join(disk).join(name);
            fs::create_dir_all(&path).unwrap();
            fs::write(path.join("uevent"), event).unwrap();
            fs::write(path.join("size"), format!("{sectors}\n")).unwrap();
            symlink(&path, block.join(name)).unwrap();
        };
        let part = |disk: &str, number: u32, label: &str| {
            let event =
                format!("MAJOR=8\nDEVNAME={disk}{number}\nDEVTYPE=partition\nPARTN={number}\nPARTNAME={label}\n");
            device(disk, &format!("{disk}{number}"), &event, "2048");
        };
        device("", "vda", "MAJOR=8\nDEVNAME=vda\nDEVTYPE=disk\n", "99");
        for (number, label) in [(5, "_empty"), (3, "acme-db_2_verity"), (2, "acme-db_2"), (4, "acme-db_10"), (1, "esp")]
        {
            part("vda", number, label);
        }
        part("vdb", 1, "secret");
        let found = partitions(&block, "acme-db_", "acme-db_2");
        let shown: Vec<_> = found.iter().map(|p| (p.device.as_str(), p.image.as_deref(), p.running, p.bytes)).collect();
        assert_eq!(
            shown,
            [
                ("vda1", None, false, 1 << 20),
                ("vda2", Some("2"), true, 1 << 20),
                ("vda3", None, false, 1 << 20),
                ("vda4", Some("10"), false, 1 << 20),
                ("vda5", None, false, 1 << 20)
            ]
        );
        assert_eq!(partitions(&block, "acme-db_", "acme-db_7"), [], "the disks of a container's host");
        assert_eq!(partitions(Path::new("/no-such-folder"), "a", "b"), []);
    }

    #[test]
    fn sizes_of_databases_come_from_the_exporter() {
        let text = "pg_database_size_bytes{datname=\"odoo\"} 7.5e+06\npg_database_size_bytes{datname=\"postgres\"} 7\n\
                    pg_wal_size_bytes 3.3554432e+07\n";
        let found = database(&parse(text, &["pg_"])).unwrap();
        assert_eq!((found.databases["odoo"], found.databases["postgres"]), (7_500_000, 7));
        assert_eq!(found.wal, Some(33_554_432));
        let e = database(&[]).unwrap_err();
        assert!(e.chain().contains("does not answer"), "{}", e.chain());
    }
}
