//! `bakehouse status`, `top`, `logs`, `units`, `open` and `report`: looks at running nodes.

use std::convert::Infallible;
use std::io::IsTerminal as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use fleet::node_api::{JournalLine, JournalQuery, OPEN_PREFIX, UNITS_PATH, UnitStatus};
use tokio::time::{Instant, timeout_at};

use super::access::{NodeContext, Reach};
use super::board::{Alerts, Board, View};
use super::node_results::{LogsResult, OpenResult, UnitsResult};
use super::open_page::open_page;
use super::open_postgres;
use super::output::print;
use super::results::{CommandResult, Event, ReportResult};
use super::steer::unit;
use super::verbs::{LogsArgs, OpenArgs, Page, ReportArgs, StatusArgs, UnitsArgs};
use crate::deploy::nodes::{self, Client, Entrance, JournalLineOf, Logs};
use crate::error::{Error, Result};
use crate::keys::authority::FleetKey;
use crate::keys::operator::{KnownNode, now};
use crate::project::Project;
use crate::util::terminal::visible;
use crate::util::time::rfc3339_millis;
use crate::vm::{self, FleetStatus, MachineState, MonitorFacts};

/// Time between two states of `--watch`, and between two reads of the alerts.
const WATCH_INTERVAL: Duration = Duration::from_secs(2);
const ALERTS_INTERVAL: Duration = Duration::from_secs(10);
/// Time for which the state of the nodes waits for the monitors.
const FACTS: Duration = Duration::from_millis(150);
/// Time limit of a request about one node.
const LIMIT: Duration = Duration::from_secs(10);
/// Longest list of units, in bytes.
const LONGEST: usize = 4 << 20;
/// Number of messages of each node without `-n`, and with `-f`.
const LINES: u32 = 200;
const FOLLOWED_LINES: u32 = 10;

/// Returns the state of the nodes. With `--watch`, shows it until Ctrl-C.
pub(super) fn status(context: &NodeContext, args: &StatusArgs, view: View) -> Result<FleetStatus> {
    if args.watch {
        return watch(context, args, view).map(|never| match never {});
    }
    match context.reach(&args.access)? {
        Ok(reach) if reach.is_local => local_status(context, &reach),
        Ok(reach) => {
            let state = nodes::fleet_status(&reach.client, &reach.nodes);
            let (status, known) = nodes::run(with_monitored(&reach.client, &reach.nodes, state))?;
            Ok(FleetStatus { certificate_expires: Some(reach.expires), ..known.added_to(status?) })
        }
        Err(missing) => match context.project {
            Some(project) if args.access.operator.is_none() => {
                if vm::running(project).is_empty() {
                    // Without a machine that was started on this host, it is a real fleet.
                    if !vm::were_started(project) {
                        return Err(missing.into());
                    }
                    context.warn_that("status", missing.line());
                }
                Ok(FleetStatus::read(project))
            }
            _ => Err(missing.into()),
        },
    }
}

fn watch(context: &NodeContext, args: &StatusArgs, view: View) -> Result<Infallible> {
    match context.reach(&args.access)? {
        Ok(reach) if !reach.is_local => watch_fleet(context, &reach, view),
        Ok(_) => watch_machines(context, args, view),
        Err(missing) => match context.project {
            Some(project) if args.access.operator.is_none() && !vm::running(project).is_empty() => {
                watch_machines(context, args, view)
            }
            _ => Err(missing.into()),
        },
    }
}

/// What the monitors know.
#[derive(Clone, Default)]
struct Monitored {
    alerts: Alerts,
    facts: Option<MonitorFacts>,
}

impl Monitored {
    /// Asks the monitors.
    async fn read(client: &Client, monitors: &[String]) -> Self {
        let (alerts, facts) = tokio::join!(nodes::firing(client, monitors), nodes::facts(client, monitors));
        Self { alerts: Some(alerts.map_err(|e| e.chain())), facts: facts.ok() }
    }

    /// Returns the state of the nodes with what the monitors know.
    fn added_to(&self, status: FleetStatus) -> FleetStatus {
        let alerts = self.alerts.as_ref().and_then(|alerts| alerts.as_ref().ok()).cloned();
        FleetStatus { monitor: self.facts.clone(), alerts, ..status }
    }
}

