//! Exporters of a fleet that does not exist: every metric that the fleet's page reads, as functions of time. The same
//! functions give Prometheus its history.

use std::collections::{BTreeMap, BTreeSet};
use std::f64::consts::TAU;
use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

use fleet::{Node, Topology};

/// What the nodes report.
#[derive(Clone, Debug)]
pub struct Story {
    /// The hub with the VIP.
    pub vip: String,
    /// The node with the primary.
    pub primary: String,
    /// The voter that leads etcd.
    pub leader: String,
    /// Version of the images.
    pub version: String,
    /// Other versions, by node.
    pub versions: BTreeMap<String, String>,
    /// Failed units, by node.
    pub failed: BTreeMap<String, String>,
    /// Nodes that do not answer. The test cuts their packets.
    pub down: BTreeSet<String>,
}

/// The exporters.
pub struct Exporters {
    topology: Topology,
    story: Mutex<Story>,
}

/// Name, labels and value of a metric.
type Metric = (&'static str, Vec<(&'static str, String)>, f64);

/// Port of each kind of exporter, with its job in Prometheus and the role of the nodes that run it.
const PORTS: [(u16, &str, Option<&str>); 8] = [
    (9100, "node", None),
    (9324, "bird", None),
    (2381, "etcd", Some("voter")),
    (8404, "haproxy", Some("hub")),
    (8404, "haproxy", Some("app")),
    (8008, "patroni", Some("db")),
    (9187, "postgres", Some("db")),
    (9115, "", Some("monitor")),
];
/// Jobs of probes, with their module and the seconds that the probe takes.
const PROBES: [(&str, &str, f64); 5] = [
    ("odoo", "http", 0.012),
    ("login", "login", 0.16),
    ("writes", "tcp", 0.002),
    ("etcd-health", "http", 0.003),
    ("odoo-node", "http", 0.01),
];

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// Returns the work at a time of the day, 0.1 to 1, with most at noon.
fn busy(at: f64) -> f64 {
    0.55 + 0.45 * ((at / 86_400.0 - 0.25) * TAU).sin()
}

/// Returns a value that swings around `base`, different for each name.
fn wave(name: &str, at: f64, base: f64, swing: f64, period: f64) -> f64 {
    let phase =
        f64::from(name.bytes().fold(7_u32, |sum, byte| sum.wrapping_mul(31).wrapping_add(u32::from(byte))) % 997);
    let slow = ((at + phase * period / 997.0) / period * TAU).sin();
    let fast = ((at + phase) / 97.0 * TAU).sin() * 0.35 + ((at + phase) / 23.0 * TAU).sin() * 0.2;
    (base + swing * (slow + fast) / 1.55).max(0.0)
}

impl Exporters {
    /// Starts the exporters at the nodes' addresses, which this host must have.
    ///
    /// # Panics
    /// If a port is in use.
    #[must_use]
    pub fn start(topology: &Topology, story: Story) -> Arc<Self> {
        Self::start_at(topology, &topology.nodes, story)
    }

    /// Starts the exporters at the addresses of some nodes. The metrics of the other nodes are at `/metrics/NODE` of each.
    ///
    /// # Panics
    /// If a port is in use.
    #[must_use]
    pub fn start_at(topology: &Topology, nodes: &[Node], story: Story) -> Arc<Self> {
        let exporters = Arc::new(Self { topology: topology.clone(), story: Mutex::new(story) });
        for node in nodes {
            for (port, _, _) in PORTS.into_iter().filter(|(_, _, role)| role.is_none_or(|role| node.has_role(role))) {
                let listener = TcpListener::bind((node.address, port)).expect("a free port of a node");
                let (exporters, node) = (exporters.clone(), node.clone());
                thread::spawn(move || {
                    for stream in listener.incoming().flatten() {
                        let (exporters, node) = (exporters.clone(), node.clone());
                        thread::spawn(move || exporters.answer(&node, port, stream));
                    }
                });
            }
        }
        exporters
    }

