//! Messages between nodes and hubs: JSON over HTTPS. `docs/join-protocol.md` has the protocol.
//!
//! During a rollout two versions exchange these messages. A newer version may add fields, because receivers ignore
//! unknown fields. Any other change needs a higher [`PROTOCOL`].

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::encoding;
use crate::membership::Secrets;
use crate::operator::RevokedOperator;
use crate::signed::OrderScope;
use crate::ticket::Token;

/// Format of these messages.
pub const PROTOCOL: u16 = 1;
/// Header with the base64 of a signature over the body alone. Hubs of the previous version require it. Hubs of this
/// version require [`crate::BOUND_SIGNATURE_HEADER`] and ignore this header.
pub const SIGNATURE_HEADER: &str = "bakehouse-signature";
/// Longest message that a node or a hub reads, in bytes.
pub const LONGEST: usize = 1 << 20;

/// A WireGuard public key. Its text is base64.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MeshKey(pub [u8; 32]);

/// `POST /v1/join`: a claim for a slot. A repeated request with the same keys gets the same reply.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinRequest {
    /// Format of the message: [`PROTOCOL`].
    pub version: u16,
    /// Token of the node's ticket, whose key signs the request.
    pub token: Token,
    /// Group of the image that the node runs.
    pub group: String,
    /// Version of that image.
    pub image: String,
    /// The node's WireGuard key.
    pub mesh_key: MeshKey,
    /// Base64 of the public key for the node's certificate.
    pub tls_key: String,
}

/// `POST /v1/renew`, from a node with its current certificate: replaces the node's keys. A repeated request with the
/// same keys gets the same reply.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Renewal {
    /// Format of the message: [`PROTOCOL`].
    pub version: u16,
    /// The node's next WireGuard key.
    pub mesh_key: MeshKey,
    /// Base64 of the public key for the node's next certificate.
    pub tls_key: String,
}

/// A hub's reply to a [`JoinRequest`] or a [`Renewal`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JoinReply {
    /// The node has the slot.
    Granted(Grant),
    /// The hub refuses the request.
    Refused(Refusal),
}

/// A successful claim: the slot, the certificate and the passwords.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    /// Name of the slot.
    pub slot: String,
    /// Epoch of the slot's record.
    pub epoch: u64,
    /// Certificates of the node and of its issuer, PEM.
    pub cert: String,
    /// Passwords that the node's roles need.
    pub secrets: Secrets,
    /// Mesh keys of the hubs, by slot.
    pub hubs: BTreeMap<String, MeshKey>,
}

/// A refusal with its reason.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// Reason, for programs.
    pub reason: Reason,
    /// Reason and fix, as a text.
    pub text: String,
}

/// Reason of a refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// The request is not valid.
    Malformed,
    /// The fleet's root did not sign the token, or the token's key did not sign the request.
    Forged,
    /// The request is for another fleet.
    OtherFleet,
    /// The image and the token are for different groups.
    OtherGroup,
    /// The token has expired.
    Expired,
    /// The operator revoked the token.
    Revoked,
    /// The token was used the permitted number of times.
    Spent,
    /// Another node has the slot.
    Taken,
    /// Another node has replaced this one.
    Fenced,
    /// Every slot of the group has an owner.
    Full,
    /// etcd does not answer, or the hub has too many requests.
    Busy,
}

impl Reason {
    /// Whether a later request can succeed.
    #[must_use]
    pub fn passes(self) -> bool {
        matches!(self, Self::Busy | Self::Full)
    }
}

/// `POST /v1/introduce`, from a founder to a founder, both with their certificates.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Introduction {
    /// Format of the message: [`PROTOCOL`].
    pub version: u16,
    /// The founder's WireGuard key.
    pub mesh_key: MeshKey,
    /// Epoch of the founder's slot, as far as the founder knows.
    #[serde(default = "first")]
    pub epoch: u64,
}

fn first() -> u64 {
    1
}

/// `POST /v1/revoke`, signed with the fleet key: revokes a token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revocation {
    /// Format of the message: [`PROTOCOL`].
    pub version: u16,
    /// Name of the fleet.
    pub fleet: String,
    /// Id of the token.
    pub token: String,
    /// Path, hub and time of the order. Hubs of this version require it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scope: Option<OrderScope>,
}

/// `POST /v1/tokens`, signed with the fleet key: asks for the use of the tokens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokensRequest {
    /// Format of the message: [`PROTOCOL`].
    pub version: u16,
    /// Name of the fleet.
    pub fleet: String,
    /// Path, hub and time of the order. Hubs of this version require it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scope: Option<OrderScope>,
}

