//! The state of the model: etcd, database nodes, hubs, and what clients were told.
//!
//! Revisions are not numbered. A snapshot of a key carries `fresh`, which any write to the key clears: the
//! comparison of a transaction holds exactly while it is set. So the state space stays finite.

/// A database node or a hub, by its number.
pub type Id = u8;

/// A set of node numbers, hub numbers, or writes.
pub type Set = u8;

pub const fn bit(id: Id) -> Set {
    1 << id
}

pub const fn has(set: Set, id: Id) -> bool {
    set & bit(id) != 0
}

/// Patroni's `/sync` key: the node that manages it, and its synchronous standby.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Sync {
    pub leader: Option<Id>,
    pub standby: Option<Id>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Etcd {
    /// Patroni's leader key, which hangs on a lease of the node that it names.
    pub leader: Option<Id>,
    /// The lease is of the process that runs on the node now, not of one before a crash.
    pub current: bool,
    pub sync: Sync,
    /// Latest timeline in Patroni's `/history` key.
    pub timeline: u8,
    /// By hub: the slots that it has recorded as excluded.
    pub recorded: [Set; 3],
    /// Nodes whose cache has taken the first event of the last deposition and not the second.
    pub torn: Set,
    /// Value of `leader` and `current` before the last deposition, for those caches.
    pub deposed: Option<(Id, bool)>,
}

/// What a cycle of Patroni has loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Snapshot {
    pub leader: Option<Id>,
    /// The leader key hangs on the lease that this node holds now.
    pub own_lease: bool,
    pub sync: Sync,
    /// A write to `/sync` that compares the loaded revision succeeds.
    pub fresh: bool,
    pub timeline: u8,
}

/// Where Patroni's cycle is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Cycle {
    #[default]
    Idle,
    Loaded,
    /// `is_healthiest_node` has returned true.
    Healthiest,
    /// It has created the leader key and is to load again.
    Acquired,
    /// In `enforce_primary_role`: after `update_lock`, or after the second load.
    Enforcing,
    /// `/sync` permits what `synchronous_standby_names` is to become.
    Assigning(Option<Id>),
    /// `synchronous_standby_names` is set, and `/sync` is to follow.
    Confirming,
    /// `/sync` names this node: PostgreSQL is being promoted.
    Promoting,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
#[allow(clippy::struct_excessive_bools, reason = "each is a fact of its own, and states are compared and hashed")]
pub struct Node {
    pub up: bool,
    pub primary: bool,
    /// Writes in the WAL that is on disk.
    pub log: Set,
    pub timeline: u8,
    /// Writes of this term as primary that clients wait for.
    pub waiting: Set,
    /// `synchronous_standby_names` in effect.
    pub names: Option<Id>,
    /// The WAL when that was set: a standby that has it counts as synchronous.
    pub mark: Set,
    /// The primary that it is configured to follow.
    pub upstream: Option<Id>,
    /// A walsender of that primary serves it.
    pub streams: bool,
    /// Hubs that it has a way to.
    pub links: Set,
    pub cycle: Cycle,
    pub seen: Snapshot,
    /// Nodes that refreshed or created the leader key since this cycle loaded.
    pub overlaps: Set,
    /// This cycle has created the leader key.
    pub creates: bool,
    /// Nodes that refreshed or created it since this primary last fed its watchdog.
    pub unfed: Set,
}

/// Where a hub's deposition is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Deposition {
    #[default]
    Idle,
    /// It has read the leader key and `/sync`.
    Read,
    /// It has recorded its exclusion.
    Recorded,
    /// It has read a majority of recorded exclusions.
    Counted,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Hub {
    /// Slots whose packets it drops.
    pub excluded: Set,
    pub deposition: Deposition,
    pub slot: Id,
    /// The leader key, `/sync`, and the recorded exclusions are as they were read.
    pub fresh: [bool; 3],
}

