//! Journals outlive machines: each monitor has the journal of every node, also after one of the two was off, and after
//! the node is lost. `psql`, `odoo shell` and the commands of all runbooks run on the same fleet before. Runs in containers.

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::thread::sleep;
use std::time::{Duration, Instant};

use bakehouse_tests::{Machine, TestFleet};
use builder::project::Project;

use super::{psql, runbooks};

/// Two hubs with a database and Odoo each, two monitors, and a node that is lost. Operators may run commands and SQL.
const FLEET: &str = "\
name = \"journals\"
version = \"1\"
[groups.one]
count = 1
roles = [\"hub\", \"db\", \"app\"]
endpoints = [\"one.example.net\"]
[groups.two]
count = 1
first = \"10.10.0.2\"
roles = [\"hub\", \"db\", \"app\"]
endpoints = [\"two.example.net\"]
[groups.monitor]
count = 2
[groups.lost]
count = 1
[vip]
hook = \"floating-ip\"
[access]
shell = true
sql = true
";
/// Moves a provider's floating address, in a real fleet.
const HOOK: &str = "#!/bin/sh\necho \"$BAKEHOUSE_NODE holds the address\"\n";
/// Time within which a monitor that was off has what it missed. The uploader may wait for 5 min before it connects again,
/// and for 60 s until its watchdog ends a connection to a monitor without power.
const CAUGHT_UP: Duration = Duration::from_secs(420);

/// The node whose journal the test follows, and its two monitors.
struct Nodes<'a> {
    lab: &'a TestFleet,
    lost: Machine,
    address: String,
    monitors: [Machine; 2],
}

impl Nodes<'_> {
    /// Writes numbered lines to the journal of the node.
    fn write(&self, first: u32, last: u32) {
        self.lost.ok(&format!("for i in $(seq {first} {last}); do echo $i; done | systemd-cat -t numbered"));
    }

    /// Returns how often an operator reads each numbered line of the node from a monitor.
    fn reads(&self, monitor: usize) -> BTreeMap<u32, usize> {
        let monitor = format!("monitor-{}", monitor + 1);
        let lines = self.lab.ok(&["logs", "lost-1", "--kept", &monitor, "-n", "20000"]).out;
        let mut reads = BTreeMap::new();
        for line in lines.lines().filter(|line| line.contains(" numbered")) {
            if let Some(number) = line.rsplit(' ').next().and_then(|number| number.parse().ok()) {
                *reads.entry(number).or_default() += 1;
            }
        }
        reads
    }

    /// Returns how often a monitor has each numbered line of the node.
    fn counts(&self, monitor: usize) -> BTreeMap<u32, usize> {
        // A monitor that lost its power has also files that end with a tilde.
        let files = format!("/var/log/journal/remote/remote-{}[.@]*", self.address);
        // Before the first line arrives, there is no file.
        let lines = self.monitors[monitor].exec(&format!("journalctl -q --file='{files}' -t numbered -o cat")).output;
        let mut counts = BTreeMap::new();
        for line in lines.lines().filter_map(|line| line.parse().ok()) {
            *counts.entry(line).or_default() += 1;
        }
        counts
    }

    /// Waits until a monitor has the line `last`. Asserts that it then has each line, and that an operator reads each one
    /// once: a node sends lines again that the monitor has not confirmed, because one of them was killed. Returns the seconds.
    fn has_all(&self, monitor: usize, last: u32, limit: Duration) -> f64 {
        let begun = Instant::now();
        while !self.counts(monitor).contains_key(&last) {
            assert!(begun.elapsed() < limit, "monitor {monitor} does not get line {last}");
            sleep(Duration::from_millis(200));
        }
        let seconds = begun.elapsed().as_secs_f64();
        let expected: BTreeMap<u32, usize> = (1..=last).map(|n| (n, 1)).collect();
        let counts = self.counts(monitor);
        assert!(counts.keys().eq(expected.keys()), "monitor {monitor}: {counts:?}");
        assert_eq!(self.reads(monitor), expected, "lines of monitor {monitor}");
        seconds
    }
}

#[test]
fn containers_keep_journals_and_follow_their_runbooks() {
    let lab = TestFleet::empty("journals");
    let receiver = runbooks::Receiver::listen();
    lab.write("fleet.toml", &format!("{FLEET}{}", receiver.settings()));
    lab.write("floating-ip", HOOK);
    fs::set_permissions(lab.dir.join("floating-ip"), Permissions::from_mode(0o755)).expect("the lab is writable");
    lab.has_idle_role("lost", false);
    lab.init();
    lab.ok(&["lock"]);
    receiver.store_secret(&lab);
    let machine = |name| Machine::for_node(&lab, name);
    let topology = Project::load(&lab.dir).expect("a valid fleet.toml").topology;
    let address = |name: &str| topology.node(name).expect("a node").address.to_string();
    // `Drop` switches the machines off when the test ends, also after a panic.
    let hubs = ["one-1", "two-1"].map(machine);
    let nodes = Nodes {
        lab: &lab,
        lost: machine("lost-1"),
        address: address("lost-1"),
        monitors: [machine("monitor-1"), machine("monitor-2")],
    };
    lab.ok(&["up", "--containers"]);
    one_hub_runs_the_hook(&hubs);
    psql::operators_run_sql_and_python(&lab);
    let failures = runbooks::failing_commands(&lab);
    outlive_machines(&lab, &nodes, &hubs[0], &address("one-1"));
    assert!(failures.is_empty(), "these commands do not do what their texts say:\n{}", failures.join("\n"));
}

/// The hub that browsers outside the mesh shall reach, and no other, has moved the floating address.
fn one_hub_runs_the_hook(hubs: &[Machine; 2]) {
    let has_run = |hub: &Machine| hub.ok("journalctl -b -u vip-hook -o cat --no-pager").contains("holds the address");
    let begun = Instant::now();
    while !hubs.iter().any(|hub| has_run(hub) && hub.exec("systemctl is-active vip-hook").status == 0) {
        let logs = hubs.each_ref().map(|hub| hub.ok("journalctl -b -u vip-hook -u keepalived -o cat --no-pager"));
        assert!(begun.elapsed() < Duration::from_secs(60), "no hub has run the hook:\n{}", logs.join("\n"));
        sleep(Duration::from_secs(1));
    }
    let active = hubs.iter().filter(|hub| hub.exec("systemctl is-active vip-hook").status == 0).count();
    assert_eq!(active, 1);
    for hub in hubs {
        assert!(hub.exposure("vip-hook.service") < 2.0);
    }
}

/// Tests the journals on both monitors. At the end, the node `lost` has no disk.
fn outlive_machines(lab: &TestFleet, nodes: &Nodes<'_>, hub: &Machine, hubs_address: &str) {
    nodes.write(1, 200);
    for monitor in [0, 1] {
        println!("200 lines: {:.1} s", nodes.has_all(monitor, 200, CAUGHT_UP));
    }
    let states = |machine: &Machine| {
        [1, 2].map(|n| machine.exec(&format!("systemctl is-active systemd-journal-upload@monitor-{n}")).output)
    };
    assert_eq!(states(hub).map(|s| s.trim().to_owned()), ["active", "active"]);
    // A monitor does not send its journal to itself.
    assert_eq!(states(&nodes.monitors[0]).map(|s| s.trim().to_owned()), ["inactive", "active"]);

    // After a restart, the uploader continues behind the last line.
    nodes.lost.ok("systemctl restart 'systemd-journal-upload@*'");
    nodes.write(201, 250);
    for monitor in [0, 1] {
        nodes.has_all(monitor, 250, CAUGHT_UP);
    }

    // A monitor without power misses nothing, and delays no other monitor.
    nodes.monitors[1].cut_power();
    nodes.write(251, 400);
    println!("while the other monitor is off: {:.1} s", nodes.has_all(0, 400, Duration::from_secs(20)));
    sleep(Duration::from_secs(60));
    nodes.monitors[1].start();
    nodes.monitors[1].wait_for(&["bakehouse: ready (monitor-2)"]);
    println!("after a minute without the monitor: {:.1} s", nodes.has_all(1, 400, CAUGHT_UP));
    // Each failed attempt has one line, and none of systemd's.
    let lines = nodes.lost.ok("journalctl -q -b -u systemd-journal-upload@monitor-2 -o cat");
    println!("lines about the uploader:\n{lines}");
    assert!(lines.lines().count() <= 20, "{lines}");

    let sent = is_sent_once_after_kills(nodes, 400);
    cannot_write_as_another_node(nodes, hub, hubs_address);

    // One second before its end the node logs its last lines. Its disk is lost.
    nodes.write(sent + 1, sent + 20);
    sleep(Duration::from_secs(1));
    nodes.lost.cut_power();
    nodes.lost.wipe();
    for monitor in [0, 1] {
        println!("lines of the lost node: {:.1} s", nodes.has_all(monitor, sent + 20, Duration::from_secs(2)));
    }

    // An operator reads them from a monitor.
    let lines = lab.ok(&["logs", "lost-1", "--kept", "monitor-2", "-n", "20"]).out;
    for number in sent + 1..=sent + 20 {
        assert!(
            lines.lines().any(|line| line.contains(" lost-1 ") && line.ends_with(&format!(": {number}"))),
            "{lines}"
        );
    }

    // The alert's metric has the time of the last entry of every other node.
    for machine in &nodes.monitors {
        machine.ok("systemctl start journal-arrivals.service");
        let metrics = machine.ok("cat /run/bakehouse/metrics/journals.prom; date +%s");
        let value = |line: &str| line.rsplit_once(' ').and_then(|(_, value)| value.parse::<u64>().ok());
        let now: u64 = metrics.lines().last().and_then(|line| line.parse().ok()).expect("the time");
        let received: Vec<&str> = metrics.lines().filter(|line| line.contains("{source=")).collect();
        assert_eq!(received.len(), 4, "{metrics}");
        for line in received {
            assert!(value(line).is_some_and(|at| at <= now && now - at < 600), "{line} at {now}");
        }
        // A backup may fail while the commands of the runbooks switch its database off.
        let failed = machine.ok("systemctl --failed --no-legend --plain");
        assert!(failed.lines().all(|line| line.starts_with("pgbackrest@")), "{failed}");
    }
}

/// Kills the uploader three times while it sends, each time with bytes that systemd-journal-remote has not read yet. Then
/// the monitor has each line once. Returns the number of the last line.
fn is_sent_once_after_kills(nodes: &Nodes<'_>, last: u32) -> u32 {
    const LINES: u32 = 9000;
    let (node, monitor) = (&nodes.lost, &nodes.monitors[0]);
    let unit = "systemd-journal-upload@monitor-1";
    let signal = |signal: &str| monitor.ok(&format!("systemctl kill --signal={signal} systemd-journal-remote"));
    node.ok(&format!("systemctl stop {unit}"));
    nodes.write(last + 1, last + LINES);
    let mut before = nodes.counts(0).len();
    for _ in 0..3 {
        node.ok(&format!("systemctl start {unit}"));
        sleep(Duration::from_millis(150));
        signal("STOP");
        sleep(Duration::from_millis(500));
        node.ok(&format!("systemctl kill --signal=KILL {unit}; systemctl stop {unit}"));
        signal("CONT");
        sleep(Duration::from_secs(1));
        let now = nodes.counts(0).len();
        println!("killed while it sent lines {before} to {now} of {}", last + LINES);
        before = now;
    }
    // Otherwise no kill was in the middle.
    assert!(before > last as usize, "the uploader sent nothing");
    node.ok(&format!("systemctl start {unit}"));
    println!("after three kills: {:.1} s", nodes.has_all(0, last + LINES, CAUGHT_UP));
    nodes.has_all(1, last + LINES, CAUGHT_UP);
    last + LINES
}

/// Root on a node sends an entry that names another node as its source. It stays in the node's own file.
fn cannot_write_as_another_node(nodes: &Nodes<'_>, victim: &Machine, victims: &str) {
    let upload = "printf '__REALTIME_TIMESTAMP=%s000000\\n__MONOTONIC_TIMESTAMP=1\\n_BOOT_ID=%s\\n\
        _HOSTNAME=one-1\\nMESSAGE=forged\\n\\n' $(date +%s) $(tr -d - </proc/sys/kernel/random/boot_id) | \
        /usr/lib/systemd/systemd-journal-remote --split-mode=none -o /run/forgery/forged.journal - && \
        /usr/lib/systemd/systemd-journal-upload --file=/run/forgery/forged.journal --follow=no --url=https://monitor-1 \
        --key=/run/bakehouse/tls/node.key --cert=/run/bakehouse/tls/node.crt --trust=/run/bakehouse/tls/ca.crt";
    nodes.lost.ok(&format!("mkdir -p /run/forgery && {upload}"));
    let forged = |address: &str| {
        let files = format!("/var/log/journal/remote/remote-{address}[.@]*");
        nodes.monitors[0].ok(&format!("journalctl -q --file='{files}' -o cat MESSAGE=forged"))
    };
    assert_eq!((forged(&nodes.address).as_str(), forged(victims).as_str()), ("forged", ""));
    // The victim's own journal does arrive.
    victim.ok("echo genuine | systemd-cat -t numbered");
    let files = format!("/var/log/journal/remote/remote-{victims}[.@]*");
    let arrives = format!("journalctl -q --file='{files}' -o cat -t numbered | grep -qx genuine");
    nodes.monitors[0].ok(&format!("for i in $(seq 50); do {arrives} && exit; sleep 0.2; done; exit 1"));
}
