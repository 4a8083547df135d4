//! The packet filter of one node: input of the template in `overlays/nftables`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::ops::RangeInclusive;

use ipnet::Ipv4Net;
use serde::Serialize;

use super::{HUB, Network, Party, Ports, Protocol, Rule, rules};
use crate::topology::{Node, Topology};

/// The kernel's range of ephemeral ports, to which servers send UDP replies.
const CLIENT_PORTS: RangeInclusive<u16> = 32768..=60999;

/// Source ports of connections of operators after a hub has translated them. Other programs of the hub do not use them.
const OPERATOR_PORTS: RangeInclusive<u16> = 61000..=65535;

/// Input of a node's packet filter. Equal fleets give equal texts. Their length grows with the number of groups and not
/// of nodes, because successive addresses are one element of a set.
#[derive(Clone, Debug, Serialize)]
pub struct Filter {
    sets: Vec<AddressSet>,
    /// Connections that other nodes may open to this one.
    input: Vec<Match>,
    /// Replies to connections that this node may open.
    replies: Vec<Match>,
    /// Connections between other nodes that this node forwards.
    forward: Vec<Match>,
    /// Ports that are open to addresses outside the fleet.
    public: Vec<Match>,
    /// Ephemeral ports of this node, as a range of nftables.
    client_ports: String,
    /// Connections of operators with WireGuard, on hubs that accept them.
    operators: Option<Operators>,
}

/// What operators with WireGuard reach through a hub.
#[derive(Clone, Debug, Serialize)]
struct Operators {
    /// Network of the operators' addresses.
    network: Ipv4Net,
    /// TCP ports of the hub itself.
    input: Vec<String>,
    /// TCP ports of the nodes behind it.
    forward: Vec<String>,
    /// Source ports of translated connections, as a range of nftables.
    ports: String,
}

#[derive(Clone, Debug, Serialize)]
struct AddressSet {
    name: String,
    elements: Vec<String>,
}

/// A rule of the filter: sets of addresses, and ports in the syntax of nftables.
#[derive(Clone, Debug, Serialize)]
struct Match {
    from: String,
    to: String,
    protocol: Protocol,
    ports: Vec<String>,
}

impl Filter {
    /// Returns the filter of `node`.
    #[must_use]
    pub fn for_node(topology: &Topology, node: &Node) -> Self {
        let mut lines = Lines { topology, sets: BTreeMap::new() };
        let others = |party: Party| topology.nodes.iter().any(|n| n.name != node.name && party.has(n));
        let rules: Vec<Rule> = rules(topology).into_iter().filter(|r| r.from != Party::Itself).collect();
        let with =
            |wanted: &dyn Fn(&Rule) -> bool| -> Vec<Rule> { rules.iter().copied().filter(|r| wanted(r)).collect() };
        // The template has its own rule for ICMP.
        let numbered = |r: &Rule| r.protocol != Protocol::Icmp;
        let mesh = |r: &Rule| numbered(r) && r.is_inside();
        let input = lines.matching(&with(&|r| mesh(r) && r.to.has(node) && others(r.from)), true, false);
        // BFD has no replies, because both ends send to its port.
        let opens =
            |r: &Rule| mesh(r) && r.from.has(node) && others(r.to) && r.protocol != Protocol::Vrrp && !r.is_bfd();
        let replies = lines.matching(&with(&opens), false, true);
        let crosses = |r: &Rule| mesh(r) && r.network == Network::Mesh && r.is_between(topology, node);
        let forward = if node.hub > 0 { lines.matching(&with(&crosses), true, true) } else { Vec::new() };
        let public = lines.matching(&with(&|r| numbered(r) && r.from == Party::Public && r.to.has(node)), false, false);
        if node.hub > 0 {
            lines.set(HUB, Network::Mesh);
        }
        let operators = topology.mesh.operators.filter(|_| node.hub > 0).map(|network| {
            lines.set(Party::Member, Network::Mesh);
            let ports = |wanted: &dyn Fn(&Rule) -> bool| {
                let rules = rules.iter().filter(|r| r.from == Party::Operator && wanted(r));
                rules.filter_map(|r| r.ports.range(topology)).map(|range| range.start().to_string()).collect()
            };
            let (first, last) = (OPERATOR_PORTS.start(), OPERATOR_PORTS.end());
            Operators {
                network,
                input: ports(&|r| r.to.has(node)),
                forward: ports(&|r| r.to == Party::Member && r.ports != Ports::None),
                ports: format!("{first}-{last}"),
            }
        });
        let sets = lines.sets.into_iter().map(|(name, elements)| AddressSet { name, elements }).collect();
        let client_ports = format!("{}-{}", CLIENT_PORTS.start(), CLIENT_PORTS.end());
        Self { sets, input, replies, forward, public, client_ports, operators }
    }
}

/// Network, source set, destination set and protocol of a line.
type Ends = (Network, String, String, Protocol);

/// Combines rules into lines, and collects the sets that the lines use.
struct Lines<'a> {
    topology: &'a Topology,
    sets: BTreeMap<String, Vec<String>>,
}

impl Lines<'_> {
    /// Returns one line for all ports with the same ends. `from` and `to` are whether a line names that end. An end
    /// without a name is empty.
    fn matching(&mut self, rules: &[Rule], from: bool, to: bool) -> Vec<Match> {
        let mut gathered: BTreeMap<Ends, BTreeSet<(u16, u16)>> = BTreeMap::new();
        for rule in rules {
            let mut set = |party, named| if named { self.set(party, rule.network) } else { String::new() };
            let ends = (rule.network, set(rule.from, from), set(rule.to, to), rule.protocol);
            let ports = gathered.entry(ends).or_default();
            ports.extend(rule.ports.range(self.topology).map(|r| (*r.start(), *r.end())));
        }
        let text =
            |(first, last): (u16, u16)| if first == last { first.to_string() } else { format!("{first}-{last}") };
        let lines = gathered.into_iter().map(|((_, from, to, protocol), ports)| {
            let ports = ports.into_iter().map(text).collect();
            Match { from, to, protocol, ports }
        });
        lines.collect()
    }

    fn set(&mut self, party: Party, network: Network) -> String {
        let name = party.set(network);
        let elements = || ranges(&party.addresses(self.topology, network));
        self.sets.entry(name.clone()).or_insert_with(elements);
        name
    }
}

/// Returns successive addresses as `first-last`.
fn ranges(addresses: &BTreeSet<Ipv4Addr>) -> Vec<String> {
    let mut ranges: Vec<(u32, u32)> = Vec::new();
    for address in addresses.iter().map(|a| u32::from(*a)) {
        match ranges.last_mut() {
            Some((_, last)) if last.checked_add(1) == Some(address) => *last = address,
            _ => ranges.push((address, address)),
        }
    }
    let text = |(first, last): (u32, u32)| {
        let (first, last) = (Ipv4Addr::from(first), Ipv4Addr::from(last));
        if first == last { first.to_string() } else { format!("{first}-{last}") }
    };
    ranges.into_iter().map(text).collect()
}
