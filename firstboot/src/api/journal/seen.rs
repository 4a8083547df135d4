//! Entries that a monitor has twice. A node sends an entry again if the monitor lost its power before it confirmed it.

use std::collections::{HashSet, VecDeque};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};

/// Number of entries that are remembered. A node sends again what it sent since the last confirmation.
const REMEMBERED: usize = 16_384;

/// The last entries of a journal.
#[derive(Default)]
pub(super) struct Seen {
    entries: HashSet<u64>,
    order: VecDeque<u64>,
}

impl Seen {
    /// Adds an entry. Returns whether it is one of the last ones.
    pub(super) fn is_again(&mut self, cursor: &str) -> bool {
        // The first parts of a cursor are the position in the file. The others are boot, times and a hash of the content.
        let Some((_, identity)) = cursor.split_once(";b=") else { return false };
        let mut hasher = DefaultHasher::new();
        identity.hash(&mut hasher);
        let hash = hasher.finish();
        if !self.entries.insert(hash) {
            return true;
        }
        self.order.push_back(hash);
        if self.order.len() > REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.entries.remove(&oldest);
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_bounded() {
        let mut seen = Seen::default();
        let cursor = |file: usize, entry: usize| format!("s=1;i={file};b=2;m={entry};t=3;x=4");
        for entry in 0..=REMEMBERED {
            assert!(!seen.is_again(&cursor(entry, entry)));
        }
        assert_eq!((seen.entries.len(), seen.order.len()), (REMEMBERED, REMEMBERED));
        assert!(seen.is_again(&cursor(99, REMEMBERED)) && !seen.is_again(&cursor(99, 0)));
        assert!(!seen.is_again("s=1;i=2") && !seen.is_again("s=1;i=2"), "a cursor without the parts");
    }
}
