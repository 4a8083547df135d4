//! Programs that the installer runs.

use std::process::Command;

use crate::error::{Error, Result};

/// Runs a command that must succeed.
pub(super) fn run(command: &mut Command, what: &str) -> Result<()> {
    output(command, what).map(drop)
}

/// Runs a command that must succeed. Returns its standard output.
pub(super) fn output(command: &mut Command, what: &str) -> Result<String> {
    let output = command.output().map_err(Error::io("run", what))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned());
    }
    let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(Error::Tool { program: what.to_owned(), status: output.status, output: text })
}
