//! `bakehouse audit`: what operators did on the nodes.

use std::fmt;

use clap::Args;
use fleet::node_api::{AuditEntry, AuditQuery, MOST_AUDIT_ENTRIES};
use fleet::one_line;
use schemars::JsonSchema;
use serde::Serialize;

use super::access::{NodeContext, Operated};
use super::results::CommandResult;
use super::verbs::{AccessArgs, since};
use crate::deploy::{audit as hubs, nodes};
use crate::error::Result;
use crate::util::time::rfc3339;

pub(super) const AUDIT: &str = "\
Examples:
  bakehouse audit
  bakehouse audit --node db-1 --since 7d
  bakehouse audit --by anna -n 1000 --json

The hubs keep the actions of operators in etcd for 90 days, also those on machines that are lost. An action without an
end has the result `begins`: it continues, or the node stopped before its end. Requests that only read, and refused
requests, are in the nodes' journals: `bakehouse logs --all --grep operator`.

TIME is an age (`30min`, `2h`, `3d`) or a time in UTC (`2026-12-01`, `2026-12-01 08:30`).";

/// Widest action that widens the column of all others.
const WIDEST: usize = 50;

#[derive(Args)]
pub(super) struct AuditArgs {
    /// Only actions since this time; default: all
    #[arg(long, value_name = "TIME", value_parser = since)]
    pub(super) since: Option<u64>,
    /// Only actions on this node
    #[arg(long)]
    pub(super) node: Option<String>,
    /// Only actions of this operator
    #[arg(long, value_name = "NAME")]
    pub(super) by: Option<String>,
    /// Number of actions: the last ones
    #[arg(short = 'n', long, value_name = "COUNT", default_value_t = 50)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=i64::from(MOST_AUDIT_ENTRIES)))]
    pub(super) count: u32,
    #[command(flatten)]
    pub(super) access: AccessArgs,
}

/// Result of `audit`.
#[derive(Serialize, JsonSchema)]
pub(super) struct AuditResult {
    /// The hub that returned the log.
    pub(super) hub: String,
    /// The actions, by the time of their begin.
    pub(super) actions: Vec<AuditRow>,
    /// Whether earlier actions match, too: `-n` returns more.
    pub(super) has_more: bool,
}

/// An action of an operator.
#[derive(Serialize, JsonSchema)]
pub(super) struct AuditRow {
    /// Begin by the node's clock, in seconds since 1970.
    pub(super) begun: u64,
    /// The same time, RFC 3339.
    pub(super) begun_at: String,
    /// End, in seconds since 1970. The key is absent before it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) ended: Option<u64>,
    /// Name of the operator.
    pub(super) operator: String,
    /// Role of the operator's certificate.
    pub(super) role: String,
    /// The hub that forwarded the request, or the address of the operator's machine.
    pub(super) from: String,
    /// Name of the node.
    pub(super) node: String,
    /// What the operator asked for.
    pub(super) action: String,
    /// How the action ended; `begins` before its end.
    pub(super) result: String,
    /// Number of the node's actions before this one that the log lacks, because no hub answered for long.
    pub(super) left_out: u32,
}

impl From<AuditEntry> for AuditRow {
    /// Other machines wrote the texts. Here they have one line each, and do not control a terminal.
    fn from(entry: AuditEntry) -> Self {
        let begun = entry.at / 1000;
        Self {
            begun,
            begun_at: rfc3339(begun),
            ended: entry.ended.map(|ended| ended / 1000),
            operator: one_line(&entry.operator),
            role: one_line(&entry.role),
            from: one_line(&entry.from),
            node: one_line(&entry.node),
            action: one_line(&entry.action),
            result: one_line(&entry.result),
            left_out: entry.left_out,
        }
    }
}

/// Prints the log.
pub(super) fn audit(context: &NodeContext, args: &AuditArgs) -> Result<CommandResult> {
    let Operated { file, entries, port, .. } = context.operated(&args.access)??;
    let query =
        AuditQuery { since: args.since, node: args.node.clone(), operator: args.by.clone(), count: Some(args.count) };
    let (hub, log) = nodes::run(hubs::read(&file, &entries, port, &query))??;
    if log.has_more {
        context.progress.say("audit", "there are earlier actions: `-n` and `--since` select them");
    }
    let actions = log.entries.into_iter().map(AuditRow::from).collect();
    Ok(CommandResult::Audit(AuditResult { hub, actions, has_more: log.has_more }))
}

impl fmt::Display for AuditResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let head = ["time", "operator", "role", "from", "node", "action", "result"].map(str::to_owned);
        let cells = |row: &AuditRow| {
            let AuditRow { begun_at, operator, role, from, node, action, result, .. } = row;
            [begun_at, operator, role, from, node, action, result].map(String::clone)
        };
        let rows: Vec<[String; 7]> = self.actions.iter().map(cells).collect();
        let width = |column: usize| {
            let widths = rows.iter().chain([&head]).map(|row| row[column].chars().count());
            widths.filter(|width| *width <= WIDEST).max().unwrap_or(0)
        };
        let widths: [usize; 7] = std::array::from_fn(width);
        let line = |row: &[String; 7]| {
            let cells: Vec<String> = row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
            cells.join("  ").trim_end().to_owned()
        };
        writeln!(f, "{}", line(&head))?;
        for (row, cells) in self.actions.iter().zip(&rows) {
            if row.left_out > 0 {
                writeln!(f, "{} actions on {} are only in its journal", row.left_out, row.node)?;
            }
            writeln!(f, "{}", line(cells))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(at: u64, action: &str, result: &str) -> AuditEntry {
        AuditEntry {
            at,
            node: "db-1".to_owned(),
            operator: "anna".to_owned(),
            role: "operator".to_owned(),
            from: "hub-2".to_owned(),
            action: action.to_owned(),
            result: result.to_owned(),
            ..AuditEntry::default()
        }
    }

    #[test]
    fn the_table_has_a_line_for_each_action() {
        let long = format!("exec {:?} for up to 300 s", ["echo", &"x".repeat(100)]);
        let entries = [
            entry(1_000, "reboot", "done"),
            AuditEntry { left_out: 2, ..entry(2_999, "restart of odoo.service", "failed:\n\u{1b}[2Jno") },
            entry(60_000, &long, "begins"),
        ];
        let actions = entries.into_iter().map(AuditRow::from).collect();
        let text = AuditResult { hub: "hub-1".to_owned(), actions, has_more: false }.to_string();
        let expected = format!(
            "time                  operator  role      from   node  action                   result\n\
             1970-01-01T00:00:01Z  anna      operator  hub-2  db-1  reboot                   done\n\
             2 actions on db-1 are only in its journal\n\
             1970-01-01T00:00:02Z  anna      operator  hub-2  db-1  restart of odoo.service  failed: \u{fffd}[2Jno\n\
             1970-01-01T00:01:00Z  anna      operator  hub-2  db-1  {long}  begins\n"
        );
        assert_eq!(text, expected);
    }
}
