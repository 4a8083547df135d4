//! The node's network, for operators: interfaces, routes, WireGuard peers, sessions of BIRD, and the ways to the hubs.
//!
//! BIRD's control socket has texts for people only, so the sessions come from its exporter, whose metrics have names and
//! labels.

use std::net::Ipv4Addr;
use std::time::{Duration, SystemTime};

use fleet::node_api::{LinkStatus, NetStatus, PathStatus, PeerStatus, RouteStatus, SessionStatus};
use fleet::{MeshKey, Node, Topology};
use futures_util::future::join_all;
use tokio::time::timeout;

use super::NodeApi;
use crate::client::metrics::{Sample, samples};
use crate::error::{Error, Result};
use crate::host::echo::Echo;
use crate::host::network::Network;
use crate::mesh::{PeerState, peer_states};

/// Port of BIRD's exporter.
const BIRD_EXPORTER: u16 = 9324;
/// Time limit of each part.
const PART: Duration = Duration::from_secs(6);
/// Time limit for the reply to a packet.
const ECHO: Duration = Duration::from_millis(500);

/// Returns the state of the node's network.
pub(super) async fn status(api: &NodeApi) -> NetStatus {
    let (node, topology) = (&api.node, &api.topology);
    let mut status = NetStatus { node: node.name.clone(), ..NetStatus::default() };
    let interfaces = topology.wireguard(node);
    let peers = join_all(interfaces.iter().map(|link| within(peer_states(link))));
    let host = node.address.to_string();
    let bird = samples(&host, BIRD_EXPORTER, &["bird_protocol_up", "bird_bfd_session_up"]);
    let hubs: Vec<_> = topology.hubs.iter().filter(|hub| hub.name != node.name).collect();
    let paths = join_all(hubs.iter().map(|hub| within(path(hub.address))));
    let (kernel, peers, bird, paths) = tokio::join!(within(kernel()), peers, within(bird), paths);

    let mut missing = Vec::new();
    let mut note = |what: &str, e: &Error| missing.push(format!("{what}: {}", e.chain()));
    match kernel {
        Ok((links, routes)) => (status.links, status.routes) = (links, routes),
        Err(e) => note("interfaces and routes", &e),
    }
    let now = SystemTime::now();
    for (link, states) in interfaces.iter().zip(peers) {
        match states {
            Ok(states) => status.peers.extend(states.into_iter().map(|state| peer(topology, link, state, now))),
            Err(e) => note(&format!("peers of {link}"), &e),
        }
    }
    match bird {
        Ok(samples) => status.sessions = sessions(topology, &samples),
        Err(e) => note("sessions of BIRD", &e),
    }
    for (hub, found) in hubs.iter().zip(paths) {
        let (mtu, passes) = match found {
            Ok((mtu, passes)) => (Some(mtu), passes),
            Err(e) => {
                note(&format!("the way to {}", hub.name), &e);
                (None, None)
            }
        };
        status.paths.push(PathStatus {
            hub: hub.name.clone(),
            address: hub.address.to_string(),
            mtu,
            passes: passes.map(|(size, _)| size),
            microseconds: passes.map(|(_, time)| u64::try_from(time.as_micros()).unwrap_or(u64::MAX)),
        });
    }
    status.missing = missing;
    status
}

async fn within<T>(part: impl Future<Output = Result<T>>) -> Result<T> {
    let late = |_| Err(Error::Failed(format!("no answer within {} s", PART.as_secs())));
    timeout(PART, part).await.unwrap_or_else(late)
}

/// Returns the interfaces and the routes.
async fn kernel() -> Result<(Vec<LinkStatus>, Vec<RouteStatus>)> {
    let network = Network::open()?;
    Ok((network.links().await?, network.routes().await?))
}

/// Returns the kernel's MTU of the path, and the largest packet to which the hub replied, with its time.
async fn path(to: Ipv4Addr) -> Result<(u32, Option<(u32, Duration)>)> {
    let mut echo = Echo::open(to).await.map_err(Error::cannot("send echo requests"))?;
    let mtu = echo.mtu().map_err(Error::cannot("read the MTU of the path"))?;
    let passes = echo.largest(mtu, ECHO).await.map_err(Error::cannot("send echo requests"))?;
    Ok((mtu, passes))
}

fn peer(topology: &Topology, link: &str, (key, state): (MeshKey, PeerState), now: SystemTime) -> PeerStatus {
    // A hub's link has one peer, whose networks are those of the whole mesh.
    let hub = link.strip_prefix("wg-hub").and_then(|number| number.parse().ok()).unwrap_or(0);
    let is_peer = |node: &&Node| match hub {
        0 => state.allowed.iter().any(|net| net.prefix_len() == 32 && net.addr() == node.address),
        hub => node.hub == hub,
    };
    PeerStatus {
        link: link.to_owned(),
        node: topology.nodes.iter().find(is_peer).map(|node| node.name.clone()),
        key: key.to_string(),
        endpoint: state.endpoint.map(|at| at.to_string()),
        handshake: state.handshake.map(|at| now.duration_since(at).unwrap_or_default().as_secs()),
        received: state.received,
        sent: state.sent,
    }
}

