//! How a fleet changes: which node after which, what each loads, and about how long it takes.

use std::fmt;

use fleet::{Topology, disruption_order};
use serde::Serialize;

use super::diff::Comparison;

/// Bytes that a node loads in a second: a gigabit network's.
const RATE: u64 = 100_000_000;
/// Seconds for services that end, firmware, boot, and the proof that all is well.
const RESTART: u64 = 60;

/// Nodes one after the other, each of which restarts once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RolloutSchedule {
    pub stops: Vec<ScheduledNode>,
    /// At a gigabit, and a minute for each restart.
    pub seconds: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ScheduledNode {
    pub node: String,
    /// Bytes.
    pub load: u64,
}

impl RolloutSchedule {
    /// Of the nodes whose group's image changes. Who leads at the time goes last of its kind,
    /// whatever this says.
    #[must_use]
    pub fn of(topology: &Topology, plans: &[Comparison]) -> Self {
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
        let stop = |s: &ScheduledNode| format!("{} ({} MB)", s.node, s.load.div_ceil(1_000_000));
        let order: Vec<String> = self.stops.iter().map(stop).collect();
        writeln!(f, "order: {}", order.join(", "))?;
        writeln!(f, "time:  about {} min, at a gigabit and a minute for each restart", self.seconds.div_ceil(60))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet::Fleet;

    #[test]
    fn who_is_missed_least_goes_first_and_who_does_not_change_not_at_all() {
        let toml = b"name=\"x\"\n[groups]\nhub.count=3\ndb.count=2\napp.count=2\nmonitor.count=1\n";
        let topology = Topology::of(&Fleet::parse("f", toml).unwrap());
        let plan = |group: &str, from: Option<&str>, changed: &[&str]| Comparison {
            group: group.to_owned(),
            from: from.map(str::to_owned),
            to: "2".to_owned(),
            load: 250_000_000,
            added: Vec::new(),
            removed: Vec::new(),
            changed: changed.iter().map(ToString::to_string).collect(),
            files: Vec::new(),
            obstacles: Vec::new(),
            one_way: Vec::new(),
        };
        let plans = [
            plan("hub", Some("1"), &["etcd 1 → 2"]),
            plan("app", Some("1"), &["odoo 1 → 2"]),
            plan("db", Some("1"), &[]),
            plan("monitor", None, &[]),
        ];
        let course = RolloutSchedule::of(&topology, &plans);
        let order: Vec<&str> = course.stops.iter().map(|s| s.node.as_str()).collect();
        assert_eq!(order, ["app-1", "app-2", "hub-1", "hub-2", "hub-3"]);
        assert_eq!(course.seconds, 5 * 62);
        assert!(course.to_string().contains("app-1 (250 MB)"));
        assert_eq!(RolloutSchedule::of(&topology, &[]).to_string(), "");
    }
}
