//! Operators: people who look at a running fleet and steer it, each with a certificate of their own.

use std::collections::BTreeMap;
use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use ipnet::Ipv4Net;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};
use x25519_dalek::{PublicKey, StaticSecret};

use crate::certificate::OPERATOR_SUFFIX;
use crate::encoding;
use crate::join::{MeshKey, PROTOCOL};
use crate::signed::{OrderScope, SignedOrder as _};

/// What an operator may do. Each role includes those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum OperatorRole {
    /// Reads states, logs and metrics.
    Viewer,
    /// Restarts units, reboots nodes, and switches the primary over.
    Operator,
    /// Runs commands on nodes.
    Admin,
}

impl OperatorRole {
    /// Every role, the least permitted first.
    pub const ALL: [Self; 3] = [Self::Viewer, Self::Operator, Self::Admin];

    /// Returns the role's name on the command line and in certificates.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Viewer => "viewer",
            Self::Operator => "operator",
            Self::Admin => "admin",
        }
    }
}

impl fmt::Display for OperatorRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for OperatorRole {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|role| role.as_str() == text).ok_or("not a role of an operator")
    }
}

/// Name and role in an operator's certificate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Operator {
    /// Name of the person or the machine: up to 32 lower-case letters, digits and hyphens, a letter first.
    pub name: String,
    /// What the operator may do.
    pub role: OperatorRole,
}

impl Operator {
    /// Makes an operator; `None` if the name is not permitted.
    #[must_use]
    pub fn new(name: &str, role: OperatorRole) -> Option<Self> {
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        let valid = name.starts_with(|c: char| c.is_ascii_lowercase())
            && name.chars().all(plain)
            && !name.ends_with('-')
            && name.len() <= 32;
        valid.then(|| Self { name: name.to_owned(), role })
    }

    /// Returns the DNS name in the operator's certificate. No hub's issuer may sign such a name.
    ///
    /// # Examples
    ///
    /// ```
    /// use fleet::{Operator, OperatorRole};
    ///
    /// let anna = Operator::new("anna", OperatorRole::Viewer).unwrap();
    /// assert_eq!(anna.dns_name(), "anna.viewer.operator");
    /// assert_eq!(Operator::from_dns_name("anna.viewer.operator"), Some(anna));
    /// assert_eq!(Operator::from_dns_name("hub-1"), None);
    /// ```
    #[must_use]
    pub fn dns_name(&self) -> String {
        format!("{}.{}.{OPERATOR_SUFFIX}", self.name, self.role)
    }

    /// Parses the DNS name in a certificate; `None` for the name of a node.
    #[must_use]
    pub fn from_dns_name(name: &str) -> Option<Self> {
        let (name, role) = name.strip_suffix(OPERATOR_SUFFIX)?.strip_suffix('.')?.rsplit_once('.')?;
        Self::new(name, role.parse().ok()?)
    }
}

/// Reads the fields of an operator from a file. The rule for names holds there, too.
impl<'de> Deserialize<'de> for Operator {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Fields {
            name: String,
            role: OperatorRole,
        }
        let Fields { name, role } = Fields::deserialize(deserializer)?;
        let invalid = || D::Error::custom(format!("`{}` is not a name of an operator", name.escape_debug()));
        Self::new(&name, role).ok_or_else(invalid)
    }
}

/// `POST /v1/operators/revoke`, signed with the fleet key: revokes an operator's certificate. The signed order is the
/// proof that hubs keep in etcd and pass on to every node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OperatorRevocation {
    /// Format of the message: [`PROTOCOL`].
    pub version: u16,
    /// Name of the fleet.
    pub fleet: String,
    /// Name of the operator, for people.
    pub name: String,
    /// Base64 of the public key in the operator's certificate.
    pub key: String,
    /// Expiry of the certificate in seconds since 1970. The proof has no use after that time.
    pub expires: u64,
    /// Path, hub and time of the order.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scope: Option<OrderScope>,
}

/// A signed [`OperatorRevocation`], which proves to every node that the operator's certificate is revoked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RevokedOperator {
    /// The order, as it was signed.
    pub order: String,
    /// Base64 of the root's signature over the order.
    pub signature: String,
}

impl RevokedOperator {
    /// Parses the order; `None` if it is for another fleet or format, or was signed for another path. The caller
    /// verifies the signature.
    #[must_use]
    pub fn order(&self, fleet: &str) -> Option<OperatorRevocation> {
        let order: OperatorRevocation = serde_json::from_str(&self.order).ok()?;
        let is_for_path = order.scope.as_ref().is_some_and(|scope| scope.path == OperatorRevocation::PATH);
        (order.version == PROTOCOL && order.fleet == fleet && is_for_path).then_some(order)
    }
}

/// Prefix of the message with which an operator's key signs a WireGuard key.
const PEER_CONTEXT: &str = "bakehouse-operator-peer-1";

/// `POST /v1/operators/wireguard`, from an operator with their certificate: makes the operator's machine a WireGuard peer
/// of every hub. A later request of the same operator replaces the key. The reply is an [`OperatorPeering`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OperatorPeerRequest {
    /// Format of the message: [`PROTOCOL`].
    pub version: u16,
    /// WireGuard key of the operator's machine.
    pub mesh_key: MeshKey,
    /// Base64 of the signature of the certificate's key over [`operator_peer_message`]: ECDSA P-256, SHA-256, ASN.1.
    pub signature: String,
}

/// An operator's machine as a WireGuard peer: the value of etcd's key `/bakehouse/operators/wireguard/ADDRESS`. It proves
/// itself, so a hub accepts it from etcd although other hubs write there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OperatorPeer {
    /// Base64 of the operator's certificate, DER.
    pub certificate: String,
    /// WireGuard key of the operator's machine.
    pub mesh_key: MeshKey,
    /// Signature, as in [`OperatorPeerRequest`].
    pub signature: String,
}

