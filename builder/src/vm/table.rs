//! Tables of a fleet's state, for people.

use std::collections::BTreeSet;
use std::fmt;

use fleet::node_api::{NodeStatus, Space};

use super::status::{Database, FleetStatus, MachineState, NodeRow, Standby};

/// Times before the expiry of a certificate at which it needs attention, in seconds: that for browsers, which someone may
/// have to order, and the operator's, which `bakehouse operator add` makes.
const WEB_CERTIFICATE: u64 = 14 * 86_400;
const OWN_CERTIFICATE: u64 = 3600;

impl fmt::Display for FleetStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.table(None))
    }
}

impl FleetStatus {
    /// Returns whether no machine of the fleet runs on this host.
    #[must_use]
    pub fn is_off(&self) -> bool {
        self.nodes.iter().all(|row| row.state == MachineState::Off)
    }

    /// Returns the state of all nodes as a table. If it is wider than a terminal of `columns`, it leaves out addresses,
    /// then roles, and puts each note on a line of its own.
    #[must_use]
    pub fn table(&self, columns: Option<usize>) -> String {
        let mut text: String = self.rows(columns).iter().map(|row| format!("{row}\n")).collect();
        for url in &self.urls {
            text.push_str(&format!("{:<12} {url}\n", "Odoo"));
        }
        text
    }

    /// Returns the table's rows in the order of the nodes. In a narrow terminal, a row has several lines.
    #[must_use]
    pub fn rows(&self, columns: Option<usize>) -> Vec<String> {
        let rows: Vec<(&NodeRow, Vec<String>)> = self.nodes.iter().map(|row| (row, self.notes(row))).collect();
        let width = |text: &dyn Fn(&NodeRow) -> usize| rows.iter().map(|(row, _)| text(row)).max().unwrap_or(0);
        let notes = rows.iter().map(|(_, notes)| notes.join(" · ").chars().count()).max().unwrap_or(0);
        let (name, roles) = (width(&|row| row.node.len()), width(&|row| row.roles.join("+").len()));
        let address = width(&|row| row.address.len());
        let fits = |used: usize| columns.is_none_or(|columns| used + notes <= columns);
        let state = 9;
        let indent = format!("\n{}", " ".repeat(name + 1 + state + 1));
        let text = |(row, notes): &(&NodeRow, Vec<String>)| {
            let (all, short) = (row.roles.join("+"), row.state.as_str());
            let line = if fits(12.max(name) + 1 + 24.max(roles) + 1 + 15 + 1 + state + 1) {
                format!("{:<12} {all:<24} {:<15} {short:<9} {}", row.node, row.address, notes.join(" · "))
            } else if fits(name + 1 + roles + 1 + address + 1 + state + 1) {
                let parts = format!("{:<name$} {all:<roles$} {:<address$} {short:<9}", row.node, row.address);
                format!("{parts} {}", notes.join(" · "))
            } else if fits(name + 1 + roles + 1 + state + 1) {
                format!("{:<name$} {all:<roles$} {short:<9} {}", row.node, notes.join(" · "))
            } else if fits(name + 1 + state + 1) {
                format!("{:<name$} {short:<9} {}", row.node, notes.join(" · "))
            } else {
                format!("{:<name$} {short:<9} {}", row.node, notes.join(&indent))
            };
            line.trim_end().to_owned()
        };
        rows.iter().map(text).collect()
    }

    /// Returns load, memory, disk and uptime of all nodes as a table.
    #[must_use]
    pub fn loads(&self) -> String {
        let (head, rows) = self.load_rows();
        format!("{head}\n{}", rows.iter().map(|row| format!("{row}\n")).collect::<String>())
    }

