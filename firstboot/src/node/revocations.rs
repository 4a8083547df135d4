//! Revoked certificates of operators. Each entry is an order that the fleet's root signed. Hubs pass the orders on with
//! their peers, and every node keeps them on its disk, so that it refuses the operator when no hub answers.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{SystemTime, UNIX_EPOCH};

use fleet::encoding::decode;
use fleet::{OperatorRevocation, RevokedOperator};
use tokio::sync::watch;
use tracing::{error, info};

use crate::node::state::RevocationFile;
use crate::node::trust::signed_by_root;

/// Number of orders that a node keeps.
pub const MOST: usize = 512;
/// Longest order with its signature, in bytes.
const LONGEST: usize = 1 << 10;
/// Seconds that an order stays after the certificate has expired, in case a clock is wrong.
const GRACE: u64 = 7 * 24 * 3600;

/// The revoked certificates that this node knows.
pub struct Revocations {
    fleet: String,
    /// The fleet's root certificate, PEM.
    root: String,
    dir: PathBuf,
    /// Orders by the operator's public key, base64.
    orders: watch::Sender<Orders>,
    /// The thread that writes the last change, so that a slow disk delays no other task.
    writer: Mutex<Option<JoinHandle<()>>>,
}

type Orders = BTreeMap<String, Order>;

/// An order of the fleet's root. Of two orders for one key, a node keeps the one whose certificate expires later: an
/// operator who renews a certificate may keep the key.
struct Order {
    /// Expiry of the certificate, in seconds since 1970.
    expires: u64,
    proof: RevokedOperator,
}

/// Result of [`Revocations::learn`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Learned {
    /// The node keeps the order, or one for the same key that is valid for longer.
    Kept,
    /// The order is not valid, or its certificate has expired.
    Invalid,
    /// The node has no place for a further order.
    Full,
}

impl Revocations {
    /// Loads the orders from the folder of the node's state.
    #[must_use]
    pub fn load(dir: &Path, fleet: &str, root: &str) -> Self {
        let own = Self {
            fleet: fleet.to_owned(),
            root: root.to_owned(),
            dir: dir.to_owned(),
            orders: watch::Sender::default(),
            writer: Mutex::default(),
        };
        let stored = RevocationFile::load(dir).unwrap_or_else(|e| {
            error!("this node accepts revoked operators until a hub sends the orders again: {}", e.chain());
            RevocationFile::default()
        });
        own.add(&stored.orders);
        own
    }

    /// Returns the name of the fleet.
    #[must_use]
    pub fn fleet(&self) -> &str {
        &self.fleet
    }

    /// Returns whether the certificate with this public key is revoked.
    #[must_use]
    pub fn is_revoked(&self, key: &str) -> bool {
        self.orders.borrow().contains_key(key)
    }

    /// Returns the orders.
    #[must_use]
    pub fn orders(&self) -> Vec<RevokedOperator> {
        self.orders.borrow().values().map(|order| order.proof.clone()).collect()
    }

    /// Waits until the certificate with this public key is revoked.
    pub async fn until_revoked(&self, key: &str) {
        // The sender lives as long as `self`, so the wait cannot fail.
        let _ = self.orders.subscribe().wait_for(|orders| orders.contains_key(key)).await;
    }

    /// Waits until the orders change.
    pub async fn changed(&self) {
        // The sender lives as long as `self`, so the wait cannot fail.
        let _ = self.orders.subscribe().changed().await;
    }

    /// Returns the order, if the root signed it for this fleet, and its certificate has not expired long ago.
    #[must_use]
    pub fn verify(&self, proof: &RevokedOperator) -> Option<OperatorRevocation> {
        self.parse(proof).filter(|_| self.is_signed(proof))
    }

    fn parse(&self, proof: &RevokedOperator) -> Option<OperatorRevocation> {
        if proof.order.len() + proof.signature.len() > LONGEST {
            return None;
        }
        proof.order(&self.fleet).filter(|order| !is_over(order.expires, now()))
    }

    fn is_signed(&self, proof: &RevokedOperator) -> bool {
        decode(&proof.signature).is_some_and(|s| signed_by_root(&self.root, proof.order.as_bytes(), &s))
    }

