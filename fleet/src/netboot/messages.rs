//! Messages between a machine and the netboot server.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A 48-bit MAC address. Its text is always `52:54:00:aa:bb:cc`, in lower case: it is safe in a file
/// name, in dnsmasq's configuration and on a terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac([u8; 6]);

/// A text that is not a MAC address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a MAC address has six pairs of hexadecimal digits, such as 52:54:00:aa:bb:cc")]
pub struct InvalidMac;

impl FromStr for Mac {
    type Err = InvalidMac;

    /// Accepts digits of either case.
    fn from_str(text: &str) -> Result<Self, InvalidMac> {
        let mut octets = [0; 6];
        let mut parts = text.split(':');
        for octet in &mut octets {
            // `from_str_radix` would accept a sign.
            let part = parts.next().filter(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()));
            *octet = part.and_then(|p| u8::from_str_radix(p, 16).ok()).ok_or(InvalidMac)?;
        }
        if parts.next().is_some() { Err(InvalidMac) } else { Ok(Self(octets)) }
    }
}

impl TryFrom<String> for Mac {
    type Error = InvalidMac;

    fn try_from(text: String) -> Result<Self, InvalidMac> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let octets = self.0.map(|octet| format!("{octet:02x}"));
        f.write_str(&octets.join(":"))
    }
}

/// `POST /v1/machine`: a blank machine asks for its assignment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetbootMachine {
    /// Format of these messages: [`NetbootMachine::VERSION`].
    pub version: u16,
    /// MAC addresses of the network cards.
    pub macs: Vec<Mac>,
    /// Serial number; may be empty.
    pub serial: String,
    /// Disks of the machine.
    pub disks: Vec<MachineDisk>,
    /// Memory in bytes.
    pub memory: u64,
    /// Base64 of the machine's public key (X25519), which the machine makes at each boot. The server encrypts the
    /// ticket to it.
    pub key: String,
}

/// A disk of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineDisk {
    /// Path of the device, such as `/dev/nvme0n1`.
    pub path: String,
    /// Size in bytes.
    pub size: u64,
    /// Whether the disk is removable, such as a USB stick.
    pub removable: bool,
}

/// The server's reply to a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Assignment {
    /// Install an image on a disk.
    Install(Install),
    /// Run an image from memory.
    Run(Run),
    /// The operator has to confirm this machine's key before it gets the ticket of a hub or a voter.
    Confirm {
        /// Node that the machine becomes. The code on the machine's console covers it.
        to: String,
    },
    /// The server has no assignment for the machine now. The machine asks again later.
    Nothing {
        /// Reason and fix.
        why: String,
    },
}

/// Assignment of a machine that installs an image on a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Install {
    /// Node or group that the machine becomes.
    pub to: String,
    /// Path of the disk's device.
    pub disk: String,
    /// Path of the image on the server.
    pub image: String,
    /// Size of the image in bytes.
    pub size: u64,
    /// Base64 of the image's first bytes, with the partition table. The installer writes them last.
    pub table: String,
    /// The other parts of the image that are not zero, in order.
    pub extents: Vec<Extent>,
    /// SHA-256 of the concatenated extents, hexadecimal.
    pub sha256: String,
    /// The EFI system partition.
    pub esp: Extent,
    /// Path of the ticket in the EFI system partition.
    pub ticket_path: String,
    /// The machine's ticket.
    pub ticket: SealedTicket,
}

/// Assignment of a machine that runs an image from memory, and installs nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// Node or group that the machine becomes.
    pub to: String,
    /// Path of the image on the server.
    pub image: String,
    /// The root file system.
    pub root: Extent,
    /// The dm-verity hash tree of the root file system.
    pub verity: Extent,
    /// Root hash of the hash tree, hexadecimal.
    pub roothash: String,
    /// The fleet's signature over the root hash. The installer runs no root without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signed: Option<SignedImage>,
    /// Path of the disk for `/var`. Without it, `/var` is in memory.
    pub var: Option<String>,
    /// The machine's ticket.
    pub ticket: SealedTicket,
}

/// A part of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// Offset in bytes.
    pub start: u64,
    /// Size in bytes.
    pub size: u64,
}

/// A ticket, encrypted to the requesting machine. A passive eavesdropper learns nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SealedTicket {
    /// Base64 of the server's public key (X25519), which the server makes for each reply.
    pub key: String,
    /// Base64 of the encrypted ticket.
    pub content: String,
}

/// Statement about an image that machines run from memory, with the signature of the fleet's update key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignedImage {
    /// [`ImageStatement`] as JSON.
    pub statement: String,
    /// Base64 of an Ed25519 signature over [`SignedImage::message`].
    pub signature: String,
}

/// Statement that the fleet's machines may run an image from memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageStatement {
    /// Name of the fleet.
    pub fleet: String,
    /// Group of the image.
    pub group: String,
    /// Version of the image.
    pub version: String,
    /// Root hash of the dm-verity hash tree, hexadecimal.
    pub roothash: String,
}

/// Trust of the installer: a file of its initrd, which the Secure Boot signature covers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstallerTrust {
    /// Name of the fleet.
    pub fleet: String,
    /// Version of the fleet at the installer's build. The installer runs no older image.
    pub version: String,
    /// Base64 of the public half of the fleet's update key, Ed25519.
    pub key: String,
}

impl InstallerTrust {
    /// Path of the file in the installer's initrd.
    pub const PATH: &str = "etc/bakehouse/netboot.json";
}

impl SignedImage {
    /// Returns the bytes that the signature covers. Their first line separates them from the update manifests that the
    /// same key signs.
    #[must_use]
    pub fn message(statement: &str) -> Vec<u8> {
        format!("bakehouse netboot image, v1\n{statement}").into_bytes()
    }
}

