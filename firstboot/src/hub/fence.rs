//! Fences a primary that the hubs cannot reach, so that a standby takes over before Patroni's leader key expires.
//!
//! A hub that has had no route to the primary for a while removes the primary's key from its WireGuard interface and
//! records that in etcd. When a majority of the hubs has recorded it, one hub deletes Patroni's leader key, and a
//! synchronous standby becomes the primary. Every hub that reads the records of a majority fences the node, too, even
//! if another node has the leader key by then. So does an agent that restarts.
//!
//! Safety does not depend on the WireGuard keys: the old primary may reach etcd through a hub that has not read the
//! records of the majority yet. Safety depends on one transaction. The transaction compares the hubs' records, the
//! leader key and `sync`, deletes the leader key, and writes `sync` again with the same value, which gives `sync` a new
//! revision. Patroni loads all keys at the start of a cycle and compares the revision of `sync` in each write to
//! `sync`. So a cycle of the old primary that began before the transaction cannot remove its standby from `sync`. As
//! long as the standby is in `sync`, the old primary acknowledges no write that the standby lacks. A cycle that begins
//! after the transaction finds no leader key of its own.
//!
//! Safety also depends on the age of the leader key. A node first loads the keys and decides whether it may lead, then
//! creates the leader key, and loads again before it writes `sync`. No such cycle lasts for `ttl`. A hub therefore
//! deletes a leader key only after it has read the key for `ttl`: by then no cycle from before that key is running.
//! `tests/cluster/model` checks this protocol against the interleavings.
//!
//! ```text
//! /bakehouse/shut/SLOT/HUB    empty    HUB forwards nothing from or to SLOT (with a lease)
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use fleet::etcd_keys::FENCED;
use fleet::{Node, Topology};
use serde::Deserialize;
use tracing::{info, warn};

use crate::client::etcd::{Compare, Etcd, KeyValue, Op};
use crate::client::patroni::scope;
use crate::error::{Error, Result};
use crate::host::console::log_event;
use crate::host::journal::Event;
use crate::host::ticker::Ticker;
use crate::mesh::Routes;
use crate::node::neighbours::PeerTable;

/// Time between two checks of the routes.
const INTERVAL: Duration = Duration::from_millis(250);
/// How long a primary must have no route before the hub fences it (debounce).
const DEBOUNCE: Duration = Duration::from_secs(1);
/// Time limit for one etcd member's reply. The member may be on the unreachable machine.
pub const ANSWER: Duration = Duration::from_secs(1);
/// How long a node stays fenced after the lease of the record in etcd ends.
const MARGIN: Duration = Duration::from_secs(10);

/// One hub's part in the fence.
pub struct Fence<'a> {
    /// Client of the etcd cluster.
    pub etcd: &'a Etcd,
    /// All nodes, and the settings of the fleet.
    pub topology: &'a Topology,
    /// This hub's node.
    pub own: &'a Node,
    /// Peers of this hub in the mesh. The fence stops forwarding their packets.
    pub neighbourhood: &'a PeerTable,
    /// Factor for time-outs on this machine.
    pub slow: u32,
}

/// Tracks nodes whose route has disappeared, and since when.
#[derive(Default)]
struct UnreachableTracker {
    reached: BTreeSet<String>,
    since: BTreeMap<String, Instant>,
}

/// One node that this hub fences.
#[derive(Clone, Copy, Debug)]
struct FencedNode {
    until: Instant,
    /// This process has recorded the fence in etcd.
    recorded: bool,
}

/// State of one hub's fence between two checks.
#[derive(Debug, Default)]
pub struct FenceState {
    /// The nodes that this hub fences.
    fenced: Mutex<BTreeMap<String, FencedNode>>,
    /// Revision of Patroni's leader key, and when this hub first read it.
    leader: Mutex<Option<(u64, Instant)>>,
}

/// Patroni's key `sync`.
#[derive(Default, Deserialize)]
struct Sync {
    leader: Option<String>,
    /// Names, separated by commas.
    sync_standby: Option<String>,
}

