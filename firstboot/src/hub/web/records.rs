//! Records of the certificate in etcd. Everything with a private key is sealed: members of etcd need not be hubs.
//!
//! ```text
//! /bakehouse/web-certificate/accounts/DIRECTORY    sealed Account         of a directory
//! /bakehouse/web-certificate/names/ID/certificate  sealed WebCertificate  all hubs use it
//! /bakehouse/web-certificate/names/ID/order        sealed PendingOrder    any hub can continue it
//! /bakehouse/web-certificate/names/ID/attempt      Attempt                failures, and the time of the next attempt
//! /bakehouse/web-certificate/names/ID/lock         slot                   the hub that orders now, with a lease
//! /bakehouse/web-certificate/challenges/TOKEN      key authorization      any hub answers it, with a lease
//! ```
//!
//! DIRECTORY is a digest of the directory's URL, and ID of name and URL: during a rollout, hubs with another name or
//! directory have records of their own.

use std::time::Duration;

use fleet::etcd_keys::{WEB_CERTIFICATE, WEB_CHALLENGES};
use fleet::{HubKey, Web};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::certificate::WebCertificate;
use crate::client::etcd::{Compare, Etcd, KeyValue, Op};
use crate::error::{Error, Result};

/// Lease of a challenge, seconds. Authorities verify within minutes.
const CHALLENGE_LIFE: u32 = 600;
/// A time longer than every pause between two attempts: the directory's longest wait is 7 days, and some more.
const LONGEST_PAUSE: Duration = Duration::from_secs(8 * 86_400);
/// Longest error text in etcd, in characters.
const LONGEST_ERROR: usize = 500;

/// The account at a directory.
#[derive(Clone, Default, Serialize, Deserialize)]
pub(super) struct Account {
    /// Private key, PKCS #8, base64. A hub stores it before it registers the account, so that a power cut in between
    /// makes no second account. With external-account binding, `instant_acme` makes the key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) key: Option<String>,
    /// The registered account: `instant_acme`'s credentials.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) credentials: Option<serde_json::Value>,
    /// Mail address that the directory has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) email: Option<String>,
}

/// An order that the directory has accepted.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct PendingOrder {
    /// URL of the order.
    pub(super) url: String,
    /// Private key of the certificate, PEM.
    pub(super) key: String,
}

/// Failed attempts since the last certificate.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Attempt {
    /// Number of failed attempts in a row.
    pub(super) failures: u32,
    /// Unix time of the next attempt.
    pub(super) next: u64,
    /// Unix time of the first failure.
    pub(super) failed_since: u64,
    /// Last error.
    pub(super) error: String,
}

impl Attempt {
    /// Returns whether the next attempt is due. No pause is longer than [`LONGEST_PAUSE`]: a later time is of a hub whose
    /// clock was ahead.
    pub(super) fn is_over(&self, now: u64) -> bool {
        self.next <= now || self.next > now + LONGEST_PAUSE.as_secs()
    }
}

/// What etcd has for this name.
#[derive(Default)]
pub(super) struct Stored {
    /// Revision of the read.
    pub(super) revision: u64,
    pub(super) certificate: Option<WebCertificate>,
    pub(super) order: Option<PendingOrder>,
    pub(super) attempt: Attempt,
    /// The hub that orders now.
    pub(super) locked_by: Option<String>,
}

/// The right to order, as long as its lease lasts.
pub(super) struct Lock {
    lease: String,
    revision: u64,
}

pub(super) struct Records {
    etcd: Etcd,
    key: HubKey,
    /// Prefix of the name's keys.
    names: String,
    account: String,
}

impl Records {
    /// Returns the records of the name that `web` has; `None` without a name.
    pub(super) fn new(etcd: Etcd, key: HubKey, web: &Web) -> Option<Self> {
        let name = web.name.as_ref()?;
        let directory = &web.authority.directory;
        let id = digest(&format!("{name}\0{directory}"));
        let account = format!("{WEB_CERTIFICATE}accounts/{}", digest(directory));
        Some(Self { etcd, key, names: format!("{WEB_CERTIFICATE}names/{id}/"), account })
    }

    pub(super) fn etcd(&self) -> &Etcd {
        &self.etcd
    }

    /// Prefix of the keys that [`Self::read`] returns.
    pub(super) fn prefix(&self) -> &str {
        &self.names
    }

    pub(super) async fn read(&self) -> Result<Stored> {
        let (revision, all) = self.etcd.list(&self.names).await?;
        let mut stored = Stored { revision, ..Stored::default() };
        for pair in &all {
            match &pair.key[self.names.len()..] {
                "certificate" => stored.certificate = Some(self.open(pair)?),
                "order" => stored.order = Some(self.open(pair)?),
                "attempt" => stored.attempt = serde_json::from_slice(&pair.value).unwrap_or_default(),
                "lock" => stored.locked_by = Some(String::from_utf8_lossy(&pair.value).into_owned()),
                _ => {}
            }
        }
        Ok(stored)
    }

