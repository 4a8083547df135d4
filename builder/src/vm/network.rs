//! The wire between a fleet's machines, and the door through which this host's browser comes in.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use fleet::{Alerts, Node, Topology};

use crate::project::Project;
use crate::util::digest::sha256;

/// A machine's place on the wire that connects the fleet's machines: frames in multicast
/// packets that don't leave this host's loopback.
#[derive(Clone, Debug)]
pub struct VirtualNic {
    /// Multicast group and port: the fleet's folder has its own.
    pub group: String,
    pub mac: String,
    address: Ipv4Addr,
    pub(super) door: Option<HostForward>,
}

/// A second network card, by which this host reaches a hub's ports for browsers and operators, and a machine this
/// host's loopback, where updates come from or failures are told. Nothing else gets in or out by it.
#[derive(Clone, Debug)]
pub struct HostForward {
    /// On this host's loopback; every hub of every fleet has its own.
    pub address: Option<Ipv4Addr>,
    /// Where a hub takes the operator's requests.
    requests: u16,
    /// Ports of this host's loopback that its machine reaches.
    pub(super) outside: BTreeSet<u16>,
    pub(super) mac: String,
}

/// Network of the wires, reserved for tests of network devices (RFC 2544).
const WIRE: [u8; 2] = [198, 18];

/// Where this host reaches the hubs of a fleet's local machines.
#[must_use]
pub fn hub_forwards(project: &Project) -> BTreeMap<String, String> {
    let door = |hub: &Node| Some((hub.name.clone(), VirtualNic::of(project, hub).door?.address?.to_string()));
    project.topology.hubs.iter().filter_map(door).collect()
}

impl VirtualNic {
    pub(super) fn of(project: &Project, node: &Node) -> Self {
        // Every fleet is `.` to who stands in its folder.
        let dir = project.dir.canonicalize().unwrap_or_else(|_| project.dir.clone());
        let h = sha256(dir.as_os_str().as_encoded_bytes());
        let byte = |i: usize| u8::from_str_radix(&h[2 * i..2 * i + 2], 16).unwrap_or(1);
        let port = 20_000 + u16::from_be_bytes([byte(2), byte(3)]) % 10_000;
        let address = Self::address(&project.topology, node);
        let [_, _, c, d] = address.octets();
        let updates = project.topology.update.url.as_deref().and_then(HostForward::port);
        let told = if node.has_role("monitor") { HostForward::told(&project.topology.alerts) } else { BTreeSet::new() };
        let door = HostForward {
            // Browsers go to hubs.
            address: (node.hub > 0).then(|| Ipv4Addr::new(127, byte(0).max(1), byte(1) ^ c, d)),
            requests: project.topology.mesh.port,
            outside: told.into_iter().chain(updates).collect(),
            mac: format!("52:54:00:13:{c:02x}:{d:02x}"),
        };
        Self {
            group: format!("239.255.{}.{}:{port}", byte(0), byte(1)),
            mac: format!("52:54:00:12:{c:02x}:{d:02x}"),
            address,
            door: (door.address.is_some() || !door.outside.is_empty()).then_some(door),
        }
    }

    /// By the node's place in the mesh, so that it is the same in every start.
    pub(crate) fn address(topology: &Topology, node: &Node) -> Ipv4Addr {
        let host = u32::from(node.address) - u32::from(topology.mesh.subnet.network());
        let [_, _, c, d] = host.to_be_bytes();
        Ipv4Addr::new(WIRE[0], WIRE[1], c, d)
    }

    /// systemd-networkd's file for the card on the wire.
    pub(super) fn network(&self) -> String {
        format!("[Match]\nMACAddress={}\n[Network]\nAddress={}/16\nLinkLocalAddressing=no\n", self.mac, self.address)
    }
}

impl HostForward {
    /// Port on this host's loopback.
    pub const PORT: u16 = 8443;
    /// Network of the doors, reserved for documentation: no fleet's mesh is there.
    const NET: &str = "192.0.2.0/24";
    const INSIDE: &str = "192.0.2.15";

    /// Where machines find this host's loopback, if `[update]` or `[alerts]` has this address.
    pub(super) const HOST: &str = "192.0.2.100";

    /// What a browser on this host opens.
    #[must_use]
    pub fn url(&self) -> Option<String> {
        Some(format!("https://{}:{}/", self.address?, Self::PORT))
    }

    /// Ports where this host's loopback is told of failures.
    #[must_use]
    pub fn told(alerts: &Alerts) -> BTreeSet<u16> {
        alerts.webhooks.iter().chain(&alerts.dead_man).filter_map(|url| Self::port(url)).collect()
    }

    /// A server's port, if it is on this host.
    #[must_use]
    pub fn port(url: &str) -> Option<u16> {
        let rest = url.strip_prefix("http://")?.strip_prefix(Self::HOST)?;
        rest.strip_prefix(':')?.split('/').next()?.parse().ok()
    }

    /// Ports of this host's loopback, and what answers there inside.
    pub(super) const fn inwards(&self) -> [(u16, u16); 2] {
        [(Self::PORT, 443), (self.requests, self.requests)]
    }

    /// QEMU's option.
    pub(super) fn netdev(&self) -> String {
        let mut text = format!("user,id=door,restrict=on,net={}", Self::NET);
        if let Some(address) = self.address {
            for (outside, inside) in self.inwards() {
                text.push_str(&format!(",hostfwd=tcp:{address}:{outside}-{}:{inside}", Self::INSIDE));
            }
        }
        for port in &self.outside {
            // A program for each connection: QEMU itself would keep a single one.
            text.push_str(&format!(",guestfwd=tcp:{}:{port}-cmd:socat STDIO TCP:127.0.0.1:{port}", Self::HOST));
        }
        text
    }

    /// systemd-networkd's file for its card.
    pub(super) fn network(&self) -> String {
        format!("[Match]\nMACAddress={}\n[Network]\nAddress={}/24\nLinkLocalAddressing=no\n", self.mac, Self::INSIDE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_has_one_wire_however_it_is_named_and_no_other_has_it() {
        let dir = tempfile::tempdir().unwrap();
        let fleet = "name = \"f\"\n[groups.hub]\ncount = 1\nendpoints = [\"hub.example.net\"]\n";
        for name in ["one", "other"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
            std::fs::write(dir.path().join(name).join("fleet.toml"), fleet).unwrap();
        }
        let wire = |path: &str| {
            let project = Project::load(&dir.path().join(path)).unwrap();
            VirtualNic::of(&project, &project.topology.nodes[0]).group
        };
        assert_eq!(wire("one"), wire("other/../one"));
        assert_ne!(wire("one"), wire("other"));
    }

    #[test]
    fn only_an_address_that_means_this_host_is_served_from_it() {
        assert_eq!(HostForward::port("http://192.0.2.100:8000/acme"), Some(8000));
        assert_eq!(HostForward::port("http://192.0.2.100:8000"), Some(8000));
        for url in ["http://updates.example.net:8000/", "https://192.0.2.100:8000", "http://192.0.2.1001:80", ""] {
            assert_eq!(HostForward::port(url), None, "{url}");
        }
    }
}
