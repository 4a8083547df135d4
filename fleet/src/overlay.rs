//! `overlays/NAME/overlay.toml`: properties of an overlay that its file tree cannot express.

use std::collections::BTreeMap;
use std::path::{Component, Path};

use serde::Deserialize;

use crate::diagnostic::{Diagnostic, parse};
#[cfg(feature = "schema")]
use crate::form;

/// `overlays/NAME/overlay.toml`: an overlay's manifest. The builder copies the file tree beside it over the image's
/// root, except for files below `run/`. Those are templates that the agent renders on the node at every boot.
#[derive(Clone, Debug, Default, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct OverlayManifest {
    /// One line about the overlay.
    pub description: String,
    /// Owner and mode of files, by path without a leading `/` and without `.j2`. Default: `root:root`, mode `0644`.
    /// Below `run/`, only the mode applies. Services get files with secrets (mode `0600`) from systemd, by
    /// `LoadCredential=`. Example: `"usr/bin/tool" = { mode = "0755" }`.
    pub files: BTreeMap<String, FileMeta>,
    /// Programs that come with `bakehouse`, for `usr/lib/bakehouse/`. Example: `["bakehouse-page"]`.
    pub programs: Vec<String>,
    /// Targets of symbolic links, by path of the link without a leading `/`.
    pub links: BTreeMap<String, String>,
    /// Commands with which daemons check their configuration: `[[check]]`.
    pub check: Vec<Check>,
    /// Files that a program of the image generates while the image is built: `[[make]]`.
    pub make: Vec<Make>,
    /// Programs that convert a node's data, in this order: `[[migration]]`.
    pub migration: Vec<Migration>,
}

/// Owner and mode of a file.
#[derive(Clone, Debug, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct FileMeta {
    /// Mode in octal. Example: `"0755"`. Default: `"0644"`.
    #[cfg_attr(feature = "schema", schemars(with = "form::Mode"))]
    pub mode: String,
    /// A user of the image. Default: `"root"`.
    pub user: String,
    /// A group of the image. Default: `"root"`.
    pub group: String,
}

impl Default for FileMeta {
    fn default() -> Self {
        Self { mode: "0644".to_owned(), user: "root".to_owned(), group: "root".to_owned() }
    }
}

/// An entry of `[[check]]`: a command that the builder runs inside the image's tree. It must exit with 0. The
/// builder runs a check of files below `run/` for every slot of the fleet.
#[derive(Clone, Debug, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Check {
    /// Files that the command checks, by path without a leading `/`. An entry that ends in `/` is a folder. The builder
    /// repeats the check when one of them changes.
    pub of: Vec<String>,
    /// Program and arguments. Example: `["haproxy", "-c", "-f", "/etc/haproxy/haproxy.cfg"]`.
    pub command: Vec<String>,
}

/// An entry of `[[make]]`: a file of the image (`root:root`, mode `0644`) that a command generates inside the image's
/// tree. Use it for work that takes long and has the same result on every node. The same tree must give the same bytes.
#[derive(Clone, Debug, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Make {
    /// Path of the file without a leading `/`. The command has to write it before it exits.
    #[cfg_attr(feature = "schema", schemars(with = "form::ImagePath", extend("not" = { "pattern": form::NOT_BAKED })))]
    pub file: String,
    /// Files of overlays that the command reads, as in `[[check]]`. The builder repeats the command when one of them,
    /// or a package, changes.
    pub of: Vec<String>,
    /// Program and arguments.
    pub command: Vec<String>,
}

/// An entry of `[[migration]]`: a program of the overlay, `usr/lib/bakehouse/migrations/NAME`. Every node runs it once,
/// before a unit starts for the first time. After a power loss the node runs it again.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Migration {
    /// Lower-case letters, digits and dashes. A name must never be used for a second migration, because nodes keep the
    /// names of those that they ran. Example: `"postgresql-17-to-18"`.
    #[cfg_attr(feature = "schema", schemars(with = "form::MigrationName"))]
    pub name: String,
    /// Service that waits for the migration. Example: `"patroni.service"`.
    #[cfg_attr(feature = "schema", schemars(with = "form::Service"))]
    pub before: String,
}

