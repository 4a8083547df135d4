//! Loads a newer image into the other slot. systemd-sysupdate does that, and verifies; between it
//! and the update folder this is a server on loopback that takes from the image that runs what is
//! the same in the newer one. It is not trusted: what it puts together is verified with the signed
//! sums as anything else, and if that fails, everything is loaded.

mod assembly;
pub mod date;
mod server;
mod sysupdate;
mod upstream;

pub use sysupdate::load;
