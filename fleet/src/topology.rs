//! What follows from a `fleet.toml`: slots, addresses, voters. Baked into every image as
//! `usr/lib/bakehouse/fleet.json`, and the variables every template sees.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

use crate::ports::{ServicePort, services};
use crate::profile::Profiles;
use crate::schema::{Fleet, Group};
use crate::settings::{Alerts, Backup, Database, Firewall, Odoo, Update, Web};

/// The whole fleet, derived.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Topology {
    pub name: String,
    pub version: String,
    pub mesh: MeshPlan,
    pub vip: Ipv4Addr,
    /// Every slot, by group and number.
    pub nodes: Vec<Node>,
    /// Nodes with the role `hub`.
    pub hubs: Vec<Node>,
    /// Nodes that hold an etcd vote: they have the role `voter`.
    pub voters: Vec<String>,
    pub database: Database,
    /// With the node that keeps the backups, if one does.
    pub backup: Backup,
    pub odoo: Odoo,
    pub alerts: Alerts,
    pub firewall: Firewall,
    pub update: Update,
    #[serde(default)]
    pub web: Web,
    /// Ports of the roles' profiles that the built-in table (`ports.rs`) does not have.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub services: Vec<ServicePort>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MeshPlan {
    pub subnet: Ipv4Net,
    pub transport: Ipv4Net,
    pub port: u16,
    pub mtu: u16,
}

/// One slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// `group-number`, also the host name.
    pub name: String,
    pub group: String,
    /// Counted from 1 within the group.
    pub number: u16,
    pub roles: Vec<String>,
    /// The node's own address in the mesh.
    pub address: Ipv4Addr,
    /// Its address on the `WireGuard` interfaces.
    pub transport: Ipv4Addr,
    /// Public `host:port`, where the node has one.
    pub endpoint: Option<String>,
    /// Place among the hubs, counted from 1; 0 for a worker.
    pub hub: u16,
    /// Seconds after which a blank machine may take the slot of an owner that says nothing; none
    /// where what the owner has would be lost with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reclaim_after: Option<u32>,
}

impl Node {
    #[must_use]
    pub fn has_role(&self, role: &str) -> bool {
        self.roles.iter().any(|r| r == role)
    }

    /// Where the node is reached: the endpoint that `endpoints` gives it, else its own of `fleet.toml`.
    #[must_use]
    pub fn endpoint_in(&self, endpoints: &BTreeMap<String, String>) -> Option<String> {
        endpoints.get(&self.name).or(self.endpoint.as_ref()).cloned()
    }
}

/// The role that the fleet gives by itself to the nodes that hold an etcd vote.
pub const VOTER: &str = "voter";
/// The role that the fleet gives by itself to the node that keeps the backups.
pub const BACKUP: &str = "backup";
/// The role that the fleet gives by itself to every node when `[update]` says where images are.
pub const UPDATE: &str = "update";
/// Roles that nobody writes into a `fleet.toml`.
pub const GIVEN: [&str; 4] = ["base", VOTER, BACKUP, UPDATE];

