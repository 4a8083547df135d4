//! The agent in every image: it makes a machine a node of the fleet.
//!
//! At every boot the agent reads its identity from the state on disk or from a ticket, renders the configuration in
//! `/run`, starts the roles over D-Bus, and reports that it is ready. Every stored step is atomic and idempotent.
//!
//! Modules import only modules further down this list (`layers.rs` is the test):
//!
//! - `agent`: the steps of a boot
//! - `member`: tasks of a running node
//! - `dns`: on a hub, the zone of the name that it serves
//! - `lan`: on a hub, the interface for the addresses of the local network
//! - `api`: the node API for operators
//! - `hub`: the join API, claims of slots, the fence, the rollout
//! - `update`: new images: download, boot entries, health check
//! - `render`: configuration files from templates
//! - `mesh`: WireGuard
//! - `node`: identity, keys, state on disk, peers, the client of the hubs
//! - `client`: clients of etcd and Patroni, backoff
//! - `host`: systemd, D-Bus, the log, the console
//! - `server`: threads, sockets and limits of the HTTPS servers
//! - `error`: the error type
//!
//! [`install`] is the program of the network installer, and imports `client`, `host` and `error` only.

#![warn(clippy::print_stdout, clippy::print_stderr)]

pub mod agent;
pub mod api;
pub mod client;
pub mod dns;
pub mod error;
pub mod host;
pub mod hub;
pub mod install;
pub mod lan;
pub mod member;
pub mod mesh;
pub mod node;
pub mod render;
mod server;
pub mod update;

#[cfg(test)]
mod layers;
