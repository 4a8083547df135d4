//! The answers to what machines ask over HTTP.

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

/// What the server answers from: the fleet's plan, its keys and its images.
pub(super) struct FleetPlan {
    pub project: Project,
    pub authority: FleetKey,
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

    fn disk(&self, group: &str, way: &InstallMode) -> u64 {
        let recipe = self.project.recipe(group);
        let var = var_size(&recipe);
        match way {
            InstallMode::Install(_) => slots(&self.project, &recipe).map_or(0, |slots| slots.machine_disk(var)),
            InstallMode::Run(_) => var,
        }
    }

    fn memory(&self, group: &str) -> u64 {
        let root = self.offers.get(group).map_or(0, |o| o.root.size + o.verity.size);
        // The kernel keeps a part of what the machine has for itself.
        root + (self.project.machine(group).memory << 20) / 10 * 9
    }

    fn mint(&self, to: &str, replace: bool) -> Result<Ticket> {
        let terms = TicketTerms { replace, ..DEFAULT_TERMS };
        let ticket = mint(&self.authority, &self.project.topology, to, &terms, BTreeMap::new())?;
        ticket_log::note(&self.project.dir, &ticket)?;
        Ok(ticket)
    }
}

/// What answers machines.
pub(super) struct NetbootHandler {
    fleet: FleetPlan,
    desk: Mutex<MachineRegistry>,
    /// The folder that dnsmasq reads.
    dir: PathBuf,
    board: NetbootProgress,
}

impl NetbootHandler {
    /// Answers from `desk`'s records; keeps dnsmasq's list of installed machines below `dir`.
    pub(super) fn new(fleet: FleetPlan, desk: MachineRegistry, dir: PathBuf, board: NetbootProgress) -> Self {
        Self { fleet, desk: Mutex::new(desk), dir, board }
    }

    /// The answer to a request's body, JSON; or why it is refused.
    pub(super) fn answer(&self, path: &str, body: &[u8]) -> Result<Vec<u8>, String> {
        let told = |e: Error| e.to_string();
        match path {
            "/v1/machine" => {
                let machine: NetbootMachine = serde_json::from_slice(body).map_err(|e| e.to_string())?;
                let errand = self.errand(&machine).map_err(told)?;
                serde_json::to_vec(&errand).map_err(|e| e.to_string())
            }
            "/v1/news" => {
                let news: ProgressReport = serde_json::from_slice(body).map_err(|e| e.to_string())?;
                if self.news(&news).map_err(told)? {
                    return Ok(b"{}".to_vec());
                }
                Err("the news are ignored: they don't prove that a ticket was sealed for their sender".to_owned())
            }
            _ => Err("the server answers POST at /v1/machine and /v1/news only".to_owned()),
        }
    }

    /// Confirms the code that the operator typed, and prints the result.
    pub(super) fn approve(&self, typed: &str) {
        let approved = self.desk().approve(typed);
        match approved {
            Ok(code) => self.board.say(&format!("{code} is confirmed; its machine asks again within 15 s")),
            Err(e) => self.board.say(&e.to_string()),
        }
    }

    fn desk(&self) -> MutexGuard<'_, MachineRegistry> {
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn errand(&self, machine: &NetbootMachine) -> Result<Assignment> {
        let answer = self.desk().decide(machine, &self.fleet)?;
        match answer {
            RegistryDecision::Assigned(decision) => self.assign(machine, decision),
            RegistryDecision::Unconfirmed { name, to } => {
                self.board.tell(&name, Some(&to), "waits until the code on its console is typed here");
                Ok(Assignment::Confirm { to })
            }
            RegistryDecision::Refused(why) => {
                let mac = machine.macs.first().map_or_else(String::new, Mac::to_string);
                self.board.tell(&mac, None, &why);
                Ok(Assignment::Nothing { why })
            }
        }
    }

    fn assign(&self, machine: &NetbootMachine, Decision { name, to, way, ticket }: Decision) -> Result<Assignment> {
        let Some(offer) = self.fleet.offers.get(&self.fleet.group_of(&to)).cloned() else {
            return fail(format!("there is no image of `{to}`"));
        };
        let sealed = |bytes: &[u8]| {
            let (sealed, proof) = seal(bytes, &machine.key).map_err(|e| Error::Failed(e.to_string()))?;
            self.desk().believe(&name, &machine.key, proof)?;
            Ok::<_, Error>(sealed)
        };
        Ok(match way {
            InstallMode::Install(disk) => {
                let secure = self.fleet.project.fleet.secure_boot.is_some();
                let (ticket_path, ticket) = TicketFile::file(&ticket, secure)?;
                let ticket = sealed(&ticket)?;
                self.board.tell(&name, Some(&to), &format!("goes to {disk}"));
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
                let ticket = sealed(&serde_json::to_vec(&ticket).map_err(|e| Error::Failed(e.to_string()))?)?;
                self.board.tell(&name, Some(&to), "goes to its memory");
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

    /// Whether the news were believed.
    fn news(&self, news: &ProgressReport) -> Result<bool> {
        let mut desk = self.desk();
        let Some(heard) = desk.hear(news)? else { return Ok(false) };
        let line = match &news.step {
            Step::Writing { bytes, of } => {
                format!("{} % of {} MB", bytes.saturating_mul(100) / of.max(&1), of / 1_000_000)
            }
            Step::Installed => {
                desk.macs_of(&heard.name).into_iter().try_for_each(|mac| installed(&self.dir, mac))?;
                "is on its disk".to_owned()
            }
            Step::Started => "runs from its memory".to_owned(),
            Step::Failed { why } => why.clone(),
        };
        drop(desk);
        self.board.tell(&heard.name, Some(&heard.to), &line);
        Ok(true)
    }
}

/// From now on the machine's firmware is not sent to the installer.
pub(super) fn installed(dir: &Path, mac: Mac) -> Result<()> {
    let path = dir.join(HOSTS).join(mac.to_string().replace(':', "-"));
    fs::write(&path, format!("{mac},set:installed\n")).map_err(Error::io("write", &path))
}
