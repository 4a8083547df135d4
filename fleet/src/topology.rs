//! The topology of a fleet: slots, addresses and voters that follow from its `fleet.toml`. Every image contains it as
//! `usr/lib/bakehouse/fleet.json`, and every template has it as `fleet`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

use crate::alerts::{AlertSecrets, Alerts};
use crate::calendar::point_in_time;
use crate::dns::Dns;
use crate::lan::LanAddress;
use crate::mail::MailSecrets;
use crate::odoo::Odoo;
use crate::ports::{ServicePort, services};
use crate::profile::Profiles;
use crate::schema::{Fleet, Group};
use crate::settings::{Access, Backup, Database, Firewall, Update};
use crate::web::{HubSecrets, Web};

/// Topology and settings of a fleet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Topology {
    /// Name of the fleet.
    pub name: String,
    /// Version of the images.
    pub version: String,
    /// Networks and port of the mesh.
    pub mesh: MeshPlan,
    /// Address that one hub holds.
    pub vip: Ipv4Addr,
    /// Addresses that one hub holds on its local network.
    #[serde(default)]
    pub lan: Vec<LanAddress>,
    /// Whether the hubs' images have a program that moves a floating address (`[vip] hook`).
    #[serde(default)]
    pub hook: bool,
    /// Every slot, sorted by group and number.
    pub nodes: Vec<Node>,
    /// Nodes with the role `hub`.
    pub hubs: Vec<Node>,
    /// Names of the nodes with an etcd vote, which have the role `voter`.
    pub voters: Vec<String>,
    /// Section `[database]`.
    pub database: Database,
    /// Section `[backup]`, with the node that keeps the backups, if there is one.
    pub backup: Backup,
    /// Section `[odoo]`.
    pub odoo: Odoo,
    /// Section `[alerts]`.
    pub alerts: Alerts,
    /// Encrypted passwords of the receivers in `[alerts]`.
    #[serde(default, skip_serializing_if = "AlertSecrets::is_empty")]
    pub alert_secrets: AlertSecrets,
    /// Encrypted password of `[odoo.mail]`.
    #[serde(default, skip_serializing_if = "MailSecrets::is_empty")]
    pub mail_secrets: MailSecrets,
    /// Section `[firewall]`.
    pub firewall: Firewall,
    /// Section `[dns]`.
    #[serde(default)]
    pub dns: Dns,
    /// Section `[update]`.
    pub update: Update,
    /// Section `[web]`.
    #[serde(default)]
    pub web: Web,
    /// Content of the file `[web] certificate`, PEM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub web_certificate: Option<String>,
    /// Encrypted secrets of `[web]`.
    #[serde(default, skip_serializing_if = "HubSecrets::is_empty")]
    pub web_secrets: HubSecrets,
    /// Section `[access]`.
    #[serde(default)]
    pub access: Access,
    /// Ports of the roles' profiles that need a rule in addition to the built-in ones ([`crate::ports`]).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub services: Vec<ServicePort>,
}

/// Networks and port of the mesh.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MeshPlan {
    /// Network of the nodes' own addresses.
    pub subnet: Ipv4Net,
    /// Network of the addresses on the WireGuard interfaces.
    pub transport: Ipv4Net,
    /// Network of the operators' addresses, if hubs accept operators as peers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operators: Option<Ipv4Net>,
    /// `[mesh] port`.
    pub port: u16,
    /// MTU of the WireGuard interfaces, in bytes.
    pub mtu: u16,
}

/// A node of the fleet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Name of the slot, `GROUP-NUMBER`. It is also the host name.
    pub name: String,
    /// Name of the group.
    pub group: String,
    /// Number within the group, counted from 1.
    pub number: u16,
    /// Roles, with those that the fleet assigns ([`GIVEN`]).
    pub roles: Vec<String>,
    /// The node's own address in the mesh.
    pub address: Ipv4Addr,
    /// The node's address on the WireGuard interfaces.
    pub transport: Ipv4Addr,
    /// Public host name or address, without a port.
    pub endpoint: Option<String>,
    /// Number among the hubs, counted from 1; 0 for a worker.
    pub hub: u16,
    /// Seconds without a report of the owner after which a blank machine may take the slot. `None` if the owner may
    /// have the only copy of its data.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reclaim_after: Option<u32>,
}

impl Node {
    /// Whether the node has this role.
    #[must_use]
    pub fn has_role(&self, role: &str) -> bool {
        self.roles.iter().any(|r| r == role)
    }

    /// Returns the node's endpoint: that in `endpoints`, else that of `fleet.toml`.
    #[must_use]
    pub fn endpoint_in(&self, endpoints: &BTreeMap<String, String>) -> Option<String> {
        endpoints.get(&self.name).or(self.endpoint.as_ref()).cloned()
    }
}

