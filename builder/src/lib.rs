//! `bakehouse`: a `fleet.toml` in, bootable immutable node images out.

pub mod assemble;
mod bake;
pub mod compose;
pub mod deploy;
pub mod error;
pub mod format;
mod image;
pub mod keys;
#[cfg(test)]
mod layers;
pub mod packages;
pub mod progress;
pub mod project;
pub mod rehearse;
pub mod sandbox;
mod store;
mod toolchain;
mod util;
pub mod vm;
pub mod worker;

pub mod cli;
