//! The model for the checker: actions and properties.

use stateright::{Model, Property};

use super::state::{Budget, Cycle, Etcd, Id, Node, Set, State, Sync, bit, has};
use super::{hub, patroni};

/// The hubs' protocol, with a switch for each part, so that a test can leave one out.
#[derive(Clone, Copy, Debug)]
pub(super) struct Protocol {
    /// The transaction compares `/sync` as well.
    pub compares_sync: bool,
    /// The transaction writes `/sync` again.
    pub sync_put: SyncPut,
    /// Hubs exclude slots that a majority excludes, also after a restart.
    pub joins: bool,
    /// Hubs do not delete a leader key that was created less than `ttl` ago.
    pub least_age: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SyncPut {
    Never,
    BeforeDeletion,
    AfterDeletion,
}

impl Protocol {
    /// The first version: the transaction compared and deleted the leader key only.
    pub(super) const FIRST: Self =
        Self { compares_sync: false, sync_put: SyncPut::Never, joins: false, least_age: false };
    /// The version in `firstboot/src/hub/fence.rs`.
    pub(super) const CURRENT: Self =
        Self { compares_sync: true, sync_put: SyncPut::AfterDeletion, joins: true, least_age: true };
}

/// Result of a call to etcd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Done,
    /// The call did not reach etcd before Patroni gave up.
    Failed,
    /// etcd executed the call, and its reply is lost.
    Unanswered,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// All of a node's network paths fail.
    CutUplink(Id),
    Cut(Id, Id),
    Heal(Id, Id),
    Crash(Id),
    Start(Id),
    /// The leader key's lease expires.
    Expire,
    Disconnect(Id),
    Reconnect(Id),
    Replicate(Id),
    Write(Id),
    Acknowledge(Id),
    Cycle(Id, Outcome),
    /// A load between the two events of a deposition.
    LoadTorn(Id),
    Depose(Id, Id),
    Join(Id, Id),
    RestartHub(Id),
    /// A hub's record of an exclusion expires.
    Forget(Id, Id),
    /// A hub forwards the node's packets again.
    Readmit(Id, Id),
}

#[derive(Clone, Debug)]
pub(super) struct Fleet {
    pub protocol: Protocol,
    pub nodes: u8,
    pub hubs: u8,
    pub budget: Budget,
    /// A hub may suspect a node at any time, and not only when no hub has a path to it.
    pub suspects_anyone: bool,
    /// Hubs' records and exclusions expire.
    pub forgets: bool,
}

pub(super) const ONE_PRIMARY: &str = "one primary acknowledges";
pub(super) const NONE_LOST: &str = "no acknowledged write is lost";
pub(super) const DEPOSED: &str = "hubs depose a primary";
pub(super) const FAILED_OVER: &str = "a standby takes over and acknowledges after a deposition";

