//! Handler of the installers' HTTP requests.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use fleet::Ticket;
use fleet::netboot::seal;
use fleet::netboot::{Assignment, Extent, Install, Mac, NetbootMachine, ProgressReport, Run, Step};

use super::dnsmasq::HOSTS;
use super::offer::ImageOffer;
use super::progress::NetbootProgress;
use super::registry::{Decision, InstallMode, MachineRegistry, Plan, RegistryDecision};
use crate::assemble::layout::{ESP_SIZE, ESP_START, slots, var_size};
use crate::deploy::flash::TicketFile;
use crate::error::{Error, Result, fail};
use crate::keys::authority::FleetKey;
use crate::keys::ticket::{DEFAULT_TERMS, TicketTerms, mint};
use crate::keys::ticket_log;
use crate::project::Project;

/// The fleet, its key and its images.
pub(super) struct FleetPlan {
    pub project: Project,
    pub authority: FleetKey,
    /// Images by group.
    pub offers: BTreeMap<String, ImageOffer>,
}

impl Plan for FleetPlan {
    fn group_of(&self, to: &str) -> String {
        self.project.topology.node(to).map_or(to.to_owned(), |n| n.group.clone())
    }

    fn slots(&self, group: &str) -> Vec<String> {
        self.project.topology.nodes.iter().filter(|n| n.group == group).map(|n| n.name.clone()).collect()
    }

    fn is_founder(&self, to: &str) -> bool {
        let topology = &self.project.topology;
        topology.node(to).is_some_and(|node| topology.is_founder(node))
    }

    fn is_volatile(&self, group: &str) -> bool {
        self.project.recipe(group).profiles.iter().all(|p| p.disk.volatile)
    }

    fn disk(&self, group: &str, mode: &InstallMode) -> u64 {
        let recipe = self.project.recipe(group);
        let var = var_size(&recipe);
        match mode {
            InstallMode::Install(_) => slots(&self.project, &recipe).map_or(0, |slots| slots.machine_disk(var)),
            InstallMode::Run(_) => var,
        }
    }

    fn memory(&self, group: &str) -> u64 {
        let root = self.offers.get(group).map_or(0, |o| o.root.size + o.verity.size);
        // Installers report less memory than a machine has, because the kernel reserves a part: 10 % tolerance.
        root + (self.project.machine(group).memory << 20) / 10 * 9
    }

    fn mint(&self, to: &str, replace: bool) -> Result<Ticket> {
        let terms = TicketTerms { replace, ..DEFAULT_TERMS };
        let ticket = mint(&self.authority, &self.project.topology, to, &terms, BTreeMap::new())?;
        ticket_log::note(&self.project.dir, &ticket)?;
        Ok(ticket)
    }
}

/// Handler of the installers' requests.
pub(super) struct NetbootHandler {
    fleet: FleetPlan,
    registry: Mutex<MachineRegistry>,
    /// The folder that dnsmasq reads.
    dir: PathBuf,
    progress: NetbootProgress,
}

impl NetbootHandler {
    /// Returns a handler with the records of `registry`. It writes dnsmasq's list of installed machines below `dir`.
    pub(super) fn new(fleet: FleetPlan, registry: MachineRegistry, dir: PathBuf, progress: NetbootProgress) -> Self {
        Self { fleet, registry: Mutex::new(registry), dir, progress }
    }

    /// Returns the response to a request, in JSON, or the reason for a refusal.
    pub(super) fn handle(&self, path: &str, body: &[u8]) -> Result<Vec<u8>> {
        match path {
            "/v1/machine" => {
                let machine: NetbootMachine =
                    serde_json::from_slice(body).map_err(Error::cannot("parse the request"))?;
                let assignment = self.assignment(&machine)?;
                serde_json::to_vec(&assignment).map_err(Error::Json)
            }
            "/v1/news" => {
                let report: ProgressReport =
                    serde_json::from_slice(body).map_err(Error::cannot("parse the request"))?;
                if self.accept_report(&report)? {
                    return Ok(b"{}".to_vec());
                }
                fail("the server ignores this report: it does not prove that its sender opened a sealed ticket")
            }
            _ => fail("the server accepts POST requests at /v1/machine and /v1/news only"),
        }
    }

