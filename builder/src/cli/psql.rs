//! `bakehouse psql`: runs SQL on the primary.

use std::fs;
use std::io::{self, IsTerminal as _, Read as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use clap::{Args, ValueHint};
use fleet::node_api::{ExecEvent, LONGEST_RUN, LONGEST_SCRIPT, SQL_PATH, SQL_READER, SQL_WRITER, SqlRequest};
use fleet::one_line;
use fleet::postgres::Messages;
use schemars::JsonSchema;
use serde::Serialize;

use super::access::{NodeContext, Reach};
use super::open_postgres;
use super::output::print;
use super::results::CommandResult;
use super::sql_rows::{RowFormat, Rows, StatementResult, error_text};
use super::verbs::AccessArgs;
use crate::deploy::nodes::{self, NodeLines};
use crate::error::{Error, Result, fail};

pub(super) const PSQL: &str = "\
Examples:
  bakehouse psql -c 'select count(*) from res_users'
  bakehouse psql db-2 -o csv -c 'select * from pg_stat_activity' > sessions.csv
  bakehouse psql --write -f fix.sql
  bakehouse psql

Without --write, the SQL runs as a PostgreSQL user that may read every table and write none. With --write, it has the
rights of `odoo`, the user that owns Odoo's database. Neither is a superuser. Several statements are one transaction:
if one of them fails, PostgreSQL undoes all. SQL that waits longer than 10 s for a lock fails. After Ctrl-C, and when
the connection ends, the node cancels the SQL.

Without -c and -f, and without input, the command starts this host's psql, if it has one: `bakehouse open postgres`.
It needs the role admin, and `[access] sql = true` in fleet.toml. The node's journal records the complete SQL.";

/// Longest time between two lines of the reply. Nodes send an empty line at least every 20 s.
const IDLE: Duration = Duration::from_secs(60);
/// Longest message of PostgreSQL, in bytes. A row is one message.
const LONGEST_MESSAGE: usize = 256 << 20;
/// Name that stands for standard input.
const STDIN: &str = "-";

#[derive(Args)]
pub(super) struct PsqlArgs {
    /// Name of a database node; default: the one with the primary
    #[arg(value_name = "NODE")]
    pub(super) node: Option<String>,
    /// Run this SQL
    #[arg(short, long, value_name = "SQL", conflicts_with = "file")]
    pub(super) command: Option<String>,
    /// Run the SQL of this file; `-` for standard input
    #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(super) file: Option<PathBuf>,
    /// Run it with the rights of Odoo's database user, which may write
    #[arg(long)]
    pub(super) write: bool,
    /// Name of the database; default: Odoo's
    #[arg(long, value_name = "NAME")]
    pub(super) database: Option<String>,
    /// Format of rows
    #[arg(short = 'o', long, value_enum, default_value_t = RowFormat::Table)]
    pub(super) format: RowFormat,
    /// Seconds after which the node cancels the SQL
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u32).range(1..=i64::from(LONGEST_RUN)))]
    pub(super) seconds: u32,
    #[command(flatten)]
    pub(super) access: AccessArgs,
}

/// Result of `psql`.
#[derive(Serialize, JsonSchema)]
pub(super) struct PsqlResult {
    /// Name of the node.
    pub(super) node: String,
    /// PostgreSQL user that ran the SQL.
    pub(super) user: String,
    /// Results of the statements.
    pub(super) statements: Vec<StatementResult>,
    /// Exit code of this host's psql.
    #[serde(skip)]
    pub(super) status: i32,
}

