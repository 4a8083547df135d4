//! The [age file format](https://age-encryption.org/v1) with one passphrase. `age` decrypts these files, and this
//! module decrypts files of `age`. The `age` crate has many dependencies for recipients, plug-ins and translations;
//! this module needs only the primitives of `ring` and `scrypt`.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD as BASE64;
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use ring::hkdf::{HKDF_SHA256, Salt};
use ring::hmac;

use crate::error::{Result, fail};
use crate::util::random::random;

const VERSION: &str = "age-encryption.org/v1";
/// scrypt's work factor as a power of two, the same as in `age`. One attempt needs about 1 s and 256 MiB.
const WORK: u8 = 18;
/// The largest accepted work factor, because an attacker may have written the file.
const MOST_WORK: u8 = 22;
const CHUNK: usize = 64 << 10;
const TAG: usize = 16;
const FILE_KEY: usize = 16;

/// Why a file cannot be decrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecryptError {
    /// Another passphrase encrypted the file.
    Passphrase,
    /// The file is incomplete or was changed.
    Damaged,
}

/// Whether the bytes are a file of age.
#[must_use]
pub fn is_sealed(bytes: &[u8]) -> bool {
    bytes.strip_prefix(VERSION.as_bytes()).is_some_and(|rest| rest.starts_with(b"\n"))
}

/// Encrypts with a passphrase.
///
/// # Errors
/// If the kernel's random numbers cannot be read.
pub fn seal(plain: &[u8], passphrase: &str) -> Result<Vec<u8>> {
    let (file_key, salt, nonce) = (random::<FILE_KEY>()?, random::<16>()?, random::<16>()?);
    let sealed = wrap_key(passphrase, &salt, WORK).and_then(|key| encrypt(&key, [0; 12], &file_key));
    let Some(wrapped) = sealed else { return fail("cannot encrypt with the passphrase") };
    let header = format!("{VERSION}\n-> scrypt {} {WORK}\n{}\n---", BASE64.encode(salt), BASE64.encode(wrapped));
    let mac = hmac::sign(&mac_key(&file_key), header.as_bytes());
    let mut bytes = format!("{header} {}\n", BASE64.encode(mac)).into_bytes();
    bytes.extend(nonce);
    let key = derive(&file_key, &nonce, b"payload");
    for (i, (chunk, last)) in chunks(plain, CHUNK).enumerate() {
        let Some(sealed) = encrypt(&key, counter(i, last), chunk) else { return fail("cannot encrypt with the key") };
        bytes.extend(sealed);
    }
    Ok(bytes)
}

/// Decrypts with a passphrase.
///
/// # Errors
/// If the passphrase is wrong or the file is damaged.
pub fn open(bytes: &[u8], passphrase: &str) -> std::result::Result<Vec<u8>, DecryptError> {
    let header = Header::read(bytes).ok_or(DecryptError::Damaged)?;
    let key = wrap_key(passphrase, &header.salt, header.work).ok_or(DecryptError::Damaged)?;
    let file_key = decrypt(&key, [0; 12], &header.wrapped).ok_or(DecryptError::Passphrase)?;
    let file_key: [u8; FILE_KEY] = file_key.try_into().map_err(|_| DecryptError::Damaged)?;
    hmac::verify(&mac_key(&file_key), header.signed, &header.mac).map_err(|_| DecryptError::Damaged)?;
    let (nonce, payload) = header.rest.split_at_checked(16).ok_or(DecryptError::Damaged)?;
    let key = derive(&file_key, nonce, b"payload");
    let mut plain = Vec::new();
    for (i, (chunk, last)) in chunks(payload, CHUNK + TAG).enumerate() {
        let text = decrypt(&key, counter(i, last), chunk).ok_or(DecryptError::Damaged)?;
        // The specification allows an empty last chunk only as the only one.
        if text.is_empty() && i > 0 {
            return Err(DecryptError::Damaged);
        }
        plain.extend(text);
    }
    Ok(plain)
}

/// The header of a file.
struct Header<'a> {
    salt: [u8; 16],
    work: u8,
    wrapped: Vec<u8>,
    /// The part of the header that the MAC authenticates.
    signed: &'a [u8],
    mac: Vec<u8>,
    rest: &'a [u8],
}

