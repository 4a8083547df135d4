//! A ticket on its way over a network that others listen on: encrypted for who asked.

use fleet::encoding::{decode, encode};
use fleet::netboot::SealedTicket;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use ring::agreement::{EphemeralPrivateKey, UnparsedPublicKey, X25519, agree_ephemeral};
use ring::hkdf::{HKDF_SHA256, Salt};
use ring::rand::SystemRandom;

use crate::error::{Error, Result};

/// What a machine's ticket is encrypted for: of this boot, and never written down.
pub struct Key {
    own: EphemeralPrivateKey,
    public: String,
}

impl Key {
    /// # Errors
    /// No randomness.
    pub fn generate() -> Result<Self> {
        let own = EphemeralPrivateKey::generate(&X25519, &SystemRandom::new()).map_err(|_| no("no randomness"))?;
        let public = own.compute_public_key().map_err(|_| no("no public key"))?;
        Ok(Self { own, public: encode(public.as_ref()) })
    }

    /// Base64.
    #[must_use]
    pub fn public(&self) -> &str {
        &self.public
    }

    /// # Errors
    /// It was not encrypted for this key, or was changed on its way.
    pub fn open(self, sealed: &SealedTicket) -> Result<Vec<u8>> {
        let mut content = decode(&sealed.content).ok_or_else(|| no("the ticket is no base64"))?;
        let key = agreed(self.own, &sealed.key)?;
        let open = key.open_in_place(nonce(), Aad::empty(), &mut content);
        Ok(open.map_err(|_| no("the ticket is not for this machine"))?.to_vec())
    }
}

/// Encrypts for the machine that has the key.
///
/// # Errors
/// It is no key.
pub fn seal(content: &[u8], to: &str) -> Result<SealedTicket> {
    let own = Key::generate()?;
    let mut content = content.to_vec();
    let key = agreed(own.own, to)?;
    key.seal_in_place_append_tag(nonce(), Aad::empty(), &mut content).map_err(|_| no("the ticket is too long"))?;
    Ok(SealedTicket { key: own.public, content: encode(&content) })
}

fn agreed(own: EphemeralPrivateKey, other: &str) -> Result<LessSafeKey> {
    let other = decode(other).ok_or_else(|| no("the key is no base64"))?;
    let agreed = agree_ephemeral(own, &UnparsedPublicKey::new(&X25519, other), |secret| {
        let salt = Salt::new(HKDF_SHA256, b"bakehouse netboot ticket");
        let okm = salt.extract(secret).expand(&[], &AES_256_GCM).map(UnboundKey::from);
        okm.map(LessSafeKey::new)
    });
    agreed.and_then(|key| key).map_err(|_| no("the key is none"))
}

/// Every key is used once.
fn nonce() -> Nonce {
    Nonce::assume_unique_for_key([0; 12])
}

fn no(why: &str) -> Error {
    Error::Failed(why.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_who_asked_reads_it() {
        let (asker, other) = (Key::generate().unwrap(), Key::generate().unwrap());
        let sealed = seal(b"a ticket", asker.public()).unwrap();
        assert!(!sealed.content.contains("ticket"));
        assert!(other.open(&sealed).is_err());
        assert_eq!(asker.open(&sealed).unwrap(), b"a ticket");
        assert!(seal(b"a ticket", "bm8=").is_err());
        assert!(seal(b"a ticket", "?").is_err());
    }

    #[test]
    fn what_was_changed_is_refused() {
        let asker = Key::generate().unwrap();
        let mut sealed = seal(b"a ticket", asker.public()).unwrap();
        sealed.content.replace_range(..1, if sealed.content.starts_with('A') { "B" } else { "A" });
        assert!(asker.open(&sealed).is_err());
    }

    proptest::proptest! {
        #[test]
        fn no_text_panics(key: String, content: String) {
            let _ = Key::generate().unwrap().open(&SealedTicket { key, content });
        }
    }
}