/// Runs SQL, or this host's psql.
pub(super) fn psql(context: &NodeContext, args: &PsqlArgs) -> Result<CommandResult> {
    let Some(sql) = text(args)? else { return open_postgres::psql(context, args) };
    if sql.trim().is_empty() {
        return Err(Error::Usage("there is no SQL to run\n  help: add `-c SQL` or `-f FILE`".to_owned()));
    }
    let reach = context.reach(&args.access)??;
    let node = database_node(&reach, named(args))?;
    let (database, write) = (args.database.clone(), args.write);
    let request = SqlRequest { sql, database, write, seconds: args.seconds };
    let format = (!context.output.json).then_some(args.format);
    let mut rows = Rows::new(format, io::stdout().is_terminal());
    nodes::run(async {
        let body = serde_json::to_vec(&request).map_err(Error::Json)?.into();
        let lines = reach.client.connect(&node).await?.lines("POST", SQL_PATH, body, IDLE).await?;
        receive(context, &node, lines, &mut rows).await
    })??;
    if let Some(error) = &rows.error {
        return fail(error_text(&node, error, write));
    }
    let user = if write { SQL_WRITER } else { SQL_READER }.to_owned();
    Ok(CommandResult::Psql(PsqlResult { node, user, statements: rows.statements, status: 0 }))
}

/// Returns the node that the command line names.
pub(super) fn named(args: &PsqlArgs) -> Option<&str> {
    args.node.as_deref().filter(|node| *node != STDIN)
}

/// Returns the name of a database node: this one, or the one with the primary.
pub(super) fn database_node(reach: &Reach, named: Option<&str>) -> Result<String> {
    match named {
        Some(node) => Ok(reach.node(node)?.name.clone()),
        None => primary(reach),
    }
}

/// Returns the name of the node with the primary.
pub(super) fn primary(reach: &Reach) -> Result<String> {
    let databases: Vec<_> = reach.nodes.iter().filter(|n| n.roles.iter().any(|role| role == "db")).cloned().collect();
    let status = nodes::run(nodes::fleet_status(&reach.client, &databases))??;
    match status.primary() {
        Some(primary) => Ok(primary.to_owned()),
        None => fail(format!("no node reports the primary\n{status}")),
    }
}

/// Returns the SQL; `None` if the command line has none and standard input is a terminal.
fn text(args: &PsqlArgs) -> Result<Option<String>> {
    let is_stdin = args.node.as_deref() == Some(STDIN);
    match (&args.command, &args.file) {
        (Some(sql), _) => Ok(Some(sql.clone())),
        (None, Some(path)) if path != Path::new(STDIN) => {
            fs::read_to_string(path).map(Some).map_err(Error::io("read", path))
        }
        (None, None) if !is_stdin && io::stdin().is_terminal() => Ok(None),
        (None, _) => standard_input().map(Some),
    }
}

/// Reads standard input, up to the longest text that a node takes.
pub(super) fn standard_input() -> Result<String> {
    let mut text = String::new();
    let limit = LONGEST_SCRIPT as u64 + 1;
    io::stdin().take(limit).read_to_string(&mut text).map_err(Error::io("read", "standard input"))?;
    if text.len() > LONGEST_SCRIPT {
        return Err(Error::Usage(format!("standard input has more than {LONGEST_SCRIPT} bytes")));
    }
    Ok(text)
}

/// Receives and prints PostgreSQL's messages until their end.
async fn receive(context: &NodeContext<'_>, node: &str, mut lines: NodeLines, rows: &mut Rows) -> Result<()> {
    let invalid = || format!("read the reply of {node}");
    let mut messages = Messages::new(LONGEST_MESSAGE);
    while let Some(line) = lines.next().await? {
        let bytes = match serde_json::from_slice(&line).map_err(Error::cannot(invalid()))? {
            ExecEvent::Stdout(text) => BASE64.decode(text).map_err(Error::cannot(invalid()))?,
            ExecEvent::Exit(_) => return Ok(()),
            // The session may have ended with an error, which is the better text.
            ExecEvent::Failed(_) if rows.error.is_some() => return Ok(()),
            ExecEvent::Failed(why) => return fail(format!("{node}: {}", one_line(&why))),
            ExecEvent::Stderr(_) | ExecEvent::Unknown => continue,
        };
        messages.feed(&bytes);
        let mut text = String::new();
        for message in messages.take().map_err(Error::Failed)? {
            text += &rows.take(&message)?;
        }
        if !text.is_empty() {
            print(text)?;
        }
        for notice in rows.notices.drain(..) {
            context.progress.say("psql", &notice);
        }
    }
    fail(format!("the connection to {node} ended before the SQL: the node cancels it"))
}
