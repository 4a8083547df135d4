//! `bakehouse backup`: makes a backup now.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::{Args, Subcommand};
use fleet::BACKUP;
use fleet::node_api::{BACKUP_PATH, BackupRequest, BackupStatus, JournalLine, JournalQuery};
use schemars::JsonSchema;
use serde::Serialize;
use tokio::time::sleep;

use super::access::{NodeContext, Reach};
use super::results::CommandResult;
use super::rows::duration;
use super::verbs::AccessArgs;
use crate::deploy::nodes::{self, Logs};
use crate::error::{Error, Result, fail};
use crate::keys::operator::KnownNode;
use crate::util::terminal::visible;
use crate::util::time::rfc3339_millis;

pub(super) const BACKUP_HELP: &str = "\
Example:
  bakehouse backup now";

/// Time limit of a request.
const LIMIT: Duration = Duration::from_secs(10);
/// Longest reply, in bytes.
const LONGEST: usize = 64 << 10;
/// Time between two questions about a backup.
const POLL: Duration = Duration::from_secs(1);
/// Longest time without an answer of the node.
const SILENT: Duration = Duration::from_secs(120);
/// Number of messages of a failed backup.
const LINES: u32 = 20;

#[derive(Subcommand)]
pub(super) enum BackupCommand {
    /// Make a backup of the database, and wait until it has ended
    #[command(after_help = "Examples:\n  bakehouse backup now\n  bakehouse backup now --full --json\n\n\
        After Ctrl-C, the backup continues on its node, and the same command waits for it again. If it fails, the\n\
        command prints the last messages of its journal, and exits with 1. It needs the role operator.")]
    Now(BackupNowArgs),
}

#[derive(Args)]
pub(super) struct BackupNowArgs {
    /// Name of a node; default: the one that keeps the backups, or with S3 the one with the primary
    pub(super) node: Option<String>,
    /// Make a full backup instead of the changes since the last one
    #[arg(long)]
    pub(super) full: bool,
    #[command(flatten)]
    pub(super) access: AccessArgs,
}

/// Result of `backup now`.
#[derive(Serialize, JsonSchema)]
pub(super) struct BackupNowResult {
    /// Name of the node that made the backup.
    pub(super) node: String,
    /// The backup.
    #[serde(flatten)]
    pub(super) backup: BackupStatus,
    /// Whether the backup is complete.
    pub(super) done: bool,
    /// Last messages of a backup that failed.
    pub(super) lines: Vec<JournalLine>,
}

/// Runs `bakehouse backup`.
pub(super) fn run(context: &NodeContext, command: &BackupCommand) -> Result<CommandResult> {
    let BackupCommand::Now(args) = command;
    let reach = context.reach(&args.access)??;
    let node = match &args.node {
        Some(node) => reach.node(node)?.name.clone(),
        None => default_node(&reach)?,
    };
    let step = context.progress.step("backup", &format!("{node} makes a backup"));
    let backup = nodes::run(make(&reach, &node, args.full))??;
    drop(step);
    let done = backup.result == "success";
    let lines = if done { Vec::new() } else { last_lines(context, &reach, &node, &backup) };
    if done {
        context.progress.say("backup", &format!("{node}: the backup is complete{}", took(&backup)));
    }
    Ok(CommandResult::BackupNow(BackupNowResult { node, backup, done, lines }))
}

/// Returns the node that makes the fleet's backups.
fn default_node(reach: &Reach) -> Result<String> {
    if let Some(keeper) = keeper(&reach.nodes) {
        return Ok(keeper.to_owned());
    }
    // With S3, the node with the primary makes them.
    let has_database = |node: &&KnownNode| node.roles.iter().any(|role| role == "db");
    let databases: Vec<KnownNode> = reach.nodes.iter().filter(has_database).cloned().collect();
    let status = nodes::run(nodes::fleet_status(&reach.client, &databases))??;
    match status.primary() {
        Some(primary) => Ok(primary.to_owned()),
        None => fail(format!("no node reports the primary, which makes the backups\n{status}")),
    }
}

/// Returns the name of the node that keeps the backups; `None` with S3.
fn keeper(nodes: &[KnownNode]) -> Option<&str> {
    nodes.iter().find(|node| node.roles.iter().any(|role| role == BACKUP)).map(|node| node.name.as_str())
}

/// Starts a backup, and waits until it has ended.
async fn make(reach: &Reach, node: &str, full: bool) -> Result<BackupStatus> {
    let client = &reach.client;
    let begun: BackupStatus = client.post(node, BACKUP_PATH, &BackupRequest { full }, LIMIT).await?;
    let mut answered = Instant::now();
    let mut last = begun.clone();
    while last.running {
        sleep(POLL).await;
        match client.get::<Vec<BackupStatus>>(node, BACKUP_PATH, LONGEST, LIMIT).await {
            Ok(all) => {
                answered = Instant::now();
                last = same_run(&begun, all)
                    .ok_or_else(|| unknown(node, "its node has rebooted, or another one followed"))?;
            }
            // A hub or the node's agent may restart meanwhile, and the backup continues.
            Err(e) if answered.elapsed() > SILENT => return Err(unknown(node, &e.chain())),
            Err(_) => {}
        }
    }
    Ok(last)
}

