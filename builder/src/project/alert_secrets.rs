//! The file `alerts.secrets` beside `fleet.toml`: encrypted passwords of the receivers of alerts.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use fleet::{AlertSecrets, Diagnostic, Fleet, Severity};

use crate::error::{Error, Result, fail};

/// Reads the file; no secrets if it does not exist.
///
/// # Errors
/// If the file cannot be read or parsed.
pub(crate) fn read(dir: &Path) -> Result<AlertSecrets> {
    let path = dir.join(AlertSecrets::FILE);
    match fs::read_to_string(&path) {
        Ok(text) => match AlertSecrets::parse(&text) {
            Ok(secrets) => Ok(secrets),
            Err(e) => {
                fail(format!("cannot parse {}: {e}\n  help: remove it, and repeat `bakehouse secret`", path.display()))
            }
        },
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(AlertSecrets::default()),
        Err(e) => Err(Error::io("read", &path)(e)),
    }
}

/// Returns a warning for each secret that a receiver needs and the file does not have.
pub(crate) fn missing(fleet: &Fleet, stored: &AlertSecrets) -> Vec<Diagnostic> {
    let names = stored.names();
    let needed = fleet.alerts.get_ref().secrets();
    let span = fleet.source.value(&["alerts"]);
    let warning = |name: &&str| {
        let message = format!("[alerts] the secret `{name}` is missing: this receiver gets no alerts");
        let help = Some(format!("type `bakehouse secret {name}`"));
        Diagnostic::at(Severity::Warning, &fleet.source, span.clone(), message, help)
    };
    needed.difference(&names).map(warning).collect()
}
