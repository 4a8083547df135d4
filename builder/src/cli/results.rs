//! The results and events of the commands. `docs/json.md` and `docs/json.schema.json` are generated from these types and
//! those of `envelope`.

use std::path::PathBuf;

use fleet::node_api::{DiskStatus, JournalLine, NetStatus};
use fleet::{HaRow, Rollout, Ticket};
use schemars::JsonSchema;
use serde::Serialize;

use super::alert::AlertTestResult;
use super::audit::AuditResult;
use super::backup::BackupNowResult;
use super::mail::MailTestResult;
use super::node_results::{
    ActionResult, LogsResult, NewOperatorResult, OpenResult, OperatorRequestResult, OperatorWireguardResult,
    RevokedOperatorResult, UnitsResult,
};
use super::pcap::PcapResult;
use super::problem::Problem;
use super::psql::PsqlResult;
use crate::deploy::export::Export;
use crate::deploy::flash::PassProgress;
use crate::deploy::netboot::MachineChange;
use crate::deploy::publish::{Comparison, Published, RolloutSchedule};
use crate::image::BuiltImage;
use crate::keys::operator_log::OperatorRow;
use crate::keys::ticket::TicketSummary;
use crate::keys::ticket_log::TicketRow;
use crate::packages::explain::Explanation;
use crate::packages::lock::LockChanges;
use crate::rehearse::Outcome;
use crate::vm::{FleetStatus, MachineState};

