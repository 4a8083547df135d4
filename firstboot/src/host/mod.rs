//! Interfaces to the machine: console, journal, systemd, and the agent's D-Bus service.

pub mod console;
pub mod dbus;
pub mod journal;
pub mod log;
pub(crate) mod machine;
pub(crate) mod notify;
pub mod systemd;
pub mod ticker;
