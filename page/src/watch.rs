//! Reads the state of the fleet while somebody looks at the page, and shares it between all viewers.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use futures_util::future::join_all;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use crate::audit;
use crate::config::Fleet;
use crate::error::Error;
use crate::history::{self, Drawn, Fired, Promises, Range, Version};
use crate::http::{LONGEST, ROOM, Service};
use crate::probe::{INTERVAL, Probes, Reachable};
use crate::prometheus::{Alert, Sample, Sources};
use crate::queries;
use crate::state::{Replies, State};
use crate::views::{Audit, Content};

/// Time between two reads of the state.
const POLL: Duration = Duration::from_secs(2);
/// Time limit of a query.
const LIMIT: Duration = Duration::from_secs(5);
/// Time for which the last reply to a query stands in for one that failed.
const STALE: Duration = Duration::from_secs(12);
/// Number of values that the page keeps. 1,000 nodes have 25,000, if ten units have failed on each.
const MOST_VALUES: usize = 50_000;
/// Time for which the page reads the state after the last viewer has left, because most viewers load the page again.
const LINGER: Duration = Duration::from_secs(15);
/// Time between two reads of the history.
const HISTORY: Duration = Duration::from_secs(60);
/// Time after which a history that could not be read is read again.
const RETRY: Duration = Duration::from_secs(10);
/// Time within which a new viewer gets the state, and the graphs.
const FIRST_STATE: Duration = Duration::from_millis(900);
const FIRST_GRAPHS: Duration = Duration::from_millis(500);

/// Everything that viewers see.
#[derive(Clone, Debug, Default)]
pub(crate) struct View {
    pub(crate) state: Arc<State>,
    /// When the state was read.
    read: Option<Instant>,
    graphs: BTreeMap<Range, (Instant, Arc<Vec<Drawn>>)>,
    versions: Option<Arc<Vec<Version>>>,
    fired: Option<Arc<Vec<Fired>>>,
    promises: Option<Arc<Promises>>,
    audit: Arc<Audit>,
}

impl View {
    /// Returns what the page shows with the graphs of this range.
    pub(crate) fn content<'a>(&'a self, fleet: &'a Fleet, range: Range) -> Content<'a> {
        Content {
            fleet,
            state: &self.state,
            graphs: self.graphs.get(&range).map(|(_, graphs)| graphs.as_slice()),
            versions: self.versions.as_ref().map(|versions| versions.as_slice()),
            fired: self.fired.as_ref().map(|fired| fired.as_slice()),
            promises: self.promises.as_deref(),
            audit: &self.audit,
        }
    }

    fn is_fresh(&self) -> bool {
        self.read.is_some_and(|read| read.elapsed() < 2 * POLL)
    }
}

/// The reader of the state.
#[derive(Debug)]
pub(crate) struct Watch {
    pub(crate) fleet: Fleet,
    sources: Sources,
    view: watch::Sender<View>,
    reachable: watch::Sender<Reachable>,
    /// Number of viewers of each range.
    wanted: watch::Sender<BTreeMap<Range, usize>>,
}

/// A viewer. While it exists, the state is read.
#[derive(Debug)]
pub(crate) struct Interest {
    watch: Arc<Watch>,
    range: Range,
}

impl Drop for Interest {
    fn drop(&mut self) {
        let (watch, range) = (self.watch.clone(), self.range);
        tokio::spawn(async move {
            sleep(LINGER).await;
            watch.wanted.send_modify(|wanted| {
                if let Some(count) = wanted.get_mut(&range) {
                    *count -= 1;
                }
                wanted.retain(|_, count| *count > 0);
            });
        });
    }
}

impl Watch {
    pub(crate) fn new(fleet: Fleet) -> Arc<Self> {
        let service = |name, address| Service { name, address, limit: LIMIT, longest: LONGEST, room: &ROOM };
        let sources = Sources {
            prometheus: service("Prometheus", fleet.prometheus),
            alertmanager: service("Alertmanager", fleet.alertmanager),
        };
        Arc::new(Self {
            fleet,
            sources,
            view: watch::Sender::default(),
            reachable: watch::Sender::default(),
            wanted: watch::Sender::default(),
        })
    }

    /// Counts a viewer of a range.
    pub(crate) fn interest(self: &Arc<Self>, range: Range) -> Interest {
        self.wanted.send_modify(|wanted| *wanted.entry(range).or_default() += 1);
        Interest { watch: self.clone(), range }
    }

    /// Returns a receiver of the view.
    pub(crate) fn subscribe(&self) -> watch::Receiver<View> {
        self.view.subscribe()
    }

    /// Returns the view for a new viewer: as fresh as it is within 0.9 s, with graphs if they are there within 0.5 s.
    pub(crate) async fn first(&self, range: Range) -> View {
        let mut receiver = self.view.subscribe();
        let begun = Instant::now();
        let _ = timeout(FIRST_STATE, receiver.wait_for(View::is_fresh)).await;
        let left = FIRST_GRAPHS.saturating_sub(begun.elapsed());
        let _ = timeout(left, receiver.wait_for(|view| view.graphs.contains_key(&range))).await;
        self.view.borrow().clone()
    }

    /// Reads everything while there are viewers, until the process ends.
    pub(crate) async fn run(&self) {
        tokio::join!(self.keep_state(), self.keep_probes(), self.keep_graphs(), self.keep_history());
    }

    /// Waits until there is a viewer.
    async fn wanted(&self) {
        // The sender lives as long as `self`.
        let _ = self.wanted.subscribe().wait_for(|wanted| !wanted.is_empty()).await;
    }

