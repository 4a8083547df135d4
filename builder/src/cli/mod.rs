//! The command line: parses the arguments and runs the commands.

mod accepts;
mod access;
mod alert;
mod args;
mod audit;
mod backup;
mod board;
mod build;
mod context;
mod disk;
mod envelope;
mod explain;
mod hints;
mod init;
mod inspect;
mod install;
mod look;
mod machines;
mod mail;
mod net;
mod next;
mod node_results;
mod odoo;
mod open_page;
mod open_postgres;
mod operator;
mod operator_wireguard;
mod output;
#[cfg(test)]
mod pages;
mod parse;
mod pcap;
mod problem;
mod psql;
mod reference;
mod rehearse;
mod result_text;
mod results;
mod rollout;
mod rows;
mod schema;
mod secret;
mod sql_rows;
mod steer;
mod ticket;
mod verbs;

use std::cell::RefCell;
use std::process::ExitCode;

use fleet::RolloutOrder;

use crate::deploy::export::ExportOptions;
use crate::deploy::flash::FlashOptions;
use crate::error::Result;
use crate::progress::{Progress, line};
use crate::project::Project;

use access::NodeContext;
use args::{Cli, Command, StoreCommand};
use board::View;
use context::Context;
use output::Output;
use results::{CommandResult, Event};
use verbs::OperatorCommand;

pub use accepts::accepts;
pub use reference::page;
pub use schema::{commands as json_commands, json_page, json_schema};

/// Runs the command line. Prints errors to standard error, and with `--json` also to standard output.
#[must_use]
pub fn main() -> ExitCode {
    let cli = match parse::parse() {
        Ok(cli) => cli,
        Err(e) => return output::usage_error(&e),
    };
    let output = Output { json: cli.json, verbose: cli.verbose, command: Some(cli.command.name()) };
    handle_signals(output);
    run(&cli, output).unwrap_or_else(|e| {
        output.error(&e);
        e.exit_code()
    })
}

fn run(cli: &Cli, output: Output) -> Result<ExitCode> {
    let progress = Progress::new(cli.quiet, cli.verbose);
    match &cli.command {
        Command::Store(StoreCommand::Gc { older_than }) => output.result(&build::gc(&progress, *older_than)?, &[]),
        Command::Init { dir, from, secure_boot, passphrase } => {
            output.result(&init::init(dir, from, *secure_boot, *passphrase, &progress)?, &[])
        }
        Command::Schema { file } => output.result(&reference::schema(*file), &[]),
        Command::Completions { shell } => output.result(&reference::completions(*shell), &[]),
        Command::Man { dir } => output.result(&reference::man(dir, &progress)?, &[]),
        Command::Operator(OperatorCommand::Request { name, output: dir }) => {
            output.result(&operator::request(name, dir, &progress)?, &[])
        }
        Command::Operator(OperatorCommand::Wireguard(_))
        | Command::Status(_)
        | Command::Logs(_)
        | Command::Units(_)
        | Command::Net(_)
        | Command::Disk(_)
        | Command::Audit(_)
        | Command::Backup(_)
        | Command::Pcap(_)
        | Command::Top(_)
        | Command::Restart(_)
        | Command::Reboot(_)
        | Command::Poweroff(_)
        | Command::Switchover(_)
        | Command::Drain(_)
        | Command::Undrain(_)
        | Command::Open(_)
        | Command::Alert(_)
        | Command::Mail(_)
        | Command::Exec(_)
        | Command::Psql(_)
        | Command::Odoo(_)
        | Command::Report(_) => {
            let (folder, exists) = Project::folder(&cli.fleet);
            let project = if exists { Some(Project::load(&cli.fleet)?) } else { None };
            let (project, folder, warnings) = (project.as_ref(), folder.as_path(), RefCell::default());
            let context = NodeContext { project, folder, progress: &progress, output, warnings };
            let result = run_for_nodes(&context, &cli.command)?;
            output.result(&result, &context.warnings())
        }
        command => {
            let project = Project::load(&cli.fleet)?;
            let warnings = RefCell::default();
            let context = Context { project: &project, progress: &progress, output, quiet: cli.quiet, warnings };
            let result = run_in(&context, command)?;
            output.result(&result, &context.warnings())
        }
    }
}

