//! `fleet.toml`: the one file that a user edits. Each of its keys is a field here, and the parser rejects others.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};
use toml::Spanned;

use crate::alerts::Alerts;
use crate::diagnostic::{Diagnostic, Source, parse};
use crate::dns::Dns;
use crate::lan::LanAddress;
use crate::odoo::Odoo;
use crate::settings::{Access, Backup, Database, Firewall, Netboot, Promise, SecureBoot, Update};
use crate::web::Web;
#[cfg(feature = "schema")]
use crate::{etcd_keys::FOLDERS, form};

/// A whole `fleet.toml`.
#[derive(Clone, Debug, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema), schemars(extend("required" = ["name", "groups"])))]
#[serde(deny_unknown_fields)]
pub struct Fleet {
    /// Name of the fleet: 1 to 32 lower-case letters, digits and `-`. It starts with a letter and does not end with
    /// `-`. It must not be a name that the hubs use in etcd, such as `slots` or `rollout`. Example: `"acme"`.
    #[cfg_attr(feature = "schema", schemars(with = "form::FleetName", extend("not" = { "enum": FOLDERS })))]
    pub name: Spanned<String>,
    /// Version of the images that this file describes: 1 to 16 letters, digits and `.~^-`. Raise it with every change
    /// that has to reach the nodes. Versions are compared as systemd compares them. Default: `"1"`.
    #[serde(default = "default_version")]
    #[cfg_attr(feature = "schema", schemars(with = "form::ImageVersion", extend("x-need" = "should")))]
    pub version: Spanned<String>,
    /// Settings of all images.
    #[serde(default)]
    pub image: Image,
    /// Addresses and port of the WireGuard mesh.
    #[serde(default)]
    pub mesh: Mesh,
    /// The address that clients use.
    #[serde(default)]
    pub vip: Vip,
    /// The name that the hubs serve.
    #[serde(default = "default_section::<Dns>")]
    #[cfg_attr(feature = "schema", schemars(with = "Dns"))]
    pub dns: Spanned<Dns>,
    /// Sources of Debian packages.
    #[serde(default)]
    pub debian: Debian,
    /// Timing of Patroni's failure detection.
    #[serde(default = "default_section::<Database>")]
    #[cfg_attr(feature = "schema", schemars(with = "Database"))]
    pub database: Spanned<Database>,
    /// Place and times of PostgreSQL's backups.
    #[serde(default = "default_section::<Backup>")]
    #[cfg_attr(feature = "schema", schemars(with = "Backup"))]
    pub backup: Spanned<Backup>,
    /// Odoo's database, add-ons, languages, processes and mail.
    #[serde(default = "default_section::<Odoo>")]
    #[cfg_attr(feature = "schema", schemars(with = "Odoo"))]
    pub odoo: Spanned<Odoo>,
    /// Receivers of alerts.
    #[serde(default = "default_section::<Alerts>")]
    #[cfg_attr(feature = "schema", schemars(with = "Alerts"))]
    pub alerts: Spanned<Alerts>,
    /// Further ports that the packet filter opens.
    #[serde(default = "default_section::<Firewall>")]
    #[cfg_attr(feature = "schema", schemars(with = "Firewall"))]
    pub firewall: Spanned<Firewall>,
    /// HTTP settings of the hubs.
    #[serde(default = "default_section::<Web>")]
    #[cfg_attr(feature = "schema", schemars(with = "Web"))]
    pub web: Spanned<Web>,
    /// Rights of operators that `bakehouse operator` cannot grant alone.
    #[serde(default = "default_section::<Access>")]
    #[cfg_attr(feature = "schema", schemars(with = "Access"))]
    pub access: Spanned<Access>,
    /// Longest outages that the fleet's owner accepts.
    #[serde(default = "default_section::<Promise>")]
    #[cfg_attr(feature = "schema", schemars(with = "Promise"))]
    pub promise: Spanned<Promise>,
    /// Source and times of the nodes' updates.
    #[serde(default = "default_section::<Update>")]
    #[cfg_attr(feature = "schema", schemars(with = "Update"))]
    pub update: Spanned<Update>,
    /// Machines that boot from the network.
    #[serde(default = "default_section::<Netboot>")]
    #[cfg_attr(feature = "schema", schemars(with = "Netboot"))]
    pub netboot: Spanned<Netboot>,
    /// Key that signs what the firmware runs. Default: no section, and Bakehouse signs nothing.
    pub secure_boot: Option<SecureBoot>,
    /// Groups of nodes, by name: `[groups.hub]`, `[groups.db]`. A name has 1 to 20 lower-case letters, digits and `-`.
    #[serde(default)]
    #[cfg_attr(feature = "schema", schemars(extend("minProperties" = 1, "propertyNames" = { "pattern": form::GROUP_NAME })))]
    pub groups: BTreeMap<String, Group>,
    /// The file's name and text, for diagnostics. Not a key.
    #[serde(skip, default = "empty_source")]
    pub source: Source,
}

