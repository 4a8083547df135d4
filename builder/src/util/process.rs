//! Runs programs of the host and of the build's tools.

use std::process::Command;

use crate::error::{Error, Result, fail};

/// Runs a command, and waits until it ends.
///
/// # Errors
/// If the command does not start, or its exit code is not 0. The error has its output.
pub fn run(command: &mut Command, what: &str) -> Result<()> {
    let output = command.output().map_err(|e| Error::Failed(format!("cannot start {what}: {e}")))?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&[&output.stdout[..], &output.stderr[..]].concat()).trim().to_owned();
    fail(format!("{what} failed ({}): {text}", output.status))
}
