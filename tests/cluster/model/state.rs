//! State of the model: etcd, database nodes, hubs, and the writes that clients know to be committed.
//!
//! Revisions have no numbers. Any write to a key clears `fresh` in each snapshot of it, and a transaction's comparison
//! succeeds exactly while `fresh` is set. This keeps the state space finite.

/// Number of a database node or a hub.
pub(super) type Id = u8;

/// A set of node numbers, hub numbers, or writes.
pub(super) type Set = u8;

pub(super) const fn bit(id: Id) -> Set {
    1 << id
}

pub(super) const fn has(set: Set, id: Id) -> bool {
    set & bit(id) != 0
}

/// Patroni's `/sync` key: the node that manages it, and its synchronous standby.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Sync {
    pub leader: Option<Id>,
    pub standby: Option<Id>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Etcd {
    /// Patroni's leader key. It is attached to a lease of the node that it names.
    pub leader: Option<Id>,
    /// The lease belongs to the process that runs on the node now, not to one before a crash.
    pub current: bool,
    pub sync: Sync,
    /// Latest timeline in Patroni's `/history` key.
    pub timeline: u8,
    /// For each hub, the slots that it has recorded as excluded.
    pub recorded: [Set; 3],
    /// Nodes whose cache may lack the second event of the last deposition.
    pub torn: Set,
    /// Values of `leader` and `current` before the last deposition, for those caches.
    pub deposed: Option<(Id, bool)>,
}

/// Keys that a cycle of Patroni has loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Snapshot {
    pub leader: Option<Id>,
    /// The leader key is attached to the lease that this node holds now.
    pub own_lease: bool,
    pub sync: Sync,
    /// A write to `/sync` that compares the loaded revision succeeds.
    pub fresh: bool,
    pub timeline: u8,
}

/// Step of a Patroni cycle.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) enum Cycle {
    #[default]
    Idle,
    Loaded,
    /// `is_healthiest_node` has returned true.
    Healthiest,
    /// It has created the leader key and loads again next.
    Acquired,
    /// In `enforce_primary_role`: after `update_lock`, or after the second load.
    Enforcing,
    /// `/sync` permits this new value of `synchronous_standby_names`.
    Assigning(Option<Id>),
    /// `synchronous_standby_names` is set, and Patroni writes `/sync` next.
    Confirming,
    /// `/sync` names this node, and Patroni promotes PostgreSQL.
    Promoting,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
#[allow(clippy::struct_excessive_bools, reason = "each is a fact of its own, and states are compared and hashed")]
pub(super) struct Node {
    pub up: bool,
    pub primary: bool,
    /// Writes in the WAL on disk.
    pub log: Set,
    pub timeline: u8,
    /// Writes since the promotion that clients wait for.
    pub waiting: Set,
    /// `synchronous_standby_names` in effect.
    pub names: Option<Id>,
    /// The WAL when `names` was set. A standby that has all of it counts as synchronous.
    pub mark: Set,
    /// Primary in the node's replication settings.
    pub upstream: Option<Id>,
    /// A walsender of that primary serves the node.
    pub streams: bool,
    /// Hubs to which the node has a network path.
    pub links: Set,
    pub cycle: Cycle,
    pub seen: Snapshot,
    /// Nodes that refreshed or created the leader key since this cycle loaded.
    pub overlaps: Set,
    /// This cycle has created the leader key.
    pub creates: bool,
    /// Nodes that refreshed or created the leader key since this primary last pinged its watchdog.
    pub unfed: Set,
}

/// Step of a hub's deposition.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) enum Deposition {
    #[default]
    Idle,
    /// The hub has read the leader key and `/sync`.
    Read,
    /// The hub has recorded its exclusion.
    Recorded,
    /// The hub has read the recorded exclusions of a majority.
    Counted,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Hub {
    /// Slots whose packets it drops.
    pub excluded: Set,
    pub deposition: Deposition,
    pub slot: Id,
    /// The leader key, `/sync`, and the recorded exclusions have not changed since the hub read them.
    pub fresh: [bool; 3],
}

