//! Scenarios: faults, their targets, and the limits that the fleet promises.

use std::thread::sleep;
use std::time::Duration;

use fleet::{Node, Topology};

use super::paths::{Path, Paths};
use crate::error::{Error, Result, fail};
use crate::vm::{Database, FleetStatus, Vm};

/// A fault, its target, and its limits.
pub(crate) struct Scenario {
    /// Name on the command line.
    pub name: &'static str,
    /// Description for help and progress.
    pub about: &'static str,
    /// Target of the fault.
    pub victim: Target,
    /// The fault.
    pub fault: Fault,
    /// Minimum duration in seconds.
    pub lasts: u64,
    /// Limits for a target that has only the roles of the scenario.
    pub promise: Limits,
}

/// Target of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// The hub that holds the VIP.
    Holder,
    /// The machine with the etcd leader.
    EtcdLeader,
    /// The machine with PostgreSQL's primary.
    Primary,
    /// A machine with a standby.
    Standby,
    /// A machine with Odoo.
    App,
    /// A machine with Odoo that does not hold the VIP.
    Worker,
    /// A machine whose slot a blank machine may reclaim.
    Spare,
    /// Every machine.
    All,
    /// Every machine with an etcd vote.
    Voters,
    /// A machine with the role `monitor`.
    Monitor,
}

/// Fault to inject.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Power failure. The machine starts again after the fleet's failover.
    PowerOff,
    /// Power failure and loss of the disk. A blank machine starts in its place.
    Wipe,
    /// Unplugged network cable.
    Unplug,
    /// Network cable that is unplugged and plugged in repeatedly.
    Flap,
    /// Frozen processes of a unit.
    Freeze(&'static str),
    /// Dropped packets to and from hubs or etcd.
    Cut(Path),
    /// Dropped packets to and from all hubs. The path to one hub opens and closes repeatedly; in the end, it is open.
    FlapByOneHub,
    /// A command; the fault needs no recovery.
    Run(&'static str),
    /// Change to the published version, by an ordinary rollout.
    Upgrade,
    /// A command, and a second one for the recovery.
    RunThen(&'static str, &'static str),
}

/// Longest permitted outages in seconds, on machines at native speed; `None` is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Limits {
    /// Without a ping reply from the VIP.
    pub vip: Option<f64>,
    /// Without an acknowledged write.
    pub writes: Option<f64>,
    /// Without a correct response of Odoo.
    pub http: Option<f64>,
    /// Permitted share of errors in Odoo's responses.
    pub errors: Option<f64>,
}

const fn limits(vip: f64, writes: f64, http: f64) -> Limits {
    Limits { vip: Some(vip), writes: Some(writes), http: Some(http), errors: None }
}

/// Three default leases in seconds, because Patroni acts on a lost lease only after the lease has expired.
const LEASES: u64 = 60;

/// Loss of the primary's machine. The hubs remove the leader key of an unreachable primary; Patroni alone needs 25 s.
const PRIMARY: Limits = limits(1.5, 8.0, 12.0);
/// Loss of a standby's machine.
const STANDBY: Limits = limits(1.5, 15.0, 15.0);
/// Loss of the hub with the VIP. No host resets its connections, so clients wait for their timeout of 5 s (`probe.py`).
const HOLDER: Limits = limits(1.5, 5.0, 8.0);
/// Loss of a machine with Odoo. HAProxy ends requests to it within 3 s, and clients retry.
const APP: Limits = limits(1.5, 1.0, 4.0);

impl Limits {
    fn or_longer(self, other: Self) -> Self {
        let longer = |a: Option<f64>, b: Option<f64>| Some(a?.max(b?));
        Self {
            vip: longer(self.vip, other.vip),
            writes: longer(self.writes, other.writes),
            http: longer(self.http, other.http),
            errors: self.errors,
        }
    }
}

impl Scenario {
    /// Returns the limits for these targets. A fault of a whole machine affects all its roles, so the longest limits
    /// apply.
    pub(super) fn promised(&self, victims: &[String], status: &FleetStatus) -> Limits {
        if !matches!(self.fault, Fault::PowerOff | Fault::Wipe | Fault::Unplug | Fault::Flap | Fault::FlapByOneHub) {
            return self.promise;
        }
        let hit = status.nodes.iter().filter(|row| victims.contains(&row.node));
        hit.fold(self.promise, |promise, row| {
            let roles = [
                (row.vip, HOLDER),
                (matches!(row.database, Some(Database::Primary(_))), PRIMARY),
                (row.database == Some(Database::Standby), STANDBY),
                (row.roles.iter().any(|r| r == "app"), APP),
            ];
            roles.into_iter().filter(|(has, _)| *has).fold(promise, |promise, (_, limits)| promise.or_longer(limits))
        })
    }
}

