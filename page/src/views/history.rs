//! Rollouts, backups, promises and requests of operators: what is recorded, and plainly what is not.

use serde::Serialize;

use super::{Audit, Content, Request, count};
use crate::format::{Unit, duration, minute, plain, whole};
use crate::history::mix;

#[derive(Debug, Serialize)]
pub(super) struct RolloutView {
    enabled: bool,
    /// Versions that run now, with the number of nodes.
    mix: Vec<Share>,
    state: Vec<Notice>,
    waiting: bool,
    versions: Vec<VersionRow>,
}

/// A version's share of the nodes.
#[derive(Debug, Serialize)]
struct Share {
    version: String,
    nodes: String,
    x: f64,
    width: f64,
    colour: usize,
}

#[derive(Debug, Serialize)]
struct Notice {
    text: String,
    grade: &'static str,
}

#[derive(Debug, Serialize)]
struct VersionRow {
    version: String,
    began: String,
    took: String,
    nodes: String,
    now: String,
}

/// Number of versions in the history.
const MOST: usize = 12;
/// Time between two points of the history, in seconds.
const STEP: f64 = 3600.0;

pub(super) fn rollout(content: &Content) -> RolloutView {
    let state = content.state;
    let running = mix(state.nodes.iter().filter_map(|node| node.version.as_deref()));
    let all: usize = running.iter().map(|(_, count)| count).sum();
    let mut x = 0.0;
    let shares = running.iter().take(8).enumerate().map(|(colour, (version, nodes))| {
        let width = *nodes as f64 / all.max(1) as f64 * 100.0;
        let share = Share { version: plain(version), nodes: count(*nodes, "node", "nodes"), x, width, colour };
        x += width;
        share
    });
    let shares: Vec<Share> = shares.collect();
    let mut notices = Vec::new();
    let mut add = |text: String, grade| notices.push(Notice { text, grade });
    let rollout = &state.rollout;
    match rollout.blocked {
        Some(true) => add("The rollout is blocked: nodes wait for a version, and none changes.".to_owned(), "warn"),
        Some(false) if running.len() > 1 => add("Nodes run different versions: a rollout runs.".to_owned(), "none"),
        Some(false) => add("No rollout runs.".to_owned(), "good"),
        None => {}
    }
    if rollout.denied > 0.0 {
        let text = count(whole(rollout.denied), "version is denied", "versions are denied");
        add(format!("{text}: no node installs it, because it failed on one."), "warn");
    }
    if rollout.skipped > 0.0 {
        add(
            format!(
                "{} by an operator's order.",
                count(whole(rollout.skipped), "node is skipped", "nodes are skipped")
            ),
            "warn",
        );
    }
    let versions = content.versions.unwrap_or_default().iter().take(MOST).map(|version| VersionRow {
        version: plain(&version.version),
        began: version.first.map_or_else(|| "before the data".to_owned(), minute),
        took: match version.first {
            Some(first) if version.last - first >= STEP => duration(version.last - first),
            Some(_) => "less than 1 h".to_owned(),
            None => "–".to_owned(),
        },
        nodes: version.nodes.to_string(),
        now: version.now.to_string(),
    });
    RolloutView {
        enabled: content.fleet.updates,
        mix: shares,
        state: notices,
        waiting: content.versions.is_none(),
        versions: versions.collect(),
    }
}

#[derive(Debug, Serialize)]
pub(super) struct BackupView {
    enabled: bool,
    facts: Vec<Fact>,
}

#[derive(Debug, Serialize)]
struct Fact {
    label: &'static str,
    value: String,
    note: String,
    grade: &'static str,
}

