//! Clients of the services that a node talks to.

pub mod backoff;
pub mod etcd;
pub mod patroni;
