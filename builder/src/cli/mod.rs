//! The command line: parses the arguments and runs the commands.

mod args;
mod build;
mod init;
mod output;

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::Parser as _;
use fleet::{RolloutOrder, ha_table};

use crate::deploy::export::{self, export};
use crate::deploy::hub_client::{Hubs, describe};
use crate::deploy::{flash, netboot, publish};
use crate::error::{Error, Result};
use crate::image::Build;
use crate::keys::authority::FleetKey;
use crate::keys::ticket::{DEFAULT_TERMS, TicketTerms, mint};
use crate::keys::ticket_log;
use crate::packages::explain::explain;
use crate::packages::fetch::fetch;
use crate::packages::lock::Lock;
use crate::packages::mirror::Mirror;
use crate::progress::{Progress, line};
use crate::project::{Project, check};
use crate::rehearse;
use crate::store::Store;
use crate::toolchain::Tools;
use crate::util::fs::write_private;
use crate::vm::{self, report};

use args::{Cli, Command, StoreCommand};
use build::{build, lock};
use init::init;
use output::{colour, print, print_error, print_json};

/// Runs the command line. Prints errors to standard error.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    handle_signals();
    match run(&cli) {
        Ok(code) => code,
        Err(e) => {
            print_error(&e, cli.json);
            e.exit_code()
        }
    }
}