/// Returns the sessions in the exporter's metrics.
fn sessions(topology: &Topology, samples: &[Sample]) -> Vec<SessionStatus> {
    let uptime = |of: &Sample, name: &str| {
        let is_same = |s: &&Sample| ["name", "ip", "interface"].iter().all(|label| s.label(label) == of.label(label));
        samples.iter().filter(|s| s.name == name).find(is_same).map(Sample::count).unwrap_or_default()
    };
    let session = |sample: &Sample| {
        let (protocol, time, node) = match sample.name.as_str() {
            "bird_protocol_up" if sample.label("proto") == "BGP" => {
                ("bgp", "bird_protocol_uptime", topology.node(sample.label("name")))
            }
            "bird_bfd_session_up" => {
                let is_neighbour = |node: &&Node| node.transport.to_string() == sample.label("ip");
                ("bfd", "bird_bfd_session_uptime_seconds", topology.nodes.iter().find(is_neighbour))
            }
            _ => return None,
        };
        let up = sample.value > 0.0;
        Some(SessionStatus {
            protocol: protocol.to_owned(),
            name: sample.label("name").to_owned(),
            node: node.map(|node| node.name.clone()),
            link: Some(sample.label("interface").to_owned()).filter(|link| !link.is_empty()),
            up,
            seconds: if up { uptime(sample, time) } else { 0 },
        })
    };
    let mut all: Vec<SessionStatus> = samples.iter().filter_map(session).collect();
    all.sort_by(|a, b| (&a.protocol, &a.node, &a.name).cmp(&(&b.protocol, &b.node, &b.name)));
    // The exporter has a sample for each address family of a session.
    all.dedup_by(|a, b| a.protocol == "bgp" && b.protocol == "bgp" && a.name == b.name);
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::metrics::parse;
    use std::time::UNIX_EPOCH;

    fn topology() -> Topology {
        let text = b"name = \"acme\"\n[groups]\nhub.count = 2\ndb.count = 1\n";
        Topology::from_fleet(&fleet::Fleet::parse("fleet.toml", text).unwrap())
    }

    #[test]
    fn sessions_have_the_names_of_their_neighbours() {
        let topology = topology();
        let transport = topology.node("db-1").unwrap().transport;
        let text = format!(
            "bird_protocol_up{{export_filter=\"\",import_filter=\"\",ip_version=\"4\",name=\"hub-2\",proto=\"BGP\"}} 1\n\
             bird_protocol_uptime{{export_filter=\"\",import_filter=\"\",ip_version=\"4\",name=\"hub-2\",proto=\"BGP\"}} 77\n\
             bird_protocol_up{{ip_version=\"4\",name=\"w0001\",proto=\"BGP\"}} 0\n\
             bird_protocol_uptime{{ip_version=\"4\",name=\"w0001\",proto=\"BGP\"}} 5\n\
             bird_protocol_up{{name=\"bfd1\",proto=\"\"}} 1\n\
             bird_bfd_session_up{{interface=\"wg0\",ip=\"{transport}\",name=\"bfd1\"}} 1\n\
             bird_bfd_session_uptime_seconds{{interface=\"wg0\",ip=\"{transport}\",name=\"bfd1\"}} 9\n\
             bird_bfd_session_uptime_seconds{{interface=\"wg0\",ip=\"192.0.2.1\",name=\"bfd1\"}} 8\n"
        );
        let found = sessions(&topology, &parse(&text, &["bird_protocol_up", "bird_bfd_session_up"]));
        let shown: Vec<_> = found
            .iter()
            .map(|s| (s.protocol.as_str(), s.name.as_str(), s.node.as_deref(), s.link.as_deref(), s.up, s.seconds))
            .collect();
        assert_eq!(
            shown,
            [
                ("bfd", "bfd1", Some("db-1"), Some("wg0"), true, 9),
                ("bgp", "w0001", None, None, false, 0),
                ("bgp", "hub-2", Some("hub-2"), None, true, 77),
            ]
        );
    }

    #[test]
    fn peers_have_the_names_of_their_slots() {
        let topology = topology();
        let now = UNIX_EPOCH + Duration::from_secs(1000);
        let named = |link: &str, allowed: &[String], handshake| {
            let allowed = allowed.iter().map(|net| net.parse().unwrap()).collect();
            let state = PeerState { allowed, handshake, ..PeerState::default() };
            let found = peer(&topology, link, (MeshKey([1; 32]), state), now);
            (found.node, found.handshake)
        };
        let db = topology.node("db-1").unwrap();
        let own = [format!("{}/32", db.address), format!("{}/32", db.transport)];
        let at = |seconds| Some(UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(named("wg0", &own, at(990)), (Some("db-1".to_owned()), Some(10)));
        assert_eq!(named("wg-hub2", &["10.10.0.0/16".to_owned()], None), (Some("hub-2".to_owned()), None));
        assert_eq!(named("wg0", &["192.0.2.1/32".to_owned()], at(2000)), (None, Some(0)));
    }
}
