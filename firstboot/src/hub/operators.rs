//! Revocations of operators' certificates, in etcd.
//!
//! ```text
//! /bakehouse/operators/revoked/HASH  RevokedOperator  SHA-256 of the certificate's public key
//! ```

use std::time::{SystemTime, UNIX_EPOCH};

use fleet::etcd_keys::REVOKED_OPERATORS;
use fleet::{OperatorRevocation, Reason, Refusal, RevokedOperator, encoding};
use sha2::{Digest as _, Sha256};
use tracing::{error, info};

use super::claims::SlotAllocator;
use super::refusal::refuse;
use crate::client::etcd::{Compare, KeyValue, Op};
use crate::error::{Error, Result};
use crate::node::revocations::{MOST, Revocations, is_over};

/// How often a hub retries when another hub's transaction wins.
const ATTEMPTS: u32 = 8;

/// Returns the etcd key of a revoked certificate; `None` if the order has no public key.
fn etcd_key(order: &OperatorRevocation) -> Option<String> {
    let key = encoding::decode(&order.key)?;
    let hash: String = Sha256::digest(&key).iter().map(|byte| format!("{byte:02x}")).collect();
    Some(format!("{REVOKED_OPERATORS}{hash}"))
}

impl SlotAllocator {
    /// Stores the proof that a certificate is revoked, unless etcd has one for the same key that is valid for as long.
    /// Idempotent.
    ///
    /// # Errors
    /// If the order has no public key, or etcd does not answer.
    pub(super) async fn revoke_operator(
        &self,
        known: &Revocations,
        order: &OperatorRevocation,
        proof: &RevokedOperator,
    ) -> Result<()> {
        let no_key = || Error::from(refuse(Reason::Malformed, "the order has no public key"));
        let key = etcd_key(order).ok_or_else(no_key)?;
        let value = serde_json::to_vec(proof).map_err(Error::json("a revocation"))?;
        for _ in 0..ATTEMPTS {
            let found = self.etcd.get(&[&key]).await?;
            let before = found.first().filter(|pair| pair.revision > 0);
            let stored = before.and_then(|pair| known.verify(&parse(&pair.key, &pair.value)?));
            if stored.is_some_and(|stored| stored.expires >= order.expires) {
                return Ok(());
            }
            let unchanged = [Compare::Unchanged(&key, before.map_or(0, |pair| pair.revision))];
            if self.etcd.transact(&unchanged, &[Op::Put(&key, &value)]).await? {
                return Ok(());
            }
        }
        Err(refuse(Reason::Busy, "another hub stores an order for the same key; retry").into())
    }

    /// Follows the revocations in etcd for up to a minute, and adds them to `known`. Deletes those whose certificate has
    /// expired long ago.
    ///
    /// # Errors
    /// If etcd does not answer.
    pub async fn follow_revocations(&self, known: &Revocations) -> Result<()> {
        let (revision, pairs) = self.etcd.list(REVOKED_OPERATORS).await?;
        let proofs: Vec<RevokedOperator> = pairs.iter().filter_map(|pair| parse(&pair.key, &pair.value)).collect();
        known.learn_all(&proofs);
        self.delete_expired(known, &pairs).await?;
        let mut watch = self.etcd.watch(REVOKED_OPERATORS, revision).await?;
        while let Some(changes) = self.etcd.next(&mut watch).await? {
            let new = changes.iter().filter_map(|change| parse(&change.key, change.value.as_ref()?));
            known.learn_all(&new.collect::<Vec<_>>());
        }
        Ok(())
    }

    async fn delete_expired(&self, known: &Revocations, pairs: &[KeyValue]) -> Result<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        for pair in pairs {
            let order = parse(&pair.key, &pair.value).and_then(|proof| proof.order(known.fleet()));
            if order.is_some_and(|order| is_over(order.expires, now)) {
                let unchanged = [Compare::Unchanged(&pair.key, pair.revision)];
                self.etcd.transact(&unchanged, &[Op::Delete(&pair.key)]).await?;
                info!("deleted {} from etcd: the certificate has expired", pair.key);
            }
        }
        Ok(())
    }
}

fn parse(key: &str, value: &[u8]) -> Option<RevokedOperator> {
    serde_json::from_slice(value).inspect_err(|e| error!("cannot parse {key} in etcd: {e}")).ok()
}

/// Returns the refusal of a further revocation.
pub(super) fn full() -> Refusal {
    let text = format!("the fleet has {MOST} revoked operators already; issue certificates with a shorter validity");
    refuse(Reason::Malformed, &text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet::PROTOCOL;

    #[test]
    fn etcd_key_has_the_hash_of_the_public_key() {
        let order = |key: &str| OperatorRevocation {
            version: PROTOCOL,
            fleet: "acme".to_owned(),
            name: "anna".to_owned(),
            key: key.to_owned(),
            expires: 1,
            scope: None,
        };
        assert_eq!(
            etcd_key(&order(&encoding::encode(b"abc"))).unwrap(),
            "/bakehouse/operators/revoked/ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        assert_eq!(etcd_key(&order("../no base64")), None);
    }
}
