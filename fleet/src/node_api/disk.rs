//! Disks of a node.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// `GET`, viewer: a [`DiskStatus`].
pub const DISK_PATH: &str = "/v1/disk";

/// File systems, partitions and databases of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct DiskStatus {
    /// Name of the slot.
    pub node: String,
    /// Mounted file systems.
    pub file_systems: Vec<FileSystem>,
    /// Partitions of the disk from which the node runs; empty in a container.
    pub partitions: Vec<PartitionStatus>,
    /// Sizes of PostgreSQL's data, on a database node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub postgresql: Option<DatabaseSize>,
    /// What could not be read, each with its reason.
    pub missing: Vec<String>,
}

/// A mounted file system.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct FileSystem {
    /// Mount point.
    pub mount: String,
    /// Size in bytes.
    pub total: u64,
    /// Bytes in use.
    pub used: u64,
    /// Bytes that are free for services. Some file systems reserve a part for root.
    pub available: u64,
    /// Number of inodes; 0 for a file system without a limit.
    pub inodes: u64,
    /// Inodes in use.
    pub inodes_used: u64,
}

/// A partition.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct PartitionStatus {
    /// Device, such as `vda2`.
    pub device: String,
    /// Number of the partition.
    pub number: u32,
    /// Label in the partition table. The label of a root slot has the version of its image, and `_empty` is the label of
    /// a slot without an image.
    pub label: String,
    /// Size in bytes.
    pub bytes: u64,
    /// Version of the image in a root slot.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// Whether the node runs from this root slot.
    pub running: bool,
}

/// Sizes of PostgreSQL's data.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct DatabaseSize {
    /// Bytes of each database.
    pub databases: BTreeMap<String, u64>,
    /// Bytes of the write-ahead log; `None` if it could not be read.
    pub wal: Option<u64>,
}
