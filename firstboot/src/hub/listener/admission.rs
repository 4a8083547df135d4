//! Admission of connections to the join API: limits the open connections, and closes an older one for a newer one.
//!
//! Guests (clients that have not authenticated), members and operators have separate limits. When guests reach a limit, the hub
//! closes the oldest idle guest: of one source if its limit is reached, else of all. An idle client stays connected
//! only while no other client needs its place. The hub never closes a guest while it handles the guest's request.

mod operators;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use fleet_https::CONNECTIONS_PER_HUB;
use tokio::task::AbortHandle;

use super::super::rate::{Meter, Meters, Rate, Rates, network};
pub(super) use operators::Kind;
use operators::Operators;

/// How long an address stays known after a member authenticated from it.
const KNOWN: Duration = Duration::from_secs(900);
/// Size limit of the table of known addresses.
const MOST_KNOWN: usize = 8192;

/// Limits of open connections.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Open connections of guests.
    pub(super) guests: usize,
    /// Open connections of members, in addition to the guests'.
    pub(super) members: usize,
    /// Guests of one address; of one known address, for example an office behind NAT; and of one network.
    pub(super) address: usize,
    pub(super) known_address: usize,
    pub(super) network: usize,
    /// Connections of one member.
    pub(super) slot: usize,
    /// Connections of operators, in addition to the others; of viewers, among those; and of one operator.
    pub(super) operators: usize,
    pub(super) viewers: usize,
    pub(super) operator: usize,
}

impl Limits {
    /// Divides a total of `connections` open connections of guests and members. A quarter of the operators' connections
    /// is not for viewers.
    pub(super) fn new(connections: usize, operators: usize) -> Self {
        Self {
            guests: connections * 3 / 4,
            members: connections / 4,
            address: connections / 8,
            known_address: connections * 3 / 8,
            network: connections / 4,
            slot: 8,
            operators,
            viewers: operators * 3 / 4,
            operator: CONNECTIONS_PER_HUB.min(operators / 2),
        }
    }
}

/// Longest delay of a TLS handshake, or of a guest's further request, beyond its rate.
const DELAY: Duration = Duration::from_millis(500);
/// Requests per second of one member that change a state, and their burst. A node sends a report each 30 s, and a few
/// requests for each action of an operator.
const CHANGES: (u32, u32) = (5, 30);
/// Longest delay of such a request beyond its rate.
const CHANGE_DELAY: Duration = Duration::from_secs(1);

/// The open connections, with their limits.
pub(super) struct Admission {
    limits: Limits,
    /// Limits of handshakes and requests per second, of unknown and of known sources.
    unknown: Rates,
    known: Rates,
    state: Mutex<AdmissionState>,
}

#[derive(Default)]
struct AdmissionState {
    next: u64,
    open: BTreeMap<u64, Open>,
    /// Idle guests in the order of displacement: unknown addresses first, then by age.
    idle: BTreeSet<(bool, u64)>,
    members: BTreeSet<u64>,
    operators: Operators,
    addresses: BTreeMap<IpAddr, BTreeSet<u64>>,
    networks: BTreeMap<IpAddr, BTreeSet<u64>>,
    slots: BTreeMap<String, BTreeSet<u64>>,
    unknown_meters: Meters,
    known_meters: Meters,
    /// Requests of members that change a state, by slot.
    changes: Meter<String>,
    /// Known addresses, with the time of the last authentication.
    known: BTreeMap<IpAddr, Instant>,
    refused: u64,
    displaced: u64,
}

/// State of one open connection.
struct Open {
    from: IpAddr,
    known: bool,
    /// The hub handles a request of this connection.
    busy: bool,
    /// Slot of the authenticated member.
    slot: Option<String>,
    task: Option<AbortHandle>,
}

/// An open connection that counts towards the limits. Dropping it removes it from the counts.
pub(super) struct AdmittedConnection {
    admission: Arc<Admission>,
    id: u64,
    from: IpAddr,
}

impl Admission {
    pub(super) fn new(limits: Limits) -> Arc<Self> {
        let rates = |address, network, all| Rates {
            address: Rate::new(address, 2 * address, DELAY),
            network: Rate::new(network, 2 * network, DELAY),
            light: Rate::new(4, 8, Duration::ZERO),
            all: Rate::new(all, all, DELAY),
        };
        Arc::new(Self { limits, unknown: rates(50, 150, 400), known: rates(1000, 1000, 1500), state: Mutex::default() })
    }

