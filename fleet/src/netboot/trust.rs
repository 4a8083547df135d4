//! Verification of images that a machine runs from memory. The fleet's update key signs them. The installer's initrd
//! has the public half, and the Secure Boot signature covers the initrd. So firmware that enforces Secure Boot leads to
//! signed code only, whichever host replies on the network.

use ring::signature::{ED25519, UnparsedPublicKey};

use super::messages::{ImageStatement, InstallerTrust, Run, SignedImage};
use crate::compare_versions;
use crate::encoding::decode;

/// An image without a signature of the fleet's update key, of another fleet, or of an older version.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the server's image for {to} is refused: {why}; start `bakehouse netboot` of this fleet")]
pub struct UntrustedImage {
    to: String,
    why: String,
}

/// Returns the root hash of an image after verifying its signature.
///
/// # Errors
/// If the fleet's update key did not sign this root hash, or the image is for another fleet or older than the
/// installer.
pub fn signed_root(trust: &InstallerTrust, run: &Run) -> Result<String, UntrustedImage> {
    let refused = |why: &str| UntrustedImage { to: run.to.clone(), why: why.to_owned() };
    let Some(SignedImage { statement, signature }) = &run.signed else {
        return Err(refused("its root hash is not signed"));
    };
    let (key, signature) = (decode(&trust.key).unwrap_or_default(), decode(signature).unwrap_or_default());
    UnparsedPublicKey::new(&ED25519, key)
        .verify(&SignedImage::message(statement), &signature)
        .map_err(|_| refused("the fleet's update key did not sign its root hash"))?;
    let signed: ImageStatement =
        serde_json::from_str(statement).map_err(|e| refused(&format!("cannot read its statement: {e}")))?;
    if signed.roothash != run.roothash {
        return Err(refused("the signature is for another root hash"));
    }
    if signed.fleet != trust.fleet {
        return Err(refused("the signature is for another fleet"));
    }
    if compare_versions(&signed.version, &trust.version).is_lt() {
        let older = format!("version {} is older than this installer, {}", signed.version, trust.version);
        return Err(refused(&older));
    }
    Ok(signed.roothash)
}

#[cfg(test)]
mod tests {
    use super::super::messages::{Extent, SealedTicket};
    use super::*;
    use crate::encoding::encode;
    use ring::signature::{Ed25519KeyPair, KeyPair as _};

    fn pair(seed: u8) -> Ed25519KeyPair {
        Ed25519KeyPair::from_seed_unchecked(&[seed; 32]).unwrap()
    }

    fn trust() -> InstallerTrust {
        InstallerTrust { fleet: "acme".into(), version: "2".into(), key: encode(pair(1).public_key().as_ref()) }
    }

    fn statement(fleet: &str, version: &str) -> String {
        let (fleet, version) = (fleet.to_owned(), version.to_owned());
        let roothash = "ab".repeat(32);
        serde_json::to_string(&ImageStatement { fleet, group: "app".into(), version, roothash }).unwrap()
    }

    fn run(statement: &str, message: &[u8], seed: u8) -> Run {
        let signature = encode(pair(seed).sign(message).as_ref());
        Run {
            to: "app-1".into(),
            image: "/images/app.raw".into(),
            root: Extent { start: 0, size: 1 },
            verity: Extent { start: 1, size: 1 },
            roothash: "ab".repeat(32),
            signed: Some(SignedImage { statement: statement.to_owned(), signature }),
            var: None,
            ticket: SealedTicket { key: String::new(), content: String::new() },
        }
    }

    #[test]
    fn rejects_images_that_the_update_key_did_not_sign() {
        let of = |fleet: &str, version: &str, seed| {
            let text = statement(fleet, version);
            run(&text, &SignedImage::message(&text), seed)
        };
        let good = of("acme", "2", 1);
        assert_eq!(signed_root(&trust(), &good).unwrap(), "ab".repeat(32));
        assert!(signed_root(&trust(), &of("acme", "10", 1)).is_ok(), "a newer image than the installer");
        let text = statement("acme", "2");
        for (bad, expected) in [
            (Run { signed: None, ..good.clone() }, "not signed"),
            (of("acme", "2", 2), "did not sign"),
            (of("other", "2", 1), "another fleet"),
            (of("acme", "1.9", 1), "older than"),
            (Run { roothash: "cd".repeat(32), ..good }, "another root hash"),
            // A signature of the same key over the same text, without the prefix of netboot images.
            (run(&text, text.as_bytes(), 1), "did not sign"),
        ] {
            let e = signed_root(&trust(), &bad).unwrap_err().to_string();
            assert!(e.contains(expected), "{expected}: {e}");
        }
    }
}