/// How often each fault may still happen.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Budget {
    pub cuts: u8,
    pub crashes: u8,
    pub restarts: u8,
    pub lost_answers: u8,
    pub depositions: u8,
    pub writes: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct State {
    pub etcd: Etcd,
    /// The first `node_count` of these exist.
    pub all_nodes: [Node; 3],
    pub node_count: u8,
    pub all_hubs: [Hub; 3],
    pub hub_count: u8,
    /// Writes that clients were told are committed.
    pub acknowledged: Set,
    pub next_write: Id,
    pub budget: Budget,
    /// Depositions and promotions so far, for what should happen sometimes.
    pub deposed: bool,
    pub failed_over: bool,
}

impl State {
    pub fn nodes(&self) -> impl Iterator<Item = Id> + use<> {
        0..self.node_count
    }

    pub fn hubs(&self) -> impl Iterator<Item = Id> + use<> {
        0..self.hub_count
    }

    pub fn node(&self, id: Id) -> &Node {
        &self.all_nodes[usize::from(id)]
    }

    pub fn node_mut(&mut self, id: Id) -> &mut Node {
        &mut self.all_nodes[usize::from(id)]
    }

    pub fn hub(&self, id: Id) -> &Hub {
        &self.all_hubs[usize::from(id)]
    }

    pub fn hub_mut(&mut self, id: Id) -> &mut Hub {
        &mut self.all_hubs[usize::from(id)]
    }

    /// Whether some hub forwards the node's packets. Hubs reach each other and etcd.
    pub fn on_mesh(&self, id: Id) -> bool {
        let links = self.node(id).links;
        self.hubs().any(|hub| has(links, hub) && !has(self.hub(hub).excluded, id))
    }

    pub fn is_majority(&self, hubs: usize) -> bool {
        2 * hubs > usize::from(self.hub_count)
    }

    /// Hubs that have recorded that they exclude `slot`.
    pub fn recorded(&self, slot: Id) -> usize {
        self.hubs().filter(|hub| has(self.etcd.recorded[usize::from(*hub)], slot)).count()
    }

    /// Whether a walsender of `primary` serves `standby` and packets pass.
    pub fn replicates(&self, standby: Id, primary: Id) -> bool {
        self.is_streaming(standby, primary) && self.on_mesh(standby) && self.on_mesh(primary)
    }

    /// Whether `pg_stat_replication` of `primary` has `standby`: also for a while after the path was cut.
    pub fn is_streaming(&self, standby: Id, primary: Id) -> bool {
        let node = self.node(standby);
        node.up && !node.primary && node.streams && node.upstream == Some(primary)
    }

    /// Whether clients of `id` may be told that a new write is committed.
    pub fn can_acknowledge(&self, id: Id) -> bool {
        let node = self.node(id);
        node.up && node.primary && node.names.is_none_or(|standby| self.replicates(standby, id))
    }

    /// The node serves no standby any more.
    pub fn end_streams_of(&mut self, primary: Id) {
        self.all_nodes.iter_mut().filter(|n| n.upstream == Some(primary)).for_each(|n| n.streams = false);
    }

    /// `/leader` has changed.
    pub fn set_leader(&mut self, leader: Option<Id>) {
        (self.etcd.leader, self.etcd.current) = (leader, leader.is_some());
        self.all_hubs.iter_mut().for_each(|hub| hub.fresh[0] = false);
    }

    /// `/sync` is put: every loaded revision of it is stale.
    pub fn set_sync(&mut self, sync: Sync) {
        self.etcd.sync = sync;
        self.etcd.torn = 0;
        self.all_nodes.iter_mut().for_each(|node| node.seen.fresh = false);
        self.all_hubs.iter_mut().for_each(|hub| hub.fresh[1] = false);
    }

    /// A hub's recorded exclusion of a slot has changed.
    pub fn set_recorded(&mut self, hub: Id, slot: Id, recorded: bool) {
        let set = &mut self.etcd.recorded[usize::from(hub)];
        *set = if recorded { *set | bit(slot) } else { *set & !bit(slot) };
        self.all_hubs.iter_mut().filter(|h| h.slot == slot).for_each(|hub| hub.fresh[2] = false);
    }
}
