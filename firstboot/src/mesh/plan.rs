//! The plan of a node's WireGuard interfaces and their peers, as a pure function. `docs/how-it-works.md` has the
//! reasons.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use fleet::{MeshKey, Node, Topology};
use ipnet::Ipv4Net;

/// A WireGuard interface. `E` is the type of endpoints: a name in the plan, an address after its resolution.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Interface<E> {
    /// Name of the interface.
    pub name: String,
    /// UDP port on which it listens; `None` for a port that the kernel chooses.
    pub port: Option<u16>,
    /// This node's transport address, with the prefix length of the interface's network.
    pub address: Ipv4Net,
    /// Transport address of the other end, if the interface is for one peer.
    pub partner: Option<Ipv4Addr>,
    /// Network that the kernel routes to the interface, in addition to that of the address.
    pub route: Option<Ipv4Net>,
    /// Peers of the interface.
    pub peers: Vec<Peer<E>>,
}

/// A peer of an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Peer<E> {
    /// The peer's public key.
    pub key: MeshKey,
    /// The peer's endpoint; `None` if only the peer connects.
    pub endpoint: Option<E>,
    /// Networks that WireGuard accepts from the peer, and sends to it (`AllowedIPs`).
    pub allowed: Vec<Ipv4Net>,
    /// Interval of keepalive packets in seconds, which keep NAT mappings alive.
    pub keepalive: Option<u16>,
}

const KEEPALIVE: u16 = 25;

