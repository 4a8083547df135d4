//! All local machines of a fleet: their options, and starting and stopping several of them.

use std::fs;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::thread::ScopedJoinHandle;
use std::time::Duration;

use fleet::{Node, Ticket};

use super::container::remove_lan;
use super::firmware::{Firmware, accelerator, is_emulated};
use super::machine::{AGENT, READY, SPARE_DISK, Vm};
use super::network::VirtualNic;
use super::qemu::host_cpus;
use super::start::VmOptions;
use crate::assemble::layout::{image_id, slots, var_size};
use crate::error::{Error, Result, fail};
use crate::keys::authority::FleetKey;
use crate::keys::ticket::{TicketTerms, mint};
use crate::progress::Progress;
use crate::project::Project;
use crate::util::fs::private_dir;

/// Returns the groups of the named nodes.
///
/// # Errors
/// If the fleet has no node with one of the names.
pub fn groups_of(project: &Project, nodes: &[String]) -> Result<Vec<String>> {
    let mut groups = Vec::new();
    for name in nodes {
        let group = &project.node(name)?.group;
        if !groups.contains(group) {
            groups.push(group.clone());
        }
    }
    Ok(groups)
}

/// Empty file that marks a fleet whose nodes run as containers.
const CONTAINERS: &str = "build/vm/containers";

/// Sets whether the fleet's nodes run as containers.
///
/// # Errors
/// If a node runs as the other kind.
pub fn are_containers(project: &Project, containers: bool) -> Result<()> {
    let mark = project.dir.join(CONTAINERS);
    if mark.exists() == containers {
        return Ok(());
    }
    let vms = project.topology.nodes.iter().map(|n| Vm::at(&n.name, project.dir.join("build/vm").join(&n.name)));
    if let Some(runs) = vms.into_iter().find(Vm::is_running) {
        let (is, wanted) = if containers { ("machine", "container") } else { ("container", "machine") };
        return fail(format!("{} runs as a {is}; to have it as a {wanted}, `bakehouse down` first", runs.node));
    }
    if containers {
        let dir = project.dir.join("build/vm");
        private_dir(&dir)?;
        return fs::write(&mark, "").map_err(Error::io("write", &mark));
    }
    fs::remove_file(&mark).map_err(Error::io("remove", &mark))
}

/// Starts the named nodes, or all if `nodes` is empty, with a ticket each, and waits until they are ready. Calls
/// `on_ready` with the name of each node that becomes ready.
///
/// # Errors
/// If a machine does not start, or is not ready in time.
pub fn up(project: &Project, nodes: &[String], progress: &Progress, on_ready: &(dyn Fn(&str) + Sync)) -> Result<()> {
    // Joiners need a hub. If machines boot one after the other, founders boot first.
    let topology = &project.topology;
    let (founders, others): (Vec<&Node>, Vec<&Node>) = topology.nodes.iter().partition(|n| topology.is_founder(n));
    let all = founders.into_iter().chain(others).map(|n| &n.name);
    let chosen: Vec<&String> = all.filter(|n| nodes.is_empty() || nodes.contains(n)).collect();
    let parallel = parallel_boots(project, chosen.len())?;
    let machines = chosen.len();
    let queue: Vec<_> = chosen.into_iter().map(|n| (n, progress.step("boot", &format!("{n}: off")))).collect();
    let queue = Mutex::new(queue.into_iter());
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
    std::thread::scope(|scope| {
        let boot_queued = || -> Result<()> {
            let mut booted = Vec::new();
            while let Some((name, step)) = next() {
                let (vm, start) = (Vm::for_node(project, name)?, start_of(project, name)?.of_machines(machines));
                if !vm.is_running() {
                    vm.start(&start.as_start())?;
                }
                vm.wait_for(AGENT, &step)?;
                booted.push(scope.spawn(move || {
                    vm.wait_for(READY, &step).map(|()| {
                        step.done(&format!("{name} is ready"));
                        on_ready(name);
                    })
                }));
            }
            join_all(booted)
        };
        join_all((0..parallel).map(|_| scope.spawn(boot_queued)).collect())
    })
}

fn join_all(threads: Vec<ScopedJoinHandle<Result<()>>>) -> Result<()> {
    threads.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(|_| fail("a thread panicked")))
}

/// Returns how many of these machines boot at the same time. An emulated machine uses a whole processor while it boots;
/// if more machines boot than the host has processors, each of them is slower.
fn parallel_boots(project: &Project, machines: usize) -> Result<usize> {
    if project.dir.join(CONTAINERS).exists() {
        return Ok(machines);
    }
    let dir = project.dir.join("build/vm");
    private_dir(&dir)?;
    let emulated = is_emulated(accelerator(&Firmware::find(false)?, &dir)?);
    Ok(if emulated { host_cpus().min(machines) } else { machines })
}

/// Options of a node's machine as its profiles describe them, with a ticket for its slot.
pub struct Described {
    image: PathBuf,
    memory: u64,
    cpus: u16,
    machines: usize,
    disk: u64,
    keep: bool,
    secure_boot: bool,
    nic: VirtualNic,
    ticket: Vec<u8>,
    container: Option<Vec<String>>,
}

impl Described {
    /// Removes the ticket, for a machine whose disk contains it.
    #[must_use]
    pub fn without_ticket(mut self) -> Self {
        self.ticket.clear();
        self
    }

