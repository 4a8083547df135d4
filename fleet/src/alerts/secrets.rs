//! Passwords of the receivers of alerts, encrypted for the fleet's monitors: HKDF-SHA-256 and AES-256-GCM.
//!
//! Only the operator, the hubs and the monitors can derive the key. So the encrypted texts may be in a repository and
//! in images, and a change of a password reaches a running fleet like any other change of `fleet.toml`.

use std::collections::{BTreeMap, BTreeSet};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::hkdf::{HKDF_SHA256, Salt};
use serde::{Deserialize, Serialize};

use crate::encoding::{decode, encode};

/// Longest password, in bytes.
const LONGEST: usize = 4096;
/// Text that the encryption authenticates, before the names of the fleet and of the secret.
const CONTEXT: &str = "bakehouse alert secret, v1";

/// A password that cannot be encrypted or decrypted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct AlertSecretError(String);

/// The encrypted passwords: `alerts.secrets` beside `fleet.toml`, and a part of the topology in the images.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct AlertSecrets(BTreeMap<String, String>);

/// Key with which the operator encrypts passwords and the monitors decrypt them.
#[derive(Clone, PartialEq, Eq)]
pub struct AlertKey(String);

impl std::fmt::Debug for AlertKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AlertKey(…)")
    }
}

impl AlertKey {
    /// The key in [`crate::Secrets::sample`]. With it, every secret has a sample value.
    pub const SAMPLE: &str = "sample-alerts";

    /// Derives the key from the password of etcd's user `root`, which only hubs have.
    #[must_use]
    pub fn derive(etcd_root: &str) -> Option<Self> {
        let mut bytes = [0; 32];
        let secret = Salt::new(HKDF_SHA256, b"bakehouse").extract(etcd_root.as_bytes());
        secret.expand(&[b"alert secrets, v1"], HKDF_SHA256).and_then(|key| key.fill(&mut bytes)).ok()?;
        (!etcd_root.is_empty()).then(|| Self(URL_SAFE_NO_PAD.encode(bytes)))
    }

    /// Reads the key that a hub has granted; `None` if the text is empty.
    #[must_use]
    pub fn granted(text: &str) -> Option<Self> {
        (!text.is_empty()).then(|| Self(text.to_owned()))
    }

    /// Returns the text of the key, for a grant.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.0
    }

    fn cipher(&self) -> Option<LessSafeKey> {
        let bytes = URL_SAFE_NO_PAD.decode(&self.0).ok()?;
        Some(LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &bytes).ok()?))
    }
}

impl AlertSecrets {
    /// Name of the file, beside `fleet.toml`.
    pub const FILE: &str = "alerts.secrets";

    /// Reads the file.
    ///
    /// # Errors
    /// If the text is not a TOML table of texts.
    pub fn parse(text: &str) -> Result<Self, AlertSecretError> {
        toml::from_str(text).map_err(|e| AlertSecretError(e.message().to_owned()))
    }

    /// Returns the content of the file.
    #[must_use]
    pub fn file(&self) -> String {
        let mut text =
            "# Secrets of [alerts], encrypted for the fleet's monitors: `bakehouse secret` writes this file.\n\
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

    /// Encrypts a secret of a fleet, and keeps it.
    ///
    /// # Errors
    /// If the secret is empty, longer than 4096 bytes or of several lines, or the kernel returns no random bytes.
    pub fn seal(&mut self, key: &AlertKey, fleet: &str, name: &str, secret: &str) -> Result<(), AlertSecretError> {
        let failed = |why: &str| AlertSecretError(format!("cannot encrypt the secret `{name}`: {why}"));
        if secret.is_empty() || secret.len() > LONGEST || secret.contains(char::is_control) {
            return Err(failed("it has to be one line of 1 to 4096 bytes"));
        }
        let mut nonce = [0; NONCE_LEN];
        getrandom::fill(&mut nonce).map_err(|e| failed(&format!("the kernel returns no random bytes: {e}")))?;
        let cipher = key.cipher().ok_or_else(|| failed("the key is damaged"))?;
        let mut content = secret.as_bytes().to_vec();
        cipher
            .seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), context(fleet, name), &mut content)
            .map_err(|_| failed("it is too long"))?;
        self.0.insert(name.to_owned(), encode(&[&nonce[..], &content].concat()));
        Ok(())
    }

    /// Removes a secret. Returns whether there was one.
    pub fn remove(&mut self, name: &str) -> bool {
        self.0.remove(name).is_some()
    }

    /// Decrypts a secret; `None` if the name has no secret, or the key of another fleet encrypted it.
    #[must_use]
    pub fn open(&self, key: &AlertKey, fleet: &str, name: &str) -> Option<String> {
        let sealed = decode(self.0.get(name)?)?;
        let (nonce, content) = sealed.split_first_chunk::<NONCE_LEN>()?;
        let mut content = content.to_vec();
        let nonce = Nonce::assume_unique_for_key(*nonce);
        let plain = key.cipher()?.open_in_place(nonce, context(fleet, name), &mut content).ok()?;
        String::from_utf8(plain.to_vec()).ok()
    }

    /// Returns the values of the secrets with these names, for the templates. A secret that cannot be decrypted is
    /// empty. The sample key gives values with which Alertmanager accepts its configuration.
    #[must_use]
    pub fn values(&self, key: Option<&AlertKey>, fleet: &str, names: &BTreeSet<&str>) -> BTreeMap<String, String> {
        let value = |name: &str| match key {
            Some(key) if key.text() == AlertKey::SAMPLE => format!("https://example.net/sample-{name}"),
            Some(key) => self.open(key, fleet, name).unwrap_or_default(),
            None => String::new(),
        };
        names.iter().map(|name| ((*name).to_owned(), value(name))).collect()
    }
}

