//! State of a fleet: its nodes, PostgreSQL, and HAProxy.

use std::collections::BTreeMap;

use fleet::node_api::NodeStatus;
use schemars::JsonSchema;
use serde::Serialize;

use super::alerts::FiringAlert;
use super::network::{HostForward, VirtualNic};
use super::query::seen;
use crate::project::Project;

/// State of a fleet, which `bakehouse status` prints.
#[derive(Clone, Debug, Default, Serialize, JsonSchema)]
pub struct FleetStatus {
    /// Nodes in the order of the fleet's topology.
    pub nodes: Vec<NodeRow>,
    /// HAProxy's status (`UP`, `DOWN` and others) of each Odoo server, on the hub that holds the VIP.
    pub odoo: BTreeMap<String, String>,
    /// Addresses of Odoo for a browser on this host.
    pub urls: Vec<String>,
    /// What a monitor knows. The key is absent if none answers in time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub monitor: Option<MonitorFacts>,
    /// Alerts that fire, the most severe ones first. The key is absent if no monitor answers in time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alerts: Option<Vec<FiringAlert>>,
    /// Expiry of the operator's certificate, in seconds since 1970. The key is absent without such a certificate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub certificate_expires: Option<u64>,
}

/// What the Prometheus of a monitor knows about backups, certificates and Odoo. A key is absent if Prometheus has no value.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct MonitorFacts {
    /// Name of the monitor.
    pub monitor: String,
    /// End of the newest backup in the repository, in seconds since 1970.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backup: Option<u64>,
    /// Number of backups in the repository.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backups: Option<u64>,
    /// Time at which the primary last archived WAL, in seconds since 1970. A restore reaches this time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub archived: Option<u64>,
    /// Expiry of the certificate for browsers, in seconds since 1970.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub web_certificate: Option<u64>,
    /// Whether the last probe of Odoo's login page through the VIP succeeded. Odoo renders that page from the database.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub login: Option<bool>,
}

/// State of one node.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct NodeRow {
    /// Name of the node.
    pub node: String,
    /// Group of the node.
    pub group: String,
    /// Roles of the node.
    pub roles: Vec<String>,
    /// Address in the mesh.
    pub address: String,
    /// State of its machine.
    pub state: MachineState,
    /// Last message of its agent.
    pub message: String,
    /// Whether the node holds the VIP.
    pub vip: bool,
    /// State of PostgreSQL, on a database node.
    pub database: Option<Database>,
    /// The node's own report over its API. The key is absent if the node does not answer there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub report: Option<NodeStatus>,
}

/// State of a node, and HAProxy's status of each Odoo server if the node is a hub.
pub type SeenNode = (NodeRow, BTreeMap<String, String>);

/// State of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum MachineState {
    /// The machine is off.
    Off,
    /// The machine runs, and does not reply yet.
    Booting,
    /// The agent waits for its slot.
    Joining,
    /// The node's roles start.
    Starting,
    /// All roles are ready.
    Ready,
    /// The node does not answer the operator. Its message has the reason.
    Silent,
}

/// PostgreSQL's state on a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Database {
    /// Primary, with the standbys that replicate from it.
    Primary(Vec<Standby>),
    /// Standby.
    Standby,
}

/// A standby in the primary's `pg_stat_replication`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Standby {
    /// Name of the node.
    pub node: String,
    /// Whether commits wait for this standby (a synchronous standby).
    pub sync: bool,
    /// Bytes of WAL that the standby has not replayed.
    pub lag: u64,
}

impl NodeRow {
    /// Returns the time at which an operator drained the node, in seconds since 1970; `None` if the node is not drained.
    #[must_use]
    pub fn drained(&self) -> Option<u64> {
        self.report.as_ref()?.drained
    }
}

impl FleetStatus {
    /// Reads the state of all local machines, in parallel.
    #[must_use]
    pub fn read(project: &Project) -> Self {
        let all: Vec<&str> = project.topology.nodes.iter().map(|node| node.name.as_str()).collect();
        Self::new(seen(project, &all), Some(project))
    }