    fn state(&self) -> MutexGuard<'_, AdmissionState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Admits a connection, and closes an older one if a limit is reached. Returns the admitted connection, and the
    /// delay of its TLS handshake; `None` if its source exceeds its rate, or every connection that could be closed is
    /// busy. `member`: the connection comes over the mesh, so it belongs to a member.
    pub(super) fn enter(
        self: &Arc<Self>,
        from: IpAddr,
        member: bool,
        now: Instant,
    ) -> Option<(AdmittedConnection, Duration)> {
        let mut state = self.state();
        let known = member || state.is_known(from, now);
        let Some(delay) = self.charge(&mut state, from, known, now) else {
            state.refused += 1;
            return None;
        };
        let id = state.next;
        state.next += 1;
        state.open.insert(id, Open { from, known, busy: false, slot: None, task: None });
        let place = if member {
            state.members.insert(id);
            // A mesh address identifies one member.
            state.take_slot(id, format!("{from}"));
            state.make_room_of_members(id, &self.limits)
        } else {
            state.idle.insert((known, id));
            state.addresses.entry(from).or_default().insert(id);
            state.networks.entry(network(from)).or_default().insert(id);
            state.make_room_of_guests(id, from, known, &self.limits)
        };
        if !place {
            state.remove(id);
            state.refused += 1;
            return None;
        }
        Some((AdmittedConnection { admission: self.clone(), id, from }, delay))
    }

    fn charge(&self, state: &mut AdmissionState, from: IpAddr, known: bool, now: Instant) -> Option<Duration> {
        if known {
            state.known_meters.take(from, self.known, now)
        } else {
            state.unknown_meters.take(from, self.unknown, now)
        }
    }

    /// Sets the task that serves a connection. Displacing the connection aborts the task.
    pub(super) fn set_task(&self, id: u64, task: AbortHandle) {
        match self.state().open.get_mut(&id) {
            Some(open) => open.task = Some(task),
            // The connection has ended, or was displaced before.
            None => task.abort(),
        }
    }

    /// Returns the numbers of refused and displaced connections since the last call.
    pub(super) fn take_counts(&self) -> (u64, u64) {
        let mut state = self.state();
        (std::mem::take(&mut state.refused), std::mem::take(&mut state.displaced))
    }
}

impl AdmittedConnection {
    /// Returns the address of the client.
    pub(super) fn from(&self) -> IpAddr {
        self.from
    }

    pub(super) fn id(&self) -> u64 {
        self.id
    }

    /// Sets the task that serves the connection from now on. Displacing the connection aborts the task.
    pub(super) fn set_task(&self, task: AbortHandle) {
        self.admission.set_task(self.id, task);
    }

    /// Counts the connection as a member's after the client authenticated as the owner of `slot`. Returns false if
    /// the members' limit is reached and all their connections are busy.
    pub(super) fn is_member(&self, slot: &str, now: Instant) -> bool {
        let admission = &self.admission;
        let mut state = admission.state();
        state.know(self.from, now);
        if state.members.contains(&self.id) {
            return true;
        }
        if !state.open.contains_key(&self.id) {
            return false;
        }
        state.leave_guests(self.id);
        state.members.insert(self.id);
        state.take_slot(self.id, slot.to_owned());
        state.make_room_of_members(self.id, &admission.limits)
    }

    /// Marks the address as known after a granted join: other nodes may share the address.
    pub(super) fn is_known(&self, now: Instant) {
        self.admission.state().know(self.from, now);
    }

    /// Counts a further request of a guest's connection like a handshake. Returns the delay; `None` refuses the
    /// request.
    pub(super) fn charge(&self, now: Instant) -> Option<Duration> {
        let mut state = self.admission.state();
        let known = state.is_known(self.from, now);
        self.admission.charge(&mut state, self.from, known, now)
    }

    /// Counts a request of a member that changes a state. Returns the delay; `None` refuses the request.
    pub(super) fn charge_member(&self, slot: &str, now: Instant) -> Option<Duration> {
        let (slot, rate) = (slot.to_owned(), Rate::new(CHANGES.0, CHANGES.1, CHANGE_DELAY));
        let changes = &mut self.admission.state().changes;
        let delay = changes.delay(&slot, rate, now)?;
        changes.count(slot, rate, now);
        Some(delay)
    }

    /// Sets whether the hub handles a request of this connection; a busy connection is not displaced.
    pub(super) fn set_busy(&self, busy: bool) {
        let mut state = self.admission.state();
        let AdmissionState { open, idle, members, operators, .. } = &mut *state;
        let Some(open) = open.get_mut(&self.id) else { return };
        open.busy = busy;
        if members.contains(&self.id) || operators.contains(self.id) {
            return;
        }
        if busy {
            idle.remove(&(open.known, self.id));
        } else {
            idle.insert((open.known, self.id));
        }
    }
}

