//! Delivery of built images to machines: disks, hypervisors, network boot, updates, and requests to hubs.

pub mod alertmanager;
mod any_hub;
pub(crate) mod audit;
pub(crate) mod export;
pub(crate) mod flash;
pub mod hub_client;
pub(crate) mod netboot;
pub(crate) mod nodes;
pub(crate) mod operator_peer;
pub(crate) mod publish;
