//! What nodes and hubs say to each other over HTTPS, as JSON. `docs/join.md` has the protocol.
//!
//! While a fleet changes its image, two versions talk to each other: a field may be added, and who
//! does not know it leaves it alone. Where that does not serve, [`PROTOCOL`] rises.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::encoding;
use crate::membership::Secrets;
use crate::signed::OrderScope;
use crate::ticket::Token;

/// Format of these messages.
pub const PROTOCOL: u16 = 1;
/// Header with the base64 of a signature over the body alone. Hubs of the version before require it;
/// hubs of this version require [`crate::BOUND_SIGNATURE_HEADER`] and ignore this one.
pub const SIGNATURE_HEADER: &str = "bakehouse-signature";
/// Longest message either side reads, in bytes.
pub const LONGEST: usize = 1 << 20;

/// A WireGuard public key; base64 in text.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MeshKey(pub [u8; 32]);

/// `POST /v1/join`: a slot, please. Asking again with the same keys gives the same answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinRequest {
    pub version: u16,
    pub token: Token,
    /// Group of the image this node runs.
    pub group: String,
    /// Version of that image.
    pub image: String,
    pub mesh_key: MeshKey,
    /// Base64 of the public key the node's certificate is to be for.
    pub tls_key: String,
}

/// `POST /v1/renew`, from a node with the certificate it has: other keys from now on. Asking again
/// with the same keys gives the same answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Renewal {
    pub version: u16,
    pub mesh_key: MeshKey,
    /// Base64 of the public key the node's next certificate is to be for.
    pub tls_key: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JoinReply {
    Granted(Grant),
    Refused(Refusal),
}

/// The slot is the node's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    pub slot: String,
    /// Counts the keys the slot has had.
    pub epoch: u64,
    /// The node's certificate and its issuer's, PEM.
    pub cert: String,
    /// What its roles need, and no more.
    pub secrets: Secrets,
    /// The hubs' keys, by slot.
    pub hubs: BTreeMap<String, MeshKey>,
}

/// No, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    pub reason: Reason,
    /// For people, with what to do.
    pub text: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// The request is not one.
    Malformed,
    /// The token is not of this fleet's root, or the request not of the token's owner.
    Forged,
    OtherFleet,
    /// The image is for another group than the token.
    OtherGroup,
    Expired,
    Revoked,
    /// The token was used as often as it may be.
    Spent,
    /// Somebody else has the slot.
    Taken,
    /// Another node has taken this one's place.
    Fenced,
    /// Every slot of the group has an owner.
    Full,
    /// etcd does not answer, or too many ask.
    Busy,
}

impl Reason {
    /// Whether asking again later can help.
    #[must_use]
    pub fn passes(self) -> bool {
        matches!(self, Self::Busy | Self::Full)
    }
}

/// `POST /v1/introduce`, from founder to founder, each with its certificate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Introduction {
    pub version: u16,
    pub mesh_key: MeshKey,
    /// How many owners the slot has had, with this one, as far as it knows.
    #[serde(default = "first")]
    pub epoch: u64,
}

fn first() -> u64 {
    1
}

/// `POST /v1/revoke`, signed by the fleet's root: a token is of no use any more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revocation {
    pub version: u16,
    pub fleet: String,
    /// The token's id.
    pub token: String,
    /// Where and when it holds; hubs of this version require it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scope: Option<OrderScope>,
}

/// `POST /v1/tokens`, signed by the fleet's root: what became of the tokens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokensRequest {
    pub version: u16,
    pub fleet: String,
    /// Where and when it holds; hubs of this version require it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scope: Option<OrderScope>,
}

/// The answer to it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tokens {
    /// How often each was used; one that is not here never was.
    pub used: BTreeMap<String, u32>,
    pub revoked: BTreeSet<String>,
}