/// Role of the nodes with an etcd vote. The fleet assigns it.
pub const VOTER: &str = "voter";
/// Role of the node that keeps the backups. The fleet assigns it.
pub const BACKUP: &str = "backup";
/// Role of every node if `update.url` is set. The fleet assigns it.
pub const UPDATE: &str = "update";
/// Role of every hub if `dns.name` is set. The fleet assigns it.
pub const DNS: &str = "dns";
/// Roles that the fleet assigns. `roles` in `fleet.toml` cannot have them.
pub const GIVEN: [&str; 5] = ["base", VOTER, BACKUP, UPDATE, DNS];

/// Returns the host number of a group's first node, if `first` is not set.
fn first_host(role: &str) -> u32 {
    match role {
        "hub" => 1,
        "db" => 10,
        "app" => 20,
        "monitor" => 30,
        _ => 40,
    }
}

impl Topology {
    /// Returns the names of a node's WireGuard interfaces: one for workers on a hub, and one to each other hub.
    #[must_use]
    pub fn wireguard(&self, node: &Node) -> Vec<String> {
        let own = (node.hub > 0).then(|| "wg0".to_owned());
        let others = self.hubs.iter().filter(|hub| hub.name != node.name).map(|hub| format!("wg-hub{}", hub.hub));
        own.into_iter().chain(others).collect()
    }

    /// Makes the topology of a fleet. An invalid fleet gives an invalid topology without an error, and [`crate::lint`]
    /// reports the reason.
    ///
    /// # Examples
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let toml = b"name = \"acme\"\n[groups]\nhub.count = 3\ndb.count = 2\n";
    /// let topology = fleet::Topology::from_fleet(&fleet::Fleet::parse("fleet.toml", toml)?);
    /// assert_eq!(topology.node("db-2").unwrap().address.to_string(), "10.10.0.11");
    /// assert_eq!(topology.voters, ["hub-1", "hub-2", "hub-3"]);
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn from_fleet(fleet: &Fleet) -> Self {
        let mesh = MeshPlan {
            subnet: fleet.mesh.subnet.get_ref().trunc(),
            transport: fleet.mesh.transport.get_ref().trunc(),
            operators: fleet.mesh.operators.as_ref().map(|range| range.get_ref().trunc()),
            port: fleet.mesh.port,
            mtu: 1420,
        };
        let mut nodes = Vec::new();
        let mut hub_number = 0;
        for (group_name, group) in &fleet.groups {
            let roles = group.role_names(group_name);
            let is_hub = roles.contains(&"hub");
            for i in 0..*group.count.get_ref() {
                let host = host_number(&mesh, group, roles.first().copied().unwrap_or_default(), i);
                hub_number += u16::from(is_hub);
                nodes.push(Node {
                    name: format!("{group_name}-{}", u32::from(i) + 1),
                    group: group_name.clone(),
                    number: i.saturating_add(1),
                    roles: roles.iter().map(|r| (*r).to_owned()).collect(),
                    address: offset(mesh.subnet, host),
                    transport: offset(mesh.transport, host),
                    endpoint: group.endpoints.get(usize::from(i)).map(|e| e.get_ref().clone()),
                    hub: if is_hub { hub_number } else { 0 },
                    reclaim_after: None,
                });
            }
        }
        let hubs: Vec<Node> = nodes.iter().filter(|n| n.hub > 0).cloned().collect();
        let voters = voters(&nodes, &hubs, &fleet.netboot.get_ref().diskless);
        for node in nodes.iter_mut().filter(|n| voters.contains(&n.name)) {
            node.roles.insert(0, VOTER.to_owned());
        }
        let mut backup = fleet.backup.get_ref().clone();
        backup.restore = backup.restore.map(|time| point_in_time(&time).unwrap_or(time));
        if backup.s3.is_none() && nodes.iter().any(|n| n.has_role("db")) {
            backup.node = backup.node.or_else(|| keeper(&nodes));
        }
        for node in nodes.iter_mut().filter(|n| backup.node.as_ref() == Some(&n.name)) {
            node.roles.push(BACKUP.to_owned());
        }
        let mut update = fleet.update.get_ref().clone();
        update.url = update.url.map(|url| url.trim_end_matches('/').to_owned());
        for node in nodes.iter_mut().filter(|_| update.url.is_some()) {
            node.roles.push(UPDATE.to_owned());
        }
        let dns = Dns { name: fleet.dns.get_ref().zone(), ..fleet.dns.get_ref().clone() };
        for node in nodes.iter_mut().filter(|n| n.hub > 0 && dns.name.is_some()) {
            node.roles.push(DNS.to_owned());
        }
        let hubs = nodes.iter().filter(|n| n.hub > 0).cloned().collect();
        Self {
            name: fleet.name.get_ref().clone(),
            version: fleet.version.get_ref().clone(),
            mesh,
            vip: *fleet.vip.address.get_ref(),
            lan: fleet.vip.lan_addresses(),
            hook: fleet.vip.hook.is_some(),
            nodes,
            hubs,
            voters,
            database: fleet.database.get_ref().clone(),
            backup,
            odoo: fleet.odoo.get_ref().on_nodes(),
            alerts: fleet.alerts.get_ref().clone(),
            alert_secrets: AlertSecrets::default(),
            mail_secrets: MailSecrets::default(),
            firewall: fleet.firewall.get_ref().clone(),
            dns,
            update,
            web: fleet.web.get_ref().clone().resolved(),
            web_certificate: None,
            web_secrets: HubSecrets::default(),
            access: fleet.access.get_ref().clone(),
            services: Vec::new(),
        }
    }

