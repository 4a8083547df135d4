//! Assignment of nodes to machines, and the state of each machine.
//!
//! Attackers may be on the network of the requests. A record therefore belongs to the MAC address or serial number of
//! a rule in fleet.toml, whatever else the request contains. A rule has one ticket. The registry seals the ticket of a
//! hub or a voter only for a key that the operator confirmed.

use std::collections::BTreeSet;
use std::path::Path;

use fleet::netboot::{Mac, MachineDisk, NetbootMachine, ProgressReport, Step, printable};
use fleet::netboot::{ReportKey, code};
use fleet::{ErrorChain, Netboot, Ticket};

use super::approvals::Approvals;
use super::record::{Record, Records, now};
use crate::error::{Error, Result};

/// Age in seconds from which the registry no longer installs an unused ticket. Tickets expire a day later.
const MAX_TICKET_AGE: u64 = 6 * 86_400;
/// Seconds for which a stateless machine gets the same ticket again, until it reports a start with it.
const REUSE_PERIOD: u64 = 600;
/// Minimum interval in seconds between two tickets of a stateless machine.
const MIN_TICKET_INTERVAL: u64 = 30;
/// Maximum length in characters of a machine's error in the audit log.
const MAX_ERROR: usize = 300;

/// Machines, by the rules in `[netboot]`.
pub(super) struct MachineRegistry {
    rules: Netboot,
    records: Records,
    approvals: Approvals,
}

/// Decision about a machine's request.
#[derive(Clone, Debug)]
pub(super) enum RegistryDecision {
    /// The machine gets a ticket.
    Assigned(Decision),
    /// The operator has to confirm the machine's code first.
    Unconfirmed {
        /// Name of the record.
        name: String,
        /// Node or group that the machine becomes.
        to: String,
    },
    /// The machine gets nothing. The text has the reason and the fix.
    Refused(String),
}

/// Reason for which a machine gets nothing, and the fix.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Refusal(String);

/// Assignment of a machine.
#[derive(Clone, Debug)]
pub(super) struct Decision {
    /// Name of the record: a MAC address or a serial number from fleet.toml.
    pub name: String,
    /// Node or group that the machine becomes.
    pub to: String,
    /// Place of the image.
    pub mode: InstallMode,
    /// Ticket for the machine.
    pub ticket: Ticket,
}

/// Place of a machine's image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum InstallMode {
    /// The machine boots from this disk.
    Install(String),
    /// The machine runs from memory, with `/var` on this disk if the node has state.
    Run(Option<String>),
}

/// A report that the registry accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct AcceptedReport {
    /// Name of the record.
    pub name: String,
    /// Node or group of the machine.
    pub to: String,
}

/// Properties of the fleet that the registry needs.
pub(super) trait Plan {
    /// Returns the group of a node, or `to` itself if it is a group.
    fn group_of(&self, to: &str) -> String;
    /// Returns the slots of a group.
    fn slots(&self, group: &str) -> Vec<String>;
    /// Returns whether `to` is a founder, whose ticket has an issuer's private key.
    fn is_founder(&self, to: &str) -> bool;
    /// Returns whether the group's nodes have no state.
    fn is_volatile(&self, group: &str) -> bool;
    /// Returns the bytes that the image, or `/var` alone, needs on the disk.
    fn disk(&self, group: &str, mode: &InstallMode) -> u64;
    /// Returns the bytes of memory that a machine needs to run from memory.
    fn memory(&self, group: &str) -> u64;
    /// Mints a ticket. `replace` lets it take the slot from its owner.
    fn mint(&self, to: &str, replace: bool) -> Result<Ticket>;
}

impl MachineRegistry {
    /// Opens the registry with the records in a folder.
    ///
    /// # Errors
    /// If the records cannot be read or parsed.
    pub(super) fn open(dir: &Path, rules: &Netboot) -> Result<Self> {
        Ok(Self { rules: rules.clone(), records: Records::open(dir)?, approvals: Approvals::new(dir) })
    }

