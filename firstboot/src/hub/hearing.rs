//! Which members a hub has answered. A hub without contact to members cannot distinguish a silent owner from its own
//! fault.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::records::Owners;
use fleet::etcd_keys::SEEN;

/// How long a hub must run before it counts an owner as silent: longer than the time between two requests of a node.
const SETTLED: Duration = Duration::from_secs(120);

/// The members that this hub has answered.
pub(super) struct Hearing {
    began: Instant,
    /// When this hub last answered each slot's owner.
    pub(super) answered: Mutex<BTreeMap<String, Instant>>,
    /// When this hub last recorded each slot's owner in etcd.
    pub(super) written: Mutex<BTreeMap<String, Instant>>,
}

impl Default for Hearing {
    fn default() -> Self {
        Self { began: Instant::now(), answered: Mutex::default(), written: Mutex::default() }
    }
}

impl Hearing {
    /// Returns whether this hub can judge that an owner is silent: it has run long enough, and, if there are other
    /// members, one of them has reached it within `limit`. Otherwise a hub that no member reaches, because its
    /// endpoint is flooded or its network is down, would give the slots of running members to strangers.
    pub(super) fn is_good(&self, owners: &Owners, slot: &str, own: &str, limit: Duration) -> bool {
        if self.began.elapsed() < limit.min(SETTLED) {
            return false;
        }
        let answered = lock(&self.answered);
        let mut others = owners.iter().filter(|(name, r)| !r.vacant && *name != slot && *name != own).peekable();
        others.peek().is_none() || others.any(|(name, _)| answered.get(name).is_some_and(|at| at.elapsed() < limit))
    }
}

/// Returns the etcd key that exists while a hub has answered the slot's owner recently.
pub(super) fn seen(slot: &str) -> String {
    format!("{SEEN}{slot}")
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
