//! `fleet.toml`: the one file a user edits. Every key he may write is a field here.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};
use toml::Spanned;

use crate::diagnostic::{Diagnostic, Source, parse};
use crate::settings::{Alerts, Backup, Database, Firewall, Netboot, Odoo, Promise, SecureBoot, Update, Web};

/// A whole `fleet.toml`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fleet {
    /// Name of the installation: lower-case letters, digits and `-`.
    pub name: Spanned<String>,
    /// Version of the images this file describes. Raise it with every change that is to
    /// reach the nodes. Letters, digits, `.`, `~`, `^` and `-`, compared as systemd does.
    #[serde(default = "default_version")]
    pub version: Spanned<String>,
    #[serde(default)]
    pub image: Image,
    #[serde(default)]
    pub mesh: Mesh,
    #[serde(default)]
    pub vip: Vip,
    #[serde(default)]
    pub debian: Debian,
    #[serde(default = "default_section")]
    pub database: Spanned<Database>,
    #[serde(default = "default_section")]
    pub backup: Spanned<Backup>,
    #[serde(default = "default_section")]
    pub odoo: Spanned<Odoo>,
    #[serde(default = "default_section")]
    pub alerts: Spanned<Alerts>,
    #[serde(default = "default_section")]
    pub firewall: Spanned<Firewall>,
    #[serde(default = "default_section")]
    pub web: Spanned<Web>,
    #[serde(default = "default_section")]
    pub promise: Spanned<Promise>,
    #[serde(default = "default_section")]
    pub update: Spanned<Update>,
    #[serde(default = "default_section")]
    pub netboot: Spanned<Netboot>,
    /// Where it is there, what firmware runs is signed.
    pub secure_boot: Option<SecureBoot>,
    /// Nodes by kind: `[groups.hub]`, `[groups.db]` …
    #[serde(default)]
    pub groups: BTreeMap<String, Group>,
    #[serde(skip, default = "empty_source")]
    pub source: Source,
}

/// `[image]`: what every image of the fleet shares.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Image {
    /// Which kernel: `cloud` (virtio, `NVMe`, the clouds' drivers) or `metal` (every driver).
    #[serde(default)]
    pub hardware: Hardware,
    /// Size of one root slot, e.g. `"640M"`. It can't change over an installation's life,
    /// because the second slot is cut when a node first boots. Default: the largest of the roles'.
    #[serde(default)]
    pub root_size: Option<Spanned<String>>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Hardware {
    #[default]
    Cloud,
    Metal,
}

impl Hardware {
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cloud => "cloud",
            Self::Metal => "metal",
        }
    }
}

/// `[mesh]`: addresses inside the `WireGuard` mesh.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Mesh {
    /// Nodes' own addresses (/32 each) and the VIP.
    pub subnet: Spanned<Ipv4Net>,
    /// Addresses on the `WireGuard` interfaces themselves, where BGP runs.
    pub transport: Spanned<Ipv4Net>,
    /// UDP port the hubs listen on for workers; hub-to-hub links take the ports above it.
    pub port: u16,
}

impl Default for Mesh {
    fn default() -> Self {
        Self {
            subnet: unspanned(Ipv4Net::new_assert(Ipv4Addr::new(10, 10, 0, 0), 24)),
            transport: unspanned(Ipv4Net::new_assert(Ipv4Addr::new(10, 11, 0, 0), 24)),
            port: 51820,
        }
    }
}

/// `[vip]`: the address clients use, held by one hub at a time.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Vip {
    pub address: Spanned<Ipv4Addr>,
}

impl Default for Vip {
    fn default() -> Self {
        Self { address: unspanned(Ipv4Addr::new(10, 10, 0, 100)) }
    }
}

/// `[debian]`: where packages come from.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Debian {
    pub suite: String,
    /// Archive's base address, e.g. `"http://mirror.example/debian"`. Default: the host's own.
    pub mirror: Option<String>,
    /// Security archive's base address. Default: the host's own.
    pub security_mirror: Option<String>,
    /// More signed apt sources: `[[debian.sources]]`.
    pub sources: Vec<ExtraSource>,
}

impl Default for Debian {
    fn default() -> Self {
        Self { suite: "trixie".to_owned(), mirror: None, security_mirror: None, sources: Vec::new() }
    }
}

/// One `[[debian.sources]]`: a signed apt source beside Debian's stable suite.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExtraSource {
    /// Name used in the lock and in messages.
    pub name: Spanned<String>,
    /// Base address; without it, the Debian mirror (for another suite, such as `sid`).
    #[serde(default)]
    pub uri: Option<String>,
    pub suite: String,
    #[serde(default = "main_component")]
    pub components: Vec<String>,
    /// Path of the `OpenPGP` keyring, relative to `fleet.toml`; without it, Debian's own.
    #[serde(default)]
    pub key: Option<String>,
    /// The only packages taken from it; everything else there is ignored. Empty: all of it,
    /// at the priority of the stable suite.
    #[serde(default)]
    pub packages: Vec<String>,
    /// Suites whose Release file expires by design between updates (sid) want `false`.
    #[serde(default = "yes")]
    pub check_valid_until: bool,
}

/// One `[groups.NAME]`: nodes of one kind.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Group {
    /// How many slots.
    pub count: Spanned<u16>,
    /// Roles each node carries. Default: the group's own name.
    #[serde(default)]
    pub roles: Vec<Spanned<String>>,
    /// First mesh address; the others follow. Default: by the first role (hub .1, db .10,
    /// app .20, monitor .30).
    #[serde(default)]
    pub first: Option<Spanned<Ipv4Addr>>,
    /// Public `host:port` of each node: needed for hubs, in the order of the slots.
    #[serde(default)]
    pub endpoints: Vec<Spanned<String>>,
    /// Further Debian packages for this group's image.
    #[serde(default)]
    pub packages: Vec<String>,
    /// Further overlays for this group's image.
    #[serde(default)]
    pub overlays: Vec<Spanned<String>>,
}

impl Group {
    /// Roles as written, or the group's name.
    #[must_use]
    pub fn role_names<'a>(&'a self, group: &'a str) -> Vec<&'a str> {
        if self.roles.is_empty() { vec![group] } else { self.roles.iter().map(|r| r.get_ref().as_str()).collect() }
    }
}

impl Fleet {
    /// Reads a `fleet.toml`.
    ///
    /// # Errors
    /// A [`Diagnostic`] with file, line and fix; never a panic, whatever the bytes.
    pub fn parse(name: &str, bytes: &[u8]) -> Result<Self, Box<Diagnostic>> {
        let (mut fleet, source) = parse::<Self>(name, bytes)?;
        fleet.source = source;
        Ok(fleet)
    }
}

/// A default has no place in the file: its span is empty.
pub(crate) fn unspanned<T>(value: T) -> Spanned<T> {
    Spanned::new(0..0, value)
}

fn default_section<T: Default>() -> Spanned<T> {
    unspanned(T::default())
}

fn default_version() -> Spanned<String> {
    unspanned("1".to_owned())
}

fn empty_source() -> Source {
    Source { name: String::new(), text: String::new() }
}

fn main_component() -> Vec<String> {
    vec!["main".to_owned()]
}

fn yes() -> bool {
    true
}
