//! `bakehouse init`.

use std::path::Path;

use super::reference;
use super::results::{CommandResult, FileState, InitFile, InitResult};
use crate::assemble::secure_boot::Signer;
use crate::error::{Error, Result};
use crate::keys::authority::FleetKey;
use crate::progress::Progress;
use crate::project::{self, Project};
use crate::util::fs::write_atomic;

/// Secrets, and files that a build can make again.
const IGNORED: &str = "/build/\n*.key\n*.ticket\n*.operator\n*.request\n/tickets.jsonl\n";

/// Creates a folder with `fleet.toml` and the fleet key, and names the fleet after the folder. Keeps existing files.
pub(super) fn init(
    dir: &Path,
    from: &str,
    secure_boot: bool,
    passphrase: bool,
    progress: &Progress,
) -> Result<CommandResult> {
    let text = project::built_in_fleet(from)?;
    // Resolves `.`, which has no name. A symbolic link keeps its own name.
    let named =
        if dir.file_name().is_some() { dir.to_owned() } else { dir.canonicalize().map_err(Error::io("find", dir))? };
    let unnamed = || Error::Usage(format!("cannot name the fleet after the folder `{}`", dir.display()));
    let name = named.file_name().and_then(|n| n.to_str()).ok_or_else(unnamed)?;
    let path = dir.join("fleet.toml");
    let mut files = Files(Vec::new());
    if path.exists() {
        files.add(&path, FileState::Kept);
    } else {
        // Before the folder is created, so that an invalid name leaves nothing behind.
        if !fleet::is_fleet_name(name) {
            return Err(Error::Usage(format!(
                "`{name}` cannot be a fleet's name\n  help: name the folder with 1 to 32 lower-case letters, digits and \
                 `-`, a letter first"
            )));
        }
        std::fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
        files.add(&path, FileState::Created);
        let text = text.replacen(&format!("name = \"{from}\""), &format!("name = \"{name}\""), 1);
        let section = if secure_boot {
            "\n# Firmware runs only signed programs (docs/secure-boot.md).\n[secure_boot]\n"
        } else {
            ""
        };
        write_atomic(&path, (reference::DIRECTIVE.to_owned() + &text + section).as_bytes())?;
        progress.say("init", &format!("{}: describes the fleet; edit it", path.display()));
    }
    let ignored = dir.join(".gitignore");
    let is_missing = !ignored.exists();
    if is_missing {
        write_atomic(&ignored, IGNORED.as_bytes())?;
    }
    files.add(&ignored, if is_missing { FileState::Created } else { FileState::Kept });
    let project = Project::load(dir)?;
    let had_schema = project.dir.join(reference::SCHEMA).exists();
    if let Some(schema) = reference::refresh_schema(&project)? {
        files.add(&schema, if had_schema { FileState::Changed } else { FileState::Created });
        progress.say("init", &format!("{}: with it, editors complete and check fleet.toml", schema.display()));
    } else if had_schema {
        files.add(&project.dir.join(reference::SCHEMA), FileState::Kept);
    }
    let key = project.dir.join(FleetKey::FILE);
    if FleetKey::init(&project.dir, &project.topology.name, passphrase)? {
        files.add(&key, FileState::Created);
        progress.say("init", &format!("{}: secret; keep it off the nodes, and keep a copy", key.display()));
    } else if passphrase {
        FleetKey::load(&project)?.seal(&project.dir)?;
        files.add(&key, FileState::Changed);
        progress.say("init", &format!("{}: encrypted with the new passphrase", key.display()));
    } else {
        files.add(&key, FileState::Kept);
    }
    if let Some(signer) = Signer::for_project(&project) {
        let is_new = signer.init(&project.topology.name)?;
        files.add(signer.key(), if is_new { FileState::Created } else { FileState::Kept });
        if is_new {
            let key = signer.key().display();
            progress.say("init", &format!("{key}: signs boot programs for Secure Boot; secret; keep a copy"));
        }
    } else if secure_boot {
        let path = path.display();
        return Err(Error::Usage(format!("{path} has no [secure_boot]\n  help: add the line [secure_boot] to it")));
    }
    let keyring = project.dir.join(Project::UPDATE_KEYRING);
    let wanted = FleetKey::load(&project)?.update_key()?.keyring();
    let old = std::fs::read(&keyring).ok();
    let state = match &old {
        None => FileState::Created,
        Some(old) if *old == wanted => FileState::Kept,
        Some(_) => FileState::Changed,
    };
    files.add(&keyring, state);
    if state != FileState::Kept {
        write_atomic(&keyring, &wanted)?;
        progress.say("init", &format!("{}: public key with which nodes verify updates", keyring.display()));
    }
    let message = if files.0.iter().all(|file| file.state == FileState::Kept) {
        format!("{}: has all its files already", dir.display())
    } else {
        format!("next: edit {}, then run `bakehouse -C {} check`", path.display(), dir.display())
    };
    progress.say("init", &message);
    let fleet = project.topology.name.clone();
    Ok(CommandResult::Init(InitResult { fleet, dir: dir.to_owned(), files: files.0 }))
}

/// Files that `init` has handled.
struct Files(Vec<InitFile>);

impl Files {
    fn add(&mut self, path: &Path, state: FileState) {
        self.0.push(InitFile { path: path.to_owned(), state });
    }
}
