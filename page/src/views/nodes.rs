//! The table of nodes. A large fleet has a row for each group, and the nodes with problems.

use serde::Serialize;

use super::{Button, Content, Viewer, class, count, words};
use crate::config::Node;
use crate::format::{Unit, duration, plain, whole};
use crate::history::mix;
use crate::state::{Database, Health, NodeState};

#[derive(Debug, Serialize)]
pub(super) struct Nodes {
    /// Whether every node has a row.
    is_complete: bool,
    groups: Vec<GroupRow>,
    rows: Vec<Row>,
    /// Number of nodes with problems that have no row.
    more: usize,
    acts: bool,
}

/// A group of a large fleet.
#[derive(Debug, Serialize)]
struct GroupRow {
    name: String,
    grade: &'static str,
    works: String,
    versions: String,
    load: String,
    memory: String,
    disk: String,
}

#[derive(Debug, Serialize)]
struct Row {
    name: String,
    roles: String,
    address: String,
    health: &'static str,
    words: &'static str,
    /// What the node does, and its problems.
    facts: Vec<Fact>,
    version: String,
    uptime: String,
    load: Meter,
    memory: Meter,
    disk: Meter,
    buttons: Vec<Button>,
}

#[derive(Debug, Serialize)]
struct Fact {
    text: String,
    is_bad: bool,
}

/// A value with a bar.
#[derive(Debug, Serialize)]
struct Meter {
    text: String,
    /// Length of the bar, 0 to 100; `None` without a value.
    percent: Option<usize>,
    grade: &'static str,
}

/// Number of rows in a large fleet.
const MOST: usize = 40;

pub(super) fn context(content: &Content, viewer: &Viewer) -> Nodes {
    let (fleet, state) = (content.fleet, content.state);
    let pairs: Vec<(&Node, &NodeState)> = fleet.nodes.iter().zip(&state.nodes).collect();
    let is_complete = fleet.is_small();
    let has_row = |(_, state): &&(&Node, &NodeState)| {
        is_complete || state.drained.is_some() || !matches!(state.health, Health::Good | Health::Unknown)
    };
    let wanted: Vec<&(&Node, &NodeState)> = pairs.iter().filter(has_row).collect();
    let shown = if is_complete { wanted.len() } else { wanted.len().min(MOST) };
    Nodes {
        is_complete,
        groups: if is_complete { Vec::new() } else { groups(&pairs) },
        rows: wanted[..shown].iter().map(|(node, state)| row(content, viewer, node, state)).collect(),
        more: wanted.len() - shown,
        acts: viewer.acts,
    }
}

fn groups(pairs: &[(&Node, &NodeState)]) -> Vec<GroupRow> {
    let mut names: Vec<&str> = pairs.iter().map(|(node, _)| node.group.as_str()).collect();
    names.dedup();
    names
        .into_iter()
        .map(|name| {
            let of: Vec<&NodeState> =
                pairs.iter().filter(|(node, _)| node.group == name).map(|(_, state)| *state).collect();
            let good = of.iter().filter(|state| state.health == Health::Good).count();
            let highest = |unit: Unit, value: fn(&NodeState) -> Option<f64>| {
                let value = of.iter().filter_map(|state| value(state)).reduce(f64::max);
                value.map_or_else(|| "–".to_owned(), |value| unit.text(value))
            };
            let versions = mix(of.iter().filter_map(|state| state.version.as_deref()));
            let versions = versions.iter().map(|(version, count)| format!("{} on {count}", plain(version)));
            GroupRow {
                name: name.to_owned(),
                grade: if good == of.len() { "good" } else { "warn" },
                works: format!("{good} of {}", of.len()),
                versions: versions.take(3).collect::<Vec<_>>().join(", "),
                load: highest(Unit::Number, |state| state.load),
                memory: highest(Unit::Share, |state| state.memory),
                disk: highest(Unit::Share, |state| state.disk),
            }
        })
        .collect()
}

