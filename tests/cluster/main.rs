//! The hubs' protocols and the nodes' network, with the real etcd, BIRD, nftables and HAProxy on loopback and in
//! network namespaces. The tests need root, and run in parallel: each has a network namespace of its own.

mod attack;
mod etcd_access;
mod eviction;
mod fence;
mod join;
mod mesh;
mod model;
mod netboot_install;
mod ports;
mod replay;
mod rollout;
mod web;
