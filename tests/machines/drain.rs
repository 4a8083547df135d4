//! Nodes out of service: the primary, the hub with the VIP and an app node give their work away while clients write and
//! read, and take it again when they are undrained. Runs in containers.

use std::thread::sleep;
use std::time::{Duration, Instant};

use bakehouse_tests::{CommandOutput, ETCDCTL, Machine, TestFleet};
use fleet::encoding;
use serde_json::Value;

/// Clients on an app node: one writes to the primary, one reads from Odoo, both through the VIP. Each failed read is a
/// line of `/run/clients/failed`, and each acknowledged write is one of `/run/clients/acknowledged`.
const CLIENTS: &str = include_str!("drain_clients.py");
/// Time limit for a change of the fleet's state.
const LIMIT: Duration = Duration::from_secs(240);
/// Time for which the clients run after a change.
const WATCHED: Duration = Duration::from_secs(15);

struct Drains<'a> {
    lab: &'a TestFleet,
    clients: &'a Machine,
}

impl Drains<'_> {
    fn status(&self) -> Value {
        self.lab.ok(&["status", "--json"]).result()
    }

    /// Returns the row of a node.
    fn row(&self, node: &str) -> Value {
        let status = self.status();
        let rows = status["nodes"].as_array().expect("the nodes");
        rows.iter().find(|row| row["node"] == node).unwrap_or_else(|| panic!("no {node} in {status}")).clone()
    }

    fn is_drained(&self, node: &str) -> bool {
        self.row(node)["report"]["drained"].is_u64()
    }

    /// Returns the nodes whose rows fulfil a condition.
    fn nodes(&self, is: impl Fn(&Value) -> bool) -> Vec<String> {
        let status = self.status();
        let rows = status["nodes"].as_array().expect("the nodes");
        let named = rows.iter().filter(|row| is(row)).map(|row| row["node"].as_str().expect("a name").to_owned());
        named.collect()
    }

    /// Waits until exactly one node fulfils a condition.
    #[track_caller]
    fn one(&self, what: &str, is: impl Fn(&Value) -> bool) -> String {
        let begun = Instant::now();
        loop {
            let found = self.nodes(&is);
            if let [one] = &found[..] {
                return one.clone();
            }
            assert!(begun.elapsed() < LIMIT, "{what}: {found:?}");
            sleep(Duration::from_secs(1));
        }
    }

    #[track_caller]
    fn primary(&self) -> String {
        self.one("the primary", |row| row["database"]["primary"].is_array())
    }

    #[track_caller]
    fn holder(&self) -> String {
        self.one("the VIP", |row| row["vip"] == true)
    }

    #[track_caller]
    fn until(&self, what: &str, is: impl Fn(&Value) -> bool) {
        let begun = Instant::now();
        loop {
            let status = self.status();
            if is(&status) {
                println!("{what} after {:.0} s", begun.elapsed().as_secs_f64());
                return;
            }
            assert!(begun.elapsed() < LIMIT, "{what}: {status:#}");
            sleep(Duration::from_secs(1));
        }
    }

    /// Runs an action. The node waits for the fleet's lock, which another one frees when it is ready again.
    fn act(&self, action: &str, node: &str) -> CommandOutput {
        let begun = Instant::now();
        loop {
            let done = self.lab.run(&[action, node, "--yes"]);
            if !done.err.contains("has to wait") || begun.elapsed() > LIMIT {
                return done;
            }
            sleep(Duration::from_secs(1));
        }
    }

    /// Drains a node, also a second time.
    #[track_caller]
    fn drain(&self, node: &str) {
        let begun = Instant::now();
        let done = self.act("drain", node);
        assert_eq!(done.status, 0, "{}", done.err);
        println!("{node} is drained after {:.1} s: {}", begun.elapsed().as_secs_f64(), done.err.trim());
        assert!(self.is_drained(node), "{}", self.row(node));
        let again = self.lab.ok(&["drain", node, "--yes"]).err;
        assert!(again.contains(&format!("{node} is drained already")), "{again}");
        let table = self.lab.ok(&["status"]).out;
        assert!(table.lines().any(|line| line.starts_with(node) && line.contains("drained")), "{table}");
    }

    #[track_caller]
    fn undrain(&self, node: &str) {
        self.lab.ok(&["undrain", node]);
        assert!(!self.is_drained(node), "{}", self.row(node));
        let again = self.lab.ok(&["undrain", node]).err;
        assert!(again.contains(&format!("{node} is not drained")), "{again}");
    }

    /// Asserts that a node refuses an action with this reason.
    #[track_caller]
    fn refuses(&self, action: &str, node: &str, why: &str) {
        self.act(action, node).fails(1, &[why, &format!("--force {node}")]);
        assert!(!self.is_drained(node));
    }

    /// Returns the number of lines that the clients have written to a file.
    fn count(&self, file: &str) -> u64 {
        self.clients.ok(&format!("wc -l </run/clients/{file}")).trim().parse().expect("a number")
    }

    /// Runs the clients for some time. Returns how many writes were acknowledged, and how many reads failed.
    fn watched(&self) -> (u64, u64) {
        let before = (self.count("acknowledged"), self.count("failed"));
        sleep(WATCHED);
        (self.count("acknowledged") - before.0, self.count("failed") - before.1)
    }
}

