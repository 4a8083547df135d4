//! Reasons not to stop a node's services: what the fleet would lose, as far as the node itself can read it.

use std::net::SocketAddr;
use std::time::Duration;

use fleet::node_api::DatabaseStatus;
use fleet::{Node, Topology, VOTER};
use fleet_https::{Connection, request};
use futures_util::future::join_all;
use hyper::StatusCode;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tracing::debug;

use super::reply::Refusal;
use super::{NodeApi, system};
use crate::error::Result;

/// Time limit for each other node and service.
const ANSWER: Duration = Duration::from_secs(2);
/// etcd's port for clients.
const ETCD: u16 = 2379;

/// Units without which the node has no network, no bus or no roles. systemd stops no service with most of them.
const CORE: [&str; 8] = [
    "bird.service",
    "dbus-broker.service",
    "dbus.socket",
    "early-filter.service",
    "nftables.service",
    "role-base.target",
    "systemd-networkd.service",
    "systemd-networkd.socket",
];

/// Services of a node that an action stops.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "each service stops or runs, whatever the others do")]
pub(super) struct Stops {
    pub(super) database: bool,
    pub(super) etcd: bool,
    pub(super) vip: bool,
    /// Odoo, and all others.
    pub(super) rest: bool,
}

impl Stops {
    /// The whole machine stops.
    pub(super) const ALL: Self = Self { database: true, etcd: true, vip: true, rest: true };
    /// PostgreSQL stops.
    pub(super) const DATABASE: Self = Self { database: true, etcd: false, vip: false, rest: false };

    /// Returns what a restart of a unit stops, without the units that stop with it.
    pub(super) fn of_unit(unit: &str) -> Self {
        if CORE.contains(&unit) {
            return Self::ALL;
        }
        let of = |role: &str, service: &str| unit == service || unit == format!("role-{role}.target");
        Self {
            database: of("db", "patroni.service"),
            etcd: of(VOTER, "etcd.service"),
            vip: of("hub", "keepalived.service"),
            rest: false,
        }
    }

    /// Whether the fleet could lose a service if another node stopped the same at the same time.
    pub(super) fn needs_lock(self, api: &NodeApi) -> bool {
        let node = &api.node;
        self.database && node.has_role("db")
            || self.etcd && api.topology.voters.contains(&node.name)
            || self.vip && node.hub > 0
            || self.rest && node.has_role("app")
    }
}

impl FromIterator<Self> for Stops {
    fn from_iter<T: IntoIterator<Item = Self>>(all: T) -> Self {
        all.into_iter().fold(Self::default(), |a, b| Self {
            database: a.database || b.database,
            etcd: a.etcd || b.etcd,
            vip: a.vip || b.vip,
            rest: a.rest || b.rest,
        })
    }
}

/// Refuses if the fleet would lose its primary without a synchronous standby, etcd's quorum, its last VIP, or its last app
/// node that is not drained. `drained`: the drained nodes.
pub(super) async fn check(api: &NodeApi, stops: Stops, drained: &[String]) -> Result<(), Refusal> {
    let database = async { if stops.database { database(api).await } else { Ok(()) } };
    let is_voter = stops.etcd && api.topology.voters.contains(&api.node.name);
    let quorum = async { if is_voter { quorum(api).await } else { Ok(()) } };
    let vip = async { if stops.vip && api.node.hub > 0 { vip(api, drained).await } else { Ok(()) } };
    let (database, quorum, vip) = tokio::join!(database, quorum, vip);
    let app = if stops.rest && api.node.has_role("app") { app(api, drained) } else { Ok(()) };
    database.and(quorum).and(vip).and(app)
}

/// Returns the refusal of an action, with the way to carry it out nevertheless.
pub(super) fn refuse(api: &NodeApi, why: String, wait: &str) -> Refusal {
    let help = format!("{wait}, or add `--force {}`", api.node.name);
    Refusal::new(StatusCode::CONFLICT, why).help(help)
}

/// Returns the state of this node's database; `None` without one, and if Patroni does not answer. A Patroni that does
/// not answer does not hold the leader key for long, and an operator must be able to restart it.
pub(super) async fn database_status(api: &NodeApi) -> Option<DatabaseStatus> {
    let patroni = api.patroni()?;
    let status = timeout(ANSWER, patroni.status()).await;
    status.ok()?.inspect_err(|e| debug!("Patroni does not answer: {}", e.chain())).ok()
}

async fn database(api: &NodeApi) -> Result<(), Refusal> {
    match database_status(api).await {
        Some(status) if status.primary && !has_sync_standby(&status) => {
            let why = format!("{} has the primary, and no synchronous standby replicates from it", api.node.name);
            Err(refuse(api, why, "wait until `bakehouse status` shows a synchronous standby"))
        }
        _ => Ok(()),
    }
}

/// Whether a synchronous standby can become the primary.
pub(super) fn has_sync_standby(status: &DatabaseStatus) -> bool {
    status.standbys.iter().any(|standby| standby.sync && !standby.drained)
}

