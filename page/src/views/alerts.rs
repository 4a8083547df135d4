//! Alerts with their runbook, and buttons for the commands in it.

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
    alerts: Vec<Shown>,
    /// Number of alerts that the page leaves out.
    more: usize,
}

#[derive(Debug, Serialize)]
struct Shown {
    /// Identifier in the page, which stays the same while the alert fires.
    id: String,
    name: String,
    severity: &'static str,
    /// Why nobody is notified, or that the alert does not fire yet.
    note: Option<&'static str>,
    node: Option<String>,
    summary: String,
    impact: String,
    since: String,
    age: String,
    steps: Vec<Vec<Piece>>,
    buttons: Vec<Button>,
}

/// Part of a line of a runbook.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Piece {
    text: String,
    is_code: bool,
}

/// Number of alerts that the page shows.
const MOST: usize = 40;

pub(super) fn context(content: &Content, viewer: &Viewer) -> Alerts {
    let state = content.state;
    let shown = |(i, alert): (usize, &Alert)| show(content.fleet, state, viewer, i, alert);
    Alerts {
        has_metrics: state.has_metrics,
        alerts: state.alerts.iter().take(MOST).enumerate().map(shown).collect(),
        more: state.alerts.len().saturating_sub(MOST),
    }
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

fn show(fleet: &Fleet, state: &State, viewer: &Viewer, i: usize, alert: &Alert) -> Shown {
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
        note: match (alert.state.as_str(), alert.muted) {
            ("pending", _) => Some("does not fire yet"),
            (_, Some(Muted::Silenced)) => Some("silenced"),
            (_, Some(Muted::Inhibited)) => Some("explained by another alert"),
            _ => None,
        },
        node: alert.labels.get("node").filter(|node| fleet.node(node).is_some()).cloned(),
        summary: annotation("summary"),
        impact: annotation("impact"),
        since: since.map(minute).unwrap_or_default(),
        age: since.map(|since| duration(state.at - since)).unwrap_or_default(),
        steps,
        buttons,
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
            "bakehouse reboot hub-1 --yes --force hub-1",
            "bakehouse exec db-1 true",
            "bakehouse poweroff db-1",
            "reboot hub-1",
        ] {
            assert_eq!(href(command), None, "{command}");
        }
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