fn row(content: &Content, viewer: &Viewer, node: &Node, of: &NodeState) -> Row {
    let shown = |value: Option<&String>| value.map_or_else(|| "–".to_owned(), |value| plain(value));
    Row {
        name: node.name.clone(),
        roles: node.roles.iter().filter(|role| *role != "base").cloned().collect::<Vec<_>>().join(", "),
        address: node.address.to_string(),
        health: class(of.health),
        words: words(of.health),
        facts: facts(content, node, of),
        version: shown(of.version.as_ref()),
        uptime: of.uptime.map_or_else(|| "–".to_owned(), duration),
        load: meter(of.load, Unit::Number, (1.5, 4.0)),
        memory: meter(of.memory, Unit::Share, (0.85, 0.95)),
        disk: meter(of.disk, Unit::Share, (0.85, 0.97)),
        buttons: if viewer.acts { buttons(node, of) } else { Vec::new() },
    }
}

fn facts(content: &Content, node: &Node, of: &NodeState) -> Vec<Fact> {
    let state = content.state;
    let mut facts = Vec::new();
    let mut add = |text: String, is_bad| facts.push(Fact { text, is_bad });
    if let Some(since) = of.drained {
        add(format!("drained for {}", duration((state.at - since).max(0.0))), false);
    }
    if state.vip.contains(&node.name) {
        add("holds the VIP".to_owned(), false);
    }
    match of.database {
        Some(Database::Primary) => add("has the primary".to_owned(), false),
        Some(Database::Standby { sync, lag }) => {
            let kind = if sync { "synchronous standby" } else { "standby" };
            let lag = lag.map(|lag| format!(", {} behind", Unit::Bytes.text(lag))).unwrap_or_default();
            add(format!("{kind}{lag}"), false);
        }
        Some(Database::Stopped) => add("PostgreSQL does not run".to_owned(), true),
        None => {}
    }
    if state.etcd_leader.contains(&node.name) {
        add("leads etcd".to_owned(), false);
    }
    match of.odoo {
        Some(true) => add("serves Odoo".to_owned(), false),
        // HAProxy does not use a drained node.
        Some(false) => add("Odoo gets no requests".to_owned(), of.drained.is_none()),
        None => {}
    }
    if !of.failed.is_empty() {
        let units: Vec<String> = of.failed.iter().take(3).map(|unit| plain(unit)).collect();
        add(format!("failed: {}", units.join(", ")), true);
        if of.failed.len() > 3 {
            add(format!("and {}", count(of.failed.len() - 3, "further unit", "further units")), true);
        }
    }
    if let Some(left) = of.certificate.filter(|left| *left < 30.0 * 86400.0) {
        let text = if left > 0.0 {
            format!("certificate ends in {}", duration(left))
        } else {
            "certificate has expired".to_owned()
        };
        add(text, left < 14.0 * 86400.0);
    }
    facts
}

/// Returns a meter with the values from which it is a warning, and from which it is bad.
fn meter(value: Option<f64>, unit: Unit, (warn, bad): (f64, f64)) -> Meter {
    let Some(value) = value else { return Meter { text: "–".to_owned(), percent: None, grade: "none" } };
    let grade = match value {
        value if value >= bad => "bad",
        value if value >= warn => "warn",
        _ => "good",
    };
    let full = if unit == Unit::Share { 1.0 } else { bad };
    Meter { text: unit.text(value), percent: Some(whole(((value / full).clamp(0.0, 1.0) * 100.0).round())), grade }
}

