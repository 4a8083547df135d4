//! Programs that the installer runs.

use std::process::Command;

use crate::error::{Error, Result};

/// Runs a command that must succeed.
pub(super) fn run(command: &mut Command, what: &str) -> Result<()> {
    output(command, what).map(drop)
}

/// Runs a command that must succeed. Returns its standard output.
pub(super) fn output(command: &mut Command, what: &str) -> Result<String> {
    let output = command.output().map_err(|e| Error::Failed(format!("{what} does not start: {e}")))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned());
    }
    Err(Error::Failed(format!("{what} failed: {}", String::from_utf8_lossy(&output.stderr).trim())))
}
