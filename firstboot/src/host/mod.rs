//! Interfaces to the machine: console, journal, systemd, and the agent's D-Bus service.

pub mod capture;
pub mod console;
pub mod dbus;
pub(crate) mod echo;
pub mod journal;
pub mod log;
pub(crate) mod machine;
pub(crate) mod manager;
pub(crate) mod network;
pub(crate) mod notify;
pub(crate) mod screen;
pub mod systemd;
pub mod ticker;
