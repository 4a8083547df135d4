//! Drain of this node: it gives its work away, and takes none until it is undrained.
//!
//! Each role with work has a unit `drain-ROLE.service` that starts and stops the drain of its service. The order of the
//! steps is that of [`crate::node::drained`]: a drain writes the file on the disk before it changes a service, and an
//! undrain removes the file first. Only the hand-over of the primary comes before: it may fail, and after a power cut a
//! node that has handed over and is not drained is a usual standby.

use std::time::Duration;

use fleet::Node;
use fleet::node_api::{DrainAnswer, DrainRequest};
use futures_util::future::BoxFuture;
use hyper::StatusCode;
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, error, warn};

use super::NodeApi;
use super::danger::{database_status, has_sync_standby, refuse};
use super::reply::Refusal;
use crate::error::{Error, Result};
use crate::host::manager;
use crate::node::drained::{DrainState, Drained};

/// Sends a request about drained nodes to a hub.
pub type Drainer = Box<dyn Fn(DrainRequest) -> BoxFuture<'static, Result<DrainAnswer>> + Send + Sync>;

/// Time limit of a hub's check.
const CHECK: Duration = Duration::from_secs(5);
/// Time limit of a hub's answer to a report, with an election of etcd's leader.
const REPORT: Duration = Duration::from_secs(10);
/// Time limit of a unit. Open requests to the VIP have up to 10 s.
const UNIT: Duration = Duration::from_secs(60);
/// Time limit for Patroni to read its changed configuration.
const PATRONI: Duration = Duration::from_secs(30);
/// Time between two reads of a state.
const POLL: Duration = Duration::from_millis(250);
/// Time between two reports to the hubs, so that they agree with the node after a restore of etcd.
const REFRESH: Duration = Duration::from_secs(600);
/// Time between two attempts to report.
const RETRY: Duration = Duration::from_secs(10);

/// Returns the drained nodes; none if no hub answers, because the check of an action then has other reasons to refuse.
pub(super) async fn drained_nodes(api: &NodeApi) -> Vec<String> {
    match asked(api, DrainRequest::default(), CHECK).await {
        Ok(answer) => answer.drained.into_keys().collect(),
        Err(e) => {
            debug!("no hub says which nodes are drained: {}", e.chain());
            Vec::new()
        }
    }
}

/// Returns the reply to a request that has nothing to do.
pub(super) fn nothing_to_do(api: &NodeApi, drains: bool) -> Option<String> {
    let name = &api.node.name;
    match api.drained.current() {
        Some(drained) if drains => {
            let by = if drained.by.is_empty() { String::new() } else { format!(" by {}", drained.by) };
            Some(format!("{name} is drained already{by}"))
        }
        None if !drains => Some(format!("{name} is not drained")),
        _ => None,
    }
}

/// Refuses a drain with which the fleet loses its last standby, its last app node, or its last hub for the VIP. If there
/// is no such reason, the hubs record that the node is drained.
pub(super) async fn check(api: &NodeApi) -> Result<(), Refusal> {
    database(api).await?;
    let request = DrainRequest { drained: Some(true), check: true };
    match asked(api, request, CHECK).await {
        Ok(DrainAnswer { granted: true, .. }) => Ok(()),
        Ok(DrainAnswer { why, .. }) => Err(refuse(api, why, "repair or undrain another node")),
        Err(e) => {
            let why = format!("no hub can make sure that another node takes the work: {}", e.chain());
            let help = format!("wait until the hubs and etcd answer, or add `--force {}`", api.node.name);
            Err(Refusal::new(StatusCode::SERVICE_UNAVAILABLE, why).help(help))
        }
    }
}

/// Refuses if no standby could become the primary after the drain. A node whose Patroni does not answer has no primary
/// for long, and is no reserve.
async fn database(api: &NodeApi) -> Result<(), Refusal> {
    let name = &api.node.name;
    let (Some(patroni), Some(status)) = (api.patroni(), database_status(api).await) else { return Ok(()) };
    if status.primary {
        if has_sync_standby(&status) {
            return Ok(());
        }
        let why = format!("{name} has the primary, and no synchronous standby can take it over");
        return Err(refuse(api, why, "wait until `bakehouse status` shows a synchronous standby"));
    }
    let reserve =
        timeout(CHECK, patroni.reserve()).await.unwrap_or_else(|_| Err(Error::Failed("no answer".to_owned())));
    match reserve {
        Ok(others) if !others.is_empty() => Ok(()),
        Ok(_) => {
            let why = format!("{name} is the last standby that can become the primary");
            Err(refuse(api, why, "repair or undrain another database node"))
        }
        Err(e) => {
            let why = format!("the standbys are unknown: {}", e.chain());
            Err(refuse(api, why, "wait until Patroni reaches etcd"))
        }
    }
}

async fn asked(api: &NodeApi, request: DrainRequest, limit: Duration) -> Result<DrainAnswer> {
    let late = |_| Err(Error::Failed("no answer".to_owned()));
    timeout(limit, (api.drainer)(request)).await.unwrap_or_else(late)
}

