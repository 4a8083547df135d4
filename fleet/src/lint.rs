//! What `bakehouse check` knows of the domain, beyond the shape of the TOML.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::ops::Range;

use serde::Serialize;
use toml::Spanned;

use crate::diagnostic::{Diagnostic, Severity, nearest};
use crate::profile::{Profiles, parse_size};
use crate::schema::{Fleet, Group};
use crate::topology::{GIVEN, Topology};

/// A line of the table of minimum and recommended node counts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HaRow {
    pub role: &'static str,
    pub have: usize,
    pub minimum: usize,
    pub recommended: usize,
}

impl HaRow {
    #[must_use]
    pub fn survives_a_failure(&self) -> bool {
        self.have >= self.minimum
    }
}

/// Seconds until another hub has the VIP and the routes to it: three adverts and three BFD
/// packets at the intervals of the templates, rounded up.
const VIP_MOVES: u16 = 1;
/// Seconds from the end of a dead primary's lease until HAProxy sends writes to the next.
const PROMOTION: u16 = 5;
/// Seconds until HAProxy has taken an application node out: one interval, then two checks.
const APP_IS_OUT: u16 = 3;

/// Node counts by role beside what high availability needs.
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

/// Every rule, over a fleet whose shape is right. Sorted by line.
#[must_use]
pub fn lint(fleet: &Fleet, profiles: &Profiles) -> Vec<Diagnostic> {
    let mut lint = Lint { fleet, profiles, topology: Topology::of(fleet), found: Vec::new() };
    lint.names();
    lint.groups();
    lint.addresses();
    lint.hubs_and_voters();
    lint.disks();
    lint.database();
    lint.backup();
    lint.services();
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
        if !is_dns_label(name.get_ref(), 32) {
            self.error(
                name.span(),
                format!("`{}` can't be a fleet's name", name.get_ref()),
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
                format!("`{text}` can't be an image's version"),
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
                    group.count.span(),
                    format!("`{name}` can't be a group's name"),
                    "use 1 to 20 lower-case letters, digits and `-`, a letter first".to_owned(),
                );
            }
            if *group.count.get_ref() == 0 || *group.count.get_ref() > 4000 {
                self.error(
                    group.count.span(),
                    format!("group `{name}` has {} nodes", group.count.get_ref()),
                    "a group has 1 to 4000; remove the group to have none".to_owned(),
                );
            }
            self.roles_of(name, group);
        }
    }

    fn roles_of(&mut self, name: &str, group: &Group) {
        let profiles = self.profiles;
        let roles = group.role_names(name);
        let span_of = |i: usize| group.roles.get(i).map_or_else(|| group.count.span(), Spanned::span);
        let mut ports: BTreeMap<(u16, &str), (&str, &str)> = BTreeMap::new();
        let mut seen = BTreeSet::new();
        for (i, role) in roles.iter().enumerate() {
            let Some(profile) = profiles.get(*role).filter(|_| !GIVEN.contains(role)) else {
                let known = || profiles.keys().map(String::as_str).filter(|r| !GIVEN.contains(r));
                let help = nearest(role, known()).unwrap_or_else(|| {
                    format!("roles are {}; set `roles = […]` in the group", known().collect::<Vec<_>>().join(", "))
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
                        format!("group `{name}`: `{role}` and `{other}` can't be on one node: {why}"),
                        "put them in two groups".to_owned(),
                    );
                }
            }
            for port in &profile.ports {
                let key = (port.port, port.proto.as_str());
                if let Some((other, service)) = ports.insert(key, (role, &port.service))
                    // The same service in two roles is one listener.
                    && service != port.service
                {
                    self.error(
                        span_of(i),
                        format!(
                            "group `{name}`: {} of `{role}` and {service} of `{other}` both want {} port {}",
                            port.service, port.proto, port.port
                        ),
                        "put the roles in two groups".to_owned(),
                    );
                }
            }
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
        // A range that was chosen by hand is the one to blame.
        nodes.sort_by_key(|n| fleet.groups[&n.group].first.is_some());
        let mut told: BTreeSet<(String, bool)> = BTreeSet::new();
        for node in nodes {
            let group = &fleet.groups[&node.group];
            let span = group.first.as_ref().map_or_else(|| group.count.span(), Spanned::span);
            // A group that runs out of the subnet, or into another, is told once, not per node.
            if !usable(node.address) {
                if told.insert((node.group.clone(), false)) {
                    self.error(
                        span,
                        format!("{} would have {}, which is outside the mesh {subnet}", node.name, node.address),
                        "set `first` in the group, or a larger `[mesh] subnet`".to_owned(),
                    );
                }
            } else if let Some(owner) = owners.insert(node.address, node.name.clone())
                && told.insert((node.group.clone(), true))
            {
                self.error(
                    span,
                    format!("{} and {owner} would both have {}", node.name, node.address),
                    "set `first` in one of the groups so that the ranges don't meet".to_owned(),
                );
            }
        }
    }

    fn hubs_and_voters(&mut self) {
        let fleet = self.fleet;
        let voters = self.topology.voters.clone();
        if self.topology.hubs.is_empty() && !fleet.groups.is_empty() {
            self.error(
                0..0,
                "no group has the role `hub`".to_owned(),
                "add `[groups.hub]`: hubs carry the mesh, the VIP and etcd".to_owned(),
            );
        }
        if voters.len() == 2 {
            self.error(
                0..0,
                format!("etcd would have 2 voters ({}): losing either stops the fleet", voters.join(", ")),
                "have at least 3 nodes".to_owned(),
            );
        }
        for (name, group) in &fleet.groups {
            let is_hub = group.role_names(name).contains(&"hub");
            let count = usize::from(*group.count.get_ref());
            if is_hub && group.endpoints.len() != count {
                self.error(
                    group.endpoints.first().map_or_else(|| group.count.span(), Spanned::span),
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

    /// What Patroni itself insists on, said before a node is built with it.
    fn database(&mut self) {
        let span = self.fleet.database.span();
        let d = self.fleet.database.get_ref().clone();
        for (key, value, least) in
            [("ttl", d.ttl, 20), ("loop_wait", d.loop_wait, 1), ("retry_timeout", d.retry_timeout, 3)]
        {
            if value < least {
                self.error(
                    span.clone(),
                    format!("[database] {key} is {value} s, less than Patroni allows"),
                    format!("set at least {key} = {least}"),
                );
            }
        }
        let sum = u32::from(d.loop_wait) + 2 * u32::from(d.retry_timeout);
        if sum > u32::from(d.ttl) {
            self.error(
                span,
                format!(
                    "[database] loop_wait + 2 × retry_timeout is {sum} s, more than ttl ({} s): a primary that is only slow would lose its lease",
                    d.ttl
                ),
                format!("set ttl = {sum}, or lower the others"),
            );
        }
    }

    fn backup(&mut self) {
        let fleet = self.fleet;
        let (backup, span) = (fleet.backup.get_ref(), fleet.backup.span());
        let has_databases = self.topology.nodes.iter().any(|n| n.has_role("db"));
        if let (Some(node), Some(_)) = (&backup.node, &backup.s3) {
            self.error(
                span.clone(),
                format!("[backup] has both the node `{node}` and s3"),
                "leave one of them out".to_owned(),
            );
        }
        if let Some(node) = backup.node.as_ref().filter(|n| self.topology.node(n).is_none()) {
            let help = nearest(node, self.topology.nodes.iter().map(|n| n.name.as_str()));
            self.error(span.clone(), format!("[backup] there is no node `{node}`"), help);
        }
        let keeper = self.topology.backup.node.as_ref().and_then(|n| self.topology.node(n)).cloned();
        if let Some(name) = keeper.as_ref().filter(|n| n.has_role("db")).map(|n| &n.name) {
            self.warning(
                span.clone(),
                format!("[backup] {name} has the database and its backups: one machine loses both"),
                "name a node without the role `db`, or an S3 bucket".to_owned(),
            );
        }
        if has_databases && keeper.is_none() && backup.s3.is_none() && backup.node.is_none() {
            self.warning(
                span.clone(),
                "there are no backups: every node has the role `db`".to_owned(),
                "add `[backup.s3]`, or name a node: `[backup] node = …`".to_owned(),
            );
        }
        if backup.keep == 0 {
            self.error(span.clone(), "[backup] keep = 0 keeps nothing".to_owned(), "keep at least 1".to_owned());
        }
        let s3 = backup.s3.iter().flat_map(|s| [&s.bucket, &s.endpoint, &s.region]);
        for text in [&backup.full, &backup.incremental].into_iter().chain(&backup.restore).chain(s3) {
            if text.is_empty() || text.contains(|c: char| c.is_control() || "\"'%\\$".contains(c)) {
                self.error(
                    span.clone(),
                    format!("[backup] `{}` can't be written into a configuration", text.escape_debug()),
                    None,
                );
            }
        }
    }

    fn services(&mut self) {
        let fleet = self.fleet;
        let odoo = fleet.odoo.get_ref();
        for language in &odoo.languages {
            let (main, rest) = language.split_once(['_', '@']).map_or((language.as_str(), None), |(m, r)| (m, Some(r)));
            let good = (2..=3).contains(&main.len())
                && main.chars().all(|c| c.is_ascii_lowercase())
                && rest.is_none_or(|r| !r.is_empty() && r.chars().all(|c| c.is_ascii_alphanumeric()));
            if !good {
                self.error(
                    fleet.odoo.span(),
                    format!("[odoo] `{language}` is not a language"),
                    "write it as Odoo does, such as \"de\" or \"pt_BR\"".to_owned(),
                );
            }
        }
        if !is_identifier(&odoo.database) {
            self.error(
                fleet.odoo.span(),
                format!("[odoo] `{}` can't be a database's name", odoo.database),
                "use lower-case letters, digits and `_`, a letter first".to_owned(),
            );
        }
        for module in odoo.modules.iter().filter(|m| !is_identifier(m)) {
            self.error(fleet.odoo.span(), format!("[odoo] `{module}` can't be an add-on's name"), None);
        }
        for role in fleet.firewall.get_ref().open.iter().filter_map(|open| open.role.as_ref()) {
            if !self.profiles.contains_key(role) {
                let help = nearest(role, self.profiles.keys().map(String::as_str));
                self.error(fleet.firewall.span(), format!("[firewall] there is no role `{role}`"), help);
            }
        }
        let alerts = fleet.alerts.get_ref();
        for url in alerts.webhooks.iter().chain(&alerts.dead_man) {
            if !(url.starts_with("http://") || url.starts_with("https://")) || url.contains(char::is_whitespace) {
                self.error(
                    fleet.alerts.span(),
                    format!("[alerts] `{url}` is not an address"),
                    "it begins with https:// or http://".to_owned(),
                );
            }
        }
        let watched = self.topology.nodes.iter().any(|n| n.has_role("monitor"));
        if watched && alerts.email.is_none() && alerts.webhooks.is_empty() {
            self.warning(
                fleet.alerts.span(),
                "nobody is told of failures: [alerts] names no e-mail and no webhook".to_owned(),
                "add `[alerts] webhooks = [\"https://…\"]` or `[alerts.email]`".to_owned(),
            );
        }
    }

    /// A promise that the time-outs can't keep is not one.
    fn promises(&mut self) {
        let promise = self.fleet.promise.get_ref().clone();
        let ttl = self.fleet.database.get_ref().ttl;
        for (key, promised, takes, why) in [
            ("vip", promise.vip, VIP_MOVES, "missed VRRP adverts and BFD"),
            ("database", promise.database, ttl.saturating_add(PROMOTION), "the lease's ttl, promotion, a health check"),
            ("app", promise.app, APP_IS_OUT, "two failed health checks"),
        ] {
            if promised < takes {
                self.error(
                    self.fleet.promise.span(),
                    format!("[promise] {key} = {promised} s can't be kept: it may take {takes} s ({why})"),
                    if key == "database" {
                        format!("raise it, or lower [database] ttl (now {ttl}, at least 20)")
                    } else {
                        format!("promise at least {takes}")
                    },
                );
            }
        }
    }

    fn high_availability(&mut self) {
        for row in ha_table(&self.topology) {
            if !row.survives_a_failure() {
                self.warning(
                    0..0,
                    format!("{} of role `{}`: a failure of one stops the service", row.have, row.role),
                    format!("have at least {}, better {}", row.minimum, row.recommended),
                );
            }
        }
    }
}

fn is_dns_label(text: &str, longest: usize) -> bool {
    text.len() <= longest
        && text.starts_with(|c: char| c.is_ascii_lowercase())
        && !text.ends_with('-')
        && text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
}

fn is_identifier(text: &str) -> bool {
    text.len() <= 60
        && text.starts_with(|c: char| c.is_ascii_lowercase())
        && text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
}

fn is_host(text: &str) -> bool {
    text.len() <= 253
        && !text.is_empty()
        && text.split('.').all(|label| {
            (1..=63).contains(&label.len())
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profiles() -> Profiles {
        let role = |text: &str| crate::Profile::parse("p", text.as_bytes()).unwrap();
        BTreeMap::from([
            ("base".to_owned(), role("")),
            ("hub".to_owned(), role("[[ports]]\nport=5000\nproto=\"tcp\"\nservice=\"haproxy\"\n")),
            ("db".to_owned(), role("conflicts.monitor = \"both eat the disk\"\ndisk.root = \"900M\"\n")),
            ("app".to_owned(), role("[[ports]]\nport=5000\nproto=\"tcp\"\nservice=\"other\"\n")),
            ("monitor".to_owned(), role("")),
        ])
    }

    fn errors(text: &str) -> Vec<String> {
        let fleet = Fleet::parse("fleet.toml", text.as_bytes()).unwrap();
        lint(&fleet, &profiles()).into_iter().filter(|d| d.severity == Severity::Error).map(|d| d.to_string()).collect()
    }

    const HUBS: &str = "name = \"acme\"\n[groups.hub]\ncount = 3\nendpoints = [\"a\", \"b\", \"c\"]\n";

    #[track_caller]
    fn one(text: &str, line: usize, words: &str) {
        let found = errors(text);
        let prefix = if line == 0 { "fleet.toml: ".to_owned() } else { format!("fleet.toml:{line}: ") };
        assert!(
            found.len() == 1 && found[0].starts_with(&prefix) && found[0].contains(words),
            "expected {prefix}…{words}…, found {found:#?}"
        );
    }

    #[test]
    fn a_good_fleet_has_no_errors() {
        assert_eq!(errors(HUBS), Vec::<String>::new());
    }

    #[test]
    fn each_rule_names_line_and_thing() {
        one(&format!("{HUBS}[groups.db]\ncount = 2\nroles = [\"bd\"]\n"), 7, "did you mean `db`?");
        one(&format!("{HUBS}[groups.db]\ncount = 2\nfirst = \"10.10.0.3\"\n"), 7, "would both have 10.10.0.3");
        one(&format!("{HUBS}[groups.db]\ncount = 2\nfirst = \"10.10.1.3\"\n"), 7, "outside the mesh");
        one(&format!("{HUBS}[vip]\naddress = \"10.9.0.1\"\n"), 6, "the VIP 10.9.0.1");
        one(&format!("{HUBS}[vip]\naddress = \"10.10.0.2\"\n"), 3, "hub-2 and the VIP");
        one(&format!("{HUBS}[mesh]\ntransport = \"10.10.0.0/24\"\n"), 6, "overlaps");
        one(&format!("{HUBS}[groups.a]\ncount = 1\nroles = [\"db\", \"monitor\"]\n"), 7, "both eat the disk");
        one(
            &format!(
                "{HUBS}[groups.a]\ncount = 1\nroles = [\"hub\", \"app\"]\nfirst = \"10.10.0.9\"\nendpoints = [\"d\"]\n"
            ),
            7,
            "both want tcp port 5000",
        );
        one(&format!("{HUBS}[image]\nroot_size = \"500M\"\n[groups.db]\ncount = 2\n"), 6, "role `db` needs 900M");
        one(&format!("{HUBS}[image]\nroot_size = \"big\"\n"), 6, "not a size");
        one(
            "name = \"acme\"\n[groups.hub]\ncount = 3\nendpoints = [\"a:1\", \"b\", \"c\"]\n",
            4,
            "neither a host name",
        );
        one("name = \"acme\"\n[groups.hub]\ncount = 3\nendpoints = [\"a\"]\n", 4, "3 hubs and 1 endpoints");
        one("name = \"acme\"\n[groups.hub]\ncount = 2\nendpoints = [\"a\", \"b\"]\n", 0, "2 voters");
        one("name = \"acme\"\nversion = \"1_2\"\n[groups.hub]\ncount = 1\nendpoints = [\"a\"]\n", 2, "image's version");
        one("name = \"Acme\"\n[groups.hub]\ncount = 1\nendpoints = [\"a\"]\n", 1, "fleet's name");
        one("name = \"acme\"\n", 0, "no groups");
        one(&format!("{HUBS}[database]\nttl = 19\n"), 5, "less than Patroni allows");
        one(&format!("{HUBS}[database]\nloop_wait = 10\n"), 5, "22 s, more than ttl (20 s)");
        one(&format!("{HUBS}[promise]\ndatabase = 8\n"), 5, "it may take 25 s");
        one(&format!("{HUBS}[odoo]\nlanguages = [\"German\"]\n"), 5, "not a language");
        one(&format!("{HUBS}[odoo]\ndatabase = \"my db\"\n"), 5, "database's name");
        one(&format!("{HUBS}[alerts]\nwebhooks = [\"me@example.net\"]\n"), 5, "not an address");
        one(
            &format!("{HUBS}[firewall]\nopen = [{{ port = 22, proto = \"tcp\", role = \"hud\" }}]\n"),
            5,
            "did you mean `hub`?",
        );
    }

    #[test]
    fn an_unknown_key_has_a_line_a_caret_and_a_suggestion() {
        let e = Fleet::parse("fleet.toml", b"name = \"x\"\n[groups.hub]\ncuont = 3\n").unwrap_err();
        let shown = e.render(false);
        assert_eq!(e.line, 3);
        assert!(shown.contains("fleet.toml:3") && shown.contains("^^^^^"), "{shown}");
        assert!(shown.contains("did you mean `count`?"), "{shown}");
    }

    #[test]
    fn a_wrong_type_has_a_line() {
        let e = Fleet::parse("fleet.toml", b"name = \"x\"\n[groups.hub]\ncount = \"three\"\n").unwrap_err();
        assert_eq!(e.line, 3);
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig::with_cases(512))]

        #[test]
        fn no_byte_string_makes_the_loader_panic(bytes: Vec<u8>) {
            if let Err(e) = Fleet::parse("fleet.toml", &bytes) {
                drop(e.render(false));
            }
        }

        /// Near-miss files: real text with a slice replaced, which reaches far more of the loader.
        #[test]
        fn no_mutation_makes_load_or_lint_panic(at in 0usize..200, len in 0usize..40, with in "[ -~\n]{0,30}|[0-9]{1,12}|\\PC{0,8}") {
            let text = format!("{HUBS}[mesh]\nsubnet = \"10.10.0.0/24\"\ntransport = \"10.11.0.0/24\"\n[groups.db]\ncount = 2\nfirst = \"10.10.0.10\"\n");
            let at = at.min(text.len());
            let end = (at + len).min(text.len());
            let mutated = format!("{}{with}{}", &text[..at], &text[end..]);
            match Fleet::parse("fleet.toml", mutated.as_bytes()) {
                Ok(fleet) => lint(&fleet, &profiles()).iter().for_each(|d| drop(d.render(false))),
                Err(e) => drop(e.render(false)),
            }
        }
    }
}
