//! What happened over time: graphs, rollouts, and promises to users.

use std::collections::{BTreeMap, BTreeSet};

use futures_util::future::join_all;

use crate::config::Fleet;
use crate::error::Result;
use crate::format::{month_start, whole};
use crate::prometheus::{Point, Series, Sources, Window};
use crate::queries::{self, Graph};

/// Range of the graphs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Range {
    /// The last hour.
    #[default]
    Hour,
    /// The last six hours.
    SixHours,
    /// The last day.
    Day,
    /// The last seven days.
    Week,
    /// The last 30 days, for which Prometheus keeps its data.
    Month,
}

impl Range {
    pub(crate) const ALL: [Self; 5] = [Self::Hour, Self::SixHours, Self::Day, Self::Week, Self::Month];
    /// Number of points of a series.
    const POINTS: f64 = 180.0;

    /// Returns the range's name in the page's address.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Hour => "1h",
            Self::SixHours => "6h",
            Self::Day => "24h",
            Self::Week => "7d",
            Self::Month => "30d",
        }
    }

    pub(crate) fn new(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|range| range.name() == name)
    }

    /// Returns the length in seconds.
    pub(crate) fn length(self) -> f64 {
        match self {
            Self::Hour => 3600.0,
            Self::SixHours => 6.0 * 3600.0,
            Self::Day => 86400.0,
            Self::Week => 7.0 * 86400.0,
            Self::Month => 30.0 * 86400.0,
        }
    }

    /// Returns the time between two points in seconds.
    pub(crate) fn step(self) -> f64 {
        self.length() / Self::POINTS
    }

    /// Returns the window that ends now. It moves by whole steps, so that old points stay as they are.
    pub(crate) fn window(self, now: f64) -> Window {
        let step = self.step();
        let end = (now / step).floor() * step;
        Window { start: end - self.length(), end, step }
    }
}

/// A graph with its lines.
#[derive(Clone, Debug)]
pub(crate) struct Drawn {
    pub(crate) graph: Graph,
    pub(crate) window: Window,
    /// Lines in the order of their names; an error if Prometheus does not answer.
    pub(crate) lines: Result<Vec<Line>, String>,
}

/// A line of a graph.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Line {
    pub(crate) name: String,
    /// A value for each step; `None` where there is no data.
    pub(crate) values: Vec<Option<f64>>,
}

/// Returns a graph with its lines.
pub(crate) async fn draw(fleet: &Fleet, sources: &Sources, graph: Graph, window: Window) -> Drawn {
    let replies = join_all(graph.lines.iter().map(|(_, expression)| sources.range(expression, window))).await;
    let names = graph.lines.iter().map(|(name, _)| *name);
    let lines = names.zip(replies).map(|(name, reply)| Ok((name, reply.map_err(|e| e.chain())?)));
    let lines = lines.collect::<Result<Vec<_>, String>>().map(|replies| lines_of(fleet, replies, window));
    Drawn { graph, window, lines }
}

fn lines_of(fleet: &Fleet, replies: Vec<(Option<&'static str>, Vec<Series>)>, window: Window) -> Vec<Line> {
    let mut lines = Vec::new();
    for (name, series) in replies {
        for one in series {
            // A series without a name of the page's own is about a node.
            let node = one.labels.get("node").filter(|node| fleet.node(node).is_some());
            let Some(name) = name.or(node.map(String::as_str)) else { continue };
            lines.push(Line { name: name.to_owned(), values: at_steps(&one.points, window) });
        }
    }
    lines
}

/// Returns the value at each step of the window.
fn at_steps(points: &[Point], window: Window) -> Vec<Option<f64>> {
    let count = whole(((window.end - window.start) / window.step).round()) + 1;
    let mut values = vec![None; count];
    for point in points.iter().filter(|point| point.value.is_finite()) {
        let index = ((point.at - window.start) / window.step).round();
        if index >= 0.0
            && let Some(value) = values.get_mut(whole(index))
        {
            *value = Some(point.value);
        }
    }
    values
}

/// A version, and when nodes began to run it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Version {
    pub(crate) version: String,
    /// Unix time at which the first node ran it; `None` if that is before the data.
    pub(crate) first: Option<f64>,
    /// Unix time at which the last node began to run it.
    pub(crate) last: f64,
    /// Largest number of nodes that ran it at the same time.
    pub(crate) nodes: usize,
    /// Number of nodes that run it now.
    pub(crate) now: usize,
}

