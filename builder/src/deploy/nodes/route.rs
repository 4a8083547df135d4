//! Ways to the nodes: through any hub, and through the next one if a hub does not answer.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use fleet_https::{
    CONNECTIONS_PER_HUB, ClientConfig, Connection, Error as HttpsError, Identity, Obstacle, ThroughError,
};
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::error::{Error, Result};
use crate::keys::operator::OperatorFile;

/// Time limit of a hub's TLS session, and of the way from there to a node's. A hub reports after 1.5 s that a node does
/// not answer.
const HUB_TIMEOUT: Duration = Duration::from_secs(3);
/// Shortest head start of a hub over the next one. Where sessions take long, the head start is a multiple of their time,
/// because further sessions would slow a busy host or hub down even more.
const HEAD_START: Duration = Duration::from_millis(300);
const HEAD_START_FACTOR: u32 = 3;
/// Number of connections that may try a second hub while no connection has found the first one slow.
const SCOUTS: usize = 4;
/// Time for which the client does not try again after no hub has answered.
const FAILURE_VALIDITY: Duration = Duration::from_secs(2);
/// Pause before the next attempt if each hub has reached its limit of connections, and the number of attempts.
const BUSY_PAUSE: Duration = Duration::from_millis(200);
const BUSY_ATTEMPTS: u32 = 30;
/// Number of hubs that have to report that a node does not answer.
const REPORTS: usize = 2;

/// Time for which connections go through other hubs, after a hub was slower than the next one or has failed.
const SLOW: Duration = Duration::from_secs(2);
const FAILED: Duration = Duration::from_secs(10);

/// A hub, as a way to the nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Name of the hub.
    pub hub: String,
    /// Public host name or address.
    pub host: String,
}

/// The hubs, and what the client knows about them.
pub(super) struct Routes {
    hubs: Vec<Hub>,
    port: u16,
    /// For sessions with hubs, which the client resumes.
    tls: Arc<ClientConfig>,
    /// For sessions with nodes.
    node_tls: Arc<ClientConfig>,
    /// Number of connections so far, which go through the good hubs in turn.
    turn: AtomicUsize,
    /// Whether a hub has answered.
    answered: AtomicBool,
    /// Why no hub has answered, and when.
    failure: Mutex<Option<(String, Instant)>>,
    /// Places for connections. All hubs together permit so many.
    places: Arc<Semaphore>,
    scouts: Semaphore,
    /// Time of the last session's handshake, in milliseconds.
    last_handshake: AtomicU64,
}

struct Hub {
    entry: Entry,
    /// Until then, connections go through other hubs; and whether this one has failed.
    avoided: std::sync::Mutex<Option<(Instant, bool)>>,
    /// Open connections through this hub.
    open: AtomicUsize,
}

impl Hub {
    fn set_good(&self) {
        *self.avoided.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn set_slow(&self) {
        *self.avoided.lock().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now() + SLOW, false));
    }

    fn set_failed(&self) {
        *self.avoided.lock().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now() + FAILED, true));
    }

    /// Returns 0 for a hub that may be good, 1 for a slow one, and 2 for one that has failed.
    fn rank(&self) -> u8 {
        match *self.avoided.lock().unwrap_or_else(PoisonError::into_inner) {
            Some((until, has_failed)) if until > Instant::now() => 1 + u8::from(has_failed),
            _ => 0,
        }
    }
}

