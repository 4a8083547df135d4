//! Every slot's owner, as a founder has heard of it from etcd: kept on the disk, so that who was
//! evicted is refused also after a restart without etcd's quorum.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use fleet::{MeshKey, SlotRecord};

use super::claims::SlotAllocator;
use super::records::{Owners, SLOTS};
use crate::client::etcd::WatchEvent;
use crate::error::{Error, Result};
use crate::node::state::SlotRecords;

/// Least time between two writes of the records to the disk.
const PAUSE: Duration = Duration::from_secs(1);

impl SlotAllocator {
    /// What this hub has heard of every slot.
    #[must_use]
    pub fn owners(&self) -> Arc<Owners> {
        self.owners.borrow().clone()
    }

    /// Whether a slot is somebody else's now, or nobody's: then since which epoch.
    #[must_use]
    pub fn fenced(&self, slot: &str, tls_key: &str) -> Option<u64> {
        let owners = self.owners.borrow();
        owners.get(slot).filter(|r| r.vacant || r.tls_key != tls_key).map(|r| r.epoch)
    }

    /// Whether nobody has a slot any more that somebody had.
    #[must_use]
    pub fn is_vacant(&self, slot: &str) -> bool {
        self.owners.borrow().get(slot).is_some_and(|r| r.vacant)
    }

    /// Whether this hub has heard of a slot that this key has.
    pub(super) fn is_owner(&self, mesh_key: MeshKey) -> bool {
        self.owners.borrow().values().any(|r| r.mesh_key == mesh_key)
    }

    /// Whether a slot's owner is to go.
    #[must_use]
    pub fn is_leaving(&self, slot: &str) -> bool {
        self.owners.borrow().get(slot).is_some_and(|r| r.leaving)
    }

    /// Begins with the records of an earlier start, below `dir`, until etcd is heard.
    #[must_use]
    pub fn with_records(self, dir: &Path) -> Self {
        self.owners.send_replace(Arc::new(SlotRecords::load(dir).slots));
        self
    }

    /// Writes the records below `dir` whenever they change, at most once a second, until the process
    /// ends. A disk that is full costs no grant: it is written again with the next change.
    pub async fn keep_records(&self, dir: &Path) {
        let mut changes = self.owners.subscribe();
        let mut kept: Option<Arc<Owners>> = None;
        while changes.changed().await.is_ok() {
            let owners = changes.borrow_and_update().clone();
            if kept.as_ref() != Some(&owners) {
                let dir = dir.to_owned();
                let records = SlotRecords::of(owners.as_ref().clone());
                let written = tokio::task::spawn_blocking(move || records.store(&dir)).await;
                match written.unwrap_or_else(|e| Err(Error::Failed(e.to_string()))) {
                    Ok(()) => kept = Some(owners),
                    Err(e) => eprintln!("{e}"),
                }
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Follows etcd for up to a minute: calls `changed` with everything first, then with each change; returns
    /// when everything has to be listed again.
    ///
    /// # Errors
    /// etcd does not answer any more.
    pub async fn follow(&self, mut changed: impl FnMut(&Owners)) -> Result<()> {
        self.etcd.prefer_first().await;
        let (revision, pairs) = self.etcd.list(SLOTS).await?;
        let listed: Vec<WatchEvent> =
            pairs.into_iter().map(|p| WatchEvent { key: p.key, value: Some(p.value) }).collect();
        self.heard(listed, true);
        changed(&self.owners());
        let mut watch = self.etcd.watch(SLOTS, revision + 1).await?;
        while let Some(changes) = self.etcd.next(&mut watch).await? {
            self.heard(changes, false);
            changed(&self.owners());
        }
        Ok(())
    }

    /// Whether etcd has been heard since this start.
    #[must_use]
    pub fn has_heard(&self) -> bool {
        self.has_heard.load(Ordering::Relaxed)
    }

    /// Takes in what etcd says: `all` of it, or changes.
    pub(super) fn heard(&self, changes: Vec<WatchEvent>, all: bool) {
        self.owners.send_modify(|owners| {
            let owners = Arc::make_mut(owners);
            if all {
                owners.clear();
            }
            for change in changes {
                let Some(slot) = change.key.strip_prefix(SLOTS) else { continue };
                match change.value.map(|v| serde_json::from_slice::<SlotRecord>(&v)) {
                    Some(Ok(record)) => drop(owners.insert(slot.to_owned(), record)),
                    Some(Err(e)) => eprintln!("etcd's record of {slot} is not readable: {e}"),
                    None => drop(owners.remove(slot)),
                }
            }
        });
        if all {
            self.has_heard.store(true, Ordering::Relaxed);
        }
    }

    /// Seconds since 1970, at least, whatever this hub's clock says: its image is not older, and two
    /// hubs have written records later than that. (Of one hub alone it might be that hub's clock
    /// which is wrong, and no token would be good any more.)
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
