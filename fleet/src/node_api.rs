//! Messages between operators and nodes: JSON over HTTPS with client certificates. Every node serves them at
//! [`NODE_API_PORT`] of its mesh address. A hub forwards connections to that port, and cannot read them.
//!
//! Two versions of the program may exchange these messages. A newer version may add fields, paths and events, because
//! receivers ignore unknown fields and events.

mod audit;
mod backup;
mod disk;
mod drain;
mod mail;
mod net;
mod pcap;
mod sql;

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

pub use audit::{
    AUDIT_DAYS, AUDIT_PATH, AUDIT_QUERY_PATH, AuditEntry, AuditLog, AuditQuery, BEGINS, LONGEST_AUDIT_ENTRY,
    LONGEST_AUDIT_REQUEST, MOST_AUDIT_ENTRIES,
};
pub use backup::{BACKUP_PATH, BackupRequest, BackupStatus};
pub use disk::{DISK_PATH, DatabaseSize, DiskStatus, FileSystem, PartitionStatus};
pub use drain::{DRAIN_PATH, DRAINED_PATH, DrainAnswer, DrainRequest, UNDRAIN_PATH};
pub use mail::{LONGEST_MAIL_ADDRESS, MAIL_TEST_PATH, MAIL_TEST_SECONDS, MailReport, MailTestRequest, is_mail_address};
pub use net::{LinkStatus, NET_PATH, NetStatus, PathStatus, PeerStatus, RouteStatus, SessionStatus};
pub use pcap::{LARGEST_CAPTURE, LARGEST_SNAP, LONGEST_CAPTURE, PCAP_PATH, PcapRequest};
pub use sql::{
    LONGEST_SCRIPT, ODOO_SHELL_PATH, OPEN_POSTGRES, OPEN_POSTGRES_WRITE, OdooShellRequest, SQL_PATH, SQL_READER,
    SQL_WRITER, SqlRequest,
};

/// TCP port of the node API on each node's mesh address.
pub const NODE_API_PORT: u16 = 7443;
/// Longest body of a request to a node, in bytes.
pub const LONGEST_NODE_REQUEST: usize = 64 << 10;
/// Number of connections that one operator may have to a hub, and to a node. A node reserves its last places for
/// operators and admins.
pub const OPERATOR_CONNECTIONS: usize = 16;
/// Most lines of a journal in one reply. A reply that does not follow the journal and has this number of lines may not
/// be complete: [`JournalQuery::after`] gets the next ones.
pub const MOST_JOURNAL_LINES: u32 = 100_000;
/// Longest command of an [`ExecRequest`], in bytes: all words with their quotes, as the node's journal records them.
pub const LONGEST_COMMAND: usize = 4096;
/// Longest run of a command, in seconds.
pub const LONGEST_RUN: u32 = 3600;
/// Seconds within which a node replies to an action. An action that takes longer continues, and [`ACTION_PATH`] returns
/// how it ends.
pub const ACTION_REPLY_SECONDS: u64 = 8;
/// `GET`, viewer: a [`NodeStatus`].
pub const STATUS_PATH: &str = "/v1/status";
/// `GET`, viewer: a list of [`UnitStatus`].
pub const UNITS_PATH: &str = "/v1/units";
/// `GET`, viewer, with a [`JournalQuery`] as the query string: [`JournalLine`]s, one a line.
pub const JOURNAL_PATH: &str = "/v1/journal";
/// `GET`, viewer, on a monitor, with a [`JournalQuery`] that names a node: the [`JournalLine`]s that the monitor has of
/// that node, one a line. Monitors of older versions reply 404.
pub const KEPT_JOURNAL_PATH: &str = "/v1/journal/kept";
/// `POST`, operator, with an [`ActionRequest`].
pub const REBOOT_PATH: &str = "/v1/reboot";
/// `POST`, operator, with an [`ActionRequest`].
pub const POWEROFF_PATH: &str = "/v1/poweroff";
/// `POST`, operator, with an [`ActionRequest`] that names a unit.
pub const RESTART_PATH: &str = "/v1/restart";
/// `POST`, operator, with an [`ActionRequest`]: the primary hands over to a standby.
pub const SWITCHOVER_PATH: &str = "/v1/switchover";
/// `GET`, viewer: an [`ActionStatus`], the last action since the node's agent started. Status 404 if there was none.
pub const ACTION_PATH: &str = "/v1/action";
/// `POST` of a node to a hub, with a [`LockRequest`]: a [`crate::UpdateDecision`]. Hubs without operators reply 404.
pub const LOCK_PATH: &str = "/v1/lock";
/// `POST`, admin, with an [`ExecRequest`]: [`ExecEvent`]s, one a line.
pub const EXEC_PATH: &str = "/v1/exec";
/// Prefix of `CONNECT` paths: bytes to a service of the node, such as `/v1/open/prometheus`.
pub const OPEN_PREFIX: &str = "/v1/open/";

