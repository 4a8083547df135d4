//! Nodes as local virtual machines: QEMU with UEFI firmware, KVM where it really works.
//!
//! A machine has no way out: its network card is on a wire that only the fleet's other machines
//! are on. What it says comes over its serial console into `console.log`; a port of its own, served by a unit that
//! is handed in as a credential, runs commands. The image has no part in that. Where asked, containers stand in for
//! machines (`container.rs`).

mod command;
mod console;
mod container;
mod exec;
mod firmware;
mod fleet;
mod machine;
mod network;
pub(crate) mod report;
mod start;
mod status;

pub use command::{Done, command_line};
pub use fleet::{Described, are_containers, down, groups_of, start_of, up};
pub use machine::Vm;
pub use network::{HostForward, VirtualNic, hub_forwards};
pub use start::{Netboot, VmOptions};
pub use status::{Database, FleetStatus, MachineState, NodeRow, Standby};