impl Model for Fleet {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let links = (1 << self.hubs) - 1;
        let standby = Node { up: true, timeline: 1, links, upstream: Some(0), streams: true, ..Node::default() };
        let primary = Node { primary: true, upstream: None, streams: false, names: Some(1), ..standby.clone() };
        let third = if self.nodes > 2 { standby.clone() } else { Node::default() };
        let sync = Sync { leader: Some(0), standby: Some(1) };
        vec![State {
            etcd: Etcd { leader: Some(0), current: true, sync, timeline: 1, ..Etcd::default() },
            all_nodes: [primary, standby, third],
            node_count: self.nodes,
            all_hubs: Default::default(),
            hub_count: self.hubs,
            acknowledged: 0,
            next_write: 0,
            budget: self.budget.clone(),
            deposed: false,
            failed_over: false,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        for id in state.nodes() {
            let outcomes = [Outcome::Done, Outcome::Failed, Outcome::Unanswered];
            actions.extend(outcomes.map(|outcome| Action::Cycle(id, outcome)));
            actions.extend([
                Action::CutUplink(id),
                Action::Crash(id),
                Action::Start(id),
                Action::Disconnect(id),
                Action::Reconnect(id),
                Action::Replicate(id),
                Action::Write(id),
                Action::Acknowledge(id),
                Action::LoadTorn(id),
            ]);
            for hub in state.hubs() {
                actions.extend([Action::Cut(id, hub), Action::Heal(id, hub), Action::Depose(hub, id)]);
                actions.extend([Action::Forget(hub, id), Action::Readmit(hub, id), Action::Join(hub, id)]);
            }
        }
        actions.extend(state.hubs().map(Action::RestartHub));
        actions.push(Action::Expire);
    }

    fn next_state(&self, state: &State, action: Action) -> Option<State> {
        match action {
            Action::CutUplink(id) => cut(state, id, 0),
            Action::Cut(id, hub) => cut(state, id, state.node(id).links & !bit(hub)),
            Action::Heal(id, hub) => change(state, |next| next.node_mut(id).links |= bit(hub)),
            Action::Crash(id) => crash(state, id),
            Action::Start(id) if !state.node(id).up => change(state, |next| next.node_mut(id).up = true),
            Action::Expire => expire(state),
            Action::Disconnect(id) => disconnect(state, id),
            Action::Reconnect(id) => reconnect(state, id),
            Action::Replicate(id) => replicate(state, id),
            Action::Write(id) => write(state, id),
            Action::Acknowledge(id) => acknowledge(state, id),
            Action::Cycle(id, Outcome::Unanswered) => {
                let mut next = patroni::step(state, id, Outcome::Unanswered)?;
                next.budget.lost_answers = next.budget.lost_answers.checked_sub(1)?;
                Some(next)
            }
            Action::Cycle(id, outcome) => patroni::step(state, id, outcome),
            Action::LoadTorn(id) => patroni::load_torn(state, id, self.protocol.sync_put == SyncPut::BeforeDeletion),
            Action::Depose(hub, slot) => {
                // A hub continues a deposition also if the node is reachable again.
                let goes_on = state.hub(hub).deposition != super::state::Deposition::Idle;
                let misses = goes_on || self.suspects_anyone || !state.on_mesh(slot);
                misses.then(|| hub::depose(state, self.protocol, hub, slot)).flatten()
            }
            Action::Join(hub, slot) if self.protocol.joins => hub::join(state, hub, slot),
            Action::RestartHub(hub) => hub::restart(state, self.protocol, hub),
            // A record lasts for `ttl`, and every hub has read it by then.
            Action::Forget(hub, slot) if self.forgets && !is_pending(state, slot) => {
                change(state, |next| next.set_recorded(hub, slot, false))
            }
            // An exclusion outlasts the watchdog of the primary that it separates from etcd.
            Action::Readmit(hub, slot) if self.forgets && !state.node(slot).primary => {
                let recorded = has(state.etcd.recorded[usize::from(hub)], slot);
                (!recorded).then(|| change(state, |next| next.hub_mut(hub).excluded &= !bit(slot))).flatten()
            }
            Action::Start(_) | Action::Join(..) | Action::Forget(..) | Action::Readmit(..) => None,
        }
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(ONE_PRIMARY, |_, state: &State| {
                state.nodes().filter(|id| state.can_acknowledge(*id)).count() <= 1
            }),
            Property::always(NONE_LOST, |_, state: &State| {
                let lacks = |id: Id| state.node(id).primary && state.acknowledged & !state.node(id).log != 0;
                !state.etcd.leader.is_some_and(lacks)
            }),
            Property::sometimes(DEPOSED, |_, state: &State| state.deposed),
            Property::sometimes(FAILED_OVER, |_, state: &State| {
                let acknowledges = |id: Id| id != 0 && state.node(id).primary && state.acknowledged != 0;
                state.deposed && state.failed_over && state.etcd.leader.is_some_and(acknowledges)
            }),
        ]
    }

    fn within_boundary(&self, state: &State) -> bool {
        state.all_nodes.iter().all(|n| n.timeline <= 4)
    }
}

/// Returns whether a majority excludes the slot and a hub has not read that yet.
fn is_pending(state: &State, slot: Id) -> bool {
    state.is_majority(state.recorded(slot)) && !state.hubs().all(|hub| has(state.hub(hub).excluded, slot))
}

