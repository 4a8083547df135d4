//! Is this token of our fleet's root, and this request of the token's owner?

use fleet::{Claims, JoinRequest, Reason, Refusal, encoding};
use ring::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};

use super::refusal::no;
use crate::node::trust::signed_by_root;

/// Verifies the token's signature, the request's, which covers `message`, and what does not change:
/// fleet, group, form. The claim looks at expiry and uses later: who has its grant may ask again.
///
/// # Errors
/// A refusal, with what to do.
pub fn verify(
    root: &str,
    fleet: &str,
    request: &JoinRequest,
    message: &[u8],
    signature: &str,
) -> Result<Claims, Refusal> {
    let claims = request.token.read().ok_or_else(|| no(Reason::Malformed, "the token is not readable"))?;
    let signed = encoding::decode(&request.token.signature)
        .is_some_and(|signature| signed_by_root(root, request.token.claims.as_bytes(), &signature));
    if !signed {
        return Err(no(
            Reason::Forged,
            "the token was not signed by this fleet's root; mint one with `bakehouse ticket`",
        ));
    }
    let owned = match (claims.public_key(), encoding::decode(signature)) {
        (Some(key), Some(signature)) => {
            UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, key.as_bytes()).verify(message, &signature).is_ok()
        }
        _ => false,
    };
    if !owned {
        return Err(no(Reason::Forged, "the request was not signed with the token's key"));
    }
    if claims.fleet != fleet {
        let text = format!("the token is of the fleet `{}`, these are the hubs of `{fleet}`", claims.fleet);
        return Err(no(Reason::OtherFleet, &text));
    }
    if claims.group != request.group {
        let text = format!(
            "the token is for the group `{}`, this node runs the image of `{}`; mint one for it with `bakehouse ticket {}`",
            claims.group, request.group, request.group
        );
        return Err(no(Reason::OtherGroup, &text));
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

    pub(crate) fn asks(joiner: &Joiner, group: &str, key: u8) -> JoinRequest {
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
    fn only_what_root_and_owner_signed_is_believed() {
        let root = Issuer::root("acme").unwrap();
        let joiner = Joiner::mint(&root, claims("db")).unwrap();
        assert_eq!(reason(&root, &joiner, &asks(&joiner, "db", 1)).unwrap().id, "token-1");
        // Another root; another owner; a claim that was changed; another group and fleet.
        assert_eq!(reason(&Issuer::root("acme").unwrap(), &joiner, &asks(&joiner, "db", 1)), Err(Reason::Forged));
        let thief = Joiner { key: fleet::PrivateKey::generate().unwrap(), ..joiner.clone() };
        assert_eq!(reason(&root, &thief, &asks(&joiner, "db", 1)), Err(Reason::Forged));
        let mut more = joiner.clone();
        more.token.claims = more.token.claims.replace("\"uses\":1", "\"uses\":9");
        assert_eq!(reason(&root, &more, &asks(&more, "db", 1)), Err(Reason::Forged));
        assert_eq!(reason(&root, &joiner, &asks(&joiner, "app", 1)), Err(Reason::OtherGroup));
        let other = Joiner::mint(&root, Claims { fleet: "other".into(), ..claims("db") }).unwrap();
        assert_eq!(reason(&root, &other, &asks(&other, "db", 1)), Err(Reason::OtherFleet));
    }

    #[test]
    fn a_request_that_was_changed_on_the_way_is_not_the_owners() {
        let root = Issuer::root("acme").unwrap();
        let joiner = Joiner::mint(&root, claims("db")).unwrap();
        let request = asks(&joiner, "db", 1);
        let body = serde_json::to_vec(&request).unwrap();
        let signature = encoding::encode(&joiner.key.sign(&body).unwrap());
        let changed = JoinRequest { mesh_key: MeshKey([9; 32]), ..request };
        let body = serde_json::to_vec(&changed).unwrap();
        let e = verify(root.certificate(), "acme", &changed, &body, &signature).unwrap_err();
        assert_eq!(e.reason, Reason::Forged);
    }

    /// One request as its owner sent it: the root, the body, its signature.
    fn sent() -> &'static (Issuer, Vec<u8>, String) {
        static SENT: LazyLock<(Issuer, Vec<u8>, String)> = LazyLock::new(|| {
            let root = Issuer::root("acme").unwrap();
            let joiner = Joiner::mint(&root, claims("db")).unwrap();
            let body = serde_json::to_vec(&asks(&joiner, "db", 1)).unwrap();
            let signature = encoding::encode(&joiner.key.sign(&body).unwrap());
            (root, body, signature)
        });
        &SENT
    }

    fn believes(body: &[u8], signature: &str) -> bool {
        let root = sent().0.certificate();
        serde_json::from_slice(body).is_ok_and(|r: JoinRequest| verify(root, "acme", &r, body, signature).is_ok())
    }

    proptest::proptest! {
        #[test]
        fn no_byte_of_a_request_can_be_another(at: prop::sample::Index, change in 1u8..) {
            let (_, body, signature) = sent();
            prop_assert!(believes(body, signature));
            let mut changed = body.clone();
            changed[at.index(body.len())] ^= change;
            prop_assert!(!believes(&changed, signature));
        }

        #[test]
        fn nothing_that_is_read_makes_it_fall(body: Vec<u8>, texts: [String; 5]) {
            let (root, whole, _) = sent();
            let [text, signature, group, image, tls_key] = texts;
            prop_assert!(!believes(&body, &signature));
            prop_assert!(!believes(whole, &signature));
            let known: JoinRequest = serde_json::from_slice(whole).unwrap();
            // What nobody signed, and what the root did: a text that is no claims, a key that is none.
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
                prop_assert!(!believes(&serde_json::to_vec(&request).unwrap(), &signature));
            }
        }
    }
}
