//! Ports of the fleet and the nodes that may reach them. The packet filter (`overlays/nftables`), `docs/ports.md` and
//! the tests use this table.

mod filter;
mod page;

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

pub use filter::Filter;
pub use page::page;

use crate::node_api::NODE_API_PORT;
use crate::profile::{Port, Profiles};
use crate::settings::Proto;
use crate::topology::{BACKUP, DNS, Node, Topology, VOTER};

/// One end of a [`Rule`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Party<'a> {
    /// Nodes with this role.
    Role(&'a str),
    /// Every node of the fleet.
    Member,
    /// Every address that reaches the node, over the mesh or over its uplink.
    Public,
    /// The destination itself, and no other machine.
    Itself,
    /// Operators with WireGuard: the addresses of `[mesh] operators`. A hub translates them to its own address.
    Operator,
}

/// Protocol of a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// ICMP, which has no ports.
    Icmp,
    /// VRRP, which has no ports.
    Vrrp,
}

/// Ports of a rule's destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Ports {
    /// The protocol has no ports.
    None,
    /// This port.
    One(u16),
    /// `[mesh] port`.
    Mesh,
    /// `[mesh] port` and the next ports, one for each hub.
    MeshAndLinks,
}

/// Network to which a rule applies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Network {
    /// Nodes' own addresses and the VIP.
    Mesh,
    /// Addresses of the WireGuard interfaces. Hubs do not forward packets of these links.
    Transport,
}

/// A permission. The packet filter drops what has no rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule<'a> {
    /// Source of the connection.
    pub from: Party<'a>,
    /// Destination of the connection.
    pub to: Party<'a>,
    /// Protocol.
    pub protocol: Protocol,
    /// Ports of the destination.
    pub ports: Ports,
    /// Service that needs the rule.
    pub why: &'a str,
    network: Network,
}

const HUB: Party = Party::Role("hub");
const DB: Party = Party::Role("db");
const APP: Party = Party::Role("app");
const MONITOR: Party = Party::Role("monitor");
const VOTERS: Party = Party::Role(VOTER);
const KEEPER: Party = Party::Role(BACKUP);
const NAMES: Party = Party::Role(DNS);

const fn tcp(from: Party<'static>, to: Party<'static>, port: u16, why: &'static str) -> Rule<'static> {
    Rule { from, to, protocol: Protocol::Tcp, ports: Ports::One(port), why, network: Network::Mesh }
}

const fn link(
    from: Party<'static>,
    to: Party<'static>,
    protocol: Protocol,
    port: u16,
    why: &'static str,
) -> Rule<'static> {
    Rule { from, to, protocol, ports: Ports::One(port), why, network: Network::Transport }
}

const fn other(
    from: Party<'static>,
    to: Party<'static>,
    protocol: Protocol,
    ports: Ports,
    why: &'static str,
) -> Rule<'static> {
    Rule { from, to, protocol, ports, why, network: Network::Mesh }
}

