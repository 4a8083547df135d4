//! Signed requests. A signature covers the TLS connection, the method, the path and the body, so the receiver of a
//! request cannot replay it on another connection. An operator's order also has its path, its hub, its time and a
//! nonce.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::join::{Departure, Revocation, TokensRequest};
use crate::operator::OperatorRevocation;
use crate::rollout::RolloutRequest;

/// Header with the base64 of a signature over [`bound_message`]: ECDSA P-256, SHA-256, ASN.1.
pub const BOUND_SIGNATURE_HEADER: &str = "bakehouse-bound-signature";
/// Label of the TLS exporter (RFC 8446 § 7.5, used as in RFC 9266) that identifies a connection.
pub const EXPORTER_LABEL: &[u8] = b"EXPORTER-bakehouse";
/// Largest difference between an order's time and the hub's clock, in seconds.
pub const ORDER_VALIDITY: u64 = 300;

/// Identifier of a TLS connection, the same at both ends: 32 bytes of its exporter.
pub type ChannelBinding = [u8; 32];

/// Returns the bytes that a bound signature covers. They are unambiguous, because the binding has a fixed length, and
/// neither a method nor a path contains a NUL.
#[must_use]
pub fn bound_message(binding: &ChannelBinding, method: &str, path: &str, body: &[u8]) -> Vec<u8> {
    let parts: [&[u8]; 7] = [b"bakehouse-bound-1\0", binding, method.as_bytes(), b"\0", path.as_bytes(), b"\0", body];
    parts.concat()
}

/// Path, hub and time for which an operator's order is valid.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OrderScope {
    /// Path of the API.
    pub path: String,
    /// Slot of the hub that executes the order.
    pub hub: String,
    /// Seconds since 1970, by the operator's clock.
    pub issued_at: u64,
    /// 128 random bits. A hub executes an order with the same nonce once.
    pub nonce: String,
}

/// An order that is signed with the fleet key.
pub trait SignedOrder: Serialize + DeserializeOwned {
    /// The only path that accepts the order.
    const PATH: &'static str;
    /// Returns the format and the fleet.
    fn target(&self) -> (u16, &str);
    /// Returns the scope; `None` in an order of an older version.
    fn scope(&self) -> Option<&OrderScope>;
    /// Returns the same order with this scope.
    #[must_use]
    fn with_scope(self, scope: OrderScope) -> Self;
}

macro_rules! signed_order {
    ($order:ty, $path:literal) => {
        impl SignedOrder for $order {
            const PATH: &'static str = $path;

            fn target(&self) -> (u16, &str) {
                (self.version, &self.fleet)
            }

            fn scope(&self) -> Option<&OrderScope> {
                self.scope.as_ref()
            }

            fn with_scope(self, scope: OrderScope) -> Self {
                Self { scope: Some(scope), ..self }
            }
        }
    };
}

signed_order!(Revocation, "/v1/revoke");
signed_order!(TokensRequest, "/v1/tokens");
signed_order!(Departure, "/v1/leave");
signed_order!(RolloutRequest, "/v1/rollout");
signed_order!(OperatorRevocation, "/v1/operators/revoke");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bound_messages_of_different_requests_differ() {
        let one = bound_message(&[1; 32], "POST", "/v1/leave", b"{}");
        assert_ne!(one, bound_message(&[2; 32], "POST", "/v1/leave", b"{}"));
        assert_ne!(one, bound_message(&[1; 32], "GET", "/v1/leave", b"{}"));
        assert_ne!(one, bound_message(&[1; 32], "POST", "/v1/left", b"{}"));
        assert_ne!(one, bound_message(&[1; 32], "POST", "/v1/leave{", b"}"));
    }

    /// The previous version sends bodies without a scope, and ignores the scope that it receives.
    #[test]
    fn reads_orders_of_previous_version() {
        let old = r#"{"version":1,"fleet":"acme","slot":"db-1","now":true}"#;
        let order: Departure = serde_json::from_str(old).unwrap();
        assert_eq!((order.scope(), serde_json::to_string(&order).unwrap().as_str()), (None, old));
        let scope = OrderScope {
            path: Departure::PATH.to_owned(),
            hub: "hub-1".to_owned(),
            issued_at: 1,
            nonce: "n".to_owned(),
        };
        let order = order.with_scope(scope.clone());
        let text = serde_json::to_string(&order).unwrap();
        assert_eq!(serde_json::from_str::<Departure>(&text).unwrap().scope, Some(scope));
    }
}