    /// Name of the secret with the token of `[vip] hook`.
    pub const HOOK_SECRET: &str = "vip_hook";

    /// Returns the names of the secrets that the hubs can use (`bakehouse secret`).
    #[must_use]
    pub fn hub_secret_names(&self) -> BTreeSet<&str> {
        self.web.secrets().into_iter().chain(self.hook.then_some(Self::HOOK_SECRET)).collect()
    }

    /// Sets `services` to the ports of the roles' profiles that need a rule of their own.
    pub fn open_ports(&mut self, profiles: &Profiles) {
        self.services = services(&self.nodes, profiles);
    }

    /// Sets `reclaim_after` of each node: the longest time of its roles' profiles, if all of them have one. A founder's
    /// slot can never be reclaimed.
    pub fn reclaim(&mut self, profiles: &Profiles) {
        let after = |role: &String| profiles.get(role).and_then(|p| p.reclaim_after);
        for i in 0..self.nodes.len() {
            let node = &self.nodes[i];
            let times: Option<Vec<u32>> =
                node.roles.iter().filter(|r| ![UPDATE, DNS].contains(&r.as_str())).map(after).collect();
            let founder = self.is_founder(node);
            self.nodes[i].reclaim_after = times.filter(|_| !founder).and_then(|t| t.into_iter().max());
        }
    }

    /// Whether a node is a founder (a hub or a voter), which needs no hub to join.
    #[must_use]
    pub fn is_founder(&self, node: &Node) -> bool {
        node.hub > 0 || self.voters.contains(&node.name)
    }

    /// Returns the node with this name.
    #[must_use]
    pub fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.iter().find(|n| n.name == name)
    }
}

fn host_number(mesh: &MeshPlan, group: &Group, role: &str, i: u16) -> u32 {
    let first = match &group.first {
        Some(a) => u32::from(*a.get_ref()).wrapping_sub(u32::from(mesh.subnet.network())),
        None => first_host(role),
    };
    first.wrapping_add(u32::from(i))
}

fn offset(net: Ipv4Net, host: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(net.network()).wrapping_add(host))
}

/// Returns the nodes with an etcd vote: five or three hubs. If there are fewer hubs, monitors and then the other nodes
/// also have a vote, until there are three.
fn voters(nodes: &[Node], hubs: &[Node], diskless: &[String]) -> Vec<String> {
    let want = if hubs.len() >= 5 { 5 } else { 3 };
    // etcd keeps a vote on the disk.
    let with_disk = |n: &&Node| n.hub == 0 && !diskless.contains(&n.group);
    let monitors = nodes.iter().filter(with_disk).filter(|n| n.has_role("monitor"));
    let others = nodes.iter().filter(with_disk).filter(|n| !n.has_role("monitor"));
    let mut voters: Vec<String> =
        hubs.iter().chain(monitors).chain(others).take(want).map(|n| n.name.clone()).collect();
    if voters.len() == 2 {
        // With two voters, the loss of either stops the fleet. With one, only the loss of that one does.
        voters.truncate(1);
    }
    voters
}

/// Returns the node that keeps the backups. It has no database, so one failure does not lose both.
fn keeper(nodes: &[Node]) -> Option<String> {
    let monitor = nodes.iter().find(|n| n.has_role("monitor") && !n.has_role("db"));
    let keeper = monitor.or_else(|| nodes.iter().rfind(|n| !n.has_role("db")));
    keeper.map(|n| n.name.clone())
}

