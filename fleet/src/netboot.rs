//! What a machine that booted from the network and `bakehouse netboot` say to each other: JSON over
//! HTTP, on the network that both are on.

use serde::{Deserialize, Serialize};

/// `POST /v1/machine`: this is a machine with nothing on it; what is it to be?
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Format of these messages: [`Machine::VERSION`].
    pub version: u16,
    /// Of its network cards, `52:54:00:aa:bb:cc`.
    pub macs: Vec<String>,
    /// Serial number that its maker gave it; may be empty.
    pub serial: String,
    pub disks: Vec<MachineDisk>,
    /// Bytes.
    pub memory: u64,
    /// Base64 of a key that its ticket is encrypted for (X25519), made for this boot.
    pub key: String,
}

/// A disk of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineDisk {
    /// `/dev/nvme0n1`.
    pub path: String,
    /// Bytes.
    pub size: u64,
    /// A stick, a card.
    pub removable: bool,
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Errand {
    Install(Install),
    Run(Run),
    /// Nothing, and why, with what to do. Asking again later may bring another answer.
    Nothing {
        why: String,
    },
}

/// An image is to be written to a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Install {
    /// Node or group that the machine is to be.
    pub to: String,
    /// The disk.
    pub disk: String,
    /// Path of the image on the server.
    pub image: String,
    /// Bytes.
    pub size: u64,
    /// Base64 of its beginning, the partition table: written last.
    pub table: String,
    /// Its other parts that are not zero, in order.
    pub extents: Vec<Extent>,
    /// sha256 of the extents' content, one after the other.
    pub sha256: String,
    /// The EFI system partition.
    pub esp: Extent,
    /// Path of the ticket there.
    pub ticket_path: String,
    pub ticket: SealedTicket,
}

/// An image is to be run from memory, and nothing of it to be written to a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// Node that the machine is to be, or its group.
    pub to: String,
    /// Path of the image on the server.
    pub image: String,
    /// Its root file system, and the hash tree over it.
    pub root: Extent,
    pub verity: Extent,
    /// Of the hash tree, in hex.
    pub roothash: String,
    /// Disk for what the node keeps. Without one it keeps nothing.
    pub var: Option<String>,
    pub ticket: SealedTicket,
}

/// Bytes of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    pub start: u64,
    pub size: u64,
}

/// A machine's ticket, encrypted for who asked: whoever listens on the network learns nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SealedTicket {
    /// Base64 of the server's key, made for this answer.
    pub key: String,
    /// Base64.
    pub content: String,
}

/// `POST /v1/news`: how far a machine is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct News {
    pub version: u16,
    pub mac: String,
    pub step: Step,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    Writing {
        bytes: u64,
        of: u64,
    },
    /// It restarts from its disk.
    Installed,
    /// It goes on into what is in its memory.
    Started,
    Failed {
        why: String,
    },
}

impl Machine {
    pub const VERSION: u16 = 1;
    /// Word on the kernel's command line that has the server's address.
    pub const SERVER: &str = "bakehouse.netboot";
}
