//! Runs small programs in the host's Python.

use std::io::Write as _;
use std::process::{Command, Stdio};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, Result, fail};

/// Runs a program that reads JSON from its standard input and writes JSON. `what`: what it does, for errors.
///
/// # Errors
/// If there is no Python, or the program fails. The error has the last line of its output.
pub(super) fn run<T: DeserializeOwned>(program: &str, input: &impl Serialize, what: &str) -> Result<T> {
    let failed = || Error::cannot("run python3\n  help: install python3-pip (`make deps`)");
    let input = serde_json::to_vec(input).map_err(Error::cannot(what))?;
    let mut command = Command::new("python3");
    command.args(["-c", program]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(failed())?;
    // The programs read everything before they write. One that failed has closed the pipe.
    if let Some(mut pipe) = child.stdin.take() {
        let _ = pipe.write_all(&input);
    }
    let output = child.wait_with_output().map_err(failed())?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        return fail(format!("cannot {what}: {}", text.lines().last().unwrap_or_default()));
    }
    serde_json::from_slice(&output.stdout).map_err(Error::cannot(what))
}
