//! The agent in every image: it makes a bare machine a node.
//!
//! At every boot: who am I (ticket or state) → render /run from it → start the role over
//! D-Bus → say so. Each persisted step is whole or not there, and is not done twice.
//!
//! Modules import only what is further down this list (`layers.rs` is the test):
//!
//! - `agent`: what happens at a boot, in order
//! - `member`: what a node does as long as it runs
//! - `hub`: the join API, claims of slots, the fence, the rollout
//! - `update`: a new image: its download, its boot entries, the health check
//! - `render`: configuration files from templates
//! - `mesh`: WireGuard
//! - `node`: identity, keys, state on the disk, peers, the hubs as a node reaches them
//! - `client`: clients of etcd and Patroni, pauses between attempts
//! - `host`: systemd, D-Bus, the journal, the console
//! - `error`: the one error type
//!
//! [`install`] is the program of the network installer, and imports `client`, `host` and `error` only.

pub mod agent;
pub mod client;
pub mod error;
pub mod host;
pub mod hub;
pub mod install;
pub mod member;
pub mod mesh;
pub mod node;
pub mod render;
pub mod update;

#[cfg(test)]
mod layers;
