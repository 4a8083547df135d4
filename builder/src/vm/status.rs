//! The fleet at a glance: what every machine says of itself, and what the services say of each
//! other.

use std::collections::BTreeMap;
use std::fmt;

use fleet::{Node, Topology};
use serde::{Deserialize, Serialize};

use super::command::{ANSWER, last_word};
use super::machine::Vm;
use super::network::{HostForward, VirtualNic};
use crate::project::Project;

/// What `bakehouse status` prints.
#[derive(Clone, Debug, Serialize)]
pub struct FleetStatus {
    pub nodes: Vec<NodeRow>,
    /// Odoo's servers as the hub that holds the VIP sees them: name → `UP`, `DOWN` …
    pub odoo: BTreeMap<String, String>,
    /// What a browser on this host opens.
    pub urls: Vec<String>,
}

/// One machine.
#[derive(Clone, Debug, Serialize)]
pub struct NodeRow {
    pub node: String,
    pub group: String,
    pub roles: Vec<String>,
    pub address: String,
    pub state: MachineState,
    /// The last thing its agent said.
    pub message: String,
    pub vip: bool,
    pub database: Option<Database>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum MachineState {
    Off,
    /// It runs, and does not answer yet.
    Booting,
    Joining,
    Starting,
    Ready,
}

/// What PostgreSQL is on a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Database {
    /// With its standbys.
    Primary(Vec<Standby>),
    Standby,
}

/// A standby, as the primary sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Standby {
    pub node: String,
    /// A write is acknowledged only when it has it.
    pub sync: bool,
    /// Bytes of WAL it has not applied yet.
    pub lag: u64,
}

impl FleetStatus {
    /// Asks every machine that runs, all at once.
    #[must_use]
    pub fn read(project: &Project) -> Self {
        let topology = &project.topology;
        let seen: Vec<(NodeRow, BTreeMap<String, String>)> = std::thread::scope(|scope| {
            let asked: Vec<_> = topology.nodes.iter().map(|node| scope.spawn(|| look(project, node))).collect();
            asked.into_iter().filter_map(|thread| thread.join().ok()).collect()
        });
        let holder = seen.iter().find(|(row, _)| row.vip).or_else(|| seen.iter().find(|(_, odoo)| !odoo.is_empty()));
        let odoo = holder.map(|(_, odoo)| odoo.clone()).unwrap_or_default();
        let served = topology.nodes.iter().any(|n| n.has_role("app"));
        let hub_forwards = topology.hubs.iter().filter(|_| served).filter_map(|hub| {
            let up = seen.iter().any(|(row, _)| row.node == hub.name && row.state != MachineState::Off);
            VirtualNic::of(project, hub).door.filter(|_| up)
        });
        let urls = hub_forwards.filter_map(|door: HostForward| door.url()).collect();
        Self { nodes: seen.into_iter().map(|(row, _)| row).collect(), odoo, urls }
    }

    /// Nothing is missing: every node ready, one holder of the VIP, one primary, every standby
    /// with it, every Odoo up.
    #[must_use]
    pub fn is_healthy(&self) -> bool {
        let standbys = self.nodes.iter().filter(|n| n.database == Some(Database::Standby)).count();
        let followed: Vec<&Vec<Standby>> = self
            .nodes
            .iter()
            .filter_map(|n| if let Some(Database::Primary(standbys)) = &n.database { Some(standbys) } else { None })
            .collect();
        let databases = self.nodes.iter().any(|n| n.roles.iter().any(|r| r == "db"));
        self.nodes.iter().all(|n| n.state == MachineState::Ready)
            && self.nodes.iter().filter(|n| n.vip).count() == 1
            && (!databases
                || matches!(followed[..], [with] if with.len() == standbys && (standbys == 0 || with.iter().any(|s| s.sync))))
            && self.nodes.iter().all(|n| !n.roles.iter().any(|r| r == "db") || n.database.is_some())
            && self
                .nodes
                .iter()
                .all(|n| !n.roles.iter().any(|r| r == "app") || self.odoo.get(&n.node).is_some_and(|s| s == "UP"))
    }

