//! Clients of the services that a node uses.

pub mod etcd;
pub(crate) mod haproxy;
pub(crate) mod metrics;
pub(crate) mod patroni;

pub use fleet_https::backoff;
