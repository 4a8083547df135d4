//! What a node is and keeps: its identity, its keys, its state on the disk, its peers, and the hubs as it reaches them.

pub mod etcd_user;
pub mod hubs;
pub mod identity;
pub mod image;
pub mod join;
pub mod keys;
pub mod neighbours;
pub mod renewal;
pub mod seal;
pub mod state;
pub mod trust;