fn buttons(node: &Node, of: &NodeState) -> Vec<Button> {
    let name = Some(node.name.as_str());
    let restart = |unit: &str| Button::new(format!("Restart {unit}"), "restart", name, Some(unit));
    let mut buttons = Vec::new();
    if of.database == Some(Database::Primary) {
        buttons.push(Button::new("Switch over", "switchover", None, None));
    }
    let units =
        [("db", "patroni"), ("hub", "haproxy"), ("app", "odoo-http"), ("voter", "etcd"), ("monitor", "prometheus")];
    buttons.extend(units.iter().filter(|(role, _)| node.has_role(role)).map(|(_, unit)| restart(unit)));
    if of.drained.is_some() {
        buttons.push(Button::new("Undrain", "undrain", name, None));
    }
    buttons.push(Button::new("Reboot", "reboot", name, None));
    buttons
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::Reachable;
    use crate::state::{Replies, State};
    use crate::testing;

    fn nodes(fleet: &crate::config::Fleet, replies: &Replies, acts: bool) -> Nodes {
        let state = State::new(fleet, 0.0, replies, Vec::new(), &Reachable::new());
        let content = Content::of(fleet, &state);
        context(&content, &Viewer { acts, ..Viewer::default() })
    }

    #[test]
    fn each_node_has_its_facts_and_only_operators_have_buttons() {
        let fleet = testing::fleet();
        let all = nodes(&fleet, &testing::replies(&fleet), false);
        assert!(all.is_complete && all.rows.len() == 8 && all.rows.iter().all(|row| row.buttons.is_empty()));
        let texts = |all: &Nodes, name: &str| {
            let row = all.rows.iter().find(|row| row.name == name).unwrap();
            row.facts.iter().map(|fact| fact.text.clone()).collect::<Vec<_>>().join("; ")
        };
        assert_eq!(texts(&all, "db-2"), "synchronous standby, 1 kB behind");
        assert_eq!((texts(&all, "hub-1"), texts(&all, "hub-2")), ("holds the VIP".to_owned(), "leads etcd".to_owned()));
        let mut replies = testing::replies(&fleet);
        let drained = ("__name__", "bakehouse_drained_since_seconds");
        testing::add(&mut replies, crate::queries::METRICS, &[drained, ("node", "app-2")], 0.0);
        assert_eq!(texts(&nodes(&fleet, &replies, false), "app-2"), "serves Odoo");
        testing::add(&mut replies, crate::queries::METRICS, &[drained, ("node", "app-2")], 1.0);
        let marked = nodes(&fleet, &replies, true);
        assert!(texts(&marked, "app-2").starts_with("drained for "), "{}", texts(&marked, "app-2"));
        assert!(marked.rows.iter().any(|row| row.buttons.iter().any(|button| button.text == "Undrain")));
        let acting = nodes(&fleet, &testing::replies(&fleet), true);
        let buttons = &acting.rows.iter().find(|row| row.name == "db-1").unwrap().buttons;
        assert_eq!(
            buttons.iter().map(|b| b.text.as_str()).collect::<Vec<_>>(),
            ["Switch over", "Restart patroni", "Reboot"]
        );
    }

    #[test]
    fn a_large_fleet_has_groups_and_rows_of_problems() {
        let fleet = testing::large_fleet(1000);
        let mut replies = testing::replies(&fleet);
        for n in 1..=60 {
            let (node, unit) = (format!("app-{n}"), "x.service");
            testing::add(&mut replies, "failed", &[("node", &node), ("name", unit)], 1.0);
        }
        let all = nodes(&fleet, &replies, true);
        assert_eq!((all.rows.len(), all.more, all.groups.len()), (40, 20, 4));
        let apps = all.groups.iter().find(|group| group.name == "app").unwrap();
        assert_eq!(
            (apps.works.as_str(), apps.versions.as_str(), apps.load.as_str()),
            ("940 of 1000", "7 on 1000", "0.21")
        );
    }

    #[test]
    fn meters_have_grades() {
        let of = |value| meter(Some(value), Unit::Share, (0.85, 0.97));
        assert_eq!((of(0.5).grade, of(0.9).grade, of(0.98).grade), ("good", "warn", "bad"));
        assert_eq!(
            (of(0.5).percent, of(7.0).percent, meter(None, Unit::Share, (1.0, 1.0)).percent),
            (Some(50), Some(100), None)
        );
    }
}