#[test]
fn containers_give_work_away_and_take_it_back() {
    let lab = TestFleet::of_fleet("drain", "ha");
    lab.init();
    let names = ["hub-1", "hub-2", "hub-3", "db-1", "db-2", "app-1", "app-2", "monitor-1"];
    // `Drop` switches the machines off when the test ends, also after a panic.
    let machines = names.map(|name| Machine::for_node(&lab, name));
    let machine = |name: &str| &machines[names.iter().position(|known| *known == name).expect("a node")];
    lab.ok(&["up", "--containers"]);
    let fleet = Drains { lab: &lab, clients: machine("app-2") };
    let script = encoding::encode(CLIENTS.as_bytes());
    fleet.clients.ok(&format!(
        "mkdir -p /run/clients && echo {script} | base64 -d >/run/clients/clients.py && \
         systemd-run --unit=clients python3 /run/clients/clients.py && \
         for i in $(seq 60); do [ -s /run/clients/acknowledged ] && exit; sleep 1; done; exit 1"
    ));

    database(&fleet, machine);
    application(&fleet, machine("app-1"));
    vip(&fleet, machine);

    let (acknowledged, _) = fleet.watched();
    assert!(acknowledged > 50, "the clients do not write: {acknowledged}");
    fleet
        .clients
        .ok("systemctl kill --signal=TERM clients && while systemctl is-active -q clients; do sleep 0.2; done");
    println!("{} writes were acknowledged", fleet.count("acknowledged"));
    assert_eq!(fleet.clients.ok("cat /run/clients/lost"), "", "acknowledged writes are lost");
    for (name, machine) in names.iter().zip(&machines) {
        assert_eq!(machine.ok("systemctl --failed --no-legend --plain"), "", "{name}");
    }
}

/// The primary is drained: the standby becomes the primary, and the drained node replicates and cannot take it back.
fn database<'a>(fleet: &Drains, machine: impl Fn(&str) -> &'a Machine) {
    let first = fleet.primary();
    let second = if first == "db-1" { "db-2" } else { "db-1" };
    fleet.refuses("drain", second, "is the last standby that can become the primary");
    fleet.drain(&first);
    assert_eq!(fleet.primary(), second);
    let is_sync = |status: &Value| {
        let rows = status["nodes"].as_array().expect("the nodes");
        rows.iter().any(|row| row["database"]["primary"][0]["sync"] == true)
    };
    fleet.until("the drained standby is synchronous, because there is no other", is_sync);
    assert!(fleet.watched().0 > 50, "no writes after the drain of the primary");
    for action in ["drain", "poweroff"] {
        fleet.refuses(action, second, "no synchronous standby");
    }
    let drained = machine(&first);
    drained.ok("grep -q 'nofailover: true' /run/bakehouse/patroni.d/drained.yml");
    // HAProxy does not use a drained standby for reads, and a switchover has no candidate.
    fleet.lab.run(&["switchover", "--yes"]).fails(1, &["no synchronous standby"]);
    fleet.undrain(&first);
    drained.ok("for i in $(seq 60); do [ -e /run/bakehouse/patroni.d/drained.yml ] || exit 0; sleep 1; done; exit 1");
    assert_eq!(fleet.primary(), second, "the primary came back by itself");
    let begun = Instant::now();
    while fleet.lab.run(&["switchover", "--yes"]).status != 0 {
        assert!(begun.elapsed() < LIMIT, "no switchover to the undrained node");
        sleep(Duration::from_secs(2));
    }
    assert_eq!(fleet.primary(), first);
}