    /// Takes the lock for `seconds`; `None` if another hub has it.
    pub(super) async fn lock(&self, slot: &str, seconds: u32) -> Result<Option<Lock>> {
        let name = self.name("lock");
        let lease = self.etcd.lease(seconds).await?;
        if !self.etcd.transact(&[Compare::Unchanged(&name, 0)], &[Op::PutFor(&name, slot.as_bytes(), &lease)]).await? {
            self.etcd.revoke(&lease).await?;
            return Ok(None);
        }
        let found = self.etcd.get(&[&name]).await?;
        let own = found.first().filter(|pair| pair.revision > 0 && pair.value == slot.as_bytes());
        Ok(own.map(|pair| Lock { lease, revision: pair.revision }))
    }

    pub(super) async fn unlock(&self, lock: &Lock) -> Result<()> {
        self.etcd.revoke(&lock.lease).await
    }

    /// Writes as the hub that orders.
    ///
    /// # Errors
    /// If the lease of the lock has ended, or etcd does not answer.
    async fn write(&self, lock: &Lock, ops: &[Op<'_>]) -> Result<()> {
        let name = self.name("lock");
        if self.etcd.transact(&[Compare::Unchanged(&name, lock.revision)], ops).await? {
            Ok(())
        } else {
            Err(Error::Failed("the lock has ended: another hub may order the certificate".to_owned()))
        }
    }

    pub(super) async fn put_order(&self, lock: &Lock, order: &PendingOrder) -> Result<()> {
        let name = self.name("order");
        let sealed = self.seal(&name, order)?;
        self.write(lock, &[Op::Put(&name, sealed.as_bytes())]).await
    }

    pub(super) async fn forget_order(&self, lock: &Lock) -> Result<()> {
        self.write(lock, &[Op::Delete(&self.name("order"))]).await
    }

    pub(super) async fn put_attempt(&self, lock: &Lock, attempt: &Attempt) -> Result<()> {
        let error = attempt.error.chars().take(LONGEST_ERROR).collect();
        let text = serde_json::to_vec(&Attempt { error, ..attempt.clone() }).map_err(Error::json("an attempt"))?;
        self.write(lock, &[Op::Put(&self.name("attempt"), &text)]).await
    }

    /// Stores a new certificate, and removes the order and the failed attempts.
    pub(super) async fn put_certificate(&self, lock: &Lock, certificate: &WebCertificate) -> Result<()> {
        let name = self.name("certificate");
        let sealed = self.seal(&name, certificate)?;
        let (order, attempt) = (self.name("order"), self.name("attempt"));
        self.write(lock, &[Op::Put(&name, sealed.as_bytes()), Op::Delete(&order), Op::Delete(&attempt)]).await
    }

    /// Stores a hub's certificate if etcd has none, as after a new start of the fleet's etcd.
    pub(super) async fn restore(&self, certificate: &WebCertificate) -> Result<()> {
        let name = self.name("certificate");
        let sealed = self.seal(&name, certificate)?;
        self.etcd.transact(&[Compare::Unchanged(&name, 0)], &[Op::Put(&name, sealed.as_bytes())]).await.map(drop)
    }

    pub(super) async fn put_challenge(&self, token: &str, answer: &str) -> Result<()> {
        let lease = self.etcd.lease(CHALLENGE_LIFE).await?;
        let name = format!("{WEB_CHALLENGES}{token}");
        self.etcd.transact(&[], &[Op::PutFor(&name, answer.as_bytes(), &lease)]).await.map(drop)
    }

    /// Returns the account with the revision of its record, 0 if there is none.
    pub(super) async fn account(&self) -> Result<(Account, u64)> {
        let found = self.etcd.get(&[&self.account]).await?;
        match found.first().filter(|pair| pair.revision > 0) {
            Some(pair) => Ok((self.open(pair)?, pair.revision)),
            None => Ok((Account::default(), 0)),
        }
    }

    /// Stores the account if its record still has this revision. Returns whether it had.
    pub(super) async fn put_account(&self, account: &Account, revision: u64) -> Result<bool> {
        let sealed = self.seal(&self.account, account)?;
        let op = Op::Put(&self.account, sealed.as_bytes());
        self.etcd.transact(&[Compare::Unchanged(&self.account, revision)], &[op]).await
    }

    fn name(&self, of: &str) -> String {
        format!("{}{of}", self.names)
    }

    fn seal(&self, name: &str, value: &impl Serialize) -> Result<String> {
        let bytes = serde_json::to_vec(value).map_err(Error::json("a record of the certificate"))?;
        self.key.seal(name, &bytes).map_err(|e| Error::Failed(e.to_string()))
    }

    fn open<T: DeserializeOwned>(&self, pair: &KeyValue) -> Result<T> {
        let sealed = String::from_utf8_lossy(&pair.value);
        let open = self.key.open(&pair.key, &sealed).ok_or_else(|| {
            Error::Failed(format!("cannot decrypt {} in etcd: it was written with another etcd password", pair.key))
        })?;
        serde_json::from_slice(&open).map_err(Error::json("a record of the certificate"))
    }
}

fn digest(text: &str) -> String {
    Sha256::digest(text.as_bytes())[..8].iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pause_of_a_hub_whose_clock_was_ahead_does_not_count() {
        let now = 1_800_000_000;
        let is_over = |next| Attempt { next, ..Attempt::default() }.is_over(now);
        assert!(is_over(0) && is_over(now) && is_over(now + 60 * 86_400));
        assert!(!is_over(now + 1) && !is_over(now + 77 * 86_400 / 10));
    }
}
