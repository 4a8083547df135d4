//! Debian and Python packages: resolves, locks, downloads and explains them.

pub(crate) mod explain;
pub(crate) mod fetch;
pub mod lock;
pub mod mirror;
pub(crate) mod requests;
pub(crate) mod resolve;
pub(crate) mod wheels;
