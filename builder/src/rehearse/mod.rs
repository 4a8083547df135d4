//! `bakehouse rehearse`: injects faults into a running fleet and measures what clients notice.
//!
//! The clients run on a machine of the fleet that the fault does not hit (`probe.py`). They ping the VIP, write to the
//! database through the VIP, request pages of Odoo, and query every database server. An outage is the longest time
//! without a success. All times are from the clock of the clients' machine.

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
pub(crate) use outcome::Outcome;
pub(crate) use page::Page;
use paths::{Path, Paths};
use scenario::{Fault, Target};
pub(crate) use scenario::{SCENARIOS, Scenario, chosen};
pub(crate) use table::table;

use crate::error::{Error, Result, fail};
use crate::keys::authority::FleetKey;
use crate::progress::{Progress, Step};
use crate::project::Project;
use crate::vm::{Database, FleetStatus, Vm, start_of};

const PROBE: &str = include_str!("probe.py");
/// Folder of the probe on its machine.
const DIR: &str = "/run/rehearsal";
/// Seconds of normal operation before the fault, to check that the clients work.
const WARM_UP: u64 = 10;
/// Promised time in seconds until an alert names a target.
const ALERT_LIMIT: f64 = 30.0;
/// Seconds without a call of the dead man's switch, which calls every minute, after which its service raises an alarm.
const DEAD_MAN_LIMIT: f64 = 90.0;
/// Time for the fleet to become healthy after the recovery.
const RECOVERY_TIMEOUT: Duration = Duration::from_secs(1500);

/// Rehearsal of a running fleet.
pub(crate) struct Rehearsal<'a> {
    project: &'a Project,
    progress: &'a Progress,
    password: String,
    admin: String,
    receiver: Option<AlertReceiver>,
    /// Kind of the fleet's machines.
    pub machines: Machines,
    /// How many times slower the machines are than real ones. Their timeouts are as many times longer.
    factor: u32,
}

/// Source of the alarm for a fault.
enum Alarm {
    /// A monitor, with the alerts before the fault by name and node.
    Monitor(BTreeSet<(String, String)>),
    /// The dead man's switch, if the fault hits all monitors.
    DeadMan,
}

/// The running clients.
struct Probe {
    vm: Vm,
    run: String,
}

impl<'a> Rehearsal<'a> {
    /// Prepares a rehearsal, and listens for alerts.
    ///
    /// # Errors
    /// If the fleet is not healthy, or the fleet key of local machines cannot be read.
    pub(crate) fn new(project: &'a Project, progress: &'a Progress) -> Result<Self> {
        let step = progress.step("rehearse", "checking the fleet");
        let status = wait_until_healthy(project, &step, Duration::from_secs(300))
            .map_err(Error::cannot("rehearse on this fleet\n  help: start it with `bakehouse up` first"))?;
        drop(step);
        let secrets = FleetKey::of_vms(project)?.secrets;
        let any = status.nodes.first().map(|r| r.node.clone()).unwrap_or_default();
        let machines = match Vm::for_node(project, &any)?.exec("systemd-detect-virt")?.output.trim() {
            "qemu" => Machines::Emulated,
            "container-other" => Machines::Containers,
            _ => Machines::Kvm,
        };
        let receiver = AlertReceiver::listen(&project.topology.alerts)?;
        let factor = machines.factor();
        Ok(Self { project, progress, password: secrets.odoo, admin: secrets.odoo_admin, receiver, machines, factor })
    }