    /// Returns the head of the table of loads, and its rows in the order of the nodes.
    #[must_use]
    pub fn load_rows(&self) -> (String, Vec<String>) {
        let width = self.nodes.iter().map(|row| row.node.len()).max().unwrap_or(0).max(12);
        let head = format!(
            "{:<width$} {:>6} {:>6} {:>6} {:>8} {:>8} {:>8}  state",
            "node", "1 min", "5 min", "15 min", "memory", "/var", "up"
        );
        let text = |row: &NodeRow| {
            let state = row.state.as_str();
            let Some(report) = &row.report else {
                let line = format!("{:<width$} {:>47}  {state} {}", row.node, "", row.message);
                return line.trim_end().to_owned();
            };
            let percent = |space: Option<&Space>| {
                space.and_then(percent_used).map_or_else(|| "?".to_owned(), |used| format!("{used} %"))
            };
            let [one, five, fifteen] = report.load;
            let (memory, disk) = (percent(Some(&report.memory)), percent(report.disks.get("/var")));
            let up = duration(report.uptime);
            let loads = format!("{one:>6.2} {five:>6.2} {fifteen:>6.2}");
            format!("{:<width$} {loads} {memory:>8} {disk:>8} {up:>8}  {state}", row.node)
        };
        (head, self.nodes.iter().map(text).collect())
    }

    /// Returns the state of the whole fleet in short parts, each with whether it needs attention.
    #[must_use]
    pub fn summary(&self) -> Vec<(String, bool)> {
        let mut parts = Vec::new();
        let all = self.nodes.len();
        let ready = self.nodes.iter().filter(|row| row.state == MachineState::Ready).count();
        let word = if all == 1 { "node" } else { "nodes" };
        parts.push(if ready == all {
            (format!("{all} {word} ready"), false)
        } else {
            (format!("{ready} of {all} {word} ready"), true)
        });
        let has = |role: &str| self.nodes.iter().any(|row| row.roles.iter().any(|r| r == role));
        if has("hub") {
            let holders: Vec<&str> = self.nodes.iter().filter(|row| row.vip).map(|row| row.node.as_str()).collect();
            parts.push(match &holders[..] {
                [] => ("no VIP".to_owned(), true),
                [one] => (format!("VIP {one}"), false),
                several => (format!("VIP {}", several.join(" and ")), true),
            });
        }
        if has("db") {
            let primaries = self.nodes.iter().filter_map(|row| match &row.database {
                Some(Database::Primary(standbys)) => Some((row.node.as_str(), standbys)),
                _ => None,
            });
            let primaries: Vec<(&str, &Vec<Standby>)> = primaries.collect();
            match &primaries[..] {
                [] => parts.push(("no primary".to_owned(), true)),
                [(node, standbys)] => {
                    parts.push((format!("primary {node}"), false));
                    let databases = self.nodes.iter().filter(|row| row.roles.iter().any(|role| role == "db")).count();
                    if let Some(lag) = standbys.iter().map(|standby| standby.lag).max() {
                        parts.push((format!("lag {}", bytes(lag)), false));
                    }
                    if databases > 1 && !standbys.iter().any(|standby| standby.sync) {
                        parts.push(("no sync standby".to_owned(), true));
                    }
                }
                several => {
                    let names: Vec<&str> = several.iter().map(|(node, _)| *node).collect();
                    parts.push((format!("primaries {}", names.join(" and ")), true));
                }
            }
        }
        if !self.odoo.is_empty() {
            let up = self.odoo.values().filter(|state| *state == "UP").count();
            let is_down = |(node, state): (&String, &String)| state != "UP" && !self.is_drained(node);
            parts.push((format!("Odoo {up} of {} up", self.odoo.len()), self.odoo.iter().any(is_down)));
            // HAProxy asks a page that needs no database.
            if up > 0 && self.login_fails() {
                parts.push(("login fails".to_owned(), true));
            }
        }
        let drained: Vec<&str> =
            self.nodes.iter().filter(|row| row.drained().is_some()).map(|row| row.node.as_str()).collect();
        match &drained[..] {
            [] => {}
            [one] => parts.push((format!("{one} is drained"), true)),
            several => parts.push((format!("{} nodes are drained", several.len()), true)),
        }
        let images: BTreeSet<&str> =
            self.nodes.iter().filter_map(|row| Some(row.report.as_ref()?.image.as_str())).collect();
        let images: Vec<&str> = images.into_iter().filter(|image| !image.is_empty()).collect();
        match &images[..] {
            [] => {}
            [one] => parts.push((format!("version {one}"), false)),
            several => parts.push((format!("versions {}", several.join(", ")), false)),
        }
        parts
    }

