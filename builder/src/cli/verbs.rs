//! Arguments of the commands for running nodes, and of `bakehouse operator`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum, ValueHint};
use fleet::OperatorRole;
use fleet::node_api::LONGEST_RUN;

pub(super) const STATUS: &str = "\
Examples:
  bakehouse status
  bakehouse status --watch
  bakehouse status --json

The command shows the machines that `bakehouse up` started, or else the nodes of the real fleet, which it asks
through a hub. For a real fleet it needs an operator's file (`bakehouse operator add`). The file alone, without
fleet.toml, is enough. The exit code is 1 if a node is silent.

With --watch, the command shows a live board: a summary, the alerts that fire, and the nodes. If the terminal is too
small, nodes that need attention come first. Without a terminal, it prints each state after the last one.";
pub(super) const LOGS: &str = "\
Examples:
  bakehouse logs db-1 -u patroni
  bakehouse logs --role db -f
  bakehouse logs --all --since 10min --grep 'error|fatal'
  bakehouse logs hub-1 -b -n 100000 --json
  bakehouse logs db-2 --kept monitor-1

TIME is an age (`30s`, `10min`, `2h`, `3d`) or a time in UTC (`2026-12-01`, `2026-12-01 08:30`,
`2026-12-01T08:30:00Z`). If a hub fails while the command follows, it continues through another hub. The exit code is
1 if a journal is incomplete.";
pub(super) const RESTART: &str = "\
Examples:
  bakehouse restart app-1 odoo
  bakehouse restart db-2 patroni --yes

The node refuses if the fleet would lose a quorum, the last primary or the VIP. `--force` with the node's name again
overrides this.";
pub(super) const REBOOT: &str = "\
Examples:
  bakehouse reboot app-1
  bakehouse reboot db-1 --yes --force db-1

The node refuses if the fleet would lose a quorum, the last primary or the VIP. `--force` with the node's name again
overrides this. The command returns when the node is ready again; the exit code is 1 if it is not within 15 min.";
pub(super) const POWEROFF: &str = "\
Examples:
  bakehouse poweroff app-2
  bakehouse poweroff app-2 --yes

The node stays off until somebody switches the machine on. The command returns when the node does not answer any more.
The node refuses if the fleet would lose a quorum, the last
primary or the VIP. `--force` with the node's name again overrides this.";
pub(super) const SWITCHOVER: &str = "\
Examples:
  bakehouse switchover
  bakehouse switchover --yes

Patroni selects a synchronous standby. Connections to the database end, and Odoo connects again. The command returns
when another node has the primary.";
pub(super) const DRAIN: &str = "\
Examples:
  bakehouse drain db-1
  bakehouse drain app-2 --yes
  bakehouse drain hub-1 --yes --force hub-1

The primary and the VIP move to other nodes and do not come back. Odoo on the node gets no new sessions and runs no
scheduled jobs, and open requests complete. A drained standby still replicates, and a voter keeps its vote. The node
stays drained over reboots and updates, until `bakehouse undrain`.

The node refuses if it is the last one that can hold the VIP, serve Odoo, or become the primary. `--force` with the
node's name again overrides this.";
pub(super) const OPEN: &str = "\
Examples:
  bakehouse open
  bakehouse open prometheus
  bakehouse open haproxy --node hub-2
  bakehouse open postgres

Prints a link to this host's loopback interface, and forwards requests until Ctrl-C. The link has a secret, which the
browser keeps in a cookie: other users of this host and pages of other sites cannot use the address. A program sends
the last part of the link in a header: `Authorization: Bearer SECRET`.

For `postgres`, prints a command of psql with a Unix socket of this host that only you can use, and forwards clients
until Ctrl-C. They get the PostgreSQL user that may only read, or with --write the one with the rights of Odoo's
database user. It needs the role admin, and `[access] sql = true` in fleet.toml. PostgreSQL logs each statement.";
pub(super) const EXEC: &str = "\
Examples:
  bakehouse exec hub-1 systemctl --failed
  bakehouse exec hub-1 'wg show | grep handshake'