/// Number of seconds of the rollouts' history, and its resolution.
const ROLLOUTS: f64 = 30.0 * 86400.0;
const ROLLOUT_STEP: f64 = 3600.0;

/// Returns the versions of the last 30 days, the newest first.
///
/// # Errors
/// If Prometheus does not answer.
pub(crate) async fn versions(fleet: &Fleet, sources: &Sources, now: f64) -> Result<Vec<Version>> {
    let window = Window { start: now - ROLLOUTS, end: now, step: ROLLOUT_STEP };
    Ok(versions_of(&sources.range(queries::versions(fleet), window).await?, window))
}

fn versions_of(series: &[Series], window: Window) -> Vec<Version> {
    let mut by_version: BTreeMap<&str, Vec<&Series>> = BTreeMap::new();
    for one in series {
        if let Some(version) = one.labels.get("image_version").filter(|version| !version.is_empty()) {
            by_version.entry(version).or_default().push(one);
        }
    }
    // Data that begins later than the window begins with the first start of this Prometheus.
    let all = series.iter().filter_map(|one| one.points.first()).map(|point| point.at);
    let begin = all.reduce(f64::min).unwrap_or(window.start);
    let mut versions: Vec<Version> = by_version
        .into_iter()
        .filter_map(|(version, series)| {
            let starts = series.iter().filter_map(|one| one.points.first()).map(|point| point.at);
            let first = starts.clone().reduce(f64::min)?;
            // The number of nodes: a series for each, or the value of the only series.
            let is_count = series.iter().all(|one| !one.labels.contains_key("node"));
            let mut counts: BTreeMap<i64, f64> = BTreeMap::new();
            for point in series.iter().flat_map(|one| &one.points) {
                let step = ((point.at - window.start) / window.step).round() as i64;
                *counts.entry(step).or_default() += if is_count { point.value } else { 1.0 };
            }
            let largest = counts.values().copied().fold(0.0, f64::max);
            let end = ((window.end - window.start) / window.step).round() as i64;
            let grew = counts.iter().find(|(_, count)| **count >= largest).map(|(step, _)| *step as f64);
            Some(Version {
                version: version.to_owned(),
                first: (first > begin + window.step / 2.0).then_some(first),
                last: if is_count {
                    grew.map_or(first, |step| window.start + step * window.step)
                } else {
                    starts.fold(first, f64::max)
                },
                nodes: whole(largest),
                now: counts.get(&end).copied().map_or(0, whole),
            })
        })
        .collect();
    versions.sort_by(|a, b| b.last.total_cmp(&a.last));
    versions
}

/// An alert that fired, and does not any more.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Fired {
    pub(crate) name: String,
    /// The node that the alert names, if it is one of the fleet.
    pub(crate) node: Option<String>,
    pub(crate) severity: String,
    /// Unix times of its begin and end.
    pub(crate) from: f64,
    pub(crate) to: f64,
}

/// Seconds for which the page remembers alerts, and the resolution.
const FIRED: f64 = 86400.0;
const FIRED_STEP: f64 = 60.0;

/// Returns the alerts of the last 24 h that have ended, the newest first.
///
/// # Errors
/// If Prometheus does not answer.
pub(crate) async fn fired(fleet: &Fleet, sources: &Sources, now: f64) -> Result<Vec<Fired>> {
    let window = Window { start: now - FIRED, end: now, step: FIRED_STEP };
    Ok(fired_of(fleet, &sources.range(queries::fired(fleet), window).await?, window))
}

