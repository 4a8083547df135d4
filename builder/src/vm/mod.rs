//! Nodes as local virtual machines: QEMU with UEFI firmware, and KVM if it can run that firmware.
//!
//! A machine's network card is connected to the fleet's other machines only. QEMU writes the serial console to
//! `console.log`. Commands run through a virtio serial port; the builder passes the unit that serves it as a
//! credential, so the image does not contain it. With `up --containers`, containers replace the machines
//! (`container.rs`).

mod alerts;
mod command;
mod console;
mod container;
mod exec;
mod firmware;
mod fleet;
mod machine;
mod network;
mod phase;
mod qemu;
mod query;
pub(crate) mod report;
mod start;
mod status;
mod table;

pub use alerts::FiringAlert;
pub(crate) use alerts::number as number_of_alerts;
pub use command::{Done, command_line};
pub use fleet::{Described, are_containers, down, groups_of, start_of, up};
pub use machine::Vm;
pub use network::{HostForward, VirtualNic, hub_forwards};
pub use query::{running, seen, were_started};
pub use start::{Netboot, VmOptions};
pub use status::{Database, FleetStatus, MachineState, MonitorFacts, NodeRow, SeenNode, Standby};
pub(crate) use table::duration;
