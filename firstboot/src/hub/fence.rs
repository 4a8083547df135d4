//! Frees the place of a primary that the hubs don't reach, before Patroni's lease on it ends.
//!
//! A hub that has had no route to the primary for a while removes the primary's key from its WireGuard
//! interface and records that in etcd. When a majority of the hubs has recorded it, one hub deletes Patroni's
//! leader key, and a synchronous standby takes the lead. A hub that reads such a majority excludes the node as
//! well, whoever leads by then, and so does an agent that restarts.
//!
//! Safety does not rest on the exclusion: the old primary may come back through a hub that has not read the
//! majority yet. It rests on one transaction, which compares what the hubs recorded, the leader key and `sync`,
//! deletes the leader key, and writes `sync` again with the same value and thereby a new revision. Patroni loads
//! all keys at the start of a cycle and compares the revision of `sync` in each write to it. So a cycle of the
//! old primary that began before the transaction can't remove its standby from `sync`, and without that it does
//! not acknowledge a write that the standby lacks; a cycle that begins later finds no leader key of its own.
//!
//! It also rests on the age of the leader key. A node checks whether it may lead by what it loaded first, creates
//! the leader key, and loads again before it writes `sync`. No such cycle lasts for `ttl`, so a hub does not
//! depose a node whose leader key it has not read for `ttl`: no cycle that began before that key is left.
//! `tests/model` checks all of this against every interleaving.
//!
//! ```text
//! /bakehouse/shut/SLOT/HUB    empty    HUB forwards nothing from or to SLOT (with a lease)
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use fleet::{Node, Topology};
use serde::Deserialize;

use crate::client::etcd::{Compare, Etcd, KeyValue, Op};
use crate::client::patroni::scope;
use crate::error::{Error, Result};
use crate::host::console::say;
use crate::host::journal::Event;
use crate::host::ticker::Ticker;
use crate::mesh::Routes;
use crate::node::neighbours::PeerTable;

const SHUT: &str = "/bakehouse/shut/";
/// How often hubs look.
const LOOK: Duration = Duration::from_millis(250);
/// Out of reach for so long, after BFD has given up: not a moment's trouble.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long one member of etcd may take: it may be on the very machine that is gone.
pub const ANSWER: Duration = Duration::from_secs(1);
/// How long the door stays shut after what is said in etcd has ended.
const MARGIN: Duration = Duration::from_secs(10);

/// One hub's part.
pub struct Fence<'a> {
    pub etcd: &'a Etcd,
    pub topology: &'a Topology,
    /// This hub.
    pub own: &'a Node,
    pub neighbourhood: &'a PeerTable,
    /// How much longer time-outs are on this machine.
    pub slow: u32,
}

/// Since when there is no way to a node that there was one to.
#[derive(Default)]
struct UnreachableTracker {
    reached: BTreeSet<String>,
    since: BTreeMap<String, Instant>,
}

/// One node that this hub excludes from the mesh.
#[derive(Clone, Copy, Debug)]
struct FencedNode {
    until: Instant,
    /// This process has recorded it in etcd.
    said: bool,
}

/// What one hub's fence remembers from one look to the next.
#[derive(Debug, Default)]
pub struct FenceState {
    /// The nodes that this hub excludes from the mesh.
    excluded: Mutex<BTreeMap<String, FencedNode>>,
    /// Revision of Patroni's leader key, and when this hub first read it.
    leader: Mutex<Option<(u64, Instant)>>,
}

/// What Patroni keeps of who follows.
#[derive(Default, Deserialize)]
struct Sync {
    leader: Option<String>,
    /// Names, with commas.
    sync_standby: Option<String>,
}