/// A hub's reply to a [`TokensRequest`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tokens {
    /// Number of uses of each token, by id. A token without an entry was never used.
    pub used: BTreeMap<String, u32>,
    /// Ids of the revoked tokens.
    pub revoked: BTreeSet<String>,
}

/// `POST /v1/leave`, signed with the fleet key: removes a node from the fleet, and frees its slot. A node that removes
/// itself sends an empty body with its certificate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Departure {
    /// Format of the message: [`PROTOCOL`].
    pub version: u16,
    /// Name of the fleet.
    pub fleet: String,
    /// Slot of the node.
    pub slot: String,
    /// Whether the hubs evict the node without waiting for its machine, which is dead or compromised.
    pub now: bool,
    /// Epoch of the slot that the operator saw. The hubs refuse the order if the slot has had a new owner since.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epoch: Option<u64>,
    /// TLS key of the owner to remove, as in its [`SlotRecord`]. With `now`, the signed order is an [`Eviction`] of
    /// that owner.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_key: Option<String>,
    /// Path, hub and time of the order. Hubs of this version require it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scope: Option<OrderScope>,
}

/// Proof that the operator evicted one owner of a slot: a signed [`Departure`] with `now` and a TLS key. Hubs send it
/// to nodes, which then need no confirmation by a second hub.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Eviction {
    /// The order, as it was signed.
    pub order: String,
    /// Base64 of the signature over the order.
    pub signature: String,
}

impl Eviction {
    /// Returns slot and TLS key of the owner that the order evicts; `None` if the order is no eviction, or is for
    /// another fleet. The caller verifies the signature.
    #[must_use]
    pub fn owner(&self, fleet: &str) -> Option<(String, String)> {
        let order: Departure = serde_json::from_str(&self.order).ok()?;
        let holds = order.version == PROTOCOL && order.fleet == fleet && order.now;
        Some((order.slot, order.tls_key.filter(|_| holds)?))
    }
}

/// A hub's reply to an [`Introduction`], and to `GET /v1/peers`, which every node may send.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peers {
    /// Mesh keys of the hubs and the other founders, by slot.
    pub keys: BTreeMap<String, MeshKey>,
    /// TLS keys of the current hubs, by slot, as in their [`SlotRecord`]s. Hubs of the previous version leave it out.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub hubs: BTreeMap<String, String>,
    /// Epoch of the hub that replies, as in [`Introduction`].
    #[serde(default = "first")]
    pub epoch: u64,
    /// Epoch since which another node has the sender's slot; `None` if the sender is its owner.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fenced: Option<u64>,
    /// Whether the sender has to leave the fleet.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub leaving: bool,
    /// Slots that have no owner any more. Nodes forget the keys of these slots.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub vacant: BTreeSet<String>,
    /// Orders that evicted hubs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub evicted: Vec<Eviction>,
    /// Orders that revoked operators' certificates.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub revoked_operators: Vec<RevokedOperator>,
}

/// Owner of a slot: the value of etcd's key `/bakehouse/slots/SLOT`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotRecord {
    /// Number that grows with every new owner and every renewal of keys.
    pub epoch: u64,
    /// The owner's WireGuard key.
    pub mesh_key: MeshKey,
    /// Base64 of the owner's public key for TLS.
    pub tls_key: String,
    /// Id of the token with which the owner joined; `None` for a founder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
    /// Version of the image with which the owner joined.
    pub image: String,
    /// Hub that granted the slot.
    pub by: String,
    /// Time of the grant, in seconds since 1970, by that hub's clock.
    pub at: u64,
    /// Whether the owner has to leave: it hands over its work, stops, and reports that it has stopped.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub leaving: bool,
    /// Whether the slot has no owner any more. The record then describes the last owner.
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
    fn mesh_key_has_the_text_of_wireguard() {
        let text = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=";
        assert_eq!(text.parse::<MeshKey>().unwrap().to_string(), text);
        assert!("xTIB".parse::<MeshKey>().is_err());
    }

    proptest::proptest! {
        #[test]
        fn mesh_key_round_trips(bytes: [u8; 32]) {
            let key = MeshKey(bytes);
            proptest::prop_assert_eq!(key.to_string().parse(), Ok(key));
            let json = serde_json::to_string(&key).unwrap();
            proptest::prop_assert_eq!(serde_json::from_str::<MeshKey>(&json).unwrap(), key);
        }
    }
}