/// Returns the state of a run that has begun; `None` if the node does not know it any more.
fn same_run(begun: &BackupStatus, all: Vec<BackupStatus>) -> Option<BackupStatus> {
    all.into_iter().find(|backup| backup.unit == begun.unit && backup.run == begun.run)
}

fn unknown(node: &str, why: &str) -> Error {
    Error::Failed(format!(
        "the result of the backup is unknown: {why}\n  help: `bakehouse logs {node} --since 1h --grep pgbackrest`"
    ))
}

/// Returns the last messages of a run.
fn last_lines(context: &NodeContext, reach: &Reach, node: &str, backup: &BackupStatus) -> Vec<JournalLine> {
    let query = JournalQuery {
        unit: Some(backup.unit.clone()),
        lines: Some(LINES),
        since: backup.started,
        ..JournalQuery::default()
    };
    let (names, mut lines) = ([node.to_owned()], Vec::new());
    let logs =
        Logs { client: &reach.client, nodes: &names, query: &query, kept_by: None, on_break: Arc::new(|_, _| {}) };
    let read = nodes::run(logs.merged(|of| {
        lines.push(of.line);
        Ok(())
    }));
    let failed = match read {
        Ok(Ok(incomplete)) => incomplete.into_iter().next().map(|(_, e)| e),
        Ok(Err(e)) | Err(e) => Some(e),
    };
    if let Some(e) = failed {
        context.warn_that("backup", format!("the journal of {node} is incomplete: {}", e.chain()));
    }
    lines
}

/// Returns how long a backup took.
fn took(backup: &BackupStatus) -> String {
    match (backup.started, backup.ended) {
        (Some(started), Some(ended)) => format!(" after {}", duration(ended.saturating_sub(started))),
        _ => String::new(),
    }
}

impl fmt::Display for BackupNowResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.done {
            return Ok(());
        }
        for line in &self.lines {
            writeln!(f, "{} {}: {}", rfc3339_millis(line.at), visible(&line.unit), visible(&line.message))?;
        }
        let BackupStatus { result, exit_code, .. } = &self.backup;
        let why = match result.as_str() {
            "exec-condition" => "the node does not have the primary, which makes the backups".to_owned(),
            "exit-code" => format!("pgBackRest has ended with {exit_code}"),
            other => format!("systemd's result is `{}`", visible(other)),
        };
        writeln!(f, "the backup on {} failed{}: {why}", self.node, took(&self.backup))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backup(unit: &str, run: &str) -> BackupStatus {
        BackupStatus { unit: unit.to_owned(), run: run.to_owned(), ..BackupStatus::default() }
    }

    #[test]
    fn only_the_run_that_has_begun_counts() {
        let begun = backup("pgbackrest@incr.service", "a");
        let found = |all: &[(&str, &str)]| {
            same_run(&begun, all.iter().map(|(unit, run)| backup(unit, run)).collect()).is_some()
        };
        assert!(found(&[("pgbackrest@full.service", "a"), ("pgbackrest@incr.service", "a")]));
        assert!(!found(&[("pgbackrest@full.service", "a"), ("pgbackrest@incr.service", "b")]));
        assert!(!found(&[]));
    }

    #[test]
    fn the_keeper_makes_the_backups() {
        let node = |name: &str, roles: &[&str]| KnownNode {
            name: name.to_owned(),
            group: "x".to_owned(),
            roles: roles.iter().map(|role| (*role).to_owned()).collect(),
            address: "10.10.0.1".to_owned(),
            endpoint: None,
        };
        assert_eq!(keeper(&[node("db-1", &["db"]), node("monitor-1", &["monitor", "backup"])]), Some("monitor-1"));
        assert_eq!(keeper(&[node("db-1", &["db"])]), None);
    }

    #[test]
    fn a_failed_backup_has_its_messages_and_its_reason() {
        let line = JournalLine {
            at: 1_000_000,
            unit: "pgbackrest@incr.service".to_owned(),
            message: "ERROR: [056]\u{1b}[2J".to_owned(),
            ..JournalLine::default()
        };
        let status = BackupStatus {
            result: "exit-code".to_owned(),
            exit_code: 56,
            started: Some(1),
            ended: Some(31),
            ..backup("pgbackrest@incr.service", "a")
        };
        let mut result =
            BackupNowResult { node: "monitor-1".to_owned(), backup: status, done: false, lines: vec![line] };
        assert_eq!(
            result.to_string(),
            "1970-01-01T00:00:01.000Z pgbackrest@incr.service: ERROR: [056]\u{fffd}[2J\n\
             the backup on monitor-1 failed after 30 s: pgBackRest has ended with 56\n"
        );
        result.backup.result = "exec-condition".to_owned();
        assert!(result.to_string().contains("does not have the primary"), "{result}");
        result.done = true;
        assert_eq!(result.to_string(), "");
    }
}