/// Shows the state of a real fleet until Ctrl-C.
fn watch_fleet(context: &NodeContext, reach: &Reach, view: View) -> Result<Infallible> {
    let board = Board { fleet: &reach.fleet, view };
    let monitors = monitors(&reach.nodes);
    nodes::run(async {
        let known: Arc<Mutex<Monitored>> = Arc::default();
        if !monitors.is_empty() {
            let (known, client) = (known.clone(), reach.client.clone());
            tokio::spawn(async move {
                loop {
                    let read = Monitored::read(&client, &monitors).await;
                    *known.lock().unwrap_or_else(PoisonError::into_inner) = read;
                    tokio::time::sleep(ALERTS_INTERVAL).await;
                }
            });
        }
        nodes::watch(&reach.client, &reach.nodes, WATCH_INTERVAL, |status| {
            let known = known.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let status = FleetStatus { certificate_expires: Some(reach.expires), ..known.added_to(status) };
            board.show(context, &status, now(), &known.alerts)
        })
        .await
    })?
}

/// Shows the state of local machines until Ctrl-C.
fn watch_machines(context: &NodeContext, args: &StatusArgs, view: View) -> Result<Infallible> {
    let fleet = context.project.map_or("", |project| &project.topology.name);
    let board = Board { fleet, view };
    let (mut known, mut rounds) = (Monitored::default(), 0_u64);
    loop {
        if rounds.is_multiple_of(ALERTS_INTERVAL.as_secs() / WATCH_INTERVAL.as_secs())
            && let Ok(reach) = context.reach(&args.access)?
        {
            let monitors = monitors(&reach.nodes);
            if !monitors.is_empty() {
                known = nodes::run(Monitored::read(&reach.client, &monitors))?;
            }
        }
        rounds += 1;
        let once = StatusArgs { watch: false, access: args.access.clone() };
        match status(context, &once, view) {
            Err(e) if matches!(e, Error::Usage(_)) => return Err(e),
            Ok(status) => {
                // The state may have answers of the monitors that are newer.
                let fresh = Monitored { alerts: status.alerts.clone().map(Ok), facts: status.monitor.clone() };
                let (alerts, facts) = (fresh.alerts.or(known.alerts.clone()), fresh.facts.or(known.facts.clone()));
                let known = Monitored { alerts, facts };
                board.show(context, &known.added_to(status), now(), &known.alerts)?;
            }
            Err(e) => board.fail(context, now(), &e.chain())?,
        }
        std::thread::sleep(WATCH_INTERVAL);
    }
}

/// Reads the state of nodes, and at the same time what the monitors among them know. Waits for the monitors only shortly.
async fn with_monitored<T>(client: &Client, all: &[KnownNode], state: impl Future<Output = T>) -> (T, Monitored) {
    let monitors = monitors(all);
    if monitors.is_empty() {
        return (state.await, Monitored::default());
    }
    let (asker, names) = (client.clone(), monitors.clone());
    let facts = tokio::spawn(async move { nodes::facts(&asker, &names).await.ok() });
    let asker = client.clone();
    let alerts = tokio::spawn(async move { nodes::firing(&asker, &monitors).await.map_err(|e| e.chain()) });
    let state = state.await;
    let until = Instant::now() + FACTS;
    let facts = timeout_at(until, facts).await.ok().and_then(std::result::Result::ok).flatten();
    let late = || Err("no monitor answers in time".to_owned());
    let alerts = timeout_at(until, alerts).await.ok().and_then(std::result::Result::ok).unwrap_or_else(late);
    (state, Monitored { alerts: Some(alerts), facts })
}

/// Returns the names of the monitors.
fn monitors(nodes: &[KnownNode]) -> Vec<String> {
    let monitors = nodes.iter().filter(|node| node.roles.iter().any(|role| role == "monitor"));
    monitors.map(|node| node.name.clone()).collect()
}

/// Returns the state of local machines. Reads it through the machines' ports for commands if an agent does not answer.
fn local_status(context: &NodeContext, reach: &Reach) -> Result<FleetStatus> {
    let project = context.project.expect("local machines have a fleet's folder");
    let running = vm::running(project);
    let is_up = |node: &&KnownNode| running.contains(&node.name.as_str());
    let up: Vec<KnownNode> = reach.nodes.iter().filter(is_up).cloned().collect();
    let asked = nodes::ask_all(&reach.client, &up);
    let (seen, known) = nodes::run(with_monitored(&reach.client, &up, asked))?;
    let mut seen = seen.unwrap_or_default();
    seen.retain(|(row, _)| row.state != MachineState::Silent);
    let answered: Vec<String> = seen.iter().map(|(row, _)| row.node.clone()).collect();
    let others: Vec<&str> =
        reach.nodes.iter().map(|node| node.name.as_str()).filter(|name| !answered.iter().any(|a| a == name)).collect();
    seen.extend(vm::seen(project, &others));
    let position = |name: &str| reach.nodes.iter().position(|node| node.name == name);
    seen.sort_by_key(|(row, _)| position(&row.node));
    Ok(known.added_to(FleetStatus::new(seen, Some(project))))
}

