//! The machine that the agent runs on: its console, its journal, systemd, and the D-Bus service that the agent offers.

pub mod console;
pub mod dbus;
pub mod journal;
pub mod machine;
pub mod notify;
pub mod systemd;
pub mod ticker;
