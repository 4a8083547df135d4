//! `bakehouse net`: the network of a node.

use std::fmt;
use std::time::Duration;

use clap::Args;
use fleet::node_api::{LinkStatus, NET_PATH, NetStatus, PathStatus, PeerStatus, RouteStatus, SessionStatus};

use super::access::NodeContext;
use super::results::CommandResult;
use super::rows::{duration, missing, section, size};
use super::verbs::AccessArgs;
use crate::deploy::nodes;
use crate::error::Result;

pub(super) const NET: &str = "\
Examples:
  bakehouse net db-1
  bakehouse net hub-1 --json

Shows interfaces, routes, WireGuard peers, the sessions of BGP and BFD, and the ways to the hubs. For the last, the node
sends up to 11 packets to each hub: `1280 of 1420 B pass` means that a network on the way drops larger packets.";

/// Time limit. The node needs up to 6 s if a hub does not answer.
const LIMIT: Duration = Duration::from_secs(10);
/// Longest reply, in bytes. A hub of 1,000 nodes has some 1,000 peers, sessions and routes.
const LONGEST: usize = 8 << 20;

#[derive(Args)]
pub(super) struct NetArgs {
    /// Name of a node, such as `db-2` (group and number)
    pub(super) node: String,
    #[command(flatten)]
    pub(super) access: AccessArgs,
}

/// The state of a network as a text.
pub(super) struct NetText<'a>(pub(super) &'a NetStatus);

/// Reads the network of a node.
pub(super) fn net(context: &NodeContext, args: &NetArgs) -> Result<CommandResult> {
    let reach = context.reach(&args.access)??;
    let node = reach.node(&args.node)?.name.clone();
    let status = nodes::run(reach.client.get(&node, NET_PATH, LONGEST, LIMIT))??;
    Ok(CommandResult::Net(status))
}

impl fmt::Display for NetText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let NetStatus { links, routes, peers, sessions, paths, .. } = self.0;
        section(f, "Interfaces", &links.iter().map(link).collect::<Vec<_>>())?;
        section(f, "Routes", &routes.iter().map(route).collect::<Vec<_>>())?;
        section(f, "WireGuard peers", &peers.iter().map(peer).collect::<Vec<_>>())?;
        section(f, "Sessions", &sessions.iter().map(session).collect::<Vec<_>>())?;
        section(f, "Ways to the hubs", &paths.iter().map(path).collect::<Vec<_>>())?;
        missing(f, &self.0.missing)
    }
}

fn link(link: &LinkStatus) -> Vec<String> {
    let mut more = format!("received {}, sent {}", size(link.received), size(link.sent));
    for (count, what) in [(link.errors, "errors"), (link.dropped, "dropped")] {
        if count > 0 {
            more.push_str(&format!(", {count} {what}"));
        }
    }
    let state = if link.up { "up" } else { "down" };
    vec![link.name.clone(), state.to_owned(), format!("MTU {}", link.mtu), link.addresses.join(" "), more]
}

fn route(route: &RouteStatus) -> Vec<String> {
    let mut way = if route.kind == "unicast" { String::new() } else { route.kind.clone() };
    for (word, value) in [("via", &route.via), ("on", &route.link)] {
        if let Some(value) = value {
            way.push_str(&format!(" {word} {value}"));
        }
    }
    vec![route.to.clone(), way.trim().to_owned(), route.source.clone(), format!("metric {}", route.metric)]
}

fn peer(peer: &PeerStatus) -> Vec<String> {
    let handshake = peer
        .handshake
        .map_or_else(|| "no handshake".to_owned(), |seconds| format!("handshake {} ago", duration(seconds)));
    vec![
        peer.node.clone().unwrap_or_else(|| peer.key.clone()),
        peer.link.clone(),
        peer.endpoint.clone().unwrap_or_else(|| "-".to_owned()),
        handshake,
        format!("received {}, sent {}", size(peer.received), size(peer.sent)),
    ]
}

