//! `bakehouse alert`: tests whether alerts reach people.

use std::fmt;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use clap::{Args, Subcommand};
use fleet::node_api::{JournalQuery, OPEN_PREFIX};
use futures_util::future::join_all;
use schemars::JsonSchema;
use serde::Serialize;

use super::access::{NodeContext, Reach};
use super::results::CommandResult;
use super::verbs::AccessArgs;
use crate::deploy::alertmanager::{
    ALERTMANAGER_LINES, ALERTMANAGER_UNIT, ReceiverReply, ReceiverState, TestAlert, send_test,
};
use crate::deploy::nodes::{self, Logs};
use crate::error::{Error, Result};
use crate::util::terminal::visible;

pub(super) const ALERT: &str = "\
Example:
  bakehouse alert test";

#[derive(Subcommand)]
pub(super) enum AlertCommand {
    /// Send a test alert to every receiver, and print what each one answers
    #[command(after_help = "Examples:\n  bakehouse alert test\n  bakehouse alert test --node monitor-2 --json\n\n\
        Each monitor sends the alert TestAlert, and then its end, to every receiver in [alerts]. The command waits for\n\
        up to 40 s. It needs the role operator. The exit code is 1 if a receiver has not accepted the alert.")]
    Test(AlertTestArgs),
}

#[derive(Args)]
pub(super) struct AlertTestArgs {
    /// Name of a monitor; default: all monitors
    #[arg(long)]
    pub(super) node: Option<String>,
    #[command(flatten)]
    pub(super) access: AccessArgs,
}

/// Result of `alert test`.
#[derive(Serialize, JsonSchema)]
pub(super) struct AlertTestResult {
    /// What each receiver answered to each monitor.
    pub(super) receivers: Vec<ReceiverReply>,
    /// Monitors that did not send the alert. The warnings have the reasons.
    pub(super) silent: Vec<String>,
}

impl AlertTestResult {
    /// Whether each receiver has accepted the alert of each monitor.
    pub(super) fn is_good(&self) -> bool {
        self.silent.is_empty() && self.receivers.iter().all(|reply| reply.state == ReceiverState::Delivered)
    }
}

impl fmt::Display for AlertTestResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = |text: fn(&ReceiverReply) -> &str| {
            self.receivers.iter().map(|reply| text(reply).chars().count()).max().unwrap_or(0)
        };
        let (monitor, receiver) = (width(|r| &r.monitor), width(|r| &r.receiver));
        for reply in &self.receivers {
            let ReceiverReply { seconds, message, .. } = reply;
            let more = match (seconds, reply.state) {
                (Some(seconds), _) => format!("{seconds:.0} s"),
                (None, ReceiverState::NoSecret) => {
                    "the monitor lacks its secret: `bakehouse secret NAME`, raise `version`, and publish".to_owned()
                }
                (None, ReceiverState::Silent) => "Alertmanager has not sent the alert within 40 s".to_owned(),
                (None, _) => visible(message),
            };
            let state = reply.state.as_str();
            writeln!(f, "{:<monitor$}  {:<receiver$}  {state:<9}  {more}", reply.monitor, reply.receiver)?;
        }
        Ok(())
    }
}

/// Runs a command of `bakehouse alert`.
pub(super) fn run(context: &NodeContext, command: &AlertCommand) -> Result<CommandResult> {
    let AlertCommand::Test(args) = command;
    let reach = context.reach(&args.access)??;
    let monitors = if let Some(node) = &args.node {
        vec![reach.node(node)?.name.clone()]
    } else {
        let is_monitor = |roles: &[String]| roles.iter().any(|role| role == "monitor");
        reach.nodes.iter().filter(|node| is_monitor(&node.roles)).map(|node| node.name.clone()).collect()
    };
    if monitors.is_empty() {
        return Err(Error::Usage("the fleet has no node with the role `monitor`, which sends alerts".to_owned()));
    }
    let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    context.progress.say("alert", &format!("{} sends the alert TestAlert", monitors.join(", ")));
    let tests = monitors.iter().map(|monitor| test(&reach, monitor, at));
    let replies = nodes::run(join_all(tests))?;
    let (mut receivers, mut silent) = (Vec::new(), Vec::new());
    let mut failures = Vec::new();
    for (monitor, reply) in monitors.iter().zip(replies) {
        match reply {
            Ok(found) => receivers.extend(found),
            Err(e) => {
                silent.push(monitor.clone());
                failures.push(e);
            }
        }
    }
    if receivers.is_empty() {
        return Err(failures.into_iter().next().unwrap_or(Error::Interrupted));
    }
    for e in failures {
        context.warn_that("alert", e.chain());
    }
    Ok(CommandResult::AlertTest(AlertTestResult { receivers, silent }))
}

/// Tests the receivers of one monitor.
async fn test(reach: &Reach, monitor: &str, at: u64) -> Result<Vec<ReceiverReply>> {
    let service = format!("{OPEN_PREFIX}alertmanager");
    let connect = || reach.client.stream(monitor, &service);
    let log = || async {
        let (names, mut lines) = ([monitor.to_owned()], Vec::new());
        let query = JournalQuery {
            unit: Some(ALERTMANAGER_UNIT.to_owned()),
            lines: Some(ALERTMANAGER_LINES),
            ..JournalQuery::default()
        };
        let logs =
            Logs { client: &reach.client, nodes: &names, query: &query, kept_by: None, on_break: Arc::new(|_, _| {}) };
        logs.merged(|of| {
            lines.push(of.line.message.clone());
            Ok(())
        })
        .await?;
        Ok(lines)
    };
    send_test(&TestAlert { fleet: &reach.fleet, monitor, at }, connect, log).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_a_table_and_only_complete_success_is_good() {
        let reply = |receiver: &str, state, seconds, message: &str| ReceiverReply {
            monitor: "monitor-1".to_owned(),
            receiver: receiver.to_owned(),
            state,
            seconds,
            message: message.to_owned(),
        };
        let good = reply("email", ReceiverState::Delivered, Some(1.9), "");
        let bad = reply("telegram-1", ReceiverState::Failed, None, "telegram: Unauthorized (401)\u{1b}[2J");
        let mut result = AlertTestResult { receivers: vec![good, bad], silent: Vec::new() };
        assert_eq!(
            result.to_string(),
            "monitor-1  email       delivered  2 s\n\
             monitor-1  telegram-1  failed     telegram: Unauthorized (401)\u{fffd}[2J\n"
        );
        assert!(!result.is_good());
        result.receivers.pop();
        assert!(result.is_good());
        result.silent.push("monitor-2".to_owned());
        assert!(!result.is_good());
    }
}
