//! This node's WireGuard interfaces: which there are, and that the kernel has them.

mod address;
pub mod plan;
mod routes;
mod userspace;
mod wireguard;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fleet::{Node, Topology};
use tokio::net::lookup_host;

use crate::error::Result;
use crate::keys::Keys;
use crate::neighbours::Neighbourhood;
use plan::{Interface, interfaces};
use wireguard::Wireguard;

pub use address::has_address;
pub use routes::Routes;

/// How often names of endpoints are looked up again.
const LOOKUP: Duration = Duration::from_secs(60);

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
    /// When names were last looked up.
    looked: Option<Instant>,
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
            looked: None,
        })
    }

    /// Brings the kernel to what the neighbourhood says now.
    ///
    /// # Errors
    /// The kernel says no.
    pub async fn apply(&mut self, neighbourhood: &Neighbourhood) -> Result<()> {
        let out = neighbourhood.out();
        let planned = interfaces(&self.topology, &self.node, &neighbourhood.keys_without(&out), &self.endpoints);
        // Between the rounds only names that are new: a change does not wait for a name server.
        let all = self.looked.is_none_or(|last| last.elapsed() >= LOOKUP);
        let mut wanted = Vec::new();
        for interface in planned {
            wanted.push(self.resolve(interface, all).await);
        }
        if all {
            self.looked = Some(Instant::now());
        }
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

    /// Applies each change, for ever.
    ///
    /// # Errors
    /// The kernel says no.
    pub async fn keep(mut self, neighbourhood: Arc<Neighbourhood>) -> Result<()> {
        let mut changes = neighbourhood.follow();
        loop {
            self.apply(&neighbourhood).await?;
            let _ = tokio::time::timeout(LOOKUP, changes.changed()).await;
        }
    }

    /// Endpoints' names become addresses; one that can't be found keeps the address it had, or
    /// goes without: the other side may call.
    async fn resolve(&self, interface: Interface<(String, u16)>, all: bool) -> Interface<SocketAddr> {
        let mut peers = Vec::new();
        for peer in interface.peers {
            let had = self.applied.iter().flat_map(|i| &i.peers).find(|p| p.key == peer.key).and_then(|p| p.endpoint);
            let endpoint = match &peer.endpoint {
                Some(_) if had.is_some() && !all => had,
                Some((host, port)) => match lookup_host((host.as_str(), *port)).await {
                    Ok(mut found) => found.next().or(had),
                    Err(e) => {
                        if had.is_none() {
                            println!("{host}: {e}");
                        }
                        had
                    }
                },
                None => None,
            };
            peers.push(plan::Peer { endpoint, key: peer.key, allowed: peer.allowed, keepalive: peer.keepalive });
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
