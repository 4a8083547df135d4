//! State of WireGuard peers, as the kernel or the userspace program reports it.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fleet::MeshKey;
use ipnet::Ipv4Net;
use netlink_packet_wireguard::{
    WireguardAllowedIp, WireguardAllowedIpAttr, WireguardAttribute, WireguardMessage, WireguardPeer,
    WireguardPeerAttribute,
};

use super::wireguard::Wireguard;
use crate::error::Result;

/// State of a peer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PeerState {
    /// Address and port of the peer's last packet, or the configured one.
    pub endpoint: Option<SocketAddr>,
    /// Networks that WireGuard accepts from the peer.
    pub allowed: Vec<Ipv4Net>,
    /// Time of the last handshake.
    pub handshake: Option<SystemTime>,
    /// Bytes from the peer.
    pub received: u64,
    /// Bytes to the peer.
    pub sent: u64,
}

/// Reads the peers of an interface.
///
/// # Errors
/// If the netlink socket cannot be opened, or there is no such interface.
pub(crate) async fn peer_states(interface: &str) -> Result<BTreeMap<MeshKey, PeerState>> {
    Wireguard::open()?.states(interface).await
}

/// Returns the peers in the kernel's replies. A peer with many networks is in several replies.
pub(super) fn from_kernel(replies: Vec<WireguardMessage>) -> BTreeMap<MeshKey, PeerState> {
    let peers = replies.into_iter().flat_map(|m| m.attributes).filter_map(|a| match a {
        WireguardAttribute::Peers(peers) => Some(peers),
        _ => None,
    });
    let mut all = BTreeMap::new();
    for (key, mut state) in peers.flatten().filter_map(peer) {
        let found: &mut PeerState = all.entry(key).or_default();
        let mut allowed = std::mem::take(&mut found.allowed);
        allowed.append(&mut state.allowed);
        *found = PeerState { allowed, ..state };
    }
    all
}

fn peer(peer: WireguardPeer) -> Option<(MeshKey, PeerState)> {
    let (mut key, mut state) = (None, PeerState::default());
    for attribute in peer.0 {
        match attribute {
            WireguardPeerAttribute::PublicKey(of) => key = Some(MeshKey(of)),
            WireguardPeerAttribute::Endpoint(at) => state.endpoint = Some(at),
            WireguardPeerAttribute::LastHandshake(time) => state.handshake = time_of(time.seconds),
            WireguardPeerAttribute::RxBytes(bytes) => state.received = bytes,
            WireguardPeerAttribute::TxBytes(bytes) => state.sent = bytes,
            WireguardPeerAttribute::AllowedIps(nets) => state.allowed = nets.into_iter().filter_map(network).collect(),
            _ => {}
        }
    }
    Some((key?, state))
}

fn network(allowed: WireguardAllowedIp) -> Option<Ipv4Net> {
    let (mut address, mut prefix) = (None, None);
    for attribute in allowed.0 {
        match attribute {
            WireguardAllowedIpAttr::IpAddr(IpAddr::V4(at)) => address = Some(at),
            WireguardAllowedIpAttr::Cidr(length) => prefix = Some(length),
            _ => {}
        }
    }
    Ipv4Net::new(address?, prefix?).ok()
}

/// Returns a time in seconds since 1970; `None` for 0, which stands for no time.
pub(super) fn time_of(seconds: i64) -> Option<SystemTime> {
    let seconds = u64::try_from(seconds).ok().filter(|seconds| *seconds > 0)?;
    UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use netlink_packet_wireguard::{WireguardAddressFamily, WireguardCmd, WireguardTimeSpec};

    #[test]
    fn networks_of_several_replies_are_merged() {
        let net = |last: u8| {
            WireguardAllowedIp(vec![
                WireguardAllowedIpAttr::Family(WireguardAddressFamily::Ipv4),
                WireguardAllowedIpAttr::IpAddr(IpAddr::from([10, 10, 0, last])),
                WireguardAllowedIpAttr::Cidr(32),
            ])
        };
        let reply = |attributes: Vec<WireguardPeerAttribute>| {
            let peers = WireguardAttribute::Peers(vec![WireguardPeer(attributes)]);
            let name = WireguardAttribute::IfName("wg0".to_owned());
            WireguardMessage { cmd: WireguardCmd::GetDevice, attributes: vec![name, peers] }
        };
        let common = || {
            let time = WireguardTimeSpec { seconds: 1_700_000_000, nano_seconds: 5 };
            vec![
                WireguardPeerAttribute::PublicKey([7; 32]),
                WireguardPeerAttribute::Endpoint("198.18.0.1:51820".parse().unwrap()),
                WireguardPeerAttribute::LastHandshake(time),
                WireguardPeerAttribute::RxBytes(5),
                WireguardPeerAttribute::TxBytes(6),
            ]
        };
        let with = |last| [common(), vec![WireguardPeerAttribute::AllowedIps(vec![net(last)])]].concat();
        let expected = PeerState {
            endpoint: Some("198.18.0.1:51820".parse().unwrap()),
            allowed: vec!["10.10.0.1/32".parse().unwrap(), "10.10.0.2/32".parse().unwrap()],
            handshake: Some(UNIX_EPOCH + Duration::from_secs(1_700_000_000)),
            received: 5,
            sent: 6,
        };
        let found = from_kernel(vec![reply(with(1)), reply(with(2))]);
        assert_eq!(found, BTreeMap::from([(MeshKey([7; 32]), expected)]));
        assert_eq!(from_kernel(vec![reply(vec![WireguardPeerAttribute::RxBytes(1)])]), BTreeMap::new());
    }

    #[test]
    fn zero_is_no_handshake() {
        assert_eq!([time_of(0), time_of(-1), time_of(1)], [None, None, Some(UNIX_EPOCH + Duration::from_secs(1))]);
    }
}