    async fn keep_state(&self) {
        let mut reachable = self.reachable.subscribe();
        let mut known: BTreeMap<&'static str, (Instant, Vec<Sample>)> = BTreeMap::new();
        loop {
            self.wanted().await;
            let begun = Instant::now();
            let (replies, alerts) = tokio::join!(self.replies(), self.sources.alerts());
            let (mut missing, mut values) = (Vec::new(), 0);
            for (name, reply) in replies {
                let reply = reply.and_then(|samples| {
                    values += samples.len();
                    if values <= MOST_VALUES { Ok(samples) } else { Err(too_many()) }
                });
                match reply {
                    Ok(samples) => drop(known.insert(name, (Instant::now(), samples))),
                    Err(e) if missing.is_empty() => missing.push(e.chain()),
                    Err(_) => {}
                }
            }
            known.retain(|_, (read, _)| read.elapsed() < STALE);
            let alerts = alerts.unwrap_or_else(|_| (Vec::new(), None));
            missing.extend(alerts.1.map(|e| e.chain()));
            let took = begun.elapsed();
            let replies: Replies = known.iter().map(|(name, (_, samples))| (*name, samples.clone())).collect();
            let audit = audit::read(self.fleet.audit.as_deref()).await;
            self.publish(&replies, &alerts.0, &missing, &mut reachable, Some(Arc::new(audit)));
            // A busy Prometheus gets more time.
            let pause = sleep(POLL.max(took * 5));
            tokio::pin!(pause);
            loop {
                tokio::select! {
                    () = &mut pause => break,
                    // A node has gone or come back: no need to wait for Prometheus.
                    Ok(()) = reachable.changed() => self.publish(&replies, &alerts.0, &missing, &mut reachable, None),
                }
            }
        }
    }

    fn publish(
        &self,
        replies: &Replies,
        alerts: &[Alert],
        missing: &[String],
        reachable: &mut watch::Receiver<Reachable>,
        audit: Option<Arc<Audit>>,
    ) {
        let reached = reachable.borrow_and_update().clone();
        let mut state = State::new(&self.fleet, now(), replies, alerts.to_vec(), &reached);
        state.missing = missing.to_vec();
        self.view.send_modify(|view| {
            view.state = Arc::new(state);
            view.read = Some(Instant::now());
            if let Some(audit) = audit {
                view.audit = audit;
            }
        });
    }

    async fn replies(&self) -> Vec<(&'static str, crate::error::Result<Vec<Sample>>)> {
        let queries = queries::instant(&self.fleet);
        join_all(queries.iter().map(async |(name, expression)| (*name, self.sources.query(expression).await))).await
    }

    async fn keep_probes(&self) {
        let mut probes = Probes::new(&self.fleet);
        loop {
            if self.wanted.borrow().is_empty() {
                self.wanted().await;
                probes.reset();
            }
            let next = tokio::time::Instant::now() + INTERVAL;
            let reached = probes.round().await;
            self.reachable.send_if_modified(|known| {
                let is_new = *known != reached;
                *known = reached;
                is_new
            });
            tokio::time::sleep_until(next).await;
        }
    }

    async fn keep_graphs(&self) {
        let mut wanted = self.wanted.subscribe();
        loop {
            self.wanted().await;
            let ranges: Vec<Range> = wanted.borrow_and_update().keys().copied().collect();
            self.view.send_if_modified(|view| {
                view.graphs.retain(|range, _| ranges.contains(range));
                false
            });
            for range in ranges {
                let drawn = self.view.borrow().graphs.get(&range).map(|(drawn, _)| *drawn);
                let refresh = Duration::from_secs_f64(range.step().clamp(10.0, 300.0));
                if drawn.is_none_or(|drawn| drawn.elapsed() >= refresh) {
                    self.draw(range).await;
                }
            }
            tokio::select! {
                () = sleep(Duration::from_secs(1)) => {}
                _ = wanted.changed() => {}
            }
        }
    }

    /// Draws the graphs of a range, one after the other: together they would keep a small monitor busy. New graphs are
    /// shown at once, and old ones stay until all are new.
    async fn draw(&self, range: Range) {
        let window = range.window(now());
        let old = self.view.borrow().graphs.get(&range).map(|(_, graphs)| graphs.clone());
        let mut drawn = Vec::new();
        for graph in queries::graphs(&self.fleet, range.step()) {
            drawn.push(history::draw(&self.fleet, &self.sources, graph, window).await);
            if old.is_none() {
                self.show(range, drawn.clone());
            }
        }
        if old.is_some() {
            self.show(range, drawn);
        }
    }

    fn show(&self, range: Range, drawn: Vec<Drawn>) {
        self.view.send_modify(|view| drop(view.graphs.insert(range, (Instant::now(), Arc::new(drawn)))));
    }

    async fn keep_history(&self) {
        loop {
            self.wanted().await;
            let (versions, fired, promises) = tokio::join!(
                history::versions(&self.fleet, &self.sources, now()),
                history::fired(&self.fleet, &self.sources, now()),
                history::promises(&self.fleet, &self.sources, now()),
            );
            let is_complete = versions.is_ok() && fired.is_ok() && promises.is_ok();
            self.view.send_modify(|view| {
                if let Ok(versions) = versions {
                    view.versions = Some(Arc::new(versions));
                }
                if let Ok(fired) = fired {
                    view.fired = Some(Arc::new(fired));
                }
                if let Ok(promises) = promises {
                    view.promises = Some(Arc::new(promises));
                }
            });
            sleep(if is_complete { HISTORY } else { RETRY }).await;
        }
    }
}

fn too_many() -> Error {
    Error::Service { service: "Prometheus", cause: format!("it has more than {MOST_VALUES} values of the nodes") }
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}