impl Fence<'_> {
    /// Watches the database nodes and what other hubs record, without end.
    ///
    /// # Errors
    /// Reading the kernel's routes fails.
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
        // With a connection of its own: a late answer here does not delay a failover.
        let (etcd, mut failed) = (self.etcd.reconnected(), false);
        loop {
            let joined = self.join_majority(&etcd, databases, state).await;
            if let (Err(e), false) = (&joined, failed) {
                println!("reading which nodes the other hubs exclude: {e}");
            }
            failed = joined.is_err();
            tokio::time::sleep(LOOK * self.slow.min(3)).await;
        }
    }

    async fn watch(&self, databases: &[&Node], state: &FenceState) -> Result<()> {
        let routes = Routes::open()?;
        let mut absent = UnreachableTracker::default();
        let mut ticker = Ticker::new("the fence", LOOK * self.slow.min(3));
        loop {
            ticker.tick().await;
            let ways = routes.hosts().await?;
            let reached = databases.iter().filter(|n| ways.contains(&n.address)).map(|n| n.name.clone()).collect();
            let now = Instant::now();
            for slot in absent.for_long(reached, now, PATIENCE * self.slow) {
                match self.release_leader_key(&slot, &absent.reached, state).await {
                    Ok(true) => absent.forget(&slot),
                    Ok(false) => {}
                    Err(e) => println!("{slot} is out of reach: {e}"),
                }
            }
            for slot in state.take_ended(now) {
                println!("{slot} may come back");
                self.neighbourhood.unfence_node(&slot);
            }
        }
    }

    /// Excludes those of `databases` that a majority of the hubs excludes, or that this hub excluded before its
    /// agent restarted. It records nothing: this hub has not missed the node itself.
    ///
    /// # Errors
    /// etcd does not answer.
    pub async fn join_majority(&self, etcd: &Etcd, databases: &[&Node], state: &FenceState) -> Result<()> {
        let leader = etcd.get(&[&format!("{}leader", scope(self.topology))]).await?;
        for key in &leader {
            let _ = state.leader_age(key.revision);
        }
        let (_, recorded) = etcd.list(SHUT).await?;
        for slot in databases.iter().map(|n| &n.name).filter(|slot| !state.contains(slot)) {
            let by = recorded.iter().filter(|p| self.is_hubs(slot, &p.key)).count();
            let own = self.key(slot);
            if self.is_majority(by) || recorded.iter().any(|p| p.key == own) {
                state.insert(slot, self.excluded(false));
                self.neighbourhood.fence_node(slot).await;
                println!("{slot} is shut out: the hubs have decided so");
            }
        }
        Ok(())
    }

    /// Deletes Patroni's leader key if `slot` has held it for `ttl`, a synchronous standby can take it, and a
    /// majority of the hubs excludes `slot`; first excludes it here. `reached` are the nodes that this hub has a
    /// route to. True if nothing is left to do.
    ///
    /// # Errors
    /// etcd does not answer: the next call goes on where this one stopped.
    pub async fn release_leader_key(&self, slot: &str, reached: &BTreeSet<String>, state: &FenceState) -> Result<bool> {
        let scope = scope(self.topology);
        let (leader, sync) = (format!("{scope}leader"), format!("{scope}sync"));
        let found = self.etcd.get(&[&leader, &sync]).await?;
        let [holds, follows] = &found[..] else { return Err(Error::Failed("etcd lost a key".to_owned())) };
        if holds.value != slot.as_bytes() {
            return Ok(true);
        }
        let unchanged = [Compare::Unchanged(&leader, holds.revision), Compare::Unchanged(&sync, follows.revision)];
        let sync_standbys = sync_standbys(slot, follows);
        if sync_standbys.is_empty() {
            self.readmit(slot, &unchanged, state).await?;
            return Ok(false);
        }
        if !sync_standbys.iter().any(|heir| *heir == self.own.name || reached.contains(heir)) {
            return Ok(false);
        }
        if state.leader_age(holds.revision) < Duration::from_secs(self.lasts().into()) {
            return Ok(false);
        }
        let key = self.key(slot);
        if !state.is_recorded(slot) {
            // A transaction whose answer is lost may have been carried out: the exclusion stands.
            state.insert(slot, self.excluded(false));
            self.neighbourhood.fence_node(slot).await;
            let lease = self.etcd.lease(self.lasts()).await?;
            self.etcd.transact(&[], &[Op::PutFor(&key, b"", &lease)]).await?;
            state.insert(slot, self.excluded(true));
            println!("{slot}, the primary, is out of reach: it is shut out");
        }
        let (_, said) = self.etcd.list(&format!("{SHUT}{slot}/")).await?;
        let said: Vec<&KeyValue> = said.iter().filter(|p| self.is_hubs(slot, &p.key)).collect();
        if !self.is_majority(said.len()) {
            return Ok(false);
        }
        let mut when: Vec<Compare> = said.iter().map(|p| Compare::Unchanged(&p.key, p.revision)).collect();
        when.extend(unchanged);
        // Patroni's cache takes the events one by one in this order, and a cycle may read it between them: the old
        // primary must not see the new revision of `sync` beside its leader key.
        let then = [Op::Delete(&leader), Op::Put(&sync, &follows.value)];
        if !self.etcd.transact(&when, &then).await? {
            return Ok(false);
        }
        let text =
            format!("{slot} is out of reach of {} hubs: {} may take its place", said.len(), sync_standbys.join(" or "));
        say(Event::Deposed, &text);
        Ok(true)
    }

    /// Ends the exclusion of a primary that no standby can follow any more: its place can't be given away.
    async fn readmit(&self, slot: &str, unchanged: &[Compare<'_>], state: &FenceState) -> Result<()> {
        if !state.contains(slot) {
            return Ok(());
        }
        // After this no other hub counts this one, unless it has deleted the leader key already.
        if self.etcd.transact(unchanged, &[Op::Delete(&self.key(slot))]).await? {
            state.remove(slot);
            self.neighbourhood.unfence_node(slot);
            println!("{slot}, the primary, is let in again: it has no synchronous standby");
        }
        Ok(())
    }

    /// Seconds for which etcd keeps what a hub records.
    fn lasts(&self) -> u32 {
        u32::from(self.topology.database.ttl) * self.slow.min(3)
    }

    fn excluded(&self, said: bool) -> FencedNode {
        FencedNode { until: Instant::now() + Duration::from_secs(self.lasts().into()) + MARGIN, said }
    }

    fn is_majority(&self, hubs: usize) -> bool {
        2 * hubs > self.topology.hubs.len()
    }

    fn key(&self, slot: &str) -> String {
        format!("{SHUT}{slot}/{}", self.own.name)
    }

    fn is_hubs(&self, slot: &str, key: &str) -> bool {
        let by = key.strip_prefix(SHUT).and_then(|k| k.strip_prefix(slot)).and_then(|k| k.strip_prefix('/'));
        by.is_some_and(|by| self.topology.hubs.iter().any(|hub| hub.name == by))
    }
}