/// All scenarios, in the order of a full rehearsal.
pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "hub",
        about: "the hub that holds the VIP loses its power",
        victim: Target::Holder,
        fault: Fault::PowerOff,
        lasts: 20,
        promise: HOLDER,
    },
    Scenario {
        name: "db",
        about: "the primary's machine loses its power",
        victim: Target::Primary,
        fault: Fault::PowerOff,
        lasts: 20,
        promise: PRIMARY,
    },
    Scenario {
        name: "app",
        about: "a machine with Odoo loses its power",
        victim: Target::App,
        fault: Fault::PowerOff,
        lasts: 20,
        promise: APP,
    },
    Scenario {
        name: "etcd-leader",
        about: "the machine with the etcd leader loses its power",
        victim: Target::EtcdLeader,
        fault: Fault::PowerOff,
        lasts: 20,
        promise: limits(1.5, 5.0, 5.0),
    },
    Scenario {
        name: "standby",
        about: "a standby's machine loses its power under load",
        victim: Target::Standby,
        fault: Fault::PowerOff,
        lasts: 20,
        promise: STANDBY,
    },
    Scenario {
        name: "hub-cable",
        about: "the hub that holds the VIP loses its cable",
        victim: Target::Holder,
        fault: Fault::Unplug,
        lasts: 20,
        promise: HOLDER,
    },
    Scenario {
        name: "hub-flaps",
        about: "the hub that holds the VIP loses its cable repeatedly",
        victim: Target::Holder,
        fault: Fault::Flap,
        lasts: 20,
        promise: HOLDER,
    },
    Scenario {
        name: "path",
        about: "one machine cannot reach the hub that holds the VIP",
        victim: Target::Worker,
        fault: Fault::Cut(Path::Hub),
        lasts: 20,
        promise: limits(1.5, 5.0, 5.0),
    },
    Scenario {
        name: "postgres",
        about: "PostgreSQL on the primary's machine crashes (SIGKILL)",
        victim: Target::Primary,
        fault: Fault::Run("pkill -KILL -o -u postgres -x postgres"),
        lasts: 20,
        promise: limits(0.5, 8.0, 10.0),
    },
    Scenario {
        name: "patroni",
        about: "Patroni on the primary's machine hangs (SIGSTOP)",
        victim: Target::Primary,
        fault: Fault::RunThen(
            "kill -STOP $(systemctl show -P MainPID patroni)",
            "kill -CONT $(systemctl show -P MainPID patroni)",
        ),
        lasts: LEASES,
        promise: limits(1.5, 40.0, 45.0),
    },
    Scenario {
        name: "db-cable",
        about: "the primary's machine loses its cable",
        victim: Target::Primary,
        fault: Fault::Unplug,
        lasts: 20,
        promise: PRIMARY,
    },
    Scenario {
        name: "db-flaps",
        about: "the primary's machine cannot reach the hubs, and reaches one of them intermittently",
        victim: Target::Primary,
        fault: Fault::FlapByOneHub,
        lasts: 20,
        promise: PRIMARY,
    },
    Scenario {
        name: "db-etcd",
        about: "the primary's machine cannot reach etcd",
        victim: Target::Primary,
        fault: Fault::Cut(Path::Etcd),
        lasts: LEASES,
        promise: limits(0.5, 25.0, 30.0),
    },
    Scenario {
        name: "switchover",
        about: "the operator requests a switchover",
        victim: Target::Primary,
        // patronictl exits with 0 even if the switchover failed, so the script matches its output. After a lost reply,
        // a retry without --leader would switch back. 'is not the leader' means success, except on the first attempt.
        fault: Fault::Run(
            "for i in $(seq 20); do \
             output=$(patronictl -c /run/bakehouse/patroni.yml switchover --leader $(hostname) --force 2>&1); \
             case $output in *'uccessfully switched over'*) exit 0;; \
             *'is not the leader'*) [ $i != 1 ] && exit 0; break;; esac; sleep 1; done; echo \"$output\"; exit 1",
        ),
        lasts: 20,
        promise: limits(0.5, 8.0, 10.0),
    },
    Scenario {
        name: "odoo",
        about: "Odoo on one machine hangs",
        victim: Target::App,
        fault: Fault::Freeze("odoo-http"),
        lasts: 20,
        promise: limits(0.5, 1.0, 10.0),
    },
    Scenario {
        name: "etcd",
        about: "every member of etcd hangs",
        victim: Target::Voters,
        fault: Fault::Freeze("etcd"),
        lasts: 180,
        promise: limits(0.5, 5.0, 10.0),
    },
    Scenario {
        name: "monitor",
        about: "a monitor loses its power",
        victim: Target::Monitor,
        fault: Fault::PowerOff,
        lasts: 20,
        promise: limits(0.5, 1.0, 2.0),
    },
    Scenario {
        name: "blank",
        about: "a machine loses its disk, and a blank machine reclaims its slot",
        victim: Target::Spare,
        fault: Fault::Wipe,
        lasts: 20,
        promise: APP,
    },
    Scenario {
        name: "upgrade",
        about: "every node changes to the published version",
        victim: Target::All,
        fault: Fault::Upgrade,
        lasts: 20,
        // For writes, the limit is for the sum of all pauses.
        promise: Limits { errors: Some(0.001), ..limits(3.0, 5.0, 5.0) },
    },
    Scenario {
        name: "power",
        about: "all machines lose their power",
        victim: Target::All,
        fault: Fault::PowerOff,
        lasts: 20,
        promise: Limits { vip: None, writes: None, http: None, errors: None },
    },
];