    /// Changes what the nodes report.
    pub fn tell(&self, change: impl FnOnce(&mut Story)) {
        change(&mut self.story.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn story(&self) -> Story {
        self.story.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn answer(&self, node: &Node, port: u16, mut stream: TcpStream) -> Option<()> {
        let mut reader = BufReader::new(stream.try_clone().ok()?);
        loop {
            let mut first = String::new();
            reader.read_line(&mut first).ok().filter(|length| *length > 0)?;
            let mut line = String::new();
            while reader.read_line(&mut line).ok()? > 2 {
                line.clear();
            }
            let path = first.split(' ').nth(1)?;
            let other = path.strip_prefix("/metrics/").and_then(|name| self.topology.node(name));
            let node = other.unwrap_or(node);
            let metrics =
                if port == 9115 { probe(path, now()) } else { self.metrics(node, port, now(), &self.story()) };
            let body = text(&metrics, "", None);
            let head = format!(
                "HTTP/1.1 200 OK\r\ncontent-type: text/plain; version=0.0.4\r\ncontent-length: {}\r\n\r\n",
                body.len()
            );
            stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body.as_bytes())).ok()?;
        }
    }

    /// Returns the metrics of a node's exporter.
    fn metrics(&self, node: &Node, port: u16, at: f64, story: &Story) -> Vec<Metric> {
        let name = node.name.as_str();
        let mut all: Vec<Metric> = Vec::new();
        let mut add = |metric: &'static str, labels: &[(&'static str, &str)], value: f64| {
            all.push((metric, labels.iter().map(|(name, value)| (*name, (*value).to_owned())).collect(), value));
        };
        let with_role = |role: &'static str| self.topology.nodes.iter().filter(move |other| other.has_role(role));
        let busy = busy(at);
        match port {
            9100 => self.machine(node, at, story, &mut add),
            9324 => {
                for hub in with_role("hub").filter(|hub| hub.name != name) {
                    let up = !story.down.contains(&hub.name);
                    add("bird_protocol_up", &[("proto", "BGP"), ("name", &hub.name)], f64::from(u8::from(up)));
                }
            }
            2381 => {
                let alive = with_role("voter").filter(|voter| !story.down.contains(&voter.name)).count();
                let has_leader = alive * 2 > self.topology.voters.len();
                add("etcd_server_has_leader", &[], f64::from(u8::from(has_leader)));
                add("etcd_server_is_leader", &[], f64::from(u8::from(story.leader == name)));
                add("etcd_mvcc_db_total_size_in_bytes", &[], wave(name, at, 3.1e6, 6e4, 9000.0));
                add("etcd_server_quota_backend_bytes", &[], 2e9);
            }
            8404 => {
                for app in with_role("app").filter(|_| node.hub > 0) {
                    let up = !story.down.contains(&app.name);
                    let labels = [("proxy", "odoo"), ("server", app.name.as_str()), ("state", "UP")];
                    add("haproxy_server_status", &labels, f64::from(u8::from(up)));
                }
                if story.vip == name {
                    // The integral of the requests each second.
                    let requests = at.rem_euclid(1e7) * 18.0
                        - 86_400.0 / TAU * 9.0 * ((at / 86_400.0 - 0.25) * TAU).cos()
                        + 700.0 * (at / 700.0).sin();
                    let odoo = ("proxy", "odoo");
                    add("haproxy_frontend_http_requests_total", &[odoo], requests);
                    add(
                        "haproxy_backend_http_responses_total",
                        &[odoo, ("code", "4xx")],
                        at.rem_euclid(1e7) * 0.3 + 40.0 * (at / 400.0).sin(),
                    );
                    add(
                        "haproxy_backend_http_responses_total",
                        &[odoo, ("code", "5xx")],
                        (at.rem_euclid(1e7) / 3000.0).floor() * 4.0,
                    );
                    add(
                        "haproxy_backend_response_time_average_seconds",
                        &[odoo],
                        wave("response", at, 0.06 + 0.05 * busy, 0.02, 2400.0),
                    );
                }
            }
            8008 => {
                let is_primary = story.primary == name;
                let position = 5e9 + at.rem_euclid(1e6) * 1.6e5 + 6e6 * (at / 900.0).sin();
                add("patroni_primary", &[], f64::from(u8::from(is_primary)));
                add("patroni_sync_standby", &[], f64::from(u8::from(!is_primary)));
                add("patroni_postgres_running", &[], 1.0);
                add("patroni_postgres_timeline", &[], 4.0);
                add("patroni_dcs_last_seen", &[], at.floor());
                add("patroni_xlog_location", &[], if is_primary { position } else { 0.0 });
            }
            9187 => {
                add("pg_up", &[], 1.0);
                if story.primary == name {
                    for standby in with_role("db").filter(|db| db.name != name) {
                        let labels = [("application_name", standby.name.as_str()), ("state", "streaming")];
                        add("pg_stat_replication_pg_wal_lsn_diff", &labels, wave(&standby.name, at, 5e4, 6e4, 600.0));
                    }
                    add("pg_stat_archiver_last_archive_age", &[], at.rem_euclid(300.0));
                    add("pg_stat_archiver_failed_count", &[], 0.0);
                }
            }
            _ => {}
        }
        all
    }

    /// Adds the metrics of the node exporter.
    fn machine(
        &self,
        node: &Node,
        at: f64,
        story: &Story,
        add: &mut impl FnMut(&'static str, &[(&'static str, &str)], f64),
    ) {
        let (name, busy) = (node.name.as_str(), busy(at));
        add("node_load1", &[], wave(name, at, 0.25 + 0.9 * busy, 0.3, 1900.0));
        for cpu in ["0", "1"] {
            add("node_cpu_seconds_total", &[("cpu", cpu), ("mode", "idle")], at * 0.7);
        }
        add("node_memory_MemTotal_bytes", &[], 4e9);
        add("node_memory_MemAvailable_bytes", &[], 4e9 * (1.0 - wave(name, at, 0.42 + 0.1 * busy, 0.06, 5200.0)));
        let var = [("mountpoint", "/var")];
        let used = if node.has_role("db") { 0.38 } else { 0.17 };
        add("node_filesystem_size_bytes", &var, 2e10);
        add("node_filesystem_avail_bytes", &var, 2e10 * (1.0 - wave(name, at, used, 0.012, 26_000.0)));
        add("node_boot_time_seconds", &[], 1_795_000_000.0);
        add("node_time_seconds", &[], at);
        let version = story.versions.get(name).unwrap_or(&story.version);
        add(
            "node_os_info",
            &[("image_id", &format!("{}-{}", self.topology.name, node.group)), ("image_version", version)],
            1.0,
        );
        let failed = story.failed.get(name).map_or("", String::as_str);
        for unit in ["patroni.service", "haproxy.service", "odoo-http.service"] {
            let state = [("name", unit), ("state", "failed")];
            add("node_systemd_unit_state", &state, f64::from(u8::from(unit == failed)));
        }
        if node.hub > 0 {
            add("node_network_address_info", &[("device", "lo"), ("address", "127.0.0.1")], 1.0);
            if story.vip == name {
                let vip = self.topology.vip.to_string();
                add("node_network_address_info", &[("device", "lo"), ("address", &vip)], 1.0);
            }
            for metric in ["bakehouse_rollout_blocked", "bakehouse_rollout_denied", "bakehouse_rollout_skipped"] {
                add(metric, &[], 0.0);
            }
        }
        if story.primary == name {
            add("bakehouse_write_probe_success", &[], 1.0);
            add("bakehouse_write_probe_timestamp_seconds", &[], at.floor());
        }
        if node.has_role("backup") {
            add("bakehouse_backup_count", &[], 9.0);
            add("bakehouse_backup_newest_seconds", &[], (at / 86_400.0).floor() * 86_400.0 + 3600.0);
        }
    }

    /// Returns a history in the OpenMetrics format, for `promtool tsdb create-blocks-from`. `parts`: begin, end and step,
    /// in seconds before now. `story` returns what the nodes reported at a time, in seconds before now.
    #[must_use]
    pub fn history(&self, parts: &[(u32, u32, usize)], story: impl Fn(f64) -> Story) -> String {
        let end = now();
        let mut history = String::new();
        for ago in parts.iter().flat_map(|(from, to, step)| (*to..*from).rev().step_by(*step)) {
            let at = end - f64::from(ago);
            let story = story(f64::from(ago));
            for node in &self.topology.nodes {
                let ports = PORTS
                    .into_iter()
                    .filter(|(port, _, role)| *port != 9115 && role.is_none_or(|role| node.has_role(role)));
                for (port, job, _) in ports {
                    let target = format!("instance=\"{}:{port}\",job=\"{job}\",node=\"{}\"", node.address, node.name);
                    let is_up = !story.down.contains(&node.name);
                    let mut metrics = if is_up { self.metrics(node, port, at, &story) } else { Vec::new() };
                    metrics.push(("up", Vec::new(), f64::from(u8::from(is_up))));
                    history.push_str(&text(&metrics, &target, Some(at)));
                }
            }
            for (job, _, takes) in PROBES.into_iter().take(3) {
                history.push_str(&text(&probed(job, takes, at), &format!("instance=\"vip\",job=\"{job}\""), Some(at)));
            }
            if story.down.contains("hub-2") {
                let target = "alertname=\"NodeDown\",alertstate=\"firing\",node=\"hub-2\",severity=\"critical\"";
                history.push_str(&text(&[("ALERTS", Vec::new(), 1.0)], target, Some(at)));
            }
        }
        history.push_str("# EOF\n");
        history
    }
}

