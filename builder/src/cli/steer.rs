//! `bakehouse restart`, `reboot`, `poweroff`, `switchover`, `drain`, `undrain` and `exec`: acts on running nodes.

use std::io::{self, Write as _};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use fleet::node_api::{
    ActionRequest, DRAIN_PATH, EXEC_PATH, ExecEvent, ExecRequest, POWEROFF_PATH, REBOOT_PATH, RESTART_PATH,
    SWITCHOVER_PATH, UNDRAIN_PATH, unit_name,
};
use fleet::one_line;

use super::access::{NodeContext, Reach, confirm};
use super::node_results::ActionResult;
use super::psql::primary;
use super::results::{CommandResult, Event, ExecResult};
use super::verbs::{ActionArgs, ConsentArgs, DrainArgs, ExecArgs, RestartArgs, SwitchoverArgs, UndrainArgs};
use crate::deploy::nodes::{self, Action, NodeConnection, NodeLines};
use crate::error::{Error, Result, fail};
use crate::project::Project;
use crate::vm;

/// Longest time between two lines of a command's output. Nodes send an empty line at least every 20 s.
pub(super) const IDLE: Duration = Duration::from_secs(60);
/// Longest output in the result of `--json`, in bytes. Events have all of it.
const LONGEST_OUTPUT: usize = 4 << 20;

/// An action that waits for consent.
struct Order<'a> {
    node: &'a str,
    path: &'a str,
    unit: Option<String>,
    /// The action as a question, without a question mark.
    question: String,
    /// Whether the node may stop to answer before it has replied.
    stops: bool,
}

/// Restarts a unit.
pub(super) fn restart(context: &NodeContext, args: &RestartArgs) -> Result<CommandResult> {
    let reach = context.reach(&args.access)??;
    let unit = unit(&args.unit)?;
    let question = format!("restart {unit} of {} in the fleet {}", args.node, reach.fleet);
    let order = Order { node: &args.node, path: RESTART_PATH, unit: Some(unit.clone()), question, stops: false };
    let message = carry_out(context, &reach, &args.consent, &order, async |_, _| Ok(()))?.0;
    context.progress.say("restart", &message);
    let result = ActionResult { unit: Some(unit), ..ActionResult::new(&args.node, message) };
    Ok(CommandResult::Restart(result))
}

/// Reboots a node, and waits until it is ready again.
pub(super) fn reboot(context: &NodeContext, args: &ActionArgs) -> Result<CommandResult> {
    let reach = context.reach(&args.access)??;
    let question = format!("reboot {} of the fleet {}", args.node, reach.fleet);
    let order = Order { node: &args.node, path: REBOOT_PATH, unit: None, question, stops: true };
    let wait = async |action: &Action<'_>, since| {
        if args.no_wait { Ok(None) } else { action.until_booted(since).await.map(Some) }
    };
    let (message, seconds) = carry_out(context, &reach, &args.consent, &order, wait)?;
    let ready = |seconds: u64| format!("{}: ready again after {seconds} s", args.node);
    context.progress.say("reboot", &seconds.map_or_else(|| message.clone(), ready));
    let result = ActionResult { done: !args.no_wait, ..ActionResult::new(&args.node, message) };
    Ok(CommandResult::Reboot(result))
}

/// Switches a node off, and waits until it does not answer any more.
pub(super) fn poweroff(context: &NodeContext, args: &ActionArgs) -> Result<CommandResult> {
    let reach = context.reach(&args.access)??;
    let question = format!("switch {} of the fleet {} off, until somebody switches it on", args.node, reach.fleet);
    let order = Order { node: &args.node, path: POWEROFF_PATH, unit: None, question, stops: true };
    let wait = async |action: &Action<'_>, _| if args.no_wait { Ok(()) } else { action.until_off().await };
    let (message, ()) = carry_out(context, &reach, &args.consent, &order, wait)?;
    let off = format!("{} does not answer any more", args.node);
    context.progress.say("poweroff", if args.no_wait { &message } else { &off });
    let result = ActionResult { done: !args.no_wait, ..ActionResult::new(&args.node, message) };
    Ok(CommandResult::Poweroff(result))
}

