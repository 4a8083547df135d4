//! `bakehouse`: a `fleet.toml` in, bootable immutable node images out.
//!
//! The folders are layers. Each imports only itself and those after it (`layers.rs` tests that):
//!
//! | layer | what it does |
//! | --- | --- |
//! | `cli` | Parses the command line, and calls the others. |
//! | `rehearse` | Injects faults into a running fleet, and measures what clients notice. |
//! | `deploy` | Brings built images to machines: disks, hypervisors, the network, updates. |
//! | `vm` | Runs nodes as local virtual machines and containers. |
//! | `image` | Builds the image of a group, from the lock to the disk. |
//! | `worker` | Runs the tasks of a sandbox by their names. |
//! | `bake` | Renders overlays, checks them with the image's daemons, and generates files. |
//! | `assemble` | Makes the parts of a disk: initrd, root, UKI, boot loaders, partitions, manifest. |
//! | `toolchain` | Unpacks the build's own tools. |
//! | `compose` | Unpacks and configures packages: layers. |
//! | `packages` | Resolves, locks and fetches Debian packages. |
//! | `keys` | Keeps the fleet key, and signs tickets, certificates and updates with it. |
//! | `project` | Loads a fleet's folder, and checks it. |
//! | `format` | Reads and writes file formats of others. |
//! | `store` | Keeps results of steps by the hash of their inputs. |
//! | `sandbox` | Runs code of packages in namespaces. |
//! | `util` | Helpers that know nothing of a fleet. |
//! | `progress`, `error` | What the user sees. |
//!
//! `format` and `util` know no project, no store and no progress. Each `mod.rs` has the folder's documentation, its
//! `mod` lines and re-exports; children import from their siblings.

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
pub mod progress;
pub mod project;
pub mod rehearse;
pub mod sandbox;
mod store;
mod toolchain;
mod util;
pub mod vm;
pub mod worker;
