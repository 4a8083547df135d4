//! Settings of the services, except `[odoo]` and `[alerts]`: sections of `fleet.toml`, and variables of the templates.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

#[cfg(feature = "schema")]
use crate::form;

/// `[database]`: timing of Patroni's failure detection. `loop_wait + 2 × retry_timeout` must not exceed `ttl`. A
/// change applies when a node with that image is the primary.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct Database {
    /// Seconds that the primary's lease lasts without a renewal. At least 20. Default: `20`.
    #[cfg_attr(feature = "schema", schemars(range(min = 20)))]
    pub ttl: u16,
    /// Seconds between two cycles of Patroni. At least 1. Default: `3`.
    #[cfg_attr(feature = "schema", schemars(range(min = 1)))]
    pub loop_wait: u16,
    /// Seconds for which Patroni retries an operation on etcd or PostgreSQL. At least 3. Default: `6`.
    #[cfg_attr(feature = "schema", schemars(range(min = 3)))]
    pub retry_timeout: u16,
}

impl Default for Database {
    fn default() -> Self {
        Self { ttl: 20, loop_wait: 3, retry_timeout: 6 }
    }
}

/// `[backup]`: place and times of PostgreSQL's backups and its WAL.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct Backup {
    /// Node that keeps pgBackRest's repository. Default: the first monitor without `db`, else the last node without
    /// `db`. If every node has `db`, there are no backups. Example: `"monitor-1"`.
    pub node: Option<String>,
    /// Number of full backups to keep, at least 1. The repository also keeps the WAL since the oldest one, for a
    /// restore to any moment after it. Default: `4`.
    #[cfg_attr(feature = "schema", schemars(range(min = 1)))]
    pub keep: u16,
    /// When a full backup starts: a time as in systemd's `OnCalendar=`. Default: `"Sun 01:30"`.
    #[cfg_attr(feature = "schema", schemars(with = "form::BackupTime"))]
    pub full: String,
    /// When an incremental backup starts: a time as in `full`. Default: `"Mon..Sat 01:30"`.
    #[cfg_attr(feature = "schema", schemars(with = "form::BackupTime"))]
    pub incremental: String,
    /// Age of the newest backup, in hours, at which the alert `BackupOld` is raised. Default: `30`.
    pub stale_after: u16,
    /// An S3 bucket instead of a node. Default: none.
    pub s3: Option<S3>,
    /// Restores the new database from the repository, as of this time, instead of an empty one: a time of RFC 3339 such
    /// as `"2026-11-23T10:00:00Z"`, or `"latest"`. Default: none.
    #[cfg_attr(feature = "schema", schemars(with = "Option<form::BackupTime>"))]
    pub restore: Option<String>,
}

impl Default for Backup {
    fn default() -> Self {
        Self {
            node: None,
            keep: 4,
            full: "Sun 01:30".to_owned(),
            incremental: "Mon..Sat 01:30".to_owned(),
            stale_after: 30,
            s3: None,
            restore: None,
        }
    }
}

/// `[backup.s3]`: an S3 bucket for the backups. The access key is a secret, and not a key of this file: give it to
/// `bakehouse init` in `BAKEHOUSE_S3_KEY` and `BAKEHOUSE_S3_SECRET`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct S3 {
    /// Name of the bucket.
    #[cfg_attr(feature = "schema", schemars(with = "form::Plain"))]
    pub bucket: String,
    /// Host name of the service; a port may follow. Example: `"s3.eu-central-1.amazonaws.com"`.
    #[cfg_attr(feature = "schema", schemars(with = "form::Plain"))]
    pub endpoint: String,
    /// Region of the bucket. Example: `"eu-central-1"`.
    #[cfg_attr(feature = "schema", schemars(with = "form::Plain"))]
    pub region: String,
    /// Whether requests name the bucket in the path instead of the host name. Self-hosted services often require it.
    /// Default: `false`.
    #[serde(default)]
    pub path_style: bool,
    /// Path of a PEM file, relative to `fleet.toml`: the certificate of the authority that signed the service's
    /// certificate. Default: the authorities that Debian trusts.
    #[serde(default)]
    pub ca: Option<String>,
}

/// `[access]`: rights of operators that `bakehouse operator` cannot grant alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct Access {
    /// Whether operators with the role `admin` may run commands on nodes, as root, and Python in Odoo. Default: `false`.
    pub shell: bool,
    /// Whether operators with the role `admin` may run SQL on the databases, as users that are no superusers. Default:
    /// `false`.
    pub sql: bool,
    /// Whether a disk of `bakehouse ticket NODE --rescue` opens a root shell on the node's console. Default: `true`.
    pub rescue: bool,
}