/// Returns the named scenarios, or all if `names` is empty.
///
/// # Errors
/// If there is no scenario with one of the names.
pub(crate) fn chosen(names: &[String]) -> Result<Vec<&'static Scenario>> {
    if names.is_empty() {
        return Ok(SCENARIOS.iter().collect());
    }
    let find = |name: &String| {
        SCENARIOS.iter().find(|s| s.name == name).ok_or_else(|| {
            let known: Vec<&str> = SCENARIOS.iter().map(|s| s.name).collect();
            Error::Usage(format!("there is no scenario `{name}`; scenarios are: {}", known.join(", ")))
        })
    };
    names.iter().map(find).collect()
}

impl Target {
    /// Returns the nodes of the target in the fleet's current state; none if the fleet has no such node.
    pub(super) fn find(
        self,
        topology: &Topology,
        status: &FleetStatus,
        machine: &dyn Fn(&str) -> Vm,
    ) -> Result<Vec<String>> {
        let one = |name: Option<&str>| Ok(name.map(str::to_owned).into_iter().collect());
        let with = |role: &str, not: Option<&str>| {
            topology.nodes.iter().find(|n| n.has_role(role) && not != Some(&n.name)).map(|n| n.name.as_str())
        };
        match self {
            Self::Holder => one(status.holder()),
            Self::Primary => one(status.primary()),
            Self::Standby => {
                one(status.nodes.iter().find(|r| r.database == Some(Database::Standby)).map(|r| r.node.as_str()))
            }
            // Prefers a machine without the VIP and without the primary, so that the fault affects Odoo only.
            Self::App => {
                let apps = || topology.nodes.iter().filter(|n| n.has_role("app"));
                let busy = |n: &Node| status.holder() == Some(&n.name) || status.primary() == Some(&n.name);
                one(apps().find(|n| !busy(n)).or_else(|| apps().next()).map(|n| n.name.as_str()))
            }
            Self::Worker => {
                let worker = topology.nodes.iter().find(|n| n.has_role("app") && status.holder() != Some(&n.name));
                one(worker.map(|n| n.name.as_str()))
            }
            Self::Spare => {
                let spare = topology.nodes.iter().find(|n| n.reclaim_after.is_some());
                one(spare.map(|n| n.name.as_str()))
            }
            Self::Monitor => one(with("monitor", None)),
            Self::All => Ok(topology.nodes.iter().map(|n| n.name.clone()).collect()),
            Self::Voters => Ok(topology.voters.clone()),
            Self::EtcdLeader => {
                for name in &topology.voters {
                    let Some(node) = topology.node(name) else { continue };
                    let query = format!(
                        "exec 3<>/dev/tcp/{}/2381; printf 'GET /metrics HTTP/1.0\\r\\n\\r\\n' >&3; \
                         grep -q '^etcd_server_is_leader 1' <&3",
                        node.address
                    );
                    if machine(name).exec(&query)?.status == 0 {
                        return Ok(vec![name.clone()]);
                    }
                }
                fail("etcd has no leader")
            }
        }
    }
}

