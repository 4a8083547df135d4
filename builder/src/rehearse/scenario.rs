//! What can be broken, and what the fleet promises when it is.

use std::thread::sleep;
use std::time::Duration;

use fleet::{Node, Topology};

use super::paths::{Path, Paths};
use crate::error::{Error, Result, fail};
use crate::vm::{Database, FleetStatus, Vm};

/// One way to break the fleet.
pub struct Scenario {
    pub name: &'static str,
    pub about: &'static str,
    pub victim: Target,
    pub fault: Fault,
    /// Seconds that it lasts at least.
    pub lasts: u64,
    /// Where the victim is nothing else.
    pub promise: Limits,
}

/// Whom it hits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The hub that holds the VIP.
    Holder,
    /// The machine whose etcd member leads.
    EtcdLeader,
    /// The machine that takes the writes.
    Primary,
    /// A machine that follows it.
    Standby,
    /// A machine that runs Odoo.
    App,
    /// Any worker, or a hub that does not hold the VIP.
    Worker,
    /// A machine whose place a blank one may take.
    Spare,
    /// Every machine.
    All,
    /// Every machine with an etcd vote.
    Voters,
    /// A machine that monitors.
    Monitor,
}

/// What is done to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Switched off at once; switched on again when the fleet has got over it.
    PowerOff,
    /// Its disk is lost; a blank machine comes in its place.
    Wipe,
    /// The network cable is pulled.
    Unplug,
    /// It is pulled and put back again and again.
    Flap,
    /// Processes of a unit stop running, and go on later.
    Freeze(&'static str),
    /// The path to one hub, or to etcd, is cut.
    Cut(Path),
    /// The paths to all hubs are cut; the path to one of them comes back, goes again, and comes back for good.
    FlapByOneHub,
    /// A command is run; nothing is to be mended afterwards.
    Run(&'static str),
    /// It changes to the newer version that is published, as every node does in its turn.
    Upgrade,
    /// A command is run, and another one mends it.
    RunThen(&'static str, &'static str),
}

/// Longest outages in seconds at native speed; none where nothing is promised.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Limits {
    pub vip: Option<f64>,
    pub writes: Option<f64>,
    pub http: Option<f64>,
    /// Which part of Odoo's answers may be errors.
    pub errors: Option<f64>,
}

const fn limits(vip: f64, writes: f64, http: f64) -> Limits {
    Limits { vip: Some(vip), writes: Some(writes), http: Some(http), errors: None }
}

/// Seconds of three leases, as long as they are by default: what becomes of a primary without one is seen when
/// it has ended.
const LEASES: u64 = 60;

/// When a machine is gone. The hubs free a dead primary's place; Patroni alone takes 25.
const PRIMARY: Limits = limits(1.5, 8.0, 12.0);
const STANDBY: Limits = limits(1.5, 15.0, 15.0);
/// Who waits for a page of a dead hub gives up after 5 s (`probe.py`): nobody is there to tell it sooner.
const HOLDER: Limits = limits(1.5, 5.0, 8.0);
/// Who waits for one of a dead Odoo is told within 3 s, and asks again.
const APP: Limits = limits(1.5, 1.0, 4.0);

impl Limits {
    fn or_longer(self, other: Self) -> Self {
        let next_delay = |a: Option<f64>, b: Option<f64>| Some(a?.max(b?));
        Self {
            vip: next_delay(self.vip, other.vip),
            writes: next_delay(self.writes, other.writes),
            http: next_delay(self.http, other.http),
            errors: self.errors,
        }
    }
}

impl Scenario {
    /// What is promised when these nodes of a fleet that stands like this are hit: who loses a whole machine
    /// loses all that was on it.
    pub(super) fn promised(&self, victims: &[String], board: &FleetStatus) -> Limits {
        if !matches!(self.fault, Fault::PowerOff | Fault::Wipe | Fault::Unplug | Fault::Flap | Fault::FlapByOneHub) {
            return self.promise;
        }
        let hit = board.nodes.iter().filter(|row| victims.contains(&row.node));
        hit.fold(self.promise, |promise, row| {
            let carries = [
                (row.vip, HOLDER),
                (matches!(row.database, Some(Database::Primary(_))), PRIMARY),
                (row.database == Some(Database::Standby), STANDBY),
                (row.roles.iter().any(|r| r == "app"), APP),
            ];
            carries.into_iter().filter(|(it, _)| *it).fold(promise, |promise, (_, of_it)| promise.or_longer(of_it))
        })
    }
}

