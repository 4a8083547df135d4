//! The command line: parses the arguments and runs the commands.

mod args;
mod build;
mod context;
mod envelope;
mod explain;
mod hints;
mod init;
mod inspect;
mod install;
mod machines;
mod next;
mod output;
#[cfg(test)]
mod pages;
mod problem;
mod reference;
mod rehearse;
mod results;
mod rollout;
mod schema;
mod ticket;

use std::cell::RefCell;
use std::process::ExitCode;

use fleet::RolloutOrder;

use crate::deploy::export::ExportOptions;
use crate::deploy::flash::FlashOptions;
use crate::error::Result;
use crate::progress::{Progress, line};
use crate::project::Project;

use args::{Cli, Command, StoreCommand};
use context::Context;
use output::Output;
use results::{CommandResult, Event};

pub use reference::page;
pub use schema::{commands as json_commands, json_page, json_schema};

/// Runs the command line. Prints errors to standard error, and with `--json` also to standard output.
#[must_use]
pub fn main() -> ExitCode {
    let cli = match args::parse() {
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
        Command::Ticket { to, uses, days, replace, output, endpoint, revoke: None, list: false } => {
            let (to, output) = (to.as_deref().unwrap_or_default(), output.as_deref());
            let (uses, days, replace) = (*uses, *days, *replace);
            ticket::new(context, &ticket::NewTicket { to, uses, days, replace, output, endpoint })
        }
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
        Command::Status => Ok(machines::status(context)),
        Command::Console { node, follow } => machines::console(context, node, *follow),
        Command::Exec { node, command } => machines::exec(context, node, command),
        Command::Rehearse { scenarios, repeat, page, revision } => {
            rehearse::rehearse(context, scenarios, *repeat, page.as_deref(), revision.as_deref())
        }
        Command::Report { output } => machines::report(context, output),
        Command::Explain { path, group } => explain::explain(context, path, group.as_deref()),
        Command::Init { .. }
        | Command::Store(_)
        | Command::Schema { .. }
        | Command::Completions { .. }
        | Command::Man { .. } => unreachable!("`run` runs these"),
    }
}

/// Exits at Ctrl-C and SIGTERM. Unfinished files have no final name yet, and the kernel kills the sandbox and its
/// children with this process.
fn handle_signals(output: Output) {
    let signals = signal_hook::iterator::Signals::new([signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM]);
    if let Ok(mut signals) = signals {
        std::thread::spawn(move || {
            if signals.forever().next().is_some() {
                line("\ninterrupted; run the same command to continue from here");
                output.interrupted();
                std::process::exit(130);
            }
        });
    }
}
