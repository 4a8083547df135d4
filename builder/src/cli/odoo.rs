//! `bakehouse odoo shell`: runs Python in Odoo's shell.

use std::fs;
use std::io::{self, IsTerminal as _};
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand, ValueHint};
use fleet::node_api::{LONGEST_RUN, ODOO_SHELL_PATH, OdooShellRequest};

use super::access::{NodeContext, Reach};
use super::psql::standard_input;
use super::results::CommandResult;
use super::steer::{IDLE, output};
use super::verbs::AccessArgs;
use crate::deploy::nodes;
use crate::error::{Error, Result, fail};
use crate::vm::{FleetStatus, MachineState};

pub(super) const ODOO: &str = "\
Example:
  bakehouse odoo shell -c 'print(env[\"res.users\"].search_count([]))'";
pub(super) const SHELL: &str = "\
Examples:
  bakehouse odoo shell < script.py
  bakehouse odoo shell app-2 -f script.py
  bakehouse odoo shell -c 'print(env[\"res.users\"].search_count([]))'

The script runs in `odoo shell` as Odoo's user, with the database and the configuration of Odoo's services. `env` is
Odoo's environment, as the superuser. At the end, Odoo rolls everything back: a script that changes data calls
`env.cr.commit()`. An exception gives an exit code other than 0, and also rolls back what was not committed. There is no
terminal. It needs the role admin, and `[access] shell = true` in fleet.toml. The node's journal records the complete
script.";

#[derive(Subcommand)]
pub(super) enum OdooCommand {
    /// Run Python in Odoo's shell
    #[command(after_help = SHELL)]
    Shell(OdooShellArgs),
}

#[derive(Args)]
pub(super) struct OdooShellArgs {
    /// Name of an app node; default: the first one that works
    pub(super) node: Option<String>,
    /// Run this code
    #[arg(short, long, value_name = "CODE", conflicts_with = "file")]
    pub(super) command: Option<String>,
    /// Run the code of this file; default: standard input
    #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(super) file: Option<PathBuf>,
    /// Seconds after which the node stops the shell
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u32).range(1..=i64::from(LONGEST_RUN)))]
    pub(super) seconds: u32,
    #[command(flatten)]
    pub(super) access: AccessArgs,
}

/// Runs a script.
pub(super) fn run(context: &NodeContext, command: &OdooCommand) -> Result<CommandResult> {
    let OdooCommand::Shell(args) = command;
    let script = script(args)?;
    if script.trim().is_empty() {
        return Err(Error::Usage("there is no code to run\n  help: add `-c CODE` or `-f FILE`".to_owned()));
    }
    let reach = context.reach(&args.access)??;
    let node = match &args.node {
        Some(node) => reach.node(node)?.name.clone(),
        None => app_node(&reach)?,
    };
    let request = OdooShellRequest { script, seconds: args.seconds };
    let done = nodes::run(async {
        let body = serde_json::to_vec(&request).map_err(Error::Json)?.into();
        let lines = reach.client.connect(&node).await?.lines("POST", ODOO_SHELL_PATH, body, IDLE).await?;
        output(context, &node, lines).await
    })??;
    Ok(CommandResult::OdooShell(done))
}

fn script(args: &OdooShellArgs) -> Result<String> {
    match (&args.command, &args.file) {
        (Some(code), _) => Ok(code.clone()),
        (None, Some(path)) if path != Path::new("-") => fs::read_to_string(path).map_err(Error::io("read", path)),
        (None, None) if io::stdin().is_terminal() => Err(Error::Usage(
            "a node's shell has no terminal\n  help: add `-c CODE` or `-f FILE`, or `< FILE`".to_owned(),
        )),
        (None, _) => standard_input(),
    }
}

/// Returns the name of the first app node that is ready, and that HAProxy sends requests to.
pub(super) fn app_node(reach: &Reach) -> Result<String> {
    let of_apps = |roles: &[String]| roles.iter().any(|role| role == "app" || role == "hub");
    let nodes: Vec<_> = reach.nodes.iter().filter(|node| of_apps(&node.roles)).cloned().collect();
    if !nodes.iter().any(|node| node.roles.iter().any(|role| role == "app")) {
        return Err(Error::Usage("the fleet has no node with the role `app`, which runs Odoo".to_owned()));
    }
    let status = nodes::run(nodes::fleet_status(&reach.client, &nodes))??;
    healthy(&status).map_or_else(|| fail(format!("no node runs Odoo\n{status}")), |node| Ok(node.to_owned()))
}

fn healthy(status: &FleetStatus) -> Option<&str> {
    let is_app = |roles: &[String]| roles.iter().any(|role| role == "app");
    let ready = || status.nodes.iter().filter(|row| is_app(&row.roles) && row.state == MachineState::Ready);
    let is_up = |node: &str| status.odoo.get(node).is_some_and(|state| state.starts_with("UP"));
    let found = ready().find(|row| is_up(&row.node)).or_else(|| ready().next());
    found.map(|row| row.node.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::NodeRow;

    #[test]
    fn the_first_node_that_haproxy_uses_is_the_one() {
        let row = |node: &str, state| NodeRow {
            node: node.to_owned(),
            group: "app".to_owned(),
            roles: vec![node.split('-').next().unwrap_or_default().to_owned()],
            address: String::new(),
            state,
            message: String::new(),
            vip: false,
            database: None,
            report: None,
        };
        let rows = vec![
            row("hub-1", MachineState::Ready),
            row("app-1", MachineState::Silent),
            row("app-2", MachineState::Ready),
            row("app-3", MachineState::Ready),
        ];
        let mut status = FleetStatus { nodes: rows, ..FleetStatus::default() };
        assert_eq!(healthy(&status), Some("app-2"));
        for (node, state) in [("app-1", "UP"), ("app-2", "DOWN"), ("app-3", "UP 1/2")] {
            status.odoo.insert(node.to_owned(), state.to_owned());
        }
        assert_eq!(healthy(&status), Some("app-3"));
        status.nodes.truncate(2);
        assert_eq!(healthy(&status), None);
    }
}
