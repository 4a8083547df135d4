//! What the page has to know about the fleet. The agent renders it to `/run/bakehouse/page.json`.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::error::{Error, Result};

/// The fleet, and the services of the monitor.
#[derive(Clone, Debug, Deserialize)]
pub struct Fleet {
    /// Name of the fleet.
    pub name: String,
    /// Name of the monitor that serves the page.
    pub monitor: String,
    /// Address that one hub holds.
    pub vip: Ipv4Addr,
    /// Prometheus of this monitor.
    pub prometheus: SocketAddr,
    /// Alertmanager of this monitor.
    pub alertmanager: SocketAddr,
    /// TCP port of every node to which the page connects, to notice that the node is down.
    pub probe: u16,
    /// Seconds between two scrapes.
    pub interval: f64,
    /// Whether the fleet makes backups.
    pub backups: bool,
    /// Whether nodes update themselves.
    pub updates: bool,
    /// Names of the nodes with an etcd vote.
    pub voters: Vec<String>,
    /// File with the last requests of operators, as JSON lines. The page works without it.
    #[serde(default)]
    pub audit: Option<PathBuf>,
    /// Every node.
    pub nodes: Vec<Node>,
}

/// A node of the fleet.
#[derive(Clone, Debug, Deserialize)]
pub struct Node {
    /// Name of the slot.
    pub name: String,
    /// Name of the group.
    pub group: String,
    /// Roles.
    pub roles: Vec<String>,
    /// The node's own address in the mesh.
    pub address: Ipv4Addr,
    /// Number among the hubs, counted from 1; 0 for other nodes.
    pub hub: u16,
}

/// Number of nodes up to which the page shows each one.
const SMALL: usize = 40;

impl Fleet {
    /// Reads the file that the agent has rendered.
    ///
    /// # Errors
    /// If the file cannot be read, or has another format.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read(path).map_err(Error::io("read", path.display()))?;
        serde_json::from_slice(&text).map_err(|source| Error::Json { what: path.display().to_string(), source })
    }

    /// Returns the node with this name.
    #[must_use]
    pub fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.iter().find(|node| node.name == name)
    }

    /// Whether the fleet has so few nodes that the page shows each one.
    #[must_use]
    pub fn is_small(&self) -> bool {
        self.nodes.len() <= SMALL
    }

    /// Returns the nodes with a role.
    pub fn with_role<'a>(&'a self, role: &'a str) -> impl Iterator<Item = &'a Node> {
        self.nodes.iter().filter(move |node| node.has_role(role))
    }
}

impl Node {
    /// Whether other nodes depend on this one. A large fleet has many nodes that are not central.
    #[must_use]
    pub fn is_central(&self) -> bool {
        ["hub", "voter", "db", "monitor"].iter().any(|role| self.has_role(role))
    }

    /// Whether the node has this role.
    #[must_use]
    pub fn has_role(&self, role: &str) -> bool {
        self.roles.iter().any(|of| of == role)
    }
}
