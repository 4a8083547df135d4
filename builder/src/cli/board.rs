//! The live board of `status --watch` and `top --watch`.

use std::io::IsTerminal as _;

use super::access::NodeContext;
use super::output::print;
use super::results::Event;
use crate::error::Result;
use crate::util::terminal::size;
use crate::util::time::rfc3339;
use crate::vm::{Database, FiringAlert, FleetStatus, MachineState, NodeRow, number_of_alerts};

/// Most alerts on the board, and the part of a terminal's lines that they may take.
const ALERTS: usize = 5;
const ALERTS_PART: usize = 4;

/// Table of the board.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum View {
    /// State of the nodes.
    State,
    /// Load, memory and disk.
    Loads,
}

/// How a line is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Style {
    Plain,
    Bold,
    Red,
    Yellow,
}

/// Alerts that fire, or why they are unknown; `None` if the fleet has no monitor.
pub(super) type Alerts = Option<std::result::Result<Vec<FiringAlert>, String>>;

/// The board.
pub(super) struct Board<'a> {
    pub(super) fleet: &'a str,
    pub(super) view: View,
}

impl Board<'_> {
    /// Shows a state: on a terminal in place of the last one, else after it.
    ///
    /// # Errors
    /// If standard output is closed.
    pub(super) fn show(&self, context: &NodeContext, status: &FleetStatus, now: u64, alerts: &Alerts) -> Result<()> {
        if context.output.json {
            return context.output.event(Event::State(status));
        }
        let size = size();
        draw(&self.lines(status, now, alerts, size), size.is_some())
    }

    /// Shows why there is no state.
    ///
    /// # Errors
    /// If standard output is closed.
    pub(super) fn fail(&self, context: &NodeContext, now: u64, why: &str) -> Result<()> {
        if context.output.json {
            return Ok(());
        }
        let size = size();
        let head = (format!("{} · {}", self.fleet, rfc3339(now)), Style::Bold);
        let why = fleet::printable(why);
        let columns = size.map(|(columns, _)| columns);
        let lines = why.lines().map(|line| (cut(line, columns), Style::Red));
        draw(&std::iter::once(head).chain(lines).collect::<Vec<_>>(), size.is_some())
    }

    /// Returns the lines of the board, which fit a terminal of `size` (columns and lines).
    fn lines(
        &self,
        status: &FleetStatus,
        now: u64,
        alerts: &Alerts,
        size: Option<(usize, usize)>,
    ) -> Vec<(String, Style)> {
        let columns = size.map(|(columns, _)| columns);
        let mut lines = vec![(cut(&format!("{} · {}", self.fleet, rfc3339(now)), columns), Style::Bold)];
        let mut parts = status.summary();
        parts.extend(status.ages(now));
        match alerts {
            None => {}
            Some(Ok(all)) => parts.push((number_of_alerts(all), !all.is_empty())),
            Some(Err(_)) => parts.push(("alerts unknown".to_owned(), true)),
        }
        let style = if parts.iter().any(|(_, bad)| *bad) { Style::Red } else { Style::Plain };
        let parts: Vec<String> = parts.into_iter().map(|(text, _)| text).collect();
        lines.extend(wrapped(&parts, columns).into_iter().map(|line| (line, style)));
        if let Some(Ok(all)) = alerts {
            let most = size.map_or(ALERTS, |(_, height)| (height / ALERTS_PART).clamp(1, ALERTS));
            lines.extend(all.iter().take(most).map(|alert| (cut(&alert.line(now), columns), colour_of(alert))));
            if all.len() > most {
                lines.push((cut(&format!("… and {} more alerts", all.len() - most), columns), Style::Plain));
            }
        }
        let rows = match self.view {
            View::State => status.rows(columns),
            View::Loads => {
                let (head, rows) = status.load_rows();
                lines.push((cut(&head, columns), Style::Plain));
                rows
            }
        };
        // The last line of the terminal stays empty, so that it does not scroll.
        let room = size.map(|(_, height)| height.saturating_sub(lines.len() + 1));
        let (kept, left_out) = fitting(&status.nodes, &rows, room);
        for index in kept {
            let style = if is_well(&status.nodes[index]) { Style::Plain } else { Style::Red };
            lines.extend(rows[index].lines().map(|line| (cut(line, columns), style)));
        }
        if left_out > 0 {
            lines.push((cut(&format!("… and {left_out} more nodes"), columns), Style::Plain));
        }
        lines
    }
}

/// Prints the lines. On a terminal, they replace those of the last call.
fn draw(lines: &[(String, Style)], on_terminal: bool) -> Result<()> {
    if !on_terminal {
        let text: String = lines.iter().map(|(line, _)| format!("{line}\n")).collect();
        return print(text + "\n");
    }
    let has_colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    // Each line replaces the one before it, so that the screen does not flicker.
    let mut text = "\u{1b}[H".to_owned();
    for (line, style) in lines {
        let code = match style {
            Style::Plain => "",
            Style::Bold => "\u{1b}[1m",
            Style::Red => "\u{1b}[31m",
            Style::Yellow => "\u{1b}[33m",
        };
        let (code, plain) = if has_colour && !code.is_empty() { (code, "\u{1b}[0m") } else { ("", "") };
        text += &format!("{code}{line}{plain}\u{1b}[K\n");
    }
    print(text + "\u{1b}[J")
}

fn is_well(row: &NodeRow) -> bool {
    row.state == MachineState::Ready && row.report.as_ref().is_none_or(|report| report.failed.is_empty())
}

