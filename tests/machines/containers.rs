//! Quick HA in containers: the images' own services run at the host's speed, so no limit is scaled. The commands of the
//! tutorial start three nodes from empty folders. A rehearsal then injects each single failure while clients write to
//! the database and read from Odoo.

use std::fs;
use std::process::Command;
use std::time::Instant;

use bakehouse_tests::tutorial::tutorial;
use bakehouse_tests::{CommandOutput, Machine, TestFleet};
use serde_json::Value;

/// Logs in to Odoo as a browser does, and prints the number of the user.
const LOG_IN: &str = "
import json, ssl, sys, urllib.request
url, password = sys.argv[1:]
body = {'jsonrpc': '2.0', 'params': {'db': 'odoo', 'login': 'admin', 'password': password}}
headers = {'Content-Type': 'application/json'}
request = urllib.request.Request(url + 'web/session/authenticate', json.dumps(body).encode(), headers)
with urllib.request.urlopen(request, context=ssl._create_unverified_context(), timeout=60) as response:
    print(json.load(response)['result']['uid'])
";

#[test]
fn quick_ha_containers_survive_single_failures() {
    let lab = TestFleet::empty("containers");
    let mut dir = lab.dir.clone();
    let mut steps = tutorial().into_iter();
    for step in steps.by_ref().take(2) {
        step.run(&mut dir);
    }
    let lab = lab.within("acme");
    assert_eq!(dir, lab.dir);
    let shared = TestFleet::shared_lock("quick-ha");
    if shared.exists() {
        fs::copy(&shared, lab.dir.join("bakehouse.lock")).expect("the lock can be copied");
    }
    // `Drop` stops the machines when the test ends, also after a panic.
    let machines = ["front-1", "data-1", "work-1"].map(|name| Machine::for_node(&lab, name));
    let (mut address, mut password) = (String::new(), String::new());
    for step in steps.take_while(|step| step.command != "bakehouse down") {
        let begun = Instant::now();
        let done = step.run(&mut dir);
        println!("{:.0} s", begun.elapsed().as_secs_f64());
        match step.command.as_str() {
            "bakehouse lock" => drop(fs::copy(lab.dir.join("bakehouse.lock"), &shared).expect("the lock can be kept")),
            "bakehouse status" => {
                for part in ["primary", "sync standby", "VIP"] {
                    assert!(done.out.contains(part), "no {part} in:\n{}", done.out);
                }
                address = done.out.split_whitespace().find(|word| word.starts_with("https://127.")).unwrap().to_owned();
            }
            "bakehouse rehearse db" => clients_survived(&done.out),
            grep if grep.starts_with("grep") => password = done.out.split('"').nth(3).unwrap().to_owned(),
            _ => {}
        }
    }
    let opened = Command::new("python3").args(["-c", LOG_IN, &address, &password]).output().expect("python3");
    let opened = CommandOutput::new(&opened);
    assert!(opened.out.trim().parse::<u32>().is_ok_and(|user| user > 0), "{}{}", opened.out, opened.err);
    for machine in &machines {
        assert_eq!(machine.ok("systemd-detect-virt"), "container-other");
        assert_eq!(machine.ok("systemctl --failed --no-legend --plain"), "");
        // The early filter protects the node before its own rules are loaded.
        let since = |unit: &str| {
            let began = machine.ok(&format!("systemctl show -p ActiveEnterTimestampMonotonic --value {unit}"));
            began.parse::<u64>().expect("microseconds")
        };
        assert!(since("early-filter") > 0 && since("early-filter") < since("systemd-networkd"));
        assert!(machine.ok("nft list chain inet bakehouse from_mesh").contains("\"mesh_dropped\" drop"));
    }
    let opened = "journalctl -b -u patroni -o cat | grep -q 'INFO: Watchdog .* activated with 15 second timeout'";
    assert!(machines.iter().any(|m| m.exec(opened).status == 0), "the primary has no watchdog");
    // `up` without `--containers` must not start the same nodes as virtual machines.
    let refused = lab.run(&["up"]);
    assert_ne!(refused.status, 0);
    assert!(
        refused.err.contains("runs as a container; to have it as a machine, `bakehouse down` first"),
        "{}",
        refused.err
    );

    // While no hub holds the VIP, a connection times out. "No route to host" would make clients give up.
    let everywhere = |what: &str| machines.iter().for_each(|m| drop(m.ok(&format!("systemctl {what} keepalived"))));
    everywhere("stop");
    let connect = "import socket; s = socket.socket(); s.settimeout(4)\ntry: s.connect(('10.10.0.100', 443))\n\
        except OSError as e: print(e)";
    assert_eq!(machines[0].ok(&format!("python3 -c \"{connect}\"")), "timed out");
    everywhere("start");

    // The tutorial has rehearsed `db`.
    let played = lab.run(&["rehearse", "hub", "app", "--json"]);
    println!("{}{}", played.err, played.out);
    assert_eq!(played.status, 0, "the rehearsal missed a limit");
    let outcomes: Vec<Value> = serde_json::from_value(played.result()).expect("a list");
    assert_eq!(outcomes.len(), 2, "{outcomes:?}");
    for outcome in &outcomes {
        let count = |of: &str| outcome[of].as_u64().expect("a number");
        assert!(count("acknowledged") > 100, "no client wrote: {outcome}");
        assert_eq!((count("lost"), count("logouts"), count("primaries")), (0, 0, 1), "{outcome}");
        assert!(outcome["http"].is_f64(), "no client read from Odoo: {outcome}");
    }
    // etcd has the settings of an earlier version, or of a fleet that began with one database, with synchronous mode
    // off. The next primary replaces them with the settings of its image.
    let patronictl = "patronictl -c /run/bakehouse/patroni.yml";
    machines[1].ok(&format!(
        "{patronictl} edit-config --quiet --force --set ttl=21 --set synchronous_mode=false && \
         {patronictl} show-config | grep 'ttl: 21' && {patronictl} switchover --force"
    ));
    for what in
        ["show-config | grep 'ttl: 20'", "show-config | grep 'synchronous_mode: true'", "list | grep 'Sync Standby'"]
    {
        machines[1].ok(&format!("for i in $(seq 60); do {patronictl} {what} && exit; sleep 1; done; exit 1"));
    }

    // `down` also ends a database that cannot archive its last WAL because the backup node stopped first.
    lab.run(&["down"]);
    assert!(lab.ok(&["status"]).out.lines().all(|line| line.contains(" off")), "{}", lab.ok(&["status"]).out);
}

/// Asserts that the table of `rehearse db` has clients that wrote and read, and that lost nothing.
fn clients_survived(table: &str) {
    let row = table.lines().find(|line| line.starts_with("| db ")).expect("a row of db");
    let cells: Vec<&str> = row.split('|').map(str::trim).collect();
    // The first cell is before the first `|`.
    let [_, _, _, _, writes, http, _, lost, logouts, primaries, _, promise, _] = cells[..] else {
        panic!("other columns: {row}")
    };
    let acknowledged: u32 = lost.strip_prefix("0/").expect("no lost write").parse().expect("a number");
    assert!(acknowledged > 100, "no client wrote: {row}");
    for seconds in [writes, http] {
        assert!(seconds.parse::<f64>().is_ok(), "clients did not recover: {row}");
    }
    assert_eq!((logouts, primaries, promise), ("0", "1", "kept"), "{row}");
}
