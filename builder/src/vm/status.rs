//! State of the fleet's local machines, from their agents, PostgreSQL, and HAProxy.

use std::collections::BTreeMap;
use std::fmt;

use fleet::{Node, Topology};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::command::{REPLY_TIMEOUT, last_line};
use super::machine::Vm;
use super::network::{HostForward, VirtualNic};
use crate::project::Project;

/// State of a fleet, which `bakehouse status` prints.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct FleetStatus {
    /// Nodes in the order of the fleet's topology.
    pub nodes: Vec<NodeRow>,
    /// HAProxy's status (`UP`, `DOWN` and others) of each Odoo server, on the hub that holds the VIP.
    pub odoo: BTreeMap<String, String>,
    /// Addresses of Odoo for a browser on this host.
    pub urls: Vec<String>,
}

/// State of one node.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct NodeRow {
    /// Name of the node.
    pub node: String,
    /// Group of the node.
    pub group: String,
    /// Roles of the node.
    pub roles: Vec<String>,
    /// Address in the mesh.
    pub address: String,
    /// State of its machine.
    pub state: MachineState,
    /// Last message of its agent.
    pub message: String,
    /// Whether the node holds the VIP.
    pub vip: bool,
    /// State of PostgreSQL, on a database node.
    pub database: Option<Database>,
}

/// State of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum MachineState {
    /// The machine is off.
    Off,
    /// The machine runs, and does not reply yet.
    Booting,
    /// The agent waits for its slot.
    Joining,
    /// The node's roles start.
    Starting,
    /// All roles are ready.
    Ready,
}

/// PostgreSQL's state on a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Database {
    /// Primary, with the standbys that replicate from it.
    Primary(Vec<Standby>),
    /// Standby.
    Standby,
}

/// A standby in the primary's `pg_stat_replication`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Standby {
    /// Name of the node.
    pub node: String,
    /// Whether commits wait for this standby (a synchronous standby).
    pub sync: bool,
    /// Bytes of WAL that the standby has not replayed.
    pub lag: u64,
}

impl FleetStatus {
    /// Reads the state of all nodes, in parallel.
    #[must_use]
    pub fn read(project: &Project) -> Self {
        let topology = &project.topology;
        let seen: Vec<(NodeRow, BTreeMap<String, String>)> = std::thread::scope(|scope| {
            let threads: Vec<_> = topology.nodes.iter().map(|node| scope.spawn(|| query(project, node))).collect();
            threads.into_iter().filter_map(|thread| thread.join().ok()).collect()
        });
        let holder = seen.iter().find(|(row, _)| row.vip).or_else(|| seen.iter().find(|(_, odoo)| !odoo.is_empty()));
        let odoo = holder.map(|(_, odoo)| odoo.clone()).unwrap_or_default();
        let served = topology.nodes.iter().any(|n| n.has_role("app"));
        let hub_forwards = topology.hubs.iter().filter(|_| served).filter_map(|hub| {
            let up = seen.iter().any(|(row, _)| row.node == hub.name && row.state != MachineState::Off);
            VirtualNic::for_node(project, hub).forward.filter(|_| up)
        });
        let urls = hub_forwards.filter_map(|forward: HostForward| forward.url()).collect();
        Self { nodes: seen.into_iter().map(|(row, _)| row).collect(), odoo, urls }
    }

    /// Returns whether the fleet is complete: every node is ready, one hub holds the VIP, all standbys replicate from
    /// the one primary, at least one of them synchronously, and HAProxy reports every Odoo server as up.
    #[must_use]
    pub fn is_healthy(&self) -> bool {
        let standbys = self.nodes.iter().filter(|n| n.database == Some(Database::Standby)).count();
        let primaries: Vec<&Vec<Standby>> = self
            .nodes
            .iter()
            .filter_map(|n| if let Some(Database::Primary(standbys)) = &n.database { Some(standbys) } else { None })
            .collect();
        let is_complete = |with: &[Standby]| with.len() == standbys && (standbys == 0 || with.iter().any(|s| s.sync));
        let replicating = matches!(primaries[..], [with] if is_complete(with));
        let databases = self.nodes.iter().any(|n| n.roles.iter().any(|r| r == "db"));
        self.nodes.iter().all(|n| n.state == MachineState::Ready)
            && self.nodes.iter().filter(|n| n.vip).count() == 1
            && (!databases || replicating)
            && self.nodes.iter().all(|n| !n.roles.iter().any(|r| r == "db") || n.database.is_some())
            && self
                .nodes
                .iter()
                .all(|n| !n.roles.iter().any(|r| r == "app") || self.odoo.get(&n.node).is_some_and(|s| s == "UP"))
    }

