//! The kind of a fleet's machines, and how fast they are.

use fleet::EMULATED_TIMEOUT_SCALE;

/// What a fleet's machines are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Machines {
    Kvm,
    Emulated,
    Containers,
}

impl Machines {
    /// How much slower they are than real ones.
    #[must_use]
    pub const fn factor(self) -> u32 {
        match self {
            Self::Emulated => EMULATED_TIMEOUT_SCALE as u32,
            Self::Kvm | Self::Containers => 1,
        }
    }
}
