//! State of the node, for operators.

use std::collections::BTreeMap;
use std::sync::PoisonError;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fleet::node_api::{NodeStatus, UnitStatus};
use hyper::StatusCode;
use tokio::time::timeout;
use tracing::debug;

use super::reply::Refusal;
use super::{NodeApi, Tasks, system};
use crate::client::haproxy;
use crate::client::patroni::Patroni;
use crate::error::{Error, Result};
use crate::host::console::said;
use crate::host::manager::{clock_is_synchronized, units as list_units};

/// Time limit of each part. A part that fails leaves its default.
const PART: Duration = Duration::from_secs(2);

impl NodeApi {
    /// Connects to the bus. The caller has the connection alone.
    pub(super) async fn bus(&self) -> Result<zbus::Connection> {
        Ok(match &self.bus {
            Some(address) => zbus::connection::Builder::address(address.as_str())?.build().await?,
            None => zbus::Connection::system().await?,
        })
    }

    /// Calls methods over a connection to the bus that requests share, because the bus limits the connections of a
    /// user, and the agent needs its own. After a failure or a time-out, the next call makes a new connection.
    async fn over_bus<T, F>(&self, call: impl FnOnce(zbus::Connection) -> F) -> Result<T>
    where
        F: Future<Output = Result<T>>,
    {
        let kept = self.tasks.bus.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let bus = match kept {
            Some(bus) => bus,
            None => self.bus().await?,
        };
        let mut used = Used { tasks: &self.tasks, works: None };
        let result = call(bus.clone()).await;
        // The service behind the bus may refuse.
        if matches!(&result, Ok(_) | Err(Error::Bus(zbus::Error::MethodError(..)))) {
            used.works = Some(bus);
        }
        result
    }

    /// Returns the client of this node's Patroni; `None` without a database.
    pub(super) fn patroni(&self) -> Option<Patroni> {
        Patroni::for_node(&self.node, self.tls.clone())
    }
}

/// A connection to the bus while a call uses it. Dropping it keeps the connection for the next call, if it works.
struct Used<'a> {
    tasks: &'a Tasks,
    works: Option<zbus::Connection>,
}

impl Drop for Used<'_> {
    fn drop(&mut self) {
        *self.tasks.bus.lock().unwrap_or_else(PoisonError::into_inner) = self.works.take();
    }
}

/// Returns the node's state.
pub(super) async fn status(api: &NodeApi) -> NodeStatus {
    let node = &api.node;
    let failed = part("the failed units", async {
        let failed = api.over_bus(|bus| async move { list_units(&bus, &["failed"]).await }).await?;
        Ok(failed.into_iter().map(|unit| unit.name).collect())
    });
    let clock = part("the clock", async { api.over_bus(|bus| async move { clock_is_synchronized(&bus).await }).await });
    let database = part("Patroni", async {
        match api.patroni() {
            Some(patroni) => patroni.status().await.map(Some),
            None => Ok(None),
        }
    });
    let odoo = part("HAProxy", async {
        if node.hub == 0 {
            return Ok(BTreeMap::new());
        }
        haproxy::odoo(&node.address.to_string()).await
    });
    let disks = part("the file systems", async {
        // The last read may still hang.
        let Ok(permit) = api.tasks.disks.clone().try_acquire_owned() else { return Ok(BTreeMap::new()) };
        let read = move || {
            let disks = system::disks();
            drop(permit);
            disks
        };
        tokio::task::spawn_blocking(read).await.map_err(Error::cannot("read the file systems"))
    });
    let (failed, clock_synchronized, database, odoo, disks) = tokio::join!(failed, clock, database, odoo, disks);
    let load = system::load().inspect_err(|e| debug!("status: {}", e.chain())).unwrap_or_default();
    NodeStatus {
        node: node.name.clone(),
        image: api.image.clone(),
        epoch: api.epoch,
        phase: api.phase.borrow().as_str().to_owned(),
        message: said().borrow().clone(),
        at: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
        uptime: load.uptime,
        vip: node.hub > 0 && system::has_address(api.topology.vip).unwrap_or_default(),
        load: load.averages,
        memory: load.memory,
        disks,
        failed,
        clock_synchronized,
        // Certificates of nodes do not expire.
        certificate_expires: None,
        database,
        odoo,
        drained: api.drained.current().map(|drained| drained.since),
    }
}

async fn part<T: Default>(what: &str, read: impl Future<Output = Result<T>>) -> T {
    match timeout(PART, read).await {
        Ok(Ok(value)) => value,
        Ok(Err(e)) => {
            debug!("status: {what}: {}", e.chain());
            T::default()
        }
        Err(_) => {
            debug!("status: {what}: no answer within {} s", PART.as_secs());
            T::default()
        }
    }
}

/// Returns all units that systemd has loaded.
pub(super) async fn units(api: &NodeApi) -> Result<Vec<UnitStatus>, Refusal> {
    let listed = timeout(2 * PART, api.over_bus(|bus| async move { list_units(&bus, &[]).await })).await;
    let failed = |why: &str| Refusal::new(StatusCode::SERVICE_UNAVAILABLE, format!("systemd does not answer{why}"));
    let units = listed.map_err(|_| failed(""))?.map_err(|e| failed(&format!(": {}", e.chain())))?;
    let mut status: Vec<UnitStatus> = units
        .into_iter()
        .map(|unit| UnitStatus { name: unit.name, description: unit.description, active: unit.active, sub: unit.sub })
        .collect();
    status.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(status)
}
