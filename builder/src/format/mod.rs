//! Reads and writes standard file formats. Each module links its specification.

pub mod age;
pub(crate) mod cpio;
pub mod deb;
pub(crate) mod deb822;
pub mod efi_signature;
pub mod elf;
pub(crate) mod openpgp;
pub(crate) mod pe;
pub(crate) mod systemd_credential;
pub(crate) mod verity;
pub(crate) mod wheel;