/// What there is, in the order it is rehearsed in.
pub const SCENARIOS: &[Scenario] = &[
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
        about: "the database's primary loses its power",
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
        about: "the machine whose etcd member leads loses its power",
        victim: Target::EtcdLeader,
        fault: Fault::PowerOff,
        lasts: 20,
        promise: limits(1.5, 5.0, 5.0),
    },
    Scenario {
        name: "standby",
        about: "a standby loses its power under load",
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
        about: "the cable of the hub that holds the VIP comes and goes",
        victim: Target::Holder,
        fault: Fault::Flap,
        lasts: 20,
        promise: HOLDER,
    },
    Scenario {
        name: "path",
        about: "one machine's path to the hub that holds the VIP is cut",
        victim: Target::Worker,
        fault: Fault::Cut(Path::Hub),
        lasts: 20,
        promise: limits(1.5, 5.0, 5.0),
    },
    Scenario {
        name: "postgres",
        about: "the primary's PostgreSQL is killed",
        victim: Target::Primary,
        fault: Fault::Run("pkill -KILL -o -u postgres -x postgres"),
        lasts: 20,
        promise: limits(0.5, 8.0, 10.0),
    },
    Scenario {
        name: "patroni",
        about: "the primary's Patroni is stopped (SIGSTOP)",
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
        about: "the primary's machine loses its uplink, which comes and goes by way of one hub",
        victim: Target::Primary,
        fault: Fault::FlapByOneHub,
        lasts: 20,
        promise: PRIMARY,
    },
    Scenario {
        name: "db-etcd",
        about: "the primary is cut from etcd only",
        victim: Target::Primary,
        fault: Fault::Cut(Path::Etcd),
        lasts: LEASES,
        promise: limits(0.5, 25.0, 30.0),
    },
    Scenario {
        name: "switchover",
        about: "the primary hands over on request",
        victim: Target::Primary,
        // It says with 0 that it did not. Where its answer was slow it has, and whoever asks without a name has
        // it back; but who is not the leader at first has not handed over.
        fault: Fault::Run(
            "for i in $(seq 20); do \
             said=$(patronictl -c /run/bakehouse/patroni.yml switchover --leader $(hostname) --force 2>&1); \
             case $said in *'uccessfully switched over'*) exit 0;; \
             *'is not the leader'*) [ $i != 1 ] && exit 0; break;; esac; sleep 1; done; echo \"$said\"; exit 1",
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
        about: "a machine loses its disk, and a blank one takes its place without a hand",
        victim: Target::Spare,
        fault: Fault::Wipe,
        lasts: 20,
        promise: APP,
    },
    Scenario {
        name: "upgrade",
        about: "every machine changes to the version that is published",
        victim: Target::All,
        fault: Fault::Upgrade,
        lasts: 20,
        // Of writes, all pauses together.
        promise: Limits { errors: Some(0.001), ..limits(3.0, 5.0, 5.0) },
    },
    Scenario {
        name: "power",
        about: "the power fails everywhere",
        victim: Target::All,
        fault: Fault::PowerOff,
        lasts: 20,
        promise: Limits { vip: None, writes: None, http: None, errors: None },
    },
];

/// Scenarios by name; all when none is named.
///
/// # Errors
/// A name that is none.
pub fn chosen(names: &[String]) -> Result<Vec<&'static Scenario>> {
    if names.is_empty() {
        return Ok(SCENARIOS.iter().collect());
    }
    let find = |name: &String| {
        SCENARIOS.iter().find(|s| s.name == name).ok_or_else(|| {
            let known: Vec<&str> = SCENARIOS.iter().map(|s| s.name).collect();
            Error::Usage(format!("there is no scenario `{name}`; there are: {}", known.join(", ")))
        })
    };
    names.iter().map(find).collect()
}

impl Target {
    /// The nodes it means, as the fleet stands; none where the fleet has no such node.
    pub(super) fn find(
        self,
        topology: &Topology,
        board: &FleetStatus,
        machine: &dyn Fn(&str) -> Vm,
    ) -> Result<Vec<String>> {
        let one = |name: Option<&str>| Ok(name.map(str::to_owned).into_iter().collect());
        let with = |role: &str, not: Option<&str>| {
            topology.nodes.iter().find(|n| n.has_role(role) && not != Some(&n.name)).map(|n| n.name.as_str())
        };
        match self {
            Self::Holder => one(board.holder()),
            Self::Primary => one(board.primary()),
            Self::Standby => {
                one(board.nodes.iter().find(|r| r.database == Some(Database::Standby)).map(|r| r.node.as_str()))
            }
            // Not the one that has the VIP or the database too, where there is a choice.
            Self::App => {
                let apps = || topology.nodes.iter().filter(|n| n.has_role("app"));
                let busy = |n: &Node| board.holder() == Some(&n.name) || board.primary() == Some(&n.name);
                one(apps().find(|n| !busy(n)).or_else(|| apps().next()).map(|n| n.name.as_str()))
            }
            Self::Worker => {
                let worker = topology.nodes.iter().find(|n| n.has_role("app") && board.holder() != Some(&n.name));
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
                    let asked = format!(
                        "exec 3<>/dev/tcp/{}/2381; printf 'GET /metrics HTTP/1.0\\r\\n\\r\\n' >&3; \
                         grep -q '^etcd_server_is_leader 1' <&3",
                        node.address
                    );
                    if machine(name).exec(&asked)?.status == 0 {
                        return Ok(vec![name.clone()]);
                    }
                }
                fail("no member of etcd leads")
            }
        }
    }
}

