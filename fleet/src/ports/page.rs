//! Generates `docs/ports.md` from the table.

use std::fmt::{self, Write as _};

use super::{Network, Party, Ports, Protocol, Rule, rows};

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Icmp => "ICMP",
            Self::Vrrp => "VRRP",
        })
    }
}

impl fmt::Display for Party<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Role(role) => write!(f, "{role}"),
            Self::Member => f.write_str("every node"),
            Self::Public => f.write_str("every address, outside the fleet too"),
            Self::Itself => f.write_str("the node itself"),
        }
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("—"),
            Self::One(port) => write!(f, "{port}"),
            Self::Mesh => f.write_str("`mesh.port`"),
            Self::MeshAndLinks => f.write_str("`mesh.port`, and the next ones: one for each hub"),
        }
    }
}

/// Returns the text of `docs/ports.md`.
#[must_use]
pub fn page() -> String {
    let mut page = INTRODUCTION.to_owned();
    for Rule { from, to, protocol, ports, why, network } in rows() {
        let links = if *network == Network::Transport { " (WireGuard addresses)" } else { "" };
        let _ = writeln!(page, "| {from} | {to}{links} | {protocol} | {ports} | {why} |");
    }
    page + "\n" + NOTES
}

const INTRODUCTION: &str = "\
# Ports: who may reach what

<!-- Written by `UPDATE_GOLDEN=1 cargo test --test golden` from fleet/src/ports.rs. -->

Every node's packet filter (`overlays/nftables`) lets in what this table says, and hubs forward nothing else: what has
no row is dropped. The source of a packet is its address in the mesh. A hub's WireGuard takes from a worker only
packets with that worker's own addresses; what a hub sends on the link between hubs is trusted.

| from | to | protocol | port | for |
| --- | --- | --- | --- | --- |
";

const NOTES: &str = "\
`hub`, `db`, `app` and `monitor` are roles of fleet.toml; `voter` holds an etcd vote, `backup` keeps the backups. The
VIP counts as an address of every hub. Answers to an allowed TCP connection pass; a packet that opens a connection
without a row does not.

Not in the table:

- A node reaches all its own ports: processes of one node are not separated from each other by the packet filter.
- `[[firewall.open]]` adds rows from every address to a role, or to every node.
- A port of a profile (`[[ports]]`) may name roles with `from`: these may reach it, too. `every` stands for all nodes,
  an empty list for the node itself alone. A port without `from` and without a row can be reached by every node, and
  `bakehouse check` warns of it. What listens on a port that no profile names can't be reached from another node.
- Until the agent knows its node, and loads the node's own filter, an earlier one lets in what answers
  this machine's own connections, DHCP, ICMP and, on hubs, WireGuard and the join API.
";