const RULES: &[Rule] = &[
    other(Party::Public, HUB, Protocol::Udp, Ports::MeshAndLinks, "WireGuard"),
    other(Party::Public, HUB, Protocol::Tcp, Ports::Mesh, "join API"),
    tcp(Party::Public, HUB, 80, "Odoo for browsers, and its health for the monitor"),
    tcp(Party::Public, HUB, 443, "Odoo for browsers"),
    other(Party::Public, NAMES, Protocol::Udp, Ports::One(53), "name service of `[dns]`"),
    tcp(Party::Public, NAMES, 53, "name service of `[dns]`"),
    other(Party::Public, Party::Member, Protocol::Icmp, Ports::None, "errors on a path, path MTU, reachability"),
    link(Party::Member, HUB, Protocol::Tcp, 179, "BGP, on the link between the two"),
    link(HUB, Party::Member, Protocol::Tcp, 179, "BGP, on the link between the two"),
    link(Party::Member, HUB, Protocol::Udp, 3784, "BFD, on the link between the two"),
    link(HUB, Party::Member, Protocol::Udp, 3784, "BFD, on the link between the two"),
    other(HUB, HUB, Protocol::Vrrp, Ports::None, "keepalived: which hub holds the VIP"),
    tcp(HUB, VOTERS, 2379, "etcd's clients: the hubs' agents"),
    tcp(DB, VOTERS, 2379, "etcd's clients: Patroni"),
    tcp(VOTERS, VOTERS, 2380, "between etcd members"),
    tcp(MONITOR, VOTERS, 2381, "etcd's metrics"),
    tcp(APP, DB, 5432, "PostgreSQL, by HAProxy on the application node"),
    tcp(HUB, DB, 5432, "PostgreSQL, by HAProxy on the hub"),
    tcp(DB, DB, 5432, "replication, copies and pg_rewind"),
    tcp(APP, DB, 8008, "Patroni: HAProxy checks which database accepts writes"),
    tcp(HUB, DB, 8008, "Patroni: HAProxy checks which database accepts writes"),
    tcp(DB, DB, 8008, "between Patroni members"),
    tcp(MONITOR, DB, 8008, "Patroni's metrics"),
    tcp(MONITOR, DB, 9187, "PostgreSQL's metrics"),
    tcp(DB, KEEPER, 8432, "pgBackRest: WAL and restores"),
    tcp(KEEPER, DB, 8432, "pgBackRest: backups"),
    tcp(APP, HUB, 5000, "PostgreSQL's primary behind the VIP"),
    tcp(DB, HUB, 5000, "PostgreSQL's primary behind the VIP, for an operator on a database node"),
    tcp(MONITOR, HUB, 5000, "the monitor checks that writes succeed"),
    tcp(APP, HUB, 5001, "PostgreSQL's standbys behind the VIP"),
    tcp(DB, HUB, 5001, "PostgreSQL's standbys behind the VIP, for an operator on a database node"),
    tcp(Party::Itself, APP, 5000, "PostgreSQL's primary for Odoo, on loopback"),
    tcp(HUB, APP, 8069, "Odoo's pages, by HAProxy"),
    tcp(MONITOR, APP, 8069, "the monitor checks that Odoo answers"),
    tcp(HUB, APP, 8072, "Odoo's websockets, by HAProxy"),
    tcp(MONITOR, HUB, 8404, "HAProxy's metrics and page"),
    tcp(MONITOR, APP, 8404, "HAProxy's metrics and page"),
    tcp(MONITOR, MONITOR, 9090, "each monitor checks the other's Prometheus"),
    tcp(MONITOR, MONITOR, 9093, "Prometheus sends alerts to every Alertmanager"),
    tcp(MONITOR, MONITOR, 9094, "between Alertmanagers"),
    other(MONITOR, MONITOR, Protocol::Udp, Ports::One(9094), "between Alertmanagers"),
    tcp(Party::Itself, MONITOR, 9115, "blackbox exporter, for Prometheus on the same node"),
    tcp(Party::Member, MONITOR, 19532, "journals: every node uploads its own to every monitor"),
    tcp(Party::Member, MONITOR, 19533, "journals: the last entry that the monitor has of the node that asks"),
    tcp(MONITOR, Party::Member, 9100, "the node's metrics"),
    tcp(MONITOR, Party::Member, 9324, "BIRD's metrics"),
    tcp(HUB, Party::Member, NODE_API_PORT, "node API: operators, forwarded by a hub"),
    tcp(Party::Operator, Party::Member, NODE_API_PORT, "node API: operators with WireGuard, through their hub"),
    other(Party::Operator, HUB, Protocol::Tcp, Ports::Mesh, "hubs' API for operators with WireGuard"),
];

/// Returns the built-in rules, in the order of `docs/ports.md`.
#[must_use]
pub fn rows() -> &'static [Rule<'static>] {
    RULES
}

/// A port of a role's profile that the built-in rules do not cover, with the roles that may reach it. The topology in
/// the image contains it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServicePort {
    /// Role that listens.
    pub role: String,
    /// Port number.
    pub port: u16,
    /// Transport protocol.
    pub proto: Proto,
    /// Name of the service that listens.
    pub service: String,
    /// Roles that may reach the port.
    pub from: Vec<String>,
}

/// Value for every node in a profile's `from`.
pub const EVERY: &str = "every";

/// Whether a built-in rule covers this port of a role's profile.
#[must_use]
pub fn has_rule(role: &str, port: &Port) -> bool {
    let is_its = |to: Party| to == Party::Role(role) || to == Party::Member && role == "base";
    let number = |ports: Ports| match ports {
        Ports::One(number) => number == port.port,
        // The profile has the default of `[mesh] port`, so the service's name identifies the port.
        Ports::Mesh | Ports::MeshAndLinks => port.service == "wireguard" || port.service == "firstboot",
        Ports::None => false,
    };
    RULES.iter().any(|r| is_its(r.to) && r.protocol == Protocol::from(port.proto) && number(r.ports))
}

/// Returns the ports of the profiles of roles in use that need a rule in addition to the built-in ones: ports with
/// `from`, and ports that no rule covers, which every member may reach.
#[must_use]
pub(crate) fn services(nodes: &[Node], profiles: &Profiles) -> Vec<ServicePort> {
    let used: BTreeSet<&str> = nodes.iter().flat_map(|n| n.roles.iter().map(String::as_str)).chain(["base"]).collect();
    let of = |role: &&str| profiles.get(*role).map(|p| ((*role).to_owned(), p));
    let ports = used.iter().filter_map(of).flat_map(|(role, p)| p.ports.iter().map(move |port| (role.clone(), port)));
    ports
        .filter_map(|(role, port)| {
            let from = match &port.from {
                Some(from) => from.clone(),
                None if has_rule(&role, port) => return None,
                None => vec![EVERY.to_owned()],
            };
            Some(ServicePort { role, port: port.port, proto: port.proto, service: port.service.clone(), from })
        })
        .collect()
}

