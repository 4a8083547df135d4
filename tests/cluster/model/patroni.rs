//! Steps of Patroni's cycle, as in `ha.py`, `postgresql/sync.py` and `dcs/etcd3.py` of Patroni 4.1. Any other step may
//! come between two of them.

use super::protocol::Outcome;
use super::state::{Cycle, Id, Snapshot, State, Sync, bit};

/// Returns the state after one step of the node's cycle, or `None` if the step is impossible or changes nothing.
pub(super) fn step(state: &State, id: Id, outcome: Outcome) -> Option<State> {
    let node = state.node(id);
    if !node.up {
        return None;
    }
    let mut next = state.clone();
    let done = match node.cycle {
        Cycle::Idle => load(&mut next, id, outcome, Cycle::Loaded),
        Cycle::Loaded => decide(&mut next, id, outcome),
        Cycle::Healthiest => acquire(&mut next, id, outcome),
        // `load_cluster_from_dcs` after `acquire_lock`. Patroni does not check again whether this node may lead.
        Cycle::Acquired => load(&mut next, id, outcome, Cycle::Enforcing),
        Cycle::Enforcing if node.primary => reduce(&mut next, id, outcome),
        Cycle::Enforcing => prepromote(&mut next, id, outcome),
        Cycle::Assigning(standby) => local(outcome) && assign(&mut next, id, standby),
        Cycle::Confirming => confirm(&mut next, id, outcome),
        Cycle::Promoting => local(outcome) && promote(&mut next, id),
    };
    (done && next != *state).then_some(next)
}

fn local(outcome: Outcome) -> bool {
    outcome == Outcome::Done
}

/// Begins a cycle that reads the cache between the two events of a deposition.
pub(super) fn load_torn(state: &State, id: Id, sync_first: bool) -> Option<State> {
    let mut next = state.clone();
    if state.etcd.torn & bit(id) == 0 || state.node(id).cycle != Cycle::Idle || !state.node(id).up {
        return None;
    }
    let (leader, current) = state.etcd.deposed?;
    begin(&mut next, id, Cycle::Loaded);
    let seen = &mut next.node_mut(id).seen;
    if sync_first {
        (seen.leader, seen.own_lease) = (Some(leader), leader == id && current);
    } else {
        // The cache lacks the event of `/sync`.
        seen.fresh = false;
    }
    Some(next)
}

fn begin(state: &mut State, id: Id, cycle: Cycle) {
    let etcd = &state.etcd;
    let seen = Snapshot {
        leader: etcd.leader,
        own_lease: etcd.leader == Some(id) && etcd.current,
        sync: etcd.sync,
        fresh: true,
        timeline: etcd.timeline,
    };
    let node = state.node_mut(id);
    (node.seen, node.cycle, node.overlaps) = (seen, cycle, 0);
    state.etcd.torn &= !bit(id);
}

fn load(state: &mut State, id: Id, outcome: Outcome, cycle: Cycle) -> bool {
    match outcome {
        Outcome::Done if state.on_mesh(id) => begin(state, id, cycle),
        Outcome::Failed if !state.on_mesh(id) => without_etcd(state, id),
        _ => return false,
    }
    true
}

fn end(state: &mut State, id: Id) -> bool {
    let node = state.node_mut(id);
    (node.cycle, node.seen, node.overlaps, node.creates) = (Cycle::Idle, Snapshot::default(), 0, false);
    true
}

/// `_handle_dcs_error`: Patroni demotes a primary.
fn without_etcd(state: &mut State, id: Id) {
    if state.node(id).primary {
        demote(state, id);
    }
    end(state, id);
}

fn demote(state: &mut State, id: Id) -> bool {
    state.end_streams_of(id);
    let node = state.node_mut(id);
    (node.primary, node.names, node.waiting, node.mark, node.unfed) = (false, None, 0, 0, 0);
    (node.upstream, node.streams) = (None, false);
    end(state, id)
}

