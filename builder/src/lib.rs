//! `bakehouse` builds bootable, immutable images of nodes from a `fleet.toml`.
//!
//! The folders are layers. Each imports only itself and those after it; `layers.rs` tests this rule.
//!
//! | layer | what it does |
//! | --- | --- |
//! | `cli` | Parses the command line, and calls the other layers. |
//! | `rehearse` | Injects faults into a running fleet, and measures what clients notice. |
//! | `deploy` | Installs images on machines: writes disks, exports, serves the network, publishes updates. |
//! | `vm` | Runs nodes as local virtual machines and containers. |
//! | `image` | Builds the disk image of a group from the lock. |
//! | `worker` | Runs the named tasks of a sandbox. |
//! | `bake` | Renders overlays, validates them with the image's daemons, and generates files. |
//! | `assemble` | Makes the parts of a disk: initrd, root, UKI, boot loaders, partitions, manifest. |
//! | `toolchain` | Unpacks the tools of the build. |
//! | `compose` | Unpacks and configures the packages of a layer. |
//! | `packages` | Resolves, locks and fetches Debian packages. |
//! | `keys` | Stores the fleet key, and signs tickets, certificates and updates with it. |
//! | `project` | Loads and validates a fleet's folder. |
//! | `format` | Reads and writes standard file formats. |
//! | `store` | Caches the results of steps by the hash of their inputs. |
//! | `sandbox` | Runs the packages' code in namespaces. |
//! | `util` | Helpers that do not depend on a fleet. |
//! | `progress`, `error` | Progress output and errors for the user. |
//!
//! `format` and `util` do not import `project`, `store` or `progress`. Each `mod.rs` has the folder's documentation,
//! its `mod` lines and re-exports; children import from their siblings.

pub mod assemble;
mod bake;
pub mod cli;
pub mod compose;
pub mod deploy;
pub mod error;
pub mod format;
mod image;
pub mod keys;
#[cfg(test)]
mod layers;
pub mod packages;
mod progress;
pub mod project;
mod rehearse;
pub mod sandbox;
mod store;
mod toolchain;
mod util;
pub mod vm;
pub mod worker;
