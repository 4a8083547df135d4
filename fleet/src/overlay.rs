//! `overlays/NAME/overlay.toml`: what the file tree beside it can't say by itself.

use std::collections::BTreeMap;
use std::path::{Component, Path};

use serde::Deserialize;

use crate::diagnostic::{Diagnostic, parse};

/// An overlay's manifest. The tree beside it is laid over the image's root. Files below
/// `run/` are not: they are templates that the agent renders on the node at every boot.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OverlayManifest {
    pub description: String,
    /// Ownership and mode of files that are not `root:root 0644`, by path without a leading
    /// `/` and without `.j2`.
    pub files: BTreeMap<String, FileMeta>,
    /// Symbolic links: path → target.
    pub links: BTreeMap<String, String>,
    /// How the daemon that reads a file is asked about it.
    pub check: Vec<Check>,
    /// Files that a program of the image makes when the image is built.
    pub make: Vec<Make>,
    /// What converts what a node keeps, in this order.
    pub migration: Vec<Migration>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FileMeta {
    /// Octal, such as `"0755"`.
    pub mode: String,
    /// A user known to the image.
    pub user: String,
    pub group: String,
}

impl Default for FileMeta {
    fn default() -> Self {
        Self { mode: "0644".to_owned(), user: "root".to_owned(), group: "root".to_owned() }
    }
}

/// A command run inside the image's tree that must exit 0.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Check {
    /// Files whose change makes the answer stale, by path; an entry ending in `/` is a folder.
    pub of: Vec<String>,
    pub command: Vec<String>,
}

/// A file of the image (`root:root 0644`), made by a command that is run inside the image's tree:
/// what takes long, and is the same on every node. The same tree must give the same bytes.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Make {
    /// Its path without a leading `/`; the command has written it when it ends.
    pub file: String,
    /// Files of overlays that it is made from, as in [`Check`]; all of the packages' files are.
    pub of: Vec<String>,
    pub command: Vec<String>,
}

/// A program of the overlay, [`MIGRATIONS`]`/NAME`, that every node runs once, before a unit of it
/// starts for the first time. A power cut begins it anew.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Migration {
    /// Letters, digits and dashes; for ever another one for another migration.
    pub name: String,
    /// The unit that needs it, such as `patroni.service`.
    pub before: String,
}

/// Where migrations are in an image.
pub const MIGRATIONS: &str = "usr/lib/bakehouse/migrations";

/// Whether `path` is one of these; an entry ending in `/` is a folder.
#[must_use]
pub fn is_of(of: &[String], path: &str) -> bool {
    of.iter().any(|of| path == of || (of.ends_with('/') && path.starts_with(of.as_str())))
}

impl OverlayManifest {
    /// Reads an `overlay.toml`.
    ///
    /// # Errors
    /// A [`Diagnostic`] with file, line and fix.
    pub fn parse(name: &str, bytes: &[u8]) -> Result<Self, Box<Diagnostic>> {
        let (manifest, source) = parse::<Self>(name, bytes)?;
        for (path, meta) in &manifest.files {
            if u32::from_str_radix(&meta.mode, 8).is_err() {
                let at = source.text.find(meta.mode.as_str()).unwrap_or(0);
                return Err(Box::new(Diagnostic::at(
                    crate::Severity::Error,
                    &source,
                    at..at + meta.mode.len(),
                    format!("`{}` is not a mode ({path})", meta.mode),
                    Some("write it in octal, such as \"0755\"".to_owned()),
                )));
            }
        }
        for Make { file, .. } in &manifest.make {
            let plain = Path::new(file).components().all(|part| matches!(part, Component::Normal(_)));
            if !plain || file.is_empty() || file.starts_with("run/") {
                let quoted = format!("\"{file}\"");
                let at = source.text.find(&quoted).map_or(0..0, |at| at..at + quoted.len());
                return Err(Box::new(Diagnostic::at(
                    crate::Severity::Error,
                    &source,
                    at,
                    format!("`{file}` is no path of a file that is made"),
                    Some("write it without a leading `/` and without `..`, and not below run/".to_owned()),
                )));
            }
        }
        for Migration { name, before } in &manifest.migration {
            let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
            let (wrong, fix) = if name.is_empty() || !name.chars().all(plain) {
                (name, "a migration's name is made of lower-case letters, digits and dashes")
            } else if !before.ends_with(".service") {
                (before, "name the service that has to wait for the migration, such as \"patroni.service\"")
            } else {
                continue;
            };
            let quoted = format!("\"{wrong}\"");
            let at = source.text.find(&quoted).map_or(0..0, |at| at..at + quoted.len());
            let message = format!("`{wrong}` does not do for a migration");
            return Err(Box::new(Diagnostic::at(crate::Severity::Error, &source, at, message, Some(fix.to_owned()))));
        }
        Ok(manifest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_made_lies_in_the_image() {
        let parsed = |file: &str| {
            let toml = format!("[[make]]\nfile = \"{file}\"\nof = []\ncommand = [\"true\"]\n");
            OverlayManifest::parse("overlays/mine/overlay.toml", toml.as_bytes())
        };
        assert!(parsed("usr/share/mine/users").is_ok());
        for file in ["/etc/shadow", "usr/../../etc/shadow", "./usr/x", "run/x", ""] {
            let words = parsed(file).expect_err(file).to_string();
            assert!(words.contains("overlay.toml:2") && words.contains("is no path"), "{words}");
        }
    }

    #[test]
    fn a_migration_has_a_plain_name_and_a_service_that_waits() {
        let parsed = |name: &str, before: &str| {
            let toml = format!("[[migration]]\nname = \"{name}\"\nbefore = \"{before}\"\n");
            OverlayManifest::parse("overlays/mine/overlay.toml", toml.as_bytes())
        };
        assert!(parsed("postgresql-17-to-18", "patroni.service").is_ok());
        for (name, before, line) in [("../x", "x.service", 2), ("", "x.service", 2), ("x", "role-db.target", 3)] {
            let words = parsed(name, before).expect_err(name).to_string();
            assert!(words.contains(&format!("overlay.toml:{line}")) && words.contains("does not do"), "{words}");
        }
    }
}
