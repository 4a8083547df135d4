//! `bakehouse vm`: writes a node's disk, and definitions of its machine for libvirt and Proxmox.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::Command;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use clap::ValueEnum;
use fleet::Ticket;
use schemars::JsonSchema;
use serde::Serialize;

use crate::assemble::layout::{slots, var_size};
use crate::deploy::flash::{TicketFile, put_ticket};
use crate::error::{Error, Result};
use crate::image::BuiltImage;
use crate::keys::authority::FleetKey;
use crate::keys::ticket::{DEFAULT_TERMS, TicketSummary, TicketTerms, mint};
use crate::keys::ticket_log;
use crate::progress::Progress;
use crate::project::Project;
use crate::project::machine_id::uuid_of;
use crate::toolchain::Tools;
use crate::util::fs::{shown, write_private};
use crate::util::process::run;

/// Bytes of `/var` beyond the minimum of the node's roles.
const SPARE: u64 = 16 << 30;

/// Disk format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    Raw,
    Qcow2,
    Vmdk,
    Vhd,
}

/// Transport of the ticket to the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum TicketTransport {
    /// From the hypervisor, in the definitions (SMBIOS)
    Smbios,
    /// On the disk's EFI partition
    Disk,
    /// As user data on a small second disk (NoCloud)
    Seed,
}

/// Options of an export.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ExportOptions<'a> {
    /// Name of the node.
    pub node: &'a str,
    /// Format of the disk.
    pub format: Format,
    /// Transport of the ticket.
    pub transport: TicketTransport,
    /// Whether the ticket replaces the machine that owns the node's slot.
    pub replace: bool,
    /// Whether to overwrite existing disks.
    pub yes: bool,
}

/// Files that an export wrote.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub(crate) struct Export {
    /// The node's disk.
    pub disk: PathBuf,
    /// Disk with NoCloud's user data.
    pub seed: Option<PathBuf>,
    /// Definition for `virsh define`.
    pub libvirt: PathBuf,
    /// Script for a Proxmox host.
    pub proxmox: PathBuf,
}

impl Format {
    /// Returns the file extension, which is also libvirt's name of the format.
    fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vmdk => "vmdk",
            Self::Vhd => "vhd",
        }
    }

    /// Returns QEMU's name of the format.
    fn driver(self) -> &'static str {
        if self == Self::Vhd { "vpc" } else { self.name() }
    }
}

impl ExportOptions<'_> {
    /// Checks that the export overwrites no disk, which a running machine may use.
    ///
    /// # Errors
    /// If a disk exists, and the options do not allow to overwrite it.
    pub(crate) fn check(&self, out: &Path) -> Result<()> {
        let files = self.files(out);
        let existing = [Some(&files.disk), files.seed.as_ref()].into_iter().flatten().find(|disk| disk.exists());
        match existing {
            Some(disk) if !self.yes => Err(Error::Usage(format!(
                "{} exists, and a machine may use it\n  help: add --yes to overwrite it",
                disk.display()
            ))),
            _ => Ok(()),
        }
    }

    /// Returns the paths of the export's files.
    fn files(&self, out: &Path) -> Export {
        let path = |suffix: &str| out.join(format!("{}{suffix}", self.node));
        Export {
            disk: path(&format!(".{}", self.format.name())),
            seed: (self.transport == TicketTransport::Seed).then(|| path("-seed.img")),
            libvirt: path(".xml"),
            proxmox: path(".proxmox.sh"),
        }
    }
}