/// `POST /v1/leave`, signed by the fleet's root: a node is to go, and its slot to be free. A node
/// says it of itself with its certificate, and nothing else.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Departure {
    pub version: u16,
    pub fleet: String,
    pub slot: String,
    /// Its machine is not waited for: it is dead, or not to be trusted.
    pub now: bool,
    /// Epoch of the slot that the operator saw: an owner since then is not meant.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epoch: Option<u64>,
    /// TLS key of the owner that the operator means, as in its [`SlotRecord`]. With `now`, the signed order is an
    /// [`Eviction`] of that owner.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_key: Option<String>,
    /// Where and when it holds; hubs of this version require it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scope: Option<OrderScope>,
}

/// Proof that the operator evicted one owner of a slot: a [`Departure`] with `now` and a TLS key, as the fleet's root
/// signed it. Hubs hand it out, so that no second hub has to confirm it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Eviction {
    /// The order's bytes.
    pub order: String,
    /// Base64 of the root's signature over these bytes.
    pub signature: String,
}

impl Eviction {
    /// Slot and TLS key of the owner that the order evicts; `None` if it evicts no such owner, or is another fleet's.
    /// The caller verifies the signature.
    #[must_use]
    pub fn owner(&self, fleet: &str) -> Option<(String, String)> {
        let order: Departure = serde_json::from_str(&self.order).ok()?;
        let holds = order.version == PROTOCOL && order.fleet == fleet && order.now;
        Some((order.slot, order.tls_key.filter(|_| holds)?))
    }
}

/// The answer to an introduction, and to `GET /v1/peers`, which every node may ask.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peers {
    /// Keys of the hubs and the other founders, by slot.
    pub keys: BTreeMap<String, MeshKey>,
    /// TLS keys of the current hubs, by slot, as in their [`SlotRecord`]s; of a hub of the version before, empty.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub hubs: BTreeMap<String, String>,
    /// Of the hub that answers, as in [`Introduction`].
    #[serde(default = "first")]
    pub epoch: u64,
    /// Another node has the asker's slot, since this epoch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fenced: Option<u64>,
    /// The asker is to go.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub leaving: bool,
    /// Slots that nobody has any more: keys that were theirs are of nobody.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub vacant: BTreeSet<String>,
    /// Hubs that the operator evicted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub evicted: Vec<Eviction>,
}

/// Who has a slot: the value of etcd's `/bakehouse/slots/SLOT`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotRecord {
    pub epoch: u64,
    pub mesh_key: MeshKey,
    /// Base64 of the owner's public key for TLS.
    pub tls_key: String,
    /// Token it came with; none for a founder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
    /// Version of the image it came with.
    pub image: String,
    /// Hub that let it in.
    pub by: String,
    /// Seconds since 1970, by that hub's clock.
    pub at: u64,
    /// Its owner is to go: it hands over, stops, and says when it has.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub leaving: bool,
    /// Nobody has it any more; who is named here had it last.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub vacant: bool,
    /// Proof of the last eviction of an owner of this slot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eviction: Option<Eviction>,
}

impl fmt::Display for MeshKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&encoding::encode(&self.0))
    }
}

impl fmt::Debug for MeshKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MeshKey({self})")
    }
}

impl FromStr for MeshKey {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bytes = encoding::decode(text).and_then(|b| b.try_into().ok());
        bytes.map(Self).ok_or("not a WireGuard key")
    }
}

impl Serialize for MeshKey {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for MeshKey {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mesh_keys_are_wireguards_text() {
        let text = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=";
        assert_eq!(text.parse::<MeshKey>().unwrap().to_string(), text);
        assert!("xTIB".parse::<MeshKey>().is_err());
    }

    proptest::proptest! {
        #[test]
        fn mesh_keys_are_read_as_they_were_written(bytes: [u8; 32]) {
            let key = MeshKey(bytes);
            proptest::prop_assert_eq!(key.to_string().parse(), Ok(key));
            let json = serde_json::to_string(&key).unwrap();
            proptest::prop_assert_eq!(serde_json::from_str::<MeshKey>(&json).unwrap(), key);
        }
    }
}
