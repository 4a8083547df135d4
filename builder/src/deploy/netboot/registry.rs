//! Which machine becomes what, and how far each is.
//!
//! Every request comes from a network that anyone may be on. So a record belongs to the MAC address or serial number
//! that a rule of fleet.toml names, whatever else the request says; a rule has one ticket; a hub or a voter gets its
//! ticket for a key that the operator confirmed.

use std::collections::BTreeSet;
use std::path::Path;

use fleet::netboot::{Mac, MachineDisk, NetbootMachine, ProgressReport, Step, printable};
use fleet::netboot::{ReportKey, code};
use fleet::{Netboot, Ticket};

use super::approvals::Approvals;
use super::record::{Record, Records, now};
use crate::error::{Error, Result};

/// Seconds after which a ticket that was not used is too old to be installed: tickets last a day longer.
const GOOD_FOR: u64 = 6 * 86_400;
/// Seconds in which a machine that keeps nothing gets the same ticket again, if it did not start with it.
const SAME: u64 = 600;
/// Seconds between two tickets of one machine, at least.
const BETWEEN: u64 = 30;
/// Bytes of a machine's own words that are kept.
const WORDS: usize = 300;

/// Machines, by what `[netboot]` says of them.
pub struct MachineRegistry {
    rules: Netboot,
    records: Records,
    approvals: Approvals,
}

/// The server's answer to a machine.
#[derive(Clone, Debug)]
pub enum RegistryDecision {
    Assigned(Decision),
    /// The operator has to confirm the machine's code; the node or group that it is to be.
    Unconfirmed {
        name: String,
        to: String,
    },
    /// Nothing, and why, with what to do.
    Refused(String),
}

/// What a machine is to be.
#[derive(Clone, Debug)]
pub struct Decision {
    /// The record's name: a MAC address or a serial number of fleet.toml.
    pub name: String,
    pub to: String,
    pub way: InstallMode,
    pub ticket: Ticket,
}

/// Where its image goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InstallMode {
    /// To this disk.
    Install(String),
    /// To its memory; what it keeps goes to this disk, if it keeps something.
    Run(Option<String>),
}

/// News that were believed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcceptedReport {
    pub name: String,
    pub to: String,
}

/// What is known of the fleet, as far as it is asked for here.
pub trait Plan {
    fn group_of(&self, to: &str) -> String;
    fn slots(&self, group: &str) -> Vec<String>;
    /// Whether its ticket holds an issuer's key: a hub's or a voter's does.
    fn is_founder(&self, to: &str) -> bool;
    /// Whether nothing needs to be kept.
    fn is_volatile(&self, group: &str) -> bool;
    /// Bytes that it needs of the disk that it is on, or that /var is on.
    fn disk(&self, group: &str, way: &InstallMode) -> u64;
    /// Bytes that it needs when it runs from memory.
    fn memory(&self, group: &str) -> u64;
    /// A ticket, which takes the place of the node's owner if `replace` says so.
    fn mint(&self, to: &str, replace: bool) -> Result<Ticket>;
}

impl MachineRegistry {
    /// The records of the fleet whose folder for them this is.
    ///
    /// # Errors
    /// The file is damaged.
    pub fn open(dir: &Path, rules: &Netboot) -> Result<Self> {
        Ok(Self { rules: rules.clone(), records: Records::open(dir)?, approvals: Approvals::new(dir) })
    }

    /// Has a machine installed again, in the place that it had, with a new ticket.
    ///
    /// # Errors
    /// It is not known; the disk is full.
    pub fn again(&mut self, name: &str) -> Result<()> {
        let mac: Option<Mac> = name.parse().ok();
        let normal = mac.map_or_else(|| name.to_owned(), |mac| mac.to_string());
        let all = &mut self.records.all;
        let found = if all.contains_key(&normal) {
            Some(normal)
        } else {
            all.iter().find(|(_, r)| mac.is_some_and(|mac| r.macs.contains(&mac))).map(|(name, _)| name.clone())
        };
        let Some(record) = found.and_then(|name| all.get_mut(&name)) else {
            let known: Vec<String> = all.keys().map(|k| printable(k)).collect();
            return Err(Error::Usage(format!(
                "no machine `{}` was installed; known are: {}",
                printable(name),
                known.join(", ")
            )));
        };
        // A machine that was never the node takes no one's place: a fleet that begins has no hub that could allow it.
        let heir = record.heir || record.installed.is_some() || record.started;
        *record = Record { heir, macs: record.macs.clone(), ..Record::new(&record.to) };
        self.records.store()
    }

