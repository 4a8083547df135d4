//! The fleet's lock. A node holds it while an action stops a service of value, until the node is ready again, so that
//! two actions, or an action and a change of an image, do not stop two nodes at the same time. It is the lock of the
//! rollout, in etcd, and a hub takes it for the node.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use fleet::UpdateDecision;
use futures_util::future::BoxFuture;
use hyper::StatusCode;
use tokio::runtime::Handle;
use tokio::time::{Instant, sleep, timeout};
use tracing::warn;

use super::NodeApi;
use super::danger::{database_status, is_healthy};
use super::reply::Refusal;
use crate::error::{Error, Result};
use crate::host::dbus::Phase;

/// Takes the fleet's lock for this number of seconds, or frees it for 0, and returns whether the node has it.
pub type Locker = Box<dyn Fn(u32) -> BoxFuture<'static, Result<UpdateDecision>> + Send + Sync>;

/// Longest time for which a node holds the lock, in seconds: two hand-overs, a reboot, and the start of its roles.
pub(super) const LONGEST: u32 = 600;
/// Time for which a node that switches off holds the lock, in seconds. After it, the other nodes' checks find the node
/// missing.
pub(super) const UNTIL_OFF: u32 = 180;
/// Time limit of a hub's answer.
const ANSWER: Duration = Duration::from_secs(3);
/// Time between two checks whether the node is ready.
const POLL: Duration = Duration::from_secs(2);
/// Time between two attempts to free the lock.
const RETRY: Duration = Duration::from_secs(10);

/// The fleet's lock. Dropping it frees the lock.
pub(super) struct Held {
    api: Arc<NodeApi>,
    /// Number of times that the node has taken the lock.
    turn: u64,
    /// Whether the action stopped something, so that the node has to be ready first.
    has_stopped: bool,
    /// Whether the node keeps the lock over a boot.
    is_kept: bool,
}

/// Takes the lock for this number of seconds.
///
/// # Errors
/// If another node has the lock, or no hub reaches etcd. With `is_forced`, returns `None` in these cases.
pub(super) async fn take(api: &Arc<NodeApi>, seconds: u32, is_forced: bool) -> Result<Option<Held>, Refusal> {
    let name = &api.node.name;
    let refused =
        |status, why: String, wait: &str| Refusal::new(status, why).help(format!("{wait}, or add `--force {name}`"));
    // From here on, the end of an earlier action does not free the lock.
    let turn = api.tasks.lock_turn.fetch_add(1, Ordering::Relaxed) + 1;
    let refusal = match asked(api, seconds).await {
        Ok(UpdateDecision { granted: true, .. }) => {
            return Ok(Some(Held { api: api.clone(), turn, has_stopped: false, is_kept: false }));
        }
        Ok(UpdateDecision { why, .. }) => {
            refused(StatusCode::CONFLICT, format!("{name} has to wait: {why}"), "wait until it is done")
        }
        Err(e) => {
            let why = format!("no hub can make sure that no other node stops at the same time: {}", e.chain());
            refused(StatusCode::SERVICE_UNAVAILABLE, why, "wait until the hubs and etcd answer")
        }
    };
    // An earlier action may have left the lock to this one.
    tokio::spawn(free(api.clone(), turn, true));
    if is_forced {
        warn!("an operator forces an action without the fleet's lock: {}", refusal.error.message);
        return Ok(None);
    }
    Err(refusal)
}

async fn asked(api: &NodeApi, seconds: u32) -> Result<UpdateDecision> {
    let late = |_| Err(Error::Failed("no answer".to_owned()));
    timeout(ANSWER, (api.locker)(seconds)).await.unwrap_or_else(late)
}

impl Held {
    /// Notes that the action stops a service: the lock is free when the node is ready again.
    pub(super) fn stops(&mut self) {
        self.has_stopped = true;
    }

    /// Keeps the lock, because the machine stops. The agent frees it after the next boot.
    pub(super) fn keep(mut self) {
        self.is_kept = true;
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let Some(runtime) = Handle::try_current().ok().filter(|_| !self.is_kept) else { return };
        runtime.spawn(free(self.api.clone(), self.turn, self.has_stopped));
    }
}

/// Frees the lock that the node may have from before it booted, when the node is ready.
pub(super) async fn free_after_boot(api: Arc<NodeApi>) {
    let turn = api.tasks.lock_turn.load(Ordering::Relaxed);
    free(api, turn, true).await;
}

/// Frees the lock, unless a later action has taken it, or it has expired. `when_ready`: waits until the node is ready.
async fn free(api: Arc<NodeApi>, turn: u64, when_ready: bool) {
    let until = Instant::now() + Duration::from_secs(LONGEST.into());
    let is_over = || Instant::now() > until || api.tasks.lock_turn.load(Ordering::Relaxed) != turn;
    while when_ready && !is_ready(&api).await {
        if is_over() {
            return;
        }
        sleep(POLL).await;
    }
    while !is_over()
        && let Err(e) = asked(&api, 0).await
    {
        warn!("cannot free the fleet's lock, trying again: {}", e.chain());
        sleep(RETRY).await;
    }
}

/// Whether the node's roles run, its database runs, and its etcd member answers.
async fn is_ready(api: &NodeApi) -> bool {
    if *api.phase.borrow() != Phase::Ready {
        return false;
    }
    let database = async {
        let runs = |state: &str| matches!(state, "running" | "streaming");
        api.patroni().is_none() || database_status(api).await.is_some_and(|status| runs(&status.state))
    };
    let etcd = async { !api.topology.voters.contains(&api.node.name) || is_healthy(api, &api.node).await };
    let (database, etcd) = tokio::join!(database, etcd);
    database && etcd
}
