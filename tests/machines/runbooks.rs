//! Every command that an alert, `docs/operations.md` or a message of a node quotes runs on a fleet in containers. The
//! test of `journals.rs` starts the fleet.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpListener;
use std::process::Stdio;
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use bakehouse_tests::runbooks::{Alert, Quoted, all_alerts, of_alert, of_messages, of_operations};
use bakehouse_tests::{CommandOutput, TestFleet};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// Longest wait until all nodes are ready again, with a synchronous standby.
const LIMIT: Duration = Duration::from_secs(420);
/// Name of the secret in [alerts].
const SECRET: &str = "matrix";

/// Commands that do not run here, with the reason. `rehearse` and the update of a fleet have tests of their own.
const ELSEWHERE: &[(&str, &str)] = &[
    ("up", "the test has typed it"),
    ("rehearse", "containers.rs, quick_ha.rs"),
    ("publish", "rolling_update.rs: it needs an update server"),
    ("flash", "boot.rs: it writes a disk"),
    ("netboot", "netboot.rs: it serves a network"),
    ("leave", "tests/cluster/eviction.rs, fleet.rs: the node does not come back"),
    ("operator", "tests/cluster/operators.rs"),
];

/// A receiver of alerts on this host, which accepts every message.
pub(super) struct Receiver {
    port: u16,
}

impl Receiver {
    /// Listens until the test's process ends.
    pub(super) fn listen() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("a port").port();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                thread::spawn(move || -> Option<()> {
                    let mut reader = BufReader::new(stream.try_clone().ok()?);
                    loop {
                        let (mut length, mut line) = (0, String::new());
                        while reader.read_line(&mut line).is_ok_and(|n| n > 0) && line != "\r\n" {
                            let header = line.to_ascii_lowercase();
                            if let Some(value) = header.strip_prefix("content-length:") {
                                length = value.trim().parse().ok()?;
                            }
                            line.clear();
                        }
                        let mut body = vec![0; length];
                        reader.read_exact(&mut body).ok().filter(|()| length > 0)?;
                        (&stream).write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").ok()?;
                    }
                });
            }
        });
        Self { port }
    }

    fn url(&self) -> String {
        format!("http://192.0.2.100:{}/", self.port)
    }

    /// Returns the part of fleet.toml for the receiver.
    pub(super) fn settings(&self) -> String {
        format!("[alerts]\nwebhooks = [\"{}\"]\ndead_man = \"{0}\"\n[[alerts.matrix]]\n", self.url())
    }

    /// Stores the address of the second receiver as its secret.
    pub(super) fn store_secret(&self, lab: &TestFleet) {
        assert_eq!(with_input(lab, &["secret", SECRET], &self.url()).status, 0);
    }
}

pub(super) fn with_input(lab: &TestFleet, args: &[&str], input: &str) -> CommandOutput {
    let mut command = lab.command(args);
    let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = piped.current_dir(&lab.dir).spawn().expect("bakehouse starts");
    let mut pipe = child.stdin.take().expect("a pipe");
    pipe.write_all(input.as_bytes()).expect("a pipe");
    drop(pipe);
    CommandOutput::new(&child.wait_with_output().expect("the output"))
}

/// Runs every command: first those that only read, and last those that stop a machine. Returns those that fail.
pub(super) fn failing_commands(lab: &TestFleet) -> Vec<String> {
    let alerts = all_alerts();
    let of_alerts = alerts.iter().flat_map(|alert| of_alert(alert).into_iter().map(|quoted| named(alert, quoted)));
    let others = of_operations().into_iter().chain(of_messages()).map(|quoted| named(&Alert::default(), quoted));
    let mut commands: BTreeMap<Vec<String>, Quoted> = BTreeMap::new();
    for quoted in of_alerts.chain(others) {
        commands.entry(quoted.words()[1..].to_vec()).or_insert(quoted);
    }
    let units = units(lab);
    let mut commands: Vec<(Vec<String>, Quoted)> = commands.into_iter().collect();
    commands.sort_by_key(|(words, _)| danger(words));
    let (mut ran, mut failures) = (0, Vec::new());
    for (words, quoted) in commands {
        let verb = words[0].as_str();
        // The fleet has no certificate for browsers. `builder/src/project/web.rs` tests its secrets.
        let is_elsewhere = ELSEWHERE.iter().any(|(name, _)| *name == verb)
            || words.get(1).is_some_and(|w| ["acme_eab", "web_key"].contains(&w.as_str()));
        if is_elsewhere || is_incomplete(&words, &quoted) {
            println!("not run: {}", quoted.text);
            continue;
        }
        if let Some(why) = lacks_unit(&words, &units) {
            failures.push(format!("{}: `{}`: {why}", quoted.at, quoted.text));
        }
        let begun = Instant::now();
        let done = run(lab, &words);
        println!("{:>6.1} s  {} ({})", begun.elapsed().as_secs_f64(), quoted.text, quoted.at);
        if done.status != 0 {
            failures.push(format!("{}: `{}` ends with {}: {}", quoted.at, quoted.text, done.status, done.err));
        }
        if danger(&words) > 0 {
            comes_back(lab, &words);
        }
        ran += 1;
    }
    assert!(ran > 50, "only {ran} commands ran");
    failures
}