    /// Confirms a machine's code; returns it as the machine shows it.
    ///
    /// # Errors
    /// It is not a code; the disk is full.
    pub fn approve(&self, typed: &str) -> Result<String> {
        self.approvals.add(typed)
    }

    /// MAC addresses of machines that have their node on their disks.
    pub fn installed(&self) -> BTreeSet<Mac> {
        let names = self.records.all.iter().filter(|(_, r)| r.installed.is_some());
        names.flat_map(|(name, _)| self.macs_of(name)).collect()
    }

    /// MAC addresses that a machine boots from: the one that fleet.toml names, or those that it said. Never one that
    /// belongs to another machine: it could be kept from booting.
    pub fn macs_of(&self, name: &str) -> Vec<Mac> {
        if let Ok(mac) = name.parse() {
            return vec![mac];
        }
        let said = self.records.all.get(name).map(|r| r.macs.iter().copied().collect::<Vec<_>>()).unwrap_or_default();
        let taken = |mac: &Mac| {
            let mac = mac.to_string();
            self.rules.machines.contains_key(&mac) || self.records.all.contains_key(&mac)
        };
        said.into_iter().filter(|mac| !taken(mac)).collect()
    }

    /// What the machine is to be; or why nothing.
    ///
    /// # Errors
    /// The record can't be written.
    pub fn decide(&mut self, machine: &NetbootMachine, plan: &impl Plan) -> Result<RegistryDecision> {
        let (name, to, way) = match self.place(machine, plan) {
            Ok(found) => found,
            Err(why) => return Ok(RegistryDecision::Refused(why)),
        };
        let known = self.records.all.get(&name).filter(|r| r.to == to);
        let mut record = known.cloned().unwrap_or_else(|| Record::new(&to));
        let mut code_used = None;
        if plan.is_founder(&to) && !self.rules.trust_lan {
            match &record.confirmed {
                Some(key) if *key == machine.key => {}
                Some(_) => {
                    return Ok(RegistryDecision::Refused(format!(
                        "the ticket of {to} was sealed for another machine, or for an earlier boot of this one; if this \
                         machine is to have it: bakehouse netboot --again {name}, and confirm its code"
                    )));
                }
                None => {
                    let code = code(&machine.key, &to);
                    if !self.approvals.has(&code)? {
                        return Ok(RegistryDecision::Unconfirmed { name, to });
                    }
                    record.confirmed = Some(machine.key.clone());
                    code_used = Some(code);
                }
            }
        }
        // What keeps nothing is new at each start, and takes the place that it had itself.
        let forgets = way == InstallMode::Run(None);
        let age = now().saturating_sub(record.minted);
        let reused = record.ticket.clone().filter(|_| !forgets || !record.started && age < SAME);
        if matches!(way, InstallMode::Install(_)) && reused.is_some() && age >= GOOD_FOR {
            return Ok(RegistryDecision::Refused(format!(
                "the ticket of {to} is older than {} days; bakehouse netboot --again {name} mints another",
                GOOD_FOR / 86_400
            )));
        }
        if forgets && record.started && age < BETWEEN {
            return Ok(RegistryDecision::Refused(format!(
                "{to} got a ticket {age} s ago; it gets another after {BETWEEN} s"
            )));
        }
        let is_new = reused.is_none();
        let ticket = if let Some(ticket) = reused {
            ticket
        } else {
            // Which of a group's places it had is not known here.
            let heir = (record.heir || forgets && record.ticket.is_some()) && plan.group_of(&to) != to;
            match plan.mint(&to, heir) {
                Ok(ticket) => {
                    record = Record { minted: now(), started: false, heir, ..record };
                    record.ticket.insert(ticket).clone()
                }
                Err(e) => return Ok(RegistryDecision::Refused(e.to_string())),
            }
        };
        if is_new || code_used.is_some() {
            record.macs = machine.macs.iter().copied().collect();
            self.records.all.insert(name.clone(), record);
            self.records.store()?;
        }
        if let Some(code) = code_used {
            self.approvals.remove(&code)?;
        }
        let place = match &way {
            InstallMode::Install(disk) => format!("on {disk}"),
            InstallMode::Run(None) => "in memory".to_owned(),
            InstallMode::Run(Some(disk)) => format!("in memory, with /var on {disk}"),
        };
        self.records.note(&name, &format!("is to be {to}, {place}"))?;
        Ok(RegistryDecision::Assigned(Decision { name, to, way, ticket }))
    }