fn change(state: &State, change: impl FnOnce(&mut State)) -> Option<State> {
    let mut next = state.clone();
    change(&mut next);
    (next != *state).then_some(next)
}

fn cut(state: &State, id: Id, links: Set) -> Option<State> {
    let mut next = change(state, |next| next.node_mut(id).links = links)?;
    next.budget.cuts = next.budget.cuts.checked_sub(1)?;
    Some(next)
}

fn crash(state: &State, id: Id) -> Option<State> {
    let mut next = state.clone();
    next.budget.crashes = next.budget.crashes.checked_sub(1)?;
    if !state.node(id).up {
        return None;
    }
    next.end_streams_of(id);
    let Node { log, timeline, links, .. } = *state.node(id);
    *next.node_mut(id) = Node { log, timeline, links, ..Node::default() };
    if next.etcd.leader == Some(id) {
        next.etcd.current = false;
    }
    Some(next)
}

/// Expires the leader key's lease. A primary that has not refreshed its lease for `ttl` was demoted or reset by the
/// watchdog, and every cycle is shorter than `ttl`. So a lease that was refreshed during a cycle, or after a primary
/// last pinged its watchdog, does not expire before the cycle's end or the reset. A hub also reads within `ttl` which
/// nodes a majority excludes.
fn expire(state: &State) -> Option<State> {
    let id = state.etcd.leader?;
    let node = state.node(id);
    let leads = node.primary || !matches!(node.cycle, Cycle::Idle | Cycle::Loaded);
    let outlasts = |n: &Node| n.up && (n.cycle != Cycle::Idle && has(n.overlaps, id) || has(n.unfed, id));
    if leads || state.nodes().any(|slot| state.node(slot).primary && is_pending(state, slot)) {
        return None;
    }
    if state.all_nodes.iter().any(outlasts) {
        return None;
    }
    change(state, |next| {
        next.set_leader(None);
        next.node_mut(id).seen.own_lease = false;
    })
}

fn disconnect(state: &State, id: Id) -> Option<State> {
    let primary = state.node(id).upstream?;
    if !state.node(id).streams || state.replicates(id, primary) {
        return None;
    }
    change(state, |next| next.node_mut(id).streams = false)
}

fn reconnect(state: &State, id: Id) -> Option<State> {
    let node = state.node(id);
    let primary = node.upstream?;
    let other = state.node(primary);
    let may = node.up && !node.primary && !node.streams && other.up && other.primary && node.log & !other.log == 0;
    if !may || !state.on_mesh(id) || !state.on_mesh(primary) {
        return None;
    }
    change(state, |next| next.node_mut(id).streams = true)
}

fn replicate(state: &State, id: Id) -> Option<State> {
    let primary = state.node(id).upstream?;
    let (log, timeline) = (state.node(primary).log, state.node(primary).timeline);
    if !state.replicates(id, primary) || !state.node(primary).primary {
        return None;
    }
    change(state, |next| {
        let node = next.node_mut(id);
        (node.log, node.timeline) = (node.log | log, timeline);
    })
}

/// A client writes. It may run on the node itself and then needs no hub.
fn write(state: &State, id: Id) -> Option<State> {
    let mut next = state.clone();
    next.budget.writes = next.budget.writes.checked_sub(1)?;
    if !state.node(id).up || !state.node(id).primary {
        return None;
    }
    let write = bit(state.next_write);
    next.next_write += 1;
    let node = next.node_mut(id);
    (node.log, node.waiting) = (node.log | write, node.waiting | write);
    Some(next)
}

fn acknowledge(state: &State, id: Id) -> Option<State> {
    let node = state.node(id);
    if !node.primary {
        return None;
    }
    let durable = match node.names {
        None => node.waiting,
        Some(standby) if state.replicates(standby, id) => node.waiting & state.node(standby).log,
        Some(_) => 0,
    };
    change(state, |next| {
        next.acknowledged |= durable;
        next.node_mut(id).waiting &= !durable;
    })
}
