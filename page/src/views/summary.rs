//! The sentence about the whole fleet, and its most important facts.

use serde::Serialize;

use super::{Content, count, names};
use crate::format::{Unit, minute, rough};
use crate::history::mix;
use crate::state::{Database, Health, State};

/// How good a fact is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Grade {
    Good,
    /// No information.
    None,
    Warn,
    Bad,
}

#[derive(Debug, Serialize)]
pub(super) struct Summary {
    grade: Grade,
    headline: String,
    /// Further sentences.
    details: Vec<String>,
    tiles: Vec<Tile>,
    /// Time of the data.
    at: String,
}

#[derive(Debug, Serialize)]
struct Tile {
    label: &'static str,
    value: String,
    note: String,
    grade: Grade,
    href: &'static str,
}

pub(super) fn context(content: &Content) -> Summary {
    let state = content.state;
    let tiles: Vec<Tile> = [
        Some(alerts(state)),
        vip(content),
        primary(content),
        etcd(content),
        odoo(content),
        Some(paths(content)),
        version(state),
        backup(content),
    ]
    .into_iter()
    .flatten()
    .collect();
    let (headline, details, grade) = headline(content);
    let grade = tiles
        .iter()
        .map(|tile| tile.grade)
        .filter(|grade| *grade != Grade::None)
        .max()
        .map_or(grade, |worst| worst.max(grade));
    Summary { grade, headline, details, tiles, at: minute(state.at) }
}

fn headline(content: &Content) -> (String, Vec<String>, Grade) {
    let state = content.state;
    let with = |health: Health| {
        state.nodes.iter().filter(move |node| node.health == health).map(|node| node.name.as_str()).collect::<Vec<_>>()
    };
    let (down, good) = (with(Health::Down), with(Health::Good));
    let firing = state.firing().count();
    let critical = state.firing().filter(|alert| alert.labels.get("severity").is_some_and(|s| s == "critical")).count();
    let down_text = |down: &[&str]| {
        let verb = if down.len() == 1 { "does" } else { "do" };
        format!("{} {verb} not answer", names(down.iter().copied()))
    };
    let mut details = Vec::new();
    let (headline, mut grade) = if !state.has_metrics {
        ("Prometheus has no answer yet".to_owned(), Grade::Bad)
    } else if critical > 0 {
        let text = match firing - critical {
            0 => count(critical, "critical alert fires", "critical alerts fire"),
            _ => format!("{}, {critical} critical", count(firing, "alert fires", "alerts fire")),
        };
        (text, Grade::Bad)
    } else if !down.is_empty() {
        (down_text(&down), Grade::Bad)
    } else if firing > 0 {
        (count(firing, "alert fires", "alerts fire"), Grade::Warn)
    } else if good.len() == 1 && state.nodes.len() == 1 {
        ("The node works".to_owned(), Grade::Good)
    } else if good.len() == state.nodes.len() {
        (format!("All {} nodes work", good.len()), Grade::Good)
    } else {
        (format!("{} of {} nodes work", good.len(), state.nodes.len()), Grade::Warn)
    };
    if !down.is_empty() && headline != down_text(&down) {
        details.push(format!("{}.", down_text(&down)));
    }
    for (health, text) in [
        (Health::Blind, "No metrics of"),
        (Health::Unwell, "Failed units on"),
        (Health::Unknown, "No information yet about"),
    ] {
        let nodes = with(health);
        if !nodes.is_empty() && state.has_metrics {
            details.push(format!("{text} {}.", names(nodes)));
            grade = grade.max(Grade::Warn);
        }
    }
    details.extend(state.missing.iter().map(|missing| format!("{missing}.")));
    (headline, details, grade)
}

fn alerts(state: &State) -> Tile {
    let firing = state.firing().count();
    let critical = state.firing().filter(|alert| alert.labels.get("severity").is_some_and(|s| s == "critical")).count();
    let muted = state.alerts.iter().filter(|alert| alert.muted.is_some()).count();
    let (value, grade) = match (state.has_metrics, firing) {
        (false, _) => ("Unknown".to_owned(), Grade::None),
        (true, 0) => ("None".to_owned(), Grade::Good),
        (true, _) => (firing.to_string(), if critical > 0 { Grade::Bad } else { Grade::Warn }),
    };
    let note = if critical > 0 {
        format!("{critical} critical")
    } else if muted > 0 {
        format!("{muted} muted")
    } else {
        String::new()
    };
    Tile { label: "Alerts", value, note, grade, href: "#alerts" }
}