fn fired_of(fleet: &Fleet, series: &[Series], window: Window) -> Vec<Fired> {
    let mut all = Vec::new();
    for one in series {
        let label = |name: &str| one.labels.get(name).cloned().unwrap_or_default();
        let node = one.labels.get("node").filter(|node| fleet.node(node).is_some()).cloned();
        let mut times = one.points.iter().map(|point| point.at).peekable();
        while let Some(from) = times.next() {
            let mut to = from;
            // A gap of one step may be a restart of Prometheus.
            while let Some(next) = times.next_if(|next| next - to <= window.step * 2.5) {
                to = next;
            }
            if to < window.end - window.step * 2.5 {
                let (name, severity) = (label("alertname"), label("severity"));
                all.push(Fired { name, node: node.clone(), severity, from, to });
            }
        }
    }
    all.sort_by(|a, b| b.to.total_cmp(&a.to).then_with(|| a.name.cmp(&b.name)));
    all
}

/// Result of a promise since the first of the month.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Kept {
    pub(crate) title: &'static str,
    /// Share of the probes that succeeded; `None` without a probe.
    pub(crate) share: Option<f64>,
    /// Share of the time in which the monitor probed.
    pub(crate) measured: f64,
    /// Number of probes that failed.
    pub(crate) failed: f64,
    /// Estimate of the time in which the promise was broken, in seconds.
    pub(crate) broken: f64,
}

/// Results of the promises, with the number of times that a standby became the primary.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Promises {
    /// Unix time at which the month began.
    pub(crate) since: f64,
    pub(crate) kept: Vec<Kept>,
    pub(crate) promotions: Option<f64>,
}

/// Returns the results of the promises since the first of the month.
///
/// # Errors
/// If Prometheus does not answer.
pub(crate) async fn promises(fleet: &Fleet, sources: &Sources, now: f64) -> Result<Promises> {
    let since = month_start(now);
    let seconds = whole(now - since).max(60);
    let value = async |expression: String| -> Result<Option<f64>> {
        let samples = sources.query(&expression).await?;
        Ok(samples.first().map(|sample| sample.value.value).filter(|value| value.is_finite()))
    };
    let mut kept = Vec::new();
    for promise in queries::promises(fleet) {
        let (share, count) = promise.expressions(seconds);
        let (share, count) = (value(share).await?, value(count).await?.unwrap_or_default());
        let every = promise.every * fleet.interval;
        let failed = share.map_or(0.0, |share| ((1.0 - share) * count).round());
        kept.push(Kept {
            title: promise.title,
            share,
            measured: (count * every / seconds as f64).min(1.0),
            failed,
            broken: failed * every,
        });
    }
    let promotions = value(queries::promotions(seconds)).await.ok().flatten();
    Ok(Promises { since, kept, promotions })
}

