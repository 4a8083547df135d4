//! What a hub does for other nodes: the join API, claims of slots, the rollout and the fence.

pub mod api;
pub mod audit;
mod batch;
mod choice;
pub mod claims;
pub mod departures;
pub(crate) mod drains;
pub mod etcd_access;
pub mod fence;
mod hearing;
pub mod listener;
mod operator_peers;
mod operators;
pub mod orders;
mod owners;
mod peer;
mod rate;
pub(crate) mod records;
mod refusal;
mod renewals;
pub(crate) mod rollout;
mod silence;
mod terms;
pub mod token;
mod useless;
mod votes;
pub mod web;