/// A connection's place at a hub. Dropping it frees the place.
pub(crate) struct Place {
    routes: Arc<Routes>,
    hub: usize,
    permit: Option<OwnedSemaphorePermit>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.routes.hubs[self.hub].open.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Routes {
    /// Returns the ways of an operator through these hubs. `port` is the port of the hubs' API.
    ///
    /// # Errors
    /// If the certificate or the key is invalid.
    pub(super) fn new(operator: &OperatorFile, entries: Vec<Entry>, port: u16) -> Result<Arc<Self>> {
        let own = Identity { cert: &operator.certificate, key: operator.key() };
        let tls = fleet_https::client(&operator.root, Some(own))?;
        let places = Arc::new(Semaphore::new(CONNECTIONS_PER_HUB * entries.len()));
        let hub = |entry| Hub { entry, avoided: std::sync::Mutex::default(), open: AtomicUsize::new(0) };
        Ok(Arc::new(Self {
            hubs: entries.into_iter().map(hub).collect(),
            port,
            node_tls: fleet_https::without_resumption(&tls),
            tls,
            turn: AtomicUsize::new(0),
            answered: AtomicBool::new(false),
            failure: Mutex::default(),
            places,
            scouts: Semaphore::new(SCOUTS),
            last_handshake: AtomicU64::new(0),
        }))
    }

    /// Returns the number of connections that the hubs permit to an operator at the same time.
    pub(super) fn capacity(&self) -> usize {
        CONNECTIONS_PER_HUB * self.hubs.len()
    }

    /// Returns whether a hub has answered.
    pub(super) fn has_answered(&self) -> bool {
        self.answered.load(Ordering::Relaxed)
    }

    /// Connects to a node: through a hub that has answered, else through the next one. Waits while each hub has reached
    /// its limit of connections.
    ///
    /// # Errors
    /// If no hub answers, or none reaches the node. The message has the cause of each.
    pub(super) async fn connect(self: &Arc<Self>, node: &str) -> Result<(Connection, Place)> {
        let permit = self.places.clone().acquire_owned().await.map_err(Error::cannot("wait for a connection"))?;
        if let Some((why, at)) = &*self.failure.lock().await
            && at.elapsed() < FAILURE_VALIDITY
        {
            return Err(Error::Failed(why.clone()));
        }
        let mut failures: Vec<ThroughError> = Vec::new();
        for attempt in 1..=BUSY_ATTEMPTS {
            failures.clear();
            let mut left = self.order();
            let mut has_session = false;
            while let Some((index, session)) = self.session(&mut left, &mut failures).await {
                has_session = true;
                let mut place = self.place(index);
                match session.on_to_node(self.name(index), node, &self.node_tls, HUB_TIMEOUT).await {
                    Ok(connection) => {
                        place.permit = Some(permit);
                        return Ok((connection, place));
                    }
                    Err(e) if e.obstacle == Obstacle::Refused => return Err(e.error.into()),
                    Err(e) => {
                        if e.obstacle == Obstacle::Hub {
                            self.hubs[index].set_failed();
                        }
                        failures.push(e);
                    }
                }
                // The next hubs would report the same.
                if failures.iter().filter(|e| e.obstacle == Obstacle::Node).count() == REPORTS {
                    break;
                }
            }
            if !has_session {
                return Err(self.no_hub(failures).await);
            }
            if attempt == BUSY_ATTEMPTS || !failures.iter().any(|e| e.obstacle == Obstacle::Busy) {
                break;
            }
            sleep(BUSY_PAUSE).await;
        }
        Err(no_way(node, failures))
    }

    /// Makes a TLS session with a hub: with the first that answers, each with a head start over the next one. Takes the
    /// hubs that it has tried from `left`. Returns `None` if no hub answers.
    async fn session(
        self: &Arc<Self>,
        left: &mut Vec<usize>,
        failures: &mut Vec<ThroughError>,
    ) -> Option<(usize, Connection)> {
        let mut attempts = JoinSet::new();
        let mut started: Vec<usize> = Vec::new();
        let mut scout = None;
        loop {
            if !left.is_empty() {
                let is_slow = started.last().is_none_or(|index| self.hubs[*index].rank() > 0);
                if !is_slow && scout.is_none() {
                    scout = self.scouts.try_acquire().ok();
                }
                if is_slow || scout.is_some() {
                    let index = left.remove(0);
                    started.push(index);
                    attempts.spawn(self.clone().open(index));
                }
            } else if attempts.is_empty() {
                return None;
            }
            let handshake = Duration::from_millis(self.last_handshake.load(Ordering::Relaxed));
            let head_start = HEAD_START.max(handshake * HEAD_START_FACTOR);
            let pause = if left.is_empty() { HUB_TIMEOUT * 2 } else { head_start };
            let ended = tokio::select! {
                ended = attempts.join_next() => ended,
                () = sleep(pause) => None,
            };
            match ended {
                Some(Ok((index, Ok(session)))) => {
                    // Those that are slower are the next ones, if this hub does not reach the node. Their attempts
                    // continue, and note how they end.
                    started.retain(|other| *other != index);
                    for slow in &started {
                        self.hubs[*slow].set_slow();
                    }
                    left.append(&mut started);
                    attempts.detach_all();
                    return Some((index, session));
                }
                Some(Ok((index, Err(error)))) => {
                    started.retain(|other| *other != index);
                    failures.push(ThroughError { error, obstacle: Obstacle::Hub });
                }
                _ => {}
            }
        }
    }

    /// Makes a TLS session with a hub, and notes whether it answers.
    async fn open(self: Arc<Self>, index: usize) -> (usize, Result<Connection, HttpsError>) {
        let (hub, port) = (&self.hubs[index], self.port);
        let Entry { hub: name, host } = &hub.entry;
        let started = Instant::now();
        let opened = timeout(HUB_TIMEOUT, Connection::open(host, port, name, &self.tls)).await;
        let no_answer = |_| Err(HttpsError::no_answer(format!("{name} ({host}:{port})")));
        let opened = opened.unwrap_or_else(no_answer);
        if opened.is_ok() {
            hub.set_good();
            let millis = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
            self.last_handshake.store(millis, Ordering::Relaxed);
            self.answered.store(true, Ordering::Relaxed);
        } else {
            hub.set_failed();
        }
        (index, opened)
    }

    /// Returns the indices of the hubs in turn. Those that have failed are the last ones, and before them those that are
    /// slow or full.
    fn order(&self) -> Vec<usize> {
        let (count, turn) = (self.hubs.len(), self.turn.fetch_add(1, Ordering::Relaxed));
        let mut order: Vec<usize> = (0..count).map(|i| turn.wrapping_add(i) % count).collect();
        order.sort_by_key(|index| {
            let (hub, rank) = (&self.hubs[*index], self.hubs[*index].rank());
            (rank == 2, hub.open.load(Ordering::Relaxed) >= CONNECTIONS_PER_HUB, rank)
        });
        order
    }

    fn place(self: &Arc<Self>, hub: usize) -> Place {
        self.hubs[hub].open.fetch_add(1, Ordering::Relaxed);
        Place { routes: self.clone(), hub, permit: None }
    }

    fn name(&self, hub: usize) -> &str {
        &self.hubs[hub].entry.hub
    }

    /// Notes that no hub has answered. Returns the error.
    async fn no_hub(&self, failures: Vec<ThroughError>) -> Error {
        let causes: Vec<String> = failures.into_iter().map(|e| Error::from(e.error).chain()).collect();
        let text = format!(
            "no hub answers:\n  {}\n  help: if your host reaches a hub at another address, add `--endpoint HUB=HOST`",
            causes.join("\n  ")
        );
        *self.failure.lock().await = Some((text.clone(), Instant::now()));
        Error::Failed(text)
    }
}

/// Returns the error of a node that no hub reaches.
fn no_way(node: &str, failures: Vec<ThroughError>) -> Error {
    let is_old = failures.iter().all(|e| e.obstacle == Obstacle::Version);
    let help = if is_old {
        "\n  help: the hubs run a version without the node API, or one that does not have this node; `bakehouse rollout` \
         shows their versions"
    } else {
        ""
    };
    let mut all = failures.into_iter().map(|e| Error::from(e.error)).peekable();
    let only = all.next();
    if let (Some(only), None, false) = (&only, all.peek(), is_old) {
        return Error::Failed(only.chain());
    }
    let causes: Vec<String> = only.into_iter().chain(all).map(|e| e.chain()).collect();
    Error::Failed(format!("no hub reaches {node}: {}{help}", causes.join("; ")))
}

#[cfg(test)]
mod tests {
    use super::super::test_servers::Fleet;
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn an_old_hub_is_not_the_last_word_about_a_node() {
        let fleet = Fleet::start(&["hub-1", "hub-2"], &["db-1"]).await;
        fleet.make_old("hub-1");
        let client = fleet.client();
        for _ in 0..4 {
            client.connect("db-1").await.map(drop).unwrap();
        }
        assert_eq!((fleet.connections("hub-1"), fleet.connections("hub-2")), (0, 4));
        fleet.make_old("hub-2");
        let e = client.connect("db-1").await.map(drop).unwrap_err().chain();
        for part in ["hub-1", "hub-2", "forwards no connections of operators", "help: the hubs run a version without"] {
            assert!(e.contains(part), "{e}");
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn two_hubs_report_that_a_node_does_not_answer() {
        let fleet = Fleet::start(&["hub-1", "hub-2", "hub-3"], &["db-1", "db-2"]).await;
        fleet.make_unreachable("db-1");
        let client = fleet.client();
        let e = client.connect("db-1").await.map(drop).unwrap_err().chain();
        assert!(e.contains("504 Gateway Timeout \u{fffd}[2Jdb-1 does not answer within 1.5 s"), "{e:?}");
        let asked: usize = ["hub-1", "hub-2", "hub-3"].iter().map(|hub| fleet.requests(hub)).sum();
        assert_eq!(asked, REPORTS);
        // The hubs themselves are well.
        let ranks: Vec<u8> = client.routes.hubs.iter().map(Hub::rank).collect();
        assert_eq!(ranks, [0, 0, 0]);
        client.connect("db-2").await.map(drop).unwrap();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn connections_use_all_hubs_and_no_more_places_than_they_permit() {
        let fleet = Fleet::start(&["hub-1", "hub-2"], &["db-1"]).await;
        let client = fleet.client();
        let mut open = Vec::new();
        for _ in 0..client.capacity() {
            open.push(client.connect("db-1").await.unwrap());
        }
        let all = CONNECTIONS_PER_HUB;
        assert_eq!((fleet.connections("hub-1"), fleet.connections("hub-2")), (all, all));
        assert_eq!(fleet.requests("hub-1") + fleet.requests("hub-2"), 2 * all, "no request was refused");
        // One more waits for a place.
        let late = timeout(Duration::from_millis(100), client.connect("db-1")).await;
        assert!(late.is_err());
        open.pop();
        client.connect("db-1").await.map(drop).unwrap();
    }
}
