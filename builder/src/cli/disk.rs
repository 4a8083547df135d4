//! `bakehouse disk`: the disks of a node.

use std::fmt;
use std::time::Duration;

use clap::Args;
use fleet::node_api::{DISK_PATH, DatabaseSize, DiskStatus, FileSystem, PartitionStatus};

use super::access::NodeContext;
use super::results::CommandResult;
use super::rows::{missing, percent, section, size};
use super::verbs::AccessArgs;
use crate::deploy::nodes;
use crate::error::Result;

pub(super) const DISK: &str = "\
Examples:
  bakehouse disk db-1
  bakehouse disk db-1 --json

Shows file systems, partitions with the versions in both root slots, and on a database node the sizes of the databases
and of the write-ahead log. `/var` has all data of a node.";

/// Time limit.
const LIMIT: Duration = Duration::from_secs(10);
/// Longest reply, in bytes.
const LONGEST: usize = 1 << 20;

#[derive(Args)]
pub(super) struct DiskArgs {
    /// Name of a node, such as `db-2` (group and number)
    pub(super) node: String,
    #[command(flatten)]
    pub(super) access: AccessArgs,
}

/// The state of disks as a text.
pub(super) struct DiskText<'a>(pub(super) &'a DiskStatus);

/// Reads the disks of a node.
pub(super) fn disk(context: &NodeContext, args: &DiskArgs) -> Result<CommandResult> {
    let reach = context.reach(&args.access)??;
    let node = reach.node(&args.node)?.name.clone();
    let status = nodes::run(reach.client.get(&node, DISK_PATH, LONGEST, LIMIT))??;
    Ok(CommandResult::Disk(status))
}

impl fmt::Display for DiskText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        section(f, "File systems", &self.0.file_systems.iter().map(file_system).collect::<Vec<_>>())?;
        section(f, "Partitions", &self.0.partitions.iter().map(partition).collect::<Vec<_>>())?;
        if let Some(DatabaseSize { databases, wal }) = &self.0.postgresql {
            let mut rows: Vec<_> = databases.iter().map(|(name, bytes)| vec![name.clone(), size(*bytes)]).collect();
            rows.extend(wal.map(|bytes| vec!["write-ahead log".to_owned(), size(bytes)]));
            section(f, "PostgreSQL", &rows)?;
        }
        missing(f, &self.0.missing)
    }
}

fn file_system(of: &FileSystem) -> Vec<String> {
    vec![
        of.mount.clone(),
        format!("{} of {} used", size(of.used), size(of.total)),
        format!("{} free", size(of.available)),
        percent(of.used, of.used + of.available),
        if of.inodes == 0 { String::new() } else { format!("inodes {}", percent(of.inodes_used, of.inodes)) },
    ]
}

fn partition(of: &PartitionStatus) -> Vec<String> {
    let state = match (&of.image, of.running) {
        (Some(image), true) => format!("version {image}, runs"),
        (Some(image), false) => format!("version {image}"),
        (None, _) if of.label == "_empty" => "empty slot".to_owned(),
        (None, _) => String::new(),
    };
    let label = if of.label == "_empty" { "-" } else { &of.label };
    vec![of.device.clone(), label.to_owned(), size(of.bytes), state]
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn every_part_is_shown() {
        let partition = |number: u32, label: &str, image: Option<&str>, running| PartitionStatus {
            device: format!("vda{number}"),
            number,
            label: label.to_owned(),
            bytes: 400_000_000,
            image: image.map(str::to_owned),
            running,
        };
        let status = DiskStatus {
            node: "db-1".to_owned(),
            file_systems: vec![
                FileSystem { mount: "/".to_owned(), total: 180_000_000, used: 180_000_000, ..FileSystem::default() },
                FileSystem {
                    mount: "/var".to_owned(),
                    total: 8_000_000_000,
                    used: 2_500_000_000,
                    available: 5_000_000_000,
                    inodes: 1000,
                    inodes_used: 11,
                },
            ],
            partitions: vec![
                partition(1, "esp", None, false),
                partition(2, "acme-db_2", Some("2"), true),
                partition(5, "_empty", None, false),
            ],
            postgresql: Some(DatabaseSize {
                databases: BTreeMap::from([("odoo".to_owned(), 75_000_000)]),
                wal: Some(33_554_432),
            }),
            missing: Vec::new(),
        };
        assert_eq!(
            DiskText(&status).to_string(),
            "File systems\n\
            \x20 /     180.0 MB of 180.0 MB used  0 B free     100 %\n\
            \x20 /var  2.5 GB of 8.0 GB used      5.0 GB free  34 %   inodes 2 %\n\
            Partitions\n\
            \x20 vda1  esp        400.0 MB\n\
            \x20 vda2  acme-db_2  400.0 MB  version 2, runs\n\
            \x20 vda5  -          400.0 MB  empty slot\n\
            PostgreSQL\n\
            \x20 odoo             75.0 MB\n\
            \x20 write-ahead log  33.6 MB\n"
        );
    }
}
