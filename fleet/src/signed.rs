//! Signed requests. A signature covers the TLS connection, the method, the path and the body, so
//! that whoever reads a request at the other end can't send it again on a connection of its own.
//! An operator's order also names its path, its hub and its time, and has a random id.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::join::{Departure, Revocation, TokensRequest};
use crate::rollout::RolloutRequest;

/// Header with the base64 of a signature over [`bound_message`]: ECDSA P-256, SHA-256, ASN.1.
pub const BOUND_SIGNATURE_HEADER: &str = "bakehouse-bound-signature";
/// Label of the TLS exporter (RFC 8446 § 7.5, used as RFC 9266 does) that identifies a connection.
pub const EXPORTER_LABEL: &[u8] = b"EXPORTER-bakehouse";
/// Seconds by which an order's time and the hub's clock may differ.
pub const ORDER_VALIDITY: u64 = 300;

/// What identifies one TLS connection to both of its ends: 32 bytes of its exporter.
pub type ChannelBinding = [u8; 32];

/// What a bound signature covers. No part can be mistaken for another: the binding has a fixed
/// length, and neither a method nor a path has a NUL.
#[must_use]
pub fn bound_message(binding: &ChannelBinding, method: &str, path: &str, body: &[u8]) -> Vec<u8> {
    let parts: [&[u8]; 7] = [b"bakehouse-bound-1\0", binding, method.as_bytes(), b"\0", path.as_bytes(), b"\0", body];
    parts.concat()
}

/// Where and when an operator's order holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OrderScope {
    /// Path of the API that it was signed for.
    pub path: String,
    /// Slot of the hub that is to carry it out.
    pub hub: String,
    /// Seconds since 1970 by the operator's clock.
    pub issued_at: u64,
    /// 128 random bits: a hub carries an order out once.
    pub nonce: String,
}

/// An order that only the owner of the fleet's root can give.
pub trait SignedOrder: Serialize + DeserializeOwned {
    /// The only path that takes it.
    const PATH: &'static str;
    /// Format and fleet.
    fn target(&self) -> (u16, &str);
    /// Where and when it holds; `None` from an operator of an older version.
    fn scope(&self) -> Option<&OrderScope>;
    /// The same order for one hub and one time.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_of_the_message_is_no_other_part() {
        let one = bound_message(&[1; 32], "POST", "/v1/leave", b"{}");
        assert_ne!(one, bound_message(&[2; 32], "POST", "/v1/leave", b"{}"));
        assert_ne!(one, bound_message(&[1; 32], "GET", "/v1/leave", b"{}"));
        assert_ne!(one, bound_message(&[1; 32], "POST", "/v1/left", b"{}"));
        assert_ne!(one, bound_message(&[1; 32], "POST", "/v1/leave{", b"}"));
    }

    /// Bodies of the version before have no scope, and what that version reads has one more field.
    #[test]
    fn orders_of_the_version_before_are_read() {
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
