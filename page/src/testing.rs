//! A fleet, and recorded replies, for unit tests.

use std::net::Ipv4Addr;

use crate::config::{Fleet, Node};
use crate::prometheus::Sample;
use crate::state::Replies;

/// Returns a fleet of three hubs, two databases, two application nodes and a monitor.
pub(crate) fn fleet() -> Fleet {
    let mut nodes = Vec::new();
    let mut add = |group: &str, count: u8, first: u8| {
        for number in 1..=count {
            nodes.push(Node {
                name: format!("{group}-{number}"),
                group: group.to_owned(),
                roles: vec![group.to_owned()],
                address: Ipv4Addr::new(10, 10, 0, first + number - 1),
                hub: if group == "hub" { u16::from(number) } else { 0 },
            });
        }
    };
    add("app", 2, 20);
    add("db", 2, 10);
    add("hub", 3, 1);
    add("monitor", 1, 30);
    Fleet {
        name: "acme".to_owned(),
        monitor: "monitor-1".to_owned(),
        vip: Ipv4Addr::new(10, 10, 0, 100),
        prometheus: "10.10.0.30:9090".parse().unwrap(),
        alertmanager: "10.10.0.30:9093".parse().unwrap(),
        probe: 9100,
        interval: 5.0,
        backups: true,
        updates: true,
        voters: ["hub-1", "hub-2", "hub-3"].map(str::to_owned).to_vec(),
        audit: None,
        nodes,
    }
}

/// Returns a fleet with this number of application nodes.
pub(crate) fn large_fleet(count: u16) -> Fleet {
    let mut fleet = fleet();
    fleet.nodes.retain(|node| !node.has_role("app"));
    fleet.nodes.extend((1..=count).map(|number| Node {
        name: format!("app-{number}"),
        group: "app".to_owned(),
        roles: vec!["app".to_owned()],
        address: Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 10, 1, 0)) + u32::from(number)),
        hub: 0,
    }));
    fleet
}

/// Adds a sample to the reply of a query.
pub(crate) fn add(replies: &mut Replies, query: &'static str, labels: &[(&str, &str)], value: f64) {
    let labels = labels.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    let value = crate::prometheus::Point { at: 1_796_000_000.0, value };
    replies.entry(query).or_default().push(Sample { labels, value });
}

/// Returns the replies of a fleet in which everything works: hub-1 holds the VIP, db-1 has the primary.
pub(crate) fn replies(fleet: &Fleet) -> Replies {
    let mut replies = Replies::new();
    let metrics = crate::queries::METRICS;
    for node in &fleet.nodes {
        let name = ("node", node.name.as_str());
        add(&mut replies, "up", &[name, ("job", "node")], 1.0);
        add(&mut replies, "version", &[name, ("image_version", "7")], 1.0);
        for (query, value) in [("load", 0.21), ("memory", 0.45), ("disk", 0.3), ("uptime", 90_000.0)] {
            add(&mut replies, query, &[name], value);
        }
        if node.has_role("app") {
            add(&mut replies, "odoo", &[("server", &node.name)], 1.0);
        }
        for hub in fleet.with_role("hub").filter(|hub| hub.name != node.name && fleet.is_small()) {
            add(&mut replies, "paths", &[name, ("name", &hub.name)], 1.0);
        }
    }
    for (metric, node, value) in [
        ("patroni_primary", "db-1", 1.0),
        ("patroni_primary", "db-2", 0.0),
        ("patroni_sync_standby", "db-2", 1.0),
        ("etcd_server_is_leader", "hub-1", 0.0),
        ("etcd_server_is_leader", "hub-2", 1.0),
        ("etcd_server_has_leader", "hub-1", 1.0),
        ("etcd_server_has_leader", "hub-2", 1.0),
        ("etcd_server_has_leader", "hub-3", 1.0),
        ("bakehouse_rollout_blocked", "hub-1", 0.0),
        ("bakehouse_backup_count", "monitor-1", 7.0),
        ("bakehouse_backup_newest_seconds", "monitor-1", 1_795_990_000.0),
        ("pg_stat_archiver_last_archive_age", "db-1", 42.0),
        ("pg_stat_archiver_failed_count", "db-1", 0.0),
    ] {
        add(&mut replies, metrics, &[("__name__", metric), ("node", node)], value);
    }
    add(&mut replies, "lag", &[("node", "db-2"), ("application_name", "db-2")], 1000.0);
    add(&mut replies, "vip", &[("node", "hub-1")], 1.0);
    for (job, seconds) in [("odoo", 0.012), ("login", 0.18), ("writes", 0.001)] {
        add(&mut replies, "probe", &[("job", job)], 1.0);
        add(&mut replies, "latency", &[("job", job)], seconds);
    }
    replies
}