impl Fence<'_> {
    /// Watches the database nodes and the other hubs' records. Returns only on failure.
    ///
    /// # Errors
    /// If the kernel's routes cannot be read.
    pub async fn keep(&self) -> Result<()> {
        let databases: Vec<&Node> =
            self.topology.nodes.iter().filter(|n| n.has_role("db") && n.name != self.own.name).collect();
        if databases.is_empty() || self.topology.hubs.len() < 2 {
            return std::future::pending().await;
        }
        let state = FenceState::default();
        tokio::select! {
            joined = Box::pin(self.follow_majority(&databases, &state)) => joined,
            watched = Box::pin(self.watch(&databases, &state)) => watched,
        }
    }

    async fn follow_majority(&self, databases: &[&Node], state: &FenceState) -> Result<()> {
        // On a separate connection, so that a late answer here does not delay a failover.
        let (etcd, mut failed) = (self.etcd.reconnected(), false);
        loop {
            let joined = self.join_majority(&etcd, databases, state).await;
            if let (Err(e), false) = (&joined, failed) {
                warn!("cannot read the other hubs' fence records: {}", e.chain());
            }
            failed = joined.is_err();
            tokio::time::sleep(INTERVAL * self.slow.min(3)).await;
        }
    }

    async fn watch(&self, databases: &[&Node], state: &FenceState) -> Result<()> {
        let routes = Routes::open()?;
        let mut unreachable = UnreachableTracker::default();
        let mut ticker = Ticker::new("the fence", INTERVAL * self.slow.min(3));
        loop {
            ticker.tick().await;
            let hosts = routes.hosts().await?;
            let reached = databases.iter().filter(|n| hosts.contains(&n.address)).map(|n| n.name.clone()).collect();
            let now = Instant::now();
            for slot in unreachable.update(reached, now, DEBOUNCE * self.slow) {
                match self.release_leader_key(&slot, &unreachable.reached, state).await {
                    Ok(true) => unreachable.forget(&slot),
                    Ok(false) => {}
                    Err(e) => warn!(slot, "cannot fence {slot}: {}", e.chain()),
                }
            }
            for slot in state.take_ended(now) {
                info!(slot, "the fence of {slot} has ended");
                self.neighbourhood.unfence_node(&slot);
            }
        }
    }

    /// Fences those of `databases` that a majority of the hubs fences, or that this hub fenced before its agent
    /// restarted. Records nothing in etcd, because this hub may still have a route to the node.
    ///
    /// # Errors
    /// If etcd does not answer.
    pub async fn join_majority(&self, etcd: &Etcd, databases: &[&Node], state: &FenceState) -> Result<()> {
        let leader = etcd.get(&[&format!("{}leader", scope(self.topology))]).await?;
        for key in &leader {
            let _ = state.leader_age(key.revision);
        }
        let (_, recorded) = etcd.list(FENCED).await?;
        for slot in databases.iter().map(|n| &n.name).filter(|slot| !state.contains(slot)) {
            let by = recorded.iter().filter(|p| self.is_hubs(slot, &p.key)).count();
            let own = self.key(slot);
            if self.is_majority(by) || recorded.iter().any(|p| p.key == own) {
                state.insert(slot, self.fenced(false));
                self.neighbourhood.fence_node(slot).await;
                warn!(slot, "fenced {slot}: its fence is recorded in etcd");
            }
        }
        Ok(())
    }

    /// Fences `slot` on this hub if `slot` has held Patroni's leader key for `ttl` and this hub reaches a synchronous
    /// standby. Then deletes the leader key if a majority of the hubs fences `slot`. `reached`: the nodes that this hub
    /// has a route to. Returns true if nothing is left to do.
    ///
    /// # Errors
    /// If etcd does not answer. The next call continues where this one stopped.
    pub async fn release_leader_key(&self, slot: &str, reached: &BTreeSet<String>, state: &FenceState) -> Result<bool> {
        let scope = scope(self.topology);
        let (leader, sync) = (format!("{scope}leader"), format!("{scope}sync"));
        let found = self.etcd.get(&[&leader, &sync]).await?;
        let [holder, sync_key] = &found[..] else {
            return Err(Error::MissingKeys);
        };
        if holder.value != slot.as_bytes() {
            return Ok(true);
        }
        let unchanged = [Compare::Unchanged(&leader, holder.revision), Compare::Unchanged(&sync, sync_key.revision)];
        let sync_standbys = sync_standbys(slot, sync_key);
        if sync_standbys.is_empty() {
            self.unfence(slot, &unchanged, state).await?;
            return Ok(false);
        }
        if !sync_standbys.iter().any(|standby| *standby == self.own.name || reached.contains(standby)) {
            return Ok(false);
        }
        if state.leader_age(holder.revision) < Duration::from_secs(self.lease_seconds().into()) {
            return Ok(false);
        }
        let key = self.key(slot);
        if !state.is_recorded(slot) {
            // The fence stays also after an error: etcd may have executed a transaction whose reply is lost.
            state.insert(slot, self.fenced(false));
            self.neighbourhood.fence_node(slot).await;
            let lease = self.etcd.lease(self.lease_seconds()).await?;
            self.etcd.transact(&[], &[Op::PutFor(&key, b"", &lease)]).await?;
            state.insert(slot, self.fenced(true));
            warn!(slot, "fenced {slot}: this hub has no route to the primary");
        }
        let (_, records) = self.etcd.list(&format!("{FENCED}{slot}/")).await?;
        let records: Vec<&KeyValue> = records.iter().filter(|p| self.is_hubs(slot, &p.key)).collect();
        if !self.is_majority(records.len()) {
            return Ok(false);
        }
        let mut when: Vec<Compare> = records.iter().map(|p| Compare::Unchanged(&p.key, p.revision)).collect();
        when.extend(unchanged);
        // Patroni's cache applies the events one by one in this order, and a cycle may read the cache between them. The
        // old primary must not see the new revision of `sync` together with its leader key.
        let then = [Op::Delete(&leader), Op::Put(&sync, &sync_key.value)];
        if !self.etcd.transact(&when, &then).await? {
            return Ok(false);
        }
        let text = format!(
            "{} hubs cannot reach the primary {slot}: {} can take over",
            records.len(),
            sync_standbys.join(" or ")
        );
        log_event(Event::Deposed, &text);
        Ok(true)
    }

    /// Ends the fence of a primary that has no synchronous standby any more, because no node could take over.
    async fn unfence(&self, slot: &str, unchanged: &[Compare<'_>], state: &FenceState) -> Result<()> {
        if !state.contains(slot) {
            return Ok(());
        }
        // After this transaction no other hub counts this hub's record, unless it has deleted the leader key already.
        if self.etcd.transact(unchanged, &[Op::Delete(&self.key(slot))]).await? {
            state.remove(slot);
            self.neighbourhood.unfence_node(slot);
            info!(slot, "ended the fence of {slot}: the primary has no synchronous standby");
        }
        Ok(())
    }

    /// Returns the lease of a hub's record in etcd, seconds.
    fn lease_seconds(&self) -> u32 {
        u32::from(self.topology.database.ttl) * self.slow.min(3)
    }

    fn fenced(&self, recorded: bool) -> FencedNode {
        FencedNode { until: Instant::now() + Duration::from_secs(self.lease_seconds().into()) + MARGIN, recorded }
    }

    fn is_majority(&self, hubs: usize) -> bool {
        2 * hubs > self.topology.hubs.len()
    }

    fn key(&self, slot: &str) -> String {
        format!("{FENCED}{slot}/{}", self.own.name)
    }

    fn is_hubs(&self, slot: &str, key: &str) -> bool {
        let by = key.strip_prefix(FENCED).and_then(|k| k.strip_prefix(slot)).and_then(|k| k.strip_prefix('/'));
        by.is_some_and(|by| self.topology.hubs.iter().any(|hub| hub.name == by))
    }
}