A single word is a command line for the node's shell. Several words are a command and its
arguments, which reach the command unchanged.
There is no terminal: interactive programs end at once. A real fleet needs the role `admin`, and
`[access] shell = true` in fleet.toml. A local machine whose agent does not answer, or whose fleet permits no commands,
runs the command through its virtual serial port.";
pub(super) const REPORT: &str = "\
Example:
  bakehouse report -o report.tar.gz

The report contains no passwords and no private keys. Without fleet.key, the command does not know the fleet's
passwords, and warns: look into the archive before you send it.";
pub(super) const OPERATOR: &str = "\
Examples:
  bakehouse operator add anna --role viewer
  bakehouse operator list
  bakehouse operator revoke anna --yes";

/// How the command reaches the nodes.
#[derive(Args, Clone, Default)]
pub(super) struct AccessArgs {
    /// Operator's file; default: the one beside fleet.toml, or in ~/.config/bakehouse
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(super) operator: Option<PathBuf>,
    /// Host of a hub, in place of its endpoint in fleet.toml; `local` for the hubs that `up` started
    #[arg(long, value_name = "HUB=HOST")]
    pub(super) endpoint: Vec<String>,
}

#[derive(Args)]
pub(super) struct StatusArgs {
    /// Show the state again every 2 s, until Ctrl-C
    #[arg(short, long)]
    pub(super) watch: bool,
    #[command(flatten)]
    pub(super) access: AccessArgs,
}

#[derive(Args)]
pub(super) struct LogsArgs {
    /// Names of nodes
    #[arg(required_unless_present_any = ["role", "all"], value_name = "NODE")]
    pub(super) nodes: Vec<String>,
    /// All nodes with this role
    #[arg(long, conflicts_with = "all")]
    pub(super) role: Option<String>,
    /// All nodes
    #[arg(long)]
    pub(super) all: bool,
    /// Only messages of this unit
    #[arg(short, long)]
    pub(super) unit: Option<String>,
    /// Print new messages until Ctrl-C
    #[arg(short, long)]
    pub(super) follow: bool,
    /// Only messages since this time
    #[arg(long, value_name = "TIME", value_parser = since)]
    pub(super) since: Option<u64>,
    /// Only messages that match this regular expression; -n counts messages before the filter
    #[arg(long, value_name = "REGEX", value_parser = regex::Regex::new)]
    pub(super) grep: Option<regex::Regex>,
    /// Only messages since the node's last boot
    #[arg(short, long)]
    pub(super) boot: bool,
    /// Read the copies of the journals on this monitor, also of machines that are lost
    #[arg(long, value_name = "MONITOR", conflicts_with = "boot")]
    pub(super) kept: Option<String>,
    /// Number of messages of each node; default: 200, with -f 10, with --since all
    #[arg(short = 'n', long, value_name = "COUNT")]
    pub(super) lines: Option<u32>,
    #[command(flatten)]
    pub(super) access: AccessArgs,
}

#[derive(Args)]
pub(super) struct UnitsArgs {
    /// Name of a node, such as `db-2` (group and number)
    pub(super) node: String,
    /// Only failed units
    #[arg(long)]
    pub(super) failed: bool,
    #[command(flatten)]
    pub(super) access: AccessArgs,
}

/// Consent to an action.
#[derive(Args)]
pub(super) struct ConsentArgs {
    /// Do it without a question
    #[arg(short, long)]
    pub(super) yes: bool,
    /// Do it although the fleet loses a quorum, the last primary or the VIP; give the node's name again
    #[arg(long, value_name = "NODE")]
    pub(super) force: Option<String>,
}

#[derive(Args)]
pub(super) struct ActionArgs {
    /// Name of a node, such as `db-2` (group and number)
    pub(super) node: String,
    #[command(flatten)]
    pub(super) consent: ConsentArgs,
    /// Return when the node has accepted the action
    #[arg(long)]
    pub(super) no_wait: bool,
    #[command(flatten)]
    pub(super) access: AccessArgs,
}

#[derive(Args)]
pub(super) struct RestartArgs {
    /// Name of a node, such as `db-2` (group and number)
    pub(super) node: String,
    /// Name of a unit; `.service` may be left out
    pub(super) unit: String,
    #[command(flatten)]
    pub(super) consent: ConsentArgs,
    #[command(flatten)]
    pub(super) access: AccessArgs,
}