    #[must_use]
    pub fn row(&self, node: &str) -> Option<&NodeRow> {
        self.nodes.iter().find(|r| r.node == node)
    }

    /// Who holds the VIP.
    #[must_use]
    pub fn holder(&self) -> Option<&str> {
        self.nodes.iter().find(|r| r.vip).map(|r| r.node.as_str())
    }

    /// Which node takes the writes.
    #[must_use]
    pub fn primary(&self) -> Option<&str> {
        self.nodes.iter().find(|r| matches!(r.database, Some(Database::Primary(_)))).map(|r| r.node.as_str())
    }
}

impl fmt::Display for FleetStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let standbys: Vec<&Standby> = self
            .nodes
            .iter()
            .filter_map(|n| if let Some(Database::Primary(with)) = &n.database { Some(with) } else { None })
            .flatten()
            .collect();
        for row in &self.nodes {
            let mut notes = Vec::new();
            if row.vip {
                notes.push("VIP".to_owned());
            }
            match &row.database {
                Some(Database::Primary(_)) => notes.push("primary".to_owned()),
                Some(Database::Standby) => match standbys.iter().find(|s| s.node == row.node) {
                    Some(s) => {
                        notes.push(format!("{}standby, {} behind", if s.sync { "sync " } else { "" }, bytes(s.lag)));
                    }
                    None => notes.push("standby that follows nobody".to_owned()),
                },
                None => {}
            }
            if let Some(status) = self.odoo.get(&row.node) {
                notes.push(format!("Odoo {}", status.to_lowercase()));
            }
            if row.state != MachineState::Ready && !row.message.is_empty() {
                notes.push(row.message.clone());
            }
            let roles = row.roles.join("+");
            let line = format!(
                "{:<12} {:<24} {:<15} {:<9} {}",
                row.node,
                roles,
                row.address,
                row.state.as_str(),
                notes.join(" · ")
            );
            writeln!(f, "{}", line.trim_end())?;
        }
        for url in &self.urls {
            writeln!(f, "{:<12} {url}", "Odoo")?;
        }
        Ok(())
    }
}

impl MachineState {
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Booting => "booting",
            Self::Joining => "joining",
            Self::Starting => "starting",
            Self::Ready => "ready",
        }
    }
}

fn bytes(n: u64) -> String {
    if n < 10_000 { format!("{n} B") } else { format!("{:.1} MB", n as f64 / 1e6) }
}

/// A machine's row, and Odoo's servers if it is a hub.
fn look(project: &Project, node: &Node) -> (NodeRow, BTreeMap<String, String>) {
    let vm = Vm::at(&node.name, project.dir.join("build/vm").join(&node.name));
    let mut row = NodeRow {
        node: node.name.clone(),
        group: node.group.clone(),
        roles: node.roles.clone(),
        address: node.address.to_string(),
        state: MachineState::Off,
        message: String::new(),
        vip: false,
        database: None,
    };
    let mut odoo = BTreeMap::new();
    if !vm.is_running() {
        return (row, odoo);
    }
    row.state = MachineState::Booting;
    match vm.exec_within(&question(&project.topology, node), ANSWER) {
        Ok(done) => read(&done.output, &mut row, &mut odoo),
        Err(_) => last_word(&vm.console()).clone_into(&mut row.message),
    }
    (row, odoo)
}

/// A shell script that says how the node is: lines that [`read`] reads.
fn question(topology: &Topology, node: &Node) -> String {
    const POSTGRES: &str = "\
SELECT CASE WHEN pg_is_in_recovery() THEN 'standby' ELSE 'primary' END;
SELECT 'follower', application_name, sync_state, COALESCE(pg_wal_lsn_diff(pg_current_wal_lsn(), replay_lsn), 0)::bigint
 FROM pg_stat_replication WHERE NOT pg_is_in_recovery() AND application_name <> 'pg_basebackup' ORDER BY 2;";
    let mut script = "echo agent $(firstboot status --json)\n".to_owned();
    if node.hub > 0 {
        script += &format!("ip -brief address show dev lo | grep -qw {}/32 && echo vip\n", topology.vip);
        script += &format!(
            "exec 3<>/dev/tcp/{}/8404 && printf 'GET /;csv HTTP/1.0\\r\\n\\r\\n' >&3 && sed -n 's/^odoo,/server ,/p' <&3\n",
            node.address
        );
    }
    if node.has_role("db") {
        script += "cd /; setpriv --reuid=postgres --regid=postgres --clear-groups ";
        script += &format!("psql -h /run/postgresql -AtXq -F' ' postgres <<'EOF'\n{POSTGRES}\nEOF\n");
    }
    script
}