impl Fault {
    /// Breaks a machine, which is `factor` times slower than a real one.
    pub(super) fn inject(self, vm: &Vm, paths: &Paths, factor: u32) -> Result<()> {
        match self {
            Self::PowerOff => vm.cut_power(),
            Self::Wipe => {
                vm.cut_power()?;
                vm.wipe()
            }
            Self::Unplug => vm.plug(false),
            Self::Flap => {
                // As long as it takes to notice, and to come back.
                let pause = Duration::from_secs(2) * factor;
                for plugged in [false, true, false, true, false, true] {
                    vm.plug(plugged)?;
                    sleep(pause);
                }
                Ok(())
            }
            Self::Freeze(unit) => done(vm, &format!("systemctl freeze {unit}")),
            Self::Run(command) | Self::RunThen(command, _) => done(vm, command),
            Self::Cut(path) => done(vm, &paths.cut(path)),
            Self::FlapByOneHub => {
                let pause = Duration::from_secs(2) * factor;
                done(vm, &paths.cut(Path::Hubs))?;
                for open in [true, false, true, false, true] {
                    sleep(pause);
                    done(vm, &paths.last_hub(open))?;
                }
                Ok(())
            }
            // It does that by itself.
            Self::Upgrade => Ok(()),
        }
    }

    /// Whether nobody hears of who is hit.
    pub(super) const fn silences(self) -> bool {
        matches!(self, Self::PowerOff | Self::Wipe | Self::Unplug)
    }

    /// Mends it; machines that are off are not started here.
    pub(super) fn recover(self, vm: &Vm) -> Result<()> {
        match self {
            Self::PowerOff | Self::Wipe | Self::Flap | Self::Run(_) | Self::Upgrade => Ok(()),
            Self::Unplug => vm.plug(true),
            Self::Freeze(unit) => done(vm, &format!("systemctl thaw {unit}")),
            // Its watchdog may have restarted it in the meantime.
            Self::RunThen(_, command) => vm.exec(command).map(drop),
            Self::Cut(_) | Self::FlapByOneHub => vm.exec("nft delete table inet rehearsal").map(drop),
        }
    }
}

fn done(vm: &Vm, command: &str) -> Result<()> {
    let done = vm.exec(command)?;
    if done.status == 0 {
        return Ok(());
    }
    fail(format!("`{command}` on {} ended with {}: {}", vm.node, done.status, done.output.trim_end()))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::vm::{MachineState, NodeRow};

    fn row(node: &str, roles: &[&str], vip: bool, database: Option<Database>) -> NodeRow {
        let roles = roles.iter().map(|r| (*r).to_owned()).collect();
        NodeRow {
            node: node.into(),
            group: String::new(),
            roles,
            address: String::new(),
            state: MachineState::Ready,
            message: String::new(),
            vip,
            database,
        }
    }

    #[test]
    fn a_machine_with_several_roles_is_all_of_them() {
        let rows = vec![
            row("hub-1", &["hub"], true, None),
            row("app-1", &["app"], false, None),
            row("work-1", &["hub", "db", "app"], false, Some(Database::Standby)),
            row("data-1", &["hub", "db"], true, Some(Database::Primary(vec![]))),
        ];
        let board = FleetStatus { nodes: rows, odoo: BTreeMap::new(), urls: vec![] };
        let promised = |name: &str, victim: &str| {
            let scenario = chosen(&[name.to_owned()]).unwrap()[0];
            scenario.promised(&[victim.to_owned()], &board)
        };
        assert_eq!(promised("hub", "hub-1"), HOLDER);
        assert_eq!(promised("app", "app-1"), APP);
        assert_eq!(promised("app", "work-1"), STANDBY);
        assert_eq!(promised("hub", "data-1"), limits(1.5, 8.0, 12.0));
        // Only one service of it is hit.
        assert_eq!(promised("odoo", "work-1"), limits(0.5, 1.0, 10.0));
        // Nothing is promised of whom nothing can be asked.
        assert_eq!(promised("power", "data-1"), Limits::default());
    }

    #[test]
    fn names_are_names() {
        assert_eq!(chosen(&[]).unwrap().len(), SCENARIOS.len());
        assert_eq!(chosen(&["db".into(), "hub".into()]).unwrap()[0].name, "db");
        let e = chosen(&["dbb".into()]).map(drop).unwrap_err().to_string();
        assert!(e.contains("there is no scenario `dbb`; there are: hub, db"), "{e}");
        for (i, s) in SCENARIOS.iter().enumerate() {
            assert!(SCENARIOS[..i].iter().all(|other| other.name != s.name), "{} is there twice", s.name);
        }
    }
}
