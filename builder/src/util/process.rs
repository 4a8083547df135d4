//! Runs programs of the host and of the build's tools.

use std::process::Command;

use crate::error::{Error, Result};

/// Runs a command, and waits until it ends.
///
/// # Errors
/// If the command does not start, or its exit code is not 0. The error has its output.
pub(crate) fn run(command: &mut Command, what: &str) -> Result<()> {
    let output = command.output().map_err(Error::cannot(format!("start {what}")))?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&[&output.stdout[..], &output.stderr[..]].concat()).trim().to_owned();
    Err(Error::Tool { program: what.to_owned(), status: output.status, output: text })
}