    /// Returns the ages of backups and certificates at the time `now` in short parts, each with whether it needs
    /// attention.
    #[must_use]
    pub fn ages(&self, now: u64) -> Vec<(String, bool)> {
        let ago = |at: u64| duration(now.saturating_sub(at));
        let left = |at: u64| duration(at.saturating_sub(now));
        let mut parts = Vec::new();
        if let Some(facts) = &self.monitor {
            match (facts.backup, facts.backups) {
                (_, Some(0)) => parts.push(("no backup".to_owned(), true)),
                (Some(at), _) => parts.push((format!("backup {} ago", ago(at)), false)),
                (None, _) => {}
            }
            parts.extend(facts.archived.map(|at| (format!("WAL archived {} ago", ago(at)), false)));
            let web = |at: u64| (format!("web certificate {} left", left(at)), at < now + WEB_CERTIFICATE);
            parts.extend(facts.web_certificate.map(web));
        }
        let own = |at: u64| (format!("your certificate {} left", left(at)), at < now + OWN_CERTIFICATE);
        parts.extend(self.certificate_expires.map(own));
        parts
    }

    /// Returns what the table says about a node beside its state.
    fn notes(&self, row: &NodeRow) -> Vec<String> {
        let standbys: Vec<&Standby> = self
            .nodes
            .iter()
            .filter_map(|n| if let Some(Database::Primary(with)) = &n.database { Some(with) } else { None })
            .flatten()
            .collect();
        let mut notes = Vec::new();
        if row.drained().is_some() {
            notes.push("drained".to_owned());
        }
        if row.vip {
            notes.push("VIP".to_owned());
        }
        match &row.database {
            Some(Database::Primary(_)) => notes.push("primary".to_owned()),
            Some(Database::Standby) => match standbys.iter().find(|s| s.node == row.node) {
                Some(s) => {
                    notes.push(format!("{}standby, {} behind", if s.sync { "sync " } else { "" }, bytes(s.lag)));
                }
                None => notes.push("standby, not replicating".to_owned()),
            },
            None => {}
        }
        // HAProxy needs some seconds to notice that a machine is off.
        if let Some(status) = self.odoo.get(&row.node).filter(|_| row.state != MachineState::Off) {
            let login = if status == "UP" && self.login_fails() { ", login fails" } else { "" };
            notes.push(format!("Odoo {}{login}", server_state(status)));
        }
        if row.state != MachineState::Ready && !row.message.is_empty() {
            notes.push(row.message.clone());
        }
        if let Some(report) = &row.report {
            notes.extend(report_notes(report));
            // Local machines have no time server.
            if !report.clock_synchronized && self.urls.is_empty() {
                notes.push("clock not synchronized".to_owned());
            }
        }
        notes
    }
}

/// Returns what a node's own report says beside its state.
fn report_notes(report: &NodeStatus) -> Vec<String> {
    let mut notes = Vec::new();
    if !report.image.is_empty() {
        notes.push(format!("version {}", report.image));
    }
    if let Some(used) = report.disks.get("/var").and_then(percent_used) {
        notes.push(format!("/var {used} %"));
    }
    if let Some(used) = percent_used(&report.memory) {
        notes.push(format!("memory {used} %"));
    }
    if !report.failed.is_empty() {
        notes.push(format!("failed: {}", report.failed.join(", ")));
    }
    notes
}