    /// Takes an order from a hub or an operator. The order applies when this returns, also if the disk is slow.
    pub fn learn(&self, proof: &RevokedOperator) -> Learned {
        self.learn_all(std::slice::from_ref(proof)).pop().unwrap_or(Learned::Invalid)
    }

    /// As [`Self::learn`], for several orders.
    pub fn learn_all(&self, proofs: &[RevokedOperator]) -> Vec<Learned> {
        let (results, changed) = self.add(proofs);
        if changed {
            self.store();
        }
        results
    }

    /// Adds orders. Returns the results, and whether the node keeps another order than before.
    fn add(&self, proofs: &[RevokedOperator]) -> (Vec<Learned>, bool) {
        let proofs = &proofs[..proofs.len().min(MOST)];
        let parsed: Vec<Option<OperatorRevocation>> = proofs.iter().map(|proof| self.parse(proof)).collect();
        let new: Vec<bool> = {
            let orders = self.orders.borrow();
            parsed.iter().map(|order| order.as_ref().is_some_and(|order| is_new(&orders, order))).collect()
        };
        // A signature takes a tenth of a millisecond, and readers of the orders wait for the lock.
        let valid: Vec<bool> = proofs.iter().zip(&new).map(|(proof, new)| !*new || self.is_signed(proof)).collect();
        let mut results = Vec::with_capacity(proofs.len());
        let changed = self.orders.send_if_modified(|orders| {
            let mut changed = false;
            for ((proof, order), valid) in proofs.iter().zip(parsed).zip(valid) {
                let result = match order {
                    Some(order) if valid => insert(orders, order, proof, &mut changed),
                    _ => Learned::Invalid,
                };
                results.push(result);
            }
            changed
        });
        (results, changed)
    }

    fn store(&self) {
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let (orders, dir, before) = (self.orders.clone(), self.dir.clone(), writer.take());
        let write = move || {
            if let Some(before) = before {
                let _ = before.join();
            }
            let file = RevocationFile::new(orders.borrow().values().map(|order| order.proof.clone()).collect());
            // Hubs send the orders again after a boot, so the node continues.
            if let Err(e) = file.store(&dir) {
                error!("cannot store the revoked operators: {}", e.chain());
            }
        };
        let thread = std::thread::Builder::new().name("revocations".to_owned()).spawn(write);
        *writer = thread.inspect_err(|e| error!("cannot store the revoked operators: {e}")).ok();
    }
}

impl Drop for Revocations {
    fn drop(&mut self) {
        if let Some(writer) = self.writer.lock().unwrap_or_else(PoisonError::into_inner).take() {
            let _ = writer.join();
        }
    }
}

/// Returns whether the orders have none for the same key that is valid for as long.
fn is_new(orders: &Orders, order: &OperatorRevocation) -> bool {
    orders.get(&order.key).is_none_or(|known| known.expires < order.expires)
}

