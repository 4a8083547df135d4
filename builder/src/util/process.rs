//! Programs of the host and of the tools tree.

use std::process::Command;

use crate::error::{Error, Result, fail};

/// Runs a command to its end; its words are the error.
///
/// # Errors
/// It does not start, or exits with anything but 0.
pub fn run(command: &mut Command, what: &str) -> Result<()> {
    let output = command.output().map_err(|e| Error::Failed(format!("{what} does not start: {e}")))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&[&output.stdout[..], &output.stderr[..]].concat()).trim().to_owned();
    fail(format!("{what} failed ({}): {said}", output.status))
}
