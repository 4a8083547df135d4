//! `bakehouse secret`.

use std::io::{BufRead as _, IsTerminal as _, Read as _};
use std::path::Path;

use fleet::{AlertSecrets, HubKey, HubSecrets, Mail, MailSecrets, Topology, Web};

use super::context::Context;
use super::results::{CommandResult, SecretResult};
use crate::error::{Error, Result};
use crate::keys::authority::FleetKey;
use crate::keys::passphrase::ask_terminal;
use crate::project::{Project, alert_secrets, mail, web};
use crate::util::fs::write_atomic;

/// Bytes of standard input that the command reads at most.
const LONGEST: u64 = 16_384;

/// Encrypts a secret for the monitors, the hubs or the app nodes, or removes it.
pub(super) fn secret(context: &Context, name: &str, remove: bool) -> Result<CommandResult> {
    let Context { project, progress, .. } = context;
    let file = match name {
        Web::EAB | Web::KEY | Topology::HOOK_SECRET => HubSecrets::FILE,
        Mail::SECRET => MailSecrets::FILE,
        _ => AlertSecrets::FILE,
    };
    let path = project.dir.join(file);
    let content = match file {
        HubSecrets::FILE => for_hubs(project, &path, name, remove)?,
        MailSecrets::FILE => for_apps(project, &path, remove)?,
        _ => for_monitors(project, &path, name, remove)?,
    };
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
        let others = project.topology.hub_secret_names().into_iter().chain(mail_secret(project));
        let known = needed.into_iter().chain(others).collect::<Vec<_>>().join(", ");
        let known = if known.is_empty() { "none" } else { &known };
        return Err(Error::Usage(format!(
            "no receiver in [alerts] needs a secret `{name}`; the fleet needs: {known}\n  help: add the receiver to \
             fleet.toml first: `user` in [alerts.email], [[alerts.telegram]], [[alerts.slack]], [[alerts.matrix]] or \
             [[alerts.ntfy]]"
        )));
    }
    let key = FleetKey::load(project)?.secrets.alert_key().ok_or_else(no_password)?;
    let text = read(name, false)?;
    secrets.seal(&key, &project.topology.name, name, &text).map_err(|e| Error::Failed(e.to_string()))?;
    Ok(secrets.file())
}

/// Returns the new content of `web.secrets`.
fn for_hubs(project: &Project, path: &Path, name: &str, remove: bool) -> Result<String> {
    let mut secrets = web::secrets(&project.dir)?;
    if remove {
        return if secrets.remove(name) { Ok(secrets.file()) } else { none(path, name) };
    }
    if !project.topology.hub_secret_names().contains(name) {
        let (setting, table) = match name {
            Web::KEY => ("certificate = …", "[web]"),
            Web::EAB => ("eab_key_id = …", "[web.authority]"),
            _ => ("hook = …", "[vip]"),
        };
        return Err(Error::Usage(format!(
            "the hubs need no secret `{name}`\n  help: add `{setting}` to {table} of fleet.toml first"
        )));
    }
    let authority = FleetKey::load(project)?;
    let key = HubKey::derive(&project.topology.name, &authority.secrets.etcd_root).ok_or_else(no_password)?;
    let text = read(name, name == Web::KEY)?;
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
    let text = read(Mail::SECRET, false)?;
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

/// Reads one line: from the terminal without showing it, or from standard input. Reads all of standard input if `is_long`.
fn read(name: &str, is_long: bool) -> Result<String> {
    let failed = Error::cannot("read the secret from standard input");
    if std::io::stdin().is_terminal() {
        if is_long {
            return Err(Error::Usage(format!(
                "no key on standard input\n  help: type `bakehouse secret {name} <KEY.pem`"
            )));
        }
        return ask_terminal(&format!("Secret `{name}`:"));
    }
    let mut text = String::new();
    let mut input = std::io::stdin().lock().take(LONGEST);
    if is_long { input.read_to_string(&mut text) } else { input.read_line(&mut text) }.map_err(failed)?;
    Ok(text.trim_end_matches(['\n', '\r']).to_owned())
}
