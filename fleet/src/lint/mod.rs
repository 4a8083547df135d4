//! Rules of `bakehouse check` for a `fleet.toml` that parses.

mod alerts;
mod dns;
mod mail;
mod names;
mod odoo;
mod odoo_code;
mod places;
mod ports;
mod services;
mod vip;
mod web;

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::ops::Range;

use serde::Serialize;
use toml::Spanned;

use crate::diagnostic::{Diagnostic, Severity, nearest};
use crate::profile::{Profiles, parse_size};
use crate::schema::{Fleet, Group};
use crate::topology::{GIVEN, Topology};
pub use names::is_fleet_name;
use names::{is_dns_label, is_host};
use ports::Listeners;

/// A row of the table of minimum and recommended node counts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct HaRow {
    /// Name of the role.
    pub role: &'static str,
    /// Number of nodes with the role.
    pub have: usize,
    /// Number of nodes with which the role survives one failure.
    pub minimum: usize,
    /// Number of nodes that is recommended.
    pub recommended: usize,
}

impl HaRow {
    /// Returns the effect of the loss of one node, as a text.
    #[must_use]
    pub fn verdict(&self) -> &'static str {
        match self.have {
            0 => "no node",
            have if have >= self.recommended => "as recommended",
            1 => "one failure stops it",
            _ => "survives one failure",
        }
    }
}

/// Returns the node counts by role, with those that high availability needs.
///
/// # Examples
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let toml = b"name = \"acme\"\n[groups]\nhub.count = 3\ndb.count = 1\n";
/// let topology = fleet::Topology::from_fleet(&fleet::Fleet::parse("fleet.toml", toml)?);
/// let verdicts: Vec<_> = fleet::ha_table(&topology).iter().map(|row| (row.role, row.verdict())).collect();
/// assert_eq!(verdicts[..2], [("hub", "as recommended"), ("db", "one failure stops it")]);
/// # Ok(())
/// # }
/// ```
#[must_use]
pub fn ha_table(topology: &Topology) -> Vec<HaRow> {
    [("hub", 2, 3), ("db", 2, 3), ("app", 2, 3), ("monitor", 1, 2)]
        .into_iter()
        .map(|(role, minimum, recommended)| HaRow {
            role,
            have: topology.nodes.iter().filter(|n| n.has_role(role)).count(),
            minimum,
            recommended,
        })
        .collect()
}

/// Checks a fleet against every rule. Returns the diagnostics sorted by line.
///
/// # Examples
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use fleet::{Fleet, Profile, Profiles, Severity};
///
/// let profiles = Profiles::from([
///     ("hub".to_owned(), Profile::parse("profiles/roles/hub.toml", b"")?),
///     ("app".to_owned(), Profile::parse("profiles/roles/app.toml", b"")?),
/// ]);
/// let toml = b"name = \"acme\"\n[groups.hub]\ncount = 3\n[groups.web]\ncount = 2\nroles = [\"ap\"]\n";
/// let found = fleet::lint(&Fleet::parse("fleet.toml", toml)?, &profiles);
/// let error = found.iter().find(|d| d.message == "group `web`: there is no role `ap`").unwrap();
/// assert_eq!((error.severity, error.line), (Severity::Error, 6));
/// assert_eq!(error.help.as_deref(), Some("did you mean `app`?"));
/// # Ok(())
/// # }
/// ```
#[must_use]
pub fn lint(fleet: &Fleet, profiles: &Profiles) -> Vec<Diagnostic> {
    let mut lint = Lint { fleet, profiles, topology: Topology::from_fleet(fleet), found: Vec::new() };
    lint.names();
    lint.groups();
    lint.addresses();
    lint.lan_addresses();
    lint.served_name();
    lint.operators();
    lint.hubs_and_voters();
    lint.etcd_folders();
    lint.reserved_names();
    lint.archives();
    lint.port_numbers();
    lint.stores();
    lint.alerts();
    lint.updates();
    lint.disks();
    lint.database();
    lint.odoo_code();
    lint.backup();
    lint.services();
    lint.odoo();
    lint.web();
    lint.ports();
    lint.netboot();
    lint.promises();
    lint.high_availability();
    lint.found.sort_by_key(|d| (d.line, d.message.clone()));
    lint.found
}

struct Lint<'a> {
    fleet: &'a Fleet,
    profiles: &'a Profiles,
    topology: Topology,
    found: Vec<Diagnostic>,
}

