//! Secrets of the hubs: HKDF-SHA-256 and AES-256-GCM. Only hubs, and the operator with `fleet.key`, can derive the key.
//! So the encrypted texts may be in a repository, in images, and in etcd, whose members need not be hubs.

use std::collections::{BTreeMap, BTreeSet};

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::hkdf::{HKDF_SHA256, Salt};
use serde::{Deserialize, Serialize};

use crate::encoding::{decode, encode};

/// Longest secret, in bytes.
const LONGEST: usize = 65_536;
/// Text that the encryption authenticates, before the names of the fleet and of the secret.
const CONTEXT: &str = "bakehouse hub secret, v1";

/// A secret that cannot be encrypted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct HubSecretError(String);

/// Key with which the operator and the hubs encrypt secrets of the hubs.
#[derive(Clone)]
pub struct HubKey {
    key: LessSafeKey,
    fleet: String,
}

impl std::fmt::Debug for HubKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("HubKey(…)")
    }
}

impl HubKey {
    /// Derives the key of a fleet from the password of etcd's user `root`, which only hubs have; `None` without the
    /// password.
    #[must_use]
    pub fn derive(fleet: &str, etcd_root: &str) -> Option<Self> {
        if etcd_root.is_empty() {
            return None;
        }
        let mut bytes = [0; 32];
        let secret = Salt::new(HKDF_SHA256, b"bakehouse").extract(etcd_root.as_bytes());
        secret.expand(&[b"hub secrets, v1"], HKDF_SHA256).and_then(|key| key.fill(&mut bytes)).ok()?;
        let key = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &bytes).ok()?);
        Some(Self { key, fleet: fleet.to_owned() })
    }

    /// Encrypts a secret. It opens only under the same name.
    ///
    /// # Errors
    /// If the secret is empty or longer than 64 KiB, or the kernel returns no random bytes.
    pub fn seal(&self, name: &str, secret: &[u8]) -> Result<String, HubSecretError> {
        let failed = |why: &str| HubSecretError(format!("cannot encrypt the secret `{name}`: {why}"));
        if secret.is_empty() || secret.len() > LONGEST {
            return Err(failed("it has to have 1 to 65536 bytes"));
        }
        let mut nonce = [0; NONCE_LEN];
        getrandom::fill(&mut nonce).map_err(|e| failed(&format!("the kernel returns no random bytes: {e}")))?;
        let mut content = secret.to_vec();
        self.key
            .seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), self.context(name), &mut content)
            .map_err(|_| failed("it is too long"))?;
        Ok(encode(&[&nonce[..], &content].concat()))
    }

    /// Decrypts a secret; `None` if it was encrypted under another name or with the key of another fleet.
    #[must_use]
    pub fn open(&self, name: &str, sealed: &str) -> Option<Vec<u8>> {
        let sealed = decode(sealed)?;
        let (nonce, content) = sealed.split_first_chunk::<NONCE_LEN>()?;
        let mut content = content.to_vec();
        let nonce = Nonce::assume_unique_for_key(*nonce);
        Some(self.key.open_in_place(nonce, self.context(name), &mut content).ok()?.to_vec())
    }

    fn context(&self, name: &str) -> Aad<Vec<u8>> {
        Aad::from([CONTEXT, &self.fleet, name].join("\0").into_bytes())
    }
}

/// The encrypted secrets of `[web]` and `[vip]`: `web.secrets` beside `fleet.toml`, and a part of the topology in the images.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct HubSecrets(BTreeMap<String, String>);

impl HubSecrets {
    /// Name of the file, beside `fleet.toml`.
    pub const FILE: &str = "web.secrets";

    /// Reads the file.
    ///
    /// # Errors
    /// If the text is not a TOML table of texts.
    pub fn parse(text: &str) -> Result<Self, HubSecretError> {
        toml::from_str(text).map_err(|e| HubSecretError(e.message().to_owned()))
    }

