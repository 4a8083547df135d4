//! Which members a hub has answered: whether it can tell an owner's silence from a fault of its own.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::records::Owners;

pub(super) const SEEN: &str = "/bakehouse/seen/";
/// How long hubs have to be up themselves before they take an owner's silence for its own: longer
/// than the pause between two of its questions.
const SETTLED: Duration = Duration::from_secs(120);

/// Which members this hub has answered.
pub(super) struct Hearing {
    began: Instant,
    /// When this hub last answered each slot's owner.
    pub(super) heard: Mutex<BTreeMap<String, Instant>>,
    /// When it last wrote so to etcd.
    pub(super) written: Mutex<BTreeMap<String, Instant>>,
}

impl Default for Hearing {
    fn default() -> Self {
        Self { began: Instant::now(), heard: Mutex::default(), written: Mutex::default() }
    }
}

impl Hearing {
    /// Whether this hub can tell an owner's silence from a fault of its own: it has run for long enough, and has
    /// heard of another member within `patience` where there is one. A hub that no member reaches (its
    /// endpoint is flooded, or its network is down) would else give the slots of members that live to strangers.
    pub(super) fn is_good(&self, owners: &Owners, slot: &str, own: &str, patience: Duration) -> bool {
        if self.began.elapsed() < patience.min(SETTLED) {
            return false;
        }
        let heard = lock(&self.heard);
        let mut others = owners.iter().filter(|(name, r)| !r.vacant && *name != slot && *name != own).peekable();
        others.peek().is_none() || others.any(|(name, _)| heard.get(name).is_some_and(|at| at.elapsed() < patience))
    }
}

/// Key of a slot whose owner was answered not long ago.
pub(super) fn seen(slot: &str) -> String {
    format!("{SEEN}{slot}")
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
