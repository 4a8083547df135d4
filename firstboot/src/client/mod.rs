//! Clients of the services that a node talks to.

pub mod etcd;
pub mod patroni;

pub use fleet_https::backoff;