/// Reports to the hubs whether the node is drained.
async fn report(api: &NodeApi) -> Result<()> {
    let request = DrainRequest { drained: Some(api.drained.current().is_some()), check: false };
    asked(api, request, REPORT).await.map(drop)
}

/// Drains the node. If a step fails, the node is not drained.
pub(super) async fn drain(api: &NodeApi, by: &str, forced: bool) -> Result<()> {
    let drained = async {
        hand_over(api, forced).await?;
        api.drained.store(Drained::now(by))?;
        let begun = async {
            follow(&api.bus().await?, &api.node, &api.drained).await?;
            no_primary(api, forced).await
        };
        if let Err(e) = begun.await {
            if let Err(e) = undrain(api).await {
                error!("cannot undo the drain: {}", e.chain());
            }
            return Err(Error::Failed(format!("{} is not drained: {}", api.node.name, e.chain())));
        }
        Ok(())
    };
    let drained = drained.await;
    // Moves etcd's leadership after a success, and removes the hubs' record after a failure.
    if let Err(e) = report(api).await {
        warn!("cannot report the drain to the hubs, trying again: {}", e.chain());
    }
    drained
}

/// Undrains the node.
pub(super) async fn undrain(api: &NodeApi) -> Result<()> {
    api.drained.remove()?;
    follow(&api.bus().await?, &api.node, &api.drained).await
}

/// Switches the primary over, if this node has it. Without a standby, there is no node to hand over to.
async fn hand_over(api: &NodeApi, forced: bool) -> Result<()> {
    let (Some(patroni), Some(status)) = (api.patroni(), database_status(api).await) else { return Ok(()) };
    if !status.primary || status.standbys.is_empty() {
        return Ok(());
    }
    match patroni.hand_over().await {
        Err(e) if forced => {
            error!("switchover failed, and the operator forces the drain: {}", e.chain());
            Ok(())
        }
        done => done,
    }
}

/// Waits until Patroni refuses to make this node the primary. Between the hand-over and that moment, another failover may
/// have made it the primary again.
async fn no_primary(api: &NodeApi, forced: bool) -> Result<()> {
    let (Some(patroni), Some(_)) = (api.patroni(), database_status(api).await) else { return Ok(()) };
    let until = Instant::now() + PATRONI;
    while !patroni.is_drained().await? {
        if Instant::now() > until {
            return Err(Error::Failed(format!("Patroni has not read its configuration in {} s", PATRONI.as_secs())));
        }
        sleep(POLL).await;
    }
    hand_over(api, forced).await
}

/// Makes `/run` and the services agree with the drain on the disk.
///
/// # Errors
/// If a file in `/run` cannot be written, or a unit does not start or stop. The other units are started or stopped.
pub(crate) async fn follow(bus: &zbus::Connection, node: &Node, state: &DrainState) -> Result<()> {
    state.publish()?;
    let drains = state.current().is_some();
    let mut result = Ok(());
    for role in &node.roles {
        let unit = format!("drain-{role}.service");
        if manager::find(bus, &unit).await?.is_some() {
            result = result.and(turn(bus, &unit, drains).await);
        }
    }
    result
}

/// Applies the drain on the disk before the roles start. A failure does not prevent the start of the roles, because
/// other nodes may need this node's vote in etcd.
pub async fn restore(bus: &zbus::Connection, node: &Node, state: &DrainState) {
    if let Err(e) = follow(bus, node, state).await {
        error!("cannot apply the drain of this node: {}", e.chain());
    }
}

/// Starts or stops a unit, and waits for its job.
async fn turn(bus: &zbus::Connection, unit: &str, starts: bool) -> Result<()> {
    let expected = if starts { "active" } else { "inactive" };
    // systemd unloads a unit that does not run.
    if !starts && manager::state(bus, unit).await? == (expected.to_owned(), false) {
        return Ok(());
    }
    if starts {
        manager::start(bus, unit).await?;
    } else {
        manager::stop(bus, unit).await?;
    }
    let until = Instant::now() + UNIT;
    loop {
        let (state, has_job) = manager::state(bus, unit).await?;
        if !has_job && state == expected {
            return Ok(());
        }
        if !has_job && state == "failed" || Instant::now() > until {
            return Err(Error::Failed(format!("{unit} is {state}; see: bakehouse logs NODE -u {unit}")));
        }
        sleep(POLL).await;
    }
}

/// Reports to the hubs whether the node is drained: after the agent's start, after each change, and then rarely.
pub(super) async fn keep_reported(api: &NodeApi) {
    let mut changes = api.drained.changes();
    loop {
        changes.borrow_and_update();
        let mut pause = REFRESH;
        if let Err(e) = report(api).await {
            debug!("cannot report to the hubs whether the node is drained: {}", e.chain());
            pause = RETRY;
        }
        // The state outlives the task.
        let _ = timeout(pause, changes.changed()).await;
    }
}