impl Drop for AdmittedConnection {
    fn drop(&mut self) {
        self.admission.state().remove(self.id);
    }
}

impl AdmissionState {
    fn is_known(&self, from: IpAddr, now: Instant) -> bool {
        self.known.get(&from).is_some_and(|at| now.saturating_duration_since(*at) < KNOWN)
    }

    fn know(&mut self, from: IpAddr, now: Instant) {
        if self.known.len() >= MOST_KNOWN && !self.known.contains_key(&from) {
            self.known.retain(|_, at| now.saturating_duration_since(*at) < KNOWN);
            if self.known.len() >= MOST_KNOWN {
                return;
            }
        }
        self.known.insert(from, now);
    }

    fn take_slot(&mut self, id: u64, slot: String) {
        self.slots.entry(slot.clone()).or_default().insert(id);
        if let Some(open) = self.open.get_mut(&id) {
            open.slot = Some(slot);
        }
    }

    /// Closes older guests until the new guest `id` is within every limit; returns false if all are busy.
    fn make_room_of_guests(&mut self, id: u64, from: IpAddr, known: bool, limits: &Limits) -> bool {
        let of_address = if known { limits.known_address } else { limits.address };
        let can_close =
            |open: &BTreeMap<u64, Open>, other: &u64| *other != id && open.get(other).is_some_and(|o| !o.busy);
        if self.addresses.get(&from).is_some_and(|all| all.len() > of_address) {
            let oldest = self.addresses[&from].iter().copied().find(|other| can_close(&self.open, other));
            let Some(oldest) = oldest else { return false };
            self.displace(oldest);
        }
        let network = network(from);
        // The limit of a network does not apply to its known addresses.
        if !known && self.networks.get(&network).is_some_and(|all| all.len() > limits.network) {
            let oldest = self.networks[&network].iter().copied().find(|other| can_close(&self.open, other));
            let Some(oldest) = oldest else { return false };
            self.displace(oldest);
        }
        if self.open.len() - self.members.len() - self.operators.len() > limits.guests {
            let oldest = self.idle.iter().map(|(_, other)| *other).find(|other| *other != id);
            let Some(oldest) = oldest else { return false };
            self.displace(oldest);
        }
        true
    }

    /// Closes older members' connections until the new one `id` is within every limit, those of its slot first.
    fn make_room_of_members(&mut self, id: u64, limits: &Limits) -> bool {
        let can_close =
            |open: &BTreeMap<u64, Open>, other: &u64| *other != id && open.get(other).is_some_and(|o| !o.busy);
        let slot = self.open.get(&id).and_then(|open| open.slot.clone()).unwrap_or_default();
        if self.slots.get(&slot).is_some_and(|all| all.len() > limits.slot) {
            let oldest = self.slots[&slot].iter().copied().find(|other| can_close(&self.open, other));
            let Some(oldest) = oldest else { return false };
            self.displace(oldest);
        }
        if self.members.len() > limits.members {
            let oldest = self.members.iter().copied().find(|other| can_close(&self.open, other));
            let Some(oldest) = oldest else { return false };
            self.displace(oldest);
        }
        true
    }

    fn displace(&mut self, id: u64) {
        if let Some(task) = self.open.get(&id).and_then(|open| open.task.as_ref()) {
            task.abort();
        }
        self.displaced += 1;
        self.remove(id);
    }

    fn leave_guests(&mut self, id: u64) {
        let Some(open) = self.open.get(&id) else { return };
        self.idle.remove(&(open.known, id));
        remove_from(&mut self.addresses, &open.from, id);
        remove_from(&mut self.networks, &network(open.from), id);
    }

    fn remove(&mut self, id: u64) {
        self.leave_guests(id);
        self.members.remove(&id);
        self.operators.remove(id);
        if let Some(slot) = self.open.remove(&id).and_then(|open| open.slot) {
            remove_from(&mut self.slots, &slot, id);
        }
    }
}

fn remove_from<K: Ord>(all: &mut BTreeMap<K, BTreeSet<u64>>, key: &K, id: u64) {
    if let Some(ids) = all.get_mut(key) {
        ids.remove(&id);
        if ids.is_empty() {
            all.remove(key);
        }
    }
}

#[cfg(test)]
mod tests;