    /// Confirms the code that the operator typed, and prints the result.
    pub(super) fn approve(&self, typed: &str) {
        let approved = self.registry().approve(typed);
        match approved {
            Ok(code) => self.progress.say(&format!("confirmed {code}; its machine continues within 15 s")),
            Err(e) => self.progress.say(&e.chain()),
        }
    }

    fn registry(&self) -> MutexGuard<'_, MachineRegistry> {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn assignment(&self, machine: &NetbootMachine) -> Result<Assignment> {
        let decision = self.registry().decide(machine, &self.fleet)?;
        match decision {
            RegistryDecision::Assigned(decision) => self.assign(machine, decision),
            RegistryDecision::Unconfirmed { name, to } => {
                self.progress.report(&name, Some(&to), "waits for its code: type the code on its console here");
                Ok(Assignment::Confirm { to })
            }
            RegistryDecision::Refused(why) => {
                let mac = machine.macs.first().map_or_else(String::new, Mac::to_string);
                self.progress.report(&mac, None, &why);
                Ok(Assignment::Nothing { why })
            }
        }
    }

    fn assign(&self, machine: &NetbootMachine, Decision { name, to, mode, ticket }: Decision) -> Result<Assignment> {
        let Some(offer) = self.fleet.offers.get(&self.fleet.group_of(&to)).cloned() else {
            return fail(format!("there is no image of `{to}`"));
        };
        let sealed = |bytes: &[u8]| {
            let (sealed, proof) = seal(bytes, &machine.key).map_err(Error::cannot("seal the ticket"))?;
            self.registry().trust_reports(&name, &machine.key, proof)?;
            Ok::<_, Error>(sealed)
        };
        Ok(match mode {
            InstallMode::Install(disk) => {
                let secure = self.fleet.project.fleet.secure_boot.is_some();
                let (ticket_path, ticket) = TicketFile::file(&ticket, secure)?;
                let ticket = sealed(&ticket)?;
                self.progress.report(&name, Some(&to), &format!("installs on {disk}"));
                Assignment::Install(Install {
                    to,
                    disk,
                    image: offer.path,
                    size: offer.size,
                    table: offer.table,
                    extents: offer.extents,
                    sha256: offer.sha256,
                    esp: Extent { start: ESP_START, size: ESP_SIZE },
                    ticket_path,
                    ticket,
                })
            }
            InstallMode::Run(var) => {
                let ticket = sealed(&serde_json::to_vec(&ticket).map_err(Error::Json)?)?;
                self.progress.report(&name, Some(&to), "boots from memory");
                Assignment::Run(Run {
                    to,
                    image: offer.path,
                    root: offer.root,
                    verity: offer.verity,
                    roothash: offer.roothash,
                    signed: Some(offer.signed),
                    var,
                    ticket,
                })
            }
        })
    }

    /// Records and prints a machine's report. Returns whether the registry accepted it.
    fn accept_report(&self, report: &ProgressReport) -> Result<bool> {
        let mut registry = self.registry();
        let Some(accepted) = registry.accept_report(report)? else { return Ok(false) };
        let line = match &report.step {
            Step::Writing { bytes, of } => {
                format!("{} % of {} MB", bytes.saturating_mul(100) / of.max(&1), of / 1_000_000)
            }
            Step::Installed => {
                registry.macs_of(&accepted.name).into_iter().try_for_each(|mac| installed(&self.dir, mac))?;
                "is installed".to_owned()
            }
            Step::Started => "runs from memory".to_owned(),
            Step::Failed { why } => why.clone(),
        };
        drop(registry);
        self.progress.report(&accepted.name, Some(&accepted.to), &line);
        Ok(true)
    }
}

/// Marks a machine as installed in dnsmasq's list, so that dnsmasq no longer offers the installer to its firmware.
pub(super) fn installed(dir: &Path, mac: Mac) -> Result<()> {
    let path = dir.join(HOSTS).join(mac.to_string().replace(':', "-"));
    fs::write(&path, format!("{mac},set:installed\n")).map_err(Error::io("write", &path))
}
