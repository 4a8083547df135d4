//! The key that signs updates. It is derived from the private key of the fleet's root.

use fleet::encoding::encode;
use fleet::netboot::{ImageStatement, SignedImage};
use ring::hkdf::{HKDF_SHA256, Salt};
use ring::signature::{Ed25519KeyPair, KeyPair as _};

use crate::error::{Error, Result};
use crate::format::openpgp;

/// Signs updates. Nodes install only updates with its signature.
pub struct UpdateKey {
    pair: Ed25519KeyPair,
    name: String,
}

impl UpdateKey {
    /// Derives the update key from the private key of a fleet's root.
    ///
    /// # Errors
    /// If the key cannot be derived; does not happen in practice, because any 32 bytes are a key.
    pub fn derive(fleet: &str, root_key: &str) -> Result<Self> {
        let mut seed = [0; 32];
        let secret = Salt::new(HKDF_SHA256, b"bakehouse").extract(root_key.as_bytes());
        let failed = |_| Error::Failed("cannot derive the update key".to_owned());
        secret.expand(&[b"update key, v1"], HKDF_SHA256).and_then(|k| k.fill(&mut seed)).map_err(failed)?;
        let pair = Ed25519KeyPair::from_seed_unchecked(&seed)
            .map_err(|e| Error::cannot("derive the update key")(e.to_string()))?;
        Ok(Self { pair, name: format!("{fleet} fleet updates") })
    }

    /// Returns the public key as an OpenPGP keyring.
    #[must_use]
    pub fn keyring(&self) -> Vec<u8> {
        openpgp::keyring(&self.pair, &self.name)
    }

    /// Returns a detached OpenPGP signature with this time (seconds since 1970).
    #[must_use]
    pub fn sign(&self, content: &[u8], time: u64) -> Vec<u8> {
        openpgp::sign(&self.pair, content, time)
    }

    /// Returns the Ed25519 public key, 32 bytes, for programs without OpenPGP.
    #[must_use]
    pub fn public(&self) -> &[u8] {
        self.pair.public_key().as_ref()
    }

    /// Signs a statement about an image, so that machines that boot from the network may run the image from memory.
    ///
    /// # Errors
    /// If the statement cannot be serialised as JSON.
    pub fn sign_image(&self, statement: &ImageStatement) -> Result<SignedImage> {
        let statement = serde_json::to_string(statement).map_err(Error::Json)?;
        let signature = encode(self.pair.sign(&SignedImage::message(&statement)).as_ref());
        Ok(SignedImage { statement, signature })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::process::Command;

    #[test]
    fn gpgv_accepts_signatures_of_this_key_only() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8]| {
            let path = dir.path().join(name);
            fs::write(&path, bytes).unwrap();
            path
        };
        let verified = |keyring: &[u8], signature: &[u8], content: &[u8]| {
            let (ring, sig, data) = (write("ring.gpg", keyring), write("sums.gpg", signature), write("sums", content));
            let mut gpgv = Command::new("gpgv");
            gpgv.env("GNUPGHOME", dir.path()).arg("--keyring").arg(ring).arg(sig).arg(data);
            let done = gpgv.output().expect("gpgv: apt needs it");
            (done.status.success(), String::from_utf8_lossy(&done.stderr).into_owned())
        };
        // Many signatures, because r and s have different lengths.
        for i in 0..40 {
            let key = UpdateKey::derive("acme", &format!("root {i}")).unwrap();
            let content = format!("{i}  file\n").repeat(i + 1).into_bytes();
            let signature = key.sign(&content, 1_760_000_000);
            assert_eq!(signature, key.sign(&content, 1_760_000_000), "the signature differs");
            let (ok, output) = verified(&key.keyring(), &signature, &content);
            assert!(ok && output.contains("acme fleet updates"), "{output}");
            if i < 3 {
                assert!(!verified(&key.keyring(), &signature, b"changed").0);
                let other = UpdateKey::derive("acme", "another root").unwrap();
                assert!(!verified(&other.keyring(), &signature, &content).0);
            }
        }
    }
}