/// Hands the primary over to a standby, and waits until it is there.
pub(super) fn switchover(context: &NodeContext, args: &SwitchoverArgs) -> Result<CommandResult> {
    let reach = context.reach(&args.access)??;
    let databases: Vec<_> = reach.nodes.iter().filter(|n| n.roles.iter().any(|role| role == "db")).cloned().collect();
    let primary = primary(&reach)?;
    let question = format!("hand the primary of the fleet {} over from {primary}", reach.fleet);
    let order = Order { node: &primary, path: SWITCHOVER_PATH, unit: None, question, stops: false };
    let wait = async |action: &Action<'_>, _| action.until_promoted(&databases).await;
    let (message, to) = carry_out(context, &reach, &args.consent, &order, wait)?;
    context.progress.say("switchover", &format!("from {primary} to {to}"));
    let result = ActionResult { primary: Some(to), ..ActionResult::new(&primary, message) };
    Ok(CommandResult::Switchover(result))
}

/// Takes a node out of service.
pub(super) fn drain(context: &NodeContext, args: &DrainArgs) -> Result<CommandResult> {
    let reach = context.reach(&args.access)??;
    let question = format!("take {} of the fleet {} out of service, until it is undrained", args.node, reach.fleet);
    let order = Order { node: &args.node, path: DRAIN_PATH, unit: None, question, stops: false };
    let (message, ()) = carry_out(context, &reach, &args.consent, &order, async |_, _| Ok(()))?;
    context.progress.say("drain", &message);
    Ok(CommandResult::Drain(ActionResult::new(&args.node, message)))
}

/// Puts a drained node into service again. It needs no consent, because the fleet loses nothing.
pub(super) fn undrain(context: &NodeContext, args: &UndrainArgs) -> Result<CommandResult> {
    let reach = context.reach(&args.access)??;
    let consent = ConsentArgs { yes: true, force: None };
    let order = Order { node: &args.node, path: UNDRAIN_PATH, unit: None, question: String::new(), stops: false };
    let (message, ()) = carry_out(context, &reach, &consent, &order, async |_, _| Ok(()))?;
    context.progress.say("undrain", &message);
    Ok(CommandResult::Undrain(ActionResult::new(&args.node, message)))
}

/// Returns the complete name of a unit.
pub(super) fn unit(name: &str) -> Result<String> {
    unit_name(name).ok_or_else(|| {
        Error::Usage(format!("`{name}` cannot be the name of a unit\n  help: `bakehouse units NODE` lists them"))
    })
}