    /// Sets the number of machines that run at the same time. The default is the whole fleet.
    #[must_use]
    pub fn of_machines(self, machines: usize) -> Self {
        Self { machines, ..self }
    }

    /// Replaces the ticket, and sets the hubs' endpoints in it to their addresses in the local network.
    ///
    /// # Errors
    /// If `ticket` is not a ticket.
    pub fn with_ticket(self, ticket: &str) -> Result<Self> {
        let read = |bytes: &[u8]| Ticket::parse(bytes).map_err(Error::cannot("use the ticket"));
        let endpoints = read(&self.ticket)?.endpoints;
        let ticket = Ticket { endpoints, ..read(ticket.as_bytes())? };
        Ok(Self { ticket: serde_json::to_vec(&ticket).map_err(Error::Json)?, ..self })
    }

    /// Returns the options for a start, with the credentials of the node.
    #[must_use]
    pub fn as_start(&self) -> VmOptions<'_> {
        let mut credentials = vec![("network.network.05-wire".to_owned(), self.nic.network().into_bytes())];
        if !self.ticket.is_empty() {
            credentials.push((Ticket::CREDENTIAL.to_owned(), self.ticket.clone()));
        }
        if let Some(forward) = &self.nic.forward {
            credentials.push(("network.network.06-door".to_owned(), forward.network().into_bytes()));
        }
        VmOptions {
            image: &self.image,
            memory: self.memory,
            cpus: self.cpus,
            machines: self.machines,
            disk: self.disk,
            keep: self.keep,
            nic: self.nic.clone(),
            seed: None,
            tpm: None,
            netboot: None,
            secure_boot: self.secure_boot,
            bios: false,
            credentials,
            container: self.container.clone(),
        }
    }
}

/// Returns the options of a node's machine, and mints a ticket for its slot.
///
/// # Errors
/// If the fleet has no such node, or the fleet key of local machines cannot be read.
pub fn start_of(project: &Project, name: &str) -> Result<Described> {
    /// A year, because a machine's disk may be created long after its folder.
    const TERMS: TicketTerms = TicketTerms { uses: 1, lasts: Duration::from_secs(365 * 86_400), replace: false };
    let node = project.node(name)?;
    let machine = project.machine(&node.group);
    let file = format!("{}_{}.raw", image_id(project, &node.group), project.topology.version);
    let topology = &project.topology;
    let hubs = topology.hubs.iter().map(|h| (h.name.clone(), VirtualNic::address(topology, h).to_string()));
    let ticket = mint(&FleetKey::of_vms(project)?, topology, name, &TERMS, hubs.collect())?;
    let ticket = serde_json::to_vec(&ticket).map_err(Error::Json)?;
    let image = project.out_dir(&node.group).join(file);
    let recipe = project.recipe(&node.group);
    let disk = slots(project, &recipe)?.machine_disk(var_size(&recipe)) + SPARE_DISK;
    Ok(Described {
        image,
        memory: machine.memory << 20,
        cpus: machine.cpus as u16,
        machines: topology.nodes.len(),
        disk,
        // A machine that updates itself has a newer version on its disk than the image.
        keep: topology.update.url.is_some(),
        secure_boot: project.fleet.secure_boot.is_some(),
        nic: VirtualNic::for_node(project, node),
        ticket,
        container: project.dir.join(CONTAINERS).exists().then(|| topology.wireguard(node)),
    })
}

/// Shuts the named nodes down, or all if `nodes` is empty. Returns the nodes that ran.
///
/// # Errors
/// If a node does not shut down.
pub fn down(project: &Project, nodes: &[String], progress: &Progress) -> Result<Vec<String>> {
    for name in nodes {
        Vm::for_node(project, name)?;
    }
    let running: Vec<Vm> = (project.topology.nodes.iter())
        .filter(|n| nodes.is_empty() || nodes.contains(&n.name))
        .map(|n| Vm::at(&n.name, project.dir.join("build/vm").join(&n.name)))
        .filter(Vm::is_running)
        .collect();
    // A primary needs etcd until it has stopped. Without etcd, its watchdog resets the machine, which then boots again.
    let (last, first): (Vec<&Vm>, Vec<&Vm>) = running.iter().partition(|vm| project.topology.voters.contains(&vm.node));
    let stages = [first, last].map(|stage| {
        // In parallel, because each shutdown waits for the node's services.
        std::thread::scope(|scope| {
            let stopping: Vec<_> = (stage.into_iter())
                .map(|vm| {
                    let step = progress.step("down", &vm.node);
                    scope.spawn(move || vm.power_down().map(|()| step.done(&vm.node)))
                })
                .collect();
            join_all(stopping)
        })
    });
    // A machine that did not shut down is off, and the others shut down nevertheless.
    stages.into_iter().collect::<Result<()>>()?;
    let vms = project.topology.nodes.iter().map(|n| (n, Vm::at(&n.name, project.dir.join("build/vm").join(&n.name))));
    let (off, on): (Vec<_>, Vec<_>) = vms.partition(|(_, vm)| !vm.is_running());
    match off.first() {
        Some((node, _)) if on.is_empty() => remove_lan(&VirtualNic::for_node(project, node))?,
        _ => {}
    }
    Ok(running.into_iter().map(|vm| vm.node).collect())
}
