//! `bakehouse secret`.

use std::io::{BufRead as _, IsTerminal as _, Read as _};

use fleet::AlertSecrets;

use super::context::Context;
use super::results::{CommandResult, SecretResult};
use crate::error::{Error, Result};
use crate::keys::authority::FleetKey;
use crate::keys::passphrase::ask_terminal;
use crate::project::alert_secrets;
use crate::util::fs::write_atomic;

/// Bytes of standard input that the command reads at most.
const LONGEST: u64 = 8192;

/// Encrypts a secret for the monitors or the hubs, or removes it.
pub(super) fn secret(context: &Context, name: &str, remove: bool) -> Result<CommandResult> {
    let Context { project, progress, .. } = context;
    let mut secrets = alert_secrets::read(&project.dir)?;
    let path = project.dir.join(AlertSecrets::FILE);
    let needed = project.topology.secret_names();
    if remove {
        if !secrets.remove(name) {
            return Err(Error::Usage(format!("{} has no secret `{name}`", path.display())));
        }
    } else {
        if !needed.contains(name) {
            let known = needed.into_iter().collect::<Vec<_>>().join(", ");
            let known = if known.is_empty() { "none" } else { &known };
            return Err(Error::Usage(format!(
                "nothing in fleet.toml needs a secret `{name}`; needed are: {known}\n  help: add the receiver to \
                 fleet.toml first: `user` in [alerts.email], [[alerts.telegram]], [[alerts.slack]], [[alerts.matrix]] or \
                 [[alerts.ntfy]]; `hook` in [vip] needs `vip-hook`"
            )));
        }
        let authority = FleetKey::load(project)?;
        let key = authority.secrets.alert_key();
        let key = key.ok_or_else(|| Error::Failed("fleet.key has no password of etcd; restore a copy of it".into()))?;
        let sealed = secrets.seal(&key, &project.topology.name, name, &read(name)?);
        sealed.map_err(|e| Error::Failed(e.to_string()))?;
    }
    write_atomic(&path, secrets.file().as_bytes())?;
    let what = if remove { "removed from" } else { "encrypted in" };
    progress.say("secret", &format!("{name}: {what} {}; raise `version`, and publish", path.display()));
    Ok(CommandResult::Secret(SecretResult { name: name.to_owned(), path, stored: !remove }))
}

/// Reads one line: from the terminal without showing it, or from standard input.
fn read(name: &str) -> Result<String> {
    if std::io::stdin().is_terminal() {
        return ask_terminal(&format!("Secret `{name}`:"));
    }
    let mut line = String::new();
    let mut input = std::io::stdin().lock().take(LONGEST);
    input.read_line(&mut line).map_err(Error::cannot("read the secret from standard input"))?;
    Ok(line.trim_end_matches(['\n', '\r']).to_owned())
}
