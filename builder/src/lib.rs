//! `bakehouse`: a `fleet.toml` in, bootable immutable node images out.

pub mod authority;
mod bake;
mod checks;
pub mod compose;
mod credential;
mod deb822;
mod digest;
mod disk;
mod elf;
pub mod error;
mod explain;
mod export;
mod fetch;
mod flash;
mod image;
mod initrd;
pub mod lock;
mod manifest;
pub mod mirror;
mod operator;
mod plan;
pub mod progress;
pub mod project;
mod publish;
pub mod rehearse;
mod report;
mod resolve;
pub mod sandbox;
mod store;
pub mod ticket;
mod tools;
mod tree;
mod uki;
mod verity;
pub mod vm;

pub mod cli;