/// Follows the owner of the leader key, after `pg_rewind` if the two have diverged.
fn follow(state: &mut State, id: Id, leader: Option<Id>) -> bool {
    if state.node(id).primary {
        demote(state, id);
    }
    if let Some(leader) = leader.filter(|l| *l != id && state.node(*l).primary && state.node(*l).up) {
        let paths = state.on_mesh(id) && state.on_mesh(leader);
        let (log, timeline) = (state.node(leader).log, state.node(leader).timeline);
        let node = state.node_mut(id);
        if paths && (node.upstream != Some(leader) || !node.streams) {
            node.log &= log;
            node.timeline = timeline;
            (node.upstream, node.streams) = (Some(leader), true);
        }
    }
    end(state, id)
}

fn decide(state: &mut State, id: Id, outcome: Outcome) -> bool {
    let (node, seen) = (state.node(id).clone(), state.node(id).seen);
    match seen.leader {
        Some(leader) if leader == id => update_lock(state, id, outcome),
        Some(_) => local(outcome) && follow(state, id, seen.leader),
        None if !local(outcome) => false,
        None if node.timeline < seen.timeline => follow(state, id, None),
        None if node.primary => {
            state.node_mut(id).cycle = Cycle::Healthiest;
            true
        }
        None => {
            // Without synchronous mode (an empty `/sync`) any node may lead.
            let eligible = seen.sync.leader.is_none_or(|l| l == id || seen.sync.standby == Some(id));
            // Patroni's check for a live primary, among the members in `/sync` that answer.
            let alive = |l: Id| l != id && state.node(l).up && state.node(l).primary && state.on_mesh(l);
            let others = [seen.sync.leader, seen.sync.standby];
            if !eligible || state.on_mesh(id) && others.into_iter().flatten().any(alive) {
                return follow(state, id, None);
            }
            state.node_mut(id).cycle = Cycle::Healthiest;
            true
        }
    }
}

/// `_update_leader`: if the loaded key has this node's lease, Patroni refreshes the lease even if the key is gone.
fn update_lock(state: &mut State, id: Id, outcome: Outcome) -> bool {
    match outcome {
        Outcome::Failed if !state.on_mesh(id) => {
            without_etcd(state, id);
            return true;
        }
        Outcome::Done | Outcome::Unanswered if state.on_mesh(id) => {}
        _ => return false,
    }
    if !state.node(id).seen.own_lease {
        if state.etcd.leader.is_some_and(|l| l != id) {
            return if state.node(id).primary { demote(state, id) } else { end(state, id) };
        }
        state.set_leader(Some(id));
        let node = state.node_mut(id);
        (node.seen.own_lease, node.creates) = (true, true);
    }
    overlap(state, id);
    if outcome == Outcome::Unanswered {
        without_etcd(state, id);
    } else {
        state.node_mut(id).cycle = Cycle::Enforcing;
    }
    true
}

/// Refreshes the leader key's lease while other nodes are in a cycle.
fn overlap(state: &mut State, id: Id) {
    for other in state.nodes().filter(|o| *o != id) {
        let node = state.node_mut(other);
        if node.cycle != Cycle::Idle {
            node.overlaps |= bit(id);
        }
        if node.primary {
            node.unfed |= bit(id);
        }
    }
    state.node_mut(id).unfed = 0;
}

fn acquire(state: &mut State, id: Id, outcome: Outcome) -> bool {
    if outcome == Outcome::Failed || !state.on_mesh(id) {
        let failed = outcome == Outcome::Failed && !state.on_mesh(id);
        if failed {
            without_etcd(state, id);
        }
        return failed;
    }
    if state.etcd.leader.is_some() {
        return local(outcome) && follow(state, id, None);
    }
    state.set_leader(Some(id));
    state.node_mut(id).creates = true;
    overlap(state, id);
    if outcome == Outcome::Unanswered {
        without_etcd(state, id);
    } else {
        state.node_mut(id).cycle = Cycle::Acquired;
    }
    true
}