/// Returns the used part in percent, rounded up; `None` if the size is unknown.
fn percent_used(space: &Space) -> Option<u64> {
    let used = space.total.saturating_sub(space.available);
    (space.total > 0).then(|| used.saturating_mul(100).div_ceil(space.total))
}

/// Returns a duration with its largest unit: `45 s`, `12 min`, `5 h`, `3 d`.
pub(crate) fn duration(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// Returns HAProxy's status of a server in words. `UP 1/2`: one more failed check, and the server is down.
fn server_state(status: &str) -> String {
    match status.split_once(' ') {
        Some(("UP", _)) => "going down".to_owned(),
        Some(("DOWN", _)) => "coming up".to_owned(),
        _ => status.to_lowercase(),
    }
}

fn bytes(n: u64) -> String {
    if n < 10_000 { format!("{n} B") } else { format!("{:.1} MB", n as f64 / 1e6) }
}

#[cfg(test)]
mod tests {
    use super::super::query::tests::row;
    use super::super::status::MonitorFacts;
    use super::*;
    use std::collections::BTreeMap;

    fn healthy_fleet() -> FleetStatus {
        let ready = r#"agent {"fleet":"q","node":"n","epoch":1,"phase":"ready","message":"ready (n)"}"#;
        let servers = "server ,app-1,0,0,0,1,,0,0,0,,0,,0,0,0,0,UP,1\nserver ,BACKEND,0,0,0,1,,0,0,0,,0,,0,0,0,0,UP,1";
        let hub = row("hub-1", &["hub"], &format!("{ready}\nvip\n{servers}\n"));
        let db = row("db-1", &["db"], &format!("{ready}\nprimary\nfollower db-2 sync 12\n"));
        let standby = row("db-2", &["db"], &format!("{ready}\nstandby\n"));
        let app = row("app-1", &["app"], ready);
        FleetStatus {
            nodes: vec![hub.0, db.0, standby.0, app.0],
            odoo: hub.1,
            urls: vec!["https://127.1.1.1:8443/".into()],
            ..FleetStatus::default()
        }
    }

    #[test]
    fn shows_vip_primary_standbys_and_odoo() {
        let status = healthy_fleet();
        assert!(status.is_healthy());
        assert_eq!((status.holder(), status.primary()), (Some("hub-1"), Some("db-1")));
        let text = status.to_string();
        for part in ["ready     VIP\n", "ready     primary\n", "sync standby, 12 B behind", "Odoo up", "https://127."] {
            assert!(text.contains(part), "{part}:\n{text}");
        }
    }

    #[test]
    fn odoo_that_answers_without_its_database_is_not_just_up() {
        let of = |login, state: &str| {
            let mut status = healthy_fleet();
            status.odoo.insert("app-1".to_owned(), state.to_owned());
            status.monitor = Some(MonitorFacts { login, ..MonitorFacts::default() });
            let bad = status.summary().into_iter().any(|part| part == ("login fails".to_owned(), true));
            let text = status.to_string();
            let note = text.lines().find(|line| line.starts_with("app-1")).unwrap();
            (note.split("Odoo ").nth(1).unwrap().trim().to_owned(), bad)
        };
        assert_eq!(of(None, "UP"), ("up".to_owned(), false));
        assert_eq!(of(Some(true), "UP"), ("up".to_owned(), false));
        assert_eq!(of(Some(false), "UP"), ("up, login fails".to_owned(), true));
        assert_eq!(of(Some(false), "DOWN"), ("down".to_owned(), false));
    }

    #[test]
    fn shows_no_odoo_on_a_machine_that_is_off() {
        let mut status = healthy_fleet();
        status.odoo.insert("app-1".to_owned(), "UP 1/2".to_owned());
        assert!(status.to_string().contains("Odoo going down"), "{status}");
        status.nodes[3].state = MachineState::Off;
        status.nodes[3].message.clear();
        let text = status.to_string();
        let line = text.lines().find(|line| line.starts_with("app-1")).unwrap();
        assert!(line.ends_with(" off"), "{text}");
        assert!(!status.is_off());
        status.nodes.iter_mut().for_each(|row| row.state = MachineState::Off);
        assert!(status.is_off());
        assert_eq!((server_state("DOWN 1/2"), server_state("DOWN")), ("coming up".to_owned(), "down".to_owned()));
    }

    #[test]
    fn ages_of_backups_and_certificates_need_attention_in_time() {
        let now = 1_796_000_000;
        let facts = MonitorFacts {
            monitor: "monitor-1".to_owned(),
            backup: Some(now - 7200),
            backups: Some(3),
            archived: Some(now - 30),
            web_certificate: Some(now + 10 * 86_400),
            login: None,
        };
        let status =
            |monitor| FleetStatus { monitor, certificate_expires: Some(now + 86_400), ..FleetStatus::default() };
        let parts = |monitor| {
            let ages = status(monitor).ages(now);
            ages.into_iter().map(|(text, bad)| text + if bad { "!" } else { "" }).collect::<Vec<_>>().join(", ")
        };
        assert_eq!(
            parts(Some(facts.clone())),
            "backup 2 h ago, WAL archived 30 s ago, web certificate 10 d left!, your certificate 24 h left"
        );
        assert_eq!(
            parts(Some(MonitorFacts { backups: Some(0), backup: None, ..MonitorFacts::default() })),
            "no backup!, your certificate 24 h left"
        );
        assert_eq!(parts(None), "your certificate 24 h left");
    }

    #[test]
    fn fits_terminals_of_48_and_100_columns() {
        let mut status = healthy_fleet();
        status.nodes[0].roles = ["voter", "hub", "update"].map(str::to_owned).to_vec();
        status.odoo.insert("db-2".to_owned(), "UP 1/2".to_owned());
        for columns in [48, 60, 100] {
            let text = status.table(Some(columns));
            assert!(text.lines().all(|line| line.chars().count() <= columns), "{columns}:\n{text}");
            for part in ["hub-1", "ready", "VIP", "primary", "sync standby, 12 B behind", "Odoo going down"] {
                assert!(text.contains(part), "{part} at {columns}:\n{text}");
            }
        }
        assert!(status.table(Some(100)).contains("10.10.0.1") && !status.table(Some(48)).contains("10.10.0.1"));
    }

    #[test]
    fn summary_marks_what_needs_attention() {
        let mut status = healthy_fleet();
        let text = |status: &FleetStatus| {
            let parts = status.summary().into_iter();
            parts.map(|(text, bad)| if bad { format!("!{text}") } else { text }).collect::<Vec<_>>().join(" · ")
        };
        assert_eq!(text(&status), "4 nodes ready · VIP hub-1 · primary db-1 · lag 12 B · Odoo 1 of 1 up");
        status.nodes[3].state = MachineState::Silent;
        status.odoo.insert("app-1".to_owned(), "DOWN".to_owned());
        status.nodes[2].vip = true;
        status.nodes[1].database = Some(Database::Primary(Vec::new()));
        let bad = "!3 of 4 nodes ready · !VIP hub-1 and db-2 · primary db-1 · !no sync standby · !Odoo 0 of 1 up";
        assert_eq!(text(&status), bad);
        status.nodes[2].database = Some(Database::Primary(Vec::new()));
        status.nodes.iter_mut().for_each(|row| row.vip = false);
        let report = |image: &str| Some(NodeStatus { image: image.to_owned(), ..NodeStatus::default() });
        (status.nodes[0].report, status.nodes[1].report) = (report("6"), report("7"));
        let bad = "!3 of 4 nodes ready · !no VIP · !primaries db-1 and db-2 · !Odoo 0 of 1 up · versions 6, 7";
        assert_eq!(text(&status), bad);
    }

    #[test]
    fn a_drained_node_is_named_and_its_odoo_is_not_missing() {
        let mut status = healthy_fleet();
        status.odoo.insert("app-1".to_owned(), "DOWN".to_owned());
        assert!(!status.is_healthy());
        status.nodes[3].report = Some(NodeStatus { drained: Some(7), ..NodeStatus::default() });
        assert!(status.is_healthy());
        let text = status.to_string();
        assert!(text.contains("ready     drained · Odoo down"), "{text}");
        let parts = status.summary();
        assert!(parts.contains(&("Odoo 0 of 1 up".to_owned(), false)), "{parts:?}");
        assert!(parts.contains(&("app-1 is drained".to_owned(), true)), "{parts:?}");
        let json = serde_json::to_value(&status.nodes[3]).unwrap();
        assert_eq!(json["report"]["drained"], 7);
        status.nodes[3].report = Some(NodeStatus::default());
        assert!(serde_json::to_value(&status.nodes[3]).unwrap()["report"].get("drained").is_none());
    }

    #[test]
    fn a_fleet_with_one_fault_is_not_healthy() {
        let faults: [fn(&mut FleetStatus); 6] = [
            |s| s.nodes[0].vip = false,
            |s| s.nodes[3].vip = true,
            |s| s.nodes[1].database = Some(Database::Primary(Vec::new())),
            |s| s.nodes[2].database = None,
            |s| s.odoo.clear(),
            |s| s.nodes[3].state = MachineState::Starting,
        ];
        for (i, inject) in faults.iter().enumerate() {
            let mut status = healthy_fleet();
            inject(&mut status);
            assert!(!status.is_healthy(), "{i}");
        }
    }

    #[test]
    fn shows_the_agents_message_until_a_node_is_ready() {
        let output = r#"agent {"fleet":"q","node":"","epoch":0,"phase":"joining","message":"asking hub-1"}"#;
        let status = FleetStatus { nodes: vec![row("db-1", &["db"], output).0], ..FleetStatus::default() };
        assert!(status.to_string().contains("joining   asking hub-1"), "{status}");
    }

    #[test]
    fn notes_have_version_disk_memory_failures_and_clock() {
        let mut status = healthy_fleet();
        status.urls.clear();
        let space = |total, available| Space { total, available };
        status.nodes[3].report = Some(NodeStatus {
            image: "12".into(),
            load: [0.5, 1.25, 10.0],
            uptime: 7300,
            memory: space(1000, 590),
            disks: BTreeMap::from([("/var".into(), space(200, 19))]),
            failed: vec!["odoo.service".into()],
            ..NodeStatus::default()
        });
        let text = status.to_string();
        let notes = "Odoo up · version 12 · /var 91 % · memory 41 % · failed: odoo.service · clock not synchronized\n";
        assert!(text.contains(notes), "{text}");
        let narrow = status.table(Some(48));
        assert!(narrow.lines().all(|line| line.chars().count() <= 48), "{narrow}");
        let loads = status.loads();
        let line = loads.lines().find(|line| line.starts_with("app-1")).unwrap();
        let words: Vec<&str> = line.split_whitespace().collect();
        assert_eq!(words, ["app-1", "0.50", "1.25", "10.00", "41", "%", "91", "%", "2", "h", "ready"], "{loads}");
        assert_eq!((duration(59), duration(600), duration(200_000)), ("59 s".into(), "10 min".into(), "2 d".into()));
        assert_eq!(percent_used(&space(0, 0)), None);
    }

    #[test]
    fn table_of_1000_nodes_is_fast() {
        let mut status = healthy_fleet();
        let row = status.nodes[3].clone();
        status.nodes.extend((2..1000).map(|n| NodeRow { node: format!("app-{n}"), ..row.clone() }));
        let started = std::time::Instant::now();
        assert_eq!(status.table(Some(80)).lines().count(), 1003);
        assert!(started.elapsed() < std::time::Duration::from_secs(1), "{:?}", started.elapsed());
    }
}
