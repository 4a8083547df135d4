//! Every expression that the page sends to Prometheus.

use std::net::Ipv4Addr;

use crate::config::Fleet;
use crate::format::{Unit, whole};

/// Metrics that the page takes as they are: the job of their exporter, and a regular expression. A hostile node's other
/// exporters cannot return them.
const PLAIN: [(&str, &str); 4] = [
    ("patroni", "patroni_(primary|sync_standby|postgres_running)"),
    ("postgres", "pg_stat_archiver_(failed_count|last_archive_age)"),
    ("etcd", "etcd_server_(has_leader|is_leader)"),
    ("node", "bakehouse_(rollout_(blocked|denied|skipped)|backup_(count|newest_seconds)|drained_since_seconds)"),
];

/// Name of the query for [`PLAIN`], whose samples have their names as the label `__name__`.
pub(crate) const METRICS: &str = "metrics";

/// Returns the instant queries, by name.
pub(crate) fn instant(fleet: &Fleet) -> Vec<(&'static str, String)> {
    let vip = fleet.vip;
    // A session with a hub has the hub's name. In a large fleet, only those that are down matter.
    let paths = r#"bird_protocol_up{job="bird",proto="BGP",name=~".+-[0-9]+"}"#;
    let paths = if fleet.is_small() { paths.to_owned() } else { format!("{paths} == 0") };
    vec![
        (METRICS, PLAIN.map(|(job, names)| format!(r#"{{job="{job}",__name__=~"{names}"}}"#)).join(" or ")),
        ("up", "min by (node, job) (up)".to_owned()),
        ("failed", r#"node_systemd_unit_state{job="node",state="failed"} == 1"#.to_owned()),
        ("version", "max by (node, image_version) (node_os_info)".to_owned()),
        ("vip", vip_holder(vip)),
        ("paths", paths),
        ("lag", LAG.to_owned()),
        ("load", LOAD.to_owned()),
        ("memory", MEMORY.to_owned()),
        ("disk", DISK.to_owned()),
        ("uptime", "time() - max by (node) (node_boot_time_seconds)".to_owned()),
        ("odoo", r#"max by (server) (haproxy_server_status{job="haproxy",proxy="odoo",state="UP"})"#.to_owned()),
        ("probe", r#"min by (job) (probe_success{job=~"odoo|login|writes"})"#.to_owned()),
        ("latency", r#"max by (job) (probe_duration_seconds{job=~"odoo|login"})"#.to_owned()),
        ("certificate", r#"min by (node) (probe_ssl_earliest_cert_expiry{job="certificate"}) - time()"#.to_owned()),
    ]
}

fn vip_holder(vip: Ipv4Addr) -> String {
    format!(r#"max by (node) (node_network_address_info{{address="{vip}"}})"#)
}

/// Bytes of WAL that each standby has not replayed, as the primary reports them. (The difference of two nodes' own
/// positions would grow with the time between their scrapes.) Patroni gives each standby's session the node's name.
const LAG: &str = r#"label_replace(max by (application_name) (pg_stat_replication_pg_wal_lsn_diff), "node", "$1", "application_name", "(.+)")"#;
/// Load of each processor.
const LOAD: &str = r#"max by (node) (node_load1) / count by (node) (node_cpu_seconds_total{mode="idle"})"#;
const MEMORY: &str = "1 - max by (node) (node_memory_MemAvailable_bytes) / max by (node) (node_memory_MemTotal_bytes)";
const DISK: &str = r#"1 - max by (node) (node_filesystem_avail_bytes{mountpoint="/var"}) / max by (node) (node_filesystem_size_bytes{mountpoint="/var"})"#;

/// A graph.
#[derive(Clone, Debug)]
pub(crate) struct Graph {
    /// Identifier in the page.
    pub(crate) id: &'static str,
    pub(crate) title: &'static str,
    /// What the values are.
    pub(crate) note: &'static str,
    pub(crate) unit: Unit,
    /// Largest value of the axis, if it does not depend on the values.
    pub(crate) top: Option<f64>,
    /// Expressions with the name of their series. Without a name, a series has the name of its label `node`.
    pub(crate) lines: Vec<(Option<&'static str>, String)>,
}

/// Returns the graphs for a step of this length in seconds.
pub(crate) fn graphs(fleet: &Fleet, step: f64) -> Vec<Graph> {
    // A rate needs two scrapes, and a step must not skip one.
    let window = format!("{}s", whole(step.max(fleet.interval * 4.0).max(60.0)));
    let (has_db, has_app) = (fleet.with_role("db").next().is_some(), fleet.with_role("app").next().is_some());
    let mut graphs = Vec::new();
    let named = |name: &'static str, expression: String| vec![(Some(name), expression)];
    let each = |expression: &str| {
        if fleet.is_small() {
            return vec![(None, expression.to_owned())];
        }
        [("highest", "max("), ("median", "quantile(0.5, "), ("lowest", "min(")]
            .map(|(name, of)| (Some(name), format!("{of}{expression})")))
            .to_vec()
    };
    let mut graph = |id, title, note, unit, top, lines| graphs.push(Graph { id, title, note, unit, top, lines });
    if has_app {
        let requests = format!(r#"sum(rate(haproxy_frontend_http_requests_total{{proxy="odoo"}}[{window}]))"#);
        graph(
            "requests",
            "Requests",
            "HTTP requests to Odoo, all hubs",
            Unit::PerSecond,
            None,
            named("requests", requests),
        );
        let errors = |code: &str| {
            format!(r#"sum(rate(haproxy_backend_http_responses_total{{proxy="odoo",code="{code}"}}[{window}]))"#)
        };
        let lines = vec![(Some("5xx, server"), errors("5xx")), (Some("4xx, client"), errors("4xx"))];
        graph("errors", "Errors", "HTTP responses with an error status", Unit::PerSecond, None, lines);
        let probe = |job: &str| format!(r#"max(probe_duration_seconds{{job="{job}"}})"#);
        let average = r#"max(haproxy_backend_response_time_average_seconds{proxy="odoo"})"#.to_owned();
        let lines = vec![
            (Some("login page"), probe("login")),
            (Some("requests, mean"), average),
            (Some("health page"), probe("odoo")),
        ];
        graph("latency", "Latency", "Time to the response, through the VIP", Unit::Seconds, None, lines);
    }
    if has_db {
        graph("lag", "Replication lag", "WAL that a standby has not replayed", Unit::Bytes, None, each(LAG));
        // The position of a standby is 0, so the rate of each node would have a peak at a failover.
        let wal = format!("clamp_min(deriv(max(patroni_xlog_location > 0)[{window}:]), 0)");
        graph("wal", "WAL", "WAL that the primary writes", Unit::BytesPerSecond, None, named("WAL", wal));
    }
    graph("load", "Load", "Load average of 1 min, for each processor", Unit::Number, None, each(LOAD));
    graph("memory", "Memory", "Memory in use", Unit::Share, Some(1.0), each(MEMORY));
    graph("disk", "Disks", "Space in use on /var", Unit::Share, Some(1.0), each(DISK));
    if !fleet.voters.is_empty() {
        let etcd = "max by (node) (etcd_mvcc_db_total_size_in_bytes)";
        graph("etcd", "etcd", "Size of the database of each voter", Unit::Bytes, None, vec![(None, etcd.to_owned())]);
    }
    graphs
}

/// Returns the number of nodes that run each version. In a small fleet, the version of each node.
pub(crate) fn versions(fleet: &Fleet) -> &'static str {
    if fleet.is_small() {
        "max by (node, image_version) (node_os_info)"
    } else {
        "count by (image_version) (node_os_info)"
    }
}

/// Returns the alerts that fire, for a range query. A large fleet counts them.
pub(crate) fn fired(fleet: &Fleet) -> &'static str {
    if fleet.is_small() {
        r#"max by (alertname, node, severity) (ALERTS{alertstate="firing",severity!="none"})"#
    } else {
        r#"count by (alertname, severity) (ALERTS{alertstate="firing",severity!="none"})"#
    }
}

/// A promise to the fleet's users, and the probe that measures it.
pub(crate) struct Promise {
    pub(crate) title: &'static str,
    /// Label `job` of the probe.
    pub(crate) job: &'static str,
    /// Seconds between two probes, as a multiple of the scrape interval.
    pub(crate) every: f64,
}

/// Returns the promises that a monitor of the fleet measures.
pub(crate) fn promises(fleet: &Fleet) -> Vec<Promise> {
    let mut promises = Vec::new();
    if fleet.with_role("app").next().is_some() {
        promises.push(Promise { title: "Odoo answers through the VIP", job: "odoo", every: 1.0 });
        promises.push(Promise { title: "The login page works", job: "login", every: 3.0 });
    }
    if fleet.with_role("db").next().is_some() {
        promises.push(Promise { title: "The primary accepts connections through the VIP", job: "writes", every: 1.0 });
    }
    promises
}

impl Promise {
    /// Returns the expressions for the share of successful probes of the last seconds, and for the number of probes.
    pub(crate) fn expressions(&self, seconds: usize) -> (String, String) {
        let series = format!(r#"probe_success{{job="{}"}}[{seconds}s]"#, self.job);
        (format!("min(avg_over_time({series}))"), format!("max(count_over_time({series}))"))
    }
}

/// Returns the expression for the number of promotions of the last seconds: each one raises the timeline by 1.
pub(crate) fn promotions(seconds: usize) -> String {
    let over = |f: &str| format!("{f}({f}_over_time(patroni_postgres_timeline[{seconds}s]))");
    // A standby that starts reports 0.
    format!("{} - min(min_over_time((patroni_postgres_timeline > 0)[{seconds}s:5m]))", over("max"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_fleet_has_bands_and_paths_that_are_down() {
        let small = crate::testing::fleet();
        let large = crate::testing::large_fleet(1000);
        let expressions = |fleet: &Fleet| instant(fleet).into_iter().find(|(name, _)| *name == "paths").unwrap().1;
        assert!(!expressions(&small).ends_with("== 0") && expressions(&large).ends_with("== 0"));
        let load = |fleet: &Fleet| graphs(fleet, 15.0).into_iter().find(|graph| graph.id == "load").unwrap().lines;
        assert_eq!(load(&small).len(), 1);
        let lines = load(&large);
        assert_eq!(lines.iter().map(|(name, _)| name.unwrap()).collect::<Vec<_>>(), ["highest", "median", "lowest"]);
        for (_, expression) in lines {
            let (open, close) = (expression.matches('(').count(), expression.matches(')').count());
            assert_eq!(open, close, "{expression}");
        }
    }
}