/// A hub's reply to an [`OperatorPeerRequest`]: what the operator's WireGuard needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OperatorPeering {
    /// Address of the operator's machine.
    pub address: Ipv4Addr,
    /// Network of the nodes.
    pub subnet: Ipv4Net,
    /// MTU of the WireGuard interface, in bytes.
    pub mtu: u16,
    /// UDP port of the hubs' WireGuard.
    pub port: u16,
    /// The hubs, by slot.
    pub hubs: BTreeMap<String, HubPeer>,
}

/// A hub as a WireGuard peer of an operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HubPeer {
    /// The hub's WireGuard key.
    pub mesh_key: MeshKey,
    /// The hub's address in the mesh.
    pub address: Ipv4Addr,
}

/// A WireGuard private key of an operator's machine. Its text is base64.
#[derive(Clone)]
pub struct WireguardKey(StaticSecret);

impl WireguardKey {
    /// Makes a new key.
    ///
    /// # Errors
    /// If the kernel returns no random bytes.
    pub fn generate() -> Result<Self, getrandom::Error> {
        let mut bytes = [0; 32];
        getrandom::fill(&mut bytes)?;
        // WireGuard stores keys clamped (RFC 7748 § 5).
        bytes[0] &= 0xf8;
        bytes[31] = (bytes[31] & 0x7f) | 0x40;
        Ok(Self(StaticSecret::from(bytes)))
    }

    /// Parses a key; `None` if the text is not one.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let bytes: [u8; 32] = encoding::decode(text)?.try_into().ok()?;
        Some(Self(StaticSecret::from(bytes)))
    }

    /// Returns the text of the key.
    #[must_use]
    pub fn text(&self) -> String {
        encoding::encode(&self.0.to_bytes())
    }

    /// Returns the public key.
    #[must_use]
    pub fn public(&self) -> MeshKey {
        MeshKey(PublicKey::from(&self.0).to_bytes())
    }
}

/// Returns the bytes with whose signature an operator names the WireGuard key of their machine.
#[must_use]
pub fn operator_peer_message(fleet: &str, key: &MeshKey) -> Vec<u8> {
    [PEER_CONTEXT.as_bytes(), b"\0", fleet.as_bytes(), b"\0", &key.0].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_nodes_are_no_operators() {
        for name in ["hub-1", "operator", "admin.operator", "anna.root.operator", "a.b.admin.operator", "anna.admin"] {
            assert_eq!(Operator::from_dns_name(name), None, "{name}");
        }
        for name in ["", "Anna", "1a", "a_b", "a.b", "a-", &"a".repeat(33)] {
            assert_eq!(Operator::new(name, OperatorRole::Admin), None, "{name}");
        }
    }

    #[test]
    fn roles_include_those_before_them() {
        assert!(OperatorRole::Viewer < OperatorRole::Operator && OperatorRole::Operator < OperatorRole::Admin);
    }

    #[test]
    fn a_file_has_only_permitted_names() {
        #[derive(Debug, Deserialize)]
        struct Row {
            #[serde(flatten)]
            operator: Operator,
            expires: u64,
        }
        let read = |name: &str| {
            let row = serde_json::json!({ "expires": 1, "name": name, "role": "viewer", "later": true });
            serde_json::from_str::<Row>(&row.to_string())
        };
        let row = read("anna").unwrap();
        assert_eq!((row.operator, row.expires), (Operator::new("anna", OperatorRole::Viewer).unwrap(), 1));
        for name in ["../../x", "Anna", "a\nb", "\u{1b}[2J", ""] {
            let e = read(name).unwrap_err().to_string();
            assert!(e.contains("not a name of an operator") && !e.contains(char::is_control), "{e:?}");
        }
    }

    #[test]
    fn wireguard_key_has_the_text_of_wireguard() {
        // RFC 7748 § 6.1, Alice.
        let private = "dwdtCnMYpX08FsFyUbJmRd9ML4frwJkqsXf7pR25LCo=";
        let key = WireguardKey::parse(private).unwrap();
        assert_eq!(key.public().to_string(), "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=");
        let made = WireguardKey::generate().unwrap();
        assert_eq!(WireguardKey::parse(&made.text()).unwrap().public(), made.public());
        assert!(WireguardKey::parse("dwdt").is_none());
    }

    #[test]
    fn revocation_is_valid_only_for_its_own_path() {
        let order = |path: Option<&str>| {
            let scope = path.map(|path| OrderScope {
                path: path.to_owned(),
                hub: "hub-1".to_owned(),
                issued_at: 1,
                nonce: "n".to_owned(),
            });
            let order = OperatorRevocation {
                version: PROTOCOL,
                fleet: "acme".to_owned(),
                name: "anna".to_owned(),
                key: "k".to_owned(),
                expires: 1,
                scope,
            };
            let proof = RevokedOperator { order: serde_json::to_string(&order).unwrap(), signature: String::new() };
            proof.order("acme").is_some()
        };
        assert!(order(Some("/v1/operators/revoke")));
        assert!(!order(Some("/v1/revoke")) && !order(None));
    }

    proptest::proptest! {
        #[test]
        fn dns_names_round_trip(name in "[a-z][a-z0-9-]{0,30}[a-z0-9]", role in 0..3usize) {
            let operator = Operator::new(&name, OperatorRole::ALL[role]).unwrap();
            proptest::prop_assert_eq!(Operator::from_dns_name(&operator.dns_name()), Some(operator));
        }
    }
}
