//! Model checker of the fence protocol. It searches the interleavings of hubs, Patroni, PostgreSQL and the network for
//! two primaries that acknowledge writes, and for a lost acknowledged write.
//!
//! Steps of all parts interleave in any order. A network path may fail and recover, a node may crash, an agent may
//! restart, and a reply of etcd may be lost. Only four assumptions restrict time:
//!
//! 1. A primary that has not refreshed its lease for `ttl` is no longer a primary: Patroni has demoted it, or the
//!    watchdog has reset the machine. Every cycle of Patroni is shorter than `ttl`.
//! 2. A hub reads within `ttl` which nodes a majority of the hubs excludes.
//! 3. An exclusion (`ttl` plus 10 s) outlasts the watchdog of the excluded primary.
//! 4. Patroni loads all keys at one revision, or, between the two events of a deposition, with the first event and
//!    without the second: its cache applies events one by one.
//!
//! Not modelled: failsafe mode (a primary that continues without etcd needs every standby's consent, and its
//! `synchronous_standby_names` stays unchanged), switchovers by an operator, more than one synchronous standby, and
//! failures of all etcd members.
//!
//! `MODEL_SECONDS` limits the search of the current protocol, 30 s by default. `--nocapture` prints the counterexamples
//! of protocols that lack a part.

mod hub;
mod patroni;
mod protocol;
mod state;

use std::env;
use std::time::{Duration, Instant};

use stateright::{Checker, HasDiscoveries, Model};

use protocol::{DEPOSED, FAILED_OVER, Fleet, NONE_LOST, ONE_PRIMARY, Protocol, SyncPut};
use state::Budget;

/// One primary, one standby and three hubs. The primary's uplink fails once, and paths to each hub may recover.
const CUT_OFF: Fleet = Fleet {
    protocol: Protocol::FIRST,
    nodes: 2,
    hubs: 3,
    budget: Budget { cuts: 1, crashes: 0, restarts: 0, lost_answers: 0, depositions: 1, writes: 0 },
    suspects_anyone: false,
    forgets: false,
};

/// One hub, which may suspect and readmit any node at any time.
const HASTY: Fleet = Fleet {
    hubs: 1,
    budget: Budget { cuts: 1, crashes: 0, restarts: 0, lost_answers: 0, depositions: 2, writes: 0 },
    suspects_anyone: true,
    forgets: true,
    ..CUT_OFF
};

/// Names of the properties for which a search has found an example or a counterexample.
struct Found(Vec<&'static str>);

/// Searches breadth-first for at most `limit`, and prints the number of states and the depth.
fn search(name: &str, fleet: Fleet, limit: Duration) -> Found {
    let start = Instant::now();
    let builder = fleet.checker().threads(2).timeout(limit).finish_when(HasDiscoveries::AnyFailures);
    let checker = builder.spawn_bfs().join();
    println!(
        "{name}: {} unique states, depth {}, {:.0?}, {}",
        checker.unique_state_count(),
        checker.max_depth(),
        start.elapsed(),
        if start.elapsed() < limit { "complete" } else { "stopped" },
    );
    for property in [ONE_PRIMARY, NONE_LOST] {
        if let Some(path) = checker.discovery(property) {
            println!("\"{property}\" does not hold:");
            path.into_actions().iter().for_each(|action| println!("  {action:?}"));
        }
    }
    Found(checker.discoveries().into_keys().collect())
}

impl Found {
    fn is_unsafe(&self) -> bool {
        self.0.iter().any(|p| [ONE_PRIMARY, NONE_LOST].contains(p))
    }
}

const MINUTES: Duration = Duration::from_secs(600);

/// Attack: the hubs delete the leader key during a cycle of the primary, and the primary's path through the third hub
/// recovers before the cycle ends.
#[test]
fn first_protocol_lets_two_primaries_acknowledge() {
    assert!(search("first", CUT_OFF, MINUTES).is_unsafe());
}

/// The first protocol with exclusion by every hub: the third hub may read the majority too late.
#[test]
fn exclusion_alone_lets_two_primaries_acknowledge() {
    let protocol = Protocol { sync_put: SyncPut::Never, ..Protocol::CURRENT };
    assert!(search("without a put of sync", Fleet { protocol, ..CUT_OFF }, MINUTES).is_unsafe());
}

/// Attack: a cycle of the old primary reads its cache while that has the new `/sync` and still has the leader key.
#[test]
fn put_of_sync_before_the_deletion_lets_two_primaries_acknowledge() {
    let protocol = Protocol { sync_put: SyncPut::BeforeDeletion, ..Protocol::CURRENT };
    assert!(search("put before deletion", Fleet { protocol, ..HASTY }, MINUTES).is_unsafe());
}

/// Attack: hubs depose a node that has just created the leader key, while that node is still in its cycle, or another
/// node that has already checked whether it may lead.
#[test]
fn deposition_of_a_young_leader_lets_two_primaries_acknowledge() {
    let protocol = Protocol { least_age: false, ..Protocol::CURRENT };
    assert!(search("without a least age", Fleet { protocol, ..HASTY }, MINUTES).is_unsafe());
}

#[test]
fn current_protocol_is_safe_within_the_search_limit() {
    let seconds = env::var("MODEL_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(30);
    let protocol = Protocol::CURRENT;
    let budget = Budget { cuts: 1, crashes: 1, restarts: 1, lost_answers: 1, depositions: 1, writes: 1 };
    let hasty = Budget { restarts: 0, depositions: 2, ..budget.clone() };
    let fleets = [
        // The fleets in which the protocols above fail.
        ("cut off", Fleet { protocol, ..CUT_OFF }),
        ("hasty", Fleet { protocol, ..HASTY }),
        ("three hubs, all faults", Fleet { protocol, budget, ..CUT_OFF }),
        ("one hasty hub, all faults", Fleet { protocol, budget: hasty.clone(), ..HASTY }),
        ("three databases, all faults", Fleet { protocol, nodes: 3, budget: hasty, ..HASTY }),
    ];
    let mut sometimes = Vec::new();
    for (name, fleet) in fleets {
        let found = search(name, fleet, Duration::from_secs(seconds) / 5);
        assert!(!found.is_unsafe(), "{name}");
        sometimes.extend(found.0);
    }
    for property in [DEPOSED, FAILED_OVER] {
        assert!(sometimes.contains(&property), "no search reached a state in which {property}");
    }
}
