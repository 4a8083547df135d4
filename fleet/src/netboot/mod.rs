//! What a machine that booted from the network and `bakehouse netboot` say to each other: JSON over
//! HTTP, on the network that both are on.

mod messages;
mod sealed;
mod trust;

pub use messages::{
    Assignment, Extent, ImageStatement, Install, InstallerTrust, InvalidMac, Mac, MachineDisk, NetbootMachine,
    ProgressReport, Run, SealedTicket, SignedImage, Step, printable,
};
pub use sealed::{Key, ReportKey, SealError, code, read_code, seal};
pub use trust::{UntrustedImage, signed_root};
