//! Prints results to standard output and errors to standard error. With `--json`, prints lines of JSON to standard
//! output: events, and a result or an error as the last line.

use std::ffi::OsString;
use std::fmt::Display;
use std::io::{self, IsTerminal as _, Write as _};
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError, TryLockError};
use std::time::Duration;

use clap::ArgMatches;
use fleet::{Diagnostics, ErrorChain, is_unsafe, printable};

use super::envelope::{ErrorLine, EventLine, Failure, Line, ResultLine, VERSION};
use super::problem::Problem;
use super::results::{CommandResult, Event};
use super::{hints, parse};
use crate::error::{Error, Result};
use crate::progress::line;

/// Whether the command has printed its last line of JSON. A thread holds the lock while it prints a line.
static LAST_PRINTED: Mutex<bool> = Mutex::new(false);

/// Standard output of a command.
#[derive(Clone, Copy)]
pub(super) struct Output {
    /// Prints JSON.
    pub(super) json: bool,
    /// Prints each cause of an error on a line of its own.
    pub(super) verbose: bool,
    /// Name of the command, if the command line has one.
    pub(super) command: Option<&'static str>,
}

impl Output {
    /// With `--json`, prints an event. A command that has more to do than to print ignores the error of a closed
    /// standard output.
    pub(super) fn event(self, event: Event) -> Result<()> {
        if !self.json {
            return Ok(());
        }
        let command = self.command.unwrap_or_default();
        print_line(&Line::Event(EventLine { version: VERSION, command, event }))
    }

    /// Prints a command's result. Returns its exit code.
    pub(super) fn result(self, result: &CommandResult, warnings: &[Problem]) -> Result<ExitCode> {
        if self.json {
            print_line(&Line::Result(ResultLine { version: VERSION, result, warnings }))?;
        } else if result.is_raw() {
            print(result)?;
        } else {
            print(printable(&result.to_string()))?;
        }
        Ok(result.exit_code())
    }

    /// Prints an error.
    pub(super) fn error(self, e: &Error) {
        if matches!(e, Error::Unread) {
            return;
        }
        if self.json {
            self.failure(e.into());
        }
        match e {
            Error::Config(Diagnostics(all)) => all.iter().for_each(|d| line(&format!("{}\n", d.render(colour())))),
            e => {
                let prefix = if colour() { "\u{1b}[1;31merror\u{1b}[0m" } else { "error" };
                let chain = ErrorChain::new(e);
                let text = if self.verbose { chain.lines() } else { chain.to_string() };
                // A part of the text may be that of a node or a hub.
                line(&format!("{prefix}: {}", printable(&text)));
            }
        }
    }

    /// Prints an error as JSON. Ignores a closed standard output, because the exit code also reports the error.
    pub(super) fn failure(self, error: Failure) {
        let _ = print_line(&Line::Error(ErrorLine { version: VERSION, command: self.command, error }));
    }

    /// With `--json`, prints the error of an interrupted command, unless the command has printed its last line.
    pub(super) fn interrupted(self) {
        // A thread that prints a line may wait without limit for a reader.
        let is_free = || !matches!(LAST_PRINTED.try_lock(), Err(TryLockError::WouldBlock));
        let mut attempts = 10;
        while self.json && attempts > 0 {
            if is_free() {
                return self.failure((&Error::Interrupted).into());
            }
            std::thread::sleep(Duration::from_millis(20));
            attempts -= 1;
        }
    }
}

/// Prints clap's error, help or version. Returns the exit code.
pub(super) fn usage_error(e: &clap::Error) -> ExitCode {
    let hint = hints::unknown_command(e).map(Error::Usage);
    let before_command = |arg: &OsString| arg != "--";
    let args: Vec<OsString> = std::env::args_os().take_while(before_command).collect();
    if e.use_stderr() && args.iter().any(|arg| arg == "--json") {
        // The words that clap recognised before the error.
        let matches = parse::command().ignore_errors(true).try_get_matches_from(args).ok();
        let mut words = Vec::new();
        let mut level = matches.as_ref().and_then(ArgMatches::subcommand);
        while let Some((name, below)) = level {
            words.push(name);
            level = below.subcommand();
        }
        let command = Some(words.join(" ")).filter(|words| !words.is_empty());
        let error = hint.as_ref().map_or_else(|| e.into(), std::convert::Into::into);
        let command = command.as_deref();
        let _ = print_line(&Line::Error(ErrorLine { version: VERSION, command, error }));
    }
    if let Some(hint) = hint {
        Output { json: false, verbose: false, command: None }.error(&hint);
        return hint.exit_code();
    }
    let _ = e.print();
    ExitCode::from(u8::try_from(e.exit_code()).unwrap_or(2))
}

/// Prints a line of JSON. Prints nothing after the last line.
fn print_line(document: &Line) -> Result<()> {
    let mut text = escaped(&serde_json::to_string(document).map_err(Error::Json)?);
    text.push('\n');
    let mut last_printed = LAST_PRINTED.lock().unwrap_or_else(PoisonError::into_inner);
    if *last_printed {
        return Ok(());
    }
    *last_printed = !matches!(document, Line::Event(_));
    print(text)
}

/// Returns a JSON text, in which `\u` escapes replace the characters that serde_json does not escape and that control a
/// terminal. The value is the same.
fn escaped(json: &str) -> String {
    let mut text = String::with_capacity(json.len());
    for c in json.chars() {
        // All of them have at most 16 bits.
        if is_unsafe(c) { text += &format!("\\u{:04x}", u32::from(c)) } else { text.push(c) }
    }
    text
}

/// Prints a result.
pub(super) fn print(result: impl Display) -> Result<()> {
    let mut out = io::stdout().lock();
    write!(out, "{result}").and_then(|()| out.flush()).map_err(|e| match e.kind() {
        io::ErrorKind::BrokenPipe => Error::Unread,
        _ => Error::io("write", "standard output")(e),
    })
}

/// Returns whether messages are coloured: on a terminal, unless `NO_COLOR` is set (<https://no-color.org>).
pub(super) fn colour() -> bool {
    std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_has_no_character_that_controls_a_terminal() {
        let text = "a\u{1b}]52;\u{9b}2J\u{202e}\u{7f}ü";
        let json = escaped(&serde_json::to_string(text).unwrap());
        assert!(!json.contains(is_unsafe), "{json:?}");
        assert_eq!(serde_json::from_str::<String>(&json).unwrap(), text);
    }
}