/// Returns every rule of a fleet: the built-in rules, those of its profiles, and `[firewall] open`.
#[must_use]
pub fn rules(topology: &Topology) -> Vec<Rule<'_>> {
    let services = topology.services.iter().flat_map(|s| {
        s.from.iter().map(|from| Rule {
            from: Party::for_role(from),
            to: Party::for_role(&s.role),
            protocol: s.proto.into(),
            ports: Ports::One(s.port),
            why: &s.service,
            network: Network::Mesh,
        })
    });
    let open = topology.firewall.open.iter().map(|open| Rule {
        from: Party::Public,
        to: open.role.as_deref().map_or(Party::Member, Party::for_role),
        protocol: open.proto.into(),
        ports: Ports::One(open.port),
        why: "[firewall] open",
        network: Network::Mesh,
    });
    RULES.iter().copied().chain(services).chain(open).collect()
}

/// Whether `from` reaches `port` of `to` over the mesh. Protocols without ports ignore `port`. A node reaches all its
/// own ports.
#[must_use]
pub fn allowed(topology: &Topology, from: &Node, to: &Node, protocol: Protocol, port: u16) -> bool {
    from.name == to.name
        || rules(topology)
            .iter()
            .any(|r| r.is_inside() && r.is_about(topology, protocol, port) && r.from.has(from) && r.to.has(to))
}

/// Whether an address outside the fleet reaches `port` of `to`.
#[must_use]
pub fn allowed_from_outside(topology: &Topology, to: &Node, protocol: Protocol, port: u16) -> bool {
    rules(topology).iter().any(|r| r.from == Party::Public && r.is_about(topology, protocol, port) && r.to.has(to))
}

impl<'a> Party<'a> {
    fn for_role(role: &'a str) -> Self {
        if role == EVERY || role == "base" { Self::Member } else { Self::Role(role) }
    }

    /// Whether `node` belongs to the party, seen from another node.
    fn has(self, node: &Node) -> bool {
        match self {
            Self::Role(role) => node.has_role(role),
            Self::Member | Self::Public => true,
            // An operator is not a node.
            Self::Itself | Self::Operator => false,
        }
    }

    /// Returns the name of the set of the party's addresses.
    fn set(self, network: Network) -> String {
        let name = match self {
            Self::Role(role) => role,
            Self::Member | Self::Public | Self::Itself | Self::Operator => EVERY,
        };
        let plain = |c: char| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' };
        let kind = if network == Network::Mesh { "role" } else { "link" };
        format!("{kind}_{}", name.chars().map(plain).collect::<String>())
    }

    /// Returns the addresses of the party's nodes. The VIP counts as an address of the hubs.
    fn addresses(self, topology: &Topology, network: Network) -> BTreeSet<Ipv4Addr> {
        let nodes = topology.nodes.iter().filter(|n| self.has(n));
        match network {
            Network::Transport => nodes.map(|n| n.transport).collect(),
            Network::Mesh => {
                let vip = (self.has_hubs() && !topology.hubs.is_empty()).then_some(topology.vip);
                nodes.map(|n| n.address).chain(vip).collect()
            }
        }
    }

    fn has_hubs(self) -> bool {
        matches!(self, Self::Role("hub") | Self::Member | Self::Public)
    }
}

impl Ports {
    /// Returns the first and the last port, inclusive; `None` for a protocol without ports.
    #[must_use]
    pub fn range(self, topology: &Topology) -> Option<RangeInclusive<u16>> {
        let mesh = topology.mesh.port;
        match self {
            Self::None => None,
            Self::One(port) => Some(port..=port),
            Self::Mesh => Some(mesh..=mesh),
            Self::MeshAndLinks => {
                Some(mesh..=mesh.saturating_add(u16::try_from(topology.hubs.len()).unwrap_or(u16::MAX)))
            }
        }
    }
}

impl Rule<'_> {
    /// Whether the rule applies to packets inside the mesh. WireGuard's own packets are outside it.
    fn is_inside(&self) -> bool {
        self.ports != Ports::MeshAndLinks
    }

    fn is_bfd(&self) -> bool {
        self.network == Network::Transport && self.protocol == Protocol::Udp
    }

    fn is_about(&self, topology: &Topology, protocol: Protocol, port: u16) -> bool {
        self.protocol == protocol && self.ports.range(topology).is_none_or(|range| range.contains(&port))
    }

    /// Whether the rule permits connections between two different nodes, neither of which is `without`.
    fn is_between(&self, topology: &Topology, without: &Node) -> bool {
        let others = || topology.nodes.iter().filter(|n| n.name != without.name);
        let mut from = others().filter(|n| self.from.has(n)).take(2).peekable();
        let Some(first) = from.peek().map(|n| n.name.clone()) else { return false };
        let one = from.count() == 1;
        others().any(|n| self.to.has(n) && !(one && n.name == first))
    }
}

