//! The hubs' protocols and the nodes' network, with the real etcd, BIRD, nftables, HAProxy, keepalived, Knot and Alertmanager on loopback
//! and in network namespaces. The tests need root, and run in parallel: each has a network namespace of its own.

mod acme;
mod alerts;
mod attack;
mod dns;
mod drain;
mod etcd_access;
mod eviction;
mod fence;
mod join;
mod lan;
mod logins;
mod mesh;
mod model;
mod netboot_install;
mod operators;
mod ports;
mod replay;
mod rollout;
mod sql;
mod web;
