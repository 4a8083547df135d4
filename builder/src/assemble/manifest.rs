//! The manifest of an image.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use serde::Serialize;
use serde_json::{Value, json};

use crate::packages::lock::Package;

/// `NAME_VERSION.manifest.json`.
#[derive(Serialize)]
pub struct Manifest<'a> {
    pub format: u32,
    pub id: &'a str,
    pub version: &'a str,
    pub fleet: &'a str,
    pub group: &'a str,
    pub roles: &'a [String],
    /// Revision of the fleet's sources, as `--revision` gave it.
    pub revision: Option<&'a str>,
    /// Version of bakehouse.
    pub bakehouse: &'a str,
    /// sha256 of bakehouse.lock.
    pub lock: &'a str,
    pub kernel: &'a str,
    pub roothash: &'a str,
    /// In bytes.
    pub sizes: Sizes,
    /// sha256 of the agent.
    pub agent: &'a str,
    pub packages: Vec<Value>,
    /// Baked files: path → sha256 of the content, or of a link's target.
    pub files: BTreeMap<&'a str, String>,
    /// Addresses of the group's slots.
    pub nodes: BTreeMap<&'a str, Ipv4Addr>,
    /// Names of the fleet's hubs.
    pub hubs: Vec<&'a str>,
    /// Names of the nodes with an etcd vote.
    pub voters: Vec<&'a str>,
    /// Format of the agent's state on a node.
    pub state: u16,
    pub mesh: String,
    /// Names of the migrations, which convert a node's data.
    pub migrations: Vec<&'a str>,
    /// Source of the database, if it is restored from a backup: `[backup] restore`.
    pub restore: Option<&'a str>,
}

#[derive(Serialize)]
pub struct Sizes {
    pub disk: u64,
    pub root_slot: u64,
    pub root: u64,
    pub uki: u64,
    /// Size of all files of the tree.
    pub tree: u64,
}

/// Returns the packages in the form of the manifest.
#[must_use]
pub fn package_list(packages: &[&Package]) -> Vec<Value> {
    packages
        .iter()
        .map(|p| json!({ "name": p.name, "version": p.version, "arch": p.arch, "suite": p.suite, "sha256": p.sha256 }))
        .collect()
}
