//! Helpers that do not depend on a fleet: files, digests, processes, HTTP.

mod connections;
pub(crate) mod digest;
pub(crate) mod fs;
pub(crate) mod http_server;
pub(crate) mod json;
pub(crate) mod memory;
pub(crate) mod process;
pub(crate) mod random;
pub(crate) mod terminal;
pub(crate) mod time;
