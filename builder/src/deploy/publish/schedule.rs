//! Schedule of a rollout: the order of the nodes, their downloads, and an estimate of the time.

use std::fmt;

use fleet::{Topology, disruption_order};
use schemars::JsonSchema;
use serde::Serialize;

use super::diff::Comparison;

/// Bytes that a node downloads per second from a gigabit network.
const RATE: u64 = 100_000_000;
/// Seconds to stop services, start firmware and kernel, and check the node's health.
const RESTART: u64 = 60;

/// Order in which nodes change to new images. Each node restarts once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub(crate) struct RolloutSchedule {
    /// Nodes in the order of the rollout.
    pub stops: Vec<ScheduledNode>,
    /// Estimated time in seconds, with a gigabit network and a minute for each restart.
    pub seconds: u64,
}

/// A node of the schedule.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub(crate) struct ScheduledNode {
    /// Name of the node.
    pub node: String,
    /// Bytes that the node downloads.
    pub load: u64,
}

impl RolloutSchedule {
    /// Schedules the nodes whose images change. The rollout itself also puts the primary and the hub with the VIP last
    /// among nodes of equal rank; the schedule does not know them.
    #[must_use]
    pub(crate) fn new(topology: &Topology, plans: &[Comparison]) -> Self {
        let changing = |group: &str| plans.iter().find(|p| p.group == group && p.from.is_some() && !p.is_empty());
        let mut nodes: Vec<_> = topology.nodes.iter().collect();
        nodes.sort_by_key(|n| disruption_order(n));
        let stops: Vec<ScheduledNode> = (nodes.into_iter())
            .filter_map(|n| Some(ScheduledNode { node: n.name.clone(), load: changing(&n.group)?.load }))
            .collect();
        let seconds = stops.iter().map(|s| s.load / RATE + RESTART).sum();
        Self { stops, seconds }
    }
}

impl fmt::Display for RolloutSchedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.stops.is_empty() {
            return Ok(());
        }
        let shown = |s: &ScheduledNode| format!("{} ({} MB)", s.node, s.load.div_ceil(1_000_000));
        let order: Vec<String> = self.stops.iter().map(shown).collect();
        writeln!(f, "order: {}", order.join(", "))?;
        writeln!(f, "time:  about {} min, at a gigabit and a minute for each restart", self.seconds.div_ceil(60))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet::Fleet;

    #[test]
    fn schedules_changing_nodes_least_disruptive_first() {
        let toml = b"name=\"x\"\n[groups]\nhub.count=3\ndb.count=2\napp.count=2\nmonitor.count=1\n";
        let topology = Topology::from_fleet(&Fleet::parse("f", toml).unwrap());
        let plan = |group: &str, from: Option<&str>, changed: &[&str]| Comparison {
            group: group.to_owned(),
            from: from.map(str::to_owned),
            to: "2".to_owned(),
            load: 250_000_000,
            added: Vec::new(),
            removed: Vec::new(),
            changed: changed.iter().map(ToString::to_string).collect(),
            files: Vec::new(),
            settings: Vec::new(),
            addons: crate::deploy::publish::addons::AddonChanges::default(),
            obstacles: Vec::new(),
            one_way: Vec::new(),
        };
        let plans = [
            plan("hub", Some("1"), &["etcd 1 → 2"]),
            plan("app", Some("1"), &["odoo 1 → 2"]),
            plan("db", Some("1"), &[]),
            plan("monitor", None, &[]),
        ];
        let schedule = RolloutSchedule::new(&topology, &plans);
        let order: Vec<&str> = schedule.stops.iter().map(|s| s.node.as_str()).collect();
        assert_eq!(order, ["app-1", "app-2", "hub-1", "hub-2", "hub-3"]);
        assert_eq!(schedule.seconds, 5 * 62);
        assert!(schedule.to_string().contains("app-1 (250 MB)"));
        assert_eq!(RolloutSchedule::new(&topology, &[]).to_string(), "");
    }
}
