//! Network faults: a packet filter that drops a machine's packets to and from hubs or etcd.

use std::net::Ipv4Addr;

use fleet::Topology;

use crate::vm::VirtualNic;

/// Paths of a machine that a fault cuts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Path {
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
            Path::Hubs => self.hubs.iter().map(ToString::to_string).collect(),
            Path::Etcd => Vec::new(),
        };
        // nft rejects an empty list of elements.
        let elements = if hubs.is_empty() { String::new() } else { format!("elements = {{ {} }};", hubs.join(", ")) };
        format!(
            "nft 'table inet rehearsal {{ \
             set hubs {{ type ipv4_addr; {elements} }}; \
             chain output {{ type filter hook output priority -300; {output}; }}; \
             chain input {{ type filter hook input priority -300; {input}; }}; }}'"
        )
    }

    /// Returns the command that opens or cuts the path to the last hub, after [`Path::Hubs`] is cut.
    pub(super) fn last_hub(&self, open: bool) -> String {
        let verb = if open { "delete" } else { "add" };
        let hub = self.hubs.last().copied().unwrap_or(Ipv4Addr::UNSPECIFIED);
        format!("nft {verb} element inet rehearsal hubs '{{ {hub} }}'")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// nft parses the commands in a network namespace of its own.
    #[test]
    fn nft_accepts_every_cut() {
        let hubs = vec![Ipv4Addr::new(192, 0, 2, 1), Ipv4Addr::new(192, 0, 2, 2)];
        for paths in [Paths { holder: hubs[0], hubs }, Paths { holder: Ipv4Addr::UNSPECIFIED, hubs: Vec::new() }] {
            for path in [Path::Hub, Path::Hubs, Path::Etcd] {
                let mut script = paths.cut(path);
                if path == Path::Hubs && !paths.hubs.is_empty() {
                    script = format!("{script} && {} && {}", paths.last_hub(true), paths.last_hub(false));
                }
                let mut command = Command::new("unshare");
                let output =
                    command.args(["--map-root-user", "--user", "--net", "sh", "-c", &script]).output().unwrap();
                assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
            }
        }
    }
}