fn read(text: &str, row: &mut NodeRow, odoo: &mut BTreeMap<String, String>) {
    #[derive(Deserialize)]
    struct Agent {
        phase: String,
        message: String,
    }
    for line in text.lines() {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        match word {
            "agent" => {
                if let Ok(agent) = serde_json::from_str::<Agent>(rest) {
                    row.message = agent.message;
                    row.state = match agent.phase.as_str() {
                        "ready" => MachineState::Ready,
                        "starting" => MachineState::Starting,
                        _ => MachineState::Joining,
                    };
                }
            }
            "vip" => row.vip = true,
            "primary" => row.database = Some(Database::Primary(Vec::new())),
            "standby" => row.database = Some(Database::Standby),
            "follower" => {
                if let (Some(Database::Primary(with)), [node, state, lag]) =
                    (&mut row.database, &rest.split(' ').collect::<Vec<_>>()[..])
                {
                    let sync = matches!(*state, "sync" | "quorum");
                    with.push(Standby { node: (*node).to_owned(), sync, lag: lag.parse().unwrap_or(0) });
                }
            }
            // HAProxy's table: proxy, server, …, status in the 18th column.
            "server" => {
                let columns: Vec<&str> = rest.split(',').collect();
                if let (Some(name), Some(status)) = (columns.get(1), columns.get(17))
                    && *name != "BACKEND"
                {
                    odoo.insert((*name).to_owned(), (*status).to_owned());
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(node: &str, roles: &[&str], answer: &str) -> (NodeRow, BTreeMap<String, String>) {
        let mut row = NodeRow {
            node: node.into(),
            group: "g".into(),
            roles: roles.iter().map(|r| (*r).to_owned()).collect(),
            address: "10.10.0.1".into(),
            state: MachineState::Booting,
            message: String::new(),
            vip: false,
            database: None,
        };
        let mut odoo = BTreeMap::new();
        read(answer, &mut row, &mut odoo);
        (row, odoo)
    }

    fn board() -> FleetStatus {
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
        }
    }

    #[test]
    fn a_whole_fleet_at_a_glance() {
        let board = board();
        assert!(board.is_healthy());
        assert_eq!((board.holder(), board.primary()), (Some("hub-1"), Some("db-1")));
        let text = board.to_string();
        for words in ["ready     VIP\n", "ready     primary\n", "sync standby, 12 B behind", "Odoo up", "https://127."]
        {
            assert!(text.contains(words), "{words}:\n{text}");
        }
    }

    #[test]
    fn anything_that_is_missing_counts() {
        let breaks: [fn(&mut FleetStatus); 6] = [
            |b| b.nodes[0].vip = false,
            |b| b.nodes[3].vip = true,
            |b| b.nodes[1].database = Some(Database::Primary(Vec::new())),
            |b| b.nodes[2].database = None,
            |b| b.odoo.clear(),
            |b| b.nodes[3].state = MachineState::Starting,
        ];
        for (i, broken) in breaks.iter().enumerate() {
            let mut board = board();
            broken(&mut board);
            assert!(!board.is_healthy(), "{i}");
        }
    }

    #[test]
    fn a_machine_that_starts_says_what_it_waits_for() {
        let answer = r#"agent {"fleet":"q","node":"","epoch":0,"phase":"joining","message":"asking hub-1"}"#;
        let board =
            FleetStatus { nodes: vec![row("db-1", &["db"], answer).0], odoo: BTreeMap::new(), urls: Vec::new() };
        assert!(board.to_string().contains("joining   asking hub-1"), "{board}");
    }

    proptest::proptest! {
        #[test]
        fn no_answer_panics(text: String) {
            row("n", &[], &text);
        }
    }
}
