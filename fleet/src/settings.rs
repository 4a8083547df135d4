//! Settings of the services, as `fleet.toml` says them and as every template sees them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// `[database]`: how fast a dead primary is found. Patroni wants
/// `loop_wait + 2 × retry_timeout ≤ ttl`, and at least 20 seconds of ttl.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Database {
    /// Seconds after which a silent primary's lease ends.
    pub ttl: u16,
    /// Seconds between two looks.
    pub loop_wait: u16,
    /// Seconds an operation on etcd or PostgreSQL is tried again.
    pub retry_timeout: u16,
}

impl Default for Database {
    fn default() -> Self {
        Self { ttl: 20, loop_wait: 3, retry_timeout: 6 }
    }
}

/// `[backup]`: where PostgreSQL's backups and its WAL go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Backup {
    /// Node that keeps them. Default: the first monitor, else the last node that is no `db`;
    /// where every node is one there are no backups.
    pub node: Option<String>,
    /// Full backups kept, with the WAL to go back to any moment since the oldest.
    pub keep: u16,
    /// When a full one is made, as systemd writes times.
    pub full: String,
    /// When what has changed since is added.
    pub incremental: String,
    /// An S3 bucket instead of a node.
    pub s3: Option<S3>,
    /// The database is not made empty: it is what the repository has, as of this time
    /// (`"2026-11-23 10:00:00+00"`), or `"latest"`.
    pub restore: Option<String>,
}

impl Default for Backup {
    fn default() -> Self {
        Self {
            node: None,
            keep: 4,
            full: "Sun 01:30".to_owned(),
            incremental: "Mon..Sat 01:30".to_owned(),
            s3: None,
            restore: None,
        }
    }
}

/// `[backup.s3]`. The key is a secret and not here: see `bakehouse ticket --help`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct S3 {
    pub bucket: String,
    /// Host name of the service, such as `"s3.eu-central-1.amazonaws.com"`; a port may follow.
    pub endpoint: String,
    pub region: String,
    /// The bucket is named in addresses' paths, not in host names; a service of one's own often
    /// wants it.
    #[serde(default)]
    pub path_style: bool,
    /// A file beside `fleet.toml` with the certificate (PEM) of who signed the service's own, where
    /// that is nobody whom Debian knows.
    #[serde(default)]
    pub ca: Option<String>,
}

/// `[odoo]`: what the application images hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Odoo {
    /// Name of the database.
    pub database: String,
    /// Languages whose translations are kept, such as `"de"` or `"pt_BR"`; English is always there.
    pub languages: Vec<String>,
    /// Folders of further add-ons, relative to `fleet.toml`, each holding add-ons as sub-folders.
    pub addons: Vec<String>,
    /// Add-ons installed when the database is made.
    pub modules: Vec<String>,
}

impl Default for Odoo {
    fn default() -> Self {
        Self { database: "odoo".to_owned(), languages: Vec::new(), addons: Vec::new(), modules: vec!["web".to_owned()] }
    }
}

/// `[alerts]`: who is told.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Alerts {
    pub email: Option<Email>,
    /// Addresses that get Alertmanager's JSON.
    pub webhooks: Vec<String>,
    /// An address that expects a call every minute, and raises the alarm itself when none
    /// comes: the dead-man's switch.
    pub dead_man: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Email {
    pub to: String,
    pub from: String,
    /// Mail server, `host:port`.
    pub smarthost: String,
}

/// `[web]`: how hubs take browsers' connections.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Web {
    /// Whether hubs answer requests without TLS with a redirect to HTTPS.
    pub redirect: bool,
    /// Connections that one address may have at once; four times as many may be opened in ten seconds.
    pub connections: u16,
}

impl Default for Web {
    fn default() -> Self {
        Self { redirect: false, connections: 150 }
    }
}

/// `[firewall]`: what else faces outside.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Firewall {
    pub open: Vec<OpenPort>,
}

/// One of `[[firewall.open]]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OpenPort {
    pub port: u16,
    /// `tcp` or `udp`.
    pub proto: Proto,
    /// Role whose nodes open it; without it, every node.
    #[serde(default)]
    pub role: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Proto {
    Tcp,
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

/// `[update]`: where nodes find newer images of themselves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Update {
    /// Address of the folder that `bakehouse publish` writes, on any HTTP server that the nodes
    /// reach. Without it nodes stay as they are until they are flashed anew.
    pub url: Option<String>,
    /// When nodes look, as systemd writes times; a maintenance window is a time of the week, such
    /// as `"Sun *-*-* 02..04:0/5"`.
    pub when: String,
    /// Days after which a folder that was not signed again raises an alert: who serves it may hold newer images back.
    pub stale_after: u16,
}

impl Default for Update {
    fn default() -> Self {
        Self { url: None, when: "*:0/5".to_owned(), stale_after: 30 }
    }
}

/// `[netboot]`: what machines become that boot from the network. No image depends on it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Netboot {
    /// Node or group, by MAC address (`52:54:00:aa:bb:cc`) or by the maker's serial number.
    pub machines: BTreeMap<String, String>,
    /// Group of machines that are not named. Without it they are left alone.
    pub others: Option<String>,
    /// Groups that run from memory: nothing is installed, and they come over the network at each
    /// start. What they keep is on a disk, or nowhere if the roles' profiles say that nothing needs to
    /// be kept.
    pub diskless: Vec<String>,
    /// Disk that is overwritten, such as `/dev/nvme0n1`. Without it a machine with several disks is
    /// left alone.
    pub disk: Option<String>,
    /// Hubs and voters get their tickets by MAC address or serial number alone, without a code from
    /// their console: every host on that network can then take the fleet's passwords.
    pub trust_lan: bool,
}

/// `[secure_boot]`: files of the key that signs what firmware runs, relative to `fleet.toml`. Only
/// the certificate comes into images.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SecureBoot {
    /// RSA, PEM, without a passphrase.
    pub key: String,
    /// X.509, PEM.
    pub certificate: String,
}

impl Default for SecureBoot {
    fn default() -> Self {
        Self { key: "secure-boot/db.key".to_owned(), certificate: "secure-boot/db.crt".to_owned() }
    }
}

/// `[promise]`: the longest outage the fleet's owner accepts, in seconds. `check` compares
/// what the time-outs add up to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Promise {
    /// A hub dies: until the VIP answers.
    pub vip: u16,
    /// The primary's machine dies: until writes are taken.
    pub database: u16,
    /// An application node dies: until nobody is sent to it.
    pub app: u16,
}

impl Default for Promise {
    fn default() -> Self {
        Self { vip: 3, database: 25, app: 3 }
    }
}
