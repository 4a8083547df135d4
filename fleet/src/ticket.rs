//! Tickets: what a node is given at provisioning, as the systemd credential
//! `bakehouse.ticket`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::certificate::{CertificateError, Issuer, PrivateKey, PublicKey};
use crate::encoding;
use crate::membership::Secrets;
use crate::topology::slot_parts;

/// What makes a machine a node of one fleet, or lets it ask to become one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ticket {
    /// Format of this message.
    pub version: u16,
    /// Name of the fleet.
    pub fleet: String,
    /// The fleet root's certificate, PEM: whom this node believes.
    pub root: String,
    /// Where hubs are reached from this node, by slot, where that is not what `fleet.toml` says.
    #[serde(default)]
    pub endpoints: BTreeMap<String, String>,
    pub right: Credential,
}

/// Why this machine may be a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Credential {
    /// It is one of those that make the fleet: nobody has to be asked.
    Founder(Founder),
    /// It may ask the hubs for a slot.
    Joiner(Joiner),
}

/// The right to one slot that holds an etcd vote or is a hub's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Founder {
    pub slot: String,
    /// Signs this node's certificate, and those of the nodes it lets in.
    pub issuer: Issuer,
    pub secrets: Secrets,
    /// It takes the place of another machine, and asks the other hubs for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replaces: Option<Joiner>,
}

/// A token, and the key that shows whose it is. The key never crosses the wire.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Joiner {
    pub token: Token,
    pub key: PrivateKey,
}

/// What the fleet's root says of a token, and its signature over exactly these bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Token {
    /// [`Claims`] as JSON.
    pub claims: String,
    /// Base64 of an ECDSA P-256 signature with SHA-256, ASN.1.
    pub signature: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Claims {
    pub fleet: String,
    /// 128 random bits, hexadecimal.
    pub id: String,
    /// Group whose slots it is good for.
    pub group: String,
    /// The only slot it is good for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slot: Option<String>,
    /// It takes the slot from whoever has it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub replace: bool,
    /// How many nodes it is good for.
    pub uses: u32,
    /// Seconds since 1970 after which it is good for none.
    pub expires: u64,
    /// Base64 of the public key that belongs to it, P-256, uncompressed.
    pub key: String,
}

#[derive(Debug, thiserror::Error)]
pub enum TicketError {
    #[error("the ticket is not readable: {0}; provision the node with a ticket made by `bakehouse ticket`")]
    Malformed(#[from] serde_json::Error),
    #[error("the ticket has format {0}, this image reads format {known}; rebuild the image or mint the ticket again", known = Ticket::VERSION)]
    Version(u16),
    #[error("the ticket's slot `{0}` is not of the form group-number")]
    Slot(String),
}

impl Ticket {
    pub const VERSION: u16 = 2;
    /// On the EFI partition of a machine with Secure Boot: systemd takes no credential from there that
    /// anybody could have written.
    pub const FILE: &str = "bakehouse.ticket";
    /// Name of the systemd credential.
    pub const CREDENTIAL: &str = "bakehouse.ticket";

    /// Reads a ticket.
    ///
    /// # Errors
    /// Bytes that are no ticket, or one of another format.
    pub fn parse(bytes: &[u8]) -> Result<Self, TicketError> {
        #[derive(Deserialize)]
        struct Versioned {
            version: u16,
        }
        let Versioned { version } = serde_json::from_slice(bytes)?;
        if version != Self::VERSION {
            return Err(TicketError::Version(version));
        }
        let ticket: Self = serde_json::from_slice(bytes)?;
        if let Credential::Founder(Founder { slot, .. }) = &ticket.right
            && slot_parts(slot).is_none()
        {
            return Err(TicketError::Slot(slot.clone()));
        }
        Ok(ticket)
    }
}

impl Ticket {
    /// The token in it: a founder's ticket has one only if it replaces another machine.
    #[must_use]
    pub fn token(&self) -> Option<&Token> {
        match &self.right {
            Credential::Founder(founder) => founder.replaces.as_ref().map(|joiner| &joiner.token),
            Credential::Joiner(joiner) => Some(&joiner.token),
        }
    }
}

impl Joiner {
    /// Mints a token of these claims (whose `key` is filled in).
    ///
    /// # Errors
    /// The root's key can't be read.
    pub fn mint(root: &Issuer, mut claims: Claims) -> Result<Self, CertificateError> {
        let key = PrivateKey::generate()?;
        claims.key = encoding::encode(key.public()?.as_bytes());
        let claims = serde_json::json!(claims).to_string();
        let signature = encoding::encode(&root.sign(claims.as_bytes())?);
        Ok(Self { token: Token { claims, signature }, key })
    }
}

impl Token {
    /// What it claims; whether the root has signed it is another question.
    #[must_use]
    pub fn read(&self) -> Option<Claims> {
        serde_json::from_str(&self.claims).ok()
    }
}

impl Claims {
    #[must_use]
    pub fn public_key(&self) -> Option<PublicKey> {
        PublicKey::of(&encoding::decode(&self.key)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claims() -> Claims {
        Claims {
            fleet: "acme".into(),
            id: "0".repeat(32),
            group: "db".into(),
            slot: None,
            replace: false,
            uses: 2,
            expires: 1,
            key: String::new(),
        }
    }

    #[test]
    fn round_trip() {
        let root = Issuer::root("acme").unwrap();
        let issuer = root.issuer("acme", "hub-1").unwrap();
        let founder = Founder { slot: "hub-1".into(), issuer, secrets: Secrets::sample(), replaces: None };
        for right in [Credential::Founder(founder), Credential::Joiner(Joiner::mint(&root, claims()).unwrap())] {
            let ticket = Ticket {
                version: Ticket::VERSION,
                fleet: "acme".into(),
                root: root.certificate().into(),
                endpoints: BTreeMap::new(),
                right,
            };
            let bytes = serde_json::to_vec(&ticket).unwrap();
            assert_eq!(Ticket::parse(&bytes).unwrap(), ticket);
        }
    }

    #[test]
    fn a_token_carries_its_own_public_key() {
        let joiner = Joiner::mint(&Issuer::root("acme").unwrap(), claims()).unwrap();
        let read = joiner.token.read().unwrap();
        assert_eq!(read.public_key(), Some(joiner.key.public().unwrap()));
        assert_eq!((read.uses, read.slot), (2, None));
    }

    #[test]
    fn another_format_is_named_before_its_fields_are_read() {
        let e = Ticket::parse(br#"{"version":9,"new":"field"}"#).unwrap_err();
        assert!(matches!(e, TicketError::Version(9)), "{e}");
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_panic(bytes: Vec<u8>) {
            let _ = Ticket::parse(&bytes);
        }
    }
}