/// Folder of the migrations in an image.
pub const MIGRATIONS: &str = "usr/lib/bakehouse/migrations";

/// Whether `of` contains `path`. An entry that ends in `/` is a folder.
#[must_use]
pub fn is_of(of: &[String], path: &str) -> bool {
    of.iter().any(|of| path == of || (of.ends_with('/') && path.starts_with(of.as_str())))
}

impl OverlayManifest {
    /// Reads an `overlay.toml`.
    ///
    /// # Errors
    /// If the bytes are not a manifest, or a mode, a path or a name is invalid. The [`Diagnostic`] has file, line and
    /// fix.
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
        for name in &manifest.programs {
            let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
            if name.is_empty() || !name.chars().all(plain) {
                let quoted = format!("\"{name}\"");
                let at = source.text.find(&quoted).map_or(0..0, |at| at..at + quoted.len());
                return Err(Box::new(Diagnostic::at(
                    crate::Severity::Error,
                    &source,
                    at,
                    format!("`{name}` is not the name of a program"),
                    Some("use lower-case letters, digits and dashes".to_owned()),
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
                    format!("`{file}` is not a valid path of a generated file"),
                    Some("write it without a leading `/` and without `..`, and not below run/".to_owned()),
                )));
            }
        }
        for Migration { name, before } in &manifest.migration {
            let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
            let (invalid, fix) = if name.is_empty() || !name.chars().all(plain) {
                (name, "use lower-case letters, digits and dashes in a migration's name")
            } else if !before.ends_with(".service") {
                (before, "name the service that has to wait for the migration, such as \"patroni.service\"")
            } else {
                continue;
            };
            let quoted = format!("\"{invalid}\"");
            let at = source.text.find(&quoted).map_or(0..0, |at| at..at + quoted.len());
            let message = format!("`{invalid}` is not valid in a migration");
            return Err(Box::new(Diagnostic::at(crate::Severity::Error, &source, at, message, Some(fix.to_owned()))));
        }
        Ok(manifest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rejects_generated_file_outside_the_image() {
        let parsed = |file: &str| {
            let toml = format!("[[make]]\nfile = \"{file}\"\nof = []\ncommand = [\"true\"]\n");
            OverlayManifest::parse("overlays/mine/overlay.toml", toml.as_bytes())
        };
        assert!(parsed("usr/share/mine/users").is_ok());
        for file in ["/etc/shadow", "usr/../../etc/shadow", "./usr/x", "run/x", ""] {
            let message = parsed(file).expect_err(file).to_string();
            assert!(message.contains("overlay.toml:2") && message.contains("is not a valid path"), "{message}");
        }
    }

    #[test]
    fn rejects_program_with_a_path() {
        let parsed = |name: &str| {
            let toml = format!("programs = [\"{name}\"]\n");
            OverlayManifest::parse("overlays/mine/overlay.toml", toml.as_bytes())
        };
        assert_eq!(parsed("bakehouse-page").unwrap().programs, ["bakehouse-page"]);
        for name in ["../sh", "/bin/sh", "", "a b"] {
            let message = parsed(name).expect_err(name).to_string();
            assert!(
                message.contains("overlay.toml:1") && message.contains("is not the name of a program"),
                "{message}"
            );
        }
    }

    #[test]
    fn rejects_migration_without_plain_name_or_service() {
        let parsed = |name: &str, before: &str| {
            let toml = format!("[[migration]]\nname = \"{name}\"\nbefore = \"{before}\"\n");
            OverlayManifest::parse("overlays/mine/overlay.toml", toml.as_bytes())
        };
        assert!(parsed("postgresql-17-to-18", "patroni.service").is_ok());
        for (name, before, line) in [("../x", "x.service", 2), ("", "x.service", 2), ("x", "role-db.target", 3)] {
            let message = parsed(name, before).expect_err(name).to_string();
            assert!(message.contains(&format!("overlay.toml:{line}")) && message.contains("is not valid"), "{message}");
        }
    }
}