/// `[image]`: settings of all images of the fleet.
#[derive(Clone, Debug, Default, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Image {
    /// The kernel: `"cloud"` has the drivers for virtio, NVMe and the clouds, `"metal"` has every driver. Physical
    /// servers need `"metal"`. Default: `"cloud"`.
    #[serde(default)]
    #[cfg_attr(feature = "schema", schemars(extend("x-need" = "should")))]
    pub hardware: Hardware,
    /// Size of a root partition (root A, and root B): a whole number with `K`, `M`, `G` or `T`, which are powers of
    /// 1024. Example: `"640M"`. It is fixed for the life of an installation, because the first boot of a node creates
    /// root B with that size. Default: the largest `disk.root` of the image's roles.
    #[serde(default)]
    #[cfg_attr(feature = "schema", schemars(with = "Option<form::Size>"))]
    pub root_size: Option<Spanned<String>>,
}

/// Value of `image.hardware`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum Hardware {
    /// Kernel with the drivers for virtio, NVMe and the clouds.
    #[default]
    Cloud,
    /// Kernel with every driver.
    Metal,
}

impl Hardware {
    /// Returns the value as `fleet.toml` has it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cloud => "cloud",
            Self::Metal => "metal",
        }
    }
}

/// `[mesh]`: addresses and port of the WireGuard mesh.
#[derive(Clone, Debug, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct Mesh {
    /// Network of the nodes' own addresses (/32 each) and of the VIP. Default: `"10.10.0.0/24"`.
    #[cfg_attr(feature = "schema", schemars(with = "form::Network"))]
    pub subnet: Spanned<Ipv4Net>,
    /// Network of the addresses on the WireGuard interfaces, between which BGP runs. It has the prefix length of
    /// `subnet`, and does not overlap it. Default: `"10.11.0.0/24"`.
    #[cfg_attr(feature = "schema", schemars(with = "form::Network"))]
    pub transport: Spanned<Ipv4Net>,
    /// Network of the operators' addresses: a part of `subnet`, without an address of a node and without the VIP. Hubs
    /// then accept operators as WireGuard peers (`bakehouse operator wireguard`). Default: none. Example:
    /// `"10.10.0.192/26"`.
    #[cfg_attr(feature = "schema", schemars(with = "Option<form::Network>"))]
    pub operators: Option<Spanned<Ipv4Net>>,
    /// UDP port of a hub's WireGuard for workers, and TCP port of its join API. Links between hubs use the next UDP
    /// ports, one for each hub. Default: `51820`.
    pub port: u16,
}

impl Default for Mesh {
    fn default() -> Self {
        Self {
            subnet: unspanned(Ipv4Net::new_assert(Ipv4Addr::new(10, 10, 0, 0), 24)),
            transport: unspanned(Ipv4Net::new_assert(Ipv4Addr::new(10, 11, 0, 0), 24)),
            operators: None,
            port: 51820,
        }
    }
}

/// `[vip]`: the addresses that clients use. One hub holds each of them at a time.
#[derive(Clone, Debug, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct Vip {
    /// A host address of `mesh.subnet`. Default: `"10.10.0.100"`.
    #[cfg_attr(feature = "schema", schemars(with = "form::Address"))]
    pub address: Spanned<Ipv4Addr>,
    /// A free IPv4 address of the hubs' local network, for browsers outside the mesh. The length of its prefix may
    /// follow. A hub finds the interface by its network. Default: none. Example: `"192.168.1.100/24"`.
    #[cfg_attr(feature = "schema", schemars(with = "Option<form::LanAddress>"))]
    pub lan: Option<Spanned<String>>,
    /// As `lan`, an IPv6 address. Default: none. Example: `"fd00:1::100/64"`.
    #[cfg_attr(feature = "schema", schemars(with = "Option<form::LanAddress6>"))]
    pub lan6: Option<Spanned<String>>,
    /// Path of a program, relative to `fleet.toml`. The hub that browsers outside the mesh shall reach runs it, so that it
    /// moves a provider's floating address to the hub. `bakehouse secret vip_hook` stores its token. Default: none.
    /// Example: `"floating-ip"`.
    pub hook: Option<String>,
}

impl Vip {
    /// Returns the valid addresses of `lan` and `lan6`. The lint reports the others.
    #[must_use]
    pub fn lan_addresses(&self) -> Vec<LanAddress> {
        let read = |text: &Spanned<String>, v6: bool| {
            LanAddress::parse(text.get_ref()).filter(|lan| lan.address.is_ipv6() == v6)
        };
        let v4 = self.lan.as_ref().and_then(|text| read(text, false));
        v4.into_iter().chain(self.lan6.as_ref().and_then(|text| read(text, true))).collect()
    }
}

impl Default for Vip {
    fn default() -> Self {
        Self { address: unspanned(Ipv4Addr::new(10, 10, 0, 100)), lan: None, lan6: None, hook: None }
    }
}

/// `[debian]`: sources of Debian packages.
#[derive(Clone, Debug, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct Debian {
    /// Suite of all images. Default: `"trixie"`.
    pub suite: String,
    /// Base address of the archive. Example: `"http://mirror.example/debian"`. Default: the build host's.
    pub mirror: Option<String>,
    /// Base address of the security archive. Default: the build host's.
    pub security_mirror: Option<String>,
    /// Further signed apt sources: `[[debian.sources]]`. Default: none.
    pub sources: Vec<ExtraSource>,
}

