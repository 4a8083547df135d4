//! Downloads a newer image into the inactive root partition with systemd-sysupdate. A server on loopback between
//! systemd-sysupdate and the update folder copies unchanged blocks from the running image. The server is not trusted:
//! systemd-sysupdate verifies its files against the signed checksums. If that fails, systemd-sysupdate downloads
//! everything from the update folder.

mod assembly;
pub mod date;
mod server;
mod sysupdate;
mod upstream;

pub use sysupdate::load;
