//! Writes a [systemd credential](https://systemd.io/CREDENTIALS/) in the form that systemd-stub loads from the ESP, as
//! `systemd-creds encrypt --with-key=null` does. The key is public, so the encryption protects nothing. With Secure
//! Boot enabled, systemd rejects this form.

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use ring::digest::{SHA256, digest};

use crate::error::{Error, Result};
use crate::util::random::random;

/// systemd's id for AES-256-GCM with the null key, `CRED_AES256_GCM_BY_NULL`.
const BY_NULL: [u8; 16] =
    [0x05, 0x84, 0x69, 0xda, 0xf6, 0xf5, 0x43, 0x24, 0x80, 0x05, 0x49, 0xda, 0x0f, 0x8e, 0xa2, 0xfb];
const IV: usize = 12;

/// Returns a credential with this name and content.
///
/// # Errors
/// If the kernel's random numbers cannot be read.
pub(crate) fn seal(name: &str, content: &[u8]) -> Result<Vec<u8>> {
    let iv = random::<IV>()?;
    let mut sealed = BY_NULL.to_vec();
    // Sizes of key, block, IV and tag.
    for size in [32_u32, 1, IV as u32, 16] {
        sealed.extend(size.to_le_bytes());
    }
    sealed.extend(iv);
    sealed.resize(sealed.len().next_multiple_of(8), 0);

    // Timestamp, and expiry: never.
    let mut inner = [0_u64.to_le_bytes(), u64::MAX.to_le_bytes()].concat();
    inner.extend((name.len() as u32).to_le_bytes());
    inner.extend(name.as_bytes());
    inner.resize(inner.len().next_multiple_of(8), 0);
    inner.extend(content);

    let key = digest(&SHA256, b"");
    let key = UnboundKey::new(&AES_256_GCM, key.as_ref()).map(LessSafeKey::new);
    let tag = key.and_then(|key| {
        key.seal_in_place_separate_tag(Nonce::assume_unique_for_key(iv), Aad::from(&sealed), &mut inner)
    });
    let tag = tag.map_err(|_| Error::Failed("cannot encrypt the credential".to_owned()))?;
    sealed.extend(inner);
    sealed.extend(tag.as_ref());
    Ok(sealed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::process::{Command, Stdio};

    #[test]
    fn systemd_creds_decrypts_credential() {
        let sealed = seal("bakehouse.ticket", b"a ticket").unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bakehouse.ticket.cred");
        let text = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, &sealed);
        std::fs::File::create(&path).unwrap().write_all(text.as_bytes()).unwrap();
        let mut decrypt = Command::new("systemd-creds");
        let output =
            decrypt.args(["decrypt", "--name=bakehouse.ticket"]).arg(&path).arg("-").stderr(Stdio::inherit()).output();
        let output = output.expect("tests need systemd-creds");
        assert_eq!(String::from_utf8_lossy(&output.stdout), "a ticket");
    }
}