/// Returns the synchronous standbys of this primary: they have every acknowledged write.
fn sync_standbys(primary: &str, sync: &KeyValue) -> Vec<String> {
    let sync: Sync = serde_json::from_slice(&sync.value).unwrap_or_default();
    if sync.leader.as_deref() != Some(primary) {
        return Vec::new();
    }
    let names = sync.sync_standby.unwrap_or_default();
    names.split(',').map(|n| n.trim().to_owned()).filter(|n| !n.is_empty() && n != primary).collect()
}

impl FenceState {
    /// Returns whether this hub fences the node now.
    #[must_use]
    pub fn contains(&self, slot: &str) -> bool {
        self.map().contains_key(slot)
    }

    fn is_recorded(&self, slot: &str) -> bool {
        self.map().get(slot).is_some_and(|fenced| fenced.recorded)
    }

    fn insert(&self, slot: &str, fenced: FencedNode) {
        self.map().insert(slot.to_owned(), fenced);
    }

    fn remove(&self, slot: &str) {
        self.map().remove(slot);
    }

    /// Returns how long ago this hub first read the leader key with this revision.
    fn leader_age(&self, revision: u64) -> Duration {
        let mut leader = self.leader.lock().unwrap_or_else(PoisonError::into_inner);
        let (_, since) = leader.take_if(|(read, _)| *read == revision).unwrap_or((revision, Instant::now()));
        *leader = Some((revision, since));
        since.elapsed()
    }

