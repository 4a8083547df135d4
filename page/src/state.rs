//! State of the fleet, from the replies of Prometheus and Alertmanager and from the page's own connections. Values of
//! nodes that the fleet does not have are left out.

use std::collections::{BTreeMap, BTreeSet};

use crate::config::{Fleet, Node};
use crate::probe::Reachable;
use crate::prometheus::{Alert, Sample};
use crate::queries::METRICS;

/// Replies to the instant queries, by name. A query that failed is not in the map.
pub(crate) type Replies = BTreeMap<&'static str, Vec<Sample>>;

/// State of the fleet.
#[derive(Clone, Debug, Default)]
pub(crate) struct State {
    /// Unix time of the replies.
    pub(crate) at: f64,
    /// Nodes in the order of the configuration.
    pub(crate) nodes: Vec<NodeState>,
    /// Sessions between nodes and hubs.
    pub(crate) paths: Vec<Path>,
    /// Nodes that hold the VIP.
    pub(crate) vip: Vec<String>,
    /// Voters that lead etcd.
    pub(crate) etcd_leader: Vec<String>,
    /// Voters that have a leader.
    pub(crate) votes: BTreeSet<String>,
    /// Results of the probes through the VIP, by job.
    pub(crate) probes: BTreeMap<String, f64>,
    /// Seconds that these probes took, by job.
    pub(crate) latency: BTreeMap<String, f64>,
    pub(crate) rollout: Rollout,
    pub(crate) backups: Backups,
    /// Alerts, the most severe and the newest first.
    pub(crate) alerts: Vec<Alert>,
    /// Sources that do not answer, with the reason.
    pub(crate) missing: Vec<String>,
    /// Whether Prometheus has answered.
    pub(crate) has_metrics: bool,
}

/// State of a node.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct NodeState {
    pub(crate) name: String,
    pub(crate) health: Health,
    /// Version of the image that runs.
    pub(crate) version: Option<String>,
    /// Whether the node has the primary, or a standby.
    pub(crate) database: Option<Database>,
    /// Whether a hub's HAProxy sends requests to this node's Odoo.
    pub(crate) odoo: Option<bool>,
    /// Load of each processor.
    pub(crate) load: Option<f64>,
    /// Share of the memory in use.
    pub(crate) memory: Option<f64>,
    /// Share of /var in use.
    pub(crate) disk: Option<f64>,
    /// Seconds since the boot.
    pub(crate) uptime: Option<f64>,
    /// Seconds until the certificate for browsers expires, on a hub.
    pub(crate) certificate: Option<f64>,
    /// Units that have failed.
    pub(crate) failed: Vec<String>,
    /// Unix time since which the node is drained, if an operator has drained it.
    pub(crate) drained: Option<f64>,
}

/// Health of a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Health {
    /// The node does not answer.
    Down,
    /// The node answers, and its metrics do not.
    Blind,
    /// A unit has failed.
    Unwell,
    /// There is no information.
    #[default]
    Unknown,
    Good,
}

/// Part of a node in the database cluster.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Database {
    Primary,
    /// A standby, with the bytes of WAL that it has not replayed.
    Standby {
        sync: bool,
        lag: Option<f64>,
    },
    /// PostgreSQL does not run.
    Stopped,
}

/// A BGP session between a node and a hub, over one WireGuard link.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Path {
    pub(crate) from: String,
    pub(crate) hub: String,
    /// Whether the session is up; `None` without information.
    pub(crate) up: Option<bool>,
}

/// State of a rollout.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Rollout {
    /// Whether nodes wait for a version, and none changes.
    pub(crate) blocked: Option<bool>,
    /// Number of versions that no node installs.
    pub(crate) denied: f64,
    /// Number of nodes that the rollout skips.
    pub(crate) skipped: f64,
}

/// State of the backups.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Backups {
    pub(crate) count: Option<f64>,
    /// Unix time at which the newest backup has ended.
    pub(crate) newest: Option<f64>,
    /// Seconds since the primary archived a WAL file.
    pub(crate) archived: Option<f64>,
    /// Number of failures to archive WAL since PostgreSQL's statistics began.
    pub(crate) failures: Option<f64>,
}

