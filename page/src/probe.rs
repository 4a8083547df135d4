//! Connections to the nodes, to notice within seconds that one is down. Prometheus notices it at the next scrape.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::config::Fleet;

/// Time between two rounds.
pub(crate) const INTERVAL: Duration = Duration::from_secs(1);
/// Time limit of a connection.
const LIMIT: Duration = Duration::from_millis(900);
/// Failures in a row after which a node counts as down. A single lost packet is no failure.
const FAILURES: u32 = 2;

/// Nodes, and the number of failures in a row of each.
#[derive(Debug)]
pub(crate) struct Probes(Vec<Probe>);

#[derive(Debug)]
struct Probe {
    node: String,
    address: SocketAddr,
    failures: u32,
}

/// Whether each probed node is reachable.
pub(crate) type Reachable = BTreeMap<String, bool>;

impl Probes {
    /// Selects the nodes: all of a small fleet, and the central ones of a large one.
    pub(crate) fn new(fleet: &Fleet) -> Self {
        let wanted = fleet.nodes.iter().filter(|node| fleet.is_small() || node.is_central());
        Self(
            wanted
                .map(|node| Probe {
                    node: node.name.clone(),
                    address: SocketAddr::from((node.address, fleet.probe)),
                    failures: 0,
                })
                .collect(),
        )
    }

    /// Forgets earlier failures.
    pub(crate) fn reset(&mut self) {
        self.0.iter_mut().for_each(|probe| probe.failures = 0);
    }

    /// Connects to every node at the same time. Returns within 0.9 s.
    pub(crate) async fn round(&mut self) -> Reachable {
        let reached = join_all(self.0.iter().map(|probe| is_reachable(probe.address))).await;
        for (probe, reached) in self.0.iter_mut().zip(reached) {
            probe.failures = if reached { 0 } else { probe.failures.saturating_add(1) };
        }
        self.0.iter().map(|probe| (probe.node.clone(), probe.failures < FAILURES)).collect()
    }
}

/// Whether the node's kernel answers. It refuses a connection to a port without a listener, and that is an answer, too.
async fn is_reachable(address: SocketAddr) -> bool {
    match timeout(LIMIT, TcpStream::connect(address)).await {
        Ok(Ok(_)) => true,
        Ok(Err(e)) => e.kind() == ErrorKind::ConnectionRefused,
        Err(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Node;
    use std::net::Ipv4Addr;

    #[tokio::test]
    async fn a_node_is_down_after_two_failures_and_a_refusal_is_none() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let probe = |node: &str, address: SocketAddr| Probe { node: node.to_owned(), address, failures: 0 };
        let closed = SocketAddr::from((Ipv4Addr::LOCALHOST, 1));
        // TCP has no broadcast: the kernel refuses to connect.
        let unreachable = SocketAddr::from((Ipv4Addr::BROADCAST, 9));
        let mut probes = Probes(vec![
            probe("up", listener.local_addr().unwrap()),
            probe("refuses", closed),
            probe("down", unreachable),
        ]);
        let first = probes.round().await;
        assert!(first.values().all(|reached| *reached), "{first:?}");
        let second = probes.round().await;
        assert_eq!(second, [("down", false), ("refuses", true), ("up", true)].map(|(n, r)| (n.to_owned(), r)).into());
        probes.reset();
        assert!(probes.round().await["down"]);
    }

    #[test]
    fn a_large_fleet_probes_its_central_nodes() {
        let node = |name: String, role: &str| Node {
            name,
            group: role.to_owned(),
            roles: vec![role.to_owned()],
            address: Ipv4Addr::LOCALHOST,
            hub: 0,
        };
        let mut fleet = crate::testing::fleet();
        assert_eq!(Probes::new(&fleet).0.len(), fleet.nodes.len());
        let central = fleet.nodes.iter().filter(|node| !node.has_role("app")).count();
        fleet.nodes.extend((0..1000).map(|n| node(format!("app-{n}"), "app")));
        assert_eq!(Probes::new(&fleet).0.len(), central);
    }
}
