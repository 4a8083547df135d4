//! Helpers that know nothing of a fleet: files, digests, HTTP.

mod connections;
pub(crate) mod digest;
pub(crate) mod http_server;
