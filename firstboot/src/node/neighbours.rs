//! The peer table: mesh keys of the other nodes. The disk has a copy, so the mesh comes up after a boot when no hub
//! answers.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use fleet::MeshKey;
use tokio::sync::watch;
use tracing::error;

use crate::node::state::Neighbours;
use crate::node::trust::Decision;

/// Mesh keys by slot. Each change wakes the receivers of [`PeerTable::follow`].
pub struct PeerTable {
    file: Writer,
    keys: watch::Sender<BTreeMap<String, MeshKey>>,
    /// Slots whose keys come from etcd.
    granted: Mutex<BTreeSet<String>>,
    /// TLS keys of the current hubs, by slot.
    pins: Mutex<BTreeMap<String, String>>,
    /// Slots that are fenced.
    shut: Mutex<BTreeSet<String>>,
    /// Fenced slots whose peers the kernel has removed.
    out: watch::Sender<BTreeSet<String>>,
    /// Operators' machines, by address. [`crate::node::operator_peers`] keeps them on the disk.
    operators: Mutex<BTreeMap<Ipv4Addr, MeshKey>>,
}

impl PeerTable {
    /// Loads the table from the disk, and adds `first`.
    #[must_use]
    pub fn load(dir: &Path, first: BTreeMap<String, MeshKey>) -> Self {
        let Neighbours { mut keys, granted, hubs, .. } = Neighbours::load(dir);
        keys.extend(first);
        Self {
            file: Writer::start(dir),
            keys: watch::Sender::new(keys),
            granted: Mutex::new(granted),
            pins: Mutex::new(hubs),
            shut: Mutex::default(),
            out: watch::Sender::default(),
            operators: Mutex::default(),
        }
    }

    /// Replaces the operators' machines, which are peers of a hub.
    pub fn set_operators(&self, new: BTreeMap<Ipv4Addr, MeshKey>) {
        let mut known = self.operators_locked();
        if *known == new {
            return;
        }
        *known = new;
        drop(known);
        self.keys.send_modify(|_| {});
    }

    /// Returns the operators' machines, by address, without those whose key another machine or a node has.
    #[must_use]
    pub fn operators(&self) -> BTreeMap<Ipv4Addr, MeshKey> {
        let mut known: BTreeSet<MeshKey> = self.keys.borrow().values().copied().collect();
        let mut operators = self.operators_locked().clone();
        operators.retain(|_, key| known.insert(*key));
        operators
    }

    fn operators_locked(&self) -> MutexGuard<'_, BTreeMap<Ipv4Addr, MeshKey>> {
        self.operators.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fences a slot: its peer leaves the mesh. Returns when the kernel has removed the peer.
    pub async fn fence_node(&self, slot: &str) {
        self.shut().insert(slot.to_owned());
        self.keys.send_modify(|_| {});
        // The sender lives as long as this process, so the wait cannot fail.
        let _ = self.out.subscribe().wait_for(|out| out.contains(slot)).await;
    }

    /// Ends the fence of a slot: its peer rejoins the mesh.
    pub fn unfence_node(&self, slot: &str) {
        self.shut().remove(slot);
        self.keys.send_modify(|_| {});
    }

    /// Returns the fenced slots.
    #[must_use]
    pub fn out(&self) -> BTreeSet<String> {
        self.shut().clone()
    }

    /// Records that the kernel has no peers of these slots.
    pub fn are_out(&self, out: BTreeSet<String>) {
        self.out.send_replace(out);
    }

    /// Returns the mesh keys, without those of the slots in `out`.
    #[must_use]
    pub fn keys_without(&self, out: &BTreeSet<String>) -> BTreeMap<String, MeshKey> {
        let mut keys = self.keys();
        keys.retain(|slot, _| !out.contains(slot));
        keys
    }