/// Returns the names of the nodes that hold something, and the grade: one node has to hold it.
fn holder(held: &[&str], state: &State) -> (String, Grade) {
    match held {
        [] if state.has_metrics => ("None".to_owned(), Grade::Bad),
        [] => ("Unknown".to_owned(), Grade::None),
        [one] => ((*one).to_owned(), Grade::Good),
        all => (names(all.iter().copied()), Grade::Bad),
    }
}

fn vip(content: &Content) -> Option<Tile> {
    content.fleet.with_role("hub").next()?;
    let held: Vec<&str> = content.state.vip.iter().map(String::as_str).collect();
    let (value, grade) = holder(&held, content.state);
    Some(Tile { label: "VIP", value, note: content.fleet.vip.to_string(), grade, href: "#map" })
}

fn primary(content: &Content) -> Option<Tile> {
    let databases = content.fleet.with_role("db").count();
    if databases == 0 {
        return None;
    }
    let state = content.state;
    let (value, mut grade) = holder(&state.primaries(), state);
    let sync = state.sync_standbys();
    let lag = sync.first().and_then(|name| match state.node(name)?.database? {
        Database::Standby { lag: Some(lag), .. } => Some(Unit::Bytes.text(lag)),
        _ => None,
    });
    let note = match (sync.as_slice(), lag) {
        ([], _) if databases == 1 => "no standby in this fleet".to_owned(),
        ([], _) => {
            grade = grade.max(Grade::Warn);
            "no synchronous standby".to_owned()
        }
        (all, Some(lag)) => format!("sync: {}, {lag} behind", names(all.iter().copied())),
        (all, None) => format!("sync: {}", names(all.iter().copied())),
    };
    Some(Tile { label: "Primary", value, note, grade, href: "#map" })
}

fn etcd(content: &Content) -> Option<Tile> {
    let (state, voters) = (content.state, content.fleet.voters.len());
    if voters == 0 {
        return None;
    }
    let votes = state.votes.len();
    let grade = match () {
        () if !state.has_metrics => Grade::None,
        () if votes == voters => Grade::Good,
        () if votes > voters / 2 => Grade::Warn,
        () => Grade::Bad,
    };
    let note = match state.etcd_leader.as_slice() {
        [] => "no leader".to_owned(),
        leaders => format!("leader {}", names(leaders.iter().map(String::as_str))),
    };
    Some(Tile { label: "etcd", value: format!("{votes} of {voters} votes"), note, grade, href: "#map" })
}

fn odoo(content: &Content) -> Option<Tile> {
    let state = content.state;
    let apps: Vec<&str> = content.fleet.with_role("app").map(|node| node.name.as_str()).collect();
    if apps.is_empty() {
        return None;
    }
    let up = state.nodes.iter().filter(|node| node.odoo == Some(true)).count();
    let login = state.probes.get("login");
    let grade = match () {
        () if !state.has_metrics => Grade::None,
        () if up == 0 || login == Some(&0.0) => Grade::Bad,
        () if up < apps.len() => Grade::Warn,
        () => Grade::Good,
    };
    let note = match (login, state.latency.get("login")) {
        (Some(success), _) if *success == 0.0 => "the login page fails".to_owned(),
        (_, Some(seconds)) if seconds.is_finite() => format!("login page {}", Unit::Seconds.text(*seconds)),
        _ => String::new(),
    };
    Some(Tile { label: "Odoo", value: format!("{up} of {} nodes", apps.len()), note, grade, href: "#nodes" })
}

fn paths(content: &Content) -> Tile {
    let (state, fleet) = (content.state, content.fleet);
    let hubs = fleet.with_role("hub").count();
    let all = hubs * (fleet.nodes.len() - hubs) + hubs * hubs.saturating_sub(1) / 2;
    let down = state.paths.iter().filter(|path| path.up == Some(false)).count();
    let unknown = state.paths.iter().filter(|path| path.up.is_none()).count();
    let grade = match () {
        () if !state.has_metrics => Grade::None,
        () if down > 0 => Grade::Warn,
        () => Grade::Good,
    };
    let note = match (down, unknown) {
        (0, 0) => "between nodes and hubs".to_owned(),
        (0, unknown) => format!("{unknown} without metrics"),
        (down, _) => format!("{down} down"),
    };
    Tile {
        label: "Paths",
        value: format!("{} of {all}", all.saturating_sub(down + unknown)),
        note,
        grade,
        href: "#map",
    }
}