/// Runs a command of an existing fleet.
fn run_in(context: &Context, command: &Command) -> Result<CommandResult> {
    match command {
        Command::Check => inspect::check(context),
        Command::Ticket { list: true, endpoint, .. } => ticket::list(context, endpoint),
        Command::Ticket { revoke: Some(number), endpoint, .. } => ticket::revoke(context, number, endpoint),
        Command::Ticket { to, rescue: true, hours, output, .. } => {
            ticket::rescue(context, to.as_deref().unwrap_or_default(), *hours, output.as_deref())
        }
        Command::Ticket { to, uses, days, replace, output, endpoint, revoke: None, list: false, .. } => {
            let (to, output) = (to.as_deref().unwrap_or_default(), output.as_deref());
            let (uses, days, replace) = (*uses, *days, *replace);
            ticket::new(context, &ticket::NewTicket { to, uses, days, replace, output, endpoint })
        }
        Command::Secret { name, remove } => secret::secret(context, name, *remove),
        Command::Leave { node, now, endpoint } => ticket::leave(context, node, *now, endpoint),
        Command::Flash { to, target, yes, force, replace, no_ticket, mirror } => {
            let source = install::FlashSource { to, replace: *replace, no_ticket: *no_ticket, mirror };
            let on_progress = |progress| drop(context.output.event(Event::Pass(progress)));
            let options = FlashOptions { to, target, yes: *yes, force: force.as_deref(), on_progress: &on_progress };
            install::flash(context, &source, &options)
        }
        Command::Vm { node, format, ticket, replace, yes, output, mirror } => {
            let options = ExportOptions { node, format: *format, transport: *ticket, replace: *replace, yes: *yes };
            install::vm(context, &options, output, mirror)
        }
        Command::Netboot { interface, dhcp, again, approve, mirror } => {
            install::netboot(context, interface.as_deref(), *dhcp, again, approve, mirror)
        }
        Command::Lock { update, mirror } => build::lock(context, *update, mirror),
        Command::Fetch { mirror } => build::fetch(context, mirror),
        Command::Build { groups, revision, mirror } => build::build(context, groups, revision.as_deref(), mirror),
        Command::Plan { dir, groups, mirror } => rollout::plan(context, dir, groups, mirror),
        Command::Publish { dir, groups, mirror } => rollout::publish(context, dir, groups, mirror),
        Command::Rollout { pause, resume, allow, skip, endpoint } => {
            let order = match (pause, allow, skip) {
                (Some(why), ..) => RolloutOrder::Pause { why: why.clone() },
                (_, Some(version), _) => RolloutOrder::Allow { version: version.clone() },
                (.., Some(node)) => RolloutOrder::Skip { node: node.clone() },
                _ if *resume => RolloutOrder::Resume,
                _ => RolloutOrder::Tell,
            };
            rollout::rollout(context, order, endpoint)
        }
        Command::Up { nodes, containers, mirror } => machines::up(context, nodes, *containers, mirror),
        Command::Down { nodes } => machines::down(context, nodes),
        Command::Console { node, follow } => machines::console(context, node, *follow),
        Command::Rehearse { scenarios, repeat, page, revision } => {
            rehearse::rehearse(context, scenarios, *repeat, page.as_deref(), revision.as_deref())
        }
        Command::Explain { path, group } => explain::explain(context, path, group.as_deref()),
        Command::Operator(command) => operator::run(context, command),
        _ => unreachable!("`run` runs the other commands"),
    }
}

/// Runs a command for running nodes, which may have no fleet's folder.
fn run_for_nodes(context: &NodeContext, command: &Command) -> Result<CommandResult> {
    match command {
        Command::Status(args) => look::status(context, args, View::State).map(CommandResult::Status),
        Command::Top(args) => look::status(context, args, View::Loads).map(CommandResult::Top),
        Command::Logs(args) => look::logs(context, args),
        Command::Units(args) => look::units(context, args),
        Command::Net(args) => net::net(context, args),
        Command::Disk(args) => disk::disk(context, args),
        Command::Audit(args) => audit::audit(context, args),
        Command::Backup(command) => backup::run(context, command),
        Command::Pcap(args) => pcap::pcap(context, args),
        Command::Open(args) => look::open(context, args),
        Command::Alert(command) => alert::run(context, command),
        Command::Mail(command) => mail::run(context, command),
        Command::Report(args) => look::report(context, args),
        Command::Restart(args) => steer::restart(context, args),
        Command::Reboot(args) => steer::reboot(context, args),
        Command::Poweroff(args) => steer::poweroff(context, args),
        Command::Switchover(args) => steer::switchover(context, args),
        Command::Drain(args) => steer::drain(context, args),
        Command::Undrain(args) => steer::undrain(context, args),
        Command::Exec(args) => steer::exec(context, args),
        Command::Psql(args) => psql::psql(context, args),
        Command::Odoo(command) => odoo::run(context, command),
        Command::Operator(OperatorCommand::Wireguard(args)) => operator_wireguard::wireguard(context, args),
        _ => unreachable!("`run` runs the other commands"),
    }
}

/// Exits at Ctrl-C and SIGTERM. Unfinished files have no final name yet, and the kernel kills the sandbox and its
/// children with this process.
fn handle_signals(output: Output) {
    let signals = signal_hook::iterator::Signals::new([signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM]);
    if let Ok(mut signals) = signals {
        std::thread::spawn(move || {
            let mut signals = signals.forever();
            if signals.any(|signal| signal != signal_hook::consts::SIGINT || !open_postgres::is_in_psql()) {
                match output.command {
                    // These commands run until Ctrl-C.
                    Some("logs" | "open" | "pcap" | "status" | "top") => {}
                    Some("psql") => line("\ninterrupted; the node cancels the SQL"),
                    Some(
                        "exec" | "odoo shell" | "restart" | "reboot" | "poweroff" | "switchover" | "drain" | "undrain",
                    ) => {
                        line("\ninterrupted; the node may continue: `bakehouse status` shows what it does");
                    }
                    _ => line("\ninterrupted; run the same command to continue from here"),
                }
                output.interrupted();
                open_postgres::clean_up();
                std::process::exit(130);
            }
        });
    }
}