#[derive(Args)]
pub(super) struct DrainArgs {
    /// Name of a node, such as `db-2` (group and number)
    pub(super) node: String,
    #[command(flatten)]
    pub(super) consent: ConsentArgs,
    #[command(flatten)]
    pub(super) access: AccessArgs,
}

#[derive(Args)]
pub(super) struct UndrainArgs {
    /// Name of a node, such as `db-2` (group and number)
    pub(super) node: String,
    #[command(flatten)]
    pub(super) access: AccessArgs,
}

#[derive(Args)]
pub(super) struct SwitchoverArgs {
    #[command(flatten)]
    pub(super) consent: ConsentArgs,
    #[command(flatten)]
    pub(super) access: AccessArgs,
}

/// A service of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Page {
    /// The whole fleet: state, alerts, graphs and buttons, on the monitor
    #[value(name = "page")]
    Fleet,
    /// Metrics of all nodes, on the monitor
    Prometheus,
    /// Alerts and silences, on the monitor
    Alertmanager,
    /// Servers of Odoo and their health checks, on a hub
    Haproxy,
    /// The database, for psql and other clients, on the node with the primary
    Postgres,
}

#[derive(Args)]
pub(super) struct OpenArgs {
    /// Page or service to open
    #[arg(value_enum, default_value_t = Page::Fleet)]
    pub(super) page: Page,
    /// Name of a node; default: the first node with the page that answers
    #[arg(long)]
    pub(super) node: Option<String>,
    /// With `postgres`: as the user that may write
    #[arg(long)]
    pub(super) write: bool,
    #[command(flatten)]
    pub(super) access: AccessArgs,
}

#[derive(Args)]
pub(super) struct ExecArgs {
    #[command(flatten)]
    pub(super) access: AccessArgs,
    /// Name of a node, such as `db-2` (group and number)
    pub(super) node: String,
    /// Seconds after which the node stops the command
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u32).range(1..=i64::from(LONGEST_RUN)))]
    pub(super) seconds: u32,
    /// Command line, or command and arguments
    #[arg(trailing_var_arg = true, required = true)]
    pub(super) command: Vec<String>,
}

#[derive(Args)]
pub(super) struct ReportArgs {
    /// Archive to write
    #[arg(short, long, default_value = "report.tar.gz", value_name = "FILE")]
    pub(super) output: PathBuf,
    #[command(flatten)]
    pub(super) access: AccessArgs,
}

#[derive(Subcommand)]
pub(super) enum OperatorCommand {
    /// Make an operator's file: certificate, key, and the hubs' addresses
    #[command(after_help = "Examples:\n  bakehouse operator add me --role admin --own\n  \
        bakehouse operator add anna --role viewer --days 90 --request anna.request -o to-anna\n\n\
        viewer: reads states, logs and metrics. operator: also restarts, reboots and switches over. admin: also runs\n\
        commands as root. Give the file to its owner through a safe channel: with a key in it, it is a secret. With\n\
        --request, the key stays on the owner's machine, and the file is no secret.\n\n\
        The command asks the hubs for their versions, and refuses while one of them does not know operators.")]
    Add(AddOperatorArgs),
    /// Make a key and a request for a certificate, on the operator's own machine
    #[command(after_help = "Example:\n  bakehouse operator request anna\n\n\
        Writes NAME.key, a secret that stays here, and NAME.request for the owner of fleet.key, who runs\n\
        `bakehouse operator add NAME --request NAME.request`. Put the NAME.operator that comes back beside NAME.key.")]
    Request {
        /// Name: lower-case letters, digits and hyphens
        name: String,
        /// Folder for the files
        #[arg(short, long, default_value = ".", value_name = "DIR", value_hint = ValueHint::DirPath)]
        output: PathBuf,
    },
    /// List the operators' certificates that were made in this folder
    #[command(after_help = "Example:\n  bakehouse operator list --json")]
    List,
    /// Revoke the certificates of an operator
    #[command(after_help = "Examples:\n  bakehouse operator revoke anna --yes\n  \
        bakehouse operator revoke --file anna.operator --yes\n\n\
        Nodes refuse the certificates within a minute, and close the operator's connections. The command may send the\n\
        order again, for example after etcd was restored from a backup.")]
    Revoke(RevokeOperatorArgs),
    /// Make this machine a WireGuard peer of the hubs, and write the configuration for wg-quick
    #[command(after_help = "Example:\n  bakehouse operator wireguard anna && sudo wg-quick up ./anna.conf\n\n\
        The fleet needs `[mesh] operators` in fleet.toml. The machine then reaches the node API of every node, and\n\
        nothing else; the operator's certificate decides what a request may do. If a hub does not answer, wg-quick's\n\
        file uses the next one within 10 s. Programs without PostUp (telephones, Windows) use one hub: --hub selects it.")]
    Wireguard(OperatorWireguardArgs),
}

