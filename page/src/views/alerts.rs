//! Alerts with their runbook, and buttons for the commands in it.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{Button, Content, Viewer};
use crate::config::Fleet;
use crate::format::{duration, minute, parse_rfc3339, plain};
use crate::history::Fired;
use crate::prometheus::{Alert, Muted};
use crate::state::State;

#[derive(Debug, Serialize)]
pub(super) struct Alerts {
    has_metrics: bool,
    /// Alerts that fire and that no operator has muted.
    alerts: Vec<Shown>,
    /// Alerts that are muted, or do not fire yet, each in a line.
    quiet: Vec<Quiet>,
    /// Number of alerts that the page leaves out.
    more: usize,
}

/// An alert that needs no operator yet.
#[derive(Debug, Serialize)]
struct Quiet {
    summary: String,
    note: &'static str,
}

#[derive(Debug, Serialize)]
struct Shown {
    /// Identifier in the page, which stays the same while the alert fires.
    id: String,
    name: String,
    severity: &'static str,
    node: Option<String>,
    summary: String,
    impact: String,
    since: String,
    age: String,
    steps: Vec<Vec<Piece>>,
    buttons: Vec<Button>,
    /// Other alerts with the same name: their summaries.
    others: Vec<String>,
}

/// Part of a line of a runbook.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Piece {
    text: String,
    is_code: bool,
}

/// Number of alerts that the page shows, of each kind.
const MOST: usize = 24;
/// Number of alerts with the same name that are shown as one.
const SAME: usize = 3;
/// Number of further alerts with the same name that have a line.
const MOST_OTHERS: usize = 30;

pub(super) fn context(content: &Content, viewer: &Viewer) -> Alerts {
    let state = content.state;
    let is_quiet = |alert: &&Alert| alert.state != "firing" || alert.muted.is_some();
    let (quiet, firing): (Vec<&Alert>, Vec<&Alert>) = state.alerts.iter().partition(is_quiet);
    let groups = grouped(&firing);
    let shown = groups.iter().take(MOST).enumerate().map(|(i, group)| show(content.fleet, state, viewer, i, group));
    Alerts {
        has_metrics: state.has_metrics,
        alerts: shown.collect(),
        quiet: quiet.iter().take(MOST).map(|alert| line(alert)).collect(),
        more: groups.len().saturating_sub(MOST) + quiet.len().saturating_sub(MOST),
    }
}

/// Joins alerts with the same name, if there are at least three. The order stays that of the first of each group. Takes
/// O(n log n), because a hostile node can raise thousands of alerts.
fn grouped<'a>(alerts: &[&'a Alert]) -> Vec<Vec<&'a Alert>> {
    fn name(alert: &Alert) -> &str {
        alert.labels.get("alertname").map_or("", String::as_str)
    }
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for alert in alerts {
        *counts.entry(name(alert)).or_default() += 1;
    }
    let mut groups: Vec<Vec<&Alert>> = Vec::new();
    // Place of the group with a name.
    let mut places: BTreeMap<&str, usize> = BTreeMap::new();
    for alert in alerts {
        if counts[name(alert)] < SAME {
            groups.push(vec![alert]);
        } else if let Some(place) = places.get(name(alert)) {
            groups[*place].push(alert);
        } else {
            places.insert(name(alert), groups.len());
            groups.push(vec![alert]);
        }
    }
    groups
}

fn line(alert: &Alert) -> Quiet {
    Quiet {
        summary: summary(alert),
        note: match alert.muted {
            Some(Muted::Silenced) => "silenced",
            Some(Muted::Inhibited) => "explained by another alert",
            None => "does not fire yet",
        },
    }
}

fn summary(alert: &Alert) -> String {
    let text = alert.annotations.get("summary").or(alert.labels.get("alertname"));
    text.map(|text| plain(text)).unwrap_or_default()
}

/// Alerts of the last 24 h that have ended.
#[derive(Debug, Serialize)]
pub(super) struct Recent {
    waiting: bool,
    rows: Vec<Ended>,
    more: usize,
}

#[derive(Debug, Serialize)]
struct Ended {
    name: String,
    node: Option<String>,
    grade: &'static str,
    ended: String,
    lasted: String,
}

/// Number of ended alerts that the page shows.
const MOST_ENDED: usize = 9;

pub(super) fn recent(content: &Content) -> Recent {
    let fired = content.fired.unwrap_or_default();
    let row = |fired: &Fired| Ended {
        name: plain(&fired.name),
        node: fired.node.clone(),
        grade: if fired.severity == "critical" { "bad" } else { "warn" },
        ended: minute(fired.to),
        // The resolution is a minute.
        lasted: duration((fired.to - fired.from).max(60.0)),
    };
    Recent {
        waiting: content.fired.is_none(),
        rows: fired.iter().take(MOST_ENDED).map(row).collect(),
        more: fired.len().saturating_sub(MOST_ENDED),
    }
}

fn show(fleet: &Fleet, state: &State, viewer: &Viewer, i: usize, group: &[&Alert]) -> Shown {
    let alert = group[0];
    let label = |name: &str| alert.labels.get(name).map(|value| plain(value)).unwrap_or_default();
    let annotation = |name: &str| alert.annotations.get(name).map(|value| plain(value)).unwrap_or_default();
    let since = parse_rfc3339(&alert.since);
    let runbook = alert.annotations.get("runbook").map_or("", String::as_str);
    let steps: Vec<Vec<Piece>> = runbook.lines().filter(|line| !line.trim().is_empty()).take(12).map(pieces).collect();
    let commands = steps.iter().flatten().filter(|piece| piece.is_code).map(|piece| piece.text.as_str());
    let mut buttons: Vec<Button> = Vec::new();
    if viewer.acts {
        for button in commands.filter_map(|command| button(fleet, command)) {
            if !buttons.contains(&button) {
                buttons.push(button);
            }
        }
    }
    Shown {
        id: format!("alert-{i}"),
        name: label("alertname"),
        severity: match label("severity").as_str() {
            "critical" => "critical",
            "warning" => "warning",
            _ => "other",
        },
        node: alert.labels.get("node").filter(|node| fleet.node(node).is_some()).cloned(),
        summary: summary(alert),
        impact: annotation("impact"),
        since: since.map(minute).unwrap_or_default(),
        age: since.map(|since| duration(state.at - since)).unwrap_or_default(),
        steps,
        buttons,
        others: group.iter().skip(1).take(MOST_OTHERS).map(|other| summary(other)).collect(),
    }
}