/// `POST /v1/news`: a machine reports its progress.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgressReport {
    /// Format of the message: [`NetbootMachine::VERSION`].
    pub version: u16,
    /// MAC address of the machine's first network card.
    pub mac: Mac,
    /// Step that the machine has reached.
    pub step: Step,
    /// The machine's key, as in [`NetbootMachine::key`].
    #[serde(default)]
    pub key: String,
    /// Base64 of an HMAC-SHA-256 over [`ProgressReport::message`], with a key that only this machine and the server can
    /// derive. The server ignores reports without it.
    #[serde(default)]
    pub proof: String,
}

impl ProgressReport {
    /// Returns the bytes that the proof covers.
    #[must_use]
    pub fn message(&self) -> Vec<u8> {
        serde_json::json!(["bakehouse netboot news", self.version, self.mac, self.key, self.step])
            .to_string()
            .into_bytes()
    }
}

/// Step of an installation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// The machine loads the image.
    Writing {
        /// Bytes that are written.
        bytes: u64,
        /// Bytes in total.
        of: u64,
    },
    /// The image is on the disk, and the machine restarts from it.
    Installed,
    /// The image is in memory, and the machine starts it.
    Started,
    /// The installation failed. The machine tries again.
    Failed {
        /// Cause of the failure.
        why: String,
    },
}

impl NetbootMachine {
    /// Format of the messages. Version 1 had no proof in progress reports, and no code for founders.
    pub const VERSION: u16 = 2;
    /// Parameter of the kernel's command line with the server's address.
    pub const SERVER: &str = "bakehouse.netboot";
    /// Largest number of network cards, and of disks, of a machine.
    const PARTS: usize = 256;
    /// Longest text in the message, in bytes.
    const TEXT: usize = 256;

    /// Checks that the message is no larger than that of a real machine.
    ///
    /// # Errors
    /// If the machine has more than 256 network cards or disks, or a text is longer than 256 bytes.
    pub fn check(&self) -> Result<(), String> {
        let texts = self.disks.iter().map(|d| &d.path).chain([&self.serial, &self.key]);
        if self.macs.len() > Self::PARTS || self.disks.len() > Self::PARTS {
            return Err(format!("the machine has more than {} network cards or disks", Self::PARTS));
        }
        if texts.into_iter().any(|t| t.len() > Self::TEXT) {
            return Err(format!("a serial number, a disk's path or a key is longer than {} bytes", Self::TEXT));
        }
        Ok(())
    }
}

/// Escapes control characters and invisible characters of another machine's text, so that the text cannot move a
/// terminal's cursor, hide text or set a title.
#[must_use]
pub fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '"' | '\'' | '\\' => out.push(c),
            _ => out.extend(c.escape_debug()),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rejects_invalid_mac_addresses() {
        assert_eq!("52:54:00:AA:bb:Cc".parse::<Mac>().unwrap().to_string(), "52:54:00:aa:bb:cc");
        for text in [
            "",
            "/etc/passwd",
            "../../x",
            "52:54:00:aa:bb",
            "52:54:00:aa:bb:cc:dd",
            "52:54:00:aa:bb:cc\n",
            "52:54:00:aa:bb:+c",
            "52-54-00-aa-bb-cc",
            "52:54:00:aa:bb:c",
            "5254:00:aa:bb:cc:",
        ] {
            assert!(text.parse::<Mac>().is_err(), "{text}");
            assert!(serde_json::from_value::<Mac>(serde_json::json!(text)).is_err(), "{text}");
        }
        let mac: Mac = serde_json::from_str("\"52:54:00:AA:BB:CC\"").unwrap();
        assert_eq!(serde_json::to_string(&mac).unwrap(), "\"52:54:00:aa:bb:cc\"");
    }

    /// The server reads a message of version 1, so that it can reply with an error.
    #[test]
    fn reads_messages_of_version_1() {
        let machine = r#"{"version":1,"macs":["52:54:00:aa:bb:cc"],"serial":"","disks":[],"memory":1,"key":"x"}"#;
        assert_eq!(serde_json::from_str::<NetbootMachine>(machine).unwrap().version, 1);
        let news: ProgressReport =
            serde_json::from_str(r#"{"version":1,"mac":"52:54:00:aa:bb:cc","step":"installed"}"#).unwrap();
        assert_eq!((news.key.as_str(), news.proof.as_str()), ("", ""));
    }

    #[test]
    fn check_rejects_oversized_messages() {
        let machine = NetbootMachine {
            version: NetbootMachine::VERSION,
            macs: Vec::new(),
            serial: String::new(),
            disks: Vec::new(),
            memory: 0,
            key: String::new(),
        };
        assert!(machine.check().is_ok());
        assert!(NetbootMachine { macs: vec![Mac([0; 6]); 257], ..machine.clone() }.check().is_err());
        assert!(NetbootMachine { serial: "x".repeat(257), ..machine }.check().is_err());
    }

    #[test]
    fn printable_escapes_control_characters() {
        let shown = printable("a\x1b[2Jb\u{202e}c\r\n\u{9b}2J \"quoted\" ü");
        assert!(shown.chars().all(|c| !c.is_control() && c != '\u{202e}'), "{shown}");
        assert!(shown.ends_with(" \"quoted\" ü"), "{shown}");
    }

    proptest::proptest! {
        #[test]
        fn mac_round_trips(octets: [u8; 6]) {
            let mac = Mac(octets);
            proptest::prop_assert_eq!(mac.to_string().parse(), Ok(mac));
        }

        #[test]
        fn parsed_mac_prints_the_input_in_lower_case(text: String) {
            if let Ok(mac) = text.parse::<Mac>() {
                proptest::prop_assert_eq!(text.to_ascii_lowercase(), mac.to_string());
            }
        }
    }
}