    fn shut(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.shut.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the mesh keys, by slot.
    #[must_use]
    pub fn keys(&self) -> BTreeMap<String, MeshKey> {
        self.keys.borrow().clone()
    }

    /// Returns a receiver of changes.
    #[must_use]
    pub fn follow(&self) -> watch::Receiver<BTreeMap<String, MeshKey>> {
        self.keys.subscribe()
    }

    /// Adds a slot's key, or replaces it.
    pub fn learn(&self, slot: &str, key: MeshKey) {
        self.change(|keys, _, _| keys.insert(slot.to_owned(), key) != Some(key));
    }

    /// Whether a founder that introduces itself has another key than etcd has for its slot: a blank machine with an
    /// ordinary ticket, or an evicted one. Such a machine must not get a vote, because it has lost the log of its
    /// votes. Only etcd changes the key of a granted slot, whatever epoch the founder claims.
    #[must_use]
    pub fn is_stranger(&self, slot: &str, key: MeshKey) -> bool {
        self.granted().contains(slot) && self.keys.borrow().get(slot).is_some_and(|known| *known != key)
    }

    /// Returns the TLS keys of the current hubs, by slot; empty before the node knows them.
    #[must_use]
    pub fn pins(&self) -> BTreeMap<String, String> {
        self.pins.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Applies the changes that enough hubs confirm.
    pub fn apply(&self, decision: &Decision) {
        self.change(|keys, _, pins| {
            let before = (keys.clone(), pins.clone());
            update(keys, &decision.keys);
            update(pins, &decision.pins);
            before != (keys.clone(), pins.clone())
        });
    }

    /// Applies etcd's records: `new` has the mesh keys, and `hubs` the hubs' TLS keys. Of the other mesh keys, those
    /// stay for which `keep` returns true.
    pub fn are_granted(
        &self,
        new: &BTreeMap<String, MeshKey>,
        hubs: BTreeMap<String, String>,
        keep: impl Fn(&str) -> bool,
    ) {
        self.change(|keys, granted, pins| {
            let before = std::mem::replace(granted, new.keys().cloned().collect());
            let pinned = std::mem::replace(pins, hubs);
            replaced(keys, new, keep) || before != *granted || pinned != *pins
        });
    }

    /// Waits until all changes so far are on the disk.
    pub fn flush(&self) {
        let (done, flushed) = channel();
        self.file.send(WriterCommand::Flush(done));
        // Without a thread, there is nothing to wait for.
        let _ = flushed.recv();
    }

    fn granted(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.granted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(
        &self,
        change: impl FnOnce(&mut BTreeMap<String, MeshKey>, &mut BTreeSet<String>, &mut BTreeMap<String, String>) -> bool,
    ) {
        self.keys.send_if_modified(|keys| {
            let mut granted = self.granted();
            let mut pins = self.pins.lock().unwrap_or_else(PoisonError::into_inner);
            let changed = change(keys, &mut granted, &mut pins);
            if changed {
                self.file.send(WriterCommand::Write(Neighbours::new(keys.clone(), granted.clone(), pins.clone())));
            }
            changed
        });
    }
}

/// Writes the file on its own thread, so that a slow disk delays neither the mesh nor the fence. Of several queued
/// changes, it writes the last. Dropping it waits until that change is on the disk.
struct Writer {
    orders: Option<Sender<WriterCommand>>,
    thread: Option<JoinHandle<()>>,
}

enum WriterCommand {
    Write(Neighbours),
    /// Replies when all earlier changes are on the disk.
    Flush(Sender<()>),
}

impl Writer {
    fn start(dir: &Path) -> Self {
        let (orders, queue) = channel();
        let dir = dir.to_owned();
        let thread = std::thread::Builder::new().name("neighbours".to_owned()).spawn(move || {
            while let Ok(first) = queue.recv() {
                let (mut last, mut flushed) = (None, Vec::new());
                for order in std::iter::once(first).chain(queue.try_iter()) {
                    match order {
                        WriterCommand::Write(neighbours) => last = Some(neighbours),
                        WriterCommand::Flush(done) => flushed.push(done),
                    }
                }
                // A full disk must not stop the mesh. After a boot, the node asks the hubs again.
                if let Some(Err(e)) = last.map(|last| last.store(&dir)) {
                    error!("cannot store the peers' keys: {}", e.chain());
                }
                // The receiver may be gone.
                for done in flushed {
                    let _ = done.send(());
                }
            }
        });
        let thread = thread.inspect_err(|e| error!("cannot store the peers' keys: the thread does not start: {e}"));
        Self { orders: Some(orders), thread: thread.ok() }
    }

    fn send(&self, order: WriterCommand) {
        if let Some(orders) = &self.orders {
            // Without a thread, nothing is stored. The agent has logged that.
            let _ = orders.send(order);
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        drop(self.orders.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn update<T: Clone>(known: &mut BTreeMap<String, T>, changes: &BTreeMap<String, Option<T>>) {
    for (slot, change) in changes {
        match change {
            Some(value) => drop(known.insert(slot.clone(), value.clone())),
            None => drop(known.remove(slot)),
        }
    }
}

fn replaced(
    keys: &mut BTreeMap<String, MeshKey>,
    new: &BTreeMap<String, MeshKey>,
    keep: impl Fn(&str) -> bool,
) -> bool {
    let mut next = keys.clone();
    next.retain(|slot, _| keep(slot));
    next.extend(new.iter().map(|(slot, key)| (slot.clone(), *key)));
    let changed = next != *keys;
    *keys = next;
    changed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_survive_a_boot() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (MeshKey([1; 32]), MeshKey([2; 32]));
        let all = PeerTable::load(dir.path(), BTreeMap::from([("hub-1".to_owned(), one)]));
        let mut changes = all.follow();
        all.learn("hub-2", two);
        assert!(changes.has_changed().unwrap());
        changes.mark_unchanged();
        all.learn("hub-2", two);
        assert!(!changes.has_changed().unwrap(), "the same key is a change");
        let agreed = Decision {
            keys: BTreeMap::from([("hub-2".to_owned(), None), ("hub-3".to_owned(), Some(one))]),
            pins: BTreeMap::from([("hub-3".to_owned(), Some("key".to_owned()))]),
            ..Decision::default()
        };
        all.apply(&agreed);
        drop(all);
        let all = PeerTable::load(dir.path(), BTreeMap::new());
        assert_eq!(all.keys().into_keys().collect::<Vec<_>>(), ["hub-1", "hub-3"]);
        assert_eq!(all.pins(), BTreeMap::from([("hub-3".to_owned(), "key".to_owned())]));
    }

    /// The temporary file is a pipe, so opening it blocks until a reader opens it.
    #[test]
    fn slow_disk_delays_no_change() {
        use std::time::{Duration, Instant};
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("neighbours.new");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_secs(3));
            // Reads each write, until the folder is gone.
            while std::fs::read(&pipe).is_ok() {}
        });
        let all = PeerTable::load(dir.path(), BTreeMap::new());
        let begun = Instant::now();
        for i in 0..9 {
            all.learn(&format!("hub-{i}"), MeshKey([i; 32]));
        }
        assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
        assert_eq!(all.follow().borrow().len(), 9);
    }

    #[test]
    fn founder_with_other_key_than_in_etcd_is_rejected() {
        let dir = tempfile::tempdir().unwrap();
        let (old, new) = (MeshKey([1; 32]), MeshKey([2; 32]));
        let all = PeerTable::load(dir.path(), BTreeMap::new());
        // Before etcd exists, a founder may lose its disk and join again.
        all.learn("hub-1", old);
        assert!(!all.is_stranger("hub-1", new));
        all.learn("hub-2", old);
        all.are_granted(&BTreeMap::from([("hub-1".to_owned(), old)]), BTreeMap::new(), |_| true);
        drop(all);
        let all = PeerTable::load(dir.path(), BTreeMap::new());
        assert!(all.is_stranger("hub-1", new));
        assert!(!all.is_stranger("hub-1", old) && !all.is_stranger("hub-2", new));
    }
}