impl State {
    /// Makes the state from the replies. `alerts` is an error if Prometheus does not answer.
    pub(crate) fn new(fleet: &Fleet, at: f64, replies: &Replies, alerts: Vec<Alert>, reachable: &Reachable) -> Self {
        let metrics = Metrics::new(fleet, replies);
        let mut state = Self { at, has_metrics: replies.contains_key("up"), ..Self::default() };
        state.nodes = fleet.nodes.iter().map(|node| metrics.node(node, reachable)).collect();
        state.vip = metrics.holders(metrics.by_node("vip"));
        state.etcd_leader = metrics.holders(metrics.named("etcd_server_is_leader"));
        state.votes = metrics.holders(metrics.named("etcd_server_has_leader")).into_iter().collect();
        state.probes = metrics.by_label("probe", "job");
        state.latency = metrics.by_label("latency", "job");
        state.rollout = Rollout {
            blocked: metrics.highest("bakehouse_rollout_blocked").map(|value| value > 0.0),
            denied: metrics.highest("bakehouse_rollout_denied").unwrap_or_default(),
            skipped: metrics.highest("bakehouse_rollout_skipped").unwrap_or_default(),
        };
        state.backups = metrics.backups();
        state.alerts = sorted(alerts);
        // What a node said before it went down counts no more.
        let down: BTreeSet<&str> =
            state.nodes.iter().filter(|node| node.health == Health::Down).map(|node| node.name.as_str()).collect();
        let is_up = |name: &String| !down.contains(name.as_str());
        state.vip.retain(is_up);
        state.etcd_leader.retain(is_up);
        state.votes.retain(is_up);
        state.paths = metrics.paths(fleet, &down);
        state
    }

    /// Returns a node's state.
    pub(crate) fn node(&self, name: &str) -> Option<&NodeState> {
        self.nodes.iter().find(|node| node.name == name)
    }

    /// Returns the nodes with the primary.
    pub(crate) fn primaries(&self) -> Vec<&str> {
        let has = |node: &&NodeState| node.database == Some(Database::Primary);
        self.nodes.iter().filter(has).map(|node| node.name.as_str()).collect()
    }

    /// Returns the synchronous standbys.
    pub(crate) fn sync_standbys(&self) -> Vec<&str> {
        let is = |node: &&NodeState| matches!(node.database, Some(Database::Standby { sync: true, .. }));
        self.nodes.iter().filter(is).map(|node| node.name.as_str()).collect()
    }

    /// Returns the alerts that fire and that Alertmanager does not mute.
    pub(crate) fn firing(&self) -> impl Iterator<Item = &Alert> {
        self.alerts.iter().filter(|alert| alert.state == "firing" && alert.muted.is_none())
    }
}

/// Removes alerts that need no operator, and sorts: firing and not muted first, then by severity, then the newest.
fn sorted(mut alerts: Vec<Alert>) -> Vec<Alert> {
    let label = |alert: &Alert, name: &str| alert.labels.get(name).cloned().unwrap_or_default();
    alerts.retain(|alert| label(alert, "severity") != "none");
    let rank = |alert: &Alert| {
        let severity = match label(alert, "severity").as_str() {
            "critical" => 0,
            "warning" => 1,
            _ => 2,
        };
        // Other alerts about a node that is down are consequences.
        let is_cause = label(alert, "alertname") == "NodeDown";
        (alert.state != "firing", alert.muted.is_some(), severity, !is_cause)
    };
    alerts.sort_by(|a, b| {
        let name = |alert: &Alert| (label(alert, "alertname"), label(alert, "node"));
        rank(a).cmp(&rank(b)).then_with(|| b.since.cmp(&a.since)).then_with(|| name(a).cmp(&name(b)))
    });
    alerts
}

/// The replies, by name of the metric and the node.
struct Metrics<'a> {
    known: BTreeSet<&'a str>,
    replies: &'a Replies,
    named: BTreeMap<&'a str, BTreeMap<&'a str, f64>>,
    by_query: BTreeMap<&'static str, BTreeMap<&'a str, f64>>,
    /// Whether the last scrape of a node's own metrics succeeded.
    scraped: BTreeMap<&'a str, bool>,
    version: BTreeMap<&'a str, &'a str>,
    failed: BTreeMap<&'a str, Vec<&'a str>>,
    odoo: BTreeMap<&'a str, bool>,
}