/// Splits a line of a runbook at its backticks.
fn pieces(line: &str) -> Vec<Piece> {
    let parts = line.trim().split('`').enumerate();
    parts
        .filter(|(_, text)| !text.is_empty())
        .map(|(i, text)| Piece { text: plain(text), is_code: i % 2 == 1 })
        .collect()
}

/// Returns the button for a command, if it is one that an operator may run from the page. Labels of the alert are in the
/// command, so every word of it must be valid.
fn button(fleet: &Fleet, command: &str) -> Option<Button> {
    let words: Vec<&str> = command.split_whitespace().collect();
    let known = |name: &&str| fleet.node(name).is_some();
    match words[..] {
        ["bakehouse", "switchover"] => Some(Button::new("Switch over", "switchover", None, None)),
        ["bakehouse", "reboot", node] if known(&node) => {
            Some(Button::new(format!("Reboot {node}"), "reboot", Some(node), None))
        }
        ["bakehouse", "undrain", node] if known(&node) => {
            Some(Button::new(format!("Undrain {node}"), "undrain", Some(node), None))
        }
        ["bakehouse", "restart", node, unit] if known(&node) && is_unit(unit) => {
            Some(Button::new(format!("Restart {unit}"), "restart", Some(node), Some(unit)))
        }
        _ => None,
    }
}

/// Whether a text can be the name of a unit.
fn is_unit(text: &str) -> bool {
    let valid = |c: char| c.is_ascii_alphanumeric() || ":-_.@\\".contains(c);
    // `UNIT` in a runbook stands for a name that the operator knows.
    !text.is_empty() && text.len() < 256 && text.chars().all(valid) && text != "UNIT" && !text.starts_with('-')
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    #[test]
    fn only_valid_commands_become_buttons() {
        let fleet = testing::fleet();
        let href = |command: &str| button(&fleet, command).map(|button| button.href);
        assert_eq!(href("bakehouse switchover").unwrap(), "act?verb=switchover");
        assert_eq!(href("bakehouse reboot hub-1").unwrap(), "act?verb=reboot&node=hub%2D1");
        assert_eq!(href("bakehouse undrain hub-1").unwrap(), "act?verb=undrain&node=hub%2D1");
        assert_eq!(
            href("bakehouse restart db-1 pgbackrest@full").unwrap(),
            "act?verb=restart&node=db%2D1&unit=pgbackrest%40full"
        );
        for command in [
            "bakehouse restart db-1 UNIT",
            "bakehouse restart db-1 a\"onclick=",
            "bakehouse restart evil-1 patroni",
            "bakehouse restart db-1 --force",
            "bakehouse reboot NODE",
            "bakehouse drain hub-1",
            "bakehouse reboot hub-1 --yes --force hub-1",
            "bakehouse exec db-1 true",
            "bakehouse poweroff db-1",
            "reboot hub-1",
        ] {
            assert_eq!(href(command), None, "{command}");
        }
    }

    #[test]
    fn many_alerts_with_one_name_are_one() {
        let alert = |name: &str, state: &str| {
            serde_json::from_str::<Alert>(&format!(r#"{{"labels":{{"alertname":"{name}"}},"state":"{state}"}}"#))
                .unwrap()
        };
        let all = ["A", "B", "C", "B", "A", "B"].map(|name| alert(name, "firing"));
        let all: Vec<&Alert> = all.iter().collect();
        let groups: Vec<(String, usize)> =
            grouped(&all).iter().map(|group| (group[0].labels["alertname"].clone(), group.len())).collect();
        let expected = [("A", 1), ("B", 3), ("C", 1), ("A", 1)].map(|(name, count)| (name.to_owned(), count));
        assert_eq!(groups, expected);
        // Comparisons of each alert with each other one would take minutes.
        let many: Vec<Alert> = (0..50_000).map(|i| alert(&format!("A{}", i % 25_000), "firing")).collect();
        let begun = std::time::Instant::now();
        assert_eq!(grouped(&many.iter().collect::<Vec<_>>()).len(), 50_000);
        assert!(begun.elapsed().as_secs() < 5, "{:?}", begun.elapsed());
        let fleet = testing::fleet();
        let state = State { alerts: vec![alert("A", "pending"), alert("B", "firing")], ..State::default() };
        let shown = context(&Content::of(&fleet, &state), &Viewer::default());
        assert_eq!((shown.alerts.len(), shown.quiet.len(), shown.quiet[0].note), (1, 1, "does not fire yet"));
    }

    #[test]
    fn runbooks_have_code_between_backticks() {
        let code = |text: &str| Piece { text: text.to_owned(), is_code: true };
        let text = |text: &str| Piece { text: text.to_owned(), is_code: false };
        assert_eq!(pieces("Type `a b`: it prints."), [text("Type "), code("a b"), text(": it prints.")]);
        assert_eq!(pieces("`a`"), [code("a")]);
        assert_eq!(pieces("an odd ` number"), [text("an odd "), code(" number")]);
    }
}
