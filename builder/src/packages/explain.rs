//! `bakehouse explain PATH`: which overlay, template, profile and variables, or which package,
//! made a file of an image.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde::Serialize;

use crate::error::{Error, Result, fail};
use crate::format::deb::{Deb, data_entries};
use crate::packages::lock::{Lock, Package};
use crate::project::Project;
use crate::store::{Kind, Store};

/// Where a file comes from.
#[derive(Debug, Serialize)]
pub struct Explanation {
    pub path: String,
    pub group: String,
    pub made_by: MadeBy,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum MadeBy {
    /// A file or template of an overlay.
    Overlay {
        /// The overlay's file.
        source: String,
        /// When its variables are filled in.
        rendered: Rendered,
        variables: BTreeSet<String>,
        /// Who asks for the overlay: profiles, or the group itself.
        wanted_by: Vec<String>,
    },
    /// A link that an overlay's manifest names.
    Link { source: String, target: String },
    /// A program of the image, when it is built.
    Program { source: String, command: Vec<String> },
    /// A package, as it is.
    Package { name: String, version: String },
    /// The builder itself.
    Bakehouse,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rendered {
    /// It is laid as it is.
    Never,
    WhenBuilt,
    AtEveryBoot,
}

/// Explains a path of a group's image.
///
/// # Errors
/// Nothing in the image has that path; or it needs packages that were not fetched.
pub fn explain(project: &Project, group: &str, path: &str) -> Result<Explanation> {
    let inner = path.trim_start_matches('/');
    let found = |made_by| Ok(Explanation { path: format!("/{inner}"), group: group.to_owned(), made_by });
    let recipe = project.recipe(group);
    for name in &recipe.overlays {
        let overlay = project.overlay(name)?;
        if let Some(target) = overlay.manifest.links.get(inner) {
            let source = format!("overlays/{name}/overlay.toml");
            return found(MadeBy::Link { source, target: target.clone() });
        }
        if let Some(make) = overlay.manifest.make.iter().find(|make| make.file == inner) {
            let source = format!("overlays/{name}/overlay.toml");
            return found(MadeBy::Program { source, command: make.command.clone() });
        }
        let Some((file, bytes)) = overlay.files.iter().find(|(f, _)| f.strip_suffix(".j2").unwrap_or(f) == inner)
        else {
            continue;
        };
        let rendered = match (file.starts_with("run/"), file.ends_with(".j2")) {
            (true, _) => Rendered::AtEveryBoot,
            (false, true) => Rendered::WhenBuilt,
            (false, false) => Rendered::Never,
        };
        let variables = match rendered {
            Rendered::Never => BTreeSet::new(),
            _ => fleet::variables(&String::from_utf8_lossy(bytes)),
        };
        let roles = std::iter::once("base").chain(recipe.roles.iter().map(String::as_str)).zip(&recipe.profiles);
        let mut wanted_by: Vec<String> = roles
            .filter(|(_, p)| p.overlays.contains(name))
            .map(|(role, _)| format!("profiles/roles/{role}.toml"))
            .collect();
        if project.fleet.groups[group].overlays.iter().any(|o| o.get_ref() == name) {
            wanted_by.push(format!("[groups.{group}] in {}", project.fleet.source.name));
        }
        return found(MadeBy::Overlay { source: format!("overlays/{name}/{file}"), rendered, variables, wanted_by });
    }
    if inner.starts_with(fleet::IMAGE_DIR) || inner == "usr/lib/os-release" {
        return found(MadeBy::Bakehouse);
    }
    let lock = Lock::load(project)?;
    match package_with(&lock.packages_of(group, false), &Store::open()?, &format!("/{inner}"))? {
        Some(package) => found(MadeBy::Package { name: package.name.clone(), version: package.version.clone() }),
        None => fail(format!(
            "neither an overlay nor a package of group `{group}` has /{inner}; a package's script may have made it"
        )),
    }
}

fn package_with<'a>(packages: &[&'a Package], store: &Store, path: &str) -> Result<Option<&'a Package>> {
    // The archive has two ways to write what the merged /usr makes one.
    let plain = path.strip_prefix("/usr").unwrap_or(path);
    let next = AtomicUsize::new(0);
    let found = Mutex::new(None);
    let failed = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, usize::from) {
            scope.spawn(|| {
                while let Some(package) = packages.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let looked = (|| {
                        if !store.has_deb(&package.sha256) {
                            return fail(format!("{} was not fetched yet: run `bakehouse fetch`", package.name));
                        }
                        let deb = Deb::open(&store.path(Kind::Deb, &package.sha256), &package.sha256)?;
                        let mut has = false;
                        data_entries(&deb, |entry, _| {
                            has |= entry == path || entry == plain;
                            Ok(())
                        })
                        .map_err(Error::Failed)?;
                        Ok(has)
                    })();
                    match looked {
                        Ok(true) => {
                            *found.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(*package);
                        }
                        Ok(false) => {}
                        Err(e) => *failed.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(e),
                    }
                }
            });
        }
    });
    let found = found.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    match failed.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
        Some(e) if found.is_none() => Err(e),
        _ => Ok(found),
    }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} on nodes of group `{}`\n  ", self.path, self.group)?;
        match &self.made_by {
            MadeBy::Overlay { source, rendered, variables, wanted_by } => {
                let how = match rendered {
                    Rendered::Never => "as it is",
                    Rendered::WhenBuilt => "rendered when the image is built",
                    Rendered::AtEveryBoot => "rendered on the node at every boot",
                };
                write!(f, "from {source}, {how}\n  wanted by {}", wanted_by.join(", "))?;
                if !variables.is_empty() {
                    let all: Vec<&str> = variables.iter().map(String::as_str).collect();
                    write!(f, "\n  variables: {}", all.join(", "))?;
                }
                Ok(())
            }
            MadeBy::Program { source, command } => {
                write!(f, "made when the image is built by `{}`, from {source}", command.join(" "))
            }
            MadeBy::Link { source, target } => write!(f, "a link to {target}, from {source}"),
            MadeBy::Package { name, version } => write!(f, "from the package {name} {version}, as it is"),
            MadeBy::Bakehouse => f.write_str("written by bakehouse"),
        }
    }
}
