//! The agent in every image: it makes a bare machine a node.
//!
//! At every boot: who am I (ticket or state) → render /run from it → start the role over
//! D-Bus → say so. Each persisted step is whole or not there, and is not done twice.

pub mod agent;
pub mod client;
pub mod error;
pub mod host;
pub mod hub;
pub mod install;
pub mod member;
pub mod mesh;
pub mod node;
pub mod render;
pub mod update;