/// Replaces the words that stand for a name.
fn named(alert: &Alert, quoted: Quoted) -> Quoted {
    let node = match alert.name.as_str() {
        "MonitorDown" | "AlertsNotDelivered" | "MonitorBlind" | "BackupFailed" => "monitor-1",
        // The commands switch machines off.
        "TwoPrimaries" => "two-1",
        _ => "one-1",
    };
    let unit = match alert.name.as_str() {
        "BackupFailed" => "pgbackrest@incr.service",
        "MonitorDown" => "prometheus-blackbox-exporter.service",
        _ => "odoo-http.service",
    };
    let names = [
        ("NODE", node),
        ("MONITOR", "monitor-1"),
        ("HUB", "two-1"),
        ("UNIT", unit),
        ("SERVICE", "prometheus"),
        ("VERSION", "1"),
        ("KEY", "/bakehouse/none"),
        ("VALUE", "two-1"),
        ("db-1", "one-1"),
        ("app", "lost"),
    ];
    let replace = |word: &str| -> String {
        if word == "NAME" {
            return SECRET.to_owned();
        }
        // `NODE.ticket`, `systemd-journal-upload@MONITOR`
        let parts = word.split_inclusive(['@', '.']);
        parts
            .map(|part| {
                let end = part.trim_end_matches(['@', '.']).len();
                let (name, rest) = part.split_at(end);
                let known = names.iter().find(|(placeholder, _)| *placeholder == name);
                known.map_or(part.to_owned(), |(_, value)| format!("{value}{rest}"))
            })
            .collect()
    };
    let words = quoted.words();
    let follows = |at: usize, option: &str| at > 0 && words[at - 1] == option;
    let replaced = words.iter().enumerate().map(|(at, word)| match word.as_str() {
        role if follows(at, "--role") => role.to_owned(),
        "VALUE" if follows(at, "-u") || follows(at, "--unit") => "haproxy".to_owned(),
        word => replace(word),
    });
    let replaced: Vec<String> = replaced.collect();
    let text = shlex::try_join(replaced.iter().map(String::as_str)).expect("no zero byte");
    Quoted { text, ..quoted }
}

/// Whether a message or a sentence only names the command, without its arguments.
fn is_incomplete(words: &[String], quoted: &Quoted) -> bool {
    !quoted.whole && builder::cli::accepts(&[&["bakehouse".to_owned()], words].concat(), true).is_err()
}

/// Returns the order of a command: what a command stops, and for how long.
fn danger(words: &[String]) -> u32 {
    match words[0].as_str() {
        "restart" => 1,
        "switchover" => 2,
        "reboot" => 3,
        "poweroff" => 4,
        // The images change, and `up` gives a machine with another image an empty disk.
        "secret" => 5,
        _ => 0,
    }
}

/// Runs a command as a person types it, and with the consent and the addresses that a script has to give. A refusal that
/// asks for `--force` is an answer, too: the fleet has two hubs, two databases and three votes only.
fn run(lab: &TestFleet, words: &[String]) -> CommandOutput {
    let mut args: Vec<&str> = words.iter().map(String::as_str).collect();
    match args[0] {
        "restart" | "reboot" | "poweroff" | "switchover" => args.insert(1, "--yes"),
        // The names of the hubs in fleet.toml do not exist.
        "rollout" => args.extend(["--endpoint", "local"]),
        _ => {}
    }
    if args[0] == "open" {
        return open(lab, &args);
    }
    let input = if args[0] == "secret" { "http://192.0.2.100:9/" } else { "" };
    let done = with_input(lab, &args, input);
    let refusal = done.err.contains("--force ");
    if done.status != 1 || !refusal || danger(words) == 0 {
        return done;
    }
    println!("          refused: {}", done.err.trim().replace('\n', " "));
    let Some(node) = words.get(1) else { return done };
    args.extend(["--force", node]);
    with_input(lab, &args, "")
}

