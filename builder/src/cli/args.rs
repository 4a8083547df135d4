//! What can be typed.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::deploy::export::{Format, TicketTransport};
use crate::rehearse;

/// Turns a fleet.toml into bootable, immutable Debian images.
#[derive(Parser)]
#[command(
    name = "bakehouse",
    version,
    about,
    after_help = "Exit codes: 0 done, 1 failed, 2 wrong command line or TOML, 130 interrupted, 141 answer not read."
)]
pub(super) struct Cli {
    /// fleet.toml or its folder
    #[arg(short = 'C', long = "fleet", global = true, default_value = "fleet.toml", value_name = "PATH")]
    pub(super) fleet: PathBuf,
    /// Say what is reused, and why what is not
    #[arg(short, long, global = true)]
    pub(super) verbose: bool,
    /// Say only what is wrong
    #[arg(short, long, global = true)]
    pub(super) quiet: bool,
    /// Print results as JSON
    #[arg(long, global = true)]
    pub(super) json: bool,
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Subcommand)]
pub(super) enum Command {
    /// Make a fleet's folder: fleet.toml to start from, and the fleet's key
    #[command(after_help = "Examples:\n  bakehouse init acme\n  bakehouse init acme --from quick-ha\n\n\
        The key (fleet.key) makes nodes believe you: keep it off the nodes, and keep a copy. With --passphrase\n\
        it is a file of age's (`age --decrypt` reads it), and each command that needs it asks; for scripts,\n\
        BAKEHOUSE_PASSPHRASE_FILE names a file with the passphrase.")]
    Init {
        /// The folder; its name is the fleet's
        dir: PathBuf,
        /// Built-in fleet to start from: ha, minimal-ha, quick-ha
        #[arg(long, default_value = "ha")]
        from: String,
        /// Have what firmware runs signed, with a key that is made now
        #[arg(long)]
        secure_boot: bool,
        /// Ask for a passphrase that the fleet's key is encrypted with, also where there is a key
        #[arg(long)]
        passphrase: bool,
    },
    /// Mint a ticket: what a machine is given to become a node
    #[command(after_help = "Examples:\n  bakehouse ticket hub-1 -o hub-1.ticket\n  \
        bakehouse ticket app --uses 5 --days 2 -o app.ticket\n  bakehouse ticket db-1 --replace -o db-1.ticket\n  bakehouse ticket --list\n  bakehouse ticket --revoke NUMBER\n\n\
        The machine finds it as the systemd credential `bakehouse.ticket`. Nodes that found the fleet\n\
        (hubs and voters) have a ticket each; others may share one for their group. For [backup.s3], set\n\
        BAKEHOUSE_S3_KEY and BAKEHOUSE_S3_SECRET when `bakehouse init` makes the fleet's key.")]
    Ticket {
        /// A node, or a group
        #[arg(required_unless_present_any = ["revoke", "list"])]
        to: Option<String>,
        /// How many nodes it is good for
        #[arg(long, default_value_t = 1)]
        uses: u32,
        /// Days it is good for
        #[arg(long, default_value_t = 1)]
        days: u32,
        /// Take the node's place from the machine that has it
        #[arg(long)]
        replace: bool,
        /// List the tickets that were minted here, and what became of them
        #[arg(long, conflicts_with_all = ["to", "uses", "days", "replace", "revoke"])]
        list: bool,
        /// Make a ticket worthless, by the number that was told when it was minted
        #[arg(long, value_name = "NUMBER", conflicts_with_all = ["to", "uses", "days", "replace"])]
        revoke: Option<String>,
        /// Write it to a file that only you can read, instead of standard output
        #[arg(short, long, value_name = "FILE")]
        output: Option<PathBuf>,
        /// Where a hub is reached, if not at its endpoint in fleet.toml; `local` to ask those that `up` started
        #[arg(long, value_name = "HUB=HOST")]
        endpoint: Vec<String>,
    },
    /// Have a node leave the fleet
    #[command(
        after_help = "Examples:\n  bakehouse leave db-2\n  bakehouse leave hub-3 --now --endpoint hub-1=192.0.2.1\n\n\
        Its machine hands over what it does, stops, gives its slot back, and says so on its console. A new\n\
        machine may have the slot then, with an ordinary ticket (founders: `bakehouse ticket --replace`).\n\
        With --now the machine is not waited for: for one that is dead, stolen, or not to be trusted."
    )]
    Leave {
        node: String,
        /// Shut it out at once
        #[arg(long)]
        now: bool,
        /// Where this machine reaches a hub, if not at its endpoint in fleet.toml; `local` for those that `up` started
        #[arg(long, value_name = "HUB=HOST")]
        endpoint: Vec<String>,
    },
    /// Write a node's image and its ticket to a disk, or into a file
    #[command(after_help = "Examples:\n  bakehouse flash hub-1 /dev/sdb\n  bakehouse flash app disk.raw --json\n\n\
        Builds what is missing, mints a ticket, writes, reads back, and compares. For a group, any free slot\n\
        is taken. Whoever has the disk has the ticket until the node has joined.")]
    Flash {
        /// A node, or a group
        to: String,
        /// A whole disk, or a file
        target: PathBuf,
        /// Don't ask
        #[arg(short, long)]
        yes: bool,
        /// Overwrite a disk in use, or a partition: the device's name again
        #[arg(long, value_name = "NAME")]
        force: Option<String>,
        /// Take the node's place from the machine that has it
        #[arg(long, conflicts_with = "no_ticket")]
        replace: bool,
        /// Write no ticket: the machine gets one in another way
        #[arg(long)]
        no_ticket: bool,
        #[command(flatten)]
        mirror: MirrorArg,
    },
    /// Write a node's disk and its definition for libvirt and Proxmox
    #[command(after_help = "Examples:\n  bakehouse vm hub-1 -o vms && virsh define vms/hub-1.xml\n  \
        bakehouse vm app-1 --format vmdk --ticket disk\n\n\
        Builds what is missing, and mints a ticket. Whoever has the files has it until the node has joined.")]
    Vm {
        node: String,
        #[arg(long, value_enum, default_value = "qcow2")]
        format: Format,
        /// How the machine gets its ticket
        #[arg(long, value_enum, default_value = "smbios")]
        ticket: TicketTransport,
        /// Take the node's place from the machine that has it
        #[arg(long)]
        replace: bool,
        /// Folder
        #[arg(short, long, default_value = ".", value_name = "DIR")]
        output: PathBuf,
        #[command(flatten)]
        mirror: MirrorArg,
    },
    /// Make nodes of machines that boot from the network
    #[command(after_help = "Examples:\n  bakehouse netboot --interface eth1 --dhcp 192.168.77.0/24\n  \
        bakehouse netboot --interface eth0      beside the network's own DHCP server\n  \
        bakehouse netboot --approve 7K3M-...    the code on the console of a machine that is to be a hub\n\n\
        fleet.toml says which machine becomes what ([netboot]). Builds what is missing, mints each machine's\n\
        ticket when it asks, and answers until Ctrl-C. As root, for the ports of DHCP and TFTP. Every host\n\
        on that network can pretend to be a machine: hubs and voters get their tickets only after you confirm\n\
        the code that their consoles show.")]
    Netboot {
        /// Network interface that the machines are reached by
        #[arg(long, required_unless_present = "approve")]
        interface: Option<String>,
        /// Give addresses of this network out, where there is no DHCP server
        #[arg(long, value_name = "NETWORK")]
        dhcp: Option<ipnet::Ipv4Net>,
        /// Install this machine again, though it was installed before (MAC address or serial number)
        #[arg(long, value_name = "MAC")]
        again: Vec<String>,
        /// Confirm the code on a machine's console, for the server that runs; with --interface, for this one
        #[arg(long, value_name = "CODE")]
        approve: Vec<String>,
        #[command(flatten)]
        mirror: MirrorArg,
    },
    /// Check fleet.toml, profiles and overlays
    #[command(after_help = "Example:\n  bakehouse check")]
    Check,
    /// Choose the packages' versions and write bakehouse.lock
    #[command(after_help = "Examples:\n  bakehouse lock\n  bakehouse lock --update   take newer packages")]
    Lock {
        /// Take newer packages, even if the lock serves
        #[arg(long)]
        update: bool,
        #[command(flatten)]
        mirror: MirrorArg,
    },
    /// Bring the locked packages into the store
    #[command(after_help = "Example:\n  bakehouse fetch")]
    Fetch {
        #[command(flatten)]
        mirror: MirrorArg,
    },
    /// Build the groups' images into build/
    #[command(after_help = "Examples:\n  bakehouse build\n  bakehouse build hub -v")]
    Build {
        /// Groups; all when none is named
        groups: Vec<String>,
        /// Revision of your sources, for the manifest (such as `git rev-parse HEAD`)
        #[arg(long)]
        revision: Option<String>,
        #[command(flatten)]
        mirror: MirrorArg,
    },
    /// Say what the built images would change on nodes of the published version
    #[command(after_help = "Example:\n  bakehouse plan /srv/updates\n\n\
        Builds what is missing; changes nothing in the folder. Exit code 1 when nodes could not take it.")]
    Plan {
        /// The folder that `bakehouse publish` writes
        dir: PathBuf,
        /// Groups; all when none is named
        groups: Vec<String>,
        #[command(flatten)]
        mirror: MirrorArg,
    },
    /// Put the images where nodes find newer versions of themselves
    #[command(after_help = "Example:\n  bakehouse publish /srv/updates\n\n\
        Builds what is missing, and signs with the key that belongs to fleet.key. Serve the folder with any\n\
        HTTP server, as `[update] url` in fleet.toml says: nodes take the new version one after the other.")]
    Publish {
        /// The folder
        dir: PathBuf,
        /// Groups; all when none is named
        groups: Vec<String>,
        #[command(flatten)]
        mirror: MirrorArg,
    },
    /// Say how far the nodes are with a new version; pause and resume, allow a version, skip a node
    #[command(
        after_help = "Examples:\n  bakehouse rollout\n  bakehouse rollout --pause \"month's end\"\n  bakehouse rollout --resume\n  \
            bakehouse rollout --allow 7\n  bakehouse rollout --skip app-2"
    )]
    Rollout {
        /// No node begins to change; one that has begun ends it
        #[arg(long, value_name = "WHY", conflicts_with = "resume")]
        pause: Option<String>,
        /// Go on
        #[arg(long)]
        resume: bool,
        /// Lift the denial of a version; let one node try a version that no other node is offered
        #[arg(long, value_name = "VERSION", conflicts_with_all = ["pause", "resume"])]
        allow: Option<String>,
        /// Wait for a silent, starting or unwell node no longer; it has no turn until it is well
        #[arg(long, value_name = "NODE", conflicts_with_all = ["pause", "resume", "allow"])]
        skip: Option<String>,
        /// Where this machine reaches a hub, if not at its endpoint in fleet.toml; `local` for those that `up` started
        #[arg(long, value_name = "HUB=HOST")]
        endpoint: Vec<String>,
    },
    /// Boot the fleet as local virtual machines, on a network of their own
    #[command(after_help = "Examples:\n  bakehouse up\n  bakehouse up hub-1\n\n\
        Builds what is missing, mints the tickets, waits until all is ready. Emulated machines boot in turns,\n\
        hubs first. Ctrl-C leaves those that are on as they are: `bakehouse up` goes on, `bakehouse down`\n\
        switches them off.\n\nWhere there is no KVM, containers are as fast as the host: the images' own services, as root, on the\n\
        host's kernel. They have no verified root.")]
    Up {
        /// Nodes; all when none is named
        nodes: Vec<String>,
        /// Containers instead of machines
        #[arg(long)]
        containers: bool,
        #[command(flatten)]
        mirror: MirrorArg,
    },
    /// Power local virtual machines off
    #[command(after_help = "Example:\n  bakehouse down hub-1")]
    Down {
        /// Nodes; all when none is named
        nodes: Vec<String>,
    },
    /// The local virtual machines at a glance: state, VIP, primary and standbys, Odoo
    #[command(after_help = "Examples:\n  bakehouse status --json\n  watch bakehouse status")]
    Status,
    /// Print a virtual machine's console
    #[command(after_help = "Example:\n  bakehouse console hub-1")]
    Console { node: String },
    /// Run a command in a virtual machine
    #[command(after_help = "Examples:\n  bakehouse exec hub-1 -- systemctl --failed\n  \
                        bakehouse exec hub-1 -- 'wg show | grep handshake'\n\n\
                        A single word is a line for the shell inside; several are a command and its \
                        arguments, as they are.")]
    Exec {
        node: String,
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Break the running fleet on purpose, and tell what its users notice
    #[command(after_help = scenarios())]
    Rehearse {
        /// What to break; all of it, one after the other, when nothing is named
        scenarios: Vec<String>,
        /// How often each
        #[arg(long, default_value_t = 1)]
        repeat: u32,
        /// Write the table to a Markdown file too; what it has of other scenarios stays
        #[arg(long, value_name = "FILE")]
        page: Option<PathBuf>,
        /// Revision of your sources, for the page
        #[arg(long)]
        revision: Option<String>,
    },
    /// Collect journals, configurations and the services' views from all machines
    #[command(after_help = "Example:\n  bakehouse report -o report.tar.gz\n\nPasswords and keys are taken out.")]
    Report {
        #[arg(short, long, default_value = "report.tar.gz", value_name = "FILE")]
        output: PathBuf,
    },
    /// Say where a file of an image comes from
    #[command(after_help = "Example:\n  bakehouse explain /run/bakehouse/haproxy.cfg --group app")]
    Explain {
        path: String,
        /// The image's group; may be left out where the fleet has only one
        #[arg(long)]
        group: Option<String>,
    },
    /// The store of packages and layers
    #[command(subcommand)]
    Store(StoreCommand),
}

#[derive(Subcommand)]
pub(super) enum StoreCommand {
    /// Remove what was not used for a while
    #[command(after_help = "Example:\n  bakehouse store gc --older-than 7")]
    Gc {
        /// Days
        #[arg(long, default_value_t = 30)]
        older_than: u64,
    },
}

#[derive(Args)]
pub(super) struct MirrorArg {
    /// Debian archive's base address, instead of fleet.toml's or the host's
    #[arg(long)]
    pub(super) mirror: Option<String>,
}

/// The rehearsal's help: what there is to break.
fn scenarios() -> String {
    let list: Vec<String> = rehearse::SCENARIOS.iter().map(|s| format!("  {:<12} {}", s.name, s.about)).collect();
    format!(
        "Scenarios:\n{}\n\nExamples:\n  bakehouse rehearse hub db app\n  bakehouse rehearse --page docs/rehearsal.md\n\n\
         Exit code 1 when a promise was broken.",
        list.join("\n")
    )
}