    /// Runs the scenarios one after the other, each `repeat` times. After each run, calls `save` with all outcomes.
    /// Stops if the fleet does not become healthy again.
    ///
    /// # Errors
    /// If a fault cannot be injected, the clients do not run, or `save` fails.
    pub(crate) fn play(
        &self,
        scenarios: &[&'static Scenario],
        repeat: u32,
        mut save: impl FnMut(&[Outcome]) -> Result<()>,
    ) -> Result<()> {
        let mut outcomes = Vec::new();
        for scenario in scenarios {
            for _ in 0..repeat {
                let Some(outcome) = self.play_one(scenario)? else {
                    let message = format!("{}: skipped, because this fleet has no target for it", scenario.name);
                    self.progress.say("rehearse", &message);
                    break;
                };
                let is_healthy = outcome.whole.is_finite();
                outcomes.push(outcome);
                save(&outcomes)?;
                if !is_healthy {
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
        let status = wait_until_healthy(self.project, &step, RECOVERY_TIMEOUT)?;
        let machine = |name: &str| Vm::at(name, self.project.dir.join("build/vm").join(name));
        let victims = scenario.victim.find(topology, &status, &machine)?;
        let promise = scenario.promised(&victims, &status);
        let Some(host) = self.probe_host(scenario, &victims) else { return Ok(None) };
        if victims.is_empty() {
            return Ok(None);
        }
        step.message(&format!("{}: clients start on {}", scenario.about, host.name));
        let probe = self.start_probe(host, &step)?;
        std::thread::sleep(Duration::from_secs(WARM_UP * u64::from(self.factor.min(3))));

        let vms: Vec<Vm> = victims.iter().map(|name| machine(name)).collect();
        if scenario.victim == Target::All {
            return self.power_loss(scenario, &vms, &probe, step).map(Some);
        }
        let paths = Paths::new(topology, status.holder(), &victims);
        let alarm = self.alarm(scenario, &victims, &step)?;
        step.message(&format!("{}: {}", scenario.about, victims.join(", ")));
        let t0 = probe.clock()?;
        for vm in &vms {
            scenario.fault.inject(vm, &paths, self.factor)?;
        }
        let (clients_recovered, alert) = self.watch(scenario, &probe, &victims, alarm.as_ref(), &step)?;

        // The clients continue during the recovery, because the return of a node may cause an outage, too.
        let recovery = Instant::now();
        for vm in &vms {
            if !vm.is_running() {
                vm.start(&start_of(self.project, &vm.node)?.as_start())?;
            }
            scenario.fault.recover(vm)?;
        }
        let healthy = wait_until_healthy(self.project, &step, RECOVERY_TIMEOUT);
        let mut outcome = probe.end(self.factor)?.outcome(scenario.name, victims, t0);
        outcome.alert = alert;
        outcome.whole = if healthy.is_ok() { recovery.elapsed().as_secs_f64() } else { f64::INFINITY };
        outcome.judge(&promise, alarm.map(|alarm| alarm.limit()), f64::from(self.factor));
        if !clients_recovered {
            outcome.broken.push("the clients did not recover while the fault lasted".to_owned());
        }
        if let Err(e) = healthy {
            outcome.broken.push(e.chain());
        }
        report(step, &outcome);
        Ok(Some(outcome))
    }

    /// Returns the node that runs the clients: one that the fault does not hit. Prefers an application node, because
    /// the packet filters and the databases let it connect to all services.
    fn probe_host(&self, scenario: &Scenario, victims: &[String]) -> Option<&'a Node> {
        let nodes = &self.project.topology.nodes;
        // Only clients on the target notice that its path to the hub is cut.
        if scenario.fault == Fault::Cut(Path::Hub) {
            return nodes.iter().find(|n| victims.contains(&n.name));
        }
        let harmless = matches!(scenario.fault, Fault::Freeze("etcd")) || scenario.victim == Target::All;
        let is_usable = |n: &&Node| harmless || !victims.contains(&n.name);
        let with = |role: &str| nodes.iter().filter(is_usable).find(|n| n.has_role(role));
        with("app").or_else(|| with("db"))
    }

    fn start_probe(&self, host: &Node, step: &Step) -> Result<Probe> {
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
        let probe = Probe { vm: Vm::for_node(self.project, &host.name)?, run };
        let put = |name: &str, text: &str| format!("echo {} | base64 -d > {DIR}/{name}", BASE64.encode(text));
        probe.exec(&format!(
            "systemctl stop rehearsal 2>/dev/null; rm -rf {DIR}; umask 077; mkdir -p {DIR} && {} && {} && \
             systemd-run -q --collect -u rehearsal -p TimeoutStopSec=900 python3 {DIR}/probe.py {DIR}/config",
            put("config", &config.to_string()),
            put("probe.py", PROBE)
        ))?;
        let until = Instant::now() + Duration::from_secs(60) * self.factor;
        while !probe.ages()?.is_some_and(|ages| ages.values().all(|age| *age < 60.0)) {
            if Instant::now() > until {
                let journal = probe.vm.exec("journalctl -b --no-pager -u rehearsal -n 20")?.output;
                return fail(format!("the clients on {} do not reach the services:\n{journal}", host.name));
            }
            step.message(&format!("the clients on {} connect", host.name));
            std::thread::sleep(Duration::from_secs(2));
        }
        Ok(probe)
    }

    /// Waits until all clients succeed again and an alarm was raised. Returns whether the clients recovered, and the
    /// seconds until the alarm.
    fn watch(
        &self,
        scenario: &Scenario,
        probe: &Probe,
        victims: &[String],
        alarm: Option<&Alarm>,
        step: &Step,
    ) -> Result<(bool, Option<f64>)> {
        let since = Instant::now();
        let slowdown = self.factor.min(3);
        let minimum = Duration::from_secs(scenario.lasts * u64::from(if scenario.lasts > 60 { 1 } else { slowdown }));
        let maximum = minimum + Duration::from_secs(120) * slowdown;
        let mut alert = None;
        loop {
            std::thread::sleep(Duration::from_secs(2));
            if let (Some(alarm), None) = (alarm, alert) {
                let raised = self.raised(alarm, scenario, victims);
                alert = raised.map(|at| at.saturating_duration_since(since).as_secs_f64());
            }
            let ages = probe.ages()?.unwrap_or_default();
            let recovered = !ages.is_empty() && ages.values().all(|age| *age < 4.0 * f64::from(slowdown));
            let is_overdue = |alarm: &Alarm| since.elapsed().as_secs_f64() > alarm.limit() * f64::from(self.factor);
            let alarm_done = alert.is_some() || alarm.is_none_or(is_overdue);
            let successes: Vec<String> = ages.iter().map(|(kind, age)| format!("{kind} {age:.0} s ago")).collect();
            step.message(&format!("{}: {}", scenario.about, successes.join(", ")));
            if since.elapsed() > minimum && recovered && alarm_done {
                return Ok((true, alert));
            }
            if since.elapsed() > maximum {
                return Ok((false, alert));
            }
        }
    }

    /// Cuts the power of all machines during writes. All acknowledged writes must exist after the restart.
    fn power_loss(&self, scenario: &'static Scenario, vms: &[Vm], probe: &Probe, step: Step) -> Result<Outcome> {
        // Before the fault, because the clients' machine loses its power, too.
        let acknowledged = probe.acknowledged()?;
        for vm in vms {
            vm.cut_power()?;
        }
        let since = Instant::now();
        for vm in vms {
            vm.start(&start_of(self.project, &vm.node)?.as_start())?;
        }
        let healthy = wait_until_healthy(self.project, &step, RECOVERY_TIMEOUT);
        let names = vms.iter().map(|vm| vm.node.clone()).collect();
        let mut outcome = Observations::default().outcome(scenario.name, names, 0);
        outcome.acknowledged = acknowledged;
        outcome.whole = if healthy.is_ok() { since.elapsed().as_secs_f64() } else { f64::INFINITY };
        match healthy {
            Ok(status) => {
                outcome.primaries =
                    status.nodes.iter().filter(|n| matches!(n.database, Some(Database::Primary(_)))).count();
                let primary = Vm::for_node(self.project, status.primary().unwrap_or_default())?;
                let query = format!("SELECT count(*) FROM ledger WHERE run = '{}'", probe.run);
                let psql =
                    "cd /; setpriv --reuid=postgres --regid=postgres --clear-groups psql -h /run/postgresql -AtX";
                let count = primary.exec(&format!("{psql} rehearsal -c \"{query}\""))?.output;
                outcome.lost = acknowledged.saturating_sub(count.trim().parse().unwrap_or(0));
                outcome.judge(&scenario.promise, None, f64::from(self.factor));
                let message = format!("the fleet was healthy again after {:.0} s, without an operator", outcome.whole);
                self.progress.say("power", &message);
            }
            Err(e) => outcome.broken.push(e.chain()),
        }
        report(step, &outcome);
        Ok(outcome)
    }

    /// Returns the source of the alarm. `None` if the fleet has no monitor, or the fault hits all monitors and the dead
    /// man's switch does not call this host.
    fn alarm(&self, scenario: &Scenario, victims: &[String], step: &Step) -> Result<Option<Alarm>> {
        let topology = &self.project.topology;
        let mut monitors = topology.nodes.iter().filter(|n| n.has_role("monitor")).peekable();
        if monitors.peek().is_none() {
            return Ok(None);
        }
        if !scenario.fault.silences() || monitors.any(|n| !victims.contains(&n.name)) {
            // Alerts that fire or are pending already are not caused by this fault.
            let Some(before) = self.alerts(scenario, victims, true) else {
                return fail("cannot read the alerts from a monitor");
            };
            return Ok(Some(Alarm::Monitor(before)));
        }
        let Some(receiver) = self.receiver.as_ref().filter(|r| r.dead_man) else { return Ok(None) };
        let until = Instant::now() + Duration::from_secs(180) * self.factor.min(3);
        step.message("waiting for a call of the dead man's switch");
        while !receiver.called().is_some_and(|call| call.elapsed().as_secs_f64() < DEAD_MAN_LIMIT) {
            if Instant::now() > until {
                return fail("no call arrived at the URL in `[alerts] dead_man`");
            }
            std::thread::sleep(Duration::from_secs(1));
        }
        Ok(Some(Alarm::DeadMan))
    }

    /// Returns the time of the alarm.
    fn raised(&self, alarm: &Alarm, scenario: &Scenario, victims: &[String]) -> Option<Instant> {
        match alarm {
            Alarm::Monitor(before) => {
                self.alerts(scenario, victims, false)?.iter().any(|alert| !before.contains(alert)).then(Instant::now)
            }
            Alarm::DeadMan => {
                let due = self.receiver.as_ref()?.called()? + Duration::from_secs_f64(DEAD_MAN_LIMIT);
                (Instant::now() >= due).then_some(due)
            }
        }
    }

    /// Returns the firing alerts about a target, a failover, or etcd's quorum; `pending` also returns pending ones.
    /// Reads them from the receiver if Alertmanager posts to this host, otherwise from a monitor. `None` if the monitor
    /// does not reply.
    fn alerts(&self, scenario: &Scenario, victims: &[String], pending: bool) -> Option<BTreeSet<(String, String)>> {
        let received = self.receiver.as_ref().filter(|r| r.people).map(AlertReceiver::firing);
        let firing = match received {
            Some(firing) if !pending => firing,
            received => {
                let states = if pending { "pending|firing" } else { "firing" };
                let queried = self.query_monitor(scenario, victims, states)?;
                received.into_iter().flatten().chain(queried).collect()
            }
        };
        let is_relevant = |(name, node): &(String, String)| {
            victims.contains(node) || matches!(name.as_str(), "FailoverHappened" | "EtcdNoQuorum")
        };
        Some(firing.into_iter().filter(is_relevant).collect())
    }

    /// Returns the alerts in these states from a monitor that the fault does not silence.
    fn query_monitor(
        &self,
        scenario: &Scenario,
        victims: &[String],
        states: &str,
    ) -> Option<BTreeSet<(String, String)>> {
        let is_usable = |n: &&Node| n.has_role("monitor") && !(scenario.fault.silences() && victims.contains(&n.name));
        let monitor = self.project.topology.nodes.iter().find(is_usable)?;
        let query = format!(
            "promtool query instant -o json http://{}:9090 'ALERTS{{alertstate=~\"{states}\"}}'",
            monitor.address
        );
        let reply =
            Vm::for_node(self.project, &monitor.name).ok()?.exec_within(&query, Duration::from_secs(60)).ok()?;
        let found: Vec<Value> = serde_json::from_str(&reply.output).ok()?;
        let label = |alert: &Value, name: &str| alert["metric"][name].as_str().unwrap_or_default().to_owned();
        Some(found.iter().map(|alert| (label(alert, "alertname"), label(alert, "node"))).collect())
    }
}

impl Alarm {
    /// Returns the promised seconds until the alarm.
    const fn limit(&self) -> f64 {
        match self {
            Self::Monitor(_) => ALERT_LIMIT,
            Self::DeadMan => DEAD_MAN_LIMIT,
        }
    }
}

impl Probe {
    fn exec(&self, command: &str) -> Result<String> {
        let done = self.vm.exec(command)?;
        if done.status == 0 {
            return Ok(done.output);
        }
        fail(format!("a command on the clients' machine {} failed: {}", self.vm.node, done.output.trim_end()))
    }

    /// Returns the clock of the probe's machine, in milliseconds.
    fn clock(&self) -> Result<u64> {
        let output = self.exec("cat /proc/uptime")?;
        let seconds = output.split_whitespace().next().and_then(|s| s.parse().ok());
        let uptime = seconds.and_then(|s| Duration::try_from_secs_f64(s).ok()).unwrap_or_default();
        Ok(uptime.as_millis() as u64)
    }

    /// Returns the seconds since the last success of each kind of client; `None` before all clients have started.
    fn ages(&self) -> Result<Option<BTreeMap<String, f64>>> {
        let done = self.vm.exec(&format!("cat {DIR}/state"))?;
        Ok((done.status == 0).then(|| serde_json::from_str(&done.output).unwrap_or_default()))
    }

    /// Returns the number of acknowledged writes, which the probe updates every second.
    fn acknowledged(&self) -> Result<usize> {
        let output = self.exec(&format!("cat {DIR}/acknowledged"))?;
        let context = |_| Error::Failed(format!("cannot read the clients' number of writes: {output}"));
        output.trim().parse().map_err(context)
    }

    /// Stops the clients. Returns their observations.
    fn end(&self, timeout_scale: u32) -> Result<Observations> {
        // The probe retries its last query, for missing writes, until the database replies.
        let limit = 120 * timeout_scale.min(4);
        let output = self.exec(&format!(
            "systemctl stop --no-block rehearsal; for i in $(seq {limit}); do [ -e {DIR}/result ] && break; \
             sleep 1; done; gzip -c {DIR}/result | base64 -w0"
        ))?;
        let action = "read the clients' observations";
        let packed = BASE64.decode(output.trim()).map_err(Error::cannot(action))?;
        serde_json::from_reader(flate2::read::GzDecoder::new(&packed[..])).map_err(Error::cannot(action))
    }
}

/// Waits until the fleet is healthy.
fn wait_until_healthy(project: &Project, step: &Step, timeout: Duration) -> Result<FleetStatus> {
    let until = Instant::now() + timeout;
    loop {
        let status = FleetStatus::read(project);
        if status.is_healthy() {
            return Ok(status);
        }
        if Instant::now() > until {
            return fail(format!("the fleet is not healthy:\n{status}"));
        }
        let nodes = status.nodes.iter().filter(|r| r.state != crate::vm::MachineState::Ready);
        let missing: Vec<&str> = nodes.map(|r| r.node.as_str()).collect();
        step.message(&format!("waiting until the fleet is healthy {}", missing.join(", ")));
        std::thread::sleep(Duration::from_secs(3));
    }
}

/// Ends the step with the result of a run.
fn report(step: Step, outcome: &Outcome) {
    let promise =
        if outcome.broken.is_empty() { "kept".to_owned() } else { format!("BROKEN {}", outcome.broken.join("; ")) };
    step.done(&format!("{} ({}): {promise}", outcome.scenario, outcome.victims.join(", ")));
}