impl<'a> Metrics<'a> {
    fn new(fleet: &'a Fleet, replies: &'a Replies) -> Self {
        let known: BTreeSet<&str> = fleet.nodes.iter().map(|node| node.name.as_str()).collect();
        let mut named: BTreeMap<&str, BTreeMap<&str, f64>> = BTreeMap::new();
        for sample in replies.get(METRICS).into_iter().flatten() {
            named.entry(sample.label("__name__")).or_default().insert(sample.label("node"), sample.value.value);
        }
        let of = |samples: &'a Vec<Sample>| samples.iter().map(|s| (s.label("node"), s.value.value)).collect();
        let by_query = replies.iter().map(|(name, samples)| (*name, of(samples))).collect();
        let all = |query: &str| replies.get(query).into_iter().flatten();
        let scraped = all("up").filter(|sample| sample.label("job") == "node");
        let versions = all("version").filter(|sample| !sample.label("image_version").is_empty());
        let mut failed: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for sample in all("failed") {
            failed.entry(sample.label("node")).or_default().push(sample.label("name"));
        }
        Self {
            known,
            replies,
            named,
            by_query,
            scraped: scraped.map(|sample| (sample.label("node"), sample.value.value > 0.0)).collect(),
            version: versions.map(|sample| (sample.label("node"), sample.label("image_version"))).collect(),
            failed,
            odoo: all("odoo").map(|sample| (sample.label("server"), sample.value.value > 0.0)).collect(),
        }
    }

