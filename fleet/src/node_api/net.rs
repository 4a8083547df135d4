//! Network of a node.

use serde::{Deserialize, Serialize};

/// `GET`, viewer: a [`NetStatus`].
pub const NET_PATH: &str = "/v1/net";

/// Network of a node, as its kernel and its routing daemon report it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct NetStatus {
    /// Name of the slot.
    pub node: String,
    /// Network interfaces.
    pub links: Vec<LinkStatus>,
    /// Routes of IPv4 and IPv6 in the main table, without the kernel's own ones to a local address.
    pub routes: Vec<RouteStatus>,
    /// Peers of the WireGuard interfaces.
    pub peers: Vec<PeerStatus>,
    /// BGP and BFD sessions.
    pub sessions: Vec<SessionStatus>,
    /// The ways to the hubs, over the mesh.
    pub paths: Vec<PathStatus>,
    /// What could not be read, each with its reason.
    pub missing: Vec<String>,
}

/// A network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct LinkStatus {
    /// Name.
    pub name: String,
    /// The kernel's type of the interface, such as `wireguard` or `dummy`; empty for a network card.
    pub kind: String,
    /// Whether the interface is set up and has a carrier.
    pub up: bool,
    /// Largest packet, in bytes.
    pub mtu: u32,
    /// Hardware address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// Addresses with their prefix lengths.
    pub addresses: Vec<String>,
    /// Bytes that the interface has received.
    pub received: u64,
    /// Bytes that the interface has sent.
    pub sent: u64,
    /// Packets with errors, in both directions.
    pub errors: u64,
    /// Packets that the kernel has dropped at the interface, in both directions.
    pub dropped: u64,
}

/// A route.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct RouteStatus {
    /// Destination: a network, or `default`.
    pub to: String,
    /// Next hop.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub via: Option<String>,
    /// Interface.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub link: Option<String>,
    /// `unicast`, `unreachable`, `blackhole` and other types of the kernel.
    pub kind: String,
    /// Program that has set the route: `bird`, `dhcp`, `kernel`, `ra`, `static` and others.
    pub source: String,
    /// Priority: the kernel prefers the lowest one.
    pub metric: u32,
}

/// A WireGuard peer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct PeerStatus {
    /// Interface.
    pub link: String,
    /// Name of the peer's slot; `None` if no slot has the peer's addresses.
    pub node: Option<String>,
    /// Base64 of the peer's public key.
    pub key: String,
    /// Address and port from which the peer sent its last packet.
    pub endpoint: Option<String>,
    /// Seconds since the last handshake; `None` if there was none. A peer that answers has one at least every 180 s
    /// while packets flow.
    pub handshake: Option<u64>,
    /// Bytes that the peer has sent.
    pub received: u64,
    /// Bytes that this node has sent to the peer.
    pub sent: u64,
}

/// A session of BIRD.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct SessionStatus {
    /// `bgp` or `bfd`.
    pub protocol: String,
    /// BIRD's name of the protocol. For BGP to a hub, this is the hub's name.
    pub name: String,
    /// Name of the neighbour's slot; `None` for a BGP session of a worker at a hub, which BIRD numbers.
    pub node: Option<String>,
    /// Interface, for BFD.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub link: Option<String>,
    /// Whether the session is established.
    pub up: bool,
    /// Seconds since the session is established.
    pub seconds: u64,
}

/// The way to a hub, over the mesh.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct PathStatus {
    /// Name of the hub.
    pub hub: String,
    /// Mesh address of the hub.
    pub address: String,
    /// The kernel's MTU of the path, in bytes; `None` without a route.
    pub mtu: Option<u32>,
    /// Largest packet to which the hub replied, in bytes, up to `mtu`; `None` if it replied to none. A value below `mtu`
    /// means that a network on the way drops large packets.
    pub passes: Option<u32>,
    /// Time until the reply to that packet, in microseconds.
    pub microseconds: Option<u64>,
}
