//! `bakehouse secret`.

use std::io::{BufRead as _, IsTerminal as _, Read as _};
use std::path::Path;

use fleet::{AlertSecrets, Mail, MailSecrets};

use super::context::Context;
use super::results::{CommandResult, SecretResult};
use crate::error::{Error, Result};
use crate::keys::authority::FleetKey;
use crate::keys::passphrase::ask_terminal;
use crate::project::{Project, alert_secrets, mail};
use crate::util::fs::write_atomic;

/// Bytes of standard input that the command reads at most.
const LONGEST: u64 = 8192;

/// Encrypts a secret for the monitors, the hubs or the app nodes, or removes it.
pub(super) fn secret(context: &Context, name: &str, remove: bool) -> Result<CommandResult> {
    let Context { project, progress, .. } = context;
    let is_mail = name == Mail::SECRET;
    let path = project.dir.join(if is_mail { MailSecrets::FILE } else { AlertSecrets::FILE });
    let content = if is_mail { for_apps(project, &path, remove)? } else { for_monitors(project, &path, name, remove)? };
    write_atomic(&path, content.as_bytes())?;
    let what = if remove { "removed from" } else { "encrypted in" };
    progress.say("secret", &format!("{name}: {what} {}; raise `version`, and publish", path.display()));
    Ok(CommandResult::Secret(SecretResult { name: name.to_owned(), path, stored: !remove }))
}

/// Returns the new content of `alerts.secrets`.
fn for_monitors(project: &Project, path: &Path, name: &str, remove: bool) -> Result<String> {
    let mut secrets = alert_secrets::read(&project.dir)?;
    let needed = project.topology.secret_names();
    if remove {
        return if secrets.remove(name) { Ok(secrets.file()) } else { none(path, name) };
    }
    if !needed.contains(name) {
        let known = needed.into_iter().chain(mail_secret(project)).collect::<Vec<_>>().join(", ");
        let known = if known.is_empty() { "none" } else { &known };
        return Err(Error::Usage(format!(
            "nothing in fleet.toml needs a secret `{name}`; needed are: {known}\n  help: add the receiver to \
             fleet.toml first: `user` in [alerts.email], [[alerts.telegram]], [[alerts.slack]], [[alerts.matrix]] or \
             [[alerts.ntfy]]; `hook` in [vip] needs `vip-hook`"
        )));
    }
    let key = FleetKey::load(project)?.secrets.alert_key().ok_or_else(no_password)?;
    let text = read(name)?;
    secrets.seal(&key, &project.topology.name, name, &text).map_err(|e| Error::Failed(e.to_string()))?;
    Ok(secrets.file())
}

/// Returns the new content of `odoo.secrets`.
fn for_apps(project: &Project, path: &Path, remove: bool) -> Result<String> {
    let mut secrets = mail::read(&project.dir)?;
    if remove {
        return if secrets.remove() { Ok(secrets.file()) } else { none(path, Mail::SECRET) };
    }
    if mail_secret(project).is_none() {
        return Err(Error::Usage(format!(
            "[odoo.mail] needs no secret `{}`\n  help: add `user = …` to [odoo.mail] of fleet.toml first",
            Mail::SECRET
        )));
    }
    let key = FleetKey::load(project)?.secrets.mail_key().ok_or_else(no_password)?;
    let text = read(Mail::SECRET)?;
    secrets.seal(&key, &project.topology.name, &text).map_err(|e| Error::Failed(e.to_string()))?;
    Ok(secrets.file())
}

/// Returns the name of the secret that `[odoo.mail]` needs.
fn mail_secret(project: &Project) -> Option<&'static str> {
    project.topology.odoo.mail.as_ref()?.user.as_ref().map(|_| Mail::SECRET)
}

fn none<T>(path: &Path, name: &str) -> Result<T> {
    Err(Error::Usage(format!("{} has no secret `{name}`", path.display())))
}

fn no_password() -> Error {
    Error::Failed("fleet.key has no password of etcd; restore a copy of it".into())
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