impl Default for Debian {
    fn default() -> Self {
        Self { suite: "trixie".to_owned(), mirror: None, security_mirror: None, sources: Vec::new() }
    }
}

/// An entry of `[[debian.sources]]`: a signed apt source in addition to `debian.suite`.
#[derive(Clone, Debug, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct ExtraSource {
    /// Name of the source in the lock and in messages. Example: `"sid"`.
    #[cfg_attr(feature = "schema", schemars(with = "String"))]
    pub name: Spanned<String>,
    /// Base address. Default: the Debian mirror, for another suite such as `"sid"`.
    #[serde(default)]
    pub uri: Option<String>,
    /// Suite of the source. Example: `"sid"`.
    pub suite: String,
    /// Components of the source. Default: `["main"]`.
    #[serde(default = "main_component")]
    pub components: Vec<String>,
    /// Path of the OpenPGP keyring, relative to `fleet.toml`. Default: Debian's keyring.
    #[serde(default)]
    pub key: Option<String>,
    /// Packages that come from this source. The resolver ignores all other packages of the source. Default: an empty
    /// list, and all its packages have the priority of the stable suite.
    #[serde(default)]
    pub packages: Vec<String>,
    /// Whether the Release file must be valid at the time of the lock. Set `false` for suites whose Release file
    /// expires between updates, such as sid. Default: `true`.
    #[serde(default = "yes")]
    pub check_valid_until: bool,
}

/// `[groups.NAME]`: nodes with one image.
#[derive(Clone, Debug, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Group {
    /// Number of nodes, 1 to 4000. Each has a slot: `NAME-1`, `NAME-2` and so on.
    #[cfg_attr(feature = "schema", schemars(with = "u16", range(min = 1, max = 4000)))]
    pub count: Spanned<u16>,
    /// Roles of each node: `"hub"`, `"db"`, `"app"`, `"monitor"`, or roles of your own. Default: the group's name.
    #[serde(default)]
    #[cfg_attr(feature = "schema", schemars(with = "Vec<String>"))]
    pub roles: Vec<Spanned<String>>,
    /// Mesh address of the first node. The other nodes have the next addresses. Default: by the first role, host 1 of
    /// `mesh.subnet` for `hub`, 10 for `db`, 20 for `app`, 30 for `monitor`, 40 for others. Example: `"10.10.0.50"`.
    #[serde(default)]
    #[cfg_attr(feature = "schema", schemars(with = "Option<form::Address>"))]
    pub first: Option<Spanned<Ipv4Addr>>,
    /// Public host name or address of each node, without a port, in the order of the slots. Hubs require it. Example:
    /// `["hub1.example.net", "198.51.100.7"]`.
    #[serde(default)]
    #[cfg_attr(feature = "schema", schemars(with = "Vec<form::Host>", extend("x-need" = "must, for hubs")))]
    pub endpoints: Vec<Spanned<String>>,
    /// Further Debian packages for this group's image. Default: none.
    #[serde(default)]
    pub packages: Vec<String>,
    /// Further Python packages for this group's image, each with its version, from the index of the host's pip. `bakehouse
    /// lock` adds what they require: Debian's packages, or further wheels. Those for Odoo belong to `[odoo] wheels`.
    /// Default: none. Example: `["plutoprint==0.23.0"]`.
    #[serde(default)]
    #[cfg_attr(feature = "schema", schemars(with = "Vec<form::Wheel>"))]
    pub wheels: Vec<String>,
    /// Further overlays for this group's image. Default: none.
    #[serde(default)]
    #[cfg_attr(feature = "schema", schemars(with = "Vec<String>"))]
    pub overlays: Vec<Spanned<String>>,
}

impl Group {
    /// Returns the roles of the group: `roles`, or the group's name if `roles` is empty.
    #[must_use]
    pub fn role_names<'a>(&'a self, group: &'a str) -> Vec<&'a str> {
        if self.roles.is_empty() { vec![group] } else { self.roles.iter().map(|r| r.get_ref().as_str()).collect() }
    }
}

impl Fleet {
    /// Reads a `fleet.toml`.
    ///
    /// # Errors
    /// If the bytes are not UTF-8, not TOML, or have an unknown key. The [`Diagnostic`] has file, line and fix.
    ///
    /// # Examples
    ///
    /// ```
    /// let error = fleet::Fleet::parse("fleet.toml", b"name = \"acme\"\n[groups.db]\ncuont = 2\n").unwrap_err();
    /// assert_eq!((error.file.as_str(), error.line), ("fleet.toml", 3));
    /// assert_eq!(error.help.as_deref(), Some("did you mean `count`?"));
    /// ```
    pub fn parse(name: &str, bytes: &[u8]) -> Result<Self, Box<Diagnostic>> {
        let (mut fleet, source) = parse::<Self>(name, bytes)?;
        fleet.source = source;
        Ok(fleet)
    }
}

/// Wraps a default. Its span is empty, because the file does not contain it.
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