/// Returns the indices of the rows that fit into `room` lines, in their order, and the number of the others. Nodes that
/// need attention come first, then those with the VIP and the primary.
fn fitting(nodes: &[NodeRow], rows: &[String], room: Option<usize>) -> (Vec<usize>, usize) {
    let height = |index: usize| rows[index].lines().count().max(1);
    let all: usize = (0..rows.len()).map(height).sum();
    let Some(room) = room.filter(|room| all > *room) else { return ((0..rows.len()).collect(), 0) };
    let has_work = |row: &NodeRow| row.vip || matches!(row.database, Some(Database::Primary(_)));
    let mut order: Vec<usize> = (0..rows.len()).collect();
    order.sort_by_key(|index| (is_well(&nodes[*index]), !has_work(&nodes[*index])));
    // One line says how many are left out.
    let mut left = room.saturating_sub(1);
    let mut kept = Vec::new();
    for index in order {
        let Some(rest) = left.checked_sub(height(index)) else { break };
        left = rest;
        kept.push(index);
    }
    kept.sort_unstable();
    let left_out = rows.len() - kept.len();
    (kept, left_out)
}

fn colour_of(alert: &FiringAlert) -> Style {
    match alert.severity.as_str() {
        "critical" => Style::Red,
        "warning" => Style::Yellow,
        _ => Style::Plain,
    }
}

/// Joins parts to lines of at most `columns` characters.
fn wrapped(parts: &[String], columns: Option<usize>) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for part in parts {
        match lines.last_mut() {
            Some(line) if columns.is_none_or(|most| line.chars().count() + 3 + part.chars().count() <= most) => {
                line.push_str(" · ");
                line.push_str(part);
            }
            _ => lines.push(cut(part, columns)),
        }
    }
    lines
}

/// Shortens a line that is longer than the terminal is wide.
fn cut(line: &str, columns: Option<usize>) -> String {
    match columns {
        Some(most) if line.chars().count() > most => line.chars().take(most.saturating_sub(1)).chain(['…']).collect(),
        _ => line.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(node: &str, state: MachineState, message: &str) -> NodeRow {
        NodeRow {
            node: node.to_owned(),
            group: "app".to_owned(),
            roles: vec!["app".to_owned()],
            address: "10.10.0.1".to_owned(),
            state,
            message: message.to_owned(),
            vip: false,
            database: None,
            report: None,
        }
    }

    fn fleet_of(count: usize) -> FleetStatus {
        let mut nodes: Vec<NodeRow> =
            (1..=count).map(|n| row(&format!("app-{n}"), MachineState::Ready, "ready")).collect();
        nodes[count - 2] = row("app-x", MachineState::Silent, "app-x does not answer within 7 s");
        nodes[count - 1].vip = true;
        FleetStatus { nodes, ..FleetStatus::default() }
    }

    fn alert(name: &str, severity: &str) -> FiringAlert {
        let (node, summary) = ("db-1".to_owned(), "writes fail".to_owned());
        FiringAlert { name: name.to_owned(), severity: severity.to_owned(), node, summary, since: 100 }
    }

    fn texts(lines: &[(String, Style)]) -> Vec<&str> {
        lines.iter().map(|(line, _)| line.as_str()).collect()
    }

    #[test]
    fn board_has_summary_alerts_and_rows() {
        let board = Board { fleet: "acme", view: View::State };
        let alerts = Some(Ok(vec![alert("WritesFail", "critical")]));
        let lines = board.lines(&fleet_of(3), 400, &alerts, None);
        let expected = [
            "acme · 1970-01-01T00:06:40Z",
            "2 of 3 nodes ready · 1 alert fires",
            "critical WritesFail db-1: writes fail (since 5 min)",
        ];
        assert_eq!(texts(&lines)[..3], expected);
        assert_eq!(lines.len(), 6);
        assert_eq!(
            lines.iter().map(|(_, style)| *style).collect::<Vec<_>>()[..5],
            [Style::Bold, Style::Red, Style::Red, Style::Plain, Style::Red]
        );
        let unknown = board.lines(&fleet_of(3), 400, &Some(Err("x".to_owned())), None);
        assert!(unknown[1].0.ends_with("alerts unknown"), "{}", unknown[1].0);
        let none = board.lines(&fleet_of(3), 400, &Some(Ok(Vec::new())), None);
        assert!(none[1].0.ends_with("no alert fires"), "{}", none[1].0);
    }

    #[test]
    fn board_fits_the_terminal_and_keeps_what_needs_attention() {
        let alerts = Some(Ok((0..7).map(|n| alert(&format!("A{n}"), "warning")).collect()));
        for view in [View::State, View::Loads] {
            let board = Board { fleet: "acme", view };
            for (columns, height) in [(30, 12), (80, 24), (200, 10), (10, 9)] {
                let lines = board.lines(&fleet_of(500), 400, &alerts, Some((columns, height)));
                assert!(lines.iter().all(|(line, _)| line.chars().count() <= columns), "{lines:?}");
                assert!(lines.len() <= height.max(13), "{columns}x{height}: {lines:?}");
                if height >= 12 {
                    let text = texts(&lines).join("\n");
                    assert!(text.contains("app-x") && text.contains(" more nodes"), "{columns}x{height}: {text}");
                }
            }
        }
        let (kept, left_out) = fitting(&fleet_of(5).nodes, &["a", "b", "c", "d", "e"].map(str::to_owned), Some(4));
        assert_eq!((kept, left_out), (vec![0, 3, 4], 2));
    }
}
