//! This node's WireGuard interfaces: which there are, and that the kernel has them.

mod address;
pub mod plan;
mod resolver;
mod routes;
mod userspace;
mod wireguard;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use fleet::{MeshKey, Node, Topology};

use crate::error::Result;
use crate::node::keys::Keys;
use crate::node::neighbours::PeerTable;
use plan::{Interface, Peer, interfaces};
use resolver::{Resolver, choose};
use wireguard::Wireguard;

pub use address::has_address;
pub use routes::Routes;

/// How often peers that don't answer at one address of their name are looked for.
const CHECK: Duration = Duration::from_secs(30);
/// A peer without a handshake for so long does not answer: WireGuard gives a session up after this time, and a
/// peer with a keepalive renews it every two minutes.
const SILENT: Duration = Duration::from_secs(180);

/// Keeps the kernel's interfaces in step with what is known of the others. Sessions of peers
/// that don't change are not touched.
pub struct Mesh {
    wireguard: Wireguard,
    private: [u8; 32],
    topology: Topology,
    node: Node,
    endpoints: BTreeMap<String, String>,
    /// What the kernel was last told.
    applied: Vec<Interface<SocketAddr>>,
    resolver: Resolver,
    /// When each peer was given the address it has.
    chosen: BTreeMap<MeshKey, Instant>,
    /// Peers that don't answer at the address they have.
    silent: BTreeMap<MeshKey, SocketAddr>,
}

impl Mesh {
    /// # Errors
    /// The kernel does not speak netlink with this process.
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

    /// Brings the kernel to what the neighbourhood says now. Does not wait for a name server: a peer whose name
    /// has no known address gets one when it is found.
    ///
    /// # Errors
    /// The kernel refuses an interface or a peer.
    pub async fn apply(&mut self, neighbourhood: &PeerTable) -> Result<()> {
        let out = neighbourhood.out();
        let planned = interfaces(&self.topology, &self.node, &neighbourhood.keys_without(&out), &self.endpoints);
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

    /// Applies each change until the process ends.
    ///
    /// # Errors
    /// The kernel refuses an interface or a peer.
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

    /// Finds peers that have another address to try, and no session by the one they have.
    async fn find_silent(&mut self) {
        self.silent.clear();
        for interface in &self.applied {
            let tried = |p: &&Peer<SocketAddr>| self.chosen.get(&p.key).is_some_and(|at| at.elapsed() >= CHECK);
            let peers: Vec<(MeshKey, SocketAddr)> =
                interface.peers.iter().filter(tried).filter_map(|p| Some((p.key, p.endpoint?))).collect();
            if peers.is_empty() {
                continue;
            }
            match self.wireguard.handshakes(&interface.name).await {
                Ok(handshakes) => {
                    let now = SystemTime::now();
                    let answers = |key: &MeshKey| {
                        handshakes.get(key).is_some_and(|at| now.duration_since(*at).is_ok_and(|age| age < SILENT))
                    };
                    self.silent.extend(peers.into_iter().filter(|(key, _)| !answers(key)));
                }
                Err(e) => println!("{e}"),
            }
        }
    }

    /// Endpoints' names become addresses; one that can't be found keeps the address it had, or
    /// goes without: the other side may call.
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
        }
    }
}