/// Progress of a command.
#[derive(Serialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub(super) enum Event<'a> {
    /// `flash`: progress of a pass over the target, every 64 MiB.
    Pass(PassProgress),
    /// `netboot`: a machine changes its state.
    Machine(MachineChange),
    /// `up`: a node reaches a state.
    Node {
        /// Name of the node.
        node: &'a str,
        /// State of its machine.
        state: MachineState,
    },
    /// `console --follow`: the console has more text.
    Console {
        /// Name of the node.
        node: &'a str,
        /// The text, without escape sequences.
        text: &'a str,
    },
    /// `logs`: a message of a node's journal.
    Line {
        /// Name of the node.
        node: &'a str,
        /// The message.
        line: &'a JournalLine,
    },
    /// `status --watch` and `top --watch`: the state of the nodes.
    State(&'a FleetStatus),
    /// `exec` and `odoo shell`: the command has printed text.
    Output {
        /// Whether the text is on standard error.
        stderr: bool,
        /// The text.
        text: &'a str,
    },
    /// `open`: this host accepts connections.
    Open(&'a OpenResult),
    /// `rehearse`: a run has ended.
    Run(&'a Outcome),
}

/// Result of a command.
#[derive(Serialize, JsonSchema)]
#[serde(tag = "command", content = "result")]
pub(super) enum CommandResult {
    /// Files of the fleet's folder.
    #[serde(rename = "init")]
    Init(InitResult),
    /// A new ticket; with `--list` the list of tickets; with `--revoke` the revoked ticket; with `--rescue` the rescue
    /// disk.
    #[serde(rename = "ticket")]
    Ticket(TicketResult),
    /// The stored or removed secret.
    #[serde(rename = "secret")]
    Secret(SecretResult),
    /// The order that a hub accepted.
    #[serde(rename = "leave")]
    Leave(LeaveResult),
    /// The written disk.
    #[serde(rename = "flash")]
    Flash(FlashResult),
    /// The written files.
    #[serde(rename = "vm")]
    Vm(VmResult),
    /// Confirmed codes, without `--interface`. The server runs until Ctrl-C: its last line is the error with code 130.
    #[serde(rename = "netboot")]
    Netboot(NetbootResult),
    /// Node counts by role, and the warnings. If a file is invalid, the command prints an error with diagnostics.
    #[serde(rename = "check")]
    Check(CheckResult),
    /// The lock, and its changes.
    #[serde(rename = "lock")]
    Lock(LockResult),
    /// Downloaded packages.
    #[serde(rename = "fetch")]
    Fetch(FetchResult),
    /// The images, one for each group.
    #[serde(rename = "build")]
    Build(Vec<BuiltImage>),
    /// Comparison with the published version. The exit code is 1 if a group has obstacles.
    #[serde(rename = "plan")]
    Plan(PlanResult),
    /// The published images, one for each group.
    #[serde(rename = "publish")]
    Publish(Vec<Published>),
    /// State of the rollout, after the order.
    #[serde(rename = "rollout")]
    Rollout(Rollout),
    /// State of the local machines.
    #[serde(rename = "up")]
    Up(FleetStatus),
    /// Nodes that were shut down.
    #[serde(rename = "down")]
    Down(DownResult),
    /// State of the nodes. With `--watch` there is no result: each state is an event. The exit code is 1 if a node is
    /// `silent`.
    #[serde(rename = "status")]
    Status(FleetStatus),
    /// Numbers of messages. The messages are events. The exit code is 1 if a journal is incomplete.
    #[serde(rename = "logs")]
    Logs(LogsResult),
    /// Units of a node.
    #[serde(rename = "units")]
    Units(UnitsResult),
    /// Network of a node.
    #[serde(rename = "net")]
    Net(NetStatus),
    /// Disks of a node.
    #[serde(rename = "disk")]
    Disk(DiskStatus),
    /// The last actions of operators.
    #[serde(rename = "audit")]
    Audit(AuditResult),
    /// The written capture.
    #[serde(rename = "pcap")]
    Pcap(PcapResult),
    /// The backup. The exit code is 1 if it failed.
    #[serde(rename = "backup now")]
    BackupNow(BackupNowResult),
    /// State of the nodes, as `status` returns it, with the same exit code.
    #[serde(rename = "top")]
    Top(FleetStatus),
    /// The unit that was restarted.
    #[serde(rename = "restart")]
    Restart(ActionResult),
    /// The node that has rebooted.
    #[serde(rename = "reboot")]
    Reboot(ActionResult),
    /// The node that has switched itself off.
    #[serde(rename = "poweroff")]
    Poweroff(ActionResult),
    /// The node whose primary was handed over.
    #[serde(rename = "switchover")]
    Switchover(ActionResult),
    /// The node that is drained.
    #[serde(rename = "drain")]
    Drain(ActionResult),
    /// The node that is not drained any more.
    #[serde(rename = "undrain")]
    Undrain(ActionResult),
    /// The command runs until Ctrl-C: its last line is the error with code 130.
    #[serde(rename = "open")]
    Open(OpenResult),
    /// What each receiver answered. The exit code is 1 if one has not accepted the alert.
    #[serde(rename = "alert test")]
    AlertTest(AlertTestResult),
    /// What the mail server answered. The exit code is 1 if it has not accepted the mail.
    #[serde(rename = "mail test")]
    MailTest(MailTestResult),
    /// The operator's new file.
    #[serde(rename = "operator add")]
    OperatorAdd(NewOperatorResult),
    /// The operator's key and request.
    #[serde(rename = "operator request")]
    OperatorRequest(OperatorRequestResult),
    /// The certificates that were made in this folder.
    #[serde(rename = "operator list")]
    OperatorList(Vec<OperatorRow>),
    /// The certificates that were revoked.
    #[serde(rename = "operator revoke")]
    OperatorRevoke(RevokedOperatorResult),
    /// The configuration of WireGuard.
    #[serde(rename = "operator wireguard")]
    OperatorWireguard(OperatorWireguardResult),
    /// Text of a console.
    #[serde(rename = "console")]
    Console(ConsoleResult),
    /// Status and output of a command on a node. The exit code is the command's status.
    #[serde(rename = "exec")]
    Exec(ExecResult),
    /// Results of SQL. If a statement fails, the command prints an error.
    #[serde(rename = "psql")]
    Psql(PsqlResult),
    /// Status and output of a script in Odoo's shell. The exit code is the shell's status.
    #[serde(rename = "odoo shell")]
    OdooShell(ExecResult),
    /// Outcomes of the runs. The exit code is 1 if the fleet broke a promise.
    #[serde(rename = "rehearse")]
    Rehearse(Vec<Outcome>),
    /// The written archive.
    #[serde(rename = "report")]
    Report(ReportResult),
    /// Origin of a file: in the image of one group, or in those of several groups.
    #[serde(rename = "explain")]
    Explain(ExplainResult),
    /// Entries that were removed from the store.
    #[serde(rename = "store gc")]
    StoreGc(GcResult),
    /// JSON Schema of a file.
    #[serde(rename = "schema")]
    Schema(SchemaResult),
    /// Completion script of a shell.
    #[serde(rename = "completions")]
    Completions(CompletionsResult),
    /// Written man pages.
    #[serde(rename = "man")]
    Man(ManResult),
}

/// Result of `init`.
#[derive(Serialize, JsonSchema)]
pub(super) struct InitResult {
    /// Name of the fleet.
    pub(super) fleet: String,
    /// The fleet's folder.
    pub(super) dir: PathBuf,
    /// Files of the folder that `init` is responsible for.
    pub(super) files: Vec<InitFile>,
}

/// A file of the fleet's folder.
#[derive(Serialize, JsonSchema)]
pub(super) struct InitFile {
    /// Path of the file.
    pub(super) path: PathBuf,
    /// What `init` did with it.
    pub(super) state: FileState,
}

/// What `init` did with a file.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum FileState {
    /// The file did not exist, and was created.
    Created,
    /// The file existed, and was replaced or encrypted.
    Changed,
    /// The file existed, and did not change.
    Kept,
}

/// Result of `secret`.
#[derive(Serialize, JsonSchema)]
pub(super) struct SecretResult {
    /// Name of the secret.
    pub(super) name: String,
    /// The file with the encrypted secrets.
    pub(super) path: PathBuf,
    /// Whether the file has the secret now.
    pub(super) stored: bool,
}

/// Result of `ticket`.
#[derive(Serialize, JsonSchema)]
#[serde(untagged)]
pub(super) enum TicketResult {
    /// A new ticket.
    New(NewTicketResult),
    /// With `--list`: the tickets that were minted in this folder.
    List(Vec<TicketRow>),
    /// With `--revoke`.
    Revoked(RevokedTicket),
    /// With `--rescue`.
    Rescue(RescueResult),
}

/// A new ticket.
#[derive(Serialize, JsonSchema)]
pub(super) struct NewTicketResult {
    #[serde(flatten)]
    pub(super) summary: TicketSummary,
    /// File with the ticket; `null` without `--output`.
    pub(super) path: Option<PathBuf>,
    /// The ticket, secret, for the systemd credential `bakehouse.ticket`. The key is absent with `--output`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<serde_json::Map<String, serde_json::Value>>")]
    pub(super) ticket: Option<Ticket>,
}

/// A revoked ticket.
#[derive(Serialize, JsonSchema)]
pub(super) struct RevokedTicket {
    /// Number of the ticket.
    pub(super) number: String,
    /// Hub that accepted the order.
    pub(super) hub: String,
}

/// The image of a rescue disk.
#[derive(Serialize, JsonSchema)]
pub(super) struct RescueResult {
    /// Node whose console the disk opens.
    pub(super) rescue: String,
    /// Number of the order, 128 random bits, hexadecimal. The node's journal has it.
    pub(super) id: String,
    /// Time after which the disk opens nothing, in seconds since 1970.
    pub(super) expires: u64,
    /// The same time, RFC 3339.
    pub(super) expires_at: String,
    /// File with the image.
    pub(super) path: PathBuf,
}

/// Result of `leave`.
#[derive(Serialize, JsonSchema)]
pub(super) struct LeaveResult {
    /// Name of the node.
    pub(super) node: String,
    /// Whether the hub evicted the node without waiting for its machine.
    pub(super) now: bool,
    /// Hub that accepted the order.
    pub(super) hub: String,
}

/// Result of `flash`.
#[derive(Serialize, JsonSchema)]
pub(super) struct FlashResult {
    /// The disk or file.
    pub(super) done: PathBuf,
    /// Size of the image in bytes.
    pub(super) bytes: u64,
    /// Group of the image.
    pub(super) group: String,
    /// The ticket on the disk; `null` with `--no-ticket`.
    pub(super) ticket: Option<TicketSummary>,
}

/// Result of `vm`.
#[derive(Serialize, JsonSchema)]
pub(super) struct VmResult {
    /// Name of the node.
    pub(super) node: String,
    #[serde(flatten)]
    pub(super) files: Export,
    /// The ticket in the files.
    pub(super) ticket: TicketSummary,
}

/// Result of `netboot --approve`.
#[derive(Serialize, JsonSchema)]
pub(super) struct NetbootResult {
    /// Confirmed codes. Their machines continue within 15 s.
    pub(super) approved: Vec<String>,
}

/// Result of `check`.
#[derive(Serialize, JsonSchema)]
pub(super) struct CheckResult {
    /// Warnings about the fleet's files.
    pub(super) warnings: Vec<Problem>,
    /// Node counts by role, with those that high availability needs.
    pub(super) nodes: Vec<HaRow>,
    /// Nodes with a vote in etcd.
    pub(super) voters: Vec<String>,
    /// The table that the command prints without `--json`.
    #[serde(skip)]
    pub(super) table: String,
}

/// Result of `lock`.
#[derive(Serialize, JsonSchema)]
pub(super) struct LockResult {
    /// The lock.
    pub(super) path: PathBuf,
    /// Whether the lock was valid, and was kept.
    pub(super) unchanged: bool,
    /// Number of locked packages.
    pub(super) packages: usize,
    /// Differences from the earlier lock; empty if there was none.
    #[serde(flatten)]
    pub(super) changes: LockChanges,
}

/// Result of `fetch`.
#[derive(Serialize, JsonSchema)]
pub(super) struct FetchResult {
    /// Number of packages that were downloaded.
    pub(super) packages: usize,
    /// Their size in bytes.
    pub(super) bytes: u64,
    /// Number of locked packages. The store has all of them.
    pub(super) locked: usize,
}

/// Result of `plan`.
#[derive(Serialize, JsonSchema)]
pub(super) struct PlanResult {
    /// Comparison of each group.
    pub(super) groups: Vec<Comparison>,
    /// Order of the nodes, and the time.
    pub(super) course: RolloutSchedule,
}

/// Result of `down`.
#[derive(Serialize, JsonSchema)]
pub(super) struct DownResult {
    /// Nodes whose machines ran, and are off now.
    pub(super) stopped: Vec<String>,
}

/// Result of `console`.
#[derive(Serialize, JsonSchema)]
pub(super) struct ConsoleResult {
    /// Name of the node.
    pub(super) node: String,
    /// Lines of the console since the last start, without escape sequences.
    pub(super) lines: Vec<String>,
}

/// Result of `exec` and of `odoo shell`.
#[derive(Serialize, JsonSchema)]
pub(super) struct ExecResult {
    /// Name of the node.
    pub(super) node: String,
    /// Exit status of the command.
    pub(super) status: i32,
    /// Standard output and standard error of the command.
    pub(super) output: String,
    /// Whether the command line has printed the output already.
    #[serde(skip)]
    pub(super) printed: bool,
}

/// Result of `explain`.
#[derive(Serialize, JsonSchema)]
#[serde(untagged)]
pub(super) enum ExplainResult {
    /// With `--group`, or in a fleet of one group.
    One(Explanation),
    /// In a fleet of several groups: for each group that has the path.
    All(Vec<Explanation>),
}

/// Result of `report`.
#[derive(Serialize, JsonSchema)]
pub(super) struct ReportResult {
    /// The archive, `.tar.gz`.
    pub(super) path: PathBuf,
    /// Paths of its files, below `report/`.
    pub(super) files: Vec<String>,
}

/// Result of `store gc`.
#[derive(Serialize, JsonSchema)]
pub(super) struct GcResult {
    /// Number of removed entries.
    pub(super) entries: usize,
    /// Their size in bytes.
    pub(super) bytes: u64,
}

/// Result of `schema`.
#[derive(Serialize, JsonSchema)]
pub(super) struct SchemaResult {
    /// The JSON Schema.
    pub(super) schema: serde_json::Value,
}

/// Result of `completions`.
#[derive(Serialize, JsonSchema)]
pub(super) struct CompletionsResult {
    /// Name of the shell.
    pub(super) shell: String,
    /// The script.
    pub(super) script: String,
}

/// Result of `man`.
#[derive(Serialize, JsonSchema)]
pub(super) struct ManResult {
    /// The written pages.
    pub(super) files: Vec<PathBuf>,
}
