//! Built images to machines: disks, hypervisors, the network, updates, and requests to hubs.

pub(crate) mod export;
pub(crate) mod flash;
pub mod hub_client;
pub mod netboot;
pub(crate) mod publish;
