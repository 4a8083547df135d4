//! Signed requests, as a hub verifies them: bound to their connection, and, where the operator
//! signed them, to this hub, this path and this minute.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use fleet::{
    BOUND_SIGNATURE_HEADER, Eviction, ORDER_VALIDITY, OrderScope, PROTOCOL, Reason, Refusal, SIGNATURE_HEADER,
    SignedOrder, bound_message, encoding,
};
use hyper::http::request::Parts;

use super::peer::Peer;
use super::refusal::no;
use crate::node::trust::signed_by_root;

/// A request's body, and the signature that has to cover it on this connection.
pub(super) struct Signed<'a> {
    pub(super) body: &'a [u8],
    /// What the signature has to cover.
    pub(super) message: Vec<u8>,
    path: &'a str,
    bound: Option<&'a str>,
    /// Base64 of a signature over the body alone: all that images of the version before make, and, of an operator's
    /// order, what proves it to other nodes.
    unbound: Option<&'a str>,
}

impl<'a> Signed<'a> {
    pub(super) fn of(peer: &Peer, head: &'a Parts, body: &'a [u8]) -> Self {
        let path = head.uri.path();
        Self {
            body,
            message: bound_message(&peer.binding, head.method.as_str(), path, body),
            path,
            bound: head.headers.get(BOUND_SIGNATURE_HEADER).and_then(|v| v.to_str().ok()),
            unbound: head.headers.get(SIGNATURE_HEADER).and_then(|v| v.to_str().ok()),
        }
    }

    /// Whether the request has a signature of any kind.
    pub(super) fn is_signed(&self) -> bool {
        self.bound.is_some() || self.unbound.is_some()
    }

    /// The order as proof for other nodes: `None` without the root's signature over its body alone.
    pub(super) fn proof(&self, root: &str) -> Option<Eviction> {
        let signature = self.unbound?;
        if !signed_by_root(root, self.body, &encoding::decode(signature)?) {
            return None;
        }
        Some(Eviction { order: String::from_utf8(self.body.to_vec()).ok()?, signature: signature.to_owned() })
    }

    /// Base64 of the signature over `message`.
    ///
    /// # Errors
    /// The request has none: a refusal, with the fix.
    pub(super) fn signature(&self) -> Result<&'a str, Refusal> {
        let text = if self.unbound.is_some() {
            "the request is not bound to its connection, as older versions send it; build the image again with this \
             version of bakehouse, or update bakehouse on the operator's machine"
        } else {
            "the request is not signed"
        };
        self.bound.ok_or_else(|| no(Reason::Forged, text))
    }
}

/// Ids of the orders that this hub has carried out, and when each was issued. The connection's
/// binding already keeps an order from being sent twice; this holds should the binding fail.
#[derive(Default)]
pub struct OrderLog(Mutex<BTreeMap<String, u64>>);

impl OrderLog {
    /// Reads an order that the fleet's root signed for this connection, this path and `hub`, not
    /// longer than [`ORDER_VALIDITY`] seconds ago, and not carried out yet.
    ///
    /// # Errors
    /// A refusal, with the fix.
    pub(super) fn verify<T: SignedOrder>(
        &self,
        root: &str,
        fleet: &str,
        hub: &str,
        signed: &Signed<'_>,
    ) -> Result<T, Refusal> {
        let signature = encoding::decode(signed.signature()?);
        if !signature.is_some_and(|signature| signed_by_root(root, &signed.message, &signature)) {
            return Err(no(Reason::Forged, "the fleet's root did not sign this request for this connection"));
        }
        let order: T = serde_json::from_slice(signed.body)
            .map_err(|e| no(Reason::Malformed, &format!("the request is not readable: {e}")))?;
        if order.target() != (PROTOCOL, fleet) {
            return Err(no(Reason::OtherFleet, &format!("this is a hub of `{fleet}`, format {PROTOCOL}")));
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let scope = order.scope().ok_or_else(|| {
            no(Reason::Malformed, "the order names no hub and no time; update bakehouse on the operator's machine")
        })?;
        holds(scope, (T::PATH, signed.path), hub, now)?;
        let mut done = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Older ones are refused by their time.
        done.retain(|_, issued_at| issued_at.abs_diff(now) <= ORDER_VALIDITY);
        if done.insert(scope.nonce.clone(), scope.issued_at).is_some() {
            return Err(no(Reason::Forged, "this hub has carried this order out already"));
        }
        Ok(order)
    }
}

/// Whether an order is for this path, this hub and this time.
fn holds(scope: &OrderScope, (taken, asked): (&str, &str), hub: &str, now: u64) -> Result<(), Refusal> {
    if scope.path != taken || scope.path != asked {
        let text = format!("the order was signed for {}, not for {asked}", scope.path);
        return Err(no(Reason::Forged, &text));
    }
    if scope.hub != hub {
        return Err(no(Reason::Forged, &format!("the order was signed for {}, this is {hub}", scope.hub)));
    }
    if scope.issued_at.abs_diff(now) > ORDER_VALIDITY {
        let text = format!(
            "the order was signed at {} by the operator's clock, it is {now} by {hub}'s (seconds since 1970), and they may \
             differ by {ORDER_VALIDITY} s; set the clock that is wrong",
            scope.issued_at
        );
        return Err(no(Reason::Expired, &text));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_holds_for_its_path_its_hub_and_its_time() {
        let scope = |change: fn(&mut OrderScope)| {
            let mut scope =
                OrderScope { path: "/v1/leave".into(), hub: "hub-1".into(), issued_at: 1000, nonce: "n".into() };
            change(&mut scope);
            scope
        };
        let holds = |scope: &OrderScope, now| holds(scope, ("/v1/leave", "/v1/leave"), "hub-1", now);
        assert!(holds(&scope(|_| {}), 1000 + ORDER_VALIDITY).is_ok());
        assert!(holds(&scope(|_| {}), 1000 - ORDER_VALIDITY).is_ok());
        let late = holds(&scope(|_| {}), 1001 + ORDER_VALIDITY).unwrap_err();
        assert!(late.text.contains("1000") && late.text.contains("1301"), "{}", late.text);
        assert!(holds(&scope(|s| s.issued_at = u64::MAX), 1000).is_err());
        assert!(holds(&scope(|s| s.hub = "hub-2".into()), 1000).is_err());
        assert!(holds(&scope(|s| s.path = "/v1/tokens".into()), 1000).is_err());
    }
}