    /// From now on the news of the machine that a ticket was sealed for are believed.
    ///
    /// # Errors
    /// The record can't be written.
    pub fn believe(&mut self, name: &str, key: &str, proof: ReportKey) -> Result<()> {
        let Some(record) = self.records.all.get_mut(name) else { return Ok(()) };
        record.believe(key, proof);
        self.records.store()
    }

    /// Keeps what a machine says, if it proves that it is one that was given a ticket.
    ///
    /// # Errors
    /// The record can't be written.
    pub fn hear(&mut self, news: &ProgressReport) -> Result<Option<AcceptedReport>> {
        let speaks = |r: &Record| r.reporters.iter().any(|by| by.key == news.key && by.proof.verify(news));
        let found = self.records.all.iter_mut().find(|(_, r)| news.version == NetbootMachine::VERSION && speaks(r));
        let Some((name, record)) = found else { return Ok(None) };
        let heard = AcceptedReport { name: name.clone(), to: record.to.clone() };
        match &news.step {
            Step::Writing { .. } => {}
            Step::Started => {
                record.started = true;
                self.records.store()?;
                self.records.note(&heard.name, &format!("runs as {}", heard.to))?;
            }
            Step::Installed => {
                record.installed = Some(now());
                // The disk has it. Here it would only wait to be stolen.
                record.ticket = None;
                self.records.store()?;
                self.records.note(&heard.name, &format!("has {} on its disk", heard.to))?;
            }
            Step::Failed { why } => {
                let why: String = why.chars().take(WORDS).collect();
                self.records.note(&heard.name, &format!("failed: {why}"))?;
            }
        }
        Ok(Some(heard))
    }

    /// The record's name, node or group, and where it goes.
    fn place(&mut self, machine: &NetbootMachine, plan: &impl Plan) -> Result<(String, String, InstallMode), String> {
        if machine.version != NetbootMachine::VERSION {
            return Err("this installer is of another version of bakehouse; boot it again".to_owned());
        }
        machine.check()?;
        let first = machine.macs.first().ok_or("a machine without a network card")?;
        let said = machine.macs.iter().map(Mac::to_string).chain([machine.serial.clone()]);
        let rule = said.filter(|name| !name.is_empty()).find(|name| self.rules.machines.contains_key(name));
        let (name, to) = match (&rule, &self.rules.others) {
            (Some(name), _) => (name.clone(), self.rules.machines[name].clone()),
            (None, Some(to)) => (self.name_of_other(machine, *first), to.clone()),
            (None, None) => {
                return Err(format!(
                    "no rule says what this machine is to be; in fleet.toml: [netboot.machines] \"{first}\" = \"NODE\""
                ));
            }
        };
        if rule.is_some() {
            self.adopt(&name, &to, machine, plan);
        }
        let group = plan.group_of(&to);
        self.room(&name, &to, plan)?;
        if self.rules.diskless.contains(&group) {
            let (need, have) = (plan.memory(&group), machine.memory);
            if have < need {
                return Err(format!(
                    "this machine has {} MB of memory, and {to} takes {} MB when it runs from there",
                    have / 1_000_000,
                    need.div_ceil(1_000_000)
                ));
            }
            if plan.is_volatile(&group) {
                let slot = self.slot(&name, to, plan)?;
                return Ok((name, slot, InstallMode::Run(None)));
            }
            let need = plan.disk(&group, &InstallMode::Run(None));
            return Ok((name, to, InstallMode::Run(Some(self.disk(&machine.disks, need)?))));
        }
        if let Some(at) = self.records.all.get(&name).and_then(|r| r.installed) {
            return Err(format!(
                "this machine was installed before (at {at}); start it from its disk, or: bakehouse netboot --again {name}"
            ));
        }
        let disk = self.disk(&machine.disks, plan.disk(&group, &InstallMode::Install(String::new())))?;
        Ok((name, to, InstallMode::Install(disk)))
    }

