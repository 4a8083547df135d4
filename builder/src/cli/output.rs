//! Prints results to standard output and errors to standard error.

use std::fmt::Display;
use std::io::{self, IsTerminal as _, Write as _};

use fleet::{Diagnostics, ErrorChain};

use crate::error::{Error, Result};
use crate::progress::line;
use crate::util::json::pretty_json;

/// Prints a result as JSON, if `json` is set.
pub(super) fn print_json(json: bool, value: &impl serde::Serialize) -> Result<()> {
    if json {
        print(String::from_utf8_lossy(&pretty_json(value)?))?;
    }
    Ok(())
}

/// Prints a result.
pub(super) fn print(result: impl Display) -> Result<()> {
    let mut out = io::stdout().lock();
    write!(out, "{result}").and_then(|()| out.flush()).map_err(|e| match e.kind() {
        io::ErrorKind::BrokenPipe => Error::Unread,
        _ => Error::io("write", "standard output")(e),
    })
}

/// Prints an error with its causes: on one line, or with `verbose` each on a line of its own.
pub(super) fn print_error(e: &Error, json: bool, verbose: bool) {
    match e {
        Error::Config(Diagnostics(all)) if json => {
            // The exit code reports the first error already.
            let _ = print_json(true, &all);
        }
        Error::Unread => {}
        Error::Config(Diagnostics(all)) => all.iter().for_each(|d| line(&format!("{}\n", d.render(colour())))),
        e => {
            let prefix = if colour() { "\u{1b}[1;31merror\u{1b}[0m" } else { "error" };
            let chain = ErrorChain::of(e);
            let text = if verbose { chain.lines() } else { chain.to_string() };
            line(&format!("{prefix}: {text}"));
        }
    }
}

/// Returns whether messages are coloured: on a terminal, unless `NO_COLOR` is set (<https://no-color.org>).
pub(super) fn colour() -> bool {
    std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none()
}
