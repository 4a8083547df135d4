//! The fleet's update key in OpenPGP's form: the only signature that systemd-sysupdate reads.
//! One kind of key and one kind of signature (RFC 4880, Ed25519 as GnuPG writes it); everything
//! is derived, so that the same files are signed with the same bytes.

use fleet::encoding::encode;
use fleet::netboot::{ImageStatement, SignedImage};
use ring::digest::{SHA1_FOR_LEGACY_USE_ONLY, digest};
use ring::hkdf::{HKDF_SHA256, Salt};
use ring::signature::{Ed25519KeyPair, KeyPair as _};
use sha2::{Digest as _, Sha256};

use crate::error::{Error, Result};

/// When every update key was made, as far as OpenPGP is told: 2020. A key of the future is refused.
const MADE: u32 = 1_577_836_800;
const ED_DSA: u8 = 22;
const SHA_256: u8 = 8;
/// Curve Ed25519.
const CURVE: [u8; 10] = [9, 0x2b, 0x06, 0x01, 0x04, 0x01, 0xda, 0x47, 0x0f, 0x01];
/// Kinds of signatures.
const BINARY: u8 = 0x00;
const CERTIFICATION: u8 = 0x13;
/// Kinds of packets.
const SIGNATURE: u8 = 2;
const PUBLIC_KEY: u8 = 6;
const USER_ID: u8 = 13;

/// Signs updates; images trust it and nothing else.
pub struct UpdateKey {
    pair: Ed25519KeyPair,
    name: String,
}

impl UpdateKey {
    /// The one that belongs to a fleet's root: who has the root has it, and nobody else.
    ///
    /// # Errors
    /// Never in practice: any 32 bytes are a key.
    pub fn of(fleet: &str, root_key: &str) -> Result<Self> {
        let mut seed = [0; 32];
        let secret = Salt::new(HKDF_SHA256, b"bakehouse").extract(root_key.as_bytes());
        let told = |_| Error::Failed("the update key can't be derived".to_owned());
        secret.expand(&[b"update key, v1"], HKDF_SHA256).and_then(|k| k.fill(&mut seed)).map_err(told)?;
        let pair = Ed25519KeyPair::from_seed_unchecked(&seed)
            .map_err(|e| Error::Failed(format!("the update key can't be derived: {e}")))?;
        Ok(Self { pair, name: format!("{fleet} fleet updates") })
    }

    /// The public half, as a keyring.
    #[must_use]
    pub fn keyring(&self) -> Vec<u8> {
        let key = self.body();
        let name = self.name.as_bytes();
        let mut signed = framed(&key);
        signed.push(0xb4);
        signed.extend((name.len() as u32).to_be_bytes());
        signed.extend(name);
        // What it is for: certifying itself, and signing.
        let own = self.signature(CERTIFICATION, &signed, MADE, &[2, 27, 0x03]);
        [packet(PUBLIC_KEY, &key), packet(USER_ID, name), own].concat()
    }

    /// A detached signature, as of `time` (seconds since 1970).
    #[must_use]
    pub fn sign(&self, content: &[u8], time: u64) -> Vec<u8> {
        self.signature(BINARY, content, u32::try_from(time).unwrap_or(u32::MAX).max(MADE), &[])
    }

    /// The public half as it is, for those who read no OpenPGP: Ed25519, 32 bytes.
    #[must_use]
    pub fn public(&self) -> &[u8] {
        self.pair.public_key().as_ref()
    }

    /// Signs that machines which boot from the network may run an image from their memory.
    ///
    /// # Errors
    /// The statement can't be written as JSON.
    pub fn sign_image(&self, statement: &ImageStatement) -> Result<SignedImage> {
        let statement = serde_json::to_string(statement).map_err(|e| Error::Failed(e.to_string()))?;
        let signature = encode(self.pair.sign(&SignedImage::message(&statement)).as_ref());
        Ok(SignedImage { statement, signature })
    }

    fn signature(&self, kind: u8, content: &[u8], time: u32, more: &[u8]) -> Vec<u8> {
        let fingerprint = self.fingerprint();
        let mut hashed = vec![5, 2];
        hashed.extend(time.to_be_bytes());
        hashed.extend([22, 33, 4]);
        hashed.extend(&fingerprint);
        hashed.extend(more);
        let mut head = vec![4, kind, ED_DSA, SHA_256];
        head.extend((hashed.len() as u16).to_be_bytes());
        head.extend(&hashed);
        let mut hash = Sha256::new();
        hash.update(content);
        hash.update(&head);
        hash.update([4, 0xff]);
        hash.update((head.len() as u32).to_be_bytes());
        let hash = hash.finalize();
        let signature = self.pair.sign(&hash);
        let (r, s) = signature.as_ref().split_at(32);
        let mut body = head;
        // Not hashed: the key's number, for who looks for it.
        body.extend([0, 10, 9, 16]);
        body.extend(&fingerprint[12..]);
        body.extend(&hash[..2]);
        body.extend(number(r));
        body.extend(number(s));
        packet(SIGNATURE, &body)
    }

    fn body(&self) -> Vec<u8> {
        let mut body = vec![4];
        body.extend(MADE.to_be_bytes());
        body.push(ED_DSA);
        body.extend(CURVE);
        // A prefix says that it is a point in the curve's own form.
        body.extend(number(&[&[0x40], self.pair.public_key().as_ref()].concat()));
        body
    }

    fn fingerprint(&self) -> Vec<u8> {
        digest(&SHA1_FOR_LEGACY_USE_ONLY, &framed(&self.body())).as_ref().to_vec()
    }
}

/// A key as it is hashed.
fn framed(key: &[u8]) -> Vec<u8> {
    let mut out = vec![0x99];
    out.extend((key.len() as u16).to_be_bytes());
    out.extend(key);
    out
}

/// Packets here are short: two bytes of length, always.
fn packet(tag: u8, body: &[u8]) -> Vec<u8> {
    let mut out = vec![0x80 | tag << 2 | 1];
    out.extend((body.len() as u16).to_be_bytes());
    out.extend(body);
    out
}

/// A number of any size: its bits counted, without leading zeros.
fn number(bytes: &[u8]) -> Vec<u8> {
    let start = bytes.iter().position(|b| *b != 0).unwrap_or(bytes.len());
    let bytes = &bytes[start..];
    let bits = bytes.first().map_or(0, |first| bytes.len() * 8 - first.leading_zeros() as usize);
    let mut out = (bits as u16).to_be_bytes().to_vec();
    out.extend(bytes);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::process::Command;

    #[test]
    fn gnupg_believes_the_key_and_nothing_else() {
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
        // Many: r and s are of every length.
        for i in 0..40 {
            let key = UpdateKey::of("acme", &format!("root {i}")).unwrap();
            let content = format!("{i}  file\n").repeat(i + 1).into_bytes();
            let signature = key.sign(&content, 1_760_000_000);
            assert_eq!(signature, key.sign(&content, 1_760_000_000), "not the same bytes");
            let (ok, said) = verified(&key.keyring(), &signature, &content);
            assert!(ok && said.contains("acme fleet updates"), "{said}");
            if i < 3 {
                assert!(!verified(&key.keyring(), &signature, b"changed").0);
                let other = UpdateKey::of("acme", "another root").unwrap();
                assert!(!verified(&other.keyring(), &signature, &content).0);
            }
        }
    }
}
