//! Messages between a machine and the server.

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

/// `POST /v1/machine`: this is a machine with nothing on it; what is it to be?
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetbootMachine {
    /// Format of these messages: [`NetbootMachine::VERSION`].
    pub version: u16,
    /// Of its network cards.
    pub macs: Vec<Mac>,
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
pub enum Assignment {
    Install(Install),
    Run(Run),
    /// The operator has to confirm this machine's key before it gets the ticket of a hub or a voter.
    Confirm {
        /// Node that the machine is to be: it is part of the code that the machine shows.
        to: String,
    },
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
    /// The fleet's signature over that hash. The installer enters no root without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signed: Option<SignedImage>,
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

/// What the fleet's update key says of an image that machines run from memory, and its signature.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignedImage {
    /// [`ImageStatement`] as JSON.
    pub statement: String,
    /// Base64 of an Ed25519 signature over [`SignedImage::message`].
    pub signature: String,
}

/// An image that the fleet's machines may run from memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageStatement {
    pub fleet: String,
    pub group: String,
    pub version: String,
    /// Of the hash tree, in hex.
    pub roothash: String,
}

/// What the installer believes: a file of its own initrd, which Secure Boot's signature covers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstallerTrust {
    pub fleet: String,
    /// Version of the fleet that the installer was built with: it runs no older image.
    pub version: String,
    /// Base64 of the public half of the fleet's update key, Ed25519.
    pub key: String,
}

impl InstallerTrust {
    /// Its path in the installer's initrd.
    pub const PATH: &str = "etc/bakehouse/netboot.json";
}

impl SignedImage {
    /// The bytes that are signed. The first line keeps the signature from meaning anything elsewhere: the
    /// same key signs updates.
    #[must_use]
    pub fn message(statement: &str) -> Vec<u8> {
        format!("bakehouse netboot image, v1\n{statement}").into_bytes()
    }
}

/// `POST /v1/news`: how far a machine is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgressReport {
    pub version: u16,
    pub mac: Mac,
    pub step: Step,
    /// The machine's key, as in [`NetbootMachine::key`].
    #[serde(default)]
    pub key: String,
    /// Base64 of an HMAC-SHA-256 over [`ProgressReport::message`], by a key that only this machine and the server
    /// can derive. News without it are ignored.
    #[serde(default)]
    pub proof: String,
}

impl ProgressReport {
    /// The bytes that the proof is over.
    #[must_use]
    pub fn message(&self) -> Vec<u8> {
        serde_json::json!(["bakehouse netboot news", self.version, self.mac, self.key, self.step])
            .to_string()
            .into_bytes()
    }
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

impl NetbootMachine {
    /// 1 had no proof in its news and no code for founders.
    pub const VERSION: u16 = 2;
    /// Word on the kernel's command line that has the server's address.
    pub const SERVER: &str = "bakehouse.netboot";
    /// Network cards and disks of a machine, at most.
    const PARTS: usize = 256;
    /// Bytes of a text in its message, at most.
    const TEXT: usize = 256;

    /// Whether the message has the size that a real machine's has.
    ///
    /// # Errors
    /// It has more network cards or disks, or longer texts, than any machine.
    pub fn check(&self) -> Result<(), String> {
        let texts = self.disks.iter().map(|d| &d.path).chain([&self.serial, &self.key]);
        if self.macs.len() > Self::PARTS || self.disks.len() > Self::PARTS {
            return Err(format!("a machine with more than {} network cards or disks", Self::PARTS));
        }
        if texts.into_iter().any(|t| t.len() > Self::TEXT) {
            return Err(format!("a serial number, a disk's path or a key of more than {} bytes", Self::TEXT));
        }
        Ok(())
    }
}

/// A text of another machine's, for a terminal: control characters and invisible ones are escaped, so that it
/// can't move the cursor, hide text or set a title.
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
    fn mac_addresses_have_one_form() {
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

    /// The message of an installer of version 1 is read, so that it can be answered.
    #[test]
    fn messages_of_version_1_are_read() {
        let machine = r#"{"version":1,"macs":["52:54:00:aa:bb:cc"],"serial":"","disks":[],"memory":1,"key":"x"}"#;
        assert_eq!(serde_json::from_str::<NetbootMachine>(machine).unwrap().version, 1);
        let news: ProgressReport =
            serde_json::from_str(r#"{"version":1,"mac":"52:54:00:aa:bb:cc","step":"installed"}"#).unwrap();
        assert_eq!((news.key.as_str(), news.proof.as_str()), ("", ""));
    }

    #[test]
    fn a_message_has_bounds() {
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
    fn a_terminal_gets_no_control_characters() {
        let shown = printable("a\x1b[2Jb\u{202e}c\r\n\u{9b}2J \"quoted\" ü");
        assert!(shown.chars().all(|c| !c.is_control() && c != '\u{202e}'), "{shown}");
        assert!(shown.ends_with(" \"quoted\" ü"), "{shown}");
    }

    proptest::proptest! {
        #[test]
        fn a_mac_address_is_what_it_prints(octets: [u8; 6]) {
            let mac = Mac(octets);
            proptest::prop_assert_eq!(mac.to_string().parse(), Ok(mac));
        }

        #[test]
        fn what_parses_has_the_one_form(text: String) {
            if let Ok(mac) = text.parse::<Mac>() {
                proptest::prop_assert_eq!(text.to_ascii_lowercase(), mac.to_string());
            }
        }
    }
}