fn run(cli: &Cli) -> Result<ExitCode> {
    let progress = Progress::new(cli.quiet, cli.verbose);
    match &cli.command {
        Command::Store(StoreCommand::Gc { older_than }) => {
            let (count, bytes) = Store::open()?.gc(Duration::from_secs(older_than * 86_400))?;
            progress.say("gc", &format!("removed {count} entries, {:.0} MB", bytes as f64 / 1e6));
            return Ok(ExitCode::SUCCESS);
        }
        Command::Init { dir, from, secure_boot, passphrase } => {
            return init(dir, from, *secure_boot, *passphrase, &progress);
        }
        Command::Exec { node, command } => {
            let project = Project::load(&cli.fleet)?;
            let vm = vm::Vm::of(&project, node)?;
            if !vm.is_running() {
                return Err(Error::Failed(format!(
                    "{node} does not run on this host\n  help: `bakehouse up {node}` starts it as a local machine"
                )));
            }
            let done = vm.exec(&vm::command_line(command))?;
            print(done.output)?;
            return Ok(ExitCode::from(u8::try_from(done.status).unwrap_or(1)));
        }
        _ => {}
    }
    let project = Project::load(&cli.fleet)?;
    let warn = || {
        let rendered = project.warnings.iter().map(|w| w.render(colour()));
        rendered.for_each(|w| {
            if !cli.quiet && !cli.json {
                line(&w);
            }
        });
    };
    match &cli.command {
        Command::Check => {
            warn();
            check::dry_bake(&project)?;
            let table = ha_table(&project.topology);
            print_json(
                cli.json,
                &serde_json::json!({ "warnings": project.warnings, "nodes": table, "voters": project.topology.voters }),
            )?;
            if !cli.json {
                print(format_args!("{}\n", check::table(&project)))?;
            }
        }
        Command::Ticket { list: true, endpoint, .. } => {
            let (authority, endpoints) = (FleetKey::of(&project)?, hub_endpoints(&project, endpoint)?);
            let known = Hubs { authority: &authority, topology: &project.topology, endpoints }.tokens();
            if let Err(e) = &known {
                progress.say("ticket", &format!("cannot list how often each ticket was used: {e}"));
            }
            let rows = ticket_log::rows(&project.dir, known.ok().as_ref())?;
            print_json(cli.json, &rows)?;
            if !cli.json {
                print(ticket_log::table(&rows))?;
            }
        }
        Command::Ticket { revoke: Some(number), endpoint, .. } => {
            let authority = FleetKey::of(&project)?;
            let endpoints = hub_endpoints(&project, endpoint)?;
            let hub = Hubs { authority: &authority, topology: &project.topology, endpoints }.revoke(number)?;
            progress.say("ticket", &format!("{hub} revoked {number}"));
        }
        Command::Leave { node, now, endpoint } => {
            project.node(node)?;
            let authority = FleetKey::of(&project)?;
            let endpoints = hub_endpoints(&project, endpoint)?;
            let hub = Hubs { authority: &authority, topology: &project.topology, endpoints }.leave(node, *now)?;
            let message = if *now { format!("{hub} evicted {node}") } else { format!("{hub} asked {node} to leave") };
            progress.say("leave", &message);
        }
        Command::Ticket { to, uses, days, replace, output, endpoint, revoke: None, list: false } => {
            let limited = uses.is_some() || days.is_some();
            let (uses, days) = (uses.unwrap_or(1), days.unwrap_or(1));
            let lasts = Duration::from_secs(u64::from(days) * 86_400);
            let terms = TicketTerms { uses, lasts, replace: *replace };
            let to = to.as_deref().unwrap_or_default();
            let ticket = mint(&FleetKey::of(&project)?, &project.topology, to, &terms, endpoints(&project, endpoint)?)?;
            let message = if let Some(claims) = ticket.token().and_then(fleet::Token::read) {
                format!("number {}: for {to}, {uses} uses within {days} days", claims.id)
            } else if limited {
                return Err(Error::Usage(format!(
                    "{to} is a founder (hub or voter), whose ticket has no limits\n  help: leave out --uses and --days"
                )));
            } else {
                format!("for {to}, a founder (hub or voter): it does not expire; keep it secret")
            };
            ticket_log::note(&project.dir, &ticket)?;
            progress.say("ticket", &message);
            let text = serde_json::to_string(&ticket).map_err(|e| Error::Failed(e.to_string()))?;
            match output {
                Some(path) => write_private(path, text.as_bytes())?,
                None => print(format_args!("{text}\n"))?,
            }
        }
        Command::Flash { to, target, yes, force, replace, no_ticket, mirror } => {
            let group = flash::group_of(&project.topology, to)?.to_owned();
            let terms = TicketTerms { replace: *replace, ..DEFAULT_TERMS };
            let mint = || mint(&FleetKey::of(&project)?, &project.topology, to, &terms, BTreeMap::new());
            // Before the build, so that an impossible ticket fails early.
            let ticket = if *no_ticket { None } else { Some(mint()?) };
            ticket.iter().try_for_each(|ticket| ticket_log::note(&project.dir, ticket))?;
            let images = build(&project, &[group], None, mirror, &progress)?;
            let options = flash::FlashOptions { target, yes: *yes, force: force.as_deref(), json: cli.json };
            let tools = Tools::prepare(&Lock::load(&project)?, &Store::open()?, &progress)?;
            for image in &images {
                let secure = project.fleet.secure_boot.is_some();
                let ticket = ticket.as_ref().map(|ticket| flash::TicketFile { ticket, secure, tools: &tools });
                flash::flash(&image.disk, ticket.as_ref(), &options, &progress)?;
            }
        }
        Command::Vm { node, format, ticket, replace, yes, output, mirror } => {
            let group = vm::groups_of(&project, std::slice::from_ref(node))?;
            let options =
                export::ExportOptions { node, format: *format, transport: *ticket, replace: *replace, yes: *yes };
            // Before the build, so that an existing file fails early.
            options.check(output)?;
            let images = build(&project, &group, None, mirror, &progress)?;
            let tools = Tools::prepare(&Lock::load(&project)?, &Store::open()?, &progress)?;
            for image in &images {
                let written = export(&project, image, &options, output, &tools, &progress)?;
                print_json(cli.json, &written)?;
            }
        }
        Command::Netboot { interface, dhcp, again, approve, mirror } => {
            for code in netboot::approve(&project, approve)? {
                progress.say("netboot", &format!("confirmed {code}; its machine continues within 15 s"));
            }
            let Some(interface) = interface else {
                if again.is_empty() && dhcp.is_none() {
                    return Ok(ExitCode::SUCCESS);
                }
                return Err(Error::Usage(
                    "--again and --dhcp start a server, which needs --interface\n  help: add --interface NAME".into(),
                ));
            };
            let images = build(&project, &netboot::groups(&project)?, None, mirror, &progress)?;
            let (store, lock) = (Store::open()?, Lock::load(&project)?);
            let build = Build { project: &project, lock: &lock, store: &store, progress: &progress, revision: None };
            netboot::netboot(
                &build,
                &images,
                &netboot::NetbootOptions { interface, dhcp: *dhcp, again, json: cli.json },
            )?;
        }
        Command::Lock { update, mirror } => {
            let store = Store::open()?;
            let mirror = Mirror::of(&project, mirror.mirror.as_deref())?;
            lock(&project, &mirror, &store, &progress, *update)?;
        }
        Command::Fetch { mirror } => {
            let store = Store::open()?;
            let mirror = Mirror::of(&project, mirror.mirror.as_deref())?;
            let lock = Lock::load(&project)?;
            fetch(&lock.packages.iter().collect::<Vec<_>>(), &mirror, &store, &progress)?;
        }
        Command::Build { groups, revision, mirror } => {
            let images = build(&project, groups, revision.as_deref(), mirror, &progress)?;
            print_json(cli.json, &images)?;
        }
        Command::Plan { dir, groups, mirror } => {
            let images = build(&project, groups, None, mirror, &progress)?;
            let plans = images.iter().map(|i| publish::compare(i, dir)).collect::<Result<Vec<_>>>()?;
            let schedule = publish::RolloutSchedule::of(&project.topology, &plans);
            print_json(cli.json, &serde_json::json!({ "groups": plans, "course": schedule }))?;
            if !cli.json {
                for plan in &plans {
                    print(plan)?;
                }
                print(schedule)?;
            }
            if plans.iter().any(|plan| !plan.obstacles.is_empty()) {
                return Ok(ExitCode::FAILURE);
            }
        }
        Command::Publish { dir, groups, mirror } => {
            // Before the build, so that a missing key fails early.
            let key = FleetKey::of(&project)?.update_key()?;
            let images = build(&project, groups, None, mirror, &progress)?;
            // Nodes raise an alert if the signature is old. A new publication has to clear it, so it gets today's date.
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
            let time = Lock::load(&project)?.epoch.max(now);
            let published =
                images.iter().map(|i| publish::publish(i, dir, &key, time, &progress)).collect::<Result<Vec<_>>>()?;
            print_json(cli.json, &published)?;
        }
        Command::Rollout { pause, resume, allow, skip, endpoint } => {
            skip.as_deref().map_or(Ok(()), |node| project.node(node).map(drop))?;
            let authority = FleetKey::of(&project)?;
            let endpoints = hub_endpoints(&project, endpoint)?;
            let order = match (pause, allow, skip) {
                (Some(why), ..) => RolloutOrder::Pause { why: why.clone() },
                (_, Some(version), _) => RolloutOrder::Allow { version: version.clone() },
                (.., Some(node)) => RolloutOrder::Skip { node: node.clone() },
                _ if *resume => RolloutOrder::Resume,
                _ => RolloutOrder::Tell,
            };
            let rollout = Hubs { authority: &authority, topology: &project.topology, endpoints }.rollout(order)?;
            print_json(cli.json, &rollout)?;
            if !cli.json {
                print(describe(&rollout))?;
            }
        }
        Command::Up { nodes, containers, mirror } => {
            warn();
            let groups = vm::groups_of(&project, nodes)?;
            vm::are_containers(&project, *containers)?;
            build(&project, &groups, None, mirror, &progress)?;
            vm::up(&project, nodes, &progress)?;
            status(&project, cli.json)?;
        }
        Command::Rehearse { scenarios, repeat, page, revision } => {
            let chosen = rehearse::chosen(scenarios)?;
            let rehearsal = rehearse::Rehearsal::new(&project, &progress)?;
            let page = page
                .as_deref()
                .map(|path| rehearse::Page::open(&project, path, rehearsal.machines, revision.as_deref()));
            let page = page.transpose()?;
            let mut outcomes = Vec::new();
            // After an error, the command still prints the outcomes of earlier runs.
            let played = rehearsal.play(&chosen, *repeat, |so_far| {
                outcomes = so_far.to_vec();
                page.as_ref().map_or(Ok(()), |page| page.write(so_far))
            });
            let printed = if cli.json { print_json(true, &outcomes) } else { print(rehearse::table(&outcomes)) };
            played.and(printed)?;
            if outcomes.iter().any(|o| !o.broken.is_empty()) {
                return Ok(ExitCode::FAILURE);
            }
        }
        Command::Report { output } => {
            let nodes = &project.topology.nodes;
            if !nodes.iter().any(|node| vm::Vm::of(&project, &node.name).is_ok_and(|vm| vm.is_running())) {
                return Err(Error::Failed(
                    "no machine of the fleet runs on this host\n  help: `bakehouse up` starts local machines; \
                     `bakehouse rollout` shows the nodes of a real fleet"
                        .to_owned(),
                ));
            }
            report::collect(&project, output, &progress)?;
        }
        Command::Down { nodes } => vm::down(&project, nodes, &progress)?,
        Command::Status => status(&project, cli.json)?,
        Command::Explain { path, group } => {
            let groups = project.groups(&group.iter().cloned().collect::<Vec<_>>())?;
            let [group] = groups[..] else {
                let groups = groups.join(", ");
                return Err(Error::Usage(format!(
                    "the fleet has several images\n  help: add --group, one of {groups}"
                )));
            };
            let explanation = explain(&project, group, path)?;
            print_json(cli.json, &explanation)?;
            if !cli.json {
                print(format_args!("{explanation}\n"))?;
            }
        }
        Command::Console { node } => {
            let console = vm::Vm::of(&project, node)?.console();
            if console.is_empty() {
                return Err(Error::Failed(format!(
                    "{node} has no console here: it was not started on this host\n  help: `bakehouse up {node}` starts \
                     it as a local machine"
                )));
            }
            print(console)?;
        }
        Command::Init { .. } | Command::Store(_) | Command::Exec { .. } => {}
    }
    Ok(ExitCode::SUCCESS)
}