fn session(session: &SessionStatus) -> Vec<String> {
    let state = if session.up { format!("up for {}", duration(session.seconds)) } else { "down".to_owned() };
    vec![
        session.protocol.to_uppercase(),
        session.node.clone().unwrap_or_else(|| session.name.clone()),
        session.link.clone().unwrap_or_default(),
        state,
    ]
}

fn path(path: &PathStatus) -> Vec<String> {
    let state = match (path.mtu, path.passes) {
        (None, _) => "no route".to_owned(),
        (Some(_), None) => "no reply".to_owned(),
        (Some(mtu), Some(passes)) if passes >= mtu => format!("{mtu} B pass"),
        (Some(mtu), Some(passes)) => format!("{passes} of {mtu} B pass"),
    };
    let time = path.microseconds.map(|time| format!("{:.1} ms", time as f64 / 1000.0));
    vec![path.hub.clone(), path.address.clone(), state, time.unwrap_or_default()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_is_shown() {
        let link = LinkStatus {
            name: "wg-hub1".to_owned(),
            kind: "wireguard".to_owned(),
            up: true,
            mtu: 1420,
            addresses: vec!["10.11.0.20/32".to_owned()],
            received: 5_600_000,
            dropped: 3,
            ..LinkStatus::default()
        };
        let route = RouteStatus {
            to: "10.10.0.0/16".to_owned(),
            via: Some("10.11.0.1".to_owned()),
            link: Some("wg-hub1".to_owned()),
            kind: "unicast".to_owned(),
            source: "bird".to_owned(),
            metric: 32,
        };
        let peer = |node: Option<&str>, handshake| PeerStatus {
            link: "wg-hub1".to_owned(),
            node: node.map(str::to_owned),
            key: "KEY=".to_owned(),
            handshake,
            ..PeerStatus::default()
        };
        let session = |up| SessionStatus {
            protocol: "bgp".to_owned(),
            name: "hub-1".to_owned(),
            node: Some("hub-1".to_owned()),
            link: None,
            up,
            seconds: 7300,
        };
        let path = |mtu, passes| PathStatus {
            hub: "hub-1".to_owned(),
            address: "10.10.0.1".to_owned(),
            mtu,
            passes,
            microseconds: passes.map(|_| 1234),
        };
        let status = NetStatus {
            node: "app-1".to_owned(),
            links: vec![link],
            routes: vec![route.clone(), RouteStatus { kind: "unreachable".to_owned(), via: None, link: None, ..route }],
            peers: vec![peer(Some("hub-1"), Some(12)), peer(None, None)],
            sessions: vec![session(true), session(false)],
            paths: vec![
                path(Some(1420), Some(1420)),
                path(Some(1420), Some(1280)),
                path(Some(1420), None),
                path(None, None),
            ],
            missing: vec!["peers of wg0: gone".to_owned()],
        };
        assert_eq!(
            NetText(&status).to_string(),
            "Interfaces\n\
            \x20 wg-hub1  up  MTU 1420  10.11.0.20/32  received 5.6 MB, sent 0 B, 3 dropped\n\
            Routes\n\
            \x20 10.10.0.0/16  via 10.11.0.1 on wg-hub1  bird  metric 32\n\
            \x20 10.10.0.0/16  unreachable               bird  metric 32\n\
            WireGuard peers\n\
            \x20 hub-1  wg-hub1  -  handshake 12 s ago  received 0 B, sent 0 B\n\
            \x20 KEY=   wg-hub1  -  no handshake        received 0 B, sent 0 B\n\
            Sessions\n\
            \x20 BGP  hub-1    up for 2 h\n\
            \x20 BGP  hub-1    down\n\
            Ways to the hubs\n\
            \x20 hub-1  10.10.0.1  1420 B pass          1.2 ms\n\
            \x20 hub-1  10.10.0.1  1280 of 1420 B pass  1.2 ms\n\
            \x20 hub-1  10.10.0.1  no reply\n\
            \x20 hub-1  10.10.0.1  no route\n\
            Could not be read\n\
            \x20 peers of wg0: gone\n"
        );
    }
}