/// State of a node.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct NodeStatus {
    /// Name of the slot.
    pub node: String,
    /// Version of the image that runs.
    pub image: String,
    /// Epoch of the slot.
    pub epoch: u64,
    /// `joining`, `starting` or `ready`.
    pub phase: String,
    /// Last message of the agent.
    pub message: String,
    /// Time of the node's clock, in seconds since 1970.
    pub at: u64,
    /// Seconds since the node booted.
    pub uptime: u64,
    /// Whether the node holds the VIP.
    pub vip: bool,
    /// Load averages of 1, 5 and 15 minutes.
    pub load: [f64; 3],
    /// Memory.
    pub memory: Space,
    /// File systems, by mount point: `/`, `/efi` and `/var`.
    pub disks: BTreeMap<String, Space>,
    /// Units that failed.
    pub failed: Vec<String>,
    /// Whether the clock is synchronized with a time server.
    pub clock_synchronized: bool,
    /// Expiry of the node's certificate, in seconds since 1970; `None` if it does not expire.
    pub certificate_expires: Option<u64>,
    /// State of PostgreSQL, on a database node.
    pub database: Option<DatabaseStatus>,
    /// HAProxy's status (`UP`, `DOWN` and others) of each Odoo server, on a hub.
    pub odoo: BTreeMap<String, String>,
    /// Time at which an operator drained the node, in seconds since 1970. The key is absent if the node is not drained.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub drained: Option<u64>,
}

/// Sizes in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Space {
    /// All.
    pub total: u64,
    /// Free for programs.
    pub available: u64,
}

/// State of PostgreSQL on a node, as its Patroni reports it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct DatabaseStatus {
    /// Whether the node has the primary.
    pub primary: bool,
    /// Patroni's state of PostgreSQL: `running`, `starting`, `stopped` and others.
    pub state: String,
    /// Standbys that replicate from this primary.
    pub standbys: Vec<StandbyStatus>,
}

/// A standby, as its primary reports it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct StandbyStatus {
    /// Name of the node.
    pub node: String,
    /// Whether commits wait for this standby.
    pub sync: bool,
    /// Bytes of WAL that the standby has not replayed.
    pub lag: u64,
    /// Whether the standby cannot become the primary, because its node is drained. The key is absent if it can.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub drained: bool,
}

/// State of a systemd unit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct UnitStatus {
    /// Name, such as `patroni.service`.
    pub name: String,
    /// Description of the unit.
    pub description: String,
    /// `active`, `failed` and other values of systemd's `ActiveState`.
    pub active: String,
    /// Value of systemd's `SubState`.
    pub sub: String,
}

/// Query of a node's journal.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct JournalQuery {
    /// Unit whose messages to return, with systemd's own messages about the unit; all units without it. The node
    /// completes the name with [`unit_name`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unit: Option<String>,
    /// Number of lines before the end to begin with. With `after`: the most lines of a reply that does not follow the
    /// journal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lines: Option<u32>,
    /// Earliest time, in seconds since 1970.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub since: Option<u64>,
    /// Cursor of the last line that the client has; the reply begins after it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub after: Option<String>,
    /// Name of the node whose journal to return, for [`KEPT_JOURNAL_PATH`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub of: Option<String>,
    /// Whether to return only lines of the current boot. [`KEPT_JOURNAL_PATH`] does not permit it.
    pub boot: bool,
    /// Whether to wait for further lines.
    pub follow: bool,
}

/// A line of a journal.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct JournalLine {
    /// Microseconds since 1970.
    pub at: u64,
    /// Position in the journal, for [`JournalQuery::after`].
    pub cursor: String,
    /// Unit, or the name of the program.
    pub unit: String,
    /// Priority of syslog: 0 (emergency) to 7 (debug).
    pub priority: u8,
    /// Text.
    pub message: String,
}

/// An action on a node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ActionRequest {
    /// Unit to restart.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unit: Option<String>,
    /// Name of the node, if the operator accepts that the fleet loses its last quorum, primary or VIP.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub force: Option<String>,
}

/// Reply to an [`ActionRequest`]: status 200 if the action is done, 202 if it continues.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct ActionReply {
    /// What the node does.
    pub message: String,
    /// Whether the action is done. A reboot and a power-off are done when systemd begins to stop the node's services.
    pub done: bool,
    /// Identifier of the action, for [`ActionStatus::id`].
    pub id: String,
}

/// An action, and how it ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct ActionStatus {
    /// Identifier, as in [`ActionReply::id`].
    pub id: String,
    /// `reboot`, `power-off`, `restart`, `switchover`, `drain` or `undrain`.
    pub action: String,
    /// Unit that restarts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unit: Option<String>,
    /// DNS name of the operator's certificate.
    pub operator: String,
    /// Whether the action has ended.
    pub done: bool,
    /// Why the action failed; `None` if it is done without an error, or continues.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// A node's request to a hub for the fleet's lock. While a node has the lock, no other node reboots, stops a service of
/// value or changes its image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LockRequest {
    /// Seconds after which the hub frees the lock; 0 frees the lock now.
    pub seconds: u32,
}

