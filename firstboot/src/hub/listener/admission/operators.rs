//! Admission of operators: their connections and tunnels have limits of their own, in addition to those of guests and
//! members.
//!
//! At a limit the hub closes an older connection of the same operator, such as one of a laptop that has slept since. If
//! operators together reach a limit, the hub closes the oldest connection of the operator with the most. So neither one
//! operator nor several prevent another one from reaching a node.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use fleet::OperatorRole;

use super::super::super::rate::{Meter, Rate};
use super::{AdmissionState, AdmittedConnection, Limits};

/// Age from which a newer connection of the same operator may displace one. A client that opens more than its limit at
/// once gets a refusal instead, and retries.
const OLD: Duration = Duration::from_secs(20);
/// Connections to nodes per second of one operator, and their burst: `status --watch` of 1,000 nodes through two hubs,
/// and of 1,000 nodes through one. A connection takes about 1 ms of a core's time at the hub.
const FORWARDED: (u32, u32) = (250, 1200);
/// Other requests per second of one operator, and their burst. Some of them verify signatures.
const OTHERS: (u32, u32) = (5, 20);
/// Longest delay of a request beyond its rate.
const DELAY: Duration = Duration::from_secs(1);

/// Kind of an operator's request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Kind {
    /// A connection to a node.
    Forwarded,
    /// Any other request.
    Other,
}

/// The operators' connections and requests.
pub(super) struct Operators {
    /// Connections of each operator, by name. Their numbers grow with time.
    by_name: BTreeMap<String, BTreeSet<u64>>,
    /// Role and first use of each connection.
    connections: BTreeMap<u64, (OperatorRole, Instant)>,
    forwarded: (Meter<String>, Rate),
    others: (Meter<String>, Rate),
}

impl Default for Operators {
    fn default() -> Self {
        let meter = |(events, burst)| (Meter::default(), Rate::new(events, burst, DELAY));
        Self {
            by_name: BTreeMap::new(),
            connections: BTreeMap::new(),
            forwarded: meter(FORWARDED),
            others: meter(OTHERS),
        }
    }
}

impl Operators {
    pub(super) fn len(&self) -> usize {
        self.connections.len()
    }

    pub(super) fn contains(&self, id: u64) -> bool {
        self.connections.contains_key(&id)
    }

    pub(super) fn remove(&mut self, id: u64) {
        if self.connections.remove(&id).is_some() {
            self.by_name.retain(|_, ids| {
                ids.remove(&id);
                !ids.is_empty()
            });
        }
    }

    fn add(&mut self, id: u64, name: &str, role: OperatorRole, now: Instant) {
        self.connections.insert(id, (role, now));
        self.by_name.entry(name.to_owned()).or_default().insert(id);
    }

    /// Returns the connection to close for a further one of `name`: `Ok(None)` if no limit is reached.
    ///
    /// # Errors
    /// If a limit is reached, and no connection has to make room.
    fn victim(&self, name: &str, role: OperatorRole, limits: &Limits, now: Instant) -> Result<Option<u64>, ()> {
        let none = BTreeSet::new();
        let own = self.by_name.get(name).unwrap_or(&none);
        let old = || {
            let is_old = |id: &&u64| now.saturating_duration_since(self.connections[*id].1) >= OLD;
            own.iter().find(is_old).copied().map(Some).ok_or(())
        };
        if own.len() >= limits.operator {
            return old();
        }
        let viewers = self.connections.values().filter(|(role, _)| *role == OperatorRole::Viewer).count();
        let is_full = self.len() >= limits.operators || role == OperatorRole::Viewer && viewers >= limits.viewers;
        if !is_full {
            return Ok(None);
        }
        let below = |ids: &BTreeSet<u64>| -> Vec<u64> {
            ids.iter().copied().filter(|id| self.connections[id].0 <= role).collect()
        };
        let others = self.by_name.iter().filter(|(other, _)| *other != name).map(|(_, ids)| below(ids));
        // Of two operators with as many connections, the one with the lower role.
        let most = others.max_by_key(|ids| (ids.len(), Reverse(ids.first().map(|id| self.connections[id].0))));
        let most = most.unwrap_or_default();
        // One more than the other would have is no reason to close a connection.
        if most.len() > own.len() + 1 { Ok(most.first().copied()) } else { old() }
    }
}

impl AdmittedConnection {
    /// Counts the connection as an operator's, also if it comes over the mesh. Returns false if a limit is reached and no
    /// connection makes room.
    pub(in super::super) fn is_operator(&self, name: &str, role: OperatorRole, now: Instant) -> bool {
        let mut state = self.admission.state();
        state.know(self.from, now);
        if state.operators.contains(self.id) {
            return true;
        }
        if !state.open.contains_key(&self.id) {
            return false;
        }
        match state.operators.victim(name, role, &self.admission.limits, now) {
            Ok(Some(victim)) => state.displace(victim),
            Ok(None) => {}
            Err(()) => {
                state.refused += 1;
                return false;
            }
        }
        state.leave_others(self.id);
        state.operators.add(self.id, name, role, now);
        true
    }

    /// Counts a request of an operator. Returns the delay; `None` refuses the request.
    pub(in super::super) fn charge_operator(&self, name: &str, kind: Kind, now: Instant) -> Option<Duration> {
        let mut state = self.admission.state();
        let (meter, rate) = match kind {
            Kind::Forwarded => &mut state.operators.forwarded,
            Kind::Other => &mut state.operators.others,
        };
        let name = name.to_owned();
        let delay = meter.delay(&name, *rate, now)?;
        meter.count(name, *rate, now);
        Some(delay)
    }
}

impl AdmissionState {
    /// Removes a connection from the guests and the members.
    fn leave_others(&mut self, id: u64) {
        self.leave_guests(id);
        self.members.remove(&id);
        if let Some(slot) = self.open.get_mut(&id).and_then(|open| open.slot.take()) {
            super::remove_from(&mut self.slots, &slot, id);
        }
    }
}
