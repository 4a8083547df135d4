//! State of local machines, from their agents, PostgreSQL, and HAProxy, through the machines' ports for commands.

use std::collections::BTreeMap;

use fleet::{Node, Topology};
use serde::Deserialize;

use super::command::{REPLY_TIMEOUT, last_line};
use super::machine::Vm;
use super::status::{Database, MachineState, NodeRow, SeenNode, Standby};
use crate::project::Project;

/// Returns the state of these local machines. Asks them in parallel.
#[must_use]
pub fn seen(project: &Project, names: &[&str]) -> Vec<SeenNode> {
    let nodes = project.topology.nodes.iter().filter(|node| names.contains(&node.name.as_str()));
    std::thread::scope(|scope| {
        let threads: Vec<_> = nodes.map(|node| scope.spawn(|| query(project, node))).collect();
        threads.into_iter().filter_map(|thread| thread.join().ok()).collect()
    })
}

/// Returns the names of the nodes whose local machines run.
#[must_use]
pub fn running(project: &Project) -> Vec<&str> {
    let vm = |node: &Node| Vm::at(&node.name, project.dir.join("build/vm").join(&node.name));
    project.topology.nodes.iter().filter(|node| vm(node).is_running()).map(|node| node.name.as_str()).collect()
}

/// Returns whether a local machine of the fleet was ever started on this host.
#[must_use]
pub fn were_started(project: &Project) -> bool {
    project.topology.nodes.iter().any(|node| project.dir.join("build/vm").join(&node.name).is_dir())
}

/// Returns the state of a node, and Odoo's servers if the node is a hub.
fn query(project: &Project, node: &Node) -> SeenNode {
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
        report: None,
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
                    row.state = MachineState::from_phase(&agent.phase);
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
pub(super) mod tests {
    use super::*;

    /// Returns the state of a ready machine whose script printed `output`.
    pub(crate) fn row(node: &str, roles: &[&str], output: &str) -> SeenNode {
        let mut row = NodeRow {
            node: node.into(),
            group: "g".into(),
            roles: roles.iter().map(|r| (*r).to_owned()).collect(),
            address: "10.10.0.1".into(),
            state: MachineState::Booting,
            message: String::new(),
            vip: false,
            database: None,
            report: None,
        };
        let mut odoo = BTreeMap::new();
        parse(output, &mut row, &mut odoo);
        (row, odoo)
    }

    proptest::proptest! {
        #[test]
        fn parse_never_panics(text: String) {
            row("n", &[], &text);
        }
    }
}
