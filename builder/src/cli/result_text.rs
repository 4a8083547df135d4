//! Exit codes and texts of the results.

use std::fmt;
use std::process::ExitCode;

use super::disk::DiskText;
use super::net::NetText;
use super::results::{CommandResult, ExplainResult, NewTicketResult, TicketResult};
use crate::deploy::hub_client::describe;
use crate::keys::operator::now;
use crate::keys::{operator_log, ticket_log};
use crate::packages::explain::describe as describe_sources;
use crate::rehearse;
use crate::util::terminal::columns;
use crate::vm::{MachineState, NodeRow};

impl CommandResult {
    /// Returns the exit code. Some commands report a failure as their result.
    pub(super) fn exit_code(&self) -> ExitCode {
        match self {
            Self::Plan(plan) if plan.groups.iter().any(|group| !group.obstacles.is_empty()) => ExitCode::FAILURE,
            Self::Rehearse(outcomes) if outcomes.iter().any(|o| !o.broken.is_empty()) => ExitCode::FAILURE,
            Self::Psql(done) => ExitCode::from(u8::try_from(done.status).unwrap_or(1)),
            Self::Exec(done) | Self::OdooShell(done) => ExitCode::from(u8::try_from(done.status).unwrap_or(1)),
            Self::Status(status) | Self::Top(status) if status.nodes.iter().any(is_silent) => ExitCode::FAILURE,
            Self::Logs(logs) if !logs.incomplete.is_empty() => ExitCode::FAILURE,
            Self::AlertTest(test) if !test.is_good() => ExitCode::FAILURE,
            Self::BackupNow(backup) if !backup.done => ExitCode::FAILURE,
            _ => ExitCode::SUCCESS,
        }
    }

    /// Whether the text is that of a program, which may contain any character.
    pub(super) fn is_raw(&self) -> bool {
        matches!(self, Self::Exec(_) | Self::OdooShell(_) | Self::Schema(_) | Self::Completions(_))
    }
}

fn is_silent(row: &NodeRow) -> bool {
    row.state == MachineState::Silent
}

impl fmt::Display for CommandResult {
    /// Writes what the command prints to standard output without `--json`. Progress output names the other results.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ticket(TicketResult::New(NewTicketResult { ticket: Some(ticket), .. })) => {
                writeln!(f, "{}", serde_json::to_string(ticket).map_err(|_| fmt::Error)?)
            }
            Self::Ticket(TicketResult::List(rows)) => f.write_str(&ticket_log::table(rows)),
            Self::Check(check) => writeln!(f, "{}", check.table),
            Self::Lock(lock) => write!(f, "{}", lock.changes),
            Self::Plan(plan) => {
                plan.groups.iter().try_for_each(|group| write!(f, "{group}"))?;
                write!(f, "{}", plan.course)
            }
            Self::Rollout(rollout) => f.write_str(&describe(rollout)),
            Self::Up(status) => f.write_str(&status.table(columns())),
            Self::Status(status) => write!(f, "{}{}", status.table(columns()), status.alert_lines(now())),
            Self::Top(status) => f.write_str(&status.loads()),
            Self::Units(units) => write!(f, "{units}"),
            Self::Net(status) => write!(f, "{}", NetText(status)),
            Self::Disk(status) => write!(f, "{}", DiskText(status)),
            Self::Audit(log) => write!(f, "{log}"),
            Self::BackupNow(backup) => write!(f, "{backup}"),
            Self::AlertTest(test) => write!(f, "{test}"),
            Self::OperatorList(rows) => f.write_str(&operator_log::table(rows)),
            Self::Console(console) => console.lines.iter().try_for_each(|line| writeln!(f, "{line}")),
            Self::Exec(done) | Self::OdooShell(done) if !done.printed => f.write_str(&done.output),
            Self::Rehearse(outcomes) => f.write_str(&rehearse::table(outcomes)),
            Self::Explain(ExplainResult::One(one)) => f.write_str(&describe_sources(std::slice::from_ref(one))),
            Self::Explain(ExplainResult::All(all)) => f.write_str(&describe_sources(all)),
            Self::Schema(of) => writeln!(f, "{}", serde_json::to_string_pretty(&of.schema).map_err(|_| fmt::Error)?),
            Self::Completions(completions) => f.write_str(&completions.script),
            _ => Ok(()),
        }
    }
}
