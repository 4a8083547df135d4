//! This node's WireGuard interfaces: their plan, and its application to the kernel.

mod address;
pub(crate) mod plan;
mod resolver;
mod routes;
mod state;
mod userspace;
mod wireguard;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use fleet::{MeshKey, Node, Topology};
use tracing::warn;

use crate::error::Result;
use crate::node::keys::Keys;
use crate::node::neighbours::PeerTable;
use plan::{Interface, Peer, interfaces};
pub(crate) use resolver::Resolver;
use resolver::choose;
use wireguard::Wireguard;

pub use address::has_address;
pub use routes::Routes;
pub(crate) use state::{PeerState, peer_states};

/// Interval at which the agent looks for silent peers whose name has several addresses.
const CHECK: Duration = Duration::from_secs(30);
/// A peer without a handshake for this time is silent. WireGuard ends a session after this time, and a peer with a
/// keepalive renews its session every 120 s.
const SILENT: Duration = Duration::from_secs(180);

/// Keeps the WireGuard interfaces equal to the plan for the peer table. Sessions of unchanged peers continue.
pub struct Mesh {
    wireguard: Wireguard,
    private: [u8; 32],
    topology: Topology,
    node: Node,
    endpoints: BTreeMap<String, String>,
    /// Configuration that was applied last.
    applied: Vec<Interface<SocketAddr>>,
    resolver: Resolver,
    /// Time at which each peer got its address.
    chosen: BTreeMap<MeshKey, Instant>,
    /// Peers that do not answer at their address.
    silent: BTreeMap<MeshKey, SocketAddr>,
}

impl Mesh {
    /// Prepares the mesh of `node`, without changing an interface.
    ///
    /// # Errors
    /// If the netlink socket cannot be opened, or the node's key is damaged.
    pub fn new(topology: &Topology, node: &Node, endpoints: &BTreeMap<String, String>, keys: &Keys) -> Result<Self> {
        Ok(Self {
            wireguard: Wireguard::open()?,
            private: keys.mesh_private()?,
            topology: topology.clone(),
            node: node.clone(),
            endpoints: endpoints.clone(),
            applied: Vec::new(),
            resolver: Resolver::new(),
            chosen: BTreeMap::new(),
            silent: BTreeMap::new(),
        })
    }

    /// Configures the interfaces for the current peer table. It does not wait for a name server. A peer whose name has
    /// no known address gets its address later.
    ///
    /// # Errors
    /// If the kernel refuses an interface or a peer.
    pub async fn apply(&mut self, neighbourhood: &PeerTable) -> Result<()> {
        let out = neighbourhood.out();
        let keys = neighbourhood.keys_without(&out);
        let planned = interfaces(&self.topology, &self.node, &keys, &neighbourhood.operators(), &self.endpoints);
        let wanted: Vec<_> = planned.into_iter().map(|interface| self.resolve(interface)).collect();
        for interface in &wanted {
            let before = self.applied.iter().find(|i| i.name == interface.name);
            if before != Some(interface) {
                self.wireguard.apply(interface, before, &self.private, self.topology.mesh.mtu).await?;
            }
        }
        self.applied = wanted;
        neighbourhood.are_out(out);
        Ok(())
    }

    /// Applies each change of the peer table, until the process ends.
    ///
    /// # Errors
    /// If the kernel refuses an interface or a peer.
    pub async fn keep(mut self, neighbourhood: Arc<PeerTable>) -> Result<()> {
        let mut changes = neighbourhood.follow();
        loop {
            self.apply(&neighbourhood).await?;
            tokio::select! {
                _ = changes.changed() => {}
                () = self.resolver.changed() => {}
                () = tokio::time::sleep(CHECK) => self.find_silent().await,
            }
        }
    }

    /// Finds peers without a recent handshake that have used their address for 30 s. They get the next address.
    async fn find_silent(&mut self) {
        self.silent.clear();
        for interface in &self.applied {
            let tried = |p: &&Peer<SocketAddr>| self.chosen.get(&p.key).is_some_and(|at| at.elapsed() >= CHECK);
            let peers: Vec<(MeshKey, SocketAddr)> =
                interface.peers.iter().filter(tried).filter_map(|p| Some((p.key, p.endpoint?))).collect();
            if peers.is_empty() {
                continue;
            }
            match self.wireguard.states(&interface.name).await {
                Ok(states) => {
                    let now = SystemTime::now();
                    let answers = |key: &MeshKey| {
                        let handshake = states.get(key).and_then(|state| state.handshake);
                        handshake.is_some_and(|at| now.duration_since(at).is_ok_and(|age| age < SILENT))
                    };
                    self.silent.extend(peers.into_iter().filter(|(key, _)| !answers(key)));
                }
                Err(e) => warn!("cannot read the handshakes of {}: {}", interface.name, e.chain()),
            }
        }
    }

    /// Resolves the endpoints' names. If a name cannot be resolved, the peer keeps its address, or has no endpoint. The
    /// other end can still connect.
    fn resolve(&mut self, interface: Interface<(String, u16)>) -> Interface<SocketAddr> {
        let mut peers = Vec::new();
        for peer in interface.peers {
            let had = self.applied.iter().flat_map(|i| &i.peers).find(|p| p.key == peer.key).and_then(|p| p.endpoint);
            let endpoint = peer.endpoint.as_ref().and_then(|name| {
                let silent = self.silent.get(&peer.key).copied();
                choose(&self.resolver.addresses(name), had, |used| silent == Some(used))
            });
            if endpoint != had {
                self.chosen.insert(peer.key, Instant::now());
            }
            peers.push(Peer { endpoint, key: peer.key, allowed: peer.allowed, keepalive: peer.keepalive });
        }
        Interface {
            peers,
            name: interface.name,
            port: interface.port,
            address: interface.address,
            partner: interface.partner,
            route: interface.route,
        }
    }
}