/// Returns the metrics of the blackbox exporter.
fn probe(path: &str, at: f64) -> Vec<Metric> {
    let module = path.split(['?', '&']).find_map(|pair| pair.strip_prefix("module=")).unwrap_or_default();
    if module == "certificate" {
        return vec![("probe_success", Vec::new(), 1.0), ("probe_ssl_earliest_cert_expiry", Vec::new(), at + 5e6)];
    }
    let (job, _, takes) = PROBES.into_iter().find(|(_, of, _)| *of == module).unwrap_or(PROBES[0]);
    probed(job, takes, at)
}

fn probed(job: &str, takes: f64, at: f64) -> Vec<Metric> {
    vec![
        ("probe_success", Vec::new(), 1.0),
        ("probe_duration_seconds", Vec::new(), wave(job, at, takes, takes * 0.2, 1300.0) + takes * 0.1),
    ]
}

/// Returns metrics as text. `target`: further labels. `at`: time of the values, for a history.
fn text(metrics: &[Metric], target: &str, at: Option<f64>) -> String {
    let mut text = String::new();
    for (name, labels, value) in metrics {
        let own = labels.iter().map(|(name, value)| format!("{name}=\"{value}\""));
        let all: Vec<String> = own.chain((!target.is_empty()).then(|| target.to_owned())).collect();
        let at = at.map(|at| format!(" {at:.3}")).unwrap_or_default();
        let _ = writeln!(text, "{name}{{{}}} {value}{at}", all.join(","));
    }
    text
}
