//! The wire between a fleet's machines.

use std::net::Ipv4Addr;

use fleet::{Node, Topology};

use crate::digest::sha256;
use crate::project::Project;

/// A machine's place on the wire that connects the fleet's machines: frames in multicast
/// packets that don't leave this host's loopback.
#[derive(Clone, Debug)]
pub struct Wire {
    /// Multicast group and port: the fleet's folder has its own.
    pub(super) group: String,
    pub(super) mac: String,
    address: Ipv4Addr,
}

/// Network of the wires, reserved for tests of network devices (RFC 2544).
const WIRE: [u8; 2] = [198, 18];

impl Wire {
    pub(super) fn of(project: &Project, node: &Node) -> Self {
        let h = sha256(project.dir.as_os_str().as_encoded_bytes());
        let byte = |i: usize| u8::from_str_radix(&h[2 * i..2 * i + 2], 16).unwrap_or(1);
        let port = 20_000 + u16::from_be_bytes([byte(2), byte(3)]) % 10_000;
        let address = Self::address(&project.topology, node);
        let [_, _, c, d] = address.octets();
        Self {
            group: format!("239.255.{}.{}:{port}", byte(0), byte(1)),
            mac: format!("52:54:00:12:{c:02x}:{d:02x}"),
            address,
        }
    }

    /// By the node's place in the mesh, so that it is the same in every start.
    pub(super) fn address(topology: &Topology, node: &Node) -> Ipv4Addr {
        let host = u32::from(node.address) - u32::from(topology.mesh.subnet.network());
        let [_, _, c, d] = host.to_be_bytes();
        Ipv4Addr::new(WIRE[0], WIRE[1], c, d)
    }

    /// systemd-networkd's file for the one card there is.
    pub(super) fn network(&self) -> String {
        format!("[Match]\nMACAddress={}\n[Network]\nAddress={}/16\nLinkLocalAddressing=no\n", self.mac, self.address)
    }
}
