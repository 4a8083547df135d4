//! Tickets: credentials with which machines join. A machine gets its ticket as the systemd credential
//! `bakehouse.ticket`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::certificate::{CertificateError, Issuer, PrivateKey, PublicKey};
use crate::encoding;
use crate::membership::Secrets;
use crate::topology::slot_parts;

/// Credential with which a machine becomes a node of one fleet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ticket {
    /// Format of the ticket: [`Ticket::VERSION`].
    pub version: u16,
    /// Name of the fleet.
    pub fleet: String,
    /// The fleet's root certificate, PEM, which the node trusts.
    pub root: String,
    /// Endpoints of hubs, by slot, that replace those of `fleet.toml` on this node.
    #[serde(default)]
    pub endpoints: BTreeMap<String, String>,
    /// Credential of the machine.
    pub right: Credential,
}

/// A ticket's credential.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Credential {
    /// The machine is a founder, and joins without a hub.
    Founder(Founder),
    /// The machine may claim a slot from a hub.
    Joiner(Joiner),
}

/// Credential for one slot of a hub or a voter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Founder {
    /// Name of the slot.
    pub slot: String,
    /// Issuer that signs this node's certificate, and on a hub those of joiners.
    pub issuer: Issuer,
    /// Passwords of the fleet's services.
    pub secrets: Secrets,
    /// Token with which the machine replaces another one. It asks the other hubs for the slot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replaces: Option<Joiner>,
}

/// A token and its private key, with which the machine signs its requests. The key is never sent to a hub.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Joiner {
    /// The token.
    pub token: Token,
    /// Private key whose public half is in the token's claims.
    pub key: PrivateKey,
}

/// Claims with the signature of the fleet's root.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Token {
    /// [`Claims`] as JSON.
    pub claims: String,
    /// Base64 of the signature over the bytes of `claims`: ECDSA P-256 with SHA-256, ASN.1.
    pub signature: String,
}

/// Permissions of a token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Claims {
    /// Name of the fleet.
    pub fleet: String,
    /// 128 random bits, hexadecimal.
    pub id: String,
    /// Group of the slots.
    pub group: String,
    /// The only slot for which the token is valid; `None` for every slot of the group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slot: Option<String>,
    /// Whether the token takes the slot from its owner.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub replace: bool,
    /// Number of nodes that may join with the token.
    pub uses: u32,
    /// Time after which the token is invalid, in seconds since 1970.
    pub expires: u64,
    /// Base64 of the token's public key, P-256, uncompressed.
    pub key: String,
}

/// Error in a ticket.
#[derive(Debug, thiserror::Error)]
pub enum TicketError {
    /// The ticket is not JSON, or a field is missing or unknown.
    #[error("cannot read the ticket: {0}; provision the node with a ticket made by `bakehouse ticket`")]
    Malformed(#[from] serde_json::Error),
    /// The ticket has another format, namely this one.
    #[error(
        "the ticket has format {0}, and this image reads format {known}; build the image again, or mint a new ticket",
        known = Ticket::VERSION
    )]
    Version(u16),
    /// The slot's name is invalid.
    #[error("the ticket's slot `{0}` does not have the form GROUP-NUMBER; mint a new ticket with `bakehouse ticket`")]
    Slot(String),
}

impl Ticket {
    /// Format of tickets.
    pub const VERSION: u16 = 2;
    /// Name of the file on the EFI partition. On a machine with Secure Boot, systemd accepts no unauthenticated
    /// credential from that partition, so the agent reads the file itself.
    pub const FILE: &str = "bakehouse.ticket";
    /// Name of the systemd credential.
    pub const CREDENTIAL: &str = "bakehouse.ticket";

    /// Reads a ticket.
    ///
    /// # Errors
    /// If the bytes are not a ticket, or the ticket has another format.
    ///
    /// # Examples
    ///
    /// ```
    /// let error = fleet::Ticket::parse(br#"{ "version": 1 }"#).unwrap_err();
    /// assert!(error.to_string().starts_with("the ticket has format 1, and this image reads format 2"));
    /// ```
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
    /// Returns the token. A founder's ticket has one only if the machine replaces another one.
    #[must_use]
    pub fn token(&self) -> Option<&Token> {
        match &self.right {
            Credential::Founder(founder) => founder.replaces.as_ref().map(|joiner| &joiner.token),
            Credential::Joiner(joiner) => Some(&joiner.token),
        }
    }
}

impl Joiner {
    /// Makes a token with these claims and a new key.
    ///
    /// # Errors
    /// If the root's key cannot be read.
    ///
    /// # Examples
    ///
    /// The operator mints a token for two nodes of the group `app`, and puts it into a ticket. Only the machine with
    /// the ticket has the token's private key.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use fleet::{Claims, Credential, Issuer, Joiner, Ticket};
    ///
    /// let root = Issuer::root("acme")?;
    /// let claims = Claims {
    ///     fleet: "acme".to_owned(),
    ///     id: "00112233445566778899aabbccddeeff".to_owned(),
    ///     group: "app".to_owned(),
    ///     slot: None,
    ///     replace: false,
    ///     uses: 2,
    ///     expires: 1_767_225_600,
    ///     key: String::new(),
    /// };
    /// let joiner = Joiner::mint(&root, claims)?;
    /// let ticket = Ticket {
    ///     version: Ticket::VERSION,
    ///     fleet: "acme".to_owned(),
    ///     root: root.certificate().to_owned(),
    ///     endpoints: Default::default(),
    ///     right: Credential::Joiner(joiner.clone()),
    /// };
    /// let bytes = serde_json::to_vec(&ticket)?;
    ///
    /// let token = Ticket::parse(&bytes)?.token().cloned().unwrap();
    /// let claims = token.read().unwrap();
    /// assert_eq!(claims.uses, 2);
    /// assert_eq!(claims.public_key(), Some(joiner.key.public()?));
    /// # Ok(())
    /// # }
    /// ```
    pub fn mint(root: &Issuer, mut claims: Claims) -> Result<Self, CertificateError> {
        let key = PrivateKey::generate()?;
        claims.key = encoding::encode(key.public()?.as_bytes());
        let claims = serde_json::json!(claims).to_string();
        let signature = encoding::encode(&root.sign(claims.as_bytes())?);
        Ok(Self { token: Token { claims, signature }, key })
    }
}

impl Token {
    /// Returns the claims, without verifying the signature.
    #[must_use]
    pub fn read(&self) -> Option<Claims> {
        serde_json::from_str(&self.claims).ok()
    }
}

impl Claims {
    /// Returns the token's public key; `None` if `key` is not one.
    #[must_use]
    pub fn public_key(&self) -> Option<PublicKey> {
        PublicKey::from_point(&encoding::decode(&self.key)?)
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
    fn ticket_round_trips() {
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
    fn minted_token_has_its_public_key() {
        let joiner = Joiner::mint(&Issuer::root("acme").unwrap(), claims()).unwrap();
        let read = joiner.token.read().unwrap();
        assert_eq!(read.public_key(), Some(joiner.key.public().unwrap()));
        assert_eq!((read.uses, read.slot), (2, None));
    }

    #[test]
    fn rejects_other_format_before_unknown_fields() {
        let e = Ticket::parse(br#"{"version":9,"new":"field"}"#).unwrap_err();
        assert!(matches!(e, TicketError::Version(9)), "{e}");
    }

    proptest::proptest! {
        #[test]
        fn parse_never_panics(bytes: Vec<u8>) {
            let _ = Ticket::parse(&bytes);
        }
    }
}