    /// Removes the fences that have ended, and returns their slots.
    fn take_ended(&self, now: Instant) -> Vec<String> {
        let mut map = self.map();
        let ended: Vec<String> = map.iter().filter(|(_, s)| now >= s.until).map(|(slot, _)| slot.clone()).collect();
        map.retain(|slot, _| !ended.contains(slot));
        ended
    }

    fn map(&self) -> MutexGuard<'_, BTreeMap<String, FencedNode>> {
        self.fenced.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl UnreachableTracker {
    /// Stores the nodes that the hub reaches now. Returns the nodes that it reached before, but not for at least
    /// `debounce`.
    fn update(&mut self, reached: BTreeSet<String>, now: Instant, debounce: Duration) -> Vec<String> {
        for slot in self.reached.difference(&reached) {
            self.since.entry(slot.clone()).or_insert(now);
        }
        self.since.retain(|slot, _| !reached.contains(slot));
        self.reached = reached;
        self.since.iter().filter(|(_, since)| now - **since >= debounce).map(|(slot, _)| slot.clone()).collect()
    }

    /// Ignores a node until it is reached again.
    fn forget(&mut self, slot: &str) {
        self.since.remove(slot);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn these(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|n| (*n).to_owned()).collect()
    }

    #[test]
    fn reports_nodes_that_stay_unreachable_after_they_were_reached() {
        let (start, debounce) = (Instant::now(), Duration::from_secs(1));
        let at = |ms| start + Duration::from_millis(ms);
        let mut unreachable = UnreachableTracker::default();
        assert!(unreachable.update(these(&[]), at(0), debounce).is_empty());
        assert!(unreachable.update(these(&["db-1", "db-2"]), at(5000), debounce).is_empty());
        assert!(unreachable.update(these(&["db-2"]), at(6000), debounce).is_empty());
        assert!(unreachable.update(these(&["db-2"]), at(6900), debounce).is_empty());
        // db-1 was reached again in between.
        assert!(unreachable.update(these(&["db-1", "db-2"]), at(7000), debounce).is_empty());
        assert!(unreachable.update(these(&["db-2"]), at(7200), debounce).is_empty());
        assert!(unreachable.update(these(&["db-2"]), at(8100), debounce).is_empty());
        assert_eq!(unreachable.update(these(&["db-2"]), at(8200), debounce), ["db-1"]);
        unreachable.forget("db-1");
        assert!(unreachable.update(these(&["db-2"]), at(99_000), debounce).is_empty());
        assert!(unreachable.update(these(&["db-1", "db-2"]), at(99_500), debounce).is_empty());
        assert!(unreachable.update(these(&[]), at(100_000), debounce).is_empty());
        assert_eq!(unreachable.update(these(&[]), at(101_000), debounce), ["db-1", "db-2"]);
    }

    #[test]
    fn reads_synchronous_standbys_of_this_primary() {
        let sync = |text: &str| KeyValue { key: String::new(), value: text.as_bytes().to_vec(), revision: 1 };
        assert_eq!(
            sync_standbys("db-1", &sync(r#"{"leader":"db-1","sync_standby":"db-2,db-3","quorum":0}"#)),
            ["db-2", "db-3"]
        );
        for without in [
            r#"{"leader":"db-2","sync_standby":"db-3"}"#,
            r#"{"leader":"db-1","sync_standby":null}"#,
            r#"{"leader":"db-1","sync_standby":""}"#,
            r#"{"leader":null}"#,
            "",
            "[]",
        ] {
            assert!(sync_standbys("db-1", &sync(without)).is_empty(), "{without}");
        }
    }

    proptest::proptest! {
        #[test]
        fn reads_every_name_that_patroni_wrote(names in proptest::collection::btree_set("db-[2-9]", 0..5)) {
            let names: Vec<String> = names.into_iter().collect();
            let value = serde_json::json!({ "leader": "db-1", "sync_standby": names.join(","), "quorum": 0 });
            let pair = KeyValue { key: String::new(), value: value.to_string().into_bytes(), revision: 1 };
            proptest::prop_assert_eq!(sync_standbys("db-1", &pair), names);
        }
    }
}