/// Default first host number of a role's address range.
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
    /// Names of a node's WireGuard interfaces: of a hub that which workers come to, and one to each other hub.
    #[must_use]
    pub fn wireguard(&self, node: &Node) -> Vec<String> {
        let own = (node.hub > 0).then(|| "wg0".to_owned());
        let others = self.hubs.iter().filter(|hub| hub.name != node.name).map(|hub| format!("wg-hub{}", hub.hub));
        own.into_iter().chain(others).collect()
    }

    /// Lays the fleet out. Total: a fleet that makes no sense gives a topology that makes
    /// none, and [`crate::lint`] says why.
    #[must_use]
    pub fn of(fleet: &Fleet) -> Self {
        let mesh = MeshPlan {
            subnet: fleet.mesh.subnet.get_ref().trunc(),
            transport: fleet.mesh.transport.get_ref().trunc(),
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
        let hubs = nodes.iter().filter(|n| n.hub > 0).cloned().collect();
        Self {
            name: fleet.name.get_ref().clone(),
            version: fleet.version.get_ref().clone(),
            mesh,
            vip: *fleet.vip.address.get_ref(),
            nodes,
            hubs,
            voters,
            database: fleet.database.get_ref().clone(),
            backup,
            odoo: fleet.odoo.get_ref().clone(),
            alerts: fleet.alerts.get_ref().clone(),
            firewall: fleet.firewall.get_ref().clone(),
            update,
            web: fleet.web.get_ref().clone(),
            services: Vec::new(),
        }
    }

    /// Enters the ports of the roles' profiles that the packet filter has to know.
    pub fn open_ports(&mut self, profiles: &Profiles) {
        self.services = services(&self.nodes, profiles);
    }

    /// Enters which slots may be taken from silent owners: those where every role's profile says
    /// so, after the longest of their times. A founder's is its own.
    pub fn reclaim(&mut self, profiles: &Profiles) {
        let after = |role: &String| profiles.get(role).and_then(|p| p.reclaim_after);
        for i in 0..self.nodes.len() {
            let node = &self.nodes[i];
            let times: Option<Vec<u32>> = node.roles.iter().filter(|r| *r != UPDATE).map(after).collect();
            let founder = self.is_founder(node);
            self.nodes[i].reclaim_after = times.filter(|_| !founder).and_then(|t| t.into_iter().max());
        }
    }

    /// Whether a node makes the fleet, and needs nobody's leave: hubs and voters.
    #[must_use]
    pub fn is_founder(&self, node: &Node) -> bool {
        node.hub > 0 || self.voters.contains(&node.name)
    }

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

/// Who holds an etcd vote: five or three hubs; fewer hubs are joined by monitors, then by
/// the rest in order, until there are three.
fn voters(nodes: &[Node], hubs: &[Node], diskless: &[String]) -> Vec<String> {
    let want = if hubs.len() >= 5 { 5 } else { 3 };
    // A vote is on a disk.
    let with_disk = |n: &&Node| n.hub == 0 && !diskless.contains(&n.group);
    let monitors = nodes.iter().filter(with_disk).filter(|n| n.has_role("monitor"));
    let others = nodes.iter().filter(with_disk).filter(|n| !n.has_role("monitor"));
    let mut voters: Vec<String> =
        hubs.iter().chain(monitors).chain(others).take(want).map(|n| n.name.clone()).collect();
    if voters.len() == 2 {
        // Of two, the loss of either would stop the fleet; of one, only its own.
        voters.truncate(1);
    }
    voters
}

/// Who keeps the backups: not a machine whose loss they are for.
fn keeper(nodes: &[Node]) -> Option<String> {
    let monitor = nodes.iter().find(|n| n.has_role("monitor") && !n.has_role("db"));
    let keeper = monitor.or_else(|| nodes.iter().rfind(|n| !n.has_role("db")));
    keeper.map(|n| n.name.clone())
}

/// `db-2` → (`db`, 2).
#[must_use]
pub fn slot_parts(name: &str) -> Option<(&str, u16)> {
    let (group, number) = name.rsplit_once('-')?;
    Some((group, number.parse().ok().filter(|n| *n > 0)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn topology(text: &str) -> Topology {
        Topology::of(&Fleet::parse("fleet.toml", text.as_bytes()).unwrap())
    }

    #[test]
    fn the_users_own_topology_is_the_default() {
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
    fn two_hubs_borrow_the_monitors_vote() {
        let t = topology("name=\"x\"\n[groups]\nhub.count=2\ndb.count=2\napp.count=2\nmonitor.count=1\n");
        assert_eq!(t.voters, ["hub-1", "hub-2", "monitor-1"]);
    }

    #[test]
    fn five_hubs_give_five_voters_and_four_give_three_and_two_nodes_one() {
        assert_eq!(topology("name=\"x\"\n[groups]\nhub.count=1\ndb.count=1\n").voters, ["hub-1"]);
        assert_eq!(topology("name=\"x\"\n[groups]\nhub.count=2\n").voters, ["hub-1"]);
        let text = "name=\"x\"\n[netboot]\ndiskless=[\"app\"]\n[groups]\nhub.count=2\napp.count=2\n";
        assert_eq!(topology(text).voters, ["hub-1"]);
        assert_eq!(topology("name=\"x\"\n[groups]\nhub.count=5\n").voters.len(), 5);
        assert_eq!(topology("name=\"x\"\n[groups]\nhub.count=4\n").voters.len(), 3);
    }

    #[test]
    fn backups_are_kept_away_from_the_databases() {
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
    fn only_who_keeps_nothing_can_be_replaced_by_a_blank_machine() {
        let mut t = topology(
            "name=\"x\"\n[groups]\nhub.count=3\napp.count=2\nmonitor.count=2\nboth = { count = 1, roles = [\"db\", \"app\"] }\n",
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
        // The backups, the database, a founder.
        assert_eq!((of("monitor-1"), of("both-1"), of("hub-1")), (None, None, None));
    }

    #[test]
    fn slots() {
        assert_eq!(slot_parts("db-2"), Some(("db", 2)));
        assert_eq!(slot_parts("big-db-2"), Some(("big-db", 2)));
        assert_eq!(slot_parts("db-0"), None);
        assert_eq!(slot_parts("db"), None);
    }
}
