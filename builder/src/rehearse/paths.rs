//! Network faults: a packet filter that drops a machine's packets to and from hubs or etcd.

use std::net::Ipv4Addr;

use fleet::Topology;

use crate::vm::VirtualNic;

/// Paths of a machine that a fault cuts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// To the hub that holds the VIP.
    Hub,
    /// To every hub.
    Hubs,
    /// To every member of etcd.
    Etcd,
}

/// Addresses of hubs in the network below the mesh.
pub(super) struct Paths {
    /// The hub that holds the VIP.
    holder: Ipv4Addr,
    /// All hubs except the fault's targets.
    hubs: Vec<Ipv4Addr>,
}

impl Paths {
    pub(super) fn new(topology: &Topology, holder: Option<&str>, victims: &[String]) -> Self {
        let address = |name: &str| topology.node(name).map(|node| VirtualNic::address(topology, node));
        let others = topology.nodes.iter().filter(|n| n.has_role("hub") && !victims.contains(&n.name));
        Self {
            holder: holder.and_then(address).unwrap_or(Ipv4Addr::UNSPECIFIED),
            hubs: others.map(|n| VirtualNic::address(topology, n)).collect(),
        }
    }

    /// Returns the command that cuts a path.
    pub(super) fn cut(&self, path: Path) -> String {
        let (output, input) = match path {
            Path::Hub | Path::Hubs => ("ip daddr @hubs drop", "ip saddr @hubs drop"),
            Path::Etcd => ("tcp dport 2379 drop", "tcp sport 2379 drop"),
        };
        let hubs: Vec<String> = match path {
            Path::Hub => vec![self.holder.to_string()],
            _ => self.hubs.iter().map(ToString::to_string).collect(),
        };
        format!(
            "nft 'table inet rehearsal {{ \
             set hubs {{ type ipv4_addr; elements = {{ {} }}; }}; \
             chain output {{ type filter hook output priority -300; {output}; }}; \
             chain input {{ type filter hook input priority -300; {input}; }}; }}'",
            hubs.join(", ")
        )
    }

    /// Returns the command that opens or cuts the path to the last hub, after [`Path::Hubs`] is cut.
    pub(super) fn last_hub(&self, open: bool) -> String {
        let verb = if open { "delete" } else { "add" };
        let hub = self.hubs.last().copied().unwrap_or(Ipv4Addr::UNSPECIFIED);
        format!("nft {verb} element inet rehearsal hubs '{{ {hub} }}'")
    }
}