/// How often each fault may still happen.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Budget {
    pub cuts: u8,
    pub crashes: u8,
    pub restarts: u8,
    pub lost_answers: u8,
    pub depositions: u8,
    pub writes: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct State {
    pub etcd: Etcd,
    /// The first `node_count` of these exist.
    pub all_nodes: [Node; 3],
    pub node_count: u8,
    pub all_hubs: [Hub; 3],
    pub hub_count: u8,
    /// Writes that a primary has acknowledged to clients.
    pub acknowledged: Set,
    pub next_write: Id,
    pub budget: Budget,
    /// A deposition and a promotion have happened, for the properties that must hold sometimes.
    pub deposed: bool,
    pub failed_over: bool,
}

impl State {
    pub(super) fn nodes(&self) -> impl Iterator<Item = Id> + use<> {
        0..self.node_count
    }

    pub(super) fn hubs(&self) -> impl Iterator<Item = Id> + use<> {
        0..self.hub_count
    }

    pub(super) fn node(&self, id: Id) -> &Node {
        &self.all_nodes[usize::from(id)]
    }

    pub(super) fn node_mut(&mut self, id: Id) -> &mut Node {
        &mut self.all_nodes[usize::from(id)]
    }

    pub(super) fn hub(&self, id: Id) -> &Hub {
        &self.all_hubs[usize::from(id)]
    }

    pub(super) fn hub_mut(&mut self, id: Id) -> &mut Hub {
        &mut self.all_hubs[usize::from(id)]
    }

    /// Returns whether a hub forwards the node's packets. Hubs always reach each other and etcd.
    pub(super) fn on_mesh(&self, id: Id) -> bool {
        let links = self.node(id).links;
        self.hubs().any(|hub| has(links, hub) && !has(self.hub(hub).excluded, id))
    }

    pub(super) fn is_majority(&self, hubs: usize) -> bool {
        2 * hubs > usize::from(self.hub_count)
    }

    /// Counts the hubs that have recorded an exclusion of `slot`.
    pub(super) fn recorded(&self, slot: Id) -> usize {
        self.hubs().filter(|hub| has(self.etcd.recorded[usize::from(*hub)], slot)).count()
    }

    /// Returns whether a walsender of `primary` serves `standby` and packets pass.
    pub(super) fn replicates(&self, standby: Id, primary: Id) -> bool {
        self.is_streaming(standby, primary) && self.on_mesh(standby) && self.on_mesh(primary)
    }

    /// Returns whether `pg_stat_replication` of `primary` lists `standby`, which it still does for a while after the
    /// path has failed.
    pub(super) fn is_streaming(&self, standby: Id, primary: Id) -> bool {
        let node = self.node(standby);
        node.up && !node.primary && node.streams && node.upstream == Some(primary)
    }

    /// Returns whether `id` can acknowledge a new write to its clients.
    pub(super) fn can_acknowledge(&self, id: Id) -> bool {
        let node = self.node(id);
        node.up && node.primary && node.names.is_none_or(|standby| self.replicates(standby, id))
    }

    /// Ends replication from this primary to all standbys.
    pub(super) fn end_streams_of(&mut self, primary: Id) {
        self.all_nodes.iter_mut().filter(|n| n.upstream == Some(primary)).for_each(|n| n.streams = false);
    }

    /// Writes or deletes `/leader`.
    pub(super) fn set_leader(&mut self, leader: Option<Id>) {
        (self.etcd.leader, self.etcd.current) = (leader, leader.is_some());
        self.all_hubs.iter_mut().for_each(|hub| hub.fresh[0] = false);
    }

    /// Puts `/sync`, which makes every loaded revision of it stale.
    pub(super) fn set_sync(&mut self, sync: Sync) {
        self.etcd.sync = sync;
        self.etcd.torn = 0;
        self.all_nodes.iter_mut().for_each(|node| node.seen.fresh = false);
        self.all_hubs.iter_mut().for_each(|hub| hub.fresh[1] = false);
    }

    /// Writes or deletes a hub's record of an exclusion.
    pub(super) fn set_recorded(&mut self, hub: Id, slot: Id, recorded: bool) {
        let set = &mut self.etcd.recorded[usize::from(hub)];
        *set = if recorded { *set | bit(slot) } else { *set & !bit(slot) };
        self.all_hubs.iter_mut().filter(|h| h.slot == slot).for_each(|hub| hub.fresh[2] = false);
    }
}
