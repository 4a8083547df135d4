//! Kinds of machines that a fleet runs on, and their speed.

use fleet::EMULATED_TIMEOUT_SCALE;

/// Kind of a fleet's machines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Machines {
    /// Virtual machines with KVM.
    Kvm,
    /// Virtual machines with QEMU's emulation.
    Emulated,
    /// Containers.
    Containers,
}

impl Machines {
    /// Returns the factor by which timeouts are longer than on real machines.
    #[must_use]
    pub(crate) const fn factor(self) -> u32 {
        match self {
            Self::Emulated => EMULATED_TIMEOUT_SCALE as u32,
            Self::Kvm | Self::Containers => 1,
        }
    }
}