#[derive(Args)]
pub(super) struct OperatorWireguardArgs {
    /// Name of the operator
    pub(super) name: String,
    /// Hub behind which the mesh is at first; default: the first one
    #[arg(long, value_name = "HUB")]
    pub(super) hub: Option<String>,
    /// Folder for the file
    #[arg(short, long, default_value = ".", value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(super) output: PathBuf,
    #[command(flatten)]
    pub(super) access: AccessArgs,
}

#[derive(Args)]
pub(super) struct RevokeOperatorArgs {
    /// Name of the operator
    #[arg(required_unless_present = "file")]
    pub(super) name: Option<String>,
    /// Revoke the key in this operator's file or request, which was made in another folder
    #[arg(long, value_name = "FILE", conflicts_with_all = ["name", "key"], value_hint = ValueHint::FilePath)]
    pub(super) file: Option<PathBuf>,
    /// Revoke this public key (base64), whose certificate was made in another folder
    #[arg(long, value_name = "KEY")]
    pub(super) key: Option<String>,
    /// Do it without a question
    #[arg(short, long)]
    pub(super) yes: bool,
    /// Host of a hub, in place of its endpoint in fleet.toml; `local` for the hubs that `up` started
    #[arg(long, value_name = "HUB=HOST")]
    pub(super) endpoint: Vec<String>,
}

/// Longest validity of a certificate, in days.
pub(super) const LONGEST_DAYS: u32 = 366;

#[derive(Args)]
pub(super) struct AddOperatorArgs {
    /// Name: lower-case letters, digits and hyphens
    pub(super) name: String,
    /// What the operator may do: viewer, operator or admin
    #[arg(long, value_parser = role())]
    pub(super) role: OperatorRole,
    /// Days until the certificate expires
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=i64::from(LONGEST_DAYS)))]
    pub(super) days: u32,
    /// Request that `bakehouse operator request` made on the operator's machine
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(super) request: Option<PathBuf>,
    /// Ask for a passphrase and encrypt the file with it
    #[arg(long, conflicts_with = "request")]
    pub(super) passphrase: bool,
    /// Use the file on this machine: write it to ~/.config/bakehouse
    #[arg(long, conflicts_with_all = ["request", "output"])]
    pub(super) own: bool,
    /// Folder for the file
    #[arg(short, long, default_value = ".", value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(super) output: PathBuf,
    /// Make the certificate although a hub runs a version that does not know operators
    #[arg(long)]
    pub(super) force: bool,
    /// Host of a hub, in place of its endpoint in fleet.toml; `local` for the hubs that `up` started
    #[arg(long, value_name = "HUB=HOST")]
    pub(super) endpoint: Vec<String>,
}

fn role() -> impl clap::builder::TypedValueParser<Value = OperatorRole> {
    use clap::builder::{PossibleValuesParser, TypedValueParser as _};
    let known = PossibleValuesParser::new(OperatorRole::ALL.map(OperatorRole::as_str));
    known.map(|name| name.parse().unwrap_or(OperatorRole::Viewer))
}

pub(super) fn since(text: &str) -> Result<u64, String> {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_secs();
    crate::util::time::since(text, now).ok_or_else(|| {
        "neither an age (`10min`) nor a time in UTC (`2026-12-01 08:30`, `2026-12-01T08:30:00Z`)".to_owned()
    })
}