/// A command to run on a node, as root.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ExecRequest {
    /// Program and arguments, which reach the program unchanged. A program without a path is searched in systemd's
    /// search path.
    pub command: Vec<String>,
    /// Seconds after which the node stops the command, up to [`LONGEST_RUN`].
    pub seconds: u32,
}

/// Output of a command, or its end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", from = "ExecLine")]
pub enum ExecEvent {
    /// Base64 of bytes on standard output.
    Stdout(String),
    /// Base64 of bytes on standard error.
    Stderr(String),
    /// The command has ended with this exit code; 128 plus the signal's number after a signal.
    Exit(i32),
    /// The command did not start, or the node has stopped it, for this reason. Its exit code is unknown.
    Failed(String),
    /// An event of a newer version.
    #[serde(skip_serializing)]
    Unknown,
}

/// An [`ExecEvent`] as a JSON object, whose key is the event.
#[derive(Deserialize)]
struct ExecLine {
    stdout: Option<String>,
    stderr: Option<String>,
    exit: Option<i32>,
    failed: Option<String>,
}

impl From<ExecLine> for ExecEvent {
    fn from(line: ExecLine) -> Self {
        match line {
            ExecLine { stdout: Some(bytes), .. } => Self::Stdout(bytes),
            ExecLine { stderr: Some(bytes), .. } => Self::Stderr(bytes),
            ExecLine { exit: Some(code), .. } => Self::Exit(code),
            ExecLine { failed: Some(why), .. } => Self::Failed(why),
            _ => Self::Unknown,
        }
    }
}

/// Body of a reply whose status is not 2xx.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct NodeApiError {
    /// What failed, and why.
    pub message: String,
    /// The fix, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub help: Option<String>,
}

impl fmt::Display for NodeApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        self.help.as_ref().map_or(Ok(()), |help| write!(f, "\n  help: {help}"))
    }
}

impl std::error::Error for NodeApiError {}

/// Longest name of a unit, in bytes.
const LONGEST_UNIT_NAME: usize = 255;
/// Types of units.
const UNIT_TYPES: [&str; 11] =
    ["automount", "device", "mount", "path", "scope", "service", "slice", "socket", "swap", "target", "timer"];

/// Returns the complete name of a unit, as systemctl does: a name without a type is that of a service. `None` if no unit
/// can have the name.
///
/// ```
/// # use fleet::node_api::unit_name;
/// assert_eq!(unit_name("patroni").as_deref(), Some("patroni.service"));
/// assert_eq!(unit_name("role-db.target").as_deref(), Some("role-db.target"));
/// assert_eq!(unit_name("a b"), None);
/// ```
#[must_use]
pub fn unit_name(text: &str) -> Option<String> {
    let has_type = text.rsplit_once('.').is_some_and(|(_, kind)| UNIT_TYPES.contains(&kind));
    let name = if has_type { text.to_owned() } else { format!("{text}.service") };
    let permitted = |c: char| c.is_ascii_alphanumeric() || ":-_.\\@".contains(c);
    (name.len() <= LONGEST_UNIT_NAME && !name.starts_with(['.', '@']) && name.chars().all(permitted)).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_units_are_completed_and_checked() {
        for (text, name) in [
            ("patroni", "patroni.service"),
            ("getty@tty1", "getty@tty1.service"),
            ("a.b", "a.b.service"),
            ("-.mount", "-.mount"),
            ("dev-disk-by\\x2dlabel.device", "dev-disk-by\\x2dlabel.device"),
            ("backup-age.timer", "backup-age.timer"),
        ] {
            assert_eq!(unit_name(text).as_deref(), Some(name));
        }
        let long = "x".repeat(256);
        for text in ["", ".service", "@.service", "a/b", "a&b=c", "a\r\nX", "a b.service", "ä", &long] {
            assert_eq!(unit_name(text), None, "{text}");
        }
    }

    #[test]
    fn events_of_a_newer_version_are_unknown() {
        let read = |text: &str| serde_json::from_str::<ExecEvent>(text).unwrap();
        for event in [
            ExecEvent::Stdout("eA==".to_owned()),
            ExecEvent::Stderr(String::new()),
            ExecEvent::Exit(-1),
            ExecEvent::Failed("no such file".to_owned()),
        ] {
            assert_eq!(read(&serde_json::to_string(&event).unwrap()), event);
        }
        assert_eq!(serde_json::to_string(&ExecEvent::Exit(3)).unwrap(), r#"{"exit":3}"#);
        assert_eq!(read(r#"{"progress":{"percent":7}}"#), ExecEvent::Unknown);
        assert_eq!(read(r#"{"exit":0,"cpu":1.5}"#), ExecEvent::Exit(0));
    }

    #[test]
    fn an_error_needs_its_message() {
        serde_json::from_str::<NodeApiError>("{}").unwrap_err();
        let error: NodeApiError = serde_json::from_str(r#"{"message":"m","later":1}"#).unwrap();
        assert_eq!(error, NodeApiError { message: "m".to_owned(), help: None });
    }
}