/// Mints a ticket, and writes a node's disk and the definitions of its machine to the folder `out`.
///
/// # Errors
/// If the fleet has no such node, or a file cannot be written.
pub(crate) fn export(
    project: &Project,
    image: &BuiltImage,
    options: &ExportOptions,
    out: &Path,
    tools: &Tools,
    progress: &Progress,
) -> Result<(Export, TicketSummary)> {
    let &ExportOptions { node, format, transport, replace, .. } = options;
    let authority = FleetKey::load(project)?;
    let ticket = mint(&authority, &project.topology, node, &TicketTerms { replace, ..DEFAULT_TERMS }, BTreeMap::new())?;
    ticket_log::note(&project.dir, &ticket)?;
    fs::create_dir_all(out).map_err(Error::io("create", out))?;
    let out = out.canonicalize().map_err(Error::io("find", out))?;
    let export = options.files(&out);
    let step = progress.step("vm", &format!("{node}: {}", shown(&export.disk)));
    let recipe = project.recipe(&image.group);
    let size = slots(project, &recipe)?.machine_disk(var_size(&recipe)) + SPARE;
    // Private, because the disk may contain a ticket, and removed also after an error.
    let scratch = tempfile::tempdir_in(&out).map_err(Error::io("create a folder in", &out))?;
    let path = |name: &str| scratch.path().join(name);
    let mut from = image.disk.canonicalize().map_err(Error::io("find", &image.disk))?;
    if transport == TicketTransport::Disk {
        let copy = path("disk");
        run(Command::new("cp").args(["--sparse=always", "--reflink=auto"]).args([&from, &copy]), "cp")?;
        let secure = project.fleet.secure_boot.is_some();
        let disk = OpenOptions::new().read(true).write(true).open(&copy).map_err(Error::io("open", &copy))?;
        put_ticket(&disk, &copy, &TicketFile { ticket: &ticket, secure, tools })?;
        from = copy;
    }
    let qemu_img = |args: &[&str], files: &[&Path]| {
        let mut command = Command::new("qemu-img");
        command.args(args).args(files);
        run(&mut command, "qemu-img (apt install qemu-utils)")
    };
    // Resized before the conversion, because qemu-img cannot resize every format.
    let (larger, whole) = (path("larger"), path("whole"));
    qemu_img(&["create", "-q", "-f", "qcow2", "-F", "raw", "-b"], &[&from, &larger])?;
    qemu_img(&["resize", "-q", "-f", "qcow2"], &[&larger, Path::new(&size.to_string())])?;
    if transport == TicketTransport::Disk {
        write_private(&whole, b"")?;
    }
    qemu_img(&["convert", "-f", "qcow2", "-O", format.driver()], &[&larger, &whole])?;
    fs::rename(&whole, &export.disk).map_err(Error::io("rename", &whole))?;
    if let Some(seed) = &export.seed {
        write_seed(seed, &ticket, tools)?;
    }
    let machine = project.machine(&image.group);
    let definition = Definition {
        name: node.to_owned(),
        uuid: uuid_of(&format!("{}/{node}", project.topology.name)),
        memory: machine.memory,
        cpus: machine.cpus,
        format,
        disk: export.disk.clone(),
        seed: export.seed.clone(),
        ticket: (transport == TicketTransport::Smbios).then(|| text(&ticket)).transpose()?,
    };
    // Private, because the definitions may contain the ticket.
    write_private(&export.libvirt, definition.to_string().as_bytes())?;
    write_private(&export.proxmox, definition.proxmox().as_bytes())?;
    step.done(&format!("{node}: {}", shown(&export.disk)));
    Ok((export, TicketSummary::from_ticket(&ticket)))
}

fn text(ticket: &Ticket) -> Result<String> {
    serde_json::to_string(ticket).map_err(Error::Json)
}

/// Writes a FAT disk with the label `CIDATA`, by which cloud-init finds NoCloud's data.
fn write_seed(seed: &Path, ticket: &Ticket, tools: &Tools) -> Result<()> {
    write_private(seed, &vec![0; 2 << 20])?;
    let mut format = tools.command("usr/sbin/mkfs.vfat");
    run(format.args(["--invariant", "-n", "CIDATA"]).arg(seed), "mkfs.vfat")?;
    let dir = tempfile::tempdir().map_err(Error::io("create", "a temporary folder"))?;
    for (name, content) in [("user-data", text(ticket)?), ("meta-data", "{}\n".to_owned())] {
        let file = dir.path().join(name);
        write_private(&file, content.as_bytes())?;
        let mut copy = tools.command("usr/bin/mcopy");
        run(copy.env("MTOOLS_SKIP_CHECK", "1").arg("-i").arg(seed).arg(&file).arg(format!("::{name}")), "mcopy")?;
    }
    Ok(())
}

/// Definition of a virtual machine.
struct Definition {
    name: String,
    uuid: String,
    /// Memory in MiB.
    memory: u64,
    cpus: u64,
    format: Format,
    disk: PathBuf,
    seed: Option<PathBuf>,
    ticket: Option<String>,
}

impl Definition {
    fn credential(ticket: &str) -> String {
        format!("io.systemd.credential.binary:{}={}", Ticket::CREDENTIAL, BASE64.encode(ticket))
    }