impl<'a> Header<'a> {
    fn read(bytes: &'a [u8]) -> Option<Self> {
        let mut at = 0;
        let mut line = || {
            let rest = bytes.get(at..)?;
            let length = rest.iter().take(200).position(|&b| b == b'\n')?;
            at += length + 1;
            std::str::from_utf8(&rest[..length]).ok()
        };
        if line()? != VERSION {
            return None;
        }
        let (salt, work) = line()?.strip_prefix("-> scrypt ")?.split_once(' ')?;
        let wrapped = BASE64.decode(line()?).ok()?;
        let mac = line()?.strip_prefix("--- ")?;
        let signed = &bytes[..at - 1 - " ".len() - mac.len()];
        Some(Self {
            salt: BASE64.decode(salt).ok()?.try_into().ok()?,
            work: work_factor(work)?,
            wrapped,
            signed,
            mac: BASE64.decode(mac).ok()?,
            rest: &bytes[at..],
        })
    }
}

/// Parses a work factor. The specification allows only decimal digits without a leading zero.
fn work_factor(text: &str) -> Option<u8> {
    let is_canonical = text.bytes().all(|b| b.is_ascii_digit()) && !text.starts_with('0');
    text.parse().ok().filter(|work| is_canonical && (1..=MOST_WORK).contains(work))
}

/// Returns the chunks, and whether each is the last one. Empty input has one empty chunk.
fn chunks(bytes: &[u8], size: usize) -> impl Iterator<Item = (&[u8], bool)> {
    let count = bytes.len().div_ceil(size).max(1);
    (0..count).map(move |i| (&bytes[i * size..bytes.len().min((i + 1) * size)], i + 1 == count))
}

fn counter(chunk: usize, last: bool) -> [u8; 12] {
    let mut nonce = [0; 12];
    nonce[3..11].copy_from_slice(&(chunk as u64).to_be_bytes());
    nonce[11] = u8::from(last);
    nonce
}

fn wrap_key(passphrase: &str, salt: &[u8; 16], work: u8) -> Option<[u8; 32]> {
    let salt = [format!("{VERSION}/scrypt").as_bytes(), salt].concat();
    let mut key = [0; 32];
    scrypt::scrypt(passphrase.as_bytes(), &salt, &scrypt::Params::new(work, 8, 1).ok()?, &mut key).ok()?;
    Some(key)
}

fn derive(file_key: &[u8; FILE_KEY], salt: &[u8], info: &[u8]) -> [u8; 32] {
    let mut key = [0; 32];
    let derived = Salt::new(HKDF_SHA256, salt).extract(file_key);
    derived.expand(&[info], HKDF_SHA256).and_then(|okm| okm.fill(&mut key)).expect("32 bytes of a hash of 32");
    key
}

fn mac_key(file_key: &[u8; FILE_KEY]) -> hmac::Key {
    hmac::Key::new(hmac::HMAC_SHA256, &derive(file_key, &[], b"header"))
}

fn cipher(key: &[u8; 32]) -> Option<LessSafeKey> {
    UnboundKey::new(&CHACHA20_POLY1305, key).ok().map(LessSafeKey::new)
}

fn encrypt(key: &[u8; 32], nonce: [u8; 12], plain: &[u8]) -> Option<Vec<u8>> {
    let mut text = plain.to_vec();
    let nonce = Nonce::assume_unique_for_key(nonce);
    cipher(key)?.seal_in_place_append_tag(nonce, Aad::empty(), &mut text).ok()?;
    Some(text)
}

