//! `bakehouse operator`: certificates of the people who look at a running fleet and steer it.

use std::path::{Path, PathBuf};

use fleet::{Operator, OperatorRole, PrivateKey, PublicKey, encoding};

use super::access::confirm;
use super::context::Context;
use super::node_results::{NewOperatorResult, OperatorRequestResult, RevokedOperatorResult};
use super::results::CommandResult;
use super::verbs::{AddOperatorArgs, LONGEST_DAYS, OperatorCommand, RevokeOperatorArgs};
use crate::deploy::hub_client::Hubs;
use crate::error::{Error, Result, fail};
use crate::keys::operator::{OperatorFile, now};
use crate::keys::operator_log::{self, CertificateState, OperatorRow};
use crate::keys::operator_places::{config_dir, configured};
use crate::keys::operator_request::OperatorRequest;
use crate::progress::Progress;
use crate::util::fs::shown;
use crate::util::time::rfc3339;

/// Runs a command that needs the fleet's folder.
pub(super) fn run(context: &Context, command: &OperatorCommand) -> Result<CommandResult> {
    match command {
        OperatorCommand::Add(args) => add(context, args),
        OperatorCommand::List => Ok(CommandResult::OperatorList(operator_log::rows(&context.project.dir)?)),
        OperatorCommand::Revoke(args) => revoke(context, args),
        OperatorCommand::Request { name, output } => request(name, output, context.progress),
        OperatorCommand::Wireguard(_) => unreachable!("`run_for_nodes` runs it"),
    }
}

/// Makes a key and a request for it. Needs no fleet.
pub(super) fn request(name: &str, dir: &Path, progress: &Progress) -> Result<CommandResult> {
    operator(name, OperatorRole::Viewer)?;
    let (key, request) = OperatorRequest::create(name, dir)?;
    progress.say("operator", &format!("{}: secret; it stays on this machine", shown(&key)));
    progress.say(
        "next",
        &format!(
            "send {} to the owner of fleet.key, who runs `bakehouse operator add {name} --role ROLE --request \
             {name}.request`",
            shown(&request)
        ),
    );
    Ok(CommandResult::OperatorRequest(OperatorRequestResult { name: name.to_owned(), key, request }))
}

fn operator(name: &str, role: OperatorRole) -> Result<Operator> {
    Operator::new(name, role).ok_or_else(|| {
        Error::Usage(format!(
            "`{name}` cannot be an operator's name\n  help: use 1 to 32 lower-case letters, digits and `-`, a letter first"
        ))
    })
}

fn add(context: &Context, args: &AddOperatorArgs) -> Result<CommandResult> {
    let Context { project, progress, .. } = context;
    let operator = operator(&args.name, args.role)?;
    let path = target(context, args)?;
    let (public, key) = if let Some(path) = &args.request {
        (OperatorRequest::verified(path, &args.name)?, None)
    } else {
        let key = PrivateKey::generate()?;
        (key.public()?, Some(key))
    };
    let point = encoding::encode(public.as_bytes());
    let is_revoked = |row: &operator_log::OperatorRow| row.key == point && row.state == CertificateState::Revoked;
    if operator_log::rows(&project.dir)?.iter().any(is_revoked) {
        return fail(format!(
            "the key in the request is revoked\n  help: delete {0}.key on the operator's machine, and run `bakehouse \
             operator request {0}` again",
            args.name
        ));
    }
    let hubs = context.hubs(&args.endpoint)?;
    check_versions(context, &hubs, args.force)?;
    let mut file = OperatorFile::issue(&hubs.authority, &project.topology, operator, &public, args.days)?;
    let expires = file.expires;
    let secret = key.is_some();
    if let Some(key) = key {
        file = file.with_key(key);
    }
    // In the log before the file exists, so that a certificate can always be revoked.
    operator_log::note(&project.dir, &file.operator, &public, expires)?;
    file.write(&path, args.passphrase)?;
    let expires_at = rfc3339(expires);
    let kind = if secret { "secret" } else { "no secret: the key is on the operator's machine" };
    progress.say("operator", &format!("{}: {}, until {expires_at}; {kind}", shown(&path), args.role));
    let next = if args.own {
        "`bakehouse status` looks at the fleet as this operator".to_owned()
    } else {
        let (fleet, suffix) = (&project.topology.name, OperatorFile::SUFFIX);
        format!("the operator puts it into ~/.config/bakehouse as {fleet}.{suffix}, and runs `bakehouse status`")
    };
    progress.say("next", &next);
    let result =
        NewOperatorResult { name: args.name.clone(), role: args.role, key: point, expires, expires_at, path, secret };
    Ok(CommandResult::OperatorAdd(result))
}