    /// Lets a machine install again, with the same assignment and a new ticket.
    ///
    /// # Errors
    /// If no record has this name, or the records cannot be written.
    pub(super) fn again(&mut self, name: &str) -> Result<()> {
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
                "there is no record of a machine `{}`; known machines are: {}",
                printable(name),
                known.join(", ")
            )));
        };
        // A ticket that replaces an owner needs a hub, and a new fleet has no hub yet. So a machine that was never the
        // node gets an ordinary ticket.
        let heir = record.heir || record.installed.is_some() || record.started;
        *record = Record { heir, macs: record.macs.clone(), ..Record::new(&record.to) };
        self.records.store()
    }

    /// Confirms a machine's code. Returns the code in the format of the machine's console.
    ///
    /// # Errors
    /// If `typed` is not a code, or the file cannot be written.
    pub(super) fn approve(&self, typed: &str) -> Result<String> {
        self.approvals.add(typed)
    }

    /// Returns the MAC addresses of machines that are installed on their disks.
    pub(super) fn installed(&self) -> BTreeSet<Mac> {
        let names = self.records.all.iter().filter(|(_, r)| r.installed.is_some());
        names.flat_map(|(name, _)| self.macs_of(name)).collect()
    }

    /// Returns the MAC addresses that a machine boots from: the one in fleet.toml, or those of its request. Leaves out
    /// addresses of other machines, because a machine could otherwise stop another one from booting.
    pub(super) fn macs_of(&self, name: &str) -> Vec<Mac> {
        if let Ok(mac) = name.parse() {
            return vec![mac];
        }
        let known = self.records.all.get(name).map(|r| r.macs.iter().copied().collect::<Vec<_>>()).unwrap_or_default();
        let taken = |mac: &Mac| {
            let mac = mac.to_string();
            self.rules.machines.contains_key(&mac) || self.records.all.contains_key(&mac)
        };
        known.into_iter().filter(|mac| !taken(mac)).collect()
    }

    /// Decides about a machine's request, and mints a ticket if the machine needs one.
    ///
    /// # Errors
    /// If the records, the codes or the audit log cannot be read or written.
    pub(super) fn decide(&mut self, machine: &NetbootMachine, plan: &impl Plan) -> Result<RegistryDecision> {
        let (name, to, mode) = match self.match_rule(machine, plan) {
            Ok(found) => found,
            Err(Refusal(why)) => return Ok(RegistryDecision::Refused(why)),
        };
        let known = self.records.all.get(&name).filter(|r| r.to == to);
        let mut record = known.cloned().unwrap_or_else(|| Record::new(&to));
        let mut code_used = None;
        if plan.is_founder(&to) && !self.rules.trust_lan {
            match &record.confirmed {
                Some(key) if *key == machine.key => {}
                Some(_) => {
                    return Ok(RegistryDecision::Refused(format!(
                        "the server sealed the ticket of {to} for another machine, or for an earlier boot of this one; \
                         to give this machine a ticket, run bakehouse netboot --again {name} and confirm the new code"
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
        // A stateless machine joins as a new node at each start, and replaces its previous self.
        let is_stateless = mode == InstallMode::Run(None);
        let age = now().saturating_sub(record.minted);
        let reused = record.ticket.clone().filter(|_| !is_stateless || !record.started && age < REUSE_PERIOD);
        if matches!(mode, InstallMode::Install(_)) && reused.is_some() && age >= MAX_TICKET_AGE {
            return Ok(RegistryDecision::Refused(format!(
                "the ticket of {to} is older than {} days; bakehouse netboot --again {name} mints another",
                MAX_TICKET_AGE / 86_400
            )));
        }
        if is_stateless && record.started && age < MIN_TICKET_INTERVAL {
            return Ok(RegistryDecision::Refused(format!(
                "{to} got a ticket {age} s ago; it gets another after {MIN_TICKET_INTERVAL} s"
            )));
        }
        let is_new = reused.is_none();
        let ticket = if let Some(ticket) = reused {
            ticket
        } else {
            // A ticket for a group cannot replace an owner, because this server does not know the machine's slot.
            let heir = (record.heir || is_stateless && record.ticket.is_some()) && plan.group_of(&to) != to;
            match plan.mint(&to, heir) {
                Ok(ticket) => {
                    record = Record { minted: now(), started: false, heir, ..record };
                    record.ticket.insert(ticket).clone()
                }
                Err(e) => return Ok(RegistryDecision::Refused(ErrorChain::new(&e).one_line())),
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
        let place = match &mode {
            InstallMode::Install(disk) => format!("on {disk}"),
            InstallMode::Run(None) => "in memory".to_owned(),
            InstallMode::Run(Some(disk)) => format!("in memory, with /var on {disk}"),
        };
        self.records.audit(&name, &format!("is to be {to}, {place}"))?;
        Ok(RegistryDecision::Assigned(Decision { name, to, mode, ticket }))
    }

    /// Accepts reports from the machine for which the server sealed a ticket.
    ///
    /// # Errors
    /// If the records cannot be written.
    pub(super) fn trust_reports(&mut self, name: &str, key: &str, proof: ReportKey) -> Result<()> {
        let Some(record) = self.records.all.get_mut(name) else { return Ok(()) };
        record.trust_reports(key, proof);
        self.records.store()
    }

    /// Records a machine's report, if the report proves that its sender opened a sealed ticket. Otherwise returns
    /// `None`.
    ///
    /// # Errors
    /// If the records or the audit log cannot be written.
    pub(super) fn accept_report(&mut self, report: &ProgressReport) -> Result<Option<AcceptedReport>> {
        let is_proven = |r: &Record| r.reporters.iter().any(|by| by.key == report.key && by.proof.verify(report));
        let found =
            self.records.all.iter_mut().find(|(_, r)| report.version == NetbootMachine::VERSION && is_proven(r));
        let Some((name, record)) = found else { return Ok(None) };
        let accepted = AcceptedReport { name: name.clone(), to: record.to.clone() };
        match &report.step {
            Step::Writing { .. } => {}
            Step::Started => {
                record.started = true;
                self.records.store()?;
                self.records.audit(&accepted.name, &format!("runs as {}", accepted.to))?;
            }
            Step::Installed => {
                record.installed = Some(now());
                // The machine's disk has the ticket. A copy here could only be stolen.
                record.ticket = None;
                self.records.store()?;
                self.records.audit(&accepted.name, &format!("has {} on its disk", accepted.to))?;
            }
            Step::Failed { why } => {
                let why: String = why.chars().take(MAX_ERROR).collect();
                self.records.audit(&accepted.name, &format!("failed: {why}"))?;
            }
        }
        Ok(Some(accepted))
    }

    /// Returns the record's name, the node or group, and the place of the image; or the reason for a refusal.
    fn match_rule(
        &mut self,
        machine: &NetbootMachine,
        plan: &impl Plan,
    ) -> Result<(String, String, InstallMode), Refusal> {
        if machine.version != NetbootMachine::VERSION {
            return refuse("this installer belongs to another version of bakehouse; restart the machine");
        }
        machine.check().map_err(Refusal)?;
        let first = machine.macs.first().ok_or_else(|| Refusal("a machine without a network card".to_owned()))?;
        let names = machine.macs.iter().map(Mac::to_string).chain([machine.serial.clone()]);
        let rule = names.filter(|name| !name.is_empty()).find(|name| self.rules.machines.contains_key(name));
        let (name, to) = match (&rule, &self.rules.others) {
            (Some(name), _) => (name.clone(), self.rules.machines[name].clone()),
            (None, Some(to)) => (self.name_of_other(machine, *first), to.clone()),
            (None, None) => {
                return refuse(format!(
                    "no rule in fleet.toml names this machine; set [netboot.machines] \"{first}\" = \"NODE\""
                ));
            }
        };
        if rule.is_some() {
            self.adopt(&name, &to, machine, plan);
        }
        let group = plan.group_of(&to);
        self.check_free_slot(&name, &to, plan)?;
        if self.rules.diskless.contains(&group) {
            let (need, have) = (plan.memory(&group), machine.memory);
            if have < need {
                return refuse(format!(
                    "this machine has {} MB of memory, and {to} needs {} MB to run from memory",
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
            return refuse(format!(
                "this machine was installed before (at {at}); boot it from its disk, or run bakehouse netboot --again \
                 {name}"
            ));
        }
        let disk = self.disk(&machine.disks, plan.disk(&group, &InstallMode::Install(String::new())))?;
        Ok((name, to, InstallMode::Install(disk)))
    }

    /// Returns the record's name for a machine that no rule names: that of an existing record for one of its network
    /// cards, because firmware may list them in another order.
    fn name_of_other(&self, machine: &NetbootMachine, first: Mac) -> String {
        let mut names = machine.macs.iter().map(Mac::to_string);
        names.find(|name| self.records.all.contains_key(name)).unwrap_or_else(|| first.to_string())
    }

    /// Renames a record of an earlier version of bakehouse from the machine's first MAC address to the name in the
    /// rule.
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

    /// Fails if other machines have the node, or all nodes of the group.
    fn check_free_slot(&self, name: &str, to: &str, plan: &impl Plan) -> Result<(), Refusal> {
        let slots = plan.slots(to);
        let matches = |of: &String| of == to || slots.contains(of);
        let taken = self.records.all.iter().filter(|(other, r)| *other != name && matches(&r.to)).count();
        if taken < slots.len().max(1) {
            return Ok(());
        }
        refuse(if slots.is_empty() {
            format!("another machine has `{to}`; in fleet.toml, set [netboot.machines] \"{name}\" = \"{to}\"")
        } else {
            format!("other machines have every node of `{to}`; raise its `count`")
        })
    }

    /// Returns the slot of a stateless machine: the one in its record, or the first one that no record and no rule has.
    fn slot(&self, name: &str, to: String, plan: &impl Plan) -> Result<String, Refusal> {
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
            .ok_or_else(|| Refusal(format!("other machines have every node of `{to}`; raise its `count`")))
    }

    /// Returns the disk to overwrite: the one in fleet.toml, or the machine's only fixed disk.
    fn disk(&self, disks: &[MachineDisk], need: u64) -> Result<String, Refusal> {
        let list = |disks: &[&MachineDisk]| {
            disks.iter().map(|d| format!("{} ({} MB)", d.path, d.size / 1_000_000)).collect::<Vec<_>>().join(", ")
        };
        let all: Vec<&MachineDisk> = disks.iter().collect();
        let fixed: Vec<&MachineDisk> = disks.iter().filter(|d| !d.removable).collect();
        let chosen = match (&self.rules.disk, &fixed[..]) {
            (Some(path), _) => all.iter().find(|d| d.path == *path).copied(),
            (None, [one]) => Some(*one),
            (None, []) => return refuse("this machine has no disk"),
            (None, _) => {
                return refuse(format!(
                    "this machine has several disks; set [netboot] disk to one of {}",
                    list(&fixed)
                ));
            }
        };
        let Some(chosen) = chosen else {
            return refuse(format!("this machine has no disk with the path in [netboot] disk; it has {}", list(&all)));
        };
        if chosen.size < need {
            return refuse(format!("{} is too small: the node needs {} MB", list(&[chosen]), need.div_ceil(1_000_000)));
        }
        Ok(chosen.path.clone())
    }
}

/// Returns a [`Refusal`] with this text.
fn refuse<T>(why: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal(why.into()))
}

#[cfg(test)]
#[path = "registry_tests.rs"]
mod tests;
