//! What the commands do.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::io::{self, IsTerminal as _, Write as _};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser as _;
use fleet::{Diagnostics, RolloutOrder, ha_table};

use crate::assemble::secure_boot::Signer;
use crate::bake::pretty_json;
use crate::deploy::export::{self, export};
use crate::deploy::hub_client::{Hubs, describe};
use crate::deploy::{flash, netboot, publish};
use crate::error::{Error, Result};
use crate::image::{Build, Image};
use crate::keys::authority::{Authority, write_private};
use crate::keys::ticket::{CARRIED, Terms, mint};
use crate::keys::ticket_log;
use crate::packages::explain::explain;
use crate::packages::fetch::fetch;
use crate::packages::lock::{Lock, TOOLS};
use crate::packages::mirror::Mirror;
use crate::packages::resolve::resolve;
use crate::progress::{Progress, line};
use crate::project::check;
use crate::project::{Project, Recipe};
use crate::store::{Store, write_atomic};
use crate::toolchain::Tools;
use crate::vm::report;
use crate::{compose, project, rehearse, vm};

mod args;

use args::{Cli, Command, MirrorArg, StoreCommand};

/// Runs the command line; errors go to standard error.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    interruptible();
    match run(&cli) {
        Ok(code) => code,
        Err(e) => {
            complain(&e, cli.json);
            e.exit_code()
        }
    }
}