    /// Returns a script that creates the machine on a Proxmox host. The operator copies the script and the disk there.
    fn proxmox(&self) -> String {
        let Self { name, uuid, memory, cpus, disk, .. } = self;
        let file = disk.file_name().map(|f| f.to_string_lossy().into_owned()).unwrap_or_default();
        let mut text = format!(
            "#!/bin/sh\n\
             # Creates {name} on a Proxmox host (8 or newer). Run it in the folder with the disk:\n\
             #   sh {name}.proxmox.sh NUMBER [STORAGE] [BRIDGE]\n\
             set -eu\n\
             id=${{1:?the VM ID}} storage=${{2:-local-lvm}} bridge=${{3:-vmbr0}}\n\
             here=$(cd \"$(dirname \"$0\")\" && pwd)\n\
             qm create \"$id\" --name {name} --ostype l26 --machine q35 --bios ovmf \
             --memory {memory} --cores {cpus} \\\n    \
             --cpu host --scsihw virtio-scsi-single --rng0 source=/dev/urandom --serial0 socket --onboot 1 \\\n    \
             --smbios1 uuid={uuid} --net0 \"virtio,bridge=$bridge\" \
             --efidisk0 \"$storage:1,efitype=4m,pre-enrolled-keys=0\"\n\
             qm set \"$id\" --virtio0 \"$storage:0,import-from=$here/{file}\" --boot order=virtio0\n"
        );
        if let Some(seed) = &self.seed {
            let file = seed.file_name().map(|f| f.to_string_lossy().into_owned()).unwrap_or_default();
            text.push_str(&format!("qm set \"$id\" --virtio1 \"$storage:0,import-from=$here/{file}\"\n"));
        }
        if let Some(ticket) = &self.ticket {
            // In a file, because every user of the host can read QEMU's arguments.
            text.push_str(&format!(
                "umask 077\n\
                 mkdir -p /etc/pve/priv/bakehouse\n\
                 printf %s '{}' >/etc/pve/priv/bakehouse/$id\n\
                 qm set \"$id\" --args \"-smbios type=11,path=/etc/pve/priv/bakehouse/$id\"\n",
                Self::credential(ticket)
            ));
        }
        text
    }
}

impl fmt::Display for Definition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, uuid, memory, cpus, .. } = self;
        let disk = |path: &Path, driver: &str, device: &str| {
            format!(
                "    <disk type='file' device='disk'>\n      \
                 <driver name='qemu' type='{driver}' discard='unmap'/>\n      \
                 <source file='{}'/>\n      <target dev='{device}' bus='virtio'/>\n    </disk>\n",
                escaped(&path.display().to_string())
            )
        };
        writeln!(f, "<domain type='kvm'>\n  <name>{name}</name>\n  <uuid>{uuid}</uuid>")?;
        writeln!(f, "  <memory unit='MiB'>{memory}</memory>\n  <vcpu>{cpus}</vcpu>")?;
        writeln!(f, "  <os firmware='efi'>\n    <type arch='x86_64' machine='q35'>hvm</type>")?;
        // libvirt's Secure Boot firmware has keys enrolled that did not sign the fleet's images.
        writeln!(f, "    <firmware>\n      <feature enabled='no' name='secure-boot'/>\n    </firmware>")?;
        if self.ticket.is_some() {
            writeln!(f, "    <smbios mode='sysinfo'/>")?;
        }
        writeln!(f, "  </os>")?;
        if let Some(ticket) = &self.ticket {
            let entry = escaped(&Self::credential(ticket));
            writeln!(
                f,
                "  <sysinfo type='smbios'>\n    <oemStrings>\n      <entry>{entry}</entry>\n    \
                 </oemStrings>\n  </sysinfo>"
            )?;
        }
        writeln!(f, "  <features>\n    <acpi/>\n  </features>\n  <cpu mode='host-passthrough'/>")?;
        writeln!(f, "  <on_crash>restart</on_crash>\n  <devices>")?;
        write!(f, "{}", disk(&self.disk, self.format.driver(), "vda"))?;
        if let Some(seed) = &self.seed {
            write!(f, "{}", disk(seed, "raw", "vdb"))?;
        }
        writeln!(
            f,
            "    <interface type='network'>\n      <source network='default'/>\n      <model type='virtio'/>\n    \
             </interface>"
        )?;
        writeln!(f, "    <serial type='pty'/>\n    <console type='pty'/>")?;
        writeln!(f, "    <rng model='virtio'>\n      <backend model='random'>/dev/urandom</backend>\n    </rng>")?;
        writeln!(f, "  </devices>\n</domain>")
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('\'', "&apos;")
}
