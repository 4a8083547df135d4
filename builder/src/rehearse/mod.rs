//! Breaking a running fleet on purpose, while clients use it.
//!
//! The clients run on one of the fleet's machines that is not hit (see `probe.py`): pings to the
//! VIP, a writer through it, people on Odoo, and an eye on every database server. Their silence
//! is the outage; only their machine's clock is read.

mod alert_receiver;
mod machines;
mod outcome;
mod page;
mod paths;
mod scenario;
mod table;
mod upgrade;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use fleet::Node;
use serde_json::{Value, json};

use alert_receiver::AlertReceiver;
use machines::Machines;
use outcome::Observations;
pub use outcome::Outcome;
pub use page::Page;
use paths::{Path, Paths};
use scenario::{Fault, Target};
pub use scenario::{SCENARIOS, Scenario, chosen};
pub use table::table;

use crate::error::{Error, Result, fail};
use crate::keys::authority::FleetKey;
use crate::progress::{Progress, Step};
use crate::project::Project;
use crate::vm::{Database, FleetStatus, Vm, start_of};

const PROBE: &str = include_str!("probe.py");
/// Where the probe lives on its machine.
const DIR: &str = "/run/rehearsal";
/// Seconds of normal life before the fault, to see that the clients work.
const WARM_UP: u64 = 10;
/// An alert that names the victim is promised within these seconds.
const ALERT: f64 = 30.0;
/// Whoever is called by the dead man's switch every minute raises the alarm after so many seconds without a call.
const SILENCE: f64 = 90.0;
/// A fleet that is not whole again by then is given up.
const MENDED: Duration = Duration::from_secs(1500);

/// A running fleet that is to be broken.
pub struct Rehearsal<'a> {
    project: &'a Project,
    progress: &'a Progress,
    password: String,
    admin: String,
    told: Option<AlertReceiver>,
    pub machines: Machines,
    /// How much slower they are than real ones: their time-outs are that much longer.
    factor: u32,
}

/// Who notices that the victims failed.
enum Alarm {
    /// A monitor; with what it says already, by name and node.
    Monitor(BTreeSet<(String, String)>),
    /// Whoever is called by the only monitors, which are hit.
    DeadMan,
}

/// The clients, running.
struct Probe {
    vm: Vm,
    run: String,
}

impl<'a> Rehearsal<'a> {
    /// # Errors
    /// The fleet does not run, or is not whole.
    pub fn new(project: &'a Project, progress: &'a Progress) -> Result<Self> {
        let step = progress.step("rehearse", "looking at the fleet");
        let board = whole(project, &step, Duration::from_secs(300))
            .map_err(|e| Error::Failed(format!("{e}\nstart it with `bakehouse up` first")))?;
        drop(step);
        let secrets = FleetKey::of_vms(project)?.secrets;
        let any = board.nodes.first().map(|r| r.node.clone()).unwrap_or_default();
        let machines = match Vm::of(project, &any)?.exec("systemd-detect-virt")?.output.trim() {
            "qemu" => Machines::Emulated,
            "container-other" => Machines::Containers,
            _ => Machines::Kvm,
        };
        let told = AlertReceiver::listen(&project.topology.alerts)?;
        let factor = machines.factor();
        Ok(Self { project, progress, password: secrets.odoo, admin: secrets.odoo_admin, told, machines, factor })
    }