    /// Returns the state of a node.
    #[must_use]
    pub fn row(&self, node: &str) -> Option<&NodeRow> {
        self.nodes.iter().find(|r| r.node == node)
    }

    /// Returns the node that holds the VIP.
    #[must_use]
    pub fn holder(&self) -> Option<&str> {
        self.nodes.iter().find(|r| r.vip).map(|r| r.node.as_str())
    }

    /// Returns the node with the primary.
    #[must_use]
    pub fn primary(&self) -> Option<&str> {
        self.nodes.iter().find(|r| matches!(r.database, Some(Database::Primary(_)))).map(|r| r.node.as_str())
    }
}

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
        let rows: Vec<(&NodeRow, Vec<String>)> = self.nodes.iter().map(|row| (row, self.notes(row))).collect();
        let width = |text: &dyn Fn(&NodeRow) -> usize| rows.iter().map(|(row, _)| text(row)).max().unwrap_or(0);
        let notes = rows.iter().map(|(_, notes)| notes.join(" · ").chars().count()).max().unwrap_or(0);
        let (name, roles) = (width(&|row| row.node.len()), width(&|row| row.roles.join("+").len()));
        let address = width(&|row| row.address.len());
        let fits = |used: usize| columns.is_none_or(|columns| used + notes <= columns);
        let state = 9;
        let indent = format!("\n{}", " ".repeat(name + 1 + state + 1));
        let mut text = String::new();
        for (row, notes) in &rows {
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
            text.push_str(line.trim_end());
            text.push('\n');
        }
        for url in &self.urls {
            text.push_str(&format!("{:<12} {url}\n", "Odoo"));
        }
        text
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
            notes.push(format!("Odoo {}", server_state(status)));
        }
        if row.state != MachineState::Ready && !row.message.is_empty() {
            notes.push(row.message.clone());
        }
        notes
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

impl MachineState {
    /// Returns the name that `bakehouse status` prints.
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

/// Returns the state of a node, and Odoo's servers if the node is a hub.
fn query(project: &Project, node: &Node) -> (NodeRow, BTreeMap<String, String>) {
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
    match vm.exec_within(&status_script(&project.topology, node), REPLY_TIMEOUT) {
        Ok(done) => parse(&done.output, &mut row, &mut odoo),
        Err(_) => last_line(&vm.console()).clone_into(&mut row.message),
    }
    (row, odoo)
}

/// Returns a shell script that prints the node's state, for [`parse`].
fn status_script(topology: &Topology, node: &Node) -> String {
    const POSTGRES: &str = "\
SELECT CASE WHEN pg_is_in_recovery() THEN 'standby' ELSE 'primary' END;
SELECT 'follower', application_name, sync_state, COALESCE(pg_wal_lsn_diff(pg_current_wal_lsn(), replay_lsn), 0)::bigint
 FROM pg_stat_replication WHERE NOT pg_is_in_recovery() AND application_name <> 'pg_basebackup' ORDER BY 2;";
    let mut script = "echo agent $(firstboot status --json)\n".to_owned();
    if node.hub > 0 {
        script += &format!("ip -brief address show dev lo | grep -qw {}/32 && echo vip\n", topology.vip);
        script += &format!(
            "exec 3<>/dev/tcp/{}/8404 && printf 'GET /;csv HTTP/1.0\\r\\n\\r\\n' >&3 && \
             sed -n 's/^odoo,/server ,/p' <&3\n",
            node.address
        );
    }
    if node.has_role("db") {
        script += "cd /; setpriv --reuid=postgres --regid=postgres --clear-groups ";
        script += &format!("psql -h /run/postgresql -AtXq -F' ' postgres <<'EOF'\n{POSTGRES}\nEOF\n");
    }
    script
}

/// Reads the lines of [`status_script`]; ignores lines of other programs.
fn parse(text: &str, row: &mut NodeRow, odoo: &mut BTreeMap<String, String>) {
    #[derive(Deserialize)]
    struct Agent {
        phase: String,
        message: String,
    }
    for line in text.lines() {
        let (kind, rest) = line.split_once(' ').unwrap_or((line, ""));
        match kind {
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
            // HAProxy's CSV: the server's name is the second column, its status the 18th.
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

    fn row(node: &str, roles: &[&str], output: &str) -> (NodeRow, BTreeMap<String, String>) {
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
        parse(output, &mut row, &mut odoo);
        (row, odoo)
    }

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
        let status =
            FleetStatus { nodes: vec![row("db-1", &["db"], output).0], odoo: BTreeMap::new(), urls: Vec::new() };
        assert!(status.to_string().contains("joining   asking hub-1"), "{status}");
    }

    proptest::proptest! {
        #[test]
        fn parse_never_panics(text: String) {
            row("n", &[], &text);
        }
    }
}
