//! Answers on standard output, errors on standard error.

use std::fmt::Display;
use std::io::{self, IsTerminal as _, Write as _};

use fleet::Diagnostics;

use crate::error::{Error, Result};
use crate::progress::line;
use crate::util::json::pretty_json;

pub(super) fn print_json(wanted: bool, value: &impl serde::Serialize) -> Result<()> {
    if wanted {
        print(String::from_utf8_lossy(&pretty_json(value)?))?;
    }
    Ok(())
}

/// Gives the answer: on standard output.
pub(super) fn print(answer: impl Display) -> Result<()> {
    let mut out = io::stdout().lock();
    write!(out, "{answer}").and_then(|()| out.flush()).map_err(|e| match e.kind() {
        io::ErrorKind::BrokenPipe => Error::Unread,
        _ => Error::io("write", "standard output")(e),
    })
}

pub(super) fn complain(e: &Error, json: bool) {
    match e {
        Error::Config(Diagnostics(all)) if json => {
            // It has failed already.
            let _ = print_json(true, &all);
        }
        Error::Unread => {}
        Error::Config(Diagnostics(all)) => all.iter().for_each(|d| line(&format!("{}\n", d.render(colour())))),
        e => {
            let word = if colour() { "\u{1b}[1;31merror\u{1b}[0m" } else { "error" };
            line(&format!("{word}: {e}"));
        }
    }
}

pub(super) fn colour() -> bool {
    std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none()
}