/// Lists the units of a node.
pub(super) fn units(context: &NodeContext, args: &UnitsArgs) -> Result<CommandResult> {
    let reach = context.reach(&args.access)??;
    let node = reach.node(&args.node)?.name.clone();
    let mut units: Vec<UnitStatus> = nodes::run(reach.client.get(&node, UNITS_PATH, LONGEST, LIMIT))??;
    units.retain(|unit| !args.failed || unit.active == "failed");
    Ok(CommandResult::Units(UnitsResult { node, units }))
}

/// Prints the journals of nodes.
pub(super) fn logs(context: &NodeContext, args: &LogsArgs) -> Result<CommandResult> {
    let reach = context.reach(&args.access)??;
    let nodes = selected(&reach, args)?;
    let default = if args.follow { FOLLOWED_LINES } else { LINES };
    let default = args.since.is_none().then_some(default);
    let query = JournalQuery {
        unit: args.unit.as_deref().map(unit).transpose()?,
        lines: args.lines.or(default),
        since: args.since,
        after: None,
        of: None,
        boot: args.boot,
        follow: args.follow,
    };
    let kept_by = args.kept.as_deref().map(|monitor| reach.node(monitor).map(|node| node.name.as_str())).transpose()?;
    let progress = context.progress.clone();
    let on_break = move |node: &str, cause: &str| progress.say("logs", &format!("{node}: {cause}; trying again"));
    let logs = Logs { client: &reach.client, nodes: &nodes, query: &query, kept_by, on_break: Arc::new(on_break) };
    let format = LineFormat::new(&nodes);
    let mut count = 0;
    let incomplete = nodes::run(logs.merged(|of| {
        if args.grep.as_ref().is_some_and(|pattern| !pattern.is_match(&of.line.message)) {
            return Ok(());
        }
        count += 1;
        if context.output.json {
            return context.output.event(Event::Line { node: of.node, line: &of.line });
        }
        print(format.line(&of))
    }))??;
    let monitor = reach.nodes.iter().find(|node| node.roles.iter().any(|role| role == "monitor"));
    if let (Some((node, _)), Some(monitor), None) = (incomplete.first(), monitor, kept_by) {
        let command = format!("bakehouse logs {node} --kept {}", monitor.name);
        context.progress.say("logs", &format!("if {node} is lost: `{command}` reads the copy of its journal"));
    }
    // A node that refuses the query is the only one, or the other nodes refuse it, too.
    if incomplete.len() == nodes.len() && count == 0 {
        return Err(incomplete.into_iter().next().map_or(Error::Interrupted, |(node, e)| Error::at(node)(e)));
    }
    for (node, e) in &incomplete {
        context.warn_that("logs", format!("the journal of {node} is incomplete: {}", e.chain()));
    }
    let incomplete = incomplete.into_iter().map(|(node, _)| node).collect();
    Ok(CommandResult::Logs(LogsResult { lines: count, incomplete }))
}

/// Returns the nodes that the command line names.
fn selected(reach: &Reach, args: &LogsArgs) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for name in &args.nodes {
        let name = &reach.node(name)?.name;
        if !names.contains(name) {
            names.push(name.clone());
        }
    }
    let has_role = |roles: &[String]| args.all || args.role.as_ref().is_some_and(|role| roles.contains(role));
    for node in reach.nodes.iter().filter(|node| has_role(&node.roles)) {
        if !names.contains(&node.name) {
            names.push(node.name.clone());
        }
    }
    if names.is_empty() {
        return Err(Error::Usage(format!("no node has the role `{}`", args.role.as_deref().unwrap_or_default())));
    }
    Ok(names)
}

/// Format of messages for people.
struct LineFormat {
    width: usize,
    colour: bool,
}

impl LineFormat {
    fn new(nodes: &[String]) -> Self {
        let width = nodes.iter().map(String::len).max().unwrap_or(0);
        Self { width, colour: std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none() }
    }