/// Returns the path of the new file. Refuses to replace a file that may be the only copy of a key.
fn target(context: &Context, args: &AddOperatorArgs) -> Result<PathBuf> {
    let (path, own) = if args.own {
        let Some(config) = config_dir() else {
            return fail("neither XDG_CONFIG_HOME nor HOME is set\n  help: name a folder with `--output DIR`");
        };
        (configured(&config, &context.project.topology.name), Some(args.name.as_str()))
    } else {
        (args.output.join(format!("{}.{}", args.name, OperatorFile::SUFFIX)), None)
    };
    if OperatorFile::may_replace(&path, own) {
        return Ok(path);
    }
    fail(format!(
        "{} exists, and may have the only copy of a key\n  help: move it away, or name another folder with `--output DIR`",
        shown(&path)
    ))
}

/// Refuses while a hub's version does not know operators: such a hub refuses the certificate.
fn check_versions(context: &Context, hubs: &Hubs, force: bool) -> Result<()> {
    if !hubs.topology.hubs.iter().any(|hub| hub.endpoint_in(&hubs.endpoints).is_some()) {
        let text = "no hub has an endpoint in fleet.toml, so the file has no hub's address";
        context.warn_that("operator", text.to_owned());
        return Ok(());
    }
    let step = context.progress.step("operator", "asking the hubs for their versions");
    let (old, silent) = hubs.without_operators()?;
    drop(step);
    if !old.is_empty() {
        let text = format!("these hubs run a version that does not know operators: {}", old.join(", "));
        if !force {
            return fail(format!(
                "{text}\n  help: wait until the rollout has changed them (`bakehouse rollout`); `--force` makes the \
                 certificate now"
            ));
        }
        context.warn_that("operator", text);
    }
    if !silent.is_empty() {
        context.warn_that(
            "operator",
            format!("these hubs do not answer, so their versions are unknown: {}", silent.join(", ")),
        );
    }
    Ok(())
}

/// A key to revoke.
struct Revoked {
    name: String,
    key: String,
    expires: u64,
    /// The certificate in the log.
    row: Option<OperatorRow>,
}

fn revoke(context: &Context, args: &RevokeOperatorArgs) -> Result<CommandResult> {
    let Context { project, progress, .. } = context;
    let name = args.name.clone().unwrap_or_default();
    let keys = match (&args.file, &args.key) {
        (Some(file), _) => vec![of_file(file)?],
        (None, Some(key)) => vec![of_key(&name, key)?],
        (None, None) => of_log(operator_log::rows(&project.dir)?, &name)?,
    };
    let whose = keys.first().map_or(&name, |first| &first.name);
    confirm(&format!("revoke the certificates of the operator {whose}"), args.yes)?;
    let hubs = context.hubs(&args.endpoint)?;
    let mut accepted = String::new();
    for Revoked { name, key, expires, row } in &keys {
        accepted = hubs.revoke_operator(name, key, *expires)?;
        if let Some(row) = row.as_ref().filter(|row| row.state != CertificateState::Revoked) {
            operator_log::note_revoked(&project.dir, row, &accepted)?;
        }
        let role = row.as_ref().map(|row| format!("the {} certificate", row.role));
        let what = role.unwrap_or_else(|| format!("the key {key}"));
        progress.say("operator", &format!("{accepted} revoked {what} of {name}"));
    }
    let name = keys.first().map_or(name, |first| first.name.clone());
    let keys = keys.into_iter().map(|revoked| revoked.key).collect();
    Ok(CommandResult::OperatorRevoke(RevokedOperatorResult { name, keys, hub: accepted }))
}

