//! `bakehouse secret`.

use std::io::{BufRead as _, IsTerminal as _, Read as _};
use std::path::Path;

use fleet::{AlertSecrets, HubKey, HubSecrets, Web};

use super::context::Context;
use super::results::{CommandResult, SecretResult};
use crate::error::{Error, Result};
use crate::keys::authority::FleetKey;
use crate::keys::passphrase::ask_terminal;
use crate::project::{Project, alert_secrets, web};
use crate::util::fs::write_atomic;

/// Bytes of standard input that the command reads at most.
const LONGEST: u64 = 16_384;

/// Encrypts a secret for the monitors or the hubs, or removes it.
pub(super) fn secret(context: &Context, name: &str, remove: bool) -> Result<CommandResult> {
    let Context { project, progress, .. } = context;
    let is_hubs = [Web::EAB, Web::KEY].contains(&name);
    let file = if is_hubs { HubSecrets::FILE } else { AlertSecrets::FILE };
    let path = project.dir.join(file);
    let content =
        if is_hubs { for_hubs(project, &path, name, remove)? } else { for_monitors(project, &path, name, remove)? };
    write_atomic(&path, content.as_bytes())?;
    let what = if remove { "removed from" } else { "encrypted in" };
    progress.say("secret", &format!("{name}: {what} {}; raise `version`, and publish", path.display()));
    Ok(CommandResult::Secret(SecretResult { name: name.to_owned(), path, stored: !remove }))
}

/// Returns the new content of `alerts.secrets`.
fn for_monitors(project: &Project, path: &Path, name: &str, remove: bool) -> Result<String> {
    let mut secrets = alert_secrets::read(&project.dir)?;
    let needed = project.topology.alerts.secrets();
    if remove {
        return if secrets.remove(name) { Ok(secrets.file()) } else { none(path, name) };
    }
    if !needed.contains(name) {
        let known = needed.into_iter().chain(project.topology.web.secrets()).collect::<Vec<_>>().join(", ");
        let known = if known.is_empty() { "none" } else { &known };
        return Err(Error::Usage(format!(
            "no receiver in [alerts] needs a secret `{name}`; the fleet needs: {known}\n  help: add the receiver to \
             fleet.toml first: `user` in [alerts.email], [[alerts.telegram]], [[alerts.slack]], [[alerts.matrix]] or \
             [[alerts.ntfy]]"
        )));
    }
    let key = FleetKey::load(project)?.secrets.alert_key().ok_or_else(no_password)?;
    let text = read(name, "[alerts]", false)?;
    secrets.seal(&key, &project.topology.name, name, &text).map_err(|e| Error::Failed(e.to_string()))?;
    Ok(secrets.file())
}

/// Returns the new content of `web.secrets`.
fn for_hubs(project: &Project, path: &Path, name: &str, remove: bool) -> Result<String> {
    let mut secrets = web::secrets(&project.dir)?;
    if remove {
        return if secrets.remove(name) { Ok(secrets.file()) } else { none(path, name) };
    }
    if !project.topology.web.secrets().contains(name) {
        let setting = if name == Web::KEY { "certificate = …" } else { "eab_key_id = …" };
        let table = if name == Web::KEY { "[web]" } else { "[web.authority]" };
        return Err(Error::Usage(format!(
            "[web] needs no secret `{name}`\n  help: add `{setting}` to {table} of fleet.toml first"
        )));
    }
    let authority = FleetKey::load(project)?;
    let key = HubKey::derive(&project.topology.name, &authority.secrets.etcd_root).ok_or_else(no_password)?;
    let text = read(name, "[web]", name == Web::KEY)?;
    if name == Web::KEY {
        let (chain, host) = (&project.topology.web_certificate, &project.topology.web.name);
        let (chain, host) = (chain.as_deref().unwrap_or_default(), host.as_deref().unwrap_or_default());
        fleet_https::web_pair(chain, &text, host).map_err(Error::cannot("take the key of the certificate"))?;
        let public = fleet_https::web_key_digest(&text).map_err(Error::cannot("read the key"))?;
        secrets.set_public(name, &public);
    }
    secrets.seal(&key, name, text.as_bytes()).map_err(|e| Error::Failed(e.to_string()))?;
    Ok(secrets.file())
}

fn none<T>(path: &Path, name: &str) -> Result<T> {
    Err(Error::Usage(format!("{} has no secret `{name}`", path.display())))
}

fn no_password() -> Error {
    Error::Failed("fleet.key has no password of etcd; restore a copy of it".into())
}

/// Reads one line: from the terminal without showing it, or from standard input. Reads all of standard input if `is_long`.
fn read(name: &str, table: &str, is_long: bool) -> Result<String> {
    let failed = Error::cannot("read the secret from standard input");
    if std::io::stdin().is_terminal() {
        if is_long {
            return Err(Error::Usage(format!(
                "no key on standard input\n  help: type `bakehouse secret {name} <KEY.pem`"
            )));
        }
        return ask_terminal(&format!("Secret `{name}` of {table}:"));
    }
    let mut text = String::new();
    let mut input = std::io::stdin().lock().take(LONGEST);
    if is_long { input.read_to_string(&mut text) } else { input.read_line(&mut text) }.map_err(failed)?;
    Ok(text.trim_end_matches(['\n', '\r']).to_owned())
}