fn run(cli: &Cli) -> Result<ExitCode> {
    let progress = Progress::new(cli.quiet, cli.verbose);
    match &cli.command {
        Command::Store(StoreCommand::Gc { older_than }) => {
            let (count, bytes) = Store::open()?.gc(Duration::from_secs(older_than * 86_400))?;
            progress.say("gc", &format!("{count} entries, {:.0} MB removed", bytes as f64 / 1e6));
            return Ok(ExitCode::SUCCESS);
        }
        Command::Init { dir, from, secure_boot, passphrase } => {
            return init(dir, from, *secure_boot, *passphrase, &progress);
        }
        Command::Exec { node, command } => {
            let project = Project::load(&cli.fleet)?;
            let done = vm::Vm::of(&project, node)?.exec(&vm::command_line(command))?;
            print(done.output)?;
            return Ok(ExitCode::from(u8::try_from(done.status).unwrap_or(1)));
        }
        _ => {}
    }
    let project = Project::load(&cli.fleet)?;
    let warn = || {
        let shown = project.warnings.iter().map(|w| w.render(colour()));
        shown.for_each(|w| {
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
            let (authority, endpoints) = (Authority::of(&project)?, asked_at(&project, endpoint)?);
            let known = Hubs { authority: &authority, topology: &project.topology, endpoints }.tokens();
            if let Err(e) = &known {
                progress.say("ticket", &format!("nobody says how often each was used: {e}"));
            }
            let rows = ticket_log::rows(&project.dir, known.ok().as_ref())?;
            print_json(cli.json, &rows)?;
            if !cli.json {
                print(ticket_log::table(&rows))?;
            }
        }
        Command::Ticket { revoke: Some(number), endpoint, .. } => {
            let authority = Authority::of(&project)?;
            let endpoints = asked_at(&project, endpoint)?;
            let hub = Hubs { authority: &authority, topology: &project.topology, endpoints }.revoke(number)?;
            progress.say("ticket", &format!("{number} is revoked, says {hub}"));
        }
        Command::Leave { node, now, endpoint } => {
            project.node(node)?;
            let authority = Authority::of(&project)?;
            let endpoints = asked_at(&project, endpoint)?;
            let hub = Hubs { authority: &authority, topology: &project.topology, endpoints }.leave(node, *now)?;
            let what = if *now { "is shut out" } else { "is told to leave" };
            progress.say("leave", &format!("{node} {what}, says {hub}"));
        }
        Command::Ticket { to, uses, days, replace, output, endpoint, revoke: None, list: false } => {
            let lasts = Duration::from_secs(u64::from(*days) * 86_400);
            let terms = Terms { uses: *uses, lasts, replace: *replace };
            let to = to.as_deref().unwrap_or_default();
            let ticket =
                mint(&Authority::of(&project)?, &project.topology, to, &terms, endpoints(&project, endpoint)?)?;
            ticket_log::note(&project.dir, &ticket)?;
            if let Some(claims) = ticket.token().and_then(fleet::Token::read) {
                progress.say("ticket", &format!("number {}: for {to}, {uses} times within {days} days", claims.id));
            }
            let text = serde_json::to_string(&ticket).map_err(|e| Error::Failed(e.to_string()))?;
            match output {
                Some(path) => write_private(path, text.as_bytes())?,
                None => print(format_args!("{text}\n"))?,
            }
        }
        Command::Flash { to, target, yes, force, replace, no_ticket, mirror } => {
            let group = flash::group_of(&project.topology, to)?.to_owned();
            let terms = Terms { replace: *replace, ..CARRIED };
            let mint = || mint(&Authority::of(&project)?, &project.topology, to, &terms, BTreeMap::new());
            // Said before the work: there may be no such ticket.
            let ticket = if *no_ticket { None } else { Some(mint()?) };
            ticket.iter().try_for_each(|ticket| ticket_log::note(&project.dir, ticket))?;
            let images = build(&project, &[group], None, mirror, &progress)?;
            let order = flash::Order { target, yes: *yes, force: force.as_deref(), json: cli.json };
            let tools = Tools::prepare(&Lock::load(&project)?, &Store::open()?, &progress)?;
            for image in &images {
                let secure = project.fleet.secure_boot.is_some();
                let carried = ticket.as_ref().map(|ticket| flash::Carried { ticket, secure, tools: &tools });
                flash::flash(&image.disk, carried.as_ref(), &order, &progress)?;
            }
        }
        Command::Vm { node, format, ticket, replace, output, mirror } => {
            let group = vm::groups_of(&project, std::slice::from_ref(node))?;
            let order = export::Order { node, format: *format, way: *ticket, replace: *replace };
            let images = build(&project, &group, None, mirror, &progress)?;
            let tools = Tools::prepare(&Lock::load(&project)?, &Store::open()?, &progress)?;
            for image in &images {
                let written = export(&project, image, &order, output, &tools, &progress)?;
                print_json(cli.json, &written)?;
            }
        }
        Command::Netboot { interface, dhcp, again, approve, mirror } => {
            for code in netboot::approve(&project, approve)? {
                progress.say("netboot", &format!("{code} is confirmed; its machine asks again within 15 s"));
            }
            let Some(interface) = interface else {
                if again.is_empty() && dhcp.is_none() {
                    return Ok(ExitCode::SUCCESS);
                }
                return Err(Error::Usage(
                    "--again and --dhcp need --interface: they are for a server that starts".into(),
                ));
            };
            let images = build(&project, &netboot::groups(&project)?, None, mirror, &progress)?;
            let (store, lock) = (Store::open()?, Lock::load(&project)?);
            let build = Build { project: &project, lock: &lock, store: &store, progress: &progress, revision: None };
            netboot::netboot(&build, &images, &netboot::Order { interface, dhcp: *dhcp, again, json: cli.json })?;
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
            let course = publish::Course::of(&project.topology, &plans);
            print_json(cli.json, &serde_json::json!({ "groups": plans, "course": course }))?;
            if !cli.json {
                for plan in &plans {
                    print(plan)?;
                }
                print(course)?;
            }
            if plans.iter().any(|plan| !plan.obstacles.is_empty()) {
                return Ok(ExitCode::FAILURE);
            }
        }
        Command::Publish { dir, groups, mirror } => {
            // Said before the work: there may be no key.
            let key = Authority::of(&project)?.update_key()?;
            let images = build(&project, groups, None, mirror, &progress)?;
            let time = Lock::load(&project)?.epoch;
            let published =
                images.iter().map(|i| publish::publish(i, dir, &key, time, &progress)).collect::<Result<Vec<_>>>()?;
            print_json(cli.json, &published)?;
        }
        Command::Rollout { pause, resume, allow, skip, endpoint } => {
            skip.as_deref().map_or(Ok(()), |node| project.node(node).map(drop))?;
            let authority = Authority::of(&project)?;
            let endpoints = asked_at(&project, endpoint)?;
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
            board(&project, cli.json)?;
        }
        Command::Rehearse { scenarios, repeat, page, revision } => {
            let chosen = rehearse::chosen(scenarios)?;
            let rehearsal = rehearse::Rehearsal::new(&project, &progress)?;
            let page = page
                .as_deref()
                .map(|path| rehearse::Page::open(&project, path, rehearsal.machines, revision.as_deref()));
            let page = page.transpose()?;
            let mut outcomes = Vec::new();
            // What was seen is told and kept, whatever comes after.
            let played = rehearsal.play(&chosen, *repeat, |seen| {
                outcomes = seen.to_vec();
                page.as_ref().map_or(Ok(()), |page| page.write(seen))
            });
            let told = if cli.json { print_json(true, &outcomes) } else { print(rehearse::table(&outcomes)) };
            played.and(told)?;
            if outcomes.iter().any(|o| !o.broken.is_empty()) {
                return Ok(ExitCode::FAILURE);
            }
        }
        Command::Report { output } => report::collect(&project, output, &progress)?,
        Command::Down { nodes } => vm::down(&project, nodes, &progress)?,
        Command::Status => board(&project, cli.json)?,
        Command::Explain { path, group } => {
            let groups = project.groups(&group.iter().cloned().collect::<Vec<_>>())?;
            let [group] = groups[..] else {
                return Err(Error::Usage(format!("which image? add --group: {}", groups.join(", "))));
            };
            let explanation = explain(&project, group, path)?;
            print_json(cli.json, &explanation)?;
            if !cli.json {
                print(format_args!("{explanation}\n"))?;
            }
        }
        Command::Console { node } => print(vm::Vm::of(&project, node)?.console())?,
        Command::Init { .. } | Command::Store(_) | Command::Exec { .. } => {}
    }
    Ok(ExitCode::SUCCESS)
}

fn board(project: &Project, json: bool) -> Result<()> {
    let board = vm::Board::read(project);
    print_json(json, &board)?;
    if !json {
        print(board)?;
    }
    Ok(())
}

fn print_json(wanted: bool, value: &impl serde::Serialize) -> Result<()> {
    if wanted {
        print(String::from_utf8_lossy(&pretty_json(value)?))?;
    }
    Ok(())
}

/// Gives the answer: on standard output.
fn print(answer: impl Display) -> Result<()> {
    let mut out = io::stdout().lock();
    write!(out, "{answer}").and_then(|()| out.flush()).map_err(|e| match e.kind() {
        io::ErrorKind::BrokenPipe => Error::Unread,
        _ => Error::io("write", "standard output")(e),
    })
}

fn lock(project: &Project, mirror: &Mirror, store: &Store, progress: &Progress, update: bool) -> Result<()> {
    let path = Lock::path(project);
    if !update && Lock::load(project).is_ok() {
        progress.say("lock", &format!("{} serves; newer packages: bakehouse lock --update", path.display()));
        return Ok(());
    }
    let old = Lock::read(&path).unwrap_or(None);
    let new = resolve(project, mirror, store, progress)?;
    new.write(&path)?;
    let changes = old.map(|old| new.changes_from(&old)).unwrap_or_default();
    changes.iter().try_for_each(|change| print(format_args!("{change}\n")))
}

fn build(
    project: &Project,
    groups: &[String],
    revision: Option<&str>,
    mirror: &MirrorArg,
    progress: &Progress,
) -> Result<Vec<Image>> {
    let store = Store::open()?;
    let lock = Lock::load(project)?;
    let groups = project.groups(groups)?;
    let recipes: Vec<Recipe> = groups.iter().map(|g| project.recipe(g)).collect();
    let missing: Vec<_> = recipes
        .iter()
        .filter(|r| compose::in_store(r, &lock, &store).is_none())
        .map(|r| r.group.as_str())
        .chain([TOOLS])
        .flat_map(|image| lock.packages_of(image, false))
        .filter(|p| !store.has_deb(p))
        .collect();
    if !missing.is_empty() {
        fetch(&missing, &Mirror::of(project, mirror.mirror.as_deref())?, &store, progress)?;
    }
    let build = Build { project, lock: &lock, store: &store, progress, revision };
    groups.iter().map(|g| build.image(g)).collect()
}

fn complain(e: &Error, json: bool) {
    match e {
        Error::Config(Diagnostics(all)) if json => {
            // It has failed already.
            let _ = print_json(true, &all);
        }
        Error::Unread => {}
        Error::Config(Diagnostics(all)) => all.iter().for_each(|d| line(&format!("{}\n", d.render(colour())))),
        e => {
            let word = if colour() { "\u{1b}[1;31merror\u{1b}[0m" } else { "error" };
            line(&format!("{word}: {e}"));
        }
    }
}

/// A folder with a fleet.toml of the folder's name, and a key. What is there already stays.
fn init(dir: &Path, from: &str, secure_boot: bool, passphrase: bool, progress: &Progress) -> Result<ExitCode> {
    let text = project::built_in_fleet(from)?;
    std::fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
    // `.` has a name too; a symbolic link keeps its own.
    let named =
        if dir.file_name().is_some() { dir.to_owned() } else { dir.canonicalize().map_err(Error::io("find", dir))? };
    let missing = || Error::Usage(format!("`{}` has no name to give the fleet", dir.display()));
    let name = named.file_name().and_then(|n| n.to_str()).ok_or_else(missing)?;
    let path = dir.join("fleet.toml");
    if !path.exists() {
        let text = text.replacen(&format!("name = \"{from}\""), &format!("name = \"{name}\""), 1);
        let section =
            if secure_boot { "\n# What firmware runs is signed (docs/secure-boot.md).\n[secure_boot]\n" } else { "" };
        write_atomic(&path, (text + section).as_bytes())?;
        progress.say("init", &format!("{}: change it to what you want", path.display()));
    }
    let project = Project::load(dir)?;
    let key = project.dir.join(Authority::FILE);
    if Authority::init(&project.dir, &project.topology.name, passphrase)? {
        progress.say("init", &format!("{}: a secret; keep it off the nodes, and keep a copy", key.display()));
    } else if passphrase {
        Authority::of(&project)?.seal(&project.dir)?;
        progress.say("init", &format!("{}: of use only with its new passphrase", key.display()));
    }
    if let Some(signer) = Signer::of(&project) {
        if signer.init(&project.topology.name)? {
            let key = signer.key().display();
            progress.say("init", &format!("{key}: signs what firmware runs; a secret, and keep a copy"));
        }
    } else if secure_boot {
        return Err(Error::Usage(format!("{} has no [secure_boot]; add it", path.display())));
    }
    let keyring = project.dir.join(Project::UPDATE_KEYRING);
    let wanted = Authority::of(&project)?.update_key()?.keyring();
    if std::fs::read(&keyring).ok().as_ref() != Some(&wanted) {
        write_atomic(&keyring, &wanted)?;
        progress.say("init", &format!("{}: what nodes verify updates with; public", keyring.display()));
    }
    Ok(ExitCode::SUCCESS)
}

/// Where this machine asks the hubs: `local` are those that `up` started.
fn asked_at(project: &Project, given: &[String]) -> Result<BTreeMap<String, String>> {
    if given == ["local"] { Ok(vm::doors(project)) } else { endpoints(project, given) }
}

/// `hub-1=192.0.2.1`, for hubs that there are.
fn endpoints(project: &Project, given: &[String]) -> Result<BTreeMap<String, String>> {
    let of = |text: &String| {
        let (hub, host) = text.split_once('=').unwrap_or((text, ""));
        let known = project.topology.hubs.iter().any(|h| h.name == hub);
        if known && !host.is_empty() {
            return Ok((hub.to_owned(), host.to_owned()));
        }
        let hubs: Vec<&str> = project.topology.hubs.iter().map(|h| h.name.as_str()).collect();
        Err(Error::Usage(format!("`{text}` is not HUB=HOST; hubs are {}", hubs.join(", "))))
    };
    given.iter().map(of).collect()
}

fn colour() -> bool {
    std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none()
}

/// Ctrl-C ends at once: whatever was being made has no final name yet, and the sandbox and
/// its children die with us.
fn interruptible() {
    let signals = signal_hook::iterator::Signals::new([signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM]);
    if let Ok(mut signals) = signals {
        std::thread::spawn(move || {
            if signals.forever().next().is_some() {
                line("\ninterrupted; nothing half-made was kept, the same command goes on from here");
                std::process::exit(130);
            }
        });
    }
}
