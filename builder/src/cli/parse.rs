//! Parses the command line, and groups its commands.

use clap::{CommandFactory as _, FromArgMatches as _};

use super::alert::AlertCommand;
use super::args::{Cli, Command, StoreCommand};
use super::backup::BackupCommand;
use super::mail::MailCommand;
use super::odoo::OdooCommand;
use super::verbs::OperatorCommand;
use crate::rehearse;

impl Command {
    /// Returns the command's words.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Init { .. } => "init",
            Self::Ticket { .. } => "ticket",
            Self::Secret { .. } => "secret",
            Self::Leave { .. } => "leave",
            Self::Flash { .. } => "flash",
            Self::Vm { .. } => "vm",
            Self::Netboot { .. } => "netboot",
            Self::Check => "check",
            Self::Lock { .. } => "lock",
            Self::Fetch { .. } => "fetch",
            Self::Build { .. } => "build",
            Self::Plan { .. } => "plan",
            Self::Publish { .. } => "publish",
            Self::Rollout { .. } => "rollout",
            Self::Up { .. } => "up",
            Self::Down { .. } => "down",
            Self::Status(_) => "status",
            Self::Logs(_) => "logs",
            Self::Units(_) => "units",
            Self::Net(_) => "net",
            Self::Disk(_) => "disk",
            Self::Audit(_) => "audit",
            Self::Pcap(_) => "pcap",
            Self::Backup(BackupCommand::Now(_)) => "backup now",
            Self::Top(_) => "top",
            Self::Restart(_) => "restart",
            Self::Reboot(_) => "reboot",
            Self::Poweroff(_) => "poweroff",
            Self::Switchover(_) => "switchover",
            Self::Drain(_) => "drain",
            Self::Undrain(_) => "undrain",
            Self::Open(_) => "open",
            Self::Alert(AlertCommand::Test(_)) => "alert test",
            Self::Mail(MailCommand::Test(_)) => "mail test",
            Self::Operator(OperatorCommand::Add(_)) => "operator add",
            Self::Operator(OperatorCommand::Request { .. }) => "operator request",
            Self::Operator(OperatorCommand::List) => "operator list",
            Self::Operator(OperatorCommand::Revoke { .. }) => "operator revoke",
            Self::Operator(OperatorCommand::Wireguard(_)) => "operator wireguard",
            Self::Console { .. } => "console",
            Self::Exec(_) => "exec",
            Self::Psql(_) => "psql",
            Self::Odoo(OdooCommand::Shell(_)) => "odoo shell",
            Self::Rehearse { .. } => "rehearse",
            Self::Report(_) => "report",
            Self::Explain { .. } => "explain",
            Self::Store(StoreCommand::Gc { .. }) => "store gc",
            Self::Schema { .. } => "schema",
            Self::Completions { .. } => "completions",
            Self::Man { .. } => "man",
        }
    }
}

/// Commands by task, in the order of `bakehouse --help`.
pub(super) const GROUPS: &[(&str, &[&str])] = &[
    ("Begin", &["init", "check", "up", "down"]),
    ("Build", &["lock", "fetch", "build", "explain", "store"]),
    ("Install", &["ticket", "flash", "vm", "netboot"]),
    ("Change", &["plan", "publish", "rollout", "secret", "leave"]),
    (
        "Look",
        &["status", "logs", "units", "top", "net", "disk", "pcap", "audit", "open", "console", "report", "rehearse"],
    ),
    (
        "Act",
        &[
            "restart",
            "reboot",
            "poweroff",
            "switchover",
            "drain",
            "undrain",
            "backup",
            "exec",
            "psql",
            "odoo",
            "alert",
            "mail",
            "operator",
        ],
    ),
    ("Reference", &["schema", "completions", "man"]),
];

/// Returns the command line. Its help lists the commands by task, which clap cannot do by itself.
pub(super) fn command() -> clap::Command {
    let command = Cli::command();
    let (heading, literal) = (*command.get_styles().get_header(), *command.get_styles().get_literal());
    let mut list = String::new();
    for (title, names) in GROUPS {
        list.push_str(&format!("{heading}{title}:{heading:#}\n"));
        for command in names.iter().filter_map(|name| command.find_subcommand(name)) {
            let about = command.get_about().map(ToString::to_string).unwrap_or_default();
            list.push_str(&format!("  {literal}{:<12}{literal:#} {about}\n", command.get_name()));
        }
        list.push('\n');
    }
    command.help_template(format!(
        "{{about-with-newline}}\n{{usage-heading}} {{usage}}\n\n{list}{heading}Global options:{heading:#}\n\
         {{options}}\n\n`bakehouse help COMMAND` describes a command.{{after-help}}"
    ))
}

/// Parses the command line.
///
/// # Errors
/// `--help`, `--version`, and an invalid command line.
pub(super) fn parse() -> Result<Cli, clap::Error> {
    Cli::from_arg_matches(&command().try_get_matches()?)
}

/// Returns the help of `bakehouse rehearse`, with the list of scenarios.
pub(super) fn scenarios() -> String {
    let list: Vec<String> = rehearse::SCENARIOS.iter().map(|s| format!("  {:<12} {}", s.name, s.about)).collect();
    format!(
        "Scenarios:\n{}\n\nExamples:\n  bakehouse rehearse hub db app\n  \
         bakehouse rehearse --page docs/rehearsal.md\n\n\
         The exit code is 1 if the fleet broke a promise.",
        list.join("\n")
    )
}
