//! A node's identity, keys, state on the disk and peers, and its client of the hubs' API.

pub mod drained;
pub mod etcd_user;
pub mod hubs;
pub mod identity;
pub mod image;
pub mod join;
pub mod keys;
pub mod neighbours;
pub mod operator_peers;
pub mod outbox;
pub mod renewal;
pub mod rescue;
pub mod revocations;
pub(crate) mod seal;
pub mod state;
pub mod trust;
