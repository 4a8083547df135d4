//! Assembles a disk from a layer and the baked files: initrd, root, UKI, boot loaders, partitions, manifest.

pub(crate) mod disk;
pub(crate) mod grub;
pub(crate) mod initrd;
pub(crate) mod layout;
pub(crate) mod manifest;
pub(crate) mod root;
pub(crate) mod secure_boot;
pub(crate) mod spdx;
pub mod uki;