fn version(state: &State) -> Option<Tile> {
    let mix = mix(state.nodes.iter().filter_map(|node| node.version.as_deref()));
    let (value, count) = mix.first()?;
    let blocked = state.rollout.blocked == Some(true);
    let note = match mix.get(1..) {
        _ if blocked => "the rollout is blocked".to_owned(),
        Some(others) if !others.is_empty() => {
            let others = others.iter().take(3).map(|(version, count)| format!("{version} on {count}"));
            format!("on {count}; {}", others.collect::<Vec<_>>().join(", "))
        }
        _ => "on all nodes that report".to_owned(),
    };
    let grade = if blocked { Grade::Warn } else { Grade::Good };
    Some(Tile { label: "Version", value: value.clone(), note, grade, href: "#rollout" })
}

fn backup(content: &Content) -> Option<Tile> {
    if !content.fleet.backups {
        return None;
    }
    let state = content.state;
    let (value, note, grade) = match (state.backups.newest, state.backups.count) {
        (Some(newest), count) => {
            let age = state.at - newest;
            let grade = if age > 2.0 * 86400.0 { Grade::Warn } else { Grade::Good };
            let note = count.map(|count| format!("{count} in the repository")).unwrap_or_default();
            (format!("{} ago", rough(age)), note, grade)
        }
        (None, Some(_)) => ("None".to_owned(), "the repository is empty".to_owned(), Grade::Warn),
        (None, None) => ("Unknown".to_owned(), "no metrics yet".to_owned(), Grade::None),
    };
    Some(Tile { label: "Last backup", value, note, grade, href: "#backups" })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::Reachable;
    use crate::state::Replies;
    use crate::testing;

    fn summary(fleet: &crate::config::Fleet, replies: &Replies, reachable: &Reachable) -> Summary {
        let state = State::new(fleet, 1_796_000_000.0, replies, Vec::new(), reachable);
        context(&Content::of(fleet, &state))
    }

    fn tile<'a>(summary: &'a Summary, label: &str) -> (&'a str, &'a str, Grade) {
        let tile = summary.tiles.iter().find(|tile| tile.label == label).unwrap();
        (&tile.value, &tile.note, tile.grade)
    }

    #[test]
    fn a_fleet_that_works_has_good_facts() {
        let fleet = testing::fleet();
        let summary = summary(&fleet, &testing::replies(&fleet), &Reachable::new());
        assert_eq!((summary.headline.as_str(), summary.grade), ("All 8 nodes work", Grade::Good));
        for (label, value, note) in [
            ("Alerts", "None", ""),
            ("VIP", "hub-1", "10.10.0.100"),
            ("Primary", "db-1", "sync: db-2, 1 kB behind"),
            ("etcd", "3 of 3 votes", "leader hub-2"),
            ("Odoo", "2 of 2 nodes", "login page 180 ms"),
            ("Paths", "18 of 18", "between nodes and hubs"),
            ("Version", "7", "on all nodes that report"),
            ("Last backup", "2 h ago", "7 in the repository"),
        ] {
            assert_eq!(tile(&summary, label), (value, note, Grade::Good));
        }
    }

    #[test]
    fn a_dead_hub_is_the_first_fact() {
        let fleet = testing::fleet();
        let reachable = Reachable::from([("hub-1".to_owned(), false)]);
        let summary = summary(&fleet, &testing::replies(&fleet), &reachable);
        assert_eq!((summary.headline.as_str(), summary.grade), ("hub-1 does not answer", Grade::Bad));
        assert_eq!(summary.details, [""; 0]);
        assert_eq!(tile(&summary, "VIP"), ("None", "10.10.0.100", Grade::Bad));
        assert_eq!(tile(&summary, "etcd"), ("2 of 3 votes", "leader hub-2", Grade::Warn));
        assert_eq!(tile(&summary, "Paths"), ("11 of 18", "7 down", Grade::Warn));
    }

    #[test]
    fn without_metrics_nothing_is_good() {
        let fleet = testing::fleet();
        let summary = summary(&fleet, &Replies::new(), &Reachable::new());
        assert_eq!((summary.headline.as_str(), summary.grade), ("Prometheus has no answer yet", Grade::Bad));
        assert!(summary.tiles.iter().all(|tile| tile.grade != Grade::Good), "{summary:?}");
    }
}