    /// Makes the state of a fleet from that of its nodes. `local` has the addresses of local machines.
    #[must_use]
    pub fn new(seen: Vec<SeenNode>, local: Option<&Project>) -> Self {
        let holder = seen.iter().find(|(row, _)| row.vip).or_else(|| seen.iter().find(|(_, odoo)| !odoo.is_empty()));
        let odoo = holder.map(|(_, odoo)| odoo.clone()).unwrap_or_default();
        let urls = local.map(|project| urls(project, &seen)).unwrap_or_default();
        Self { nodes: seen.into_iter().map(|(row, _)| row).collect(), odoo, urls, ..Self::default() }
    }

    /// Returns whether the fleet is complete: every node is ready, one hub holds the VIP, all standbys replicate from
    /// the one primary, at least one of them synchronously, and HAProxy reports every Odoo server as up that is not
    /// drained.
    #[must_use]
    pub fn is_healthy(&self) -> bool {
        let standbys = self.nodes.iter().filter(|n| n.database == Some(Database::Standby)).count();
        let primaries: Vec<&Vec<Standby>> = self
            .nodes
            .iter()
            .filter_map(|n| if let Some(Database::Primary(standbys)) = &n.database { Some(standbys) } else { None })
            .collect();
        let is_complete = |with: &[Standby]| with.len() == standbys && (standbys == 0 || with.iter().any(|s| s.sync));
        let replicating = matches!(primaries[..], [with] if is_complete(with));
        let databases = self.nodes.iter().any(|n| n.roles.iter().any(|r| r == "db"));
        self.nodes.iter().all(|n| n.state == MachineState::Ready)
            && self.nodes.iter().filter(|n| n.vip).count() == 1
            && (!databases || replicating)
            && self.nodes.iter().all(|n| !n.roles.iter().any(|r| r == "db") || n.database.is_some())
            && self
                .nodes
                .iter()
                .filter(|n| n.roles.iter().any(|r| r == "app") && n.drained().is_none())
                .all(|n| self.odoo.get(&n.node).is_some_and(|s| s == "UP"))
    }

    /// Returns whether a monitor has probed Odoo's login page, and the page failed.
    pub(super) fn login_fails(&self) -> bool {
        self.monitor.as_ref().is_some_and(|facts| facts.login == Some(false))
    }

    /// Returns whether a node is drained.
    #[must_use]
    pub fn is_drained(&self, node: &str) -> bool {
        self.row(node).is_some_and(|row| row.drained().is_some())
    }

    /// Returns the state of a node.
    #[must_use]
    pub fn row(&self, node: &str) -> Option<&NodeRow> {
        self.nodes.iter().find(|r| r.node == node)
    }

    /// Returns the node that holds the VIP.
    #[must_use]
    pub fn holder(&self) -> Option<&str> {
        self.nodes.iter().find(|r| r.vip).map(|r| r.node.as_str())
    }

    /// Returns the node with the primary.
    #[must_use]
    pub fn primary(&self) -> Option<&str> {
        self.nodes.iter().find(|r| matches!(r.database, Some(Database::Primary(_)))).map(|r| r.node.as_str())
    }
}

impl MachineState {
    /// Returns the name that `bakehouse status` prints.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Booting => "booting",
            Self::Joining => "joining",
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Silent => "silent",
        }
    }

    /// Returns the state of a machine whose agent is in this phase.
    #[must_use]
    pub fn from_phase(phase: &str) -> Self {
        match phase {
            "ready" => Self::Ready,
            "starting" => Self::Starting,
            _ => Self::Joining,
        }
    }
}

/// Returns the addresses of Odoo for a browser on this host.
fn urls(project: &Project, seen: &[SeenNode]) -> Vec<String> {
    let served = project.topology.nodes.iter().any(|n| n.has_role("app"));
    let hub_forwards = project.topology.hubs.iter().filter(|_| served).filter_map(|hub| {
        let up = seen.iter().any(|(row, _)| row.node == hub.name && row.state != MachineState::Off);
        VirtualNic::for_node(project, hub).forward.filter(|_| up)
    });
    hub_forwards.filter_map(|forward: HostForward| forward.url()).collect()
}