/// Standbys that have every acknowledged write of this primary.
fn sync_standbys(primary: &str, sync: &KeyValue) -> Vec<String> {
    let sync: Sync = serde_json::from_slice(&sync.value).unwrap_or_default();
    if sync.leader.as_deref() != Some(primary) {
        return Vec::new();
    }
    let names = sync.sync_standby.unwrap_or_default();
    names.split(',').map(|n| n.trim().to_owned()).filter(|n| !n.is_empty() && n != primary).collect()
}

impl FenceState {
    /// Whether this hub excludes the node now.
    #[must_use]
    pub fn contains(&self, slot: &str) -> bool {
        self.map().contains_key(slot)
    }

    fn is_recorded(&self, slot: &str) -> bool {
        self.map().get(slot).is_some_and(|shut| shut.said)
    }

    fn insert(&self, slot: &str, shut: FencedNode) {
        self.map().insert(slot.to_owned(), shut);
    }

    fn remove(&self, slot: &str) {
        self.map().remove(slot);
    }

    /// How long ago this hub first read the leader key with this revision.
    fn leader_age(&self, revision: u64) -> Duration {
        let mut leader = self.leader.lock().unwrap_or_else(PoisonError::into_inner);
        let (_, since) = leader.take_if(|(read, _)| *read == revision).unwrap_or((revision, Instant::now()));
        *leader = Some((revision, since));
        since.elapsed()
    }