fn status(project: &Project, json: bool) -> Result<()> {
    let status = vm::FleetStatus::read(project);
    print_json(json, &status)?;
    if !json {
        print(status)?;
    }
    Ok(())
}

/// Parses `--endpoint`. `local` selects the hubs that `up` started.
fn hub_endpoints(project: &Project, given: &[String]) -> Result<BTreeMap<String, String>> {
    if given == ["local"] { Ok(vm::hub_forwards(project)) } else { endpoints(project, given) }
}

/// Parses `hub-1=192.0.2.1`. Rejects hubs that the fleet does not have.
fn endpoints(project: &Project, given: &[String]) -> Result<BTreeMap<String, String>> {
    let parse = |text: &String| {
        let (hub, host) = text.split_once('=').unwrap_or((text, ""));
        let known = project.topology.hubs.iter().any(|h| h.name == hub);
        if known && !host.is_empty() {
            return Ok((hub.to_owned(), host.to_owned()));
        }
        let hubs: Vec<&str> = project.topology.hubs.iter().map(|h| h.name.as_str()).collect();
        Err(Error::Usage(format!("`{text}` is not HUB=HOST; hubs are {}", hubs.join(", "))))
    };
    given.iter().map(parse).collect()
}

/// Exits at Ctrl-C and SIGTERM. Unfinished files have no final name yet, and the kernel kills the sandbox and its
/// children with this process.
fn handle_signals() {
    let signals = signal_hook::iterator::Signals::new([signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM]);
    if let Ok(mut signals) = signals {
        std::thread::spawn(move || {
            if signals.forever().next().is_some() {
                line("\ninterrupted; run the same command to continue from here");
                std::process::exit(130);
            }
        });
    }
}
