//! A certificate with its key, and when it is due for renewal.

use fleet_https::{WebValidity, web_pair};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::error::Result;

/// A certificate for browsers with its private key: sealed in etcd, and in `web.json` of each hub.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WebCertificate {
    /// Format of the content.
    pub(super) version: u16,
    /// Host name.
    pub name: String,
    /// URL of the authority's directory.
    pub directory: String,
    /// Certificates, the server's first, PEM.
    pub chain: String,
    /// Private key, PEM.
    pub(super) key: String,
    /// First second of the validity, since 1970.
    pub from: u64,
    /// Last second of the validity.
    pub until: u64,
}

impl std::fmt::Debug for WebCertificate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "WebCertificate({}, until {})", self.name, self.until)
    }
}

impl WebCertificate {
    pub(super) const VERSION: u16 = 1;

    /// Makes a certificate from the authority's reply.
    ///
    /// # Errors
    /// If the certificate is not for this name, or the key is not its key.
    pub fn new(name: &str, directory: &str, chain: &str, key: &str) -> Result<Self> {
        let WebValidity { from, until } = web_pair(chain, key, name)?;
        let (name, directory) = (name.to_owned(), directory.to_owned());
        Ok(Self { version: Self::VERSION, name, directory, chain: chain.to_owned(), key: key.to_owned(), from, until })
    }

    /// Checks a certificate that was stored.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub(super) fn verified(self, name: &str) -> Result<Self> {
        Self::new(name, &self.directory, &self.chain, &self.key)
    }

    /// Returns certificates and key in one PEM text, as HAProxy reads them.
    #[must_use]
    pub fn pem(&self) -> String {
        format!("{}\n{}\n", self.chain.trim_end(), self.key.trim_end())
    }

    /// Returns the duration of the validity in seconds.
    #[must_use]
    pub fn life(&self) -> u64 {
        self.until.saturating_sub(self.from)
    }

    /// Returns the Unix time of the renewal: when a third of the life remains, and earlier by up to a thirtieth of the
    /// life. All hubs compute the same time, and fleets with certificates of one second compute different times.
    #[must_use]
    pub fn due(&self) -> u64 {
        let digest = Sha256::digest(self.chain.as_bytes());
        let part = u64::from(u16::from_be_bytes([digest[0], digest[1]]));
        let early = self.life() * part / (30 << 16);
        self.until.saturating_sub(self.life() / 3 + early)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renewal_is_due_when_a_third_remains_or_a_little_earlier() {
        let of = |chain: &str, life: u64| WebCertificate {
            version: 1,
            name: "a.example".into(),
            directory: String::new(),
            chain: chain.into(),
            key: String::new(),
            from: 1_000_000,
            until: 1_000_000 + life,
        };
        let times: Vec<u64> = (0..50).map(|i| of(&i.to_string(), 90 * 86_400).due() - 1_000_000).collect();
        assert!(times.iter().all(|t| (57 * 86_400..=60 * 86_400).contains(t)), "{times:?}");
        assert!(times.windows(2).any(|pair| pair[0] != pair[1]));
        assert_eq!(of("x", 90).due(), of("x", 90).due());
        assert!((1_000_055..=1_000_060).contains(&of("x", 90).due()));
    }

    #[test]
    fn debug_shows_no_key() {
        let key = "secret".to_owned();
        let (directory, chain) = (String::new(), String::new());
        let one = WebCertificate { version: 1, name: "n".into(), directory, chain, key, from: 0, until: 7 };
        assert_eq!(format!("{one:?}"), "WebCertificate(n, until 7)");
    }
}