/// Returns the distinct versions of nodes, with their number, the most frequent first.
pub(crate) fn mix<'a>(versions: impl Iterator<Item = &'a str>) -> Vec<(String, usize)> {
    let all: Vec<&str> = versions.collect();
    let distinct: BTreeSet<&str> = all.iter().copied().collect();
    let count = |version: &str| all.iter().filter(|other| **other == version).count();
    let mut mix: Vec<(String, usize)> =
        distinct.into_iter().map(|version| (version.to_owned(), count(version))).collect();
    mix.sort_by_key(|(version, count)| (std::cmp::Reverse(*count), version.clone()));
    mix
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(labels: &[(&str, &str)], points: &[(f64, f64)]) -> Series {
        Series {
            labels: labels.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect(),
            points: points.iter().map(|(at, value)| Point { at: *at, value: *value }).collect(),
        }
    }

    #[test]
    fn missing_points_are_gaps() {
        let window = Window { start: 100.0, end: 140.0, step: 10.0 };
        let points = [(100.0, 1.0), (120.0, f64::NAN), (130.0, 3.0), (900.0, 4.0), (10.0, 5.0)];
        let points: Vec<Point> = points.iter().map(|(at, value)| Point { at: *at, value: *value }).collect();
        assert_eq!(at_steps(&points, window), [Some(1.0), None, None, Some(3.0), None]);
    }

    #[test]
    fn lines_have_names_of_the_page_or_of_nodes_of_the_fleet() {
        let fleet = crate::testing::fleet();
        let window = Window { start: 0.0, end: 10.0, step: 10.0 };
        let replies = vec![
            (Some("requests"), vec![series(&[], &[(0.0, 1.0)])]),
            (None, vec![series(&[("node", "db-1")], &[(0.0, 2.0)]), series(&[("node", "<b>")], &[(0.0, 3.0)])]),
        ];
        let lines = lines_of(&fleet, replies, window);
        assert_eq!(lines.iter().map(|line| line.name.as_str()).collect::<Vec<_>>(), ["requests", "db-1"]);
    }

    #[test]
    fn versions_have_their_first_and_last_node() {
        let window = Window { start: 0.0, end: 40.0, step: 10.0 };
        let node = |name: &str, version: &str, at: &[f64]| {
            let points: Vec<(f64, f64)> = at.iter().map(|at| (*at, 1.0)).collect();
            series(&[("node", name), ("image_version", version)], &points)
        };
        let all = [
            node("a", "6", &[0.0, 10.0]),
            node("b", "6", &[0.0, 10.0, 20.0]),
            node("a", "7", &[20.0, 30.0, 40.0]),
            node("b", "7", &[30.0, 40.0]),
        ];
        let versions = versions_of(&all, window);
        let expected =
            |version: &str, first, last, now| Version { version: version.to_owned(), first, last, nodes: 2, now };
        assert_eq!(versions, [expected("7", Some(20.0), 30.0, 2), expected("6", None, 0.0, 0)]);
        // Counts of a large fleet.
        let count = |version: &str, points: &[(f64, f64)]| series(&[("image_version", version)], points);
        let all = [count("6", &[(0.0, 2.0), (10.0, 1.0)]), count("7", &[(10.0, 1.0), (20.0, 2.0), (40.0, 2.0)])];
        assert_eq!(versions_of(&all, window), [expected("7", Some(10.0), 20.0, 2), expected("6", None, 0.0, 0)]);
    }

    #[test]
    fn an_alert_that_ended_has_its_begin_and_end() {
        let fleet = crate::testing::fleet();
        let window = Window { start: 0.0, end: 6000.0, step: 60.0 };
        let labels = [("alertname", "NodeDown"), ("node", "hub-1"), ("severity", "critical")];
        let all = [
            series(&labels, &[(600.0, 1.0), (660.0, 1.0), (780.0, 1.0), (1200.0, 1.0), (5940.0, 1.0), (6000.0, 1.0)]),
            series(&[("alertname", "X"), ("node", "<b>")], &[(3000.0, 1.0)]),
        ];
        let fired = fired_of(&fleet, &all, window);
        let times: Vec<(&str, f64, f64)> = fired.iter().map(|one| (one.name.as_str(), one.from, one.to)).collect();
        assert_eq!(times, [("X", 3000.0, 3000.0), ("NodeDown", 1200.0, 1200.0), ("NodeDown", 600.0, 780.0)]);
        assert_eq!((fired[0].node.as_deref(), fired[1].node.as_deref()), (None, Some("hub-1")));
    }

    #[test]
    fn mix_counts_each_version() {
        let mix = mix(["7", "6", "7"].into_iter());
        assert_eq!(mix, [("7".to_owned(), 2), ("6".to_owned(), 1)]);
    }
}