    /// Returns the content of the file.
    #[must_use]
    pub fn file(&self) -> String {
        let mut text =
            "# Secrets of [web] and [vip], encrypted for the fleet's hubs: `bakehouse secret` writes this file.\n\
                        # You may commit it.\n"
                .to_owned();
        for (name, sealed) in &self.0 {
            text += &format!("{name} = \"{sealed}\"\n");
        }
        text
    }

    /// Returns the names of the secrets.
    #[must_use]
    pub fn names(&self) -> BTreeSet<&str> {
        self.0.keys().map(String::as_str).collect()
    }

    /// Returns the secrets with these names.
    #[must_use]
    pub fn only(&self, names: &BTreeSet<&str>) -> Self {
        let wanted = self.0.iter().filter(|(name, _)| names.contains(name.as_str()));
        Self(wanted.map(|(name, sealed)| (name.clone(), sealed.clone())).collect())
    }

    /// Whether there is no secret.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Encrypts a secret, and keeps it.
    ///
    /// # Errors
    /// As [`HubKey::seal`].
    pub fn seal(&mut self, key: &HubKey, name: &str, secret: &[u8]) -> Result<(), HubSecretError> {
        self.0.insert(name.to_owned(), key.seal(name, secret)?);
        Ok(())
    }

    /// Keeps the digest of the public half of a private key, so that a check needs no `fleet.key`.
    pub fn set_public(&mut self, name: &str, digest: &str) {
        self.0.insert(public(name), digest.to_owned());
    }

    /// Returns the digest that [`Self::set_public`] keeps.
    #[must_use]
    pub fn public(&self, name: &str) -> Option<&str> {
        self.0.get(&public(name)).map(String::as_str)
    }

    /// Removes a secret. Returns whether there was one.
    pub fn remove(&mut self, name: &str) -> bool {
        self.0.remove(&public(name));
        self.0.remove(name).is_some()
    }

    /// Decrypts a secret; `None` if there is none, or it was encrypted with the key of another fleet.
    #[must_use]
    pub fn open(&self, key: &HubKey, name: &str) -> Option<Vec<u8>> {
        key.open(name, self.0.get(name)?)
    }
}

fn public(name: &str) -> String {
    format!("{name}_public")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_hubs_of_the_fleet_open_a_secret_under_its_own_name() {
        let key = HubKey::derive("acme", "password of etcd").unwrap();
        let mut secrets = HubSecrets::default();
        secrets.seal(&key, "acme_eab", b"hmac").unwrap();
        let read = HubSecrets::parse(&secrets.file()).unwrap();
        assert_eq!(read, secrets);
        assert_eq!(read.open(&key, "acme_eab").as_deref(), Some(&b"hmac"[..]));
        let sealed = &read.0["acme_eab"];
        assert!(!sealed.contains("hmac") && key.open("web_key", sealed).is_none());
        let others = [("other", "password of etcd"), ("acme", "another password")];
        assert!(
            others.iter().all(|(fleet, root)| HubKey::derive(fleet, root).unwrap().open("acme_eab", sealed).is_none())
        );
        for damaged in ["", "AAAA", "not base64", &encode(&[0; 40])] {
            assert_eq!(key.open("acme_eab", damaged), None);
        }
        assert!(HubKey::derive("acme", "").is_none());
        assert!(key.seal("x", b"").is_err() && key.seal("x", &vec![0; LONGEST + 1]).is_err());
        assert_ne!(key.seal("x", b"y").unwrap(), key.seal("x", b"y").unwrap(), "each has a nonce of its own");
    }

    /// Monitors have the key of `[alerts]`. It must not open what only hubs may read.
    #[test]
    fn key_of_monitors_is_another_one() {
        let alerts = crate::AlertKey::derive("password of etcd").unwrap();
        let key = HubKey::derive("acme", "password of etcd").unwrap();
        let mut sealed = crate::AlertSecrets::default();
        sealed.seal(&alerts, "acme", "x", "secret").unwrap();
        let file = sealed.file();
        let text = file.lines().last().unwrap().split('"').nth(1).unwrap();
        assert_eq!(key.open("x", text), None);
    }
}
