//! The local network between a fleet's machines, and port forwards between this host and the machines.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use fleet::{Alerts, Node, Topology};

use crate::project::Project;
use crate::util::digest::sha256;

/// A machine's network card in the fleet's local network. QEMU sends the Ethernet frames as multicast packets on this
/// host's loopback interface.
#[derive(Clone, Debug)]
pub struct VirtualNic {
    /// Multicast group and port, derived from the fleet's folder.
    pub group: String,
    /// MAC address.
    pub mac: String,
    /// Address in the local network.
    pub(super) address: Ipv4Addr,
    pub(super) forward: Option<HostForward>,
}

/// A second network card that only forwards ports. This host reaches a hub's HTTPS port and its port for the
/// operator's requests. A machine reaches ports on this host's loopback interface that `[update]` and `[alerts]` name.
#[derive(Clone, Debug)]
pub struct HostForward {
    /// Loopback address of this host that is forwarded to the hub; each hub of each fleet has its own.
    pub address: Option<Ipv4Addr>,
    /// The hub's port for the operator's requests.
    requests: u16,
    /// Ports on this host's loopback interface that the machine reaches.
    pub(super) outside: BTreeSet<u16>,
    pub(super) mac: String,
}

/// Prefix of the local networks, which RFC 2544 reserves for tests of network devices.
const LAN_PREFIX: [u8; 2] = [198, 18];

/// Returns, by hub, the loopback address at which this host reaches the hubs of a fleet's local machines.
#[must_use]
pub fn hub_forwards(project: &Project) -> BTreeMap<String, String> {
    let forward =
        |hub: &Node| Some((hub.name.clone(), VirtualNic::for_node(project, hub).forward?.address?.to_string()));
    project.topology.hubs.iter().filter_map(forward).collect()
}

impl VirtualNic {
    pub(super) fn for_node(project: &Project, node: &Node) -> Self {
        // Different paths to the same folder, such as `.`, must give the same network.
        let dir = project.dir.canonicalize().unwrap_or_else(|_| project.dir.clone());
        let h = sha256(dir.as_os_str().as_encoded_bytes());
        let byte = |i: usize| u8::from_str_radix(&h[2 * i..2 * i + 2], 16).unwrap_or(1);
        let port = 20_000 + u16::from_be_bytes([byte(2), byte(3)]) % 10_000;
        let address = Self::address(&project.topology, node);
        let [_, _, c, d] = address.octets();
        let updates = project.topology.update.url.as_deref().and_then(HostForward::port);
        let alerts =
            if node.has_role("monitor") { HostForward::alert_ports(&project.topology.alerts) } else { BTreeSet::new() };
        let forward = HostForward {
            // Browsers and operators connect to hubs only.
            address: (node.hub > 0).then(|| Ipv4Addr::new(127, byte(0).max(1), byte(1) ^ c, d)),
            requests: project.topology.mesh.port,
            outside: alerts.into_iter().chain(updates).collect(),
            mac: format!("52:54:00:13:{c:02x}:{d:02x}"),
        };
        Self {
            group: format!("239.255.{}.{}:{port}", byte(0), byte(1)),
            mac: format!("52:54:00:12:{c:02x}:{d:02x}"),
            address,
            forward: (forward.address.is_some() || !forward.outside.is_empty()).then_some(forward),
        }
    }

    /// Returns a node's address in the local network. It has the host part of the node's mesh address, so it is the
    /// same at every start.
    pub(crate) fn address(topology: &Topology, node: &Node) -> Ipv4Addr {
        let host = u32::from(node.address) - u32::from(topology.mesh.subnet.network());
        let [_, _, c, d] = host.to_be_bytes();
        Ipv4Addr::new(LAN_PREFIX[0], LAN_PREFIX[1], c, d)
    }

    /// Returns systemd-networkd's file for this network card.
    pub(super) fn network(&self) -> String {
        format!("[Match]\nMACAddress={}\n[Network]\nAddress={}/16\nLinkLocalAddressing=no\n", self.mac, self.address)
    }
}

impl HostForward {
    /// HTTPS port on this host's loopback interface.
    pub const PORT: u16 = 8443;
    /// Network of the forwards, which RFC 5737 reserves for documentation, so no fleet's mesh overlaps it.
    const NET: &str = "192.0.2.0/24";
    const INSIDE: &str = "192.0.2.15";

    /// Address in `[update]` or `[alerts]` that machines reach as this host's loopback interface.
    pub(super) const HOST: &str = "192.0.2.100";

    /// Returns the address of Odoo for a browser on this host.
    #[must_use]
    pub fn url(&self) -> Option<String> {
        Some(format!("https://{}:{}/", self.address?, Self::PORT))
    }

    /// Returns the ports on this host's loopback interface to which Alertmanager posts alerts.
    #[must_use]
    pub fn alert_ports(alerts: &Alerts) -> BTreeSet<u16> {
        alerts.webhooks.iter().chain(&alerts.dead_man).filter_map(|url| Self::port(url)).collect()
    }

    /// Returns the port of a URL, if it names this host's loopback interface.
    #[must_use]
    pub fn port(url: &str) -> Option<u16> {
        let rest = url.strip_prefix("http://")?.strip_prefix(Self::HOST)?;
        rest.strip_prefix(':')?.split('/').next()?.parse().ok()
    }

    /// Returns pairs of a port on this host's loopback interface and the machine's port to which it is forwarded.
    pub(super) const fn inwards(&self) -> [(u16, u16); 2] {
        [(Self::PORT, 443), (self.requests, self.requests)]
    }

    /// Returns the value of QEMU's option `-netdev`.
    pub(super) fn netdev(&self) -> String {
        let mut text = format!("user,id=door,restrict=on,net={}", Self::NET);
        if let Some(address) = self.address {
            for (outside, inside) in self.inwards() {
                text.push_str(&format!(",hostfwd=tcp:{address}:{outside}-{}:{inside}", Self::INSIDE));
            }
        }
        for port in &self.outside {
            // `cmd:` starts a process for each connection. QEMU's `guestfwd` to a socket serves only one connection.
            text.push_str(&format!(",guestfwd=tcp:{}:{port}-cmd:socat STDIO TCP:127.0.0.1:{port}", Self::HOST));
        }
        text
    }

    /// Returns systemd-networkd's file for this network card.
    pub(super) fn network(&self) -> String {
        format!("[Match]\nMACAddress={}\n[Network]\nAddress={}/24\nLinkLocalAddressing=no\n", self.mac, Self::INSIDE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fleets_network_depends_on_its_folder_and_not_on_the_path_to_it() {
        let dir = tempfile::tempdir().unwrap();
        let fleet = "name = \"f\"\n[groups.hub]\ncount = 1\nendpoints = [\"hub.example.net\"]\n";
        for name in ["one", "other"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
            std::fs::write(dir.path().join(name).join("fleet.toml"), fleet).unwrap();
        }
        let group = |path: &str| {
            let project = Project::load(&dir.path().join(path)).unwrap();
            VirtualNic::for_node(&project, &project.topology.nodes[0]).group
        };
        assert_eq!(group("one"), group("other/../one"));
        assert_ne!(group("one"), group("other"));
    }

    #[test]
    fn only_urls_with_the_hosts_address_are_forwarded() {
        assert_eq!(HostForward::port("http://192.0.2.100:8000/acme"), Some(8000));
        assert_eq!(HostForward::port("http://192.0.2.100:8000"), Some(8000));
        for url in ["http://updates.example.net:8000/", "https://192.0.2.100:8000", "http://192.0.2.1001:80", ""] {
            assert_eq!(HostForward::port(url), None, "{url}");
        }
    }
}