/// Refuses if etcd would lose its quorum without this voter, or the other voters do not answer.
async fn quorum(api: &NodeApi) -> Result<(), Refusal> {
    let name = &api.node.name;
    let others: Vec<&Node> = api
        .topology
        .voters
        .iter()
        .filter(|voter| *voter != name)
        .filter_map(|voter| api.topology.node(voter))
        .collect();
    let healthy = join_all(others.iter().map(async |voter| (voter.name.clone(), is_healthy(api, voter).await))).await;
    let voters = others.len() + 1;
    if keeps_quorum(voters, healthy.iter().filter(|(_, is_healthy)| *is_healthy).count()) {
        return Ok(());
    }
    let silent: Vec<String> =
        healthy.into_iter().filter(|(_, is_healthy)| !is_healthy).map(|(voter, _)| voter).collect();
    let why = if silent.is_empty() {
        format!("{name} has one of {voters} votes in etcd, and the others are no quorum")
    } else {
        format!("etcd would lose its quorum without {name}: {} do not answer", silent.join(", "))
    };
    Err(refuse(api, why, "start the other voters"))
}

/// Whether `healthy` other members are a quorum of `voters`.
fn keeps_quorum(voters: usize, healthy: usize) -> bool {
    healthy > voters / 2
}

/// Whether an etcd member answers a read that needs the quorum.
pub(super) async fn is_healthy(api: &NodeApi, voter: &Node) -> bool {
    let host = voter.address.to_string();
    let asked = async {
        let mut connection = Connection::open(&host, ETCD, &host, &api.tls).await?;
        connection.ask(request("GET", &host, "/health", &[], "".into())?, 64 << 10).await
    };
    let answer = timeout(ANSWER, asked).await;
    let health = |body: bytes::Bytes| serde_json::from_slice::<Value>(&body).unwrap_or_default()["health"] == "true";
    answer.is_ok_and(|answer| answer.is_ok_and(health))
}

/// Refuses if all other app nodes are drained. A drained node serves nothing that the fleet could lose.
fn app(api: &NodeApi, drained: &[String]) -> Result<(), Refusal> {
    let name = &api.node.name;
    let others = || api.topology.nodes.iter().filter(|node| node.has_role("app") && node.name != *name);
    if api.drained.current().is_some() || others().next().is_none() {
        return Ok(());
    }
    let mut others = others().map(|node| &node.name);
    if !others.all(|other| drained.contains(other)) {
        return Ok(());
    }
    let why = format!("all app nodes except {name} are drained: {}", drained.join(", "));
    Err(refuse(api, why, "undrain one (`bakehouse undrain NODE`)"))
}

/// Refuses if this hub has the VIP, and no other hub runs that is not drained.
async fn vip(api: &NodeApi, drained: &[String]) -> Result<(), Refusal> {
    if !system::has_address(api.topology.vip).unwrap_or_default() {
        return Ok(());
    }
    let Topology { hubs, mesh, .. } = &api.topology;
    let others: Vec<SocketAddr> = hubs
        .iter()
        .filter(|hub| hub.name != api.node.name && !drained.contains(&hub.name))
        .map(|hub| SocketAddr::from((hub.address, mesh.port)))
        .collect();
    let connects = others.iter().map(async |at| timeout(ANSWER, TcpStream::connect(at)).await.is_ok_and(|c| c.is_ok()));
    if join_all(connects).await.contains(&true) {
        return Ok(());
    }
    let are_drained: Vec<&str> =
        hubs.iter().filter(|hub| drained.contains(&hub.name)).map(|hub| hub.name.as_str()).collect();
    let except = if are_drained.is_empty() { String::new() } else { format!(" (drained: {})", are_drained.join(", ")) };
    let why = format!("{} has the VIP, and no other hub answers{except}", api.node.name);
    Err(refuse(api, why, "start or undrain another hub"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet::node_api::StandbyStatus;

    #[test]
    fn quorum_needs_more_than_half_of_all_voters() {
        let kept = [(1, 0), (2, 1), (3, 1), (3, 2), (4, 2), (4, 3), (5, 2), (5, 3)].map(|(v, h)| keeps_quorum(v, h));
        assert_eq!(kept, [false, false, false, true, false, true, false, true]);
    }

    #[test]
    fn restart_of_a_unit_stops_its_service_only() {
        let none = Stops::default();
        assert_eq!(Stops::of_unit("patroni.service"), Stops::DATABASE);
        assert_eq!(Stops::of_unit("role-voter.target"), Stops { etcd: true, ..none });
        assert_eq!(Stops::of_unit("keepalived.service"), Stops { vip: true, ..none });
        assert_eq!(Stops::of_unit("haproxy.service"), none);
        let both: Stops = ["etcd.service", "role-db.target"].map(Stops::of_unit).into_iter().collect();
        assert_eq!(both, Stops { database: true, etcd: true, ..none });
    }

    #[test]
    fn restart_of_a_unit_below_all_services_stops_all() {
        for unit in CORE {
            assert_eq!(Stops::of_unit(unit), Stops::ALL, "{unit}");
        }
    }

    #[test]
    fn only_a_synchronous_standby_counts() {
        let standby = |sync| StandbyStatus { node: "db-2".to_owned(), sync, lag: 0, drained: false };
        let primary = |standbys| DatabaseStatus { primary: true, state: "running".to_owned(), standbys };
        assert!(!has_sync_standby(&primary(Vec::new())) && !has_sync_standby(&primary(vec![standby(false)])));
        assert!(has_sync_standby(&primary(vec![standby(false), standby(true)])));
        assert!(!has_sync_standby(&primary(vec![StandbyStatus { drained: true, ..standby(true) }])));
    }
}