impl Lint<'_> {
    fn error(&mut self, span: Range<usize>, message: String, help: impl Into<Option<String>>) {
        self.add(Severity::Error, span, message, help.into());
    }

    fn warning(&mut self, span: Range<usize>, message: String, help: impl Into<Option<String>>) {
        self.add(Severity::Warning, span, message, help.into());
    }

    fn add(&mut self, severity: Severity, span: Range<usize>, message: String, help: Option<String>) {
        let source = &self.fleet.source;
        self.found.push(if span.is_empty() {
            Diagnostic::whole_file(severity, &source.name, message, help)
        } else {
            Diagnostic::at(severity, source, span, message, help)
        });
    }

    fn names(&mut self) {
        let name = &self.fleet.name;
        if !is_fleet_name(name.get_ref()) {
            self.error(
                name.span(),
                format!("`{}` cannot be a fleet's name", name.get_ref()),
                "use 1 to 32 lower-case letters, digits and `-`, a letter first".to_owned(),
            );
        }
        let version = &self.fleet.version;
        let text = version.get_ref();
        // `_` and `+` separate fields in the names that systemd-sysupdate and systemd-boot parse.
        let fits = |c: char| c.is_ascii_alphanumeric() || ".~^-".contains(c);
        if text.is_empty() || text.len() > 16 || !text.chars().all(fits) {
            self.error(
                version.span(),
                format!("`{text}` cannot be an image's version"),
                "use 1 to 16 letters, digits, `.`, `~`, `^` and `-`".to_owned(),
            );
        }
    }

    fn groups(&mut self) {
        let fleet = self.fleet;
        if fleet.groups.is_empty() {
            self.error(
                0..0,
                "the fleet has no groups".to_owned(),
                "add at least `[groups.hub]` with `count = 3` and its `endpoints`".to_owned(),
            );
        }
        for (name, group) in &fleet.groups {
            if !is_dns_label(name, 20) {
                self.error(
                    fleet.source.key(&["groups", name]),
                    format!("`{name}` cannot be a group's name"),
                    "use 1 to 20 lower-case letters, digits and `-`, a letter first".to_owned(),
                );
            }
            if *group.count.get_ref() == 0 || *group.count.get_ref() > 4000 {
                self.error(
                    group.count.span(),
                    format!("group `{name}` has {} nodes", group.count.get_ref()),
                    "set 1 to 4000, or remove the group".to_owned(),
                );
            }
            self.roles_of(name, group);
        }
    }

    fn roles_of(&mut self, name: &str, group: &Group) {
        let profiles = self.profiles;
        let roles = group.role_names(name);
        let fleet = self.fleet;
        let span_of = |i: usize| group.roles.get(i).map_or_else(|| fleet.source.key(&["groups", name]), Spanned::span);
        let mut ports = Listeners::new();
        let mut seen = BTreeSet::new();
        for (i, role) in roles.iter().enumerate() {
            let Some(profile) = profiles.get(*role).filter(|_| !GIVEN.contains(role)) else {
                let known = || profiles.keys().map(String::as_str).filter(|r| !GIVEN.contains(r));
                let help = nearest(role, known()).unwrap_or_else(|| {
                    format!("set `roles` in the group to some of {}", known().collect::<Vec<_>>().join(", "))
                });
                self.error(span_of(i), format!("group `{name}`: there is no role `{role}`"), help);
                continue;
            };
            if !seen.insert(*role) {
                self.error(
                    span_of(i),
                    format!("group `{name}` has the role `{role}` twice"),
                    "name each role once".to_owned(),
                );
                continue;
            }
            for other in roles.iter().filter(|o| *o != role) {
                if let Some(why) = profile.conflicts.get(*other) {
                    self.error(
                        span_of(i),
                        format!("group `{name}`: `{role}` and `{other}` cannot be on one node: {why}"),
                        "put them in two groups".to_owned(),
                    );
                }
            }
            self.listeners(name, role, &span_of(i), &mut ports);
        }
    }

    fn addresses(&mut self) {
        let fleet = self.fleet;
        let subnet = fleet.mesh.subnet.get_ref().trunc();
        let transport = fleet.mesh.transport.get_ref().trunc();
        if subnet.contains(&transport) || transport.contains(&subnet) {
            self.error(
                fleet.mesh.transport.span(),
                format!("the transport network {transport} overlaps the mesh {subnet}"),
                "give the WireGuard interfaces a network of their own".to_owned(),
            );
        }
        if transport.prefix_len() != subnet.prefix_len() {
            self.error(
                fleet.mesh.transport.span(),
                format!("the transport network {transport} and the mesh {subnet} differ in size"),
                format!("use a /{}", subnet.prefix_len()),
            );
        }
        let usable = |a: Ipv4Addr| subnet.contains(&a) && a != subnet.network() && a != subnet.broadcast();
        let vip = *fleet.vip.address.get_ref();
        if !usable(vip) {
            self.error(
                fleet.vip.address.span(),
                format!("the VIP {vip} is not a host address of the mesh {subnet}"),
                format!("choose an address inside {subnet}"),
            );
        }
        let mut owners: BTreeMap<Ipv4Addr, String> = BTreeMap::from([(vip, "the VIP".to_owned())]);
        let mut nodes = self.topology.nodes.clone();
        // Groups with `first` come last, so a conflict is reported for the range that the user set.
        nodes.sort_by_key(|n| fleet.groups[&n.group].first.is_some());
        let mut reported: BTreeSet<(String, bool)> = BTreeSet::new();
        for node in nodes {
            let group = &fleet.groups[&node.group];
            let in_group = || fleet.source.key(&["groups", &node.group]);
            let span = group.first.as_ref().map_or_else(in_group, Spanned::span);
            // One diagnostic for each group, not for each node.
            if !usable(node.address) {
                if reported.insert((node.group.clone(), false)) {
                    self.error(
                        span,
                        format!("{} would have {}, which is outside the mesh {subnet}", node.name, node.address),
                        "set `first` in the group, or a larger `[mesh] subnet`".to_owned(),
                    );
                }
            } else if let Some(owner) = owners.insert(node.address, node.name.clone())
                && reported.insert((node.group.clone(), true))
            {
                self.error(
                    span,
                    format!("{} and {owner} would both have {}", node.name, node.address),
                    "set `first` in one of the groups so that the ranges do not overlap".to_owned(),
                );
            }
        }
    }

    /// The operators' addresses are a part of the mesh that no node and no VIP has.
    fn operators(&mut self) {
        let fleet = self.fleet;
        let (subnet, Some(operators)) = (fleet.mesh.subnet.get_ref().trunc(), &fleet.mesh.operators) else { return };
        let (range, span) = (operators.get_ref().trunc(), operators.span());
        // A range without a host address between its network and its broadcast address has no use.
        if !subnet.contains(&range) || range == subnet || range.prefix_len() > 30 {
            let fix = format!("choose a part of {subnet} with at least 4 addresses");
            return self.error(span, format!("the operators' network {range} is not a part of the mesh {subnet}"), fix);
        }
        let nodes = self.topology.nodes.iter().map(|node| (node.address, node.name.clone()));
        let owners = nodes.chain([(*fleet.vip.address.get_ref(), "the VIP".to_owned())]);
        let taken = owners.into_iter().find(|(address, _)| range.contains(address));
        if let Some((address, owner)) = taken {
            self.error(
                span,
                format!("the operators' network {range} has {address}, the address of {owner}"),
                "choose a part of the mesh without nodes".to_owned(),
            );
        }
    }

    fn hubs_and_voters(&mut self) {
        let fleet = self.fleet;
        let voters = self.topology.voters.clone();
        if self.topology.hubs.is_empty() && !fleet.groups.is_empty() {
            self.error(
                0..0,
                "no group has the role `hub`".to_owned(),
                "add `[groups.hub]`: hubs run the mesh, the VIP and etcd".to_owned(),
            );
        }
        if let ([only], 2..) = (&voters[..], self.topology.nodes.len()) {
            self.warning(
                0..0,
                format!("etcd has its only vote on {only}: the loss of {only} stops the fleet"),
                "have at least 3 nodes".to_owned(),
            );
        }
        for (name, group) in &fleet.groups {
            let is_hub = group.role_names(name).contains(&"hub");
            let count = usize::from(*group.count.get_ref());
            if is_hub && group.endpoints.len() != count {
                self.error(
                    fleet.source.value(&["groups", name, "endpoints"]),
                    format!("group `{name}` has {count} hubs and {} endpoints", group.endpoints.len()),
                    "name each hub's public address: `endpoints = [\"hub1.example.net\", …]`".to_owned(),
                );
            }
            let mut seen = BTreeSet::new();
            for endpoint in &group.endpoints {
                if !is_host(endpoint.get_ref()) {
                    self.error(
                        endpoint.span(),
                        format!("`{}` is neither a host name nor an address", endpoint.get_ref()),
                        "write it without a port, such as \"hub1.example.net\" or \"198.51.100.7\"".to_owned(),
                    );
                }
                if !seen.insert(endpoint.get_ref()) {
                    self.error(endpoint.span(), format!("`{}` is the endpoint of two nodes", endpoint.get_ref()), None);
                }
            }
        }
    }

    fn disks(&mut self) {
        let Some(size) = &self.fleet.image.root_size else { return };
        let Some(bytes) = parse_size(size.get_ref()) else {
            self.error(
                size.span(),
                format!("`{}` is not a size", size.get_ref()),
                "write a whole number with K, M or G, such as \"640M\"".to_owned(),
            );
            return;
        };
        let fleet = self.fleet;
        let profiles = self.profiles;
        for (name, group) in &fleet.groups {
            for role in group.role_names(name) {
                let need = profiles.get(role).and_then(|p| p.disk.root.as_deref());
                if let Some(need) = need.filter(|n| parse_size(n).is_some_and(|n| n > bytes)) {
                    self.error(
                        size.span(),
                        format!("a root slot of {} is too small: role `{role}` needs {need}", size.get_ref()),
                        format!("set at least `root_size = \"{need}\"`, or leave it out"),
                    );
                }
            }
        }
    }

    fn high_availability(&mut self) {
        for row in ha_table(&self.topology) {
            if row.have < row.minimum {
                let lack = match row.have {
                    0 => format!("no node has the role `{}`", row.role),
                    have => format!("{have} of role `{}`: {}", row.role, row.verdict()),
                };
                self.warning(0..0, lack, format!("have at least {}, better {}", row.minimum, row.recommended));
            }
        }
    }
}

#[cfg(test)]
mod tests;
