//! WireGuard in userspace, for example in a container on a host whose kernel has no WireGuard. The agent configures the
//! program through its socket with the [cross-platform protocol], as wg(8) does.
//!
//! [cross-platform protocol]: https://www.wireguard.com/xplatform/

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;

use fleet::MeshKey;
use ipnet::Ipv4Net;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;

use super::plan::Peer;
use super::state::{PeerState, time_of};
use crate::error::{Error, Result};

/// Client of the program that serves an interface.
pub(super) struct Program {
    socket: PathBuf,
}

impl Program {
    /// Returns the client; `None` if no program serves the interface.
    pub(super) fn for_interface(interface: &str) -> Option<Self> {
        let socket = PathBuf::from(format!("/run/wireguard/{interface}.sock"));
        socket.exists().then_some(Self { socket })
    }

    pub(super) async fn set_device(&self, private: &[u8; 32], port: Option<u16>) -> Result<()> {
        let port = port.map_or(String::new(), |port| format!("listen_port={port}\n"));
        self.ask(&format!("set=1\nprivate_key={}\n{port}\n", hex(private))).await.map(drop)
    }

    pub(super) async fn set_peers(&self, gone: &[MeshKey], new: &[&Peer<SocketAddr>]) -> Result<()> {
        self.ask(&peers(gone, new)).await.map(drop)
    }

    /// Returns the program's peers.
    pub(super) async fn states(&self) -> Result<BTreeMap<MeshKey, PeerState>> {
        Ok(states(&self.ask("get=1\n\n").await?))
    }

    /// Sends a request. The reply ends with an empty line.
    async fn ask(&self, request: &str) -> Result<String> {
        let exchange = async {
            let mut program = UnixStream::connect(&self.socket).await?;
            program.write_all(request.as_bytes()).await?;
            let mut reply = Vec::new();
            while !reply.ends_with(b"\n\n") && program.read_buf(&mut reply).await? > 0 {}
            Ok(String::from_utf8_lossy(&reply).into_owned())
        };
        let reply = exchange.await.map_err(Error::io("configure", &self.socket))?;
        if reply.lines().any(|line| line == "errno=0") {
            return Ok(reply);
        }
        Err(Error::Failed(format!("{} refused a request: {}", self.socket.display(), reply.trim())))
    }
}

fn hex(bytes: &[u8; 32]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn key(hex: &str) -> Option<MeshKey> {
    let mut bytes = [0; 32];
    for (i, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(hex.get(2 * i..2 * i + 2)?, 16).ok()?;
    }
    (hex.len() == 64).then_some(MeshKey(bytes))
}

/// Parses the reply to `get=1`. The lines of a peer follow its public key.
fn states(reply: &str) -> BTreeMap<MeshKey, PeerState> {
    let (mut all, mut current) = (BTreeMap::new(), None);
    for (name, value) in reply.lines().filter_map(|line| line.split_once('=')) {
        if name == "public_key" {
            current = key(value);
        }
        let Some(peer) = current else { continue };
        let state: &mut PeerState = all.entry(peer).or_default();
        match name {
            "endpoint" => state.endpoint = value.parse().ok(),
            "allowed_ip" => state.allowed.extend(value.parse::<Ipv4Net>()),
            "last_handshake_time_sec" => state.handshake = value.parse().ok().and_then(time_of),
            "rx_bytes" => state.received = value.parse().unwrap_or_default(),
            "tx_bytes" => state.sent = value.parse().unwrap_or_default(),
            _ => {}
        }
    }
    all
}

fn peers(gone: &[MeshKey], new: &[&Peer<SocketAddr>]) -> String {
    let mut text = "set=1\n".to_owned();
    for key in gone {
        let _ = writeln!(text, "public_key={}\nremove=true", hex(&key.0));
    }
    for peer in new {
        let _ = writeln!(text, "public_key={}\nreplace_allowed_ips=true", hex(&peer.key.0));
        if let Some(endpoint) = peer.endpoint {
            let _ = writeln!(text, "endpoint={endpoint}");
        }
        if let Some(seconds) = peer.keepalive {
            let _ = writeln!(text, "persistent_keepalive_interval={seconds}");
        }
        for net in &peer.allowed {
            let _ = writeln!(text, "allowed_ip={net}");
        }
    }
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, UNIX_EPOCH};

    #[test]
    fn key_round_trips_through_hex() {
        let bytes: [u8; 32] = std::array::from_fn(|i| 7 * i as u8);
        assert_eq!(key(&hex(&bytes)), Some(MeshKey(bytes)));
        for wrong in ["", "ab", &"ab".repeat(33), &"gg".repeat(32), &"ü".repeat(32)] {
            assert_eq!(key(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn states_have_the_values_of_each_peer() {
        let (one, two) = (MeshKey([1; 32]), MeshKey([2; 32]));
        let reply = format!(
            "private_key={}\nlisten_port=1\npublic_key={}\nendpoint=[::1]:2\nlast_handshake_time_sec=0\n\
             last_handshake_time_nsec=0\npublic_key={}\nlast_handshake_time_sec=1700000000\n\
             last_handshake_time_nsec=5\nrx_bytes=7\ntx_bytes=8\nallowed_ip=10.10.0.9/32\n\
             allowed_ip=::/0\nerrno=0\n\n",
            hex(&[9; 32]),
            hex(&one.0),
            hex(&two.0)
        );
        let first = PeerState { endpoint: Some("[::1]:2".parse().unwrap()), ..PeerState::default() };
        let second = PeerState {
            allowed: vec!["10.10.0.9/32".parse().unwrap()],
            handshake: Some(UNIX_EPOCH + Duration::from_secs(1_700_000_000)),
            received: 7,
            sent: 8,
            endpoint: None,
        };
        assert_eq!(states(&reply), BTreeMap::from([(one, first), (two, second)]));
    }

    #[test]
    fn peers_have_the_format_of_the_protocol() {
        let peer = Peer {
            key: MeshKey([0xab; 32]),
            endpoint: Some("198.18.0.1:51820".parse().unwrap()),
            allowed: vec!["10.10.0.0/16".parse().unwrap(), "10.11.0.2/32".parse().unwrap()],
            keepalive: Some(25),
        };
        let (old, new) = ("01".repeat(32), "ab".repeat(32));
        assert_eq!(
            peers(&[MeshKey([1; 32])], &[&peer]),
            format!(
                "set=1\npublic_key={old}\nremove=true\npublic_key={new}\nreplace_allowed_ips=true\n\
                 endpoint=198.18.0.1:51820\npersistent_keepalive_interval=25\nallowed_ip=10.10.0.0/16\n\
                 allowed_ip=10.11.0.2/32\n\n"
            )
        );
    }
}
