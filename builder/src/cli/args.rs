//! Commands and options of the command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueHint};

use super::alert::{self, AlertCommand};
use super::audit::{self, AuditArgs};
use super::backup::{self, BackupCommand};
use super::disk::{self, DiskArgs};
use super::mail::{self, MailCommand};
use super::net::{self, NetArgs};
use super::odoo::{self, OdooCommand};
use super::parse::scenarios;
use super::pcap::{self, PcapArgs};
use super::psql::{self, PsqlArgs};
use super::reference::SchemaOf;
use super::verbs::{
    self, ActionArgs, DrainArgs, ExecArgs, LogsArgs, OpenArgs, OperatorCommand, ReportArgs, RestartArgs, StatusArgs,
    SwitchoverArgs, UndrainArgs, UnitsArgs,
};
use crate::deploy::export::{Format, TicketTransport};

/// Turns a fleet.toml into bootable, immutable Debian images.
#[derive(Parser)]
#[command(
    name = "bakehouse",
    version = env!("BAKEHOUSE_VERSION"),
    about,
    next_help_heading = "Global options",
    after_help = "Exit codes:\n  0    success\n  1    failure\n  2    invalid command line or TOML\n  130  \
                  interrupted\n  141  standard output closed"
)]
pub(super) struct Cli {
    /// Use this fleet: a fleet.toml, or its folder
    #[arg(short = 'C', long = "fleet", global = true, default_value = "fleet.toml", value_name = "PATH")]
    #[arg(value_hint = ValueHint::AnyPath)]
    pub(super) fleet: PathBuf,
    /// Print the reasons for results that are not reused, and each cause of an error on a line of its own
    #[arg(short, long, global = true)]
    pub(super) verbose: bool,
    /// Print only errors
    #[arg(short, long, global = true)]
    pub(super) quiet: bool,
    /// Print results, events and errors as lines of JSON (docs/json.md)
    #[arg(long, global = true)]
    pub(super) json: bool,
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Subcommand)]
pub(super) enum Command {
    /// Create a fleet's folder with fleet.toml and the fleet key
    #[command(after_help = "Examples:\n  bakehouse init acme\n  bakehouse init acme --from quick-ha\n\n\
        Nodes trust the fleet key (fleet.key). Keep it off the nodes, and keep a copy. With --passphrase, it is\n\
        encrypted in age's format (`age --decrypt` reads it), and each command that needs it asks for the\n\
        passphrase. For scripts, BAKEHOUSE_PASSPHRASE_FILE names a file with the passphrase.")]
    Init {
        /// Folder; its name is the fleet's name
        dir: PathBuf,
        /// Built-in fleet to start from: ha, minimal-ha, quick-ha
        #[arg(long, default_value = "ha", value_name = "FLEET")]
        from: String,
        /// Create a key for Secure Boot, and sign what firmware runs
        #[arg(long)]
        secure_boot: bool,
        /// Ask for a passphrase and encrypt the fleet key with it, also an existing one
        #[arg(long)]
        passphrase: bool,
    },
    /// Mint a ticket, with which a machine joins the fleet
    #[command(after_help = "Examples:\n  bakehouse ticket hub-1 -o hub-1.ticket\n  \
        bakehouse ticket app --uses 5 --days 2 -o app.ticket\n  bakehouse ticket db-1 --replace -o db-1.ticket\n  \
        bakehouse ticket --list\n  bakehouse ticket --revoke NUMBER\n  \
        bakehouse ticket db-1 --rescue -o rescue.img\n\n\
        The machine reads the ticket as the systemd credential `bakehouse.ticket`. Each founder (hub or voter)\n\
        needs a ticket of its own; other nodes may share one for their group. For [backup.s3], set\n\
        BAKEHOUSE_S3_KEY and BAKEHOUSE_S3_SECRET when `bakehouse init` creates the fleet key.\n\n\
        With --rescue, the file is the image of a disk. While the disk is attached to the node's machine, its\n\
        consoles have a root shell, until the disk expires. It cannot be revoked.")]
    Ticket {
        /// Name of a node (`db-2`) or of a group (`db`)
        #[arg(required_unless_present_any = ["revoke", "list"], value_name = "NODE|GROUP")]
        to: Option<String>,
        /// Number of nodes that may join with the ticket; default: 1
        #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
        uses: Option<u32>,
        /// Days until the ticket expires; default: 1 (7 on the disks of `flash`, `vm` and `netboot`)
        #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
        days: Option<u32>,
        /// Replace the machine that has the node's slot
        #[arg(long)]
        replace: bool,
        /// List the tickets that were minted in this folder, and their state
        #[arg(long, conflicts_with_all = ["to", "uses", "days", "replace", "revoke"])]
        list: bool,
        /// Revoke a ticket by its number
        #[arg(long, value_name = "NUMBER", conflicts_with_all = ["to", "uses", "days", "replace"])]
        revoke: Option<String>,
        /// Make a disk that opens a root shell on the node's console, instead of a ticket
        #[arg(long, requires = "output", conflicts_with_all = ["uses", "days", "replace", "list", "revoke", "endpoint"])]
        rescue: bool,
        /// With --rescue: hours until the disk expires, at most 168
        #[arg(long, requires = "rescue", default_value = "24", value_parser = clap::value_parser!(u32).range(1..=168))]
        hours: u32,
        /// Write the ticket to a file that only you can read, instead of standard output
        #[arg(short, long, value_name = "FILE")]
        output: Option<PathBuf>,
        /// Host of a hub, in place of its endpoint in fleet.toml; `local` for the hubs that `up` started
        #[arg(long, value_name = "HUB=HOST")]
        endpoint: Vec<String>,
    },
    /// Store a secret of `[alerts]`, `[web]`, `[vip]` or `[odoo.mail]`, encrypted for the nodes that need it
    #[command(after_help = "Examples:\n  bakehouse secret email\n  bakehouse secret telegram <token.txt\n  \
        bakehouse secret web_key <erp.key\n  bakehouse secret odoo_mail\n\n\
        The command asks for the secret, or reads it from standard input, and writes it encrypted to\n\
        alerts.secrets, which monitors and hubs can decrypt, to web.secrets, which only hubs can decrypt, or to\n\
        odoo.secrets, which hubs and app nodes can decrypt. You may commit all three. Raise `version` and publish.")]
    Secret {
        /// Name of the secret: `email`, or `secret` of another receiver; `acme_eab` and `web_key` of `[web]`; `vip_hook`;
        /// `odoo_mail`
        name: String,
        /// Remove the secret
        #[arg(long)]
        remove: bool,
    },
    /// Remove a node from the fleet
    #[command(
        after_help = "Examples:\n  bakehouse leave db-2\n  bakehouse leave hub-3 --now --endpoint hub-1=192.0.2.1\n\n\
        The machine hands over its work, stops, releases its slot, and prints that on its console. A new\n\
        machine may then take the slot with an ordinary ticket (founders: `bakehouse ticket --replace`).\n\
        Use --now for a machine that is dead, stolen, or not trusted: the command does not wait for it."
    )]
    Leave {
        /// Name of a node, such as `db-2` (group and number)
        node: String,
        /// Evict the node without waiting for its machine
        #[arg(long)]
        now: bool,
        /// Host of a hub, in place of its endpoint in fleet.toml; `local` for the hubs that `up` started
        #[arg(long, value_name = "HUB=HOST")]
        endpoint: Vec<String>,
    },
    /// Write a node's image and its ticket to a disk or a file
    #[command(after_help = "Examples:\n  bakehouse flash hub-1 /dev/sdb\n  bakehouse flash app disk.raw --json\n\n\
        Builds missing images, mints a ticket, writes the disk, and verifies it. With a group, the node takes any\n\
        free slot. Keep the disk safe: it contains the ticket until the node has joined.")]
    Flash {
        /// Name of a node (`db-2`) or of a group (`db`)
        #[arg(value_name = "NODE|GROUP")]
        to: String,
        /// Device of a whole disk, or path of a file
        target: PathBuf,
        /// Overwrite without a question
        #[arg(short, long)]
        yes: bool,
        /// Overwrite a disk in use, or a partition; give the device's name again
        #[arg(long, value_name = "NAME")]
        force: Option<String>,
        /// Replace the machine that has the node's slot
        #[arg(long, conflicts_with = "no_ticket")]
        replace: bool,
        /// Write no ticket, because the machine gets one in another way
        #[arg(long)]
        no_ticket: bool,
        #[command(flatten)]
        mirror: MirrorArg,
    },
    /// Write a node's disk and its definition for libvirt and Proxmox
    #[command(after_help = "Examples:\n  bakehouse vm hub-1 -o vms && virsh define vms/hub-1.xml\n  \
        bakehouse vm app-1 --format vmdk --ticket disk\n\n\
        Builds missing images, and mints a ticket. Keep the files safe: they contain the ticket until the node\n\
        has joined.")]
    Vm {
        /// Name of a node, such as `db-2` (group and number)
        node: String,
        /// Format of the disk
        #[arg(long, value_enum, default_value = "qcow2")]
        format: Format,
        /// Transport of the ticket to the machine
        #[arg(long, value_enum, default_value = "smbios")]
        ticket: TicketTransport,
        /// Replace the machine that has the node's slot
        #[arg(long)]
        replace: bool,
        /// Overwrite the files of an earlier `bakehouse vm`
        #[arg(short, long)]
        yes: bool,
        /// Folder for the files
        #[arg(short, long, default_value = ".", value_name = "DIR")]
        output: PathBuf,
        #[command(flatten)]
        mirror: MirrorArg,
    },
    /// Install nodes on machines that boot from the network
    #[command(after_help = "Examples:\n  bakehouse netboot --interface eth1 --dhcp 192.168.77.0/24\n  \
        bakehouse netboot --interface eth0      # beside the network's own DHCP server\n  \
        bakehouse netboot --approve 7K3M-...    # the code on the console of a hub's machine\n\n\
        [netboot] in fleet.toml assigns nodes to machines. The command builds missing images, mints each machine's\n\
        ticket on request, and runs until Ctrl-C. It needs root for the ports of DHCP and TFTP. Every host on\n\
        that network can pretend to be one of the machines. Hubs and voters therefore get their tickets only\n\
        after you confirm the code on their consoles.")]
    Netboot {
        /// Network interface that the machines are connected to
        #[arg(long, required_unless_present = "approve", value_name = "NAME")]
        interface: Option<String>,
        /// Assign addresses of this network, if it has no DHCP server
        #[arg(long, value_name = "NETWORK")]
        dhcp: Option<ipnet::Ipv4Net>,
        /// Install a machine again that was installed before (MAC address or serial number)
        #[arg(long, value_name = "MAC")]
        again: Vec<String>,
        /// Confirm the code on a machine's console, for the running server; with --interface, for this server
        #[arg(long, value_name = "CODE")]
        approve: Vec<String>,
        #[command(flatten)]
        mirror: MirrorArg,
    },
    /// Check fleet.toml, profiles and overlays
    #[command(after_help = "Example:\n  bakehouse check")]
    Check,
    /// Select package versions and write bakehouse.lock
    #[command(after_help = "Examples:\n  bakehouse lock\n  bakehouse lock --update   # take newer packages")]
    Lock {
        /// Take newer packages, even if the lock is valid
        #[arg(long)]
        update: bool,
        #[command(flatten)]
        mirror: MirrorArg,
    },
    /// Download the locked packages into the store
    #[command(after_help = "Example:\n  bakehouse fetch")]
    Fetch {
        #[command(flatten)]
        mirror: MirrorArg,
    },
    /// Build the groups' images into build/
    #[command(after_help = "Examples:\n  bakehouse build\n  bakehouse build hub -v")]
    Build {
        /// Names of groups; default: all groups
        groups: Vec<String>,
        /// Revision of your sources, for the manifest (such as `git rev-parse HEAD`)
        #[arg(long)]
        revision: Option<String>,
        #[command(flatten)]
        mirror: MirrorArg,
    },
    /// Compare the built images with the published version
    #[command(after_help = "Example:\n  bakehouse plan /srv/updates\n\n\
        Builds missing images; changes nothing in the folder. The exit code is 1 if nodes cannot take the version.")]
    Plan {
        /// Folder that `bakehouse publish` writes
        dir: PathBuf,
        /// Names of groups; default: all groups
        groups: Vec<String>,
        #[command(flatten)]
        mirror: MirrorArg,
    },
    /// Publish the images for the nodes' updates
    #[command(after_help = "Example:\n  bakehouse publish /srv/updates\n\n\
        Builds missing images, and signs them with a key that is derived from fleet.key. Serve the folder with any\n\
        HTTP server at `[update] url` of fleet.toml. Nodes take the new version one after the other.")]
    Publish {
        /// Folder that the HTTP server delivers
        dir: PathBuf,
        /// Names of groups; default: all groups
        groups: Vec<String>,
        #[command(flatten)]
        mirror: MirrorArg,
    },
    /// Show a rollout; pause and resume it, allow a version, skip a node
    #[command(after_help = "Examples:\n  bakehouse rollout\n  bakehouse rollout --pause \"month's end\"\n  \
            bakehouse rollout --resume\n  \
            bakehouse rollout --allow 7\n  bakehouse rollout --skip app-2")]
    Rollout {
        /// Pause: no further node changes; a node that changes finishes
        #[arg(long, value_name = "WHY", conflicts_with = "resume")]
        pause: Option<String>,
        /// Resume after a pause
        #[arg(long)]
        resume: bool,
        /// Lift the denial of a version, or allow one node to try a version that no other node is offered
        #[arg(long, value_name = "VERSION", conflicts_with_all = ["pause", "resume"])]
        allow: Option<String>,
        /// Stop waiting for a silent, starting or unwell node; it gets no update until it is well
        #[arg(long, value_name = "NODE", conflicts_with_all = ["pause", "resume", "allow"])]
        skip: Option<String>,
        /// Host of a hub, in place of its endpoint in fleet.toml; `local` for the hubs that `up` started
        #[arg(long, value_name = "HUB=HOST")]
        endpoint: Vec<String>,
    },
    /// Start the fleet as local virtual machines, on a network of their own
    #[command(after_help = "Examples:\n  bakehouse up\n  bakehouse up hub-1\n\n\
        Builds missing images, mints the tickets, and waits until all nodes are ready. Emulated machines boot\n\
        one after the other, hubs first. After Ctrl-C, started machines continue to run: `bakehouse up` continues,\n\
        and `bakehouse down` shuts them down.\n\n\
        On a host without KVM, containers run at the host's speed: the images' services, as root, on the host's\n\
        kernel. Their root file system is not verified.")]
    Up {
        /// Names of nodes; default: all nodes
        nodes: Vec<String>,
        /// Start containers instead of machines
        #[arg(long)]
        containers: bool,
        #[command(flatten)]
        mirror: MirrorArg,
    },
    /// Shut local virtual machines down
    #[command(after_help = "Example:\n  bakehouse down hub-1")]
    Down {
        /// Names of nodes; default: all nodes
        nodes: Vec<String>,
    },
    /// Show the nodes: state, VIP, primary and standbys, Odoo, version, disk and memory
    #[command(after_help = verbs::STATUS)]
    Status(StatusArgs),
    /// Print the nodes' journals, in the order of time
    #[command(after_help = verbs::LOGS)]
    Logs(LogsArgs),
    /// List the systemd units of a node
    #[command(after_help = "Examples:\n  bakehouse units db-1\n  bakehouse units db-1 --failed")]
    Units(UnitsArgs),
    /// Show the network of a node: interfaces, routes, peers, sessions, and the ways to the hubs
    #[command(after_help = net::NET)]
    Net(NetArgs),
    /// Capture packets of a node, for Wireshark and tcpdump
    #[command(after_help = pcap::PCAP)]
    Pcap(PcapArgs),
    /// Show the disks of a node: file systems, partitions, and the sizes of databases
    #[command(after_help = disk::DISK)]
    Disk(DiskArgs),
    /// Show what operators did on the nodes
    #[command(after_help = audit::AUDIT)]
    Audit(AuditArgs),
    /// Show load, memory and disk of all nodes
    #[command(after_help = "Examples:\n  bakehouse top\n  bakehouse top --watch")]
    Top(StatusArgs),
    /// Restart a unit of a node
    #[command(after_help = verbs::RESTART)]
    Restart(RestartArgs),
    /// Reboot a node
    #[command(after_help = verbs::REBOOT)]
    Reboot(ActionArgs),
    /// Switch a node off
    #[command(after_help = verbs::POWEROFF)]
    Poweroff(ActionArgs),
    /// Hand the primary over to a standby
    #[command(after_help = verbs::SWITCHOVER)]
    Switchover(SwitchoverArgs),
    /// Take a node out of service: it gives its work away, and takes none, also after a reboot
    #[command(after_help = verbs::DRAIN)]
    Drain(DrainArgs),
    /// Put a drained node into service again
    #[command(after_help = "Example:\n  bakehouse undrain db-1\n\n\
        The node takes work again. The primary and the VIP stay where they are.")]
    Undrain(UndrainArgs),
    /// Open a web page or the database of a node on this host
    #[command(after_help = verbs::OPEN)]
    Open(OpenArgs),
    /// Make a backup of the database
    #[command(subcommand, after_help = backup::BACKUP_HELP)]
    Backup(BackupCommand),
    /// Test whether alerts reach people
    #[command(subcommand, after_help = alert::ALERT)]
    Alert(AlertCommand),
    /// Test whether Odoo can send mail
    #[command(subcommand, after_help = mail::MAIL)]
    Mail(MailCommand),
    /// Give people access to the fleet, and take it back
    #[command(subcommand, after_help = verbs::OPERATOR)]
    Operator(OperatorCommand),
    /// Print a virtual machine's console
    #[command(after_help = "Examples:\n  bakehouse console hub-1\n  bakehouse console -f hub-1")]
    Console {
        /// Name of a node, such as `db-2` (group and number)
        node: String,
        /// Print new lines until the machine is off, or until Ctrl-C
        #[arg(short, long)]
        follow: bool,
    },
    /// Run a command on a node
    #[command(after_help = verbs::EXEC)]
    Exec(ExecArgs),
    /// Run SQL on the database
    #[command(after_help = psql::PSQL)]
    Psql(PsqlArgs),
    /// Run Python in Odoo
    #[command(subcommand, after_help = odoo::ODOO)]
    Odoo(OdooCommand),
    /// Inject faults into the running fleet and measure what clients notice
    #[command(after_help = scenarios())]
    Rehearse {
        /// Scenarios; default: all, one after the other
        scenarios: Vec<String>,
        /// Number of runs of each scenario
        #[arg(long, default_value_t = 1, value_name = "COUNT")]
        repeat: u32,
        /// Also write the table to a Markdown file; rows of other scenarios stay
        #[arg(long, value_name = "FILE")]
        page: Option<PathBuf>,
        /// Revision of your sources, for the page
        #[arg(long)]
        revision: Option<String>,
    },
    /// Collect journals, states and, from local machines, configurations of all nodes
    #[command(after_help = verbs::REPORT)]
    Report(ReportArgs),
    /// Show the origin of a file in an image
    #[command(after_help = "Example:\n  bakehouse explain /run/bakehouse/haproxy.cfg --group app")]
    Explain {
        /// Path in the image
        path: String,
        /// Group of the image; default: all groups
        #[arg(long)]
        group: Option<String>,
    },
    /// Manage the store of packages and layers
    #[command(subcommand, after_help = "Example:\n  bakehouse store gc --older-than 7")]
    Store(StoreCommand),
    /// Print the JSON Schema of a file, with which editors complete and check it
    #[command(after_help = "Example:\n  bakehouse schema profile > profile.schema.json\n\n\
        Name the schema in the first line of the TOML file: `#:schema ./profile.schema.json`. `bakehouse init` does\n\
        this for fleet.toml, and `bakehouse check` writes the schema again after an update of Bakehouse.")]
    Schema {
        /// File that the schema describes
        #[arg(value_enum)]
        file: SchemaOf,
    },
    /// Print a shell's completions of commands and options
    #[command(after_help = "Examples:\n  \
        bakehouse completions bash > ~/.local/share/bash-completion/completions/bakehouse\n  \
        bakehouse completions fish > ~/.config/fish/completions/bakehouse.fish")]
    Completions {
        /// Shell that completes
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },
    /// Write the man pages: bakehouse(1), one for each command, fleet.toml(5), and firstboot(8)
    #[command(after_help = "Example:\n  bakehouse man pages && man -l pages/bakehouse-init.1")]
    Man {
        /// Folder for the pages
        #[arg(value_hint = ValueHint::DirPath)]
        dir: PathBuf,
    },
}

#[derive(Subcommand)]
pub(super) enum StoreCommand {
    /// Remove entries that were not used for some time
    #[command(after_help = "Example:\n  bakehouse store gc --older-than 7")]
    Gc {
        /// Age in days
        #[arg(long, default_value_t = 30, value_name = "DAYS")]
        older_than: u64,
    },
}

#[derive(Args)]
pub(super) struct MirrorArg {
    /// Base URL of a Debian archive, in place of the one in fleet.toml or of the host
    #[arg(long, value_name = "URL")]
    pub(super) mirror: Option<String>,
}
