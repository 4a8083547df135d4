//! Steps of a hub, as in `firstboot/src/hub/fence.rs`. Any other step may come between two calls to etcd.

use super::protocol::{Protocol, SyncPut};
use super::state::{Cycle, Deposition, Id, State, bit, has};

/// Returns the state after the next step of a hub that cannot reach `slot`, or `None` if it changes nothing.
pub(super) fn depose(state: &State, protocol: Protocol, id: Id, slot: Id) -> Option<State> {
    let hub = state.hub(id);
    if hub.deposition != Deposition::Idle && hub.slot != slot {
        return None;
    }
    let mut next = state.clone();
    match hub.deposition {
        Deposition::Idle => read(&mut next, protocol, id, slot),
        Deposition::Read => {
            let hub = next.hub_mut(id);
            hub.excluded |= bit(slot);
            hub.deposition = Deposition::Recorded;
            next.set_recorded(id, slot, true);
        }
        Deposition::Recorded => {
            let majority = next.is_majority(next.recorded(slot));
            let hub = next.hub_mut(id);
            hub.fresh[2] = majority;
            hub.deposition = if majority { Deposition::Counted } else { Deposition::Idle };
        }
        Deposition::Counted => transact(&mut next, protocol, id, slot),
    }
    let hub = next.hub_mut(id);
    if hub.deposition == Deposition::Idle {
        (hub.slot, hub.fresh) = (0, [false; 3]);
    }
    (next != *state).then_some(next)
}

fn read(state: &mut State, protocol: Protocol, id: Id, slot: Id) {
    if state.etcd.leader != Some(slot) {
        return;
    }
    let excluded = has(state.hub(id).excluded, slot);
    let heir = state.etcd.sync.standby.filter(|_| state.etcd.sync.leader == Some(slot));
    let Some(heir) = heir else {
        if protocol.compares_sync && excluded {
            // The hub does this in one transaction, which compares both keys.
            state.set_recorded(id, slot, false);
            state.hub_mut(id).excluded &= !bit(slot);
        }
        return;
    };
    if !state.on_mesh(heir) {
        return;
    }
    let recorded = excluded && has(state.etcd.recorded[usize::from(id)], slot);
    let hub = state.hub_mut(id);
    (hub.slot, hub.fresh) = (slot, [true, true, false]);
    hub.deposition = if recorded { Deposition::Recorded } else { Deposition::Read };
}

fn transact(state: &mut State, protocol: Protocol, id: Id, slot: Id) {
    let [leader, sync, recorded] = state.hub(id).fresh;
    state.hub_mut(id).deposition = Deposition::Idle;
    // A cycle is shorter than the minimum age of a leader key, so cycles that began before its creation have ended.
    let is_young = state.nodes().any(|other| {
        let node = state.node(other);
        let raced = node.seen.leader.is_none() && has(node.overlaps, slot);
        node.up && node.cycle != Cycle::Idle && (raced || other == slot && node.creates)
    });
    if !leader || !recorded || protocol.compares_sync && !sync || protocol.least_age && is_young {
        return;
    }
    if state.budget.depositions == 0 {
        return;
    }
    state.budget.depositions -= 1;
    state.deposed = true;
    let before = (slot, state.etcd.current);
    let (names, nodes) = (state.etcd.sync, state.nodes());
    state.set_leader(None);
    if protocol.sync_put != SyncPut::Never {
        state.set_sync(names);
        state.etcd.torn = nodes.fold(0, |set, node| set | bit(node));
        state.etcd.deposed = Some(before);
    }
}

/// Excludes a slot that the majority excludes, or that this hub excluded before its agent restarted.
pub(super) fn join(state: &State, id: Id, slot: Id) -> Option<State> {
    let decided = state.is_majority(state.recorded(slot)) || has(state.etcd.recorded[usize::from(id)], slot);
    if !decided || has(state.hub(id).excluded, slot) {
        return None;
    }
    let mut next = state.clone();
    next.hub_mut(id).excluded |= bit(slot);
    Some(next)
}

/// Restarts the hub's agent, which loses its state in memory.
pub(super) fn restart(state: &State, protocol: Protocol, id: Id) -> Option<State> {
    let mut next = state.clone();
    next.budget.restarts = next.budget.restarts.checked_sub(1)?;
    *next.hub_mut(id) = super::state::Hub::default();
    if !protocol.joins {
        state.nodes().for_each(|slot| next.set_recorded(id, slot, false));
    }
    Some(next)
}
