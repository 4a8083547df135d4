//! Backups of a fleet, on the node that makes them.

use serde::{Deserialize, Serialize};

/// `POST`, operator, with a [`BackupRequest`]: starts a backup, and replies with its [`BackupStatus`]. `GET`, viewer: a
/// list of [`BackupStatus`], one for each kind of backup.
pub const BACKUP_PATH: &str = "/v1/backup";

/// A request for a backup.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct BackupRequest {
    /// Whether to make a full backup instead of an incremental one.
    pub full: bool,
}

/// The last backup of one kind.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct BackupStatus {
    /// systemd's unit.
    pub unit: String,
    /// systemd's identifier of the run; empty if there was none since the node booted.
    pub run: String,
    /// Whether the backup runs.
    pub running: bool,
    /// systemd's result of the last run: `success`, `exit-code`, `exec-condition` and others.
    pub result: String,
    /// Exit code of the backup, if it has ended.
    pub exit_code: i32,
    /// Start of the run, in seconds since 1970; `None` if there was none since the node booted.
    pub started: Option<u64>,
    /// End of the run, in seconds since 1970; `None` while it runs.
    pub ended: Option<u64>,
}