/// Asks for consent, posts an action to a node, and waits for its end and for what `wait` waits for. Returns what the
/// node has done.
fn carry_out<T>(
    context: &NodeContext,
    reach: &Reach,
    consent: &ConsentArgs,
    order: &Order,
    wait: impl AsyncFnOnce(&Action<'_>, Instant) -> Result<T>,
) -> Result<(String, T)> {
    let node = order.node;
    reach.node(node)?;
    if let Some(force) = consent.force.as_ref().filter(|force| *force != node) {
        return Err(Error::Usage(format!(
            "`--force {force}` does not name {node}\n  help: add `--force {node}` if the fleet may lose a quorum, the last \
             primary or the VIP"
        )));
    }
    confirm(&order.question, consent.yes)?;
    let request = ActionRequest { unit: order.unit.clone(), force: consent.force.clone() };
    let step = context.progress.step(context.output.command.unwrap_or_default(), &format!("waiting for {node}"));
    let prefix = format!("{node}: ");
    let on_state = |text: &str| step.message(&format!("{prefix}{}", text.strip_prefix(&prefix).unwrap_or(text)));
    let action = Action { client: &reach.client, node, on_state: &on_state };
    nodes::run(async {
        let since = Instant::now();
        let message = action.run(order.path, &request, order.stops).await?;
        let waited = wait(&action, since).await?;
        Ok((message, waited))
    })?
}

/// Runs a command on a node.
pub(super) fn exec(context: &NodeContext, args: &ExecArgs) -> Result<CommandResult> {
    let is_local = context.is_local(&args.access);
    let local = context.project.filter(|_| is_local);
    let runs = |project: &&Project| vm::running(project).contains(&args.node.as_str());
    let machine = local.filter(runs);
    match context.reach(&args.access)? {
        Ok(reach) => {
            reach.node(&args.node)?;
            if reach.is_local && machine.is_none() {
                return Err(not_here(&args.node, ""));
            }
            let machine = machine.filter(|_| reach.is_local);
            match nodes::run(over_api(context, args, &reach, machine.is_some()))?? {
                Some(done) => Ok(done),
                None => machine.map_or_else(|| Err(not_here(&args.node, "")), |project| over_port(project, args)),
            }
        }
        Err(missing) => match (machine, context.project) {
            (Some(project), _) => over_port(project, args),
            (None, Some(project)) if args.access.operator.is_none() && args.access.endpoint.is_empty() => {
                project.node(&args.node)?;
                let help = if is_local { String::new() } else { missing.help() };
                Err(not_here(&args.node, &help))
            }
            _ => Err(missing.into()),
        },
    }
}

fn not_here(node: &str, help: &str) -> Error {
    Error::Failed(format!(
        "{node} does not run on this host\n  help: `bakehouse up {node}` starts it as a local machine{help}"
    ))
}

/// Runs a command over a node's API. Returns `None` if `has_port`, and the node has certainly not run it: it has no
/// connection, or its fleet permits no commands.
async fn over_api(
    context: &NodeContext<'_>,
    args: &ExecArgs,
    reach: &Reach,
    has_port: bool,
) -> Result<Option<CommandResult>> {
    let connected = match reach.client.connect(&args.node).await {
        Err(_) if has_port => return Ok(None),
        connected => connected?,
    };
    match start(connected, args).await {
        Ok(lines) => output(context, &args.node, lines).await.map(|done| Some(CommandResult::Exec(done))),
        Err(e) if has_port && nodes::permits_no_commands(&e) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Runs a command through the port of a local machine.
fn over_port(project: &Project, args: &ExecArgs) -> Result<CommandResult> {
    let vm = vm::Vm::for_node(project, &args.node)?;
    let done = vm.exec_within(&vm::command_line(&args.command), Duration::from_secs(args.seconds.into()))?;
    let (status, output) = (done.status, done.output);
    Ok(CommandResult::Exec(ExecResult { node: args.node.clone(), status, output, printed: false }))
}

/// Starts a command on a node.
async fn start(connected: NodeConnection, args: &ExecArgs) -> Result<NodeLines> {
    let command = match &args.command[..] {
        [line] => ["bash", "-c", line].map(str::to_owned).to_vec(),
        words => words.to_vec(),
    };
    let body = serde_json::to_vec(&ExecRequest { command, seconds: args.seconds }).map_err(Error::Json)?;
    connected.lines("POST", EXEC_PATH, body.into(), IDLE).await
}

/// Prints the output of a command until its end.
pub(super) async fn output(context: &NodeContext<'_>, node: &str, mut lines: NodeLines) -> Result<ExecResult> {
    let mut all = Vec::new();
    let invalid = || format!("read the output of the command on {node}");
    while let Some(line) = lines.next().await? {
        let event: ExecEvent = serde_json::from_slice(&line).map_err(Error::cannot(invalid()))?;
        let (stderr, text) = match event {
            ExecEvent::Exit(status) => {
                let output = String::from_utf8_lossy(&all).into_owned();
                return Ok(ExecResult { node: node.to_owned(), status, output, printed: !context.output.json });
            }
            ExecEvent::Stdout(text) => (false, text),
            ExecEvent::Stderr(text) => (true, text),
            ExecEvent::Failed(why) => return fail(format!("{node}: {}", one_line(&why))),
            ExecEvent::Unknown => continue,
        };
        let bytes = BASE64.decode(text).map_err(Error::cannot(invalid()))?;
        if context.output.json {
            let text = String::from_utf8_lossy(&bytes);
            context.output.event(Event::Output { stderr, text: &text })?;
            let room = LONGEST_OUTPUT.saturating_sub(all.len());
            all.extend(&bytes[..bytes.len().min(room)]);
        } else if stderr {
            let _ = io::stderr().write_all(&bytes);
        } else {
            write_stdout(&bytes)?;
        }
    }
    fail(format!("the connection to {node} ended before the command: its exit code is unknown"))
}

/// Writes bytes unchanged, because a command may print any.
fn write_stdout(bytes: &[u8]) -> Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(bytes).and_then(|()| out.flush()).map_err(|e| match e.kind() {
        io::ErrorKind::BrokenPipe => Error::Unread,
        _ => Error::io("write", "standard output")(e),
    })
}