/// Returns the interfaces of `node`. Peers whose keys are unknown are left out. `operators` are the operators' machines,
/// which are peers of hubs.
#[must_use]
pub(crate) fn interfaces(
    topology: &Topology,
    node: &Node,
    keys: &BTreeMap<String, MeshKey>,
    operators: &BTreeMap<Ipv4Addr, MeshKey>,
    endpoints: &BTreeMap<String, String>,
) -> Vec<Interface<(String, u16)>> {
    let mut all = Vec::new();
    if node.hub > 0 {
        let workers = topology.nodes.iter().filter(|n| n.hub == 0);
        let peers = workers.filter_map(|n| {
            // Only the worker's own addresses, so that it cannot send packets as another node.
            let allowed = vec![Ipv4Net::from(n.address), Ipv4Net::from(n.transport)];
            Some(Peer { key: *keys.get(&n.name)?, endpoint: None, allowed, keepalive: None })
        });
        let range = topology.mesh.operators;
        let operators = operators.iter().filter(|(address, _)| range.is_some_and(|range| range.contains(*address)));
        let operators = operators.map(|(address, key)| Peer {
            key: *key,
            endpoint: None,
            allowed: vec![Ipv4Net::from(*address)],
            keepalive: None,
        });
        let net = topology.mesh.transport.prefix_len();
        all.push(Interface {
            name: "wg0".to_owned(),
            port: Some(topology.mesh.port),
            address: Ipv4Net::new(node.transport, net).unwrap_or(node.transport.into()),
            partner: None,
            route: range,
            peers: peers.chain(operators).collect(),
        });
    }
    for hub in topology.hubs.iter().filter(|h| h.name != node.name) {
        // Each pair of hubs has its own ports. Workers use the common port.
        let port = topology.mesh.port + node.hub;
        let peer = keys.get(&hub.name).map(|key| Peer {
            key: *key,
            endpoint: hub.endpoint_in(endpoints).map(|host| (host, port)),
            allowed: vec![topology.mesh.subnet, topology.mesh.transport],
            keepalive: Some(KEEPALIVE),
        });
        all.push(Interface {
            name: format!("wg-hub{}", hub.hub),
            port: (node.hub > 0).then_some(topology.mesh.port + hub.hub),
            address: node.transport.into(),
            partner: Some(hub.transport),
            route: None,
            peers: peer.into_iter().collect(),
        });
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn topology() -> Topology {
        let toml = b"name = \"acme\"\n[groups.hub]\ncount = 3\nendpoints = [\"one\", \"two\", \"three\"]\n\
                     [groups.db]\ncount = 2\n";
        Topology::from_fleet(&fleet::Fleet::parse("f", toml).unwrap())
    }

    fn keys() -> BTreeMap<String, MeshKey> {
        ["hub-1", "hub-2", "db-1"].iter().enumerate().map(|(i, n)| ((*n).to_owned(), MeshKey([i as u8; 32]))).collect()
    }

    fn interfaces_of(node: &str) -> Vec<Interface<(String, u16)>> {
        let topology = topology();
        interfaces(&topology, topology.node(node).unwrap(), &keys(), &BTreeMap::new(), &BTreeMap::new())
    }

    #[test]
    fn worker_has_an_interface_for_each_hub() {
        let all = interfaces_of("db-1");
        let names: Vec<_> = all.iter().map(|i| (i.name.as_str(), i.peers.len(), i.port)).collect();
        assert_eq!(names, [("wg-hub1", 1, None), ("wg-hub2", 1, None), ("wg-hub3", 0, None)]);
        assert_eq!(all[1].peers[0].endpoint, Some(("two".to_owned(), 51820)));
        assert_eq!(
            (all[1].address.to_string().as_str(), all[1].partner.unwrap().to_string().as_str()),
            ("10.11.0.10/32", "10.11.0.2")
        );
    }

    #[test]
    fn interface_names_match_topology() {
        let topology = topology();
        for node in &topology.nodes {
            let names: Vec<String> = interfaces_of(&node.name).into_iter().map(|i| i.name).collect();
            assert_eq!(topology.wireguard(node), names, "{}", node.name);
        }
    }

    #[test]
    fn hub_accepts_only_own_addresses_of_workers() {
        let all = interfaces_of("hub-1");
        assert_eq!(
            (all[0].name.as_str(), all[0].port, all[0].address.to_string().as_str()),
            ("wg0", Some(51820), "10.11.0.1/24")
        );
        let allowed: Vec<String> = all[0].peers.iter().flat_map(|p| &p.allowed).map(ToString::to_string).collect();
        assert_eq!(allowed, ["10.10.0.10/32", "10.11.0.10/32"]);
    }

    #[test]
    fn operators_are_peers_of_hubs_with_one_address_of_their_range() {
        let mut topology = topology();
        let operators = ["10.10.0.193", "10.10.0.11", "10.10.0.2"].map(|address| address.parse().unwrap());
        let operators: BTreeMap<_, _> = operators.into_iter().zip([7, 8, 9].map(|i| MeshKey([i; 32]))).collect();
        let of = |topology: &Topology, node: &str| {
            let all = interfaces(topology, topology.node(node).unwrap(), &keys(), &operators, &BTreeMap::new());
            let peers = all[0].peers.iter().filter(|p| operators.values().any(|key| *key == p.key));
            let allowed: Vec<String> = peers.flat_map(|p| &p.allowed).map(ToString::to_string).collect();
            (all[0].route, allowed)
        };
        assert_eq!(of(&topology, "hub-1"), (None, vec![]), "the fleet has no addresses for operators");
        topology.mesh.operators = Some("10.10.0.192/26".parse().unwrap());
        assert_eq!(of(&topology, "hub-1"), (topology.mesh.operators, vec!["10.10.0.193/32".to_owned()]));
        assert_eq!(of(&topology, "db-1"), (None, vec![]));
    }

    #[test]
    fn both_ends_of_a_hub_link_use_the_same_ports() {
        let topology = topology();
        let link =
            |from: &str, to: u16| interfaces_of(from).into_iter().find(|i| i.name == format!("wg-hub{to}")).unwrap();
        let (ab, ba) = (link("hub-1", 2), link("hub-2", 1));
        assert_eq!(ab.peers[0].endpoint.as_ref().unwrap().1, ba.port.unwrap());
        assert_eq!(ba.peers[0].endpoint.as_ref().unwrap().1, ab.port.unwrap());
        assert_eq!(ab.partner, Some(topology.node("hub-2").unwrap().transport));
    }

    #[test]
    fn endpoint_can_be_replaced() {
        let topology = topology();
        let elsewhere = BTreeMap::from([("hub-2".to_owned(), "192.0.2.7".to_owned())]);
        let all = interfaces(&topology, topology.node("db-1").unwrap(), &keys(), &BTreeMap::new(), &elsewhere);
        assert_eq!(all[1].peers[0].endpoint, Some(("192.0.2.7".to_owned(), 51820)));
    }
}