/// An app node is drained without a failed request, stays drained over a reboot, and serves again.
fn application(fleet: &Drains, drained: &Machine) {
    let state = |status: &Value| status["odoo"]["app-1"].as_str().unwrap_or_default().to_owned();
    let comm = |word: &str| {
        let program = "cat /proc/$(systemctl show -P MainPID odoo-cron)/comm";
        drained.ok(&format!("for i in $(seq 90); do [ \"$({program})\" = {word} ] && exit; sleep 1; done; exit 1"));
    };
    fleet.until("both app nodes serve", |status| ["app-1", "app-2"].iter().all(|app| status["odoo"][app] == "UP"));
    let before = fleet.count("failed");
    fleet.drain("app-1");
    fleet.watched();
    assert_eq!(fleet.count("failed"), before, "{}", fleet.clients.ok("tail -n 5 /run/clients/failed"));
    assert!(state(&fleet.status()).starts_with("DOWN"), "{}", state(&fleet.status()));
    comm("sleep");
    fleet.refuses("drain", "app-2", "is the last node that serves Odoo: app-1 is drained");
    fleet.refuses("reboot", "app-2", "all app nodes except app-2 are drained");

    assert_eq!(fleet.act("reboot", "app-1").status, 0);
    assert!(fleet.is_drained("app-1"));
    fleet.watched();
    assert!(state(&fleet.status()).starts_with("DOWN"), "{}", state(&fleet.status()));
    drained.ok("nft list set inet bakehouse leaving | grep -q 8069");
    // The set stays full when Odoo or the packet filter restarts.
    for unit in ["odoo-http", "nftables"] {
        drained.ok(&format!("systemctl restart {unit}"));
        drained.ok(
            "for i in $(seq 30); do nft list set inet bakehouse leaving | grep -q 8069 && exit; sleep 1; done; exit 1",
        );
    }
    comm("sleep");
    assert_eq!(fleet.count("failed"), before, "{}", fleet.clients.ok("tail -n 5 /run/clients/failed"));

    fleet.undrain("app-1");
    fleet.until("app-1 serves again", |status| state(status) == "UP");
    drained.ok("for i in $(seq 90); do p=$(systemctl show -P MainPID odoo-cron); \
        tr '\\0' ' ' </proc/$p/cmdline | grep -q odoo && exit; sleep 1; done; exit 1");
}

/// The hub with the VIP is drained: another hub takes the VIP and keeps it, and etcd's leader is another one.
fn vip<'a>(fleet: &Drains, machine: impl Fn(&str) -> &'a Machine) {
    let first = fleet.holder();
    fleet.drain(&first);
    let second = fleet.holder();
    assert_ne!(second, first);
    // The member's own id, and the leader's.
    let ids = "sed -n 's/^\"\\(MemberID\\|Leader\\)\" : //p' | sort -u | wc -l";
    assert_eq!(machine(&first).ok(&format!("{ETCDCTL} endpoint status -w fields | {ids}")), "2", "{first} leads etcd");
    // New connections to the VIP are not dropped here when it returns one day.
    assert!(!machine(&first).ok("nft list set inet bakehouse moving").contains("elements"));
    assert_eq!(fleet.act("reboot", &first).status, 0);
    assert_eq!(fleet.holder(), second);
    assert!(fleet.is_drained(&first));
    fleet.drain(&second);
    let third = fleet.holder();
    fleet.refuses("drain", &third, "is the last hub that can hold the VIP");
    fleet.refuses("reboot", &third, "has the VIP, and no other hub answers");
    assert!(fleet.watched().0 > 50, "no writes through the VIP of {third}");
    for hub in [&first, &second] {
        fleet.undrain(hub);
    }
    assert_eq!(fleet.holder(), third, "the VIP came back by itself");
    fleet.drain(&third);
    assert_ne!(fleet.holder(), third);
    fleet.undrain(&third);
}