fn decrypt(key: &[u8; 32], nonce: [u8; 12], sealed: &[u8]) -> Option<Vec<u8>> {
    let mut text = sealed.to_vec();
    let nonce = Nonce::assume_unique_for_key(nonce);
    let length = cipher(key)?.open_in_place(nonce, Aad::empty(), &mut text).ok()?.len();
    text.truncate(length);
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// `printf 'from age itself' | age --passphrase | base64`, age 1.1.1, with the passphrase "open sesame".
    const AGE_FILE: &str = "\
        YWdlLWVuY3J5cHRpb24ub3JnL3YxCi0+IHNjcnlwdCBnY1ZOMzJWZSszVUpsTVRsOTZWVk5BIDE4CkxTcDJSb3F2VUxqT0NrdjlR\
        Ymh5dGJ5d0QxWTRJMXFOanBYMi8zYStDNTAKLS0tIERORldUSStxUk1mOWhvamduazBTU0lFcDBJSElRQlJxYzVPNjNKOENaMzAK\
        mkutWRd20cVyeLKM/RWg17WnPO5f8v7xSp6RSu/Bozjcv97puIjT35hKbReFLbc=";

    #[test]
    fn decrypts_file_of_age() {
        let bytes = base64::engine::general_purpose::STANDARD.decode(AGE_FILE).unwrap();
        assert!(is_sealed(&bytes));
        assert_eq!(open(&bytes, "open sesame").unwrap(), b"from age itself");
        assert_eq!(open(&bytes, "open barley"), Err(DecryptError::Passphrase));
    }

    #[test]
    fn rejects_changed_and_truncated_files() {
        let plain = vec![7; CHUNK + 100];
        let sealed = seal(&plain, "a phrase").unwrap();
        assert_eq!(open(&sealed, "a phrase").unwrap(), plain);
        let end = sealed.len();
        let header = sealed.windows(5).position(|w| w == b"\n--- ").unwrap() + 5 + 43 + 1;
        // The MAC: another one in canonical base64.
        let mut other = sealed.clone();
        other[header - 44] = if other[header - 44] == b'A' { b'B' } else { b'A' };
        assert_eq!(open(&other, "a phrase"), Err(DecryptError::Damaged));
        // The nonce, the first chunk and the last one; then a file without the last chunk.
        for at in [header, header + 16, header + 200, end - 1] {
            let mut other = sealed.clone();
            other[at] ^= 1;
            assert_eq!(open(&other, "a phrase"), Err(DecryptError::Damaged), "{at}");
        }
        assert_eq!(open(&sealed[..end - 100 - TAG], "a phrase"), Err(DecryptError::Damaged));
    }

    #[test]
    fn last_chunk_may_be_full() {
        let lengths = |length: usize| chunks(&vec![0; length], 4).map(|(c, last)| (c.len(), last)).collect::<Vec<_>>();
        assert_eq!(lengths(0), [(0, true)]);
        assert_eq!(lengths(4), [(4, true)]);
        assert_eq!(lengths(5), [(4, false), (1, true)]);
    }

    #[test]
    fn rejects_empty_last_chunk_after_full_ones() {
        let sealed = seal(&vec![7; CHUNK], "a phrase").unwrap();
        let header = Header::read(&sealed).unwrap();
        let file_key = decrypt(&wrap_key("a phrase", &header.salt, header.work).unwrap(), [0; 12], &header.wrapped);
        let (nonce, _) = header.rest.split_at(16);
        let key = derive(&file_key.unwrap().try_into().unwrap(), nonce, b"payload");
        let mut other = sealed[..sealed.len() - CHUNK - TAG].to_vec();
        other.extend(encrypt(&key, counter(0, false), &vec![7; CHUNK]).unwrap());
        other.extend(encrypt(&key, counter(1, true), b"").unwrap());
        assert_eq!(open(&other, "a phrase"), Err(DecryptError::Damaged));
    }

    #[test]
    fn rejects_work_factor_that_is_not_canonical() {
        for text in ["018", "+18", "-1", "0", "", " 18", "23", "256"] {
            assert_eq!(work_factor(text), None, "{text}");
        }
        assert_eq!(work_factor("18"), Some(18));
    }

    proptest! {
        #[test]
        fn decrypt_never_panics(
            salt in any::<[u8; 16]>(),
            work in "1|2|0|64|-1|",
            wrapped in proptest::collection::vec(any::<u8>(), 0..40),
            mac in "[A-Za-z0-9+/]{0,50}",
            tail in proptest::collection::vec(any::<u8>(), 0..200),
        ) {
            let (salt, wrapped) = (BASE64.encode(salt), BASE64.encode(wrapped));
            let mut bytes = format!("{VERSION}\n-> scrypt {salt} {work}\n{wrapped}\n--- {mac}\n").into_bytes();
            bytes.extend(&tail);
            prop_assert!(open(&bytes, "x").is_err());
            for end in 0..bytes.len().min(150) {
                prop_assert!(open(&bytes[..end], "x").is_err());
            }
            prop_assert!(open(&tail, "x").is_err());
        }
    }
}