impl From<Proto> for Protocol {
    fn from(proto: Proto) -> Self {
        match proto {
            Proto::Tcp => Self::Tcp,
            Proto::Udp => Self::Udp,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Fleet, Profile};

    fn topology(text: &str) -> Topology {
        Topology::from_fleet(&Fleet::parse("fleet.toml", text.as_bytes()).unwrap())
    }

    const HA: &str = "name = \"x\"\n[groups]\nhub.count = 3\ndb.count = 2\napp.count = 2\nmonitor.count = 2\n";

    #[test]
    fn compromised_app_node_reaches_neither_etcd_nor_vrrp() {
        let t = topology(HA);
        let may = |from: &str, to: &str, protocol, port| {
            allowed(&t, t.node(from).unwrap(), t.node(to).unwrap(), protocol, port)
        };
        for (protocol, port) in [
            (Protocol::Tcp, 2379),
            (Protocol::Tcp, 2380),
            (Protocol::Tcp, 2381),
            (Protocol::Tcp, 8404),
            (Protocol::Vrrp, 0),
        ] {
            assert!(!may("app-1", "hub-1", protocol, port), "{protocol} {port}");
        }
        assert!(!may("app-1", "app-2", Protocol::Tcp, 8069));
        for port in [9090, 9093, 9094, 9115] {
            assert!(!may("app-1", "monitor-1", Protocol::Tcp, port), "{port}");
        }
        assert!(may("app-1", "db-1", Protocol::Tcp, 5432) && !may("monitor-1", "db-1", Protocol::Tcp, 5432));
        assert!(may("hub-2", "hub-1", Protocol::Vrrp, 0) && may("db-1", "hub-1", Protocol::Tcp, 2379));
        assert!(may("monitor-1", "monitor-1", Protocol::Tcp, 9115));
        let outside = |to: &str, protocol, port| allowed_from_outside(&t, t.node(to).unwrap(), protocol, port);
        assert!(outside("hub-1", Protocol::Udp, 51823) && !outside("hub-1", Protocol::Udp, 51824));
        assert!(outside("hub-1", Protocol::Tcp, 443) && !outside("app-1", Protocol::Tcp, 443));
    }

    #[test]
    fn profile_key_from_limits_its_ports() {
        let profile = |text: &str| Profile::parse("p", text.as_bytes()).unwrap();
        let mut t = topology(&format!("{HA}report.count = 1\n"));
        let known = profile("[[ports]]\nport = 5432\nproto = \"tcp\"\nservice = \"postgresql\"\n");
        let own = profile(
            "[[ports]]\nport = 7000\nproto = \"tcp\"\nservice = \"a\"\nfrom = [\"app\"]\n\
             [[ports]]\nport = 7001\nproto = \"udp\"\nservice = \"b\"\n\
             [[ports]]\nport = 7002\nproto = \"tcp\"\nservice = \"c\"\nfrom = []\n",
        );
        t.open_ports(&Profiles::from([("db".to_owned(), known), ("report".to_owned(), own)]));
        assert_eq!(t.services.len(), 3, "{:?}", t.services);
        let may = |from: &str, protocol, port| {
            allowed(&t, t.node(from).unwrap(), t.node("report-1").unwrap(), protocol, port)
        };
        assert!(may("app-1", Protocol::Tcp, 7000) && !may("db-1", Protocol::Tcp, 7000));
        assert!(may("db-1", Protocol::Udp, 7001) && !may("app-1", Protocol::Tcp, 7002));
        // The image contains the topology as JSON.
        let kept: Topology = serde_json::from_str(&serde_json::to_string(&t).unwrap()).unwrap();
        assert_eq!(kept, t);
    }

    #[test]
    fn filter_does_not_grow_with_nodes() {
        let large = "name = \"x\"\n[mesh]\nsubnet = \"10.10.0.0/16\"\ntransport = \"10.11.0.0/16\"\n[groups]\n\
                     hub.count = 3\ndb.count = 2\nmonitor.count = 2\napp = { count = 2000, first = \"10.10.1.0\" }\n";
        let length = |text: &str| {
            let t = topology(text);
            serde_json::to_string(&Filter::for_node(&t, t.node("hub-1").unwrap())).unwrap().len()
        };
        let (small, large) = (length(HA), length(large));
        assert!(large < small + 100, "{small} {large}");
    }
}