    fn line(&self, of: &JournalLineOf) -> String {
        let JournalLine { at, unit, priority, message, .. } = &of.line;
        let (at, width) = (rfc3339_millis(*at), self.width);
        let (unit, message) = (visible(unit), visible(message));
        if !self.colour {
            return format!("{at} {:<width$} {unit}: {message}\n", of.node);
        }
        // The six colours that differ from the usual fore- and background; errors are bold.
        let hue = 31 + (of.index + 1) % 6;
        let (bold, plain) = if *priority <= 3 { ("\u{1b}[1m", "\u{1b}[0m") } else { ("", "") };
        format!("{at} \u{1b}[{hue}m{:<width$}\u{1b}[0m {unit}: {bold}{message}{plain}\n", of.node)
    }
}

/// Forwards connections of this host to a page of a node, until Ctrl-C.
pub(super) fn open(context: &NodeContext, args: &OpenArgs) -> Result<CommandResult> {
    if args.write && args.page != Page::Postgres {
        return Err(Error::Usage("only `bakehouse open postgres` takes `--write`".to_owned()));
    }
    let (name, role) = match args.page {
        Page::Postgres => return open_postgres::open(context, args),
        Page::Fleet => return open_page(context, args),
        Page::Prometheus => ("prometheus", "monitor"),
        Page::Alertmanager => ("alertmanager", "monitor"),
        Page::Haproxy => ("haproxy", "hub"),
    };
    let reach = context.reach(&args.access)??;
    let with_role = || reach.nodes.iter().filter(|node| node.roles.iter().any(|r| r == role)).map(|n| n.name.clone());
    let candidates: Vec<String> = match &args.node {
        Some(node) => vec![reach.node(node)?.name.clone()],
        None => with_role().collect(),
    };
    if candidates.is_empty() {
        return Err(Error::Usage(format!("the fleet has no node with the role `{role}`, which serves this page")));
    }
    let service = format!("{OPEN_PREFIX}{name}");
    nodes::run(async {
        let mut failures = Vec::new();
        for node in candidates {
            // A first connection, so that a node without the page is an error here and not in the browser.
            if let Err(e) = reach.client.stream(&node, &service).await {
                failures.push(e);
                continue;
            }
            let entrance = Entrance::open().await?;
            let opened = OpenResult { page: name.to_owned(), node, url: entrance.link() };
            context.output.event(Event::Open(&opened))?;
            if !context.output.json {
                print(format!("{}\n", opened.url))?;
            }
            context.progress.say("open", &format!("{name} of {}, until Ctrl-C; the link is secret", opened.node));
            nodes::forward(&reach.client, &opened.node, &service, entrance).await?;
            return Ok(CommandResult::Open(opened));
        }
        let causes: Vec<String> = failures.iter().map(Error::chain).collect();
        Err(Error::Failed(format!("no node serves {name}:\n  {}", causes.join("\n  "))))
    })?
}

/// Collects journals and states of all nodes.
pub(super) fn report(context: &NodeContext, args: &ReportArgs) -> Result<CommandResult> {
    let path = args.output.clone();
    let files = match context.project {
        Some(project) if context.is_local(&args.access) => {
            vm::report::collect(project, &args.output, context.progress)?
        }
        project => {
            let reach = context.reach(&args.access)??;
            let has_key = |project: &&Project| project.dir.join(FleetKey::FILE).exists();
            let secrets = if let Some(project) = project.filter(has_key) {
                vm::report::passwords(project, &FleetKey::load(project)?.secrets)
            } else {
                let text = "fleet.key is not here, so the archive may contain the fleet's passwords: look into it before \
                            you send it";
                context.warn_that("report", text.to_owned());
                Vec::new()
            };
            let collected = nodes::collect(&reach.client, &reach.nodes, &secrets, &args.output, context.progress);
            nodes::run(collected)??
        }
    };
    Ok(CommandResult::Report(ReportResult { path, files }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_cannot_control_the_terminal() {
        let format = LineFormat { width: 5, colour: false };
        let message = "one\u{1b}[2J\rtwo\n\tthree\u{9b}\n".to_owned();
        let line = JournalLine { at: 1_000_000, unit: "a\u{7}.service".to_owned(), message, ..JournalLine::default() };
        let text = format.line(&JournalLineOf { node: "db-1", index: 0, line });
        assert_eq!(
            text,
            "1970-01-01T00:00:01.000Z db-1  a\u{fffd}.service: one\u{fffd}[2J\u{fffd}two\n    \tthree\u{fffd}\n"
        );
    }
}