/// `write_sync_state`: returns false if the loaded revision is stale or etcd does not answer, and the caller ends the
/// cycle. Returns `None` if the outcome is impossible now.
fn write_sync(state: &mut State, id: Id, standby: Option<Id>, outcome: Outcome) -> Option<bool> {
    match (outcome, state.on_mesh(id)) {
        (Outcome::Failed, false) => return Some(false),
        (Outcome::Failed, true) | (Outcome::Done | Outcome::Unanswered, false) => return None,
        _ => {}
    }
    if !state.node(id).seen.fresh {
        return (outcome == Outcome::Done).then_some(false);
    }
    let sync = Sync { leader: Some(id), standby };
    state.set_sync(sync);
    if outcome == Outcome::Unanswered {
        return Some(false);
    }
    let seen = &mut state.node_mut(id).seen;
    (seen.sync, seen.fresh) = (sync, true);
    Some(true)
}

/// Returns `active` of `_process_multisync_replication`, and the same standby if it is in `sync_confirmed`.
fn current_state(state: &State, id: Id) -> (Option<Id>, Option<Id>) {
    let node = state.node(id);
    let streaming = |s: &Id| state.is_streaming(*s, id);
    let picked = node.names.filter(streaming).or_else(|| state.nodes().filter(|s| *s != id).find(streaming));
    let confirmed = picked.filter(|s| {
        let caught_up = node.mark & !state.node(*s).log == 0;
        node.names == Some(*s) && (node.seen.sync.standby == Some(*s) || caught_up)
    });
    (picked, confirmed)
}

/// `_process_multisync_replication` until the change of `synchronous_standby_names`.
fn reduce(state: &mut State, id: Id, outcome: Outcome) -> bool {
    let timeline = state.node(id).timeline;
    if state.on_mesh(id) {
        // `update_cluster_history`
        state.etcd.timeline = state.etcd.timeline.max(timeline);
    }
    let seen = state.node(id).seen;
    let (picked, confirmed) = current_state(state, id);
    let own = seen.sync.leader == Some(id);
    let voters = seen.sync.standby.filter(|_| own);
    if !own || picked == voters && voters != confirmed {
        // The cycle repeats this step with the written `/sync`.
        return match write_sync(state, id, if own { confirmed } else { None }, outcome) {
            Some(true) => true,
            Some(false) => end(state, id),
            None => false,
        };
    }
    if picked == voters && picked == state.node(id).names {
        return local(outcome) && end(state, id);
    }
    if voters.is_some() && voters != confirmed {
        match write_sync(state, id, None, outcome) {
            Some(true) => {}
            Some(false) => return end(state, id),
            None => return false,
        }
    } else if !local(outcome) {
        return false;
    }
    state.node_mut(id).cycle = Cycle::Assigning(picked);
    true
}

fn assign(state: &mut State, id: Id, standby: Option<Id>) -> bool {
    let node = state.node_mut(id);
    if node.names != standby {
        (node.names, node.mark) = (standby, node.log);
    }
    if standby.is_none() {
        return end(state, id);
    }
    node.cycle = Cycle::Confirming;
    true
}

fn confirm(state: &mut State, id: Id, outcome: Outcome) -> bool {
    let (_, confirmed) = current_state(state, id);
    if confirmed.is_none() || confirmed == state.node(id).seen.sync.standby {
        return local(outcome) && end(state, id);
    }
    write_sync(state, id, confirmed, outcome).is_some() && end(state, id)
}

/// `_process_multisync_prepromote`: compares the loaded revision, and does not check whether `/sync` names this node.
fn prepromote(state: &mut State, id: Id, outcome: Outcome) -> bool {
    match write_sync(state, id, None, outcome) {
        Some(true) => {
            let node = state.node_mut(id);
            (node.names, node.cycle) = (None, Cycle::Promoting);
            true
        }
        Some(false) => end(state, id),
        None => false,
    }
}

fn promote(state: &mut State, id: Id) -> bool {
    let node = state.node_mut(id);
    (node.primary, node.timeline) = (true, node.timeline + 1);
    (node.upstream, node.streams, node.waiting, node.mark) = (None, false, 0, 0);
    state.failed_over = true;
    end(state, id)
}
