//! Verification of signed requests. A signature is bound to one TLS connection. An operator's order is also bound to
//! one hub, one path and a few minutes.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use fleet::{
    BOUND_SIGNATURE_HEADER, Eviction, ORDER_VALIDITY, OrderScope, PROTOCOL, Reason, Refusal, SIGNATURE_HEADER,
    SignedOrder, bound_message, encoding,
};
use hyper::http::request::Parts;

use super::peer::Peer;
use super::refusal::refuse;
use crate::node::trust::signed_by_root;

/// A request's body with its signatures.
pub(super) struct Signed<'a> {
    pub(super) body: &'a [u8],
    /// The message that the signature must cover.
    pub(super) message: Vec<u8>,
    path: &'a str,
    bound: Option<&'a str>,
    /// Base64 of a signature over the body alone. Images of the previous version send only this one, and it proves an
    /// operator's order to other nodes.
    unbound: Option<&'a str>,
}

impl<'a> Signed<'a> {
    pub(super) fn new(peer: &Peer, head: &'a Parts, body: &'a [u8]) -> Self {
        let path = head.uri.path();
        Self {
            body,
            message: bound_message(&peer.binding, head.method.as_str(), path, body),
            path,
            bound: head.headers.get(BOUND_SIGNATURE_HEADER).and_then(|v| v.to_str().ok()),
            unbound: head.headers.get(SIGNATURE_HEADER).and_then(|v| v.to_str().ok()),
        }
    }

    /// Returns whether the request has a signature of either kind.
    pub(super) fn is_signed(&self) -> bool {
        self.bound.is_some() || self.unbound.is_some()
    }

    /// Returns the order as a proof for other nodes; `None` without the root's signature over the body alone.
    pub(super) fn proof(&self, root: &str) -> Option<Eviction> {
        let signature = self.unbound?;
        if !signed_by_root(root, self.body, &encoding::decode(signature)?) {
            return None;
        }
        Some(Eviction { order: String::from_utf8(self.body.to_vec()).ok()?, signature: signature.to_owned() })
    }

    /// Returns the signature over `message`, Base64.
    ///
    /// # Errors
    /// If the request has no such signature: a refusal with the fix.
    pub(super) fn signature(&self) -> Result<&'a str, Refusal> {
        let text = if self.unbound.is_some() {
            "an older version signed the request, without a binding to its connection; build the image again with this \
             version of bakehouse, or update bakehouse on the operator's machine"
        } else {
            "the request is not signed"
        };
        self.bound.ok_or_else(|| refuse(Reason::Forged, text))
    }
}

/// Nonces of the orders that this hub has carried out, with their times. The binding to a connection already prevents
/// replays; this log is a second safeguard.
#[derive(Default)]
pub struct OrderLog(Mutex<BTreeMap<String, u64>>);

impl OrderLog {
    /// Parses an order that the fleet's root signed for this connection, this path and `hub` within the last
    /// [`ORDER_VALIDITY`] seconds, and that this hub has not carried out yet.
    ///
    /// # Errors
    /// A refusal with the fix.
    pub(super) fn verify<T: SignedOrder>(
        &self,
        root: &str,
        fleet: &str,
        hub: &str,
        signed: &Signed<'_>,
    ) -> Result<T, Refusal> {
        let signature = encoding::decode(signed.signature()?);
        if !signature.is_some_and(|signature| signed_by_root(root, &signed.message, &signature)) {
            return Err(refuse(Reason::Forged, "the fleet's root did not sign this request for this connection"));
        }
        let order: T = serde_json::from_slice(signed.body)
            .map_err(|e| refuse(Reason::Malformed, &format!("cannot parse the request: {e}")))?;
        if order.target() != (PROTOCOL, fleet) {
            return Err(refuse(
                Reason::OtherFleet,
                &format!(
                    "the order is for another fleet or format; this hub is in `{fleet}` and reads format {PROTOCOL}"
                ),
            ));
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let scope = order.scope().ok_or_else(|| {
            refuse(Reason::Malformed, "the order names no hub and no time; update bakehouse on the operator's machine")
        })?;
        check_scope(scope, (T::PATH, signed.path), hub, now)?;
        let mut done = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // The check of the time refuses older orders.
        done.retain(|_, issued_at| issued_at.abs_diff(now) <= ORDER_VALIDITY);
        if done.insert(scope.nonce.clone(), scope.issued_at).is_some() {
            return Err(refuse(Reason::Forged, "this hub has already carried out this order"));
        }
        Ok(order)
    }
}

/// Checks that an order is for this path, this hub and this time.
fn check_scope(scope: &OrderScope, (expected, requested): (&str, &str), hub: &str, now: u64) -> Result<(), Refusal> {
    if scope.path != expected || scope.path != requested {
        let text = format!("the order was signed for {}, not for {requested}", scope.path);
        return Err(refuse(Reason::Forged, &text));
    }
    if scope.hub != hub {
        return Err(refuse(Reason::Forged, &format!("the order was signed for {}, this is {hub}", scope.hub)));
    }
    if scope.issued_at.abs_diff(now) > ORDER_VALIDITY {
        let text = format!(
            "the operator's clock showed {} when the order was signed, {hub}'s clock shows {now} (Unix seconds), \
             and they may differ by {ORDER_VALIDITY} s; set the wrong clock",
            scope.issued_at
        );
        return Err(refuse(Reason::Expired, &text));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_orders_only_for_their_path_hub_and_time() {
        let scope = |change: fn(&mut OrderScope)| {
            let mut scope =
                OrderScope { path: "/v1/leave".into(), hub: "hub-1".into(), issued_at: 1000, nonce: "n".into() };
            change(&mut scope);
            scope
        };
        let check = |scope: &OrderScope, now| check_scope(scope, ("/v1/leave", "/v1/leave"), "hub-1", now);
        assert!(check(&scope(|_| {}), 1000 + ORDER_VALIDITY).is_ok());
        assert!(check(&scope(|_| {}), 1000 - ORDER_VALIDITY).is_ok());
        let late = check(&scope(|_| {}), 1001 + ORDER_VALIDITY).unwrap_err();
        assert!(late.text.contains("1000") && late.text.contains("1301"), "{}", late.text);
        assert!(check(&scope(|s| s.issued_at = u64::MAX), 1000).is_err());
        assert!(check(&scope(|s| s.hub = "hub-2".into()), 1000).is_err());
        assert!(check(&scope(|s| s.path = "/v1/tokens".into()), 1000).is_err());
    }
}