    /// Returns the values of a metric, by node.
    fn named(&self, name: &str) -> Option<&BTreeMap<&'a str, f64>> {
        self.named.get(name)
    }

    /// Returns the values of a query, by node.
    fn by_node(&self, query: &str) -> Option<&BTreeMap<&'a str, f64>> {
        self.by_query.get(query)
    }

    fn value(&self, query: &str, node: &str) -> Option<f64> {
        self.by_node(query)?.get(node).copied().filter(|value| value.is_finite())
    }

    fn metric(&self, name: &str, node: &str) -> Option<f64> {
        self.named(name)?.get(node).copied().filter(|value| value.is_finite())
    }

    fn highest(&self, name: &str) -> Option<f64> {
        self.named(name)?.values().copied().filter(|value| value.is_finite()).reduce(f64::max)
    }

    /// Returns the nodes of the fleet whose value is not 0.
    fn holders(&self, values: Option<&BTreeMap<&'a str, f64>>) -> Vec<String> {
        let held = values.into_iter().flatten().filter(|(node, value)| **value > 0.0 && self.known.contains(*node));
        held.map(|(node, _)| (*node).to_owned()).collect()
    }

    /// Returns the values of a query, by another label.
    fn by_label(&self, query: &str, label: &str) -> BTreeMap<String, f64> {
        let samples = self.replies.get(query).into_iter().flatten();
        samples.map(|sample| (sample.label(label).to_owned(), sample.value.value)).collect()
    }

    fn node(&self, node: &Node, reachable: &Reachable) -> NodeState {
        let name = node.name.as_str();
        let failed: Vec<String> = self.failed.get(name).into_iter().flatten().map(|unit| (*unit).to_owned()).collect();
        let scraped = self.scraped.get(name).copied();
        let health = match (reachable.get(name), scraped) {
            (Some(false), _) | (None, Some(false)) => Health::Down,
            (Some(true), Some(false)) => Health::Blind,
            (_, Some(true)) if !failed.is_empty() => Health::Unwell,
            (_, Some(true)) => Health::Good,
            (_, None) => Health::Unknown,
        };
        let state = NodeState { name: name.to_owned(), health, ..NodeState::default() };
        if health == Health::Down {
            return state;
        }
        NodeState {
            version: self.version.get(name).map(|version| (*version).to_owned()),
            database: if node.has_role("db") { self.database(name) } else { None },
            odoo: self.odoo.get(name).copied().filter(|_| node.has_role("app")),
            load: self.value("load", name),
            memory: self.value("memory", name),
            disk: self.value("disk", name),
            uptime: self.value("uptime", name),
            certificate: self.value("certificate", name),
            drained: self.metric("bakehouse_drained_since_seconds", name).filter(|since| *since > 0.0),
            failed,
            ..state
        }
    }

    fn database(&self, node: &str) -> Option<Database> {
        let is = |metric: &str| self.metric(metric, node).map(|value| value > 0.0);
        if is("patroni_primary")? {
            return Some(Database::Primary);
        }
        if is("patroni_postgres_running") == Some(false) {
            return Some(Database::Stopped);
        }
        let lag = self.value("lag", node).map(|lag| lag.max(0.0));
        Some(Database::Standby { sync: is("patroni_sync_standby") == Some(true), lag })
    }

    /// Returns every path of a small fleet. Of a large one, those of the central nodes and those that are down.
    fn paths(&self, fleet: &Fleet, down: &BTreeSet<&str>) -> Vec<Path> {
        let reply = self.replies.get("paths");
        let mut seen: BTreeMap<(&str, &str), bool> = BTreeMap::new();
        for sample in reply.into_iter().flatten() {
            let (from, hub) = (sample.label("node"), sample.label("name"));
            if self.known.contains(from) && self.known.contains(hub) {
                seen.insert((from, hub), sample.value.value > 0.0);
            }
        }
        // The query of a large fleet returns no path that is up.
        let others = reply.filter(|_| !fleet.is_small()).map(|_| true);
        let of = |from: &str, hub: &str| {
            let is_down = down.contains(from) || down.contains(hub);
            // Both ends have the session, and the one that is alive knows.
            let both = [seen.get(&(from, hub)), seen.get(&(hub, from))];
            let up = both.into_iter().flatten().copied().reduce(|one, other| one && other).or(others);
            Path { from: from.to_owned(), hub: hub.to_owned(), up: if is_down { Some(false) } else { up } }
        };
        let hubs: Vec<&Node> = fleet.with_role("hub").collect();
        let shown = fleet.nodes.iter().filter(|node| fleet.is_small() || node.is_central());
        let pairs = shown.flat_map(|node| hubs.iter().map(move |hub| (node, *hub)));
        // Of two hubs, the one with the higher number has the path.
        let has_path = |(node, hub): &(&Node, &Node)| node.hub == 0 || node.hub > hub.hub;
        let mut paths: Vec<Path> = pairs.filter(has_path).map(|(node, hub)| of(&node.name, &hub.name)).collect();
        let is_other = |name: &str| fleet.node(name).is_some_and(|node| !node.is_central());
        let more = seen.keys().filter(|(from, _)| !fleet.is_small() && is_other(from));
        paths.extend(more.map(|(from, hub)| of(from, hub)));
        paths
    }

    fn backups(&self) -> Backups {
        let of_primary = |name: &str| {
            let values = self.named(name)?;
            let primary = |node: &str| self.metric("patroni_primary", node).is_some_and(|value| value > 0.0);
            values.iter().find(|(node, _)| primary(node)).map(|(_, value)| *value).filter(|value| value.is_finite())
        };
        Backups {
            count: self.highest("bakehouse_backup_count"),
            newest: self.highest("bakehouse_backup_newest_seconds").filter(|at| *at > 0.0),
            archived: of_primary("pg_stat_archiver_last_archive_age"),
            failures: of_primary("pg_stat_archiver_failed_count"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{add, fleet, large_fleet, replies};
    use std::time::Instant;

    fn state(fleet: &Fleet, replies: &Replies, reachable: &Reachable) -> State {
        State::new(fleet, 1_796_000_000.0, replies, Vec::new(), reachable)
    }

    #[test]
    fn a_fleet_that_works_has_its_holders_and_paths() {
        let fleet = fleet();
        let state = state(&fleet, &replies(&fleet), &Reachable::new());
        assert!(state.nodes.iter().all(|node| node.health == Health::Good && node.version.as_deref() == Some("7")));
        assert_eq!((state.vip.as_slice(), state.primaries().as_slice()), (&["hub-1".to_owned()][..], &["db-1"][..]));
        assert_eq!((state.etcd_leader.len(), state.votes.len(), state.sync_standbys()), (1, 3, vec!["db-2"]));
        let standby = state.node("db-2").unwrap();
        assert_eq!(standby.database, Some(Database::Standby { sync: true, lag: Some(1000.0) }));
        assert_eq!(state.node("app-1").unwrap().odoo, Some(true));
        // Five workers with three hubs each, and three links between hubs.
        assert_eq!(state.paths.len(), 18);
        assert!(state.paths.iter().all(|path| path.up == Some(true)));
        assert_eq!(state.backups.count, Some(7.0));
    }

    #[test]
    fn a_node_that_does_not_answer_loses_what_it_held() {
        let fleet = fleet();
        let reachable = Reachable::from([("hub-1".to_owned(), false), ("db-2".to_owned(), true)]);
        let state = state(&fleet, &replies(&fleet), &reachable);
        let hub = state.node("hub-1").unwrap();
        assert!(hub.health == Health::Down && hub.version.is_none());
        assert!(state.vip.is_empty() && state.votes.len() == 2);
        assert_eq!(state.paths.iter().filter(|path| path.up == Some(false)).count(), 7);
    }

    #[test]
    fn health_follows_from_answers_scrapes_and_units() {
        let fleet = fleet();
        let mut replies = replies(&fleet);
        for sample in replies.get_mut("up").unwrap() {
            if ["db-1", "app-1"].contains(&sample.label("node")) {
                sample.value.value = 0.0;
            }
        }
        add(&mut replies, "failed", &[("node", "db-2"), ("name", "patroni.service")], 1.0);
        let reachable = Reachable::from([("app-1".to_owned(), true)]);
        let state = state(&fleet, &replies, &reachable);
        let health = |name: &str| state.node(name).unwrap().health;
        assert_eq!(
            ["db-1", "app-1", "db-2", "app-2"].map(health),
            [Health::Down, Health::Blind, Health::Unwell, Health::Good]
        );
        let nothing = State::new(&fleet, 0.0, &Replies::new(), Vec::new(), &Reachable::new());
        assert!(nothing.nodes.iter().all(|node| node.health == Health::Unknown) && !nothing.has_metrics);
        assert!(nothing.paths.iter().all(|path| path.up.is_none()));
    }

    #[test]
    fn values_about_nodes_that_the_fleet_does_not_have_are_left_out() {
        let fleet = fleet();
        let mut replies = replies(&fleet);
        add(&mut replies, "vip", &[("node", "<script>")], 1.0);
        add(&mut replies, "paths", &[("node", "db-1"), ("name", "hub-9")], 0.0);
        add(&mut replies, METRICS, &[("__name__", "etcd_server_is_leader"), ("node", "evil-1")], 1.0);
        add(&mut replies, METRICS, &[("__name__", "bakehouse_backup_count"), ("node", "monitor-1")], f64::NAN);
        let state = state(&fleet, &replies, &Reachable::new());
        assert_eq!((state.vip.len(), state.etcd_leader.len(), state.paths.len()), (1, 1, 18));
        assert_eq!(state.backups.count, None);
    }

    #[test]
    fn a_large_fleet_has_the_paths_of_its_central_nodes_and_those_that_are_down() {
        let fleet = large_fleet(1000);
        let mut replies = replies(&fleet);
        assert!(state(&fleet, &replies, &Reachable::new()).paths.iter().all(|path| path.up.is_none()));
        add(&mut replies, "paths", &[("node", "app-7"), ("name", "hub-2")], 0.0);
        add(&mut replies, "paths", &[("node", "db-1"), ("name", "hub-3")], 0.0);
        let state = state(&fleet, &replies, &Reachable::new());
        // Two databases and a monitor with three hubs each, three links between hubs, and app-7.
        let down = state.paths.iter().filter(|path| path.up == Some(false)).count();
        assert_eq!((state.paths.len(), down), (13, 2));
    }

    #[test]
    fn alerts_that_need_somebody_come_first() {
        let alert = |text: &str| serde_json::from_str::<Alert>(text).unwrap();
        let alerts = vec![
            alert(
                r#"{"labels":{"alertname":"DeadMan","severity":"none"},"state":"firing","activeAt":"2026-01-01T00:00:00Z"}"#,
            ),
            alert(
                r#"{"labels":{"alertname":"A","severity":"critical"},"state":"pending","activeAt":"2026-01-01T00:00:00Z"}"#,
            ),
            alert(
                r#"{"labels":{"alertname":"B","severity":"warning"},"state":"firing","activeAt":"2026-01-01T00:00:00Z"}"#,
            ),
            alert(
                r#"{"labels":{"alertname":"C","severity":"critical"},"state":"firing","activeAt":"2026-01-01T00:00:00Z"}"#,
            ),
            alert(
                r#"{"labels":{"alertname":"D","severity":"critical"},"state":"firing","activeAt":"2026-01-02T00:00:00Z"}"#,
            ),
        ];
        let names: Vec<String> = sorted(alerts).into_iter().map(|alert| alert.labels["alertname"].clone()).collect();
        assert_eq!(names, ["D", "C", "B", "A"]);
    }

    #[test]
    fn a_thousand_nodes_take_a_fraction_of_a_second() {
        let fleet = large_fleet(1000);
        let replies = replies(&fleet);
        let started = Instant::now();
        let state = state(&fleet, &replies, &Reachable::new());
        assert_eq!(state.nodes.len(), 1006);
        assert!(started.elapsed().as_secs_f64() < 5.0, "{:?}", started.elapsed());
    }
}
