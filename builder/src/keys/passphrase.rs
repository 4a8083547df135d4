//! The passphrase of the fleet's key: asked for on the terminal, once in a run, or read from a file.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use crate::error::{Error, Result, fail};
use crate::format::age::{self, DecryptError};

/// For scripts: names a file with the passphrase in its first line.
const VARIABLE: &str = "BAKEHOUSE_PASSPHRASE_FILE";

/// What was opened in this run, by what it was sealed as.
static OPENED: Mutex<BTreeMap<Vec<u8>, Vec<u8>>> = Mutex::new(BTreeMap::new());

/// A file's bytes, decrypted if they are not plain.
///
/// # Errors
/// There is nobody to ask, or the passphrase is another.
pub fn open(path: &Path, bytes: Vec<u8>) -> Result<Vec<u8>> {
    if !age::is_sealed(&bytes) {
        return Ok(bytes);
    }
    let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(plain) = opened.get(&bytes) {
        return Ok(plain.clone());
    }
    let passphrase = ask(&format!("Passphrase of {}:", path.display()))?;
    let plain = age::open(&bytes, &passphrase).map_err(|closed| {
        Error::Failed(match closed {
            DecryptError::Passphrase => format!("{}: that is not its passphrase", path.display()),
            DecryptError::Damaged => format!("{} is damaged; bring back a copy of it", path.display()),
        })
    })?;
    opened.insert(bytes, plain.clone());
    Ok(plain)
}

/// Encrypts a file's bytes with a passphrase that is asked for.
///
/// # Errors
/// There is nobody to ask, or two answers differ.
pub fn seal(path: &Path, plain: &[u8]) -> Result<Vec<u8>> {
    let passphrase = ask(&format!("New passphrase of {}:", path.display()))?;
    if passphrase.is_empty() {
        return fail("an empty passphrase keeps nothing secret");
    }
    if ask("Once more:")? != passphrase {
        return fail("the two are not the same; nothing was changed");
    }
    age::seal(plain, &passphrase)
}

fn ask(question: &str) -> Result<String> {
    if let Some(path) = std::env::var_os(VARIABLE) {
        let text = fs::read_to_string(&path).map_err(Error::io("read", Path::new(&path)))?;
        return Ok(text.lines().next().unwrap_or_default().to_owned());
    }
    // Without a terminal it would wait for one of the machine's own agents to answer.
    if File::open("/dev/tty").is_err() {
        return fail(format!(
            "a passphrase is needed, and there is no terminal to ask on: set {VARIABLE} to a file with it"
        ));
    }
    let mut command = Command::new("systemd-ask-password");
    let asked = command.arg("--timeout=0").arg(question).stdin(Stdio::inherit()).stderr(Stdio::inherit()).output();
    let asked = asked.map_err(Error::io("start", "systemd-ask-password (apt install systemd)"))?;
    if !asked.status.success() {
        return Err(Error::Interrupted);
    }
    Ok(String::from_utf8_lossy(&asked.stdout).trim_end_matches('\n').to_owned())
}
