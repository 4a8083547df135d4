//! The passphrase of the fleet key. The builder reads it from a file, or asks for it on the terminal once in a run.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use crate::error::{Error, Result, fail};
use crate::format::age::{self, DecryptError};

/// Environment variable with the path of a file, whose first line is the passphrase. For scripts.
const VARIABLE: &str = "BAKEHOUSE_PASSPHRASE_FILE";

/// Files that this run has decrypted: encrypted content → decrypted content.
static OPENED: Mutex<BTreeMap<Vec<u8>, Vec<u8>>> = Mutex::new(BTreeMap::new());

/// Returns the content of a file; decrypts it if it is encrypted.
///
/// # Errors
/// If no passphrase can be read, the passphrase is wrong, or the file is damaged.
pub(super) fn open(path: &Path, bytes: Vec<u8>) -> Result<Vec<u8>> {
    if !age::is_sealed(&bytes) {
        return Ok(bytes);
    }
    let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(plain) = opened.get(&bytes) {
        return Ok(plain.clone());
    }
    let passphrase = ask(&format!("Passphrase of {}:", path.display()))?;
    let plain = age::open(&bytes, &passphrase).map_err(|e| {
        Error::Failed(match e {
            DecryptError::Passphrase => format!("wrong passphrase of {}", path.display()),
            DecryptError::Damaged => format!("{} is damaged; restore a copy of it", path.display()),
        })
    })?;
    opened.insert(bytes, plain.clone());
    Ok(plain)
}

/// Asks for a new passphrase, and encrypts the content of a file.
///
/// # Errors
/// If no passphrase can be read, it is empty, or the repeated passphrase differs.
pub(super) fn seal(path: &Path, plain: &[u8]) -> Result<Vec<u8>> {
    let passphrase = ask(&format!("New passphrase of {}:", path.display()))?;
    if passphrase.is_empty() {
        return fail("the passphrase is empty");
    }
    if ask("Repeat the passphrase:")? != passphrase {
        return fail("the two passphrases differ; the file was not changed");
    }
    age::seal(plain, &passphrase)
}

fn ask(question: &str) -> Result<String> {
    if let Some(path) = std::env::var_os(VARIABLE) {
        let text = fs::read_to_string(&path).map_err(Error::io("read", Path::new(&path)))?;
        return Ok(text.lines().next().unwrap_or_default().to_owned());
    }
    if File::open("/dev/tty").is_err() {
        return fail(format!(
            "a passphrase is needed, and there is no terminal; set {VARIABLE} to the path of a file with it"
        ));
    }
    ask_terminal(question)
}

/// Asks on the terminal, which does not show the reply.
///
/// # Errors
/// If there is no terminal, or the user interrupts.
pub(crate) fn ask_terminal(question: &str) -> Result<String> {
    // Without a terminal, systemd-ask-password would wait for a password agent of the machine.
    if File::open("/dev/tty").is_err() {
        return fail("there is no terminal to ask at");
    }
    let mut command = Command::new("systemd-ask-password");
    let reply = command.arg("--timeout=0").arg(question).stdin(Stdio::inherit()).stderr(Stdio::inherit()).output();
    let reply = reply.map_err(Error::io("start", "systemd-ask-password (apt install systemd)"))?;
    if !reply.status.success() {
        return Err(Error::Interrupted);
    }
    Ok(String::from_utf8_lossy(&reply.stdout).trim_end_matches('\n').to_owned())
}
