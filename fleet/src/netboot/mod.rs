//! Messages between `bakehouse netboot` and machines that boot from the network: JSON over HTTP, on a local network.

mod messages;
mod sealed;
mod trust;

pub use messages::{
    Assignment, Extent, ImageStatement, Install, InstallerTrust, InvalidMac, Mac, MachineDisk, NetbootMachine,
    ProgressReport, Run, SealedTicket, SignedImage, Step, printable,
};
pub use sealed::{Key, ReportKey, SealError, code, read_code, seal};
pub use trust::{UntrustedImage, signed_root};