/// Returns the parts of a slot's name.
///
/// # Examples
///
/// ```
/// assert_eq!(fleet::slot_parts("big-db-2"), Some(("big-db", 2)));
/// assert_eq!(fleet::slot_parts("db-0"), None);
/// ```
#[must_use]
pub fn slot_parts(name: &str) -> Option<(&str, u16)> {
    let (group, number) = name.rsplit_once('-')?;
    Some((group, number.parse().ok().filter(|n| *n > 0)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn topology(text: &str) -> Topology {
        Topology::from_fleet(&Fleet::parse("fleet.toml", text.as_bytes()).unwrap())
    }

    #[test]
    fn default_addresses_are_those_of_ha() {
        let t = topology("name = \"x\"\n[groups]\nhub.count = 3\ndb.count = 2\napp.count = 2\nmonitor.count = 1\n");
        let address = |n: &str| t.node(n).unwrap().address.to_string();
        assert_eq!(address("hub-3"), "10.10.0.3");
        assert_eq!(address("db-1"), "10.10.0.10");
        assert_eq!(address("app-2"), "10.10.0.21");
        assert_eq!(address("monitor-1"), "10.10.0.30");
        assert_eq!(t.node("app-2").unwrap().transport.to_string(), "10.11.0.21");
        assert_eq!(t.vip.to_string(), "10.10.0.100");
        assert_eq!(t.voters, ["hub-1", "hub-2", "hub-3"]);
    }

    #[test]
    fn monitor_votes_with_two_hubs() {
        let t = topology("name=\"x\"\n[groups]\nhub.count=2\ndb.count=2\napp.count=2\nmonitor.count=1\n");
        assert_eq!(t.voters, ["hub-1", "hub-2", "monitor-1"]);
    }

    #[test]
    fn number_of_voters_is_odd() {
        assert_eq!(topology("name=\"x\"\n[groups]\nhub.count=1\ndb.count=1\n").voters, ["hub-1"]);
        assert_eq!(topology("name=\"x\"\n[groups]\nhub.count=2\n").voters, ["hub-1"]);
        let text = "name=\"x\"\n[netboot]\ndiskless=[\"app\"]\n[groups]\nhub.count=2\napp.count=2\n";
        assert_eq!(topology(text).voters, ["hub-1"]);
        assert_eq!(topology("name=\"x\"\n[groups]\nhub.count=5\n").voters.len(), 5);
        assert_eq!(topology("name=\"x\"\n[groups]\nhub.count=4\n").voters.len(), 3);
    }

    #[test]
    fn backups_are_not_on_a_database_node() {
        let keeper = |text: &str| topology(text).backup.node;
        let all = "name=\"x\"\n[groups]\nhub.count=3\ndb.count=2\n";
        assert_eq!(keeper(&format!("{all}monitor.count=2\n")).unwrap(), "monitor-1");
        assert_eq!(keeper(all).unwrap(), "hub-3");
        assert_eq!(keeper("name=\"x\"\n[groups]\nall = { count = 3, roles = [\"hub\", \"db\"] }\n"), None);
        assert_eq!(keeper("name=\"x\"\n[groups]\nhub.count=3\n"), None);
        let chosen = topology(&format!("{all}[backup]\nnode = \"db-2\"\n"));
        assert_eq!(chosen.node("db-2").unwrap().roles, ["db", BACKUP]);
    }

    #[test]
    fn only_nodes_without_data_are_reclaimable() {
        let mut t = topology(
            "name=\"x\"\n[groups]\nhub.count=3\napp.count=2\nmonitor.count=2\n\
             both = { count = 1, roles = [\"db\", \"app\"] }\n",
        );
        let profile = |text: &str| crate::profile::Profile::parse("p", text.as_bytes()).unwrap();
        let plain = profile("");
        let profiles = Profiles::from([
            ("app".to_owned(), profile("reclaim_after = 600\n")),
            ("monitor".to_owned(), profile("reclaim_after = 900\n")),
            ("hub".to_owned(), profile("reclaim_after = 60\n")),
            ("db".to_owned(), plain.clone()),
            (BACKUP.to_owned(), plain),
        ]);
        t.reclaim(&profiles);
        let of = |name: &str| t.node(name).unwrap().reclaim_after;
        assert_eq!((of("app-2"), of("monitor-2")), (Some(600), Some(900)));
        // The node with the backups, a database node, a founder.
        assert_eq!((of("monitor-1"), of("both-1"), of("hub-1")), (None, None, None));
    }

    #[test]
    fn slot_parts_rejects_names_without_number() {
        assert_eq!(slot_parts("db-2"), Some(("db", 2)));
        assert_eq!(slot_parts("big-db-2"), Some(("big-db", 2)));
        assert_eq!(slot_parts("db-0"), None);
        assert_eq!(slot_parts("db"), None);
    }
}