impl Default for Access {
    fn default() -> Self {
        Self { shell: false, sql: false, rescue: true }
    }
}

/// `[firewall]`: further ports that the packet filter opens.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct Firewall {
    /// Ports that are open to every address: `[[firewall.open]]`. Default: none.
    pub open: Vec<OpenPort>,
}

/// An entry of `[[firewall.open]]`: a port that is open to every address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct OpenPort {
    /// Port number.
    pub port: u16,
    /// `"tcp"` or `"udp"`.
    pub proto: Proto,
    /// Role whose nodes open the port. Default: every node opens it.
    #[serde(default)]
    pub role: Option<String>,
}

/// Transport protocol of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum Proto {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl std::fmt::Display for Proto {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// `[update]`: source and times of the nodes' updates.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct Update {
    /// Address of the folder that `bakehouse publish` writes, on any HTTP server that the nodes reach. Example:
    /// `"https://updates.example/"`. Default: none, and the nodes keep their version until you flash them again.
    #[cfg_attr(feature = "schema", schemars(with = "Option<form::UpdateUrl>", extend("x-need" = "should")))]
    pub url: Option<String>,
    /// When nodes look for a newer version: a time as in systemd's `OnCalendar=`. A maintenance window is a time of the
    /// week, such as `"Sun *-*-* 02..04:0/5"`. Default: `"*:0/5"`.
    #[cfg_attr(feature = "schema", schemars(with = "form::UpdateTime"))]
    pub when: String,
    /// Age of the folder's signature, in days, at which the alert `UpdatesStale` is raised. An old signature can mean
    /// that the server withholds newer images. Default: `30`.
    pub stale_after: u16,
}

impl Default for Update {
    fn default() -> Self {
        Self { url: None, when: "*:0/5".to_owned(), stale_after: 30 }
    }
}

/// `[netboot]`: assignment of nodes to machines that boot from the network. No image depends on it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct Netboot {
    /// Node or group of a machine, by MAC address in lower case or by serial number. Example:
    /// `"52:54:00:aa:bb:cc" = "hub-1"`. Default: none.
    #[cfg_attr(feature = "schema", schemars(extend("propertyNames" = { "pattern": form::MACHINE })))]
    pub machines: BTreeMap<String, String>,
    /// Node or group of the machines that `machines` does not name. Default: none, and the server installs nothing on
    /// them.
    pub others: Option<String>,
    /// Groups whose machines run from memory. Such a machine loads its image over the network at each start, and
    /// installs nothing. Its `/var` is on a disk, or in memory if the profiles of its roles have `disk.volatile`.
    /// Default: none.
    pub diskless: Vec<String>,
    /// Disk that the installer overwrites. Example: `"/dev/nvme0n1"`. Default: the only disk. Without this key, the
    /// installer writes nothing on a machine with several disks.
    pub disk: Option<String>,
    /// Whether hubs and voters get their tickets by MAC address or serial number alone, without a code from their
    /// console. Any host on that network can then obtain the fleet's passwords. Default: `false`.
    pub trust_lan: bool,
}

/// `[secure_boot]`: files of the key that signs what the firmware runs, relative to `fleet.toml`. Images contain only
/// the certificate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct SecureBoot {
    /// Private key: RSA, PEM, without a passphrase. Default: `"secure-boot/db.key"`.
    pub key: String,
    /// Certificate: X.509, PEM. Default: `"secure-boot/db.crt"`.
    pub certificate: String,
}

impl Default for SecureBoot {
    fn default() -> Self {
        Self { key: "secure-boot/db.key".to_owned(), certificate: "secure-boot/db.crt".to_owned() }
    }
}

/// `[promise]`: longest outages that the fleet's owner accepts. `bakehouse check` compares these values with the sum
/// of the time-outs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct Promise {
    /// Seconds from the loss of a hub until the VIP answers. At least 1. Default: `3`.
    #[cfg_attr(feature = "schema", schemars(range(min = 1)))]
    pub vip: u16,
    /// Seconds from the loss of the primary's machine until the database accepts writes. At least `database.ttl` and 5
    /// s. Default: `25`.
    #[cfg_attr(feature = "schema", schemars(range(min = 25)))]
    pub database: u16,
    /// Seconds from the loss of an application node until no request goes to it. At least 3. Default: `3`.
    #[cfg_attr(feature = "schema", schemars(range(min = 3)))]
    pub app: u16,
}

impl Default for Promise {
    fn default() -> Self {
        Self { vip: 3, database: 25, app: 3 }
    }
}
