//! The program of `[vip] hook`, which becomes a part of the hubs' images.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use fleet::{Diagnostic, Fleet, HubSecrets, Severity, Topology};

use super::secrets;
use crate::error::Result;

/// Overlay with the units of the program, and with the program itself.
pub(super) const OVERLAY: &str = "floating";
/// Where the overlay has the program.
const PROGRAM: &str = "overlays/floating/usr/lib/bakehouse/vip-hook";
/// Longest program, in bytes.
const LONGEST: u64 = 16 << 20;

/// Adds the program of `[vip] hook` to the files of its overlay.
///
/// # Errors
/// If the program does not exist, is not executable, is too long or holds a key. The error has the line of `fleet.toml`.
pub(super) fn add(fleet: &Fleet, dir: &Path, files: &mut BTreeMap<String, Vec<u8>>) -> Result<()> {
    let Some(hook) = &fleet.vip.hook else { return Ok(()) };
    let path = dir.join(hook);
    let at = |message: String, help: &str| {
        let span = fleet.source.value(&["vip", "hook"]);
        Box::new(Diagnostic::at(Severity::Error, &fleet.source, span, message, Some(help.to_owned())))
    };
    let unreadable = |e: std::io::Error| {
        at(format!("[vip] cannot read {}: {e}", path.display()), "write its path relative to fleet.toml")
    };
    let meta = fs::metadata(&path).map_err(unreadable)?;
    if !meta.is_file() || meta.permissions().mode() & 0o100 == 0 {
        let help = "name a program or a script that starts with `#!`, and make it executable: `chmod +x`";
        return Err(at(format!("[vip] {} is not an executable file", path.display()), help).into());
    }
    if meta.len() > LONGEST {
        let message = format!("[vip] {} has {} bytes", path.display(), meta.len());
        return Err(at(message, "hubs keep programs of at most 16 MB").into());
    }
    let bytes = fs::read(&path).map_err(unreadable)?;
    if !bytes.starts_with(b"#!/") && !bytes.starts_with(b"\x7fELF") {
        let message = format!("[vip] {} is neither a script nor a program of Linux", path.display());
        return Err(at(message, "begin a script with the path of its interpreter, such as `#!/bin/bash`").into());
    }
    secrets::secret(hook, &bytes)?;
    files.insert(PROGRAM.to_owned(), bytes);
    Ok(())
}

/// Returns a warning if the hook has no token.
pub(super) fn missing(fleet: &Fleet, stored: &HubSecrets) -> Option<Diagnostic> {
    let token = Topology::HOOK_SECRET;
    if fleet.vip.hook.is_none() || stored.names().contains(token) {
        return None;
    }
    let span = fleet.source.value(&["vip", "hook"]);
    let message = format!("[vip] the secret `{token}` is missing: the hook runs without a token");
    let help = Some(format!("type `bakehouse secret {token}`, if your provider needs one"));
    Some(Diagnostic::at(Severity::Warning, &fleet.source, span, message, help))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::project::Project;

    fn load(text: &[u8], mode: u32) -> Result<Project> {
        let dir = tempfile::tempdir().unwrap();
        let hook = dir.path().join("floating-ip");
        fs::write(&hook, text).unwrap();
        fs::set_permissions(&hook, fs::Permissions::from_mode(mode)).unwrap();
        let toml = "name = \"x\"\n[vip]\nhook = \"floating-ip\"\n[groups]\nhub = { count = 1, endpoints = [\"a.test\"] }\n\
                    app.count = 1\n";
        fs::write(dir.path().join("fleet.toml"), toml).unwrap();
        Project::load(dir.path())
    }

    #[test]
    fn program_is_in_images_of_hubs_only() {
        let project = load(b"#!/bin/sh\necho moved\n", 0o755).unwrap();
        let overlay = project.overlay(OVERLAY).unwrap();
        let (_, bytes) = overlay.files.iter().find(|(path, _)| *path == "usr/lib/bakehouse/vip-hook").unwrap();
        assert!(bytes.ends_with(b"echo moved\n"));
        assert!(project.recipe("hub").overlays.contains(&OVERLAY.to_owned()));
        assert!(!project.recipe("app").overlays.contains(&OVERLAY.to_owned()));
        assert!(project.warnings.iter().any(|w| w.message.contains("the secret `vip_hook` is missing")));
    }

    #[test]
    fn unusable_program_has_the_line_of_its_key() {
        for (text, mode, message) in [
            (&b"#!/bin/sh\n"[..], 0o644, "is not an executable file"),
            (b"curl x\n", 0o755, "is neither a script nor a program"),
        ] {
            let e = load(text, mode).map(drop).unwrap_err().to_string();
            assert!(e.contains("fleet.toml:3: [vip]") && e.contains(message), "{e}");
        }
        let key = [b"#!/bin/sh\n-----BEGIN OPENSSH ".as_slice(), b"PRIVATE KEY-----\n"].concat();
        let e = load(&key, 0o755).map(drop).unwrap_err().to_string();
        assert!(e.contains("floating-ip:2: holds a private key"), "{e}");
    }
}