    /// A machine that no rule names: as it was known before, whichever of its cards came up first.
    fn name_of_other(&self, machine: &NetbootMachine, first: Mac) -> String {
        let mut names = machine.macs.iter().map(Mac::to_string);
        names.find(|name| self.records.all.contains_key(name)).unwrap_or_else(|| first.to_string())
    }

    /// Gives a record of an earlier version, which has the machine's first MAC address for a name, the rule's name.
    fn adopt(&mut self, name: &str, to: &str, machine: &NetbootMachine, plan: &impl Plan) {
        let slots = plan.slots(to);
        let is_same = |known: &str, record: &Record| {
            let of_machine = machine.macs.iter().any(|mac| mac.to_string() == known);
            !self.rules.machines.contains_key(known)
                && if slots.is_empty() {
                    record.to == to
                } else {
                    of_machine && (record.to == to || slots.contains(&record.to))
                }
        };
        let all = &self.records.all;
        if all.contains_key(name) {
            return;
        }
        let found = all.iter().find(|(known, record)| is_same(known, record)).map(|(known, _)| known.clone());
        if let Some(record) = found.and_then(|known| self.records.all.remove(&known)) {
            self.records.all.insert(name.to_owned(), record);
        }
    }

    /// Whether there is a place for one more machine: a node has one, a group as many as it has nodes.
    fn room(&self, name: &str, to: &str, plan: &impl Plan) -> Result<(), String> {
        let slots = plan.slots(to);
        let here = |of: &String| of == to || slots.contains(of);
        let taken = self.records.all.iter().filter(|(other, r)| *other != name && here(&r.to)).count();
        if taken < slots.len().max(1) {
            return Ok(());
        }
        Err(if slots.is_empty() {
            format!("`{to}` is another machine's; in fleet.toml: [netboot.machines] \"{name}\" = \"{to}\"")
        } else {
            format!("every node of `{to}` is another machine's; raise its `count`")
        })
    }

    /// A slot for a machine that remembers none: the one it has, or the first that no machine has here.
    fn slot(&self, name: &str, to: String, plan: &impl Plan) -> Result<String, String> {
        let slots = plan.slots(&to);
        if slots.is_empty() {
            return Ok(to);
        }
        if let Some(known) = self.records.all.get(name).filter(|r| slots.contains(&r.to)) {
            return Ok(known.to.clone());
        }
        let taken = |slot: &String| {
            self.records.all.values().any(|r| r.to == *slot) || self.rules.machines.values().any(|to| to == slot)
        };
        slots
            .iter()
            .find(|slot| !taken(slot))
            .cloned()
            .ok_or_else(|| format!("every node of `{to}` is another machine's; raise its `count`"))
    }

    /// The disk to overwrite: the one that fleet.toml names, or the only one there is.
    fn disk(&self, disks: &[MachineDisk], need: u64) -> Result<String, String> {
        let list = |disks: &[&MachineDisk]| {
            disks.iter().map(|d| format!("{} ({} MB)", d.path, d.size / 1_000_000)).collect::<Vec<_>>().join(", ")
        };
        let all: Vec<&MachineDisk> = disks.iter().collect();
        let fixed: Vec<&MachineDisk> = disks.iter().filter(|d| !d.removable).collect();
        let chosen = match (&self.rules.disk, &fixed[..]) {
            (Some(path), _) => all.iter().find(|d| d.path == *path).copied(),
            (None, [one]) => Some(*one),
            (None, []) => return Err("this machine has no disk".to_owned()),
            (None, _) => {
                return Err(format!(
                    "this machine has several disks, say which: [netboot] disk; it has {}",
                    list(&fixed)
                ));
            }
        };
        let Some(chosen) = chosen else {
            return Err(format!("[netboot] disk is not there; this machine has {}", list(&all)));
        };
        if chosen.size < need {
            return Err(format!("{} is too small: it takes {} MB", list(&[chosen]), need.div_ceil(1_000_000)));
        }
        Ok(chosen.path.clone())
    }
}

#[cfg(test)]
#[path = "registry_tests.rs"]
mod tests;
