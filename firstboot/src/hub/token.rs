//! Verification of join requests: the fleet's root signed the token, and the token's owner signed the request.

use fleet::{Claims, JoinRequest, Reason, Refusal, encoding};
use ring::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};

use super::refusal::refuse;
use crate::node::trust::signed_by_root;

/// Verifies the token's signature, the request's signature, which covers `message`, and the token's fleet and group.
/// The claim checks expiry and uses later, because the owner of a grant may repeat its claim.
///
/// # Errors
/// A refusal with the fix.
pub fn verify(
    root: &str,
    fleet: &str,
    request: &JoinRequest,
    message: &[u8],
    signature: &str,
) -> Result<Claims, Refusal> {
    let claims = request.token.read().ok_or_else(|| refuse(Reason::Malformed, "cannot parse the token"))?;
    let signed = encoding::decode(&request.token.signature)
        .is_some_and(|signature| signed_by_root(root, request.token.claims.as_bytes(), &signature));
    if !signed {
        return Err(refuse(
            Reason::Forged,
            "this fleet's root did not sign the token; mint one with `bakehouse ticket`",
        ));
    }
    let owned = match (claims.public_key(), encoding::decode(signature)) {
        (Some(key), Some(signature)) => {
            UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, key.as_bytes()).verify(message, &signature).is_ok()
        }
        _ => false,
    };
    if !owned {
        return Err(refuse(Reason::Forged, "the token's key did not sign the request"));
    }
    if claims.fleet != fleet {
        let text = format!("the token is for the fleet `{}`, this hub is in the fleet `{fleet}`", claims.fleet);
        return Err(refuse(Reason::OtherFleet, &text));
    }
    if claims.group != request.group {
        let text = format!(
            "the token is for the group `{}`, this node runs the image of `{}`; mint one with \
             `bakehouse ticket {}`",
            claims.group, request.group, request.group
        );
        return Err(refuse(Reason::OtherGroup, &text));
    }
    Ok(claims)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use fleet::{Issuer, Joiner, MeshKey, PROTOCOL, Token};
    use proptest::prelude::*;
    use std::sync::LazyLock;

    pub(crate) fn claims(group: &str) -> Claims {
        Claims {
            fleet: "acme".into(),
            id: "token-1".into(),
            group: group.into(),
            slot: None,
            replace: false,
            uses: 1,
            expires: u64::MAX,
            key: String::new(),
        }
    }

    pub(crate) fn join_request(joiner: &Joiner, group: &str, key: u8) -> JoinRequest {
        JoinRequest {
            version: PROTOCOL,
            token: joiner.token.clone(),
            group: group.into(),
            image: "1".into(),
            mesh_key: MeshKey([key; 32]),
            tls_key: encoding::encode(fleet::PrivateKey::generate().unwrap().public().unwrap().as_bytes()),
        }
    }

    fn reason(root: &Issuer, joiner: &Joiner, request: &JoinRequest) -> Result<Claims, Reason> {
        let body = serde_json::to_vec(request).unwrap();
        let signature = encoding::encode(&joiner.key.sign(&body).unwrap());
        verify(root.certificate(), "acme", request, &body, &signature).map_err(|r| r.reason)
    }

    #[test]
    fn accepts_only_requests_that_root_and_owner_signed() {
        let root = Issuer::root("acme").unwrap();
        let joiner = Joiner::mint(&root, claims("db")).unwrap();
        assert_eq!(reason(&root, &joiner, &join_request(&joiner, "db", 1)).unwrap().id, "token-1");
        // Another root, another owner, changed claims, another group, another fleet.
        assert_eq!(
            reason(&Issuer::root("acme").unwrap(), &joiner, &join_request(&joiner, "db", 1)),
            Err(Reason::Forged)
        );
        let thief = Joiner { key: fleet::PrivateKey::generate().unwrap(), ..joiner.clone() };
        assert_eq!(reason(&root, &thief, &join_request(&joiner, "db", 1)), Err(Reason::Forged));
        let mut more = joiner.clone();
        more.token.claims = more.token.claims.replace("\"uses\":1", "\"uses\":9");
        assert_eq!(reason(&root, &more, &join_request(&more, "db", 1)), Err(Reason::Forged));
        assert_eq!(reason(&root, &joiner, &join_request(&joiner, "app", 1)), Err(Reason::OtherGroup));
        let other = Joiner::mint(&root, Claims { fleet: "other".into(), ..claims("db") }).unwrap();
        assert_eq!(reason(&root, &other, &join_request(&other, "db", 1)), Err(Reason::OtherFleet));
    }

    #[test]
    fn rejects_a_changed_request() {
        let root = Issuer::root("acme").unwrap();
        let joiner = Joiner::mint(&root, claims("db")).unwrap();
        let request = join_request(&joiner, "db", 1);
        let body = serde_json::to_vec(&request).unwrap();
        let signature = encoding::encode(&joiner.key.sign(&body).unwrap());
        let changed = JoinRequest { mesh_key: MeshKey([9; 32]), ..request };
        let body = serde_json::to_vec(&changed).unwrap();
        let e = verify(root.certificate(), "acme", &changed, &body, &signature).unwrap_err();
        assert_eq!(e.reason, Reason::Forged);
    }

    /// Returns a valid request: the root, the body, and the body's signature.
    fn sent() -> &'static (Issuer, Vec<u8>, String) {
        static SENT: LazyLock<(Issuer, Vec<u8>, String)> = LazyLock::new(|| {
            let root = Issuer::root("acme").unwrap();
            let joiner = Joiner::mint(&root, claims("db")).unwrap();
            let body = serde_json::to_vec(&join_request(&joiner, "db", 1)).unwrap();
            let signature = encoding::encode(&joiner.key.sign(&body).unwrap());
            (root, body, signature)
        });
        &SENT
    }

    fn is_accepted(body: &[u8], signature: &str) -> bool {
        let root = sent().0.certificate();
        serde_json::from_slice(body).is_ok_and(|r: JoinRequest| verify(root, "acme", &r, body, signature).is_ok())
    }

    proptest::proptest! {
        #[test]
        fn rejects_a_request_with_one_changed_byte(at: prop::sample::Index, change in 1u8..) {
            let (_, body, signature) = sent();
            prop_assert!(is_accepted(body, signature));
            let mut changed = body.clone();
            changed[at.index(body.len())] ^= change;
            prop_assert!(!is_accepted(&changed, signature));
        }

        #[test]
        fn arbitrary_requests_do_not_panic(body: Vec<u8>, texts: [String; 5]) {
            let (root, whole, _) = sent();
            let [text, signature, group, image, tls_key] = texts;
            prop_assert!(!is_accepted(&body, &signature));
            prop_assert!(!is_accepted(whole, &signature));
            let known: JoinRequest = serde_json::from_slice(whole).unwrap();
            // An unsigned token, and signed ones: text instead of claims, and claims with an invalid key.
            let sign = |claims: String| {
                let signature = encoding::encode(&root.sign(claims.as_bytes()).unwrap());
                Token { claims, signature }
            };
            let no_key = Claims { key: text.clone(), ..known.token.read().unwrap() };
            let tokens = [
                Token { claims: text.clone(), signature: signature.clone() },
                sign(text),
                sign(serde_json::to_string(&no_key).unwrap()),
            ];
            for token in tokens {
                let (group, image, tls_key) = (group.clone(), image.clone(), tls_key.clone());
                let request = JoinRequest { token, group, image, tls_key, ..known.clone() };
                prop_assert!(!is_accepted(&serde_json::to_vec(&request).unwrap(), &signature));
            }
        }
    }
}
