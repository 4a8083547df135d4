//! The owners of all slots, as a founder has read them from etcd. The hub keeps them on disk, so that it refuses
//! evicted nodes even after a restart without an etcd quorum.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use fleet::etcd_keys::SLOTS;
use fleet::{MeshKey, SlotRecord};
use tracing::error;

use super::claims::SlotAllocator;
use super::records::Owners;
use crate::client::etcd::WatchEvent;
use crate::error::{Error, Result};
use crate::node::state::SlotRecords;

/// Minimum time between two writes of the records to disk.
const PAUSE: Duration = Duration::from_secs(1);

impl SlotAllocator {
    /// Returns the records that this hub has of all slots.
    #[must_use]
    pub fn owners(&self) -> Arc<Owners> {
        self.owners.borrow().clone()
    }

    /// Returns the epoch since which the slot has another owner, or no owner. Returns `None` if `tls_key` owns the
    /// slot, or this hub has no record.
    #[must_use]
    pub fn fenced(&self, slot: &str, tls_key: &str) -> Option<u64> {
        let owners = self.owners.borrow();
        owners.get(slot).filter(|r| r.vacant || r.tls_key != tls_key).map(|r| r.epoch)
    }

    /// Returns whether a slot's last owner has left.
    #[must_use]
    pub fn is_vacant(&self, slot: &str) -> bool {
        self.owners.borrow().get(slot).is_some_and(|r| r.vacant)
    }

    /// Returns whether this hub has a record with this mesh key.
    pub(super) fn is_owner(&self, mesh_key: MeshKey) -> bool {
        self.owners.borrow().values().any(|r| r.mesh_key == mesh_key)
    }

    /// Returns whether a slot's owner is ordered to leave.
    #[must_use]
    pub fn is_leaving(&self, slot: &str) -> bool {
        self.owners.borrow().get(slot).is_some_and(|r| r.leaving)
    }

    /// Loads the records that an earlier start stored below `dir`; reading etcd replaces them.
    #[must_use]
    pub fn with_records(self, dir: &Path) -> Self {
        self.owners.send_replace(Arc::new(SlotRecords::load(dir).slots));
        self
    }

    /// Writes the records below `dir` after each change, at most once a second, until the process ends. A failed write
    /// does not stop grants; the next change retries it.
    pub async fn keep_records(&self, dir: &Path) {
        let mut changes = self.owners.subscribe();
        let mut kept: Option<Arc<Owners>> = None;
        while changes.changed().await.is_ok() {
            let owners = changes.borrow_and_update().clone();
            if kept.as_ref() != Some(&owners) {
                let dir = dir.to_owned();
                let records = SlotRecords::new(owners.as_ref().clone());
                let written = tokio::task::spawn_blocking(move || records.store(&dir)).await;
                match written.unwrap_or_else(|e| Err(Error::cannot("run the writer")(e))) {
                    Ok(()) => kept = Some(owners),
                    Err(e) => error!("the records of owners are not stored: {}", e.chain()),
                }
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Watches etcd for up to a minute: calls `changed` after the first read and after each change, and returns when
    /// the records have to be read again.
    ///
    /// # Errors
    /// If etcd does not answer.
    pub async fn follow(&self, mut changed: impl FnMut(&Owners)) -> Result<()> {
        self.etcd.prefer_first().await;
        let (revision, pairs) = self.etcd.list(SLOTS).await?;
        self.apply_events(pairs.into_iter().map(WatchEvent::from).collect(), true);
        changed(&self.owners());
        let mut watch = self.etcd.watch(SLOTS, revision).await?;
        while let Some(changes) = self.etcd.next(&mut watch).await? {
            self.apply_events(changes, false);
            changed(&self.owners());
        }
        Ok(())
    }

    /// Returns whether this hub has read the records from etcd since the agent started.
    #[must_use]
    pub fn has_heard(&self) -> bool {
        self.has_heard.load(Ordering::Relaxed)
    }

    /// Applies events of etcd: all records (`all`), or changes.
    pub(super) fn apply_events(&self, changes: Vec<WatchEvent>, all: bool) {
        self.owners.send_modify(|owners| {
            let owners = Arc::make_mut(owners);
            if all {
                owners.clear();
            }
            for change in changes {
                let Some(slot) = change.key.strip_prefix(SLOTS) else { continue };
                match change.value.map(|v| serde_json::from_slice::<SlotRecord>(&v)) {
                    Some(Ok(record)) => drop(owners.insert(slot.to_owned(), record)),
                    Some(Err(e)) => error!(slot, "cannot parse the record of {slot} in etcd: {e}"),
                    None => drop(owners.remove(slot)),
                }
            }
        });
        if all {
            self.has_heard.store(true, Ordering::Relaxed);
        }
    }

    /// Returns a lower limit of the current Unix time, whatever this hub's clock shows: the build time of its image, or
    /// the latest time that two hubs have reached in their records. One hub alone does not count: if its clock were
    /// ahead, every token would expire.
    #[must_use]
    pub fn time_floor(&self) -> u64 {
        let mut latest = std::collections::BTreeMap::new();
        for record in self.owners.borrow().values() {
            let at: &mut u64 = latest.entry(record.by.clone()).or_default();
            *at = record.at.max(*at);
        }
        let mut latest: Vec<u64> = latest.into_values().collect();
        latest.sort_unstable_by(|a, b| b.cmp(a));
        self.built.max(latest.get(1).copied().unwrap_or_default())
    }
}
