//! File formats of others, read and written: each module names its specification.

pub mod age;
pub mod deb;
pub(crate) mod deb822;
pub mod elf;
pub(crate) mod openpgp;
pub(crate) mod systemd_credential;
pub(crate) mod verity;