pub(super) fn backups(content: &Content) -> BackupView {
    let (state, backups) = (content.state, &content.state.backups);
    let mut facts = Vec::new();
    let mut add = |label, value: String, note: String, grade| facts.push(Fact { label, value, note, grade });
    match (backups.newest, backups.count) {
        (Some(newest), _) => {
            let age = state.at - newest;
            let grade = if age > 2.0 * 86400.0 { "warn" } else { "good" };
            add("Newest backup", format!("{} ago", duration(age)), format!("ended {} UTC", minute(newest)), grade);
        }
        (None, Some(_)) => add("Newest backup", "None".to_owned(), "the repository is empty".to_owned(), "warn"),
        (None, None) => add("Newest backup", "Unknown".to_owned(), "its node has sent no metrics".to_owned(), "none"),
    }
    if let Some(number) = backups.count {
        add("Backups in the repository", Unit::Number.text(number), String::new(), "none");
    }
    if let Some(age) = backups.archived {
        let grade = if age > 900.0 { "warn" } else { "good" };
        add(
            "Last WAL archived",
            format!("{} ago", duration(age)),
            "a restore is possible up to that time".to_owned(),
            grade,
        );
    }
    if let Some(failures) = backups.failures {
        let grade = if failures > 0.0 { "none" } else { "good" };
        add(
            "Failures to archive",
            Unit::Number.text(failures),
            "since the primary's statistics began".to_owned(),
            grade,
        );
    }
    BackupView { enabled: content.fleet.backups, facts }
}

#[derive(Debug, Serialize)]
pub(super) struct RecordView {
    since: String,
    waiting: bool,
    kept: Vec<KeptRow>,
    promotions: Option<String>,
    has_audit: bool,
    requests: Vec<RequestRow>,
}

#[derive(Debug, Serialize)]
struct KeptRow {
    title: &'static str,
    share: String,
    grade: &'static str,
    broken: String,
    measured: String,
}

#[derive(Debug, Serialize)]
struct RequestRow {
    at: String,
    node: String,
    text: String,
}

/// Number of requests that the page shows.
const REQUESTS: usize = 50;

pub(super) fn record(content: &Content) -> RecordView {
    let promises = content.promises;
    let kept = promises.into_iter().flat_map(|promises| &promises.kept).map(|kept| KeptRow {
        title: kept.title,
        share: kept.share.map_or_else(|| "not measured".to_owned(), percent),
        grade: match kept.share {
            None => "none",
            // Some minutes of a month prove nothing.
            Some(_) if kept.measured < 0.01 => "none",
            Some(share) if share >= 0.999 => "good",
            Some(share) if share >= 0.99 => "warn",
            Some(_) => "bad",
        },
        broken: match kept.share {
            Some(_) if kept.failed > 0.0 => {
                format!("{} failed, about {}", count(whole(kept.failed), "probe", "probes"), duration(kept.broken))
            }
            Some(_) => "no probe failed".to_owned(),
            None => String::new(),
        },
        measured: percent(kept.measured),
    });
    let promotions = promises.and_then(|promises| promises.promotions).map(|number| match whole(number) {
        0 => "No standby became the primary.".to_owned(),
        number => format!("A standby became the primary {}.", count(number, "time", "times")),
    });
    let (has_audit, requests) = match content.audit {
        Audit::Absent => (false, Vec::new()),
        Audit::Requests(requests) => (true, requests.iter().take(REQUESTS).map(request).collect()),
    };
    RecordView {
        since: promises.map(|promises| minute(promises.since)).unwrap_or_default(),
        waiting: promises.is_none(),
        kept: kept.collect(),
        promotions,
        has_audit,
        requests,
    }
}

fn request(request: &Request) -> RequestRow {
    RequestRow { at: minute(request.at as f64), node: plain(&request.node), text: plain(&request.text) }
}

/// Returns a share with as many digits as are necessary, and never 100 % for less than all.
fn percent(share: f64) -> String {
    let percent = share * 100.0;
    if percent >= 100.0 {
        return "100 %".to_owned();
    }
    format!("{:.3} %", (percent * 1000.0).floor() / 1000.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn less_than_all_is_never_all() {
        assert_eq!([1.0, 0.999_999_9, 0.5].map(percent), ["100 %", "99.999 %", "50.000 %"]);
    }
}
