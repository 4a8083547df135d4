//! Silent owners: a blank machine may take the slot of a stateless node that has sent no hub a request for
//! `reclaim_after` seconds.

use tracing::info;

use std::collections::BTreeSet;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::claims::SlotAllocator;
use super::hearing::{lock, seen};
use super::records::{Owners, SlotState};
use crate::client::etcd::Op;
use crate::error::Result;
use fleet::etcd_keys::SEEN;

impl SlotAllocator {
    /// Records that this hub has answered the owner of a slot. If another machine could take the slot, writes the
    /// record to etcd with a lease, at most four times in `reclaim_after`.
    ///
    /// # Errors
    /// If etcd does not answer.
    pub async fn saw(&self, slot: &str) -> Result<()> {
        let now = Instant::now();
        lock(&self.hearing.answered).insert(slot.to_owned(), now);
        let Some(after) = self.topology.node(slot).and_then(|n| n.reclaim_after) else { return Ok(()) };
        {
            let mut written = lock(&self.hearing.written);
            let interval = Duration::from_secs(u64::from(after) / 4);
            if written.get(slot).is_some_and(|last| now - *last < interval) {
                return Ok(());
            }
            written.insert(slot.to_owned(), now);
        }
        let lease = self.etcd.lease(after).await?;
        self.etcd.transact(&[], &[Op::PutFor(&seen(slot), self.by.as_bytes(), &lease)]).await.map(drop)
    }

    /// Returns the slots of a group that may be abandoned, with one read of etcd; [`Self::abandoned`] verifies each.
    pub(super) async fn silent(&self, group: &str, owners: &Owners) -> Result<Vec<String>> {
        let old = |name: &str, after: u32| owners.get(name).is_none_or(|r| !is_young(r.at, after));
        let mut slots: Vec<String> = Vec::new();
        for node in self.topology.nodes.iter().filter(|n| n.group == group) {
            let Some(after) = node.reclaim_after else { continue };
            let limit = Duration::from_secs(after.into());
            if old(&node.name, after) && self.hearing.is_good(owners, &node.name, &self.by, limit) {
                slots.push(node.name.clone());
            }
        }
        if slots.is_empty() {
            return Ok(slots);
        }
        let (_, seen) = self.etcd.list(SEEN).await?;
        let seen: BTreeSet<&str> = seen.iter().filter_map(|p| p.key.strip_prefix(SEEN)).collect();
        slots.retain(|slot| !seen.contains(slot.as_str()));
        Ok(slots)
    }

    /// Returns `Ok` with the slot if its owner has been silent for `reclaim_after`, so that another machine may take
    /// the slot; otherwise the unchanged slot as `Err`.
    pub(super) async fn abandoned(&self, place: SlotState) -> Result<Result<SlotState, SlotState>> {
        let after = self.topology.node(&place.slot).and_then(|n| n.reclaim_after);
        let (Some(after), Some(record)) = (after, &place.before) else { return Ok(Err(place)) };
        let limit = Duration::from_secs(after.into());
        // A new owner may not have sent a request yet.
        if is_young(record.at, after) || !self.hearing.is_good(&self.owners(), &place.slot, &self.by, limit) {
            return Ok(Err(place));
        }
        let found = self.etcd.get(&[&seen(&place.slot)]).await?;
        let silent = found.iter().all(|pair| pair.revision == 0);
        if silent {
            let (slot, epoch) = (&place.slot, record.epoch);
            info!(slot, epoch, "{slot}: its owner (epoch {epoch}) has sent no request for {after} s");
        }
        Ok(if silent { Ok(SlotState { silent, ..place }) } else { Err(place) })
    }
}

/// Returns whether a grant at the Unix time `at` is younger than `after` seconds.
fn is_young(at: u64, after: u32) -> bool {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    now.saturating_sub(Duration::from_secs(at)) < Duration::from_secs(after.into())
}