/// Returns the keys of an operator in the log, each with the latest expiry of its certificates. A key that was revoked
/// before is one of them, because a fleet whose etcd was restored has lost the order.
fn of_log(rows: Vec<OperatorRow>, name: &str) -> Result<Vec<Revoked>> {
    let mut keys: Vec<Revoked> = Vec::new();
    for row in rows.into_iter().filter(|row| row.name == name && row.expires > now()) {
        keys.retain(|other| other.key != row.key);
        // The rows are sorted by expiry.
        keys.push(Revoked { name: name.to_owned(), key: row.key.clone(), expires: row.expires, row: Some(row) });
    }
    if keys.is_empty() {
        return fail(format!(
            "operators.jsonl has no valid certificate of `{name}`\n  help: `bakehouse operator list` lists them; \
             `--file NAME.operator` or `--key KEY` revokes a certificate that was made elsewhere"
        ));
    }
    Ok(keys)
}

/// Returns the key in an operator's file or in a request.
fn of_file(path: &Path) -> Result<Revoked> {
    if let Ok(request) = OperatorRequest::read(path) {
        return of_key(&request.name, request.key());
    }
    let file = OperatorFile::read_without_key(path)?;
    let (key, name) = (file.public().map_err(Error::at(shown(path)))?, file.operator.name);
    Ok(Revoked { name, key, expires: file.expires, row: None })
}

fn of_key(name: &str, key: &str) -> Result<Revoked> {
    if encoding::decode(key).and_then(|point| PublicKey::from_point(&point)).is_none() {
        return Err(Error::Usage(format!(
            "`{key}` is not the base64 of an operator's public key\n  help: `bakehouse operator list --json` has them"
        )));
    }
    // The certificate's own expiry is unknown.
    let expires = now() + u64::from(LONGEST_DAYS) * 86_400;
    Ok(Revoked { name: name.to_owned(), key: key.to_owned(), expires, row: None })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(name: &str, key: &str, expires: u64, state: CertificateState) -> OperatorRow {
        let (name, key, expires_at) = (name.to_owned(), key.to_owned(), String::new());
        OperatorRow { name, role: OperatorRole::Viewer, key, expires, expires_at, state }
    }

    #[test]
    fn one_order_revokes_a_key_until_its_last_certificate_expires() {
        let later = now() + 1000;
        let (good, revoked) = (CertificateState::Good, CertificateState::Revoked);
        let rows = vec![
            row("anna", "old", 5, CertificateState::Expired),
            row("anna", "one", later, good),
            row("anna", "two", later + 1, revoked),
            row("anna", "one", later + 2, good),
            row("ben", "three", later, good),
        ];
        let keys = of_log(rows.clone(), "anna").unwrap();
        let found: Vec<_> = keys.iter().map(|revoked| (revoked.key.as_str(), revoked.expires)).collect();
        assert_eq!(found, [("two", later + 1), ("one", later + 2)]);
        let none = of_log(rows, "carl").map(drop).unwrap_err().chain();
        assert!(none.contains("no valid certificate of `carl`") && none.contains("--file"), "{none}");
    }

    #[test]
    fn a_certificate_that_was_made_elsewhere_has_its_key_in_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let (key, request) = OperatorRequest::create("anna", dir.path()).unwrap();
        let found = of_file(&request).unwrap();
        let own = PrivateKey::from_pem(std::fs::read_to_string(key).unwrap()).unwrap();
        let point = encoding::encode(own.public().unwrap().as_bytes());
        assert_eq!((found.name.as_str(), found.key.as_str()), ("anna", point.as_str()));
        assert!(of_key("anna", "AAAA").map(drop).unwrap_err().chain().contains("not the base64"));
        of_key("anna", &point).unwrap();
    }
}
