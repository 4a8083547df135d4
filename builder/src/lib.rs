//! `bakehouse`: a `fleet.toml` in, bootable immutable node images out.

pub mod compose;
mod deb822;
mod digest;
pub mod error;
mod fetch;
mod lock;
mod mirror;
mod progress;
mod project;
mod resolve;
pub mod sandbox;
mod store;
mod tools;

pub mod cli;