    /// Removes the exclusions that have ended, and returns their slots.
    fn take_ended(&self, now: Instant) -> Vec<String> {
        let mut map = self.map();
        let ended: Vec<String> = map.iter().filter(|(_, s)| now >= s.until).map(|(slot, _)| slot.clone()).collect();
        map.retain(|slot, _| !ended.contains(slot));
        ended
    }

    fn map(&self) -> MutexGuard<'_, BTreeMap<String, FencedNode>> {
        self.excluded.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl UnreachableTracker {
    /// Takes in who is reached now; gives those who were once, and have not been for so long.
    fn for_long(&mut self, reached: BTreeSet<String>, now: Instant, patience: Duration) -> Vec<String> {
        for slot in self.reached.difference(&reached) {
            self.since.entry(slot.clone()).or_insert(now);
        }
        self.since.retain(|slot, _| !reached.contains(slot));
        self.reached = reached;
        self.since.iter().filter(|(_, since)| now - **since >= patience).map(|(slot, _)| slot.clone()).collect()
    }

    /// It is not asked about again before it was reached.
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
    fn only_who_was_reached_is_missed_and_not_at_once() {
        let (start, patience) = (Instant::now(), Duration::from_secs(1));
        let at = |ms| start + Duration::from_millis(ms);
        let mut absent = UnreachableTracker::default();
        assert!(absent.for_long(these(&[]), at(0), patience).is_empty());
        assert!(absent.for_long(these(&["db-1", "db-2"]), at(5000), patience).is_empty());
        assert!(absent.for_long(these(&["db-2"]), at(6000), patience).is_empty());
        assert!(absent.for_long(these(&["db-2"]), at(6900), patience).is_empty());
        // It was there again in between.
        assert!(absent.for_long(these(&["db-1", "db-2"]), at(7000), patience).is_empty());
        assert!(absent.for_long(these(&["db-2"]), at(7200), patience).is_empty());
        assert!(absent.for_long(these(&["db-2"]), at(8100), patience).is_empty());
        assert_eq!(absent.for_long(these(&["db-2"]), at(8200), patience), ["db-1"]);
        absent.forget("db-1");
        assert!(absent.for_long(these(&["db-2"]), at(99_000), patience).is_empty());
        assert!(absent.for_long(these(&["db-1", "db-2"]), at(99_500), patience).is_empty());
        assert!(absent.for_long(these(&[]), at(100_000), patience).is_empty());
        assert_eq!(absent.for_long(these(&[]), at(101_000), patience), ["db-1", "db-2"]);
    }

    #[test]
    fn heirs_are_the_synchronous_standbys_of_this_primary() {
        let sync = |text: &str| KeyValue { key: String::new(), value: text.as_bytes().to_vec(), revision: 1 };
        assert_eq!(
            sync_standbys("db-1", &sync(r#"{"leader":"db-1","sync_standby":"db-2,db-3","quorum":0}"#)),
            ["db-2", "db-3"]
        );
        for nobody in [
            r#"{"leader":"db-2","sync_standby":"db-3"}"#,
            r#"{"leader":"db-1","sync_standby":null}"#,
            r#"{"leader":"db-1","sync_standby":""}"#,
            r#"{"leader":null}"#,
            "",
            "[]",
        ] {
            assert!(sync_standbys("db-1", &sync(nobody)).is_empty(), "{nobody}");
        }
    }

    proptest::proptest! {
        #[test]
        fn heirs_are_whom_patroni_named(names in proptest::collection::btree_set("db-[2-9]", 0..5)) {
            let names: Vec<String> = names.into_iter().collect();
            let value = serde_json::json!({ "leader": "db-1", "sync_standby": names.join(","), "quorum": 0 });
            let pair = KeyValue { key: String::new(), value: value.to_string().into_bytes(), revision: 1 };
            proptest::prop_assert_eq!(sync_standbys("db-1", &pair), names);
        }
    }
}
