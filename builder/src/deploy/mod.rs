//! Built images to machines: disks, hypervisors, the network, updates, and requests to hubs.

pub(crate) mod export;
pub(crate) mod flash;
pub(crate) mod hub_client;
pub mod netboot;
pub(crate) mod publish;