/// Adds a verified order, if a place is free. Sets `changed` if the order is new.
fn insert(orders: &mut Orders, order: OperatorRevocation, proof: &RevokedOperator, changed: &mut bool) -> Learned {
    if !is_new(orders, &order) {
        return Learned::Kept;
    }
    if !orders.contains_key(&order.key) {
        if orders.len() >= MOST {
            let now = now();
            orders.retain(|_, known| !is_over(known.expires, now));
        }
        if orders.len() >= MOST {
            return Learned::Full;
        }
        info!(operator = order.name, "the certificate of the operator {} is revoked", order.name.escape_debug());
    }
    orders.insert(order.key, Order { expires: order.expires, proof: proof.clone() });
    *changed = true;
    Learned::Kept
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// Returns whether a certificate has expired for so long that its order has no use.
#[must_use]
pub fn is_over(expires: u64, now: u64) -> bool {
    now > expires.saturating_add(GRACE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet::{Issuer, OrderScope, PROTOCOL, SignedOrder as _, encoding};

    fn proof(root: &Issuer, fleet: &str, key: &str, expires: u64) -> RevokedOperator {
        proof_for(OperatorRevocation::PATH, root, fleet, key, expires)
    }

    fn proof_for(path: &str, root: &Issuer, fleet: &str, key: &str, expires: u64) -> RevokedOperator {
        let scope =
            OrderScope { path: path.to_owned(), hub: "hub-1".to_owned(), issued_at: 1, nonce: "nonce".to_owned() };
        let order = OperatorRevocation {
            version: PROTOCOL,
            fleet: fleet.to_owned(),
            name: "anna".to_owned(),
            key: key.to_owned(),
            expires,
            scope: Some(scope),
        };
        let order = serde_json::to_string(&order).unwrap();
        let signature = encoding::encode(&root.sign(order.as_bytes()).unwrap());
        RevokedOperator { order, signature }
    }

    #[tokio::test]
    async fn keeps_only_orders_of_the_root_across_boots() {
        let dir = tempfile::tempdir().unwrap();
        let root = Issuer::root("acme").unwrap();
        let load = || Revocations::load(dir.path(), "acme", root.certificate());
        let known = load();
        let good = proof(&root, "acme", "key of anna", u64::MAX);
        let forged = proof(&Issuer::root("acme").unwrap(), "acme", "key of ben", u64::MAX);
        let mut changed = good.clone();
        changed.order = changed.order.replace("key of anna", "key of carl");
        let long = proof(&root, "acme", &"k".repeat(2 * LONGEST), u64::MAX);
        let other_path = proof_for("/v1/revoke", &root, "acme", "k", u64::MAX);
        let (other_fleet, over) = (proof(&root, "other", "k", u64::MAX), proof(&root, "acme", "k", 1));
        for invalid in [forged, changed, long, other_fleet, other_path, over] {
            assert_eq!(known.learn(&invalid), Learned::Invalid, "{invalid:?}");
        }
        assert!(known.orders().is_empty());
        assert_eq!(known.learn_all(&[good.clone(), good.clone()]), [Learned::Kept, Learned::Kept]);
        known.until_revoked("key of anna").await;
        drop(known);
        let known = load();
        assert!(known.is_revoked("key of anna") && !known.is_revoked("key of ben"));
        assert_eq!(known.orders(), [good]);
    }

    #[test]
    fn order_for_the_later_expiry_applies() {
        let dir = tempfile::tempdir().unwrap();
        let root = Issuer::root("acme").unwrap();
        let load = || Revocations::load(dir.path(), "acme", root.certificate());
        let [first, second] = [now() + 60, now() + 120].map(|expires| proof(&root, "acme", "key of anna", expires));
        let forged = proof(&Issuer::root("acme").unwrap(), "acme", "key of anna", now() + 240);
        for order in [[first.clone(), second.clone()], [second.clone(), first.clone()]] {
            let known = Revocations::load(Path::new("/nonexistent"), "acme", root.certificate());
            assert_eq!(known.learn_all(&order), [Learned::Kept; 2]);
            assert_eq!(known.orders(), std::slice::from_ref(&second));
        }
        let known = load();
        assert_eq!(known.learn(&first), Learned::Kept);
        assert_eq!(known.learn(&second), Learned::Kept);
        assert_eq!((known.learn(&forged), known.learn(&first)), (Learned::Invalid, Learned::Kept));
        drop(known);
        assert_eq!(load().orders(), [second]);
    }

    #[test]
    fn a_damaged_file_has_no_order() {
        let dir = tempfile::tempdir().unwrap();
        let root = Issuer::root("acme").unwrap();
        std::fs::write(dir.path().join("revoked-operators.json"), "{").unwrap();
        assert!(RevocationFile::load(dir.path()).is_err());
        let known = Revocations::load(dir.path(), "acme", root.certificate());
        assert_eq!(known.learn(&proof(&root, "acme", "key of anna", u64::MAX)), Learned::Kept);
        drop(known);
        assert_eq!(RevocationFile::load(dir.path()).unwrap().orders.len(), 1);
    }

    #[test]
    fn number_of_orders_is_limited() {
        let dir = tempfile::tempdir().unwrap();
        let root = Issuer::root("acme").unwrap();
        let known = Revocations::load(dir.path(), "acme", root.certificate());
        let all: Vec<_> = (0..MOST).map(|i| proof(&root, "acme", &format!("key {i}"), u64::MAX)).collect();
        assert!(known.learn_all(&all).iter().all(|l| *l == Learned::Kept));
        assert_eq!(known.learn(&proof(&root, "acme", "one more", u64::MAX)), Learned::Full);
        assert_eq!(known.learn(&all[7]), Learned::Kept);
    }
}
