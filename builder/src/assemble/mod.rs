//! From a layer and the baked files to the parts of a disk: initrd, UKI, boot loaders, partitions, manifest.

pub(crate) mod disk;
pub(crate) mod grub;
pub(crate) mod initrd;
pub(crate) mod manifest;
pub mod secure_boot;
pub mod uki;
