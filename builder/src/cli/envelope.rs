//! What each line of `--json` is: an event, a result, or an error, with the version of the format.

use fleet::{Diagnostic, ErrorChain, Severity};
use schemars::JsonSchema;
use serde::Serialize;

use super::problem::Problem;
use super::results::{CommandResult, Event};
use crate::error::Error;

/// Version of the envelope and the results.
pub(super) const VERSION: u32 = 1;

/// A line of standard output.
#[derive(Serialize, JsonSchema)]
#[serde(untagged)]
pub(super) enum Line<'a> {
    Event(EventLine<'a>),
    Result(ResultLine<'a>),
    Error(ErrorLine<'a>),
}

/// Progress of a command. Zero or more such lines come before the last line.
#[derive(Serialize, JsonSchema)]
pub(super) struct EventLine<'a> {
    /// Version of this format: 1.
    pub(super) version: u32,
    /// The command: `flash`, `store gc` and so on.
    pub(super) command: &'a str,
    /// What happened.
    pub(super) event: Event<'a>,
}

/// The last line, if the command printed a result. The exit code may still be 1: see the command.
#[derive(Serialize, JsonSchema)]
pub(super) struct ResultLine<'a> {
    /// Version of this format: 1.
    pub(super) version: u32,
    #[serde(flatten)]
    pub(super) result: &'a CommandResult,
    /// Warnings about the fleet's files, and about facts that the result lacks.
    pub(super) warnings: &'a [Problem],
}

/// The last line, if the command failed.
#[derive(Serialize, JsonSchema)]
pub(super) struct ErrorLine<'a> {
    /// Version of this format: 1.
    pub(super) version: u32,
    /// The command; `null` if the command line names none.
    pub(super) command: Option<&'a str>,
    /// Why the command failed.
    pub(super) error: Failure,
}

/// Why a command failed.
#[derive(Serialize, JsonSchema)]
pub(super) struct Failure {
    /// Exit code of the command: 1 failure, 2 invalid command line or TOML, 130 interrupted.
    pub(super) code: u8,
    /// What failed, and why.
    pub(super) message: String,
    /// The fix, as an instruction.
    pub(super) help: Option<String>,
    /// The causes of the error, from the nearest to the first one.
    pub(super) causes: Vec<String>,
    /// Errors and warnings about files, if the command failed because of them.
    pub(super) diagnostics: Vec<Problem>,
}

impl From<&Error> for Failure {
    fn from(e: &Error) -> Self {
        if let Error::Config(all) = e {
            let first = all.0.iter().find(|d| d.severity == Severity::Error);
            let place = |d: &Diagnostic| if d.line > 0 { format!("{}:{}", d.file, d.line) } else { d.file.clone() };
            return Self {
                code: e.code(),
                message: first.map_or_else(|| e.chain(), |d| format!("{}: {}", place(d), d.message)),
                help: first.and_then(|d| d.help.clone()),
                causes: Vec::new(),
                diagnostics: all.0.iter().map(Problem::from).collect(),
            };
        }
        let ErrorChain { messages, fixes } = ErrorChain::new(e);
        let causes = messages.iter().skip(1).cloned().collect();
        let help = (!fixes.is_empty()).then(|| fixes.join("; "));
        let message = ErrorChain { messages, fixes: Vec::new() }.to_string();
        Self { code: e.code(), message, help, causes, diagnostics: Vec::new() }
    }
}

impl From<&clap::Error> for Failure {
    /// The message is the first paragraph of clap's text, and the help its tips or the usage.
    fn from(e: &clap::Error) -> Self {
        let text = e.render().to_string();
        let code = u8::try_from(e.exit_code()).unwrap_or(2);
        let (message, help) = if let Some(text) = text.strip_prefix("error: ") {
            let (message, rest) = text.split_once("\n\n").unwrap_or((text, ""));
            let tips: Vec<&str> = rest.lines().filter_map(|line| line.trim().strip_prefix("tip: ")).collect();
            let usage = rest.lines().find(|line| line.starts_with("Usage: ")).map(str::to_owned);
            (
                message.split_whitespace().collect::<Vec<_>>().join(" "),
                if tips.is_empty() { usage } else { Some(tips.join("; ")) },
            )
        } else {
            ("the command line names no command".to_owned(), Some("bakehouse --help".to_owned()))
        };
        Self { code, message, help, causes: Vec::new(), diagnostics: Vec::new() }
    }
}
