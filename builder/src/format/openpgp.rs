//! Writes OpenPGP keys and signatures ([RFC 4880](https://www.rfc-editor.org/rfc/rfc4880), with Ed25519 as in
//! [GnuPG](https://datatracker.ietf.org/doc/html/draft-koch-eddsa-for-openpgp)). systemd-sysupdate verifies no other
//! kind of signature. Nothing is random, so that the same files give the same signature.

use ring::digest::{SHA1_FOR_LEGACY_USE_ONLY, digest};
use ring::signature::{Ed25519KeyPair, KeyPair as _};
use sha2::{Digest as _, Sha256};

/// Creation time of every update key, 2020. OpenPGP needs one, and gpgv rejects a key from the future.
const CREATED: u32 = 1_577_836_800;
const ED_DSA: u8 = 22;
const SHA_256: u8 = 8;
/// Object identifier of the curve Ed25519.
const CURVE: [u8; 10] = [9, 0x2b, 0x06, 0x01, 0x04, 0x01, 0xda, 0x47, 0x0f, 0x01];
/// Types of signatures, section 5.2.1.
const BINARY: u8 = 0x00;
const CERTIFICATION: u8 = 0x13;
/// Packet tags, section 4.3.
const SIGNATURE: u8 = 2;
const PUBLIC_KEY: u8 = 6;
const USER_ID: u8 = 13;

/// Returns the public key as a keyring with this user id.
#[must_use]
pub(crate) fn keyring(pair: &Ed25519KeyPair, name: &str) -> Vec<u8> {
    let key = body(pair);
    let name = name.as_bytes();
    let mut signed = framed(&key);
    signed.push(0xb4);
    signed.extend((name.len() as u32).to_be_bytes());
    signed.extend(name);
    // Key flags: certify and sign.
    let own = signature(pair, CERTIFICATION, &signed, CREATED, &[2, 27, 0x03]);
    [packet(PUBLIC_KEY, &key), packet(USER_ID, name), own].concat()
}

/// Returns a detached signature with this time (seconds since 1970).
#[must_use]
pub(crate) fn sign(pair: &Ed25519KeyPair, content: &[u8], time: u64) -> Vec<u8> {
    signature(pair, BINARY, content, u32::try_from(time).unwrap_or(u32::MAX).max(CREATED), &[])
}

fn signature(pair: &Ed25519KeyPair, kind: u8, content: &[u8], time: u32, more: &[u8]) -> Vec<u8> {
    let fingerprint = fingerprint(pair);
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
    let signature = pair.sign(&hash);
    let (r, s) = signature.as_ref().split_at(32);
    let mut body = head;
    // Unhashed subpacket: the key id, by which gpgv finds the key.
    body.extend([0, 10, 9, 16]);
    body.extend(&fingerprint[12..]);
    body.extend(&hash[..2]);
    body.extend(number(r));
    body.extend(number(s));
    packet(SIGNATURE, &body)
}

fn body(pair: &Ed25519KeyPair) -> Vec<u8> {
    let mut body = vec![4];
    body.extend(CREATED.to_be_bytes());
    body.push(ED_DSA);
    body.extend(CURVE);
    // The prefix 0x40 marks a point in the curve's native format.
    body.extend(number(&[&[0x40], pair.public_key().as_ref()].concat()));
    body
}

fn fingerprint(pair: &Ed25519KeyPair) -> Vec<u8> {
    digest(&SHA1_FOR_LEGACY_USE_ONLY, &framed(&body(pair))).as_ref().to_vec()
}

/// Returns a key in the form that is hashed, section 5.2.4.
fn framed(key: &[u8]) -> Vec<u8> {
    let mut out = vec![0x99];
    out.extend((key.len() as u16).to_be_bytes());
    out.extend(key);
    out
}

/// Returns a packet with a two-byte length, which suffices for all packets here.
fn packet(tag: u8, body: &[u8]) -> Vec<u8> {
    let mut out = vec![0x80 | tag << 2 | 1];
    out.extend((body.len() as u16).to_be_bytes());
    out.extend(body);
    out
}

/// Returns a multiprecision integer, section 3.2: the number of bits, then the bytes without leading zeros.
fn number(bytes: &[u8]) -> Vec<u8> {
    let start = bytes.iter().position(|b| *b != 0).unwrap_or(bytes.len());
    let bytes = &bytes[start..];
    let bits = bytes.first().map_or(0, |first| bytes.len() * 8 - first.leading_zeros() as usize);
    let mut out = (bits as u16).to_be_bytes().to_vec();
    out.extend(bytes);
    out
}
