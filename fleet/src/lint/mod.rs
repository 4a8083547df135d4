//! Rules of `bakehouse check` for a `fleet.toml` that parses.

mod names;
mod ports;
mod services;

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
#[cfg(feature = "schema")]
pub(crate) use services::ETCD_FOLDERS;

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
            0 => "there is none",
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
/// let topology = fleet::Topology::of(&fleet::Fleet::parse("fleet.toml", toml)?);
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
    let mut lint = Lint { fleet, profiles, topology: Topology::of(fleet), found: Vec::new() };
    lint.names();
    lint.groups();
    lint.addresses();
    lint.hubs_and_voters();
    lint.etcd_folders();
    lint.disks();
    lint.database();
    lint.backup();
    lint.services();
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
                    group.count.span(),
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
        let span_of = |i: usize| group.roles.get(i).map_or_else(|| group.count.span(), Spanned::span);
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
            let span = group.first.as_ref().map_or_else(|| group.count.span(), Spanned::span);
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

    #[test]
    fn warns_about_the_only_vote() {
        let text = "name = \"acme\"\n[groups.hub]\ncount = 2\nendpoints = [\"a\", \"b\"]\n";
        let found = lint(&Fleet::parse("fleet.toml", text.as_bytes()).unwrap(), &profiles());
        assert!(found.iter().any(|d| d.severity == Severity::Warning && d.message.contains("only vote on hub-1")));
        assert!(errors(text).is_empty());
    }

    #[test]
    fn missing_role_differs_from_role_of_one_node() {
        let text = format!("{HUBS}[groups.db]\ncount = 1\n[groups.monitor]\ncount = 1\n");
        let fleet = Fleet::parse("fleet.toml", text.as_bytes()).unwrap();
        let found = lint(&fleet, &profiles()).into_iter().map(|d| d.message);
        let found: Vec<String> = found.filter(|m| m.contains("role")).collect();
        assert_eq!(found, ["1 of role `db`: one failure stops it", "no node has the role `app`"]);
        let verdicts: Vec<&str> = ha_table(&Topology::of(&fleet)).iter().map(HaRow::verdict).collect();
        assert_eq!(verdicts, ["as recommended", "one failure stops it", "there is none", "one failure stops it"]);
    }

    #[track_caller]
    fn one(text: &str, line: usize, message: &str) {
        let found = errors(text);
        let prefix = if line == 0 { "fleet.toml: ".to_owned() } else { format!("fleet.toml:{line}: ") };
        assert!(
            found.len() == 1 && found[0].starts_with(&prefix) && found[0].contains(message),
            "expected {prefix}…{message}…, found {found:#?}"
        );
    }

    #[test]
    fn valid_fleet_has_no_errors() {
        assert_eq!(errors(HUBS), Vec::<String>::new());
    }

    #[test]
    fn each_rule_has_a_line_and_a_message() {
        one(&format!("{HUBS}[groups.db]\ncount = 2\nroles = [\"bd\"]\n"), 7, "did you mean `db`?");
        one(&format!("{HUBS}[groups.db]\ncount = 2\nfirst = \"10.10.0.3\"\n"), 7, "would both have 10.10.0.3");
        one(&format!("{HUBS}[groups.db]\ncount = 2\nfirst = \"10.10.1.3\"\n"), 7, "outside the mesh");
        one(&format!("{HUBS}[vip]\naddress = \"10.9.0.1\"\n"), 6, "the VIP 10.9.0.1");
        one(&HUBS.replacen("acme", "slots", 1), 1, "the hubs use `/bakehouse/slots/` in etcd");
        one(&format!("{HUBS}[netboot]\nothers = \"app\"\n"), 5, "no node or group `app`");
        one(&format!("{HUBS}[netboot.machines]\n\"52:54:00:AA:BB:CC\" = \"hub-1\"\n"), 5, "not a MAC address");
        one(
            &format!("{HUBS}[netboot.machines]\nA1 = \"hub-1\"\nA2 = \"hub-1\"\n"),
            5,
            "two machines have the node `hub-1`",
        );
        one(&format!("{HUBS}[netboot]\ndiskless = [\"app\"]\n"), 5, "no group `app`");
        one(
            &format!(
                "{HUBS}[update]\nurl = \"http://a.example/\"\n[netboot]\ndiskless = [\"app\"]\n\
                 [groups.app]\ncount = 2\n"
            ),
            7,
            "take no updates",
        );
        one(&format!("{HUBS}[netboot]\ndiskless = [\"hub\"]\n"), 5, "hub-1 has an etcd vote");
        one(&format!("{HUBS}[vip]\naddress = \"10.10.0.2\"\n"), 3, "hub-2 and the VIP");
        one(&format!("{HUBS}[mesh]\ntransport = \"10.10.0.0/24\"\n"), 6, "overlaps");
        one(&format!("{HUBS}[groups.a]\ncount = 1\nroles = [\"db\", \"monitor\"]\n"), 7, "both eat the disk");
        one(
            &format!(
                "{HUBS}[groups.a]\ncount = 1\nroles = [\"hub\", \"app\"]\nfirst = \"10.10.0.9\"\nendpoints = [\"d\"]\n"
            ),
            7,
            "both use tcp port 5000",
        );
        one(&format!("{HUBS}[image]\nroot_size = \"500M\"\n[groups.db]\ncount = 2\n"), 6, "role `db` needs 900M");
        one(&format!("{HUBS}[image]\nroot_size = \"big\"\n"), 6, "not a size");
        one(
            "name = \"acme\"\n[groups.hub]\ncount = 3\nendpoints = [\"a:1\", \"b\", \"c\"]\n",
            4,
            "neither a host name",
        );
        one("name = \"acme\"\n[groups.hub]\ncount = 3\nendpoints = [\"a\"]\n", 4, "3 hubs and 1 endpoints");
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
    fn unknown_key_has_line_caret_and_suggestion() {
        let e = Fleet::parse("fleet.toml", b"name = \"x\"\n[groups.hub]\ncuont = 3\n").unwrap_err();
        let shown = e.render(false);
        assert_eq!(e.line, 3);
        assert!(shown.contains("fleet.toml:3") && shown.contains("^^^^^"), "{shown}");
        assert!(shown.contains("did you mean `count`?"), "{shown}");
    }

    #[test]
    fn wrong_type_has_a_line() {
        let e = Fleet::parse("fleet.toml", b"name = \"x\"\n[groups.hub]\ncount = \"three\"\n").unwrap_err();
        assert_eq!(e.line, 3);
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig::with_cases(512))]

        #[test]
        fn parse_never_panics(bytes: Vec<u8>) {
            if let Err(e) = Fleet::parse("fleet.toml", &bytes) {
                drop(e.render(false));
            }
        }

        /// A real file with a replaced slice reaches more of the parser than random bytes.
        #[test]
        fn parse_and_lint_never_panic_on_mutations(
            at in 0usize..200,
            len in 0usize..40,
            with in "[ -~\n]{0,30}|[0-9]{1,12}|\\PC{0,8}",
        ) {
            let text = format!(
                "{HUBS}[mesh]\nsubnet = \"10.10.0.0/24\"\ntransport = \"10.11.0.0/24\"\n\
                 [groups.db]\ncount = 2\nfirst = \"10.10.0.10\"\n"
            );
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