    /// Plays the scenarios one after the other, each `repeat` times; after each, `kept` is given
    /// all outcomes so far. Stops where the fleet does not become whole again.
    ///
    /// # Errors
    /// A machine does not do what it is told; `kept` can't keep them.
    pub fn play(
        &self,
        scenarios: &[&'static Scenario],
        repeat: u32,
        mut kept: impl FnMut(&[Outcome]) -> Result<()>,
    ) -> Result<()> {
        let mut outcomes = Vec::new();
        for scenario in scenarios {
            for _ in 0..repeat {
                let Some(outcome) = self.play_one(scenario)? else {
                    self.progress.say("rehearse", &format!("{}: this fleet has nothing of that kind", scenario.name));
                    break;
                };
                let whole = outcome.whole.is_finite();
                outcomes.push(outcome);
                kept(&outcomes)?;
                if !whole {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn play_one(&self, scenario: &'static Scenario) -> Result<Option<Outcome>> {
        let topology = &self.project.topology;
        let step = self.progress.step(scenario.name, scenario.about);
        if scenario.fault == Fault::Upgrade {
            return self.upgrade(scenario, step);
        }
        let board = whole(self.project, &step, MENDED)?;
        let machine = |name: &str| Vm::at(name, self.project.dir.join("build/vm").join(name));
        let victims = scenario.victim.find(topology, &board, &machine)?;
        let promise = scenario.promised(&victims, &board);
        let Some(stage) = self.stage(scenario, &victims) else { return Ok(None) };
        if victims.is_empty() {
            return Ok(None);
        }
        step.message(&format!("{}: clients start on {}", scenario.about, stage.name));
        let probe = self.start_probe(stage, &step)?;
        std::thread::sleep(Duration::from_secs(WARM_UP * u64::from(self.factor.min(3))));

        let vms: Vec<Vm> = victims.iter().map(|name| machine(name)).collect();
        if scenario.victim == Target::All {
            return self.power_loss(scenario, &vms, &probe, step).map(Some);
        }
        let paths = Paths::new(topology, board.holder(), &victims);
        let alarm = self.alarm(scenario, &victims, &step)?;
        step.message(&format!("{}: {}", scenario.about, victims.join(", ")));
        let t0 = probe.clock()?;
        for vm in &vms {
            scenario.fault.inject(vm, &paths, self.factor)?;
        }
        let (recovered, alert) = self.watch(scenario, &probe, &victims, alarm.as_ref(), &step)?;

        // What was broken is mended while the clients go on: coming back may hurt too.
        let mending = Instant::now();
        for vm in &vms {
            if !vm.is_running() {
                vm.start(&start_of(self.project, &vm.node)?.as_start())?;
            }
            scenario.fault.recover(vm)?;
        }
        let mended = whole(self.project, &step, MENDED);
        let mut outcome = probe.end(self.factor)?.outcome(scenario.name, victims, t0);
        outcome.alert = alert;
        outcome.whole = if mended.is_ok() { mending.elapsed().as_secs_f64() } else { f64::INFINITY };
        outcome.judge(&promise, alarm.map(|alarm| alarm.limit()), f64::from(self.factor));
        if !recovered {
            outcome.broken.push("the clients did not recover before it was mended".to_owned());
        }
        if let Err(e) = mended {
            outcome.broken.push(e.to_string());
        }
        told(step, &outcome);
        Ok(Some(outcome))
    }

    /// The machine the clients run on: one that is not hit, with Odoo if there is one, for its
    /// packet filter and its database let it ask everybody.
    fn stage(&self, scenario: &Scenario, victims: &[String]) -> Option<&'a Node> {
        let nodes = &self.project.topology.nodes;
        // A path that is cut hurts who is at its end.
        if scenario.fault == Fault::Cut(Path::Hub) {
            return nodes.iter().find(|n| victims.contains(&n.name));
        }
        let harmless = matches!(scenario.fault, Fault::Freeze("etcd")) || scenario.victim == Target::All;
        let may = |n: &&Node| harmless || !victims.contains(&n.name);
        let with = |role: &str| nodes.iter().filter(may).find(|n| n.has_role(role));
        with("app").or_else(|| with("db"))
    }

    fn start_probe(&self, stage: &Node, step: &Step) -> Result<Probe> {
        let topology = &self.project.topology;
        let run = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis().to_string();
        let databases: BTreeMap<&str, String> = topology
            .nodes
            .iter()
            .filter(|n| n.has_role("db"))
            .map(|n| (n.name.as_str(), n.address.to_string()))
            .collect();
        let config = json!({
            "run": run,
            "vip": topology.vip,
            "password": self.password,
            "admin": self.admin,
            "databases": databases,
            "apps": topology.nodes.iter().any(|n| n.has_role("app")),
            "patience": self.factor,
        });
        let probe = Probe { vm: Vm::of(self.project, &stage.name)?, run };
        let put = |name: &str, text: &str| format!("echo {} | base64 -d > {DIR}/{name}", BASE64.encode(text));
        probe.ask(&format!(
            "systemctl stop rehearsal 2>/dev/null; rm -rf {DIR}; umask 077; mkdir -p {DIR} && {} && {} && \
             systemd-run -q --collect -u rehearsal -p TimeoutStopSec=900 python3 {DIR}/probe.py {DIR}/config",
            put("config", &config.to_string()),
            put("probe.py", PROBE)
        ))?;
        let until = Instant::now() + Duration::from_secs(60) * self.factor;
        while !probe.ages()?.is_some_and(|ages| ages.values().all(|age| *age < 60.0)) {
            if Instant::now() > until {
                let journal = probe.vm.exec("journalctl -b --no-pager -u rehearsal -n 20")?.output;
                return fail(format!("the clients on {} do not get through:\n{journal}", stage.name));
            }
            step.message(&format!("the clients on {} find their way", stage.name));
            std::thread::sleep(Duration::from_secs(2));
        }
        Ok(probe)
    }

    /// Watches until every client is well again, and an alert came; says whether they are, and
    /// after how many seconds the alert was there.
    fn watch(
        &self,
        scenario: &Scenario,
        probe: &Probe,
        victims: &[String],
        alarm: Option<&Alarm>,
        step: &Step,
    ) -> Result<(bool, Option<f64>)> {
        let since = Instant::now();
        let slow = self.factor.min(3);
        let least = Duration::from_secs(scenario.lasts * u64::from(if scenario.lasts > 60 { 1 } else { slow }));
        let most = least + Duration::from_secs(120) * slow;
        let mut alert = None;
        loop {
            std::thread::sleep(Duration::from_secs(2));
            if let (Some(alarm), None) = (alarm, alert) {
                let raised = self.raised(alarm, scenario, victims);
                alert = raised.map(|at| at.saturating_duration_since(since).as_secs_f64());
            }
            let ages = probe.ages()?.unwrap_or_default();
            let calm = !ages.is_empty() && ages.values().all(|age| *age < 4.0 * f64::from(slow));
            let late = |alarm: &Alarm| since.elapsed().as_secs_f64() > alarm.limit() * f64::from(self.factor);
            let heard = alert.is_some() || alarm.is_none_or(late);
            let told: Vec<String> = ages.iter().map(|(kind, age)| format!("{kind} {age:.0} s ago")).collect();
            step.message(&format!("{}: {}", scenario.about, told.join(", ")));
            if since.elapsed() > least && calm && heard {
                return Ok((true, alert));
            }
            if since.elapsed() > most {
                return Ok((false, alert));
            }
        }
    }

    /// The power fails everywhere, in the middle of a write: what was acknowledged before must be there after.
    fn power_loss(&self, scenario: &'static Scenario, vms: &[Vm], probe: &Probe, step: Step) -> Result<Outcome> {
        // The clients' machine fails too: what they have told by now is what is known.
        let acknowledged = probe.acknowledged()?;
        for vm in vms {
            vm.cut_power()?;
        }
        let since = Instant::now();
        for vm in vms {
            vm.start(&start_of(self.project, &vm.node)?.as_start())?;
        }
        let board = whole(self.project, &step, MENDED);
        let names = vms.iter().map(|vm| vm.node.clone()).collect();
        let mut outcome = Observations::default().outcome(scenario.name, names, 0);
        outcome.acknowledged = acknowledged;
        outcome.whole = if board.is_ok() { since.elapsed().as_secs_f64() } else { f64::INFINITY };
        match board {
            Ok(board) => {
                outcome.primaries =
                    board.nodes.iter().filter(|n| matches!(n.database, Some(Database::Primary(_)))).count();
                let primary = Vm::of(self.project, board.primary().unwrap_or_default())?;
                let count = format!("SELECT count(*) FROM ledger WHERE run = '{}'", probe.run);
                let asked =
                    "cd /; setpriv --reuid=postgres --regid=postgres --clear-groups psql -h /run/postgresql -AtX";
                let there = primary.exec(&format!("{asked} rehearsal -c \"{count}\""))?.output;
                outcome.lost = acknowledged.saturating_sub(there.trim().parse().unwrap_or(0));
                outcome.judge(&scenario.promise, None, f64::from(self.factor));
                self.progress.say("power", &format!("all of it serves again after {:.0} s, by itself", outcome.whole));
            }
            Err(e) => outcome.broken.push(e.to_string()),
        }
        told(step, &outcome);
        Ok(outcome)
    }

    /// Who would notice; none where there is no monitor, or nobody here is called by it.
    fn alarm(&self, scenario: &Scenario, victims: &[String], step: &Step) -> Result<Option<Alarm>> {
        let topology = &self.project.topology;
        let mut monitors = topology.nodes.iter().filter(|n| n.has_role("monitor")).peekable();
        if monitors.peek().is_none() {
            return Ok(None);
        }
        if !scenario.fault.silences() || monitors.any(|n| !victims.contains(&n.name)) {
            // What fires already, or is about to, is no answer to what is broken now.
            let Some(before) = self.alerts(scenario, victims, true) else {
                return fail("no monitor says which alerts fire");
            };
            return Ok(Some(Alarm::Monitor(before)));
        }
        let Some(told) = self.told.as_ref().filter(|told| told.dead_man) else { return Ok(None) };
        let until = Instant::now() + Duration::from_secs(180) * self.factor.min(3);
        step.message("waiting for a call of the dead man's switch");
        while !told.called().is_some_and(|call| call.elapsed().as_secs_f64() < SILENCE) {
            if Instant::now() > until {
                return fail("the dead man's switch does not call where `[alerts] dead_man` leads");
            }
            std::thread::sleep(Duration::from_secs(1));
        }
        Ok(Some(Alarm::DeadMan))
    }

    /// When the alarm was raised.
    fn raised(&self, alarm: &Alarm, scenario: &Scenario, victims: &[String]) -> Option<Instant> {
        match alarm {
            Alarm::Monitor(before) => {
                self.alerts(scenario, victims, false)?.iter().any(|alert| !before.contains(alert)).then(Instant::now)
            }
            Alarm::DeadMan => {
                let due = self.told.as_ref()?.called()? + Duration::from_secs_f64(SILENCE);
                (Instant::now() >= due).then_some(due)
            }
        }
    }

    /// Alerts that fire, or will if nothing changes, and name a victim, or a change of the primary, or etcd as a whole:
    /// as people are told, where that is here, else as a monitor says; none where it does not answer.
    fn alerts(&self, scenario: &Scenario, victims: &[String], pending: bool) -> Option<BTreeSet<(String, String)>> {
        let people = self.told.as_ref().filter(|told| told.people).map(AlertReceiver::firing);
        let firing = match people {
            Some(firing) if !pending => firing,
            people => {
                let asked = self.asked(scenario, victims, if pending { "pending|firing" } else { "firing" })?;
                people.into_iter().flatten().chain(asked).collect()
            }
        };
        let fits = |(name, node): &(String, String)| {
            victims.contains(node) || matches!(name.as_str(), "FailoverHappened" | "EtcdNoQuorum")
        };
        Some(firing.into_iter().filter(fits).collect())
    }

    /// Alerts in these states, as a monitor says that is not silenced.
    fn asked(&self, scenario: &Scenario, victims: &[String], states: &str) -> Option<BTreeSet<(String, String)>> {
        let lives = |n: &&Node| n.has_role("monitor") && !(scenario.fault.silences() && victims.contains(&n.name));
        let monitor = self.project.topology.nodes.iter().find(lives)?;
        let ask = format!(
            "promtool query instant -o json http://{}:9090 'ALERTS{{alertstate=~\"{states}\"}}'",
            monitor.address
        );
        let answer = Vm::of(self.project, &monitor.name).ok()?.exec_within(&ask, Duration::from_secs(60)).ok()?;
        let found: Vec<Value> = serde_json::from_str(&answer.output).ok()?;
        let label = |alert: &Value, name: &str| alert["metric"][name].as_str().unwrap_or_default().to_owned();
        Some(found.iter().map(|alert| (label(alert, "alertname"), label(alert, "node"))).collect())
    }
}

impl Alarm {
    /// Promised seconds until it is raised.
    const fn limit(&self) -> f64 {
        match self {
            Self::Monitor(_) => ALERT,
            Self::DeadMan => SILENCE,
        }
    }
}

impl Probe {
    fn ask(&self, command: &str) -> Result<String> {
        let done = self.vm.exec(command)?;
        if done.status == 0 {
            return Ok(done.output);
        }
        fail(format!("the clients' machine {}: {}", self.vm.node, done.output.trim_end()))
    }

    /// Its machine's clock, in milliseconds.
    fn clock(&self) -> Result<u64> {
        let said = self.ask("cat /proc/uptime")?;
        let seconds = said.split_whitespace().next().and_then(|s| s.parse().ok());
        let uptime = seconds.and_then(|s| Duration::try_from_secs_f64(s).ok()).unwrap_or_default();
        Ok(uptime.as_millis() as u64)
    }

    /// How long ago each kind of client last succeeded; none before all have begun.
    fn ages(&self) -> Result<Option<BTreeMap<String, f64>>> {
        let said = self.vm.exec(&format!("cat {DIR}/state"))?;
        Ok((said.status == 0).then(|| serde_json::from_str(&said.output).unwrap_or_default()))
    }

    /// How many writes were acknowledged, a second ago at most.
    fn acknowledged(&self) -> Result<usize> {
        let said = self.ask(&format!("cat {DIR}/acknowledged"))?;
        let unreadable = |_| Error::Failed(format!("the clients have not said how much they wrote: {said}"));
        said.trim().parse().map_err(unreadable)
    }

    /// Ends the clients; what they saw.
    fn end(&self, patience: u32) -> Result<Observations> {
        // Its last question, whether every write is there, is asked until it is answered.
        let limit = 120 * patience.min(4);
        let said = self.ask(&format!(
            "systemctl stop --no-block rehearsal; for i in $(seq {limit}); do [ -e {DIR}/result ] && break; sleep 1; done; \
             gzip -c {DIR}/result | base64 -w0"
        ))?;
        let unreadable =
            |e: &dyn std::fmt::Display| Error::Failed(format!("what the clients saw is not readable: {e}"));
        let packed = BASE64.decode(said.trim()).map_err(|e| unreadable(&e))?;
        serde_json::from_reader(flate2::read::GzDecoder::new(&packed[..])).map_err(|e| unreadable(&e))
    }
}

/// Waits until nothing is missing.
fn whole(project: &Project, step: &Step, patience: Duration) -> Result<FleetStatus> {
    let until = Instant::now() + patience;
    loop {
        let board = FleetStatus::read(project);
        if board.is_healthy() {
            return Ok(board);
        }
        if Instant::now() > until {
            return fail(format!("the fleet is not whole:\n{board}"));
        }
        let missing: Vec<&str> =
            board.nodes.iter().filter(|r| r.state != crate::vm::MachineState::Ready).map(|r| r.node.as_str()).collect();
        step.message(&format!("waiting for the whole fleet {}", missing.join(", ")));
        std::thread::sleep(Duration::from_secs(3));
    }
}

fn told(step: Step, outcome: &Outcome) {
    let kept =
        if outcome.broken.is_empty() { "kept".to_owned() } else { format!("BROKEN {}", outcome.broken.join("; ")) };
    step.done(&format!("{} ({}): {kept}", outcome.scenario, outcome.victims.join(", ")));
}
