//! Debian and Python packages: resolves, locks, downloads and explains them.

mod code_archive;
pub(crate) mod explain;
pub(crate) mod fetch;
mod git;
pub mod lock;
pub mod mirror;
pub(crate) mod odoo_code;
mod python;
pub(crate) mod requests;
mod requirements;
pub(crate) mod resolve;
pub(crate) mod wheels;