fn context(fleet: &str, name: &str) -> Aad<Vec<u8>> {
    Aad::from([CONTEXT, fleet, name].join("\0").into_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sealed() -> (AlertKey, AlertSecrets) {
        let key = AlertKey::derive("password of etcd").unwrap();
        let mut secrets = AlertSecrets::default();
        secrets.seal(&key, "acme", "email", "p\"ss wörd").unwrap();
        (key, secrets)
    }

    #[test]
    fn only_the_key_of_the_fleet_opens_a_secret_under_its_own_name() {
        let (key, mut secrets) = sealed();
        assert_eq!(secrets.open(&key, "acme", "email").as_deref(), Some("p\"ss wörd"));
        assert_eq!(secrets.open(&key, "other", "email"), None);
        assert_eq!(secrets.open(&AlertKey::derive("other").unwrap(), "acme", "email"), None);
        let moved = secrets.0["email"].clone();
        secrets.0.insert("slack".to_owned(), moved);
        assert_eq!(secrets.open(&key, "acme", "slack"), None);
        for damaged in ["", "AAAA", "not base64", &encode(&[0; 12])] {
            secrets.0.insert("email".to_owned(), damaged.to_owned());
            assert_eq!(secrets.open(&key, "acme", "email"), None, "{damaged}");
        }
    }

    #[test]
    fn file_has_names_and_no_plain_text() {
        let (key, secrets) = sealed();
        let text = secrets.file();
        assert!(text.contains("email = \"") && !text.contains("p\"ss"), "{text}");
        let read = AlertSecrets::parse(&text).unwrap();
        assert_eq!((read.open(&key, "acme", "email"), &read), (Some("p\"ss wörd".to_owned()), &secrets));
        assert!(AlertSecrets::parse("email = 3\n").is_err());
        let (_, again) = sealed();
        assert_ne!(again, secrets, "each encryption has a nonce of its own");
    }

    #[test]
    fn rejects_empty_long_and_multi_line_secrets() {
        let (key, mut secrets) = sealed();
        for bad in ["", "two\nlines", &"x".repeat(LONGEST + 1)] {
            assert!(secrets.seal(&key, "acme", "email", bad).is_err());
        }
        assert!(AlertKey::derive("").is_none() && AlertKey::granted("").is_none());
    }

    #[test]
    fn values_without_a_key_are_empty() {
        let (key, secrets) = sealed();
        let names = BTreeSet::from(["email", "slack"]);
        let of = |key: Option<&AlertKey>| secrets.values(key, "acme", &names);
        assert_eq!(of(Some(&key))["email"], "p\"ss wörd");
        assert_eq!((of(Some(&key))["slack"].as_str(), of(None)["email"].as_str()), ("", ""));
        let sample = AlertKey::granted(AlertKey::SAMPLE);
        assert_eq!(of(sample.as_ref())["slack"], "https://example.net/sample-slack");
        assert_eq!(secrets.only(&BTreeSet::from(["slack"])), AlertSecrets::default());
    }
}
