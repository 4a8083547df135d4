//! Debian packages: which ones an image needs, in which versions, and their files.

pub(crate) mod explain;
pub(crate) mod fetch;
pub mod lock;
pub mod mirror;
pub(crate) mod requests;
pub(crate) mod resolve;