impl Fault {
    /// Injects the fault into a machine, which is `factor` times slower than a real one.
    pub(super) fn inject(self, vm: &Vm, paths: &Paths, factor: u32) -> Result<()> {
        match self {
            Self::PowerOff => vm.cut_power(),
            Self::Wipe => {
                vm.cut_power()?;
                vm.wipe()
            }
            Self::Unplug => vm.plug(false),
            Self::Flap => {
                // Long enough for failure detection and for recovery.
                let pause = Duration::from_secs(2) * factor;
                for plugged in [false, true, false, true, false, true] {
                    vm.plug(plugged)?;
                    sleep(pause);
                }
                Ok(())
            }
            Self::Freeze(unit) => run(vm, &format!("systemctl freeze {unit}")),
            Self::Run(command) | Self::RunThen(command, _) => run(vm, command),
            Self::Cut(path) => run(vm, &paths.cut(path)),
            Self::FlapByOneHub => {
                let pause = Duration::from_secs(2) * factor;
                run(vm, &paths.cut(Path::Hubs))?;
                for open in [true, false, true, false, true] {
                    sleep(pause);
                    run(vm, &paths.last_hub(open))?;
                }
                Ok(())
            }
            // The nodes' agents start the update.
            Self::Upgrade => Ok(()),
        }
    }

    /// Returns whether the fault also stops the target from reporting.
    pub(super) const fn silences(self) -> bool {
        matches!(self, Self::PowerOff | Self::Wipe | Self::Unplug)
    }

    /// Recovers from the fault. The caller starts machines that are off.
    pub(super) fn recover(self, vm: &Vm) -> Result<()> {
        match self {
            Self::PowerOff | Self::Wipe | Self::Flap | Self::Run(_) | Self::Upgrade => Ok(()),
            Self::Unplug => vm.plug(true),
            Self::Freeze(unit) => run(vm, &format!("systemctl thaw {unit}")),
            // The result does not matter, because the watchdog may have reset the machine in the meantime.
            Self::RunThen(_, command) => vm.exec(command).map(drop),
            Self::Cut(_) | Self::FlapByOneHub => vm.exec("nft delete table inet rehearsal").map(drop),
        }
    }
}

fn run(vm: &Vm, command: &str) -> Result<()> {
    let done = vm.exec(command)?;
    if done.status == 0 {
        return Ok(());
    }
    fail(format!("`{command}` on {} exited with {}: {}", vm.node, done.status, done.output.trim_end()))
}

#[cfg(test)]
mod tests {

    use super::*;
    use crate::vm::{MachineState, NodeRow};

    fn row(node: &str, roles: &[&str], vip: bool, database: Option<Database>) -> NodeRow {
        NodeRow {
            node: node.into(),
            group: String::new(),
            roles: roles.iter().map(|r| (*r).to_owned()).collect(),
            address: String::new(),
            state: MachineState::Ready,
            message: String::new(),
            vip,
            database,
            report: None,
        }
    }

    #[test]
    fn the_longest_limits_of_all_roles_apply() {
        let rows = vec![
            row("hub-1", &["hub"], true, None),
            row("app-1", &["app"], false, None),
            row("work-1", &["hub", "db", "app"], false, Some(Database::Standby)),
            row("data-1", &["hub", "db"], true, Some(Database::Primary(vec![]))),
        ];
        let status = FleetStatus { nodes: rows, ..FleetStatus::default() };
        let promised = |name: &str, victim: &str| {
            let scenario = chosen(&[name.to_owned()]).unwrap()[0];
            scenario.promised(&[victim.to_owned()], &status)
        };
        assert_eq!(promised("hub", "hub-1"), HOLDER);
        assert_eq!(promised("app", "app-1"), APP);
        assert_eq!(promised("app", "work-1"), STANDBY);
        assert_eq!(promised("hub", "data-1"), limits(1.5, 8.0, 12.0));
        // The fault hits only one service of the machine.
        assert_eq!(promised("odoo", "work-1"), limits(0.5, 1.0, 10.0));
        // The clients lose their power, too, so there are no limits for them.
        assert_eq!(promised("power", "data-1"), Limits::default());
    }

    #[test]
    fn scenario_names_are_unique_and_unknown_ones_rejected() {
        assert_eq!(chosen(&[]).unwrap().len(), SCENARIOS.len());
        assert_eq!(chosen(&["db".into(), "hub".into()]).unwrap()[0].name, "db");
        let e = chosen(&["dbb".into()]).map(drop).unwrap_err().to_string();
        assert!(e.contains("there is no scenario `dbb`; scenarios are: hub, db"), "{e}");
        for (i, s) in SCENARIOS.iter().enumerate() {
            assert!(SCENARIOS[..i].iter().all(|other| other.name != s.name), "two scenarios have the name {}", s.name);
        }
    }
}