/// Runs a command that serves a link until Ctrl-C, and presses Ctrl-C when it has printed the link.
fn open(lab: &TestFleet, args: &[&str]) -> CommandOutput {
    let mut child = lab.command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("bakehouse starts");
    let mut link = String::new();
    let mut out = BufReader::new(child.stdout.take().expect("a pipe"));
    out.read_line(&mut link).expect("a line");
    let is_open = !link.is_empty();
    if is_open {
        kill(Pid::from_raw(i32::try_from(child.id()).expect("a pid")), Signal::SIGINT).expect("a process");
    }
    let mut done = CommandOutput::new(&child.wait_with_output().expect("the output"));
    // The shell's code for an end by SIGINT.
    if is_open && done.status == 130 {
        done.status = 0;
    }
    done
}

/// Returns the units of each node, and the roles of the nodes.
struct Units {
    of: BTreeMap<String, BTreeSet<String>>,
    roles: BTreeMap<String, Vec<String>>,
}

fn units(lab: &TestFleet) -> Units {
    let status = lab.run(&["status", "--json"]).result();
    let rows = status["nodes"].as_array().expect("the nodes").clone();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let roles: BTreeMap<String, Vec<String>> = rows
        .iter()
        .map(|row| (text(&row["node"]), row["roles"].as_array().expect("roles").iter().map(text).collect()))
        .collect();
    let mut of = BTreeMap::new();
    for node in roles.keys() {
        let listed = lab.ok(&["units", node, "--json"]).result();
        let names = listed["units"].as_array().expect("units").iter().map(|unit| text(&unit["name"])).collect();
        of.insert(node.clone(), names);
    }
    Units { of, roles }
}

/// Returns the reason if a command names a unit that its nodes do not have.
fn lacks_unit(words: &[String], units: &Units) -> Option<String> {
    let after = |option: &str| words.iter().position(|word| word == option).and_then(|at| words.get(at + 1));
    let unit = match words[0].as_str() {
        "logs" => after("-u").or_else(|| after("--unit"))?,
        "restart" => words.get(2)?,
        _ => return None,
    };
    let is_full = [".service", ".socket", ".target", ".timer"].iter().any(|suffix| unit.ends_with(suffix));
    let name = if is_full { unit.clone() } else { format!("{unit}.service") };
    // systemd unloads units that have ended, and those that only fleets with `[update]` have.
    let is_unloaded = name.starts_with("pgbackrest@") || name == "firstboot-check.service";
    let nodes: Vec<&String> = match after("--role") {
        Some(role) => units.roles.iter().filter(|(_, roles)| roles.contains(role)).map(|(node, _)| node).collect(),
        None => vec![&words[1]],
    };
    let has = |node: &&String| units.of.get(*node).is_some_and(|of| of.contains(&name));
    (!is_unloaded && !nodes.iter().any(has)).then(|| format!("no node of {nodes:?} has the unit {name}"))
}

/// Waits until all nodes are ready and the primary has a synchronous standby. After `poweroff`, waits until the node is
/// off, and starts it again.
fn comes_back(lab: &TestFleet, words: &[String]) {
    let begun = Instant::now();
    let state = |node: &str| -> (String, String) {
        let status = lab.run(&["status", "--json"]).result();
        let row = status["nodes"].as_array().and_then(|rows| rows.iter().find(|row| row["node"] == node).cloned());
        let row = row.unwrap_or_default();
        (row["state"].as_str().unwrap_or_default().to_owned(), row.to_string())
    };
    if words[0] == "poweroff" {
        while state(&words[1]).0 != "off" {
            assert!(begun.elapsed() < LIMIT, "{words:?}: the machine is not off: {:?}", state(&words[1]));
            sleep(Duration::from_secs(1));
        }
        lab.ok(&["up", "--containers", &words[1]]);
    }
    loop {
        let status = lab.run(&["status"]);
        let is_well = status.out.matches(" ready ").count() == 5
            && ["sync standby", "VIP"].iter().all(|part| status.out.contains(part));
        if is_well {
            println!("          all is well after {:.0} s", begun.elapsed().as_secs_f64());
            return;
        }
        assert!(begun.elapsed() < LIMIT, "after {words:?}:\n{}{}", status.out, status.err);
        sleep(Duration::from_secs(1));
    }
}
