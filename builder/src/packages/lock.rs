//! `bakehouse.lock`: the exact version and hash of every package of every image. Paths are relative to the archive, so
//! that the lock works with any mirror.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result, fail};
use crate::packages::requests::{requests, wheel_requests};
use crate::project::Project;
use crate::util::digest::sha256;
use crate::util::fs::write_atomic;

/// The content of `bakehouse.lock`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lock {
    /// Format of the file.
    pub format: u32,
    /// Date of the newest Release file in seconds since 1970. It is the modification time of every file in the images.
    pub epoch: u64,
    /// Images by name: the groups, and [`TOOLS`](crate::packages::requests::TOOLS).
    pub images: BTreeMap<String, LockedImage>,
    /// All packages, sorted by name and version.
    #[serde(rename = "package")]
    pub packages: Vec<Package>,
    /// All Python packages, sorted by name and version.
    #[serde(rename = "wheel", default, skip_serializing_if = "Vec::is_empty")]
    pub wheels: Vec<Wheel>,
    /// sha256 of the file.
    #[serde(skip)]
    pub digest: String,
}

/// The packages of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LockedImage {
    /// Packages that the roles and `fleet.toml` request.
    pub request: Vec<String>,
    /// The requested packages and their dependencies, each as `name=version`.
    pub packages: Vec<String>,
    /// The part of `packages` that all images share: the packages of the profile `base` and their dependencies.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub base: Vec<String>,
    /// Python packages, each as `name==version`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub wheels: Vec<String>,
}

/// The wheel of a Python package. pip's index has it under its name, whatever the address of the index is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wheel {
    /// Name of the package, in lower case with `-`.
    pub name: String,
    /// Version of the package.
    pub version: String,
    /// Name of the file.
    pub file: String,
    /// sha256 of the file, in hex.
    pub sha256: String,
}

impl Wheel {
    /// Returns `name==version`.
    #[must_use]
    pub fn id(&self) -> String {
        format!("{}=={}", self.name, self.version)
    }
}

/// A version of a package.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Package {
    /// Name of the package.
    pub name: String,
    /// Version, as dpkg compares it.
    pub version: String,
    /// Architecture: `amd64` or `all`.
    pub arch: String,
    /// Suite of the archive.
    pub suite: String,
    /// Name of the archive that `path` is relative to.
    pub archive: String,
    /// Path of the .deb in the archive.
    pub path: String,
    /// sha256 of the .deb, in hex.
    pub sha256: String,
    /// Size of the .deb in bytes.
    pub size: u64,
    /// Installed size in KiB, as the package declares it.
    pub installed_size: u64,
    /// Whether the package is essential, or a dependency of one. dpkg configures these first.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub essential: bool,
}

impl Package {
    /// Returns `name=version`.
    #[must_use]
    pub fn id(&self) -> String {
        format!("{}={}", self.name, self.version)
    }
}

impl Lock {
    /// Format that this version reads and writes.
    pub const FORMAT: u32 = 1;

    /// Returns the path of the fleet's lock.
    #[must_use]
    pub fn path(project: &Project) -> PathBuf {
        project.dir.join("bakehouse.lock")
    }

    /// Reads the lock, and verifies that it matches the fleet.
    ///
    /// # Errors
    /// If there is no lock, it is invalid, or it was written for other requests than the fleet's.
    pub fn load(project: &Project) -> Result<Self> {
        let path = Self::path(project);
        let lock = Self::read(&path)?
            .ok_or_else(|| Error::Failed(format!("{} does not exist; run `bakehouse lock`", path.display())))?;
        lock.matches(project, &path)?;
        Ok(lock)
    }

    /// Reads a lock; returns `None` if the file does not exist.
    ///
    /// # Errors
    /// If the file cannot be read or parsed.
    pub fn read(path: &Path) -> Result<Option<Self>> {
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::io("read", path)(e)),
        };
        match toml::from_str::<Self>(&text) {
            Ok(lock) if lock.format == Self::FORMAT => Ok(Some(Self { digest: sha256(text.as_bytes()), ..lock })),
            Ok(lock) => fail(format!(
                "{} has format {}, but this bakehouse reads format {}; run `bakehouse lock --update`",
                path.display(),
                lock.format,
                Self::FORMAT
            )),
            Err(e) => Err(Error::damaged(path, "run `bakehouse lock --update`")(e.message())),
        }
    }

    fn matches(&self, project: &Project, path: &Path) -> Result<()> {
        let file = path.display();
        for (image, request) in requests(project) {
            let Some(locked) = self.images.get(&image) else {
                return fail(format!("{file} has no image `{image}`, but fleet.toml has; run `bakehouse lock`"));
            };
            let (have, want): (BTreeSet<_>, BTreeSet<_>) = (locked.request.iter().collect(), request.iter().collect());
            if let Some(missing) = want.difference(&have).next() {
                return fail(format!(
                    "{file} lacks the package `{missing}`, which `{image}` requests; run `bakehouse lock`"
                ));
            }
            if let Some(extra) = have.difference(&want).next() {
                return fail(format!(
                    "{file} has the package `{extra}` for `{image}`, which no longer requests it; run `bakehouse lock`"
                ));
            }
        }
        for (image, request) in wheel_requests(project) {
            if self.images.get(&image).is_some_and(|locked| locked.wheels != request) {
                return fail(format!("{file} has other Python packages than `{image}` requests; run `bakehouse lock`"));
            }
        }
        let ids: BTreeSet<String> = self.packages.iter().map(Package::id).collect();
        let wheels: BTreeSet<String> = self.wheels.iter().map(Wheel::id).collect();
        for (image, locked) in &self.images {
            let missing = locked.packages.iter().chain(&locked.base).find(|id| !ids.contains(*id));
            if let Some(id) = missing.or_else(|| locked.wheels.iter().find(|id| !wheels.contains(*id))) {
                return fail(format!(
                    "{file} is damaged: `{image}` has `{id}`, which is not listed; run `bakehouse lock --update`"
                ));
            }
        }
        let is_hash = |text: &str| text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit());
        if let Some(wheel) = self.wheels.iter().find(|w| !is_hash(&w.sha256) || w.file.contains('/')) {
            return fail(format!("{file} is damaged at `{}`; run `bakehouse lock --update`", wheel.name));
        }
        for package in &self.packages {
            if !is_hash(&package.sha256) || package.path.split('/').any(|part| part == "..") {
                return fail(format!("{file} is damaged at `{}`; run `bakehouse lock --update`", package.name));
            }
        }
        Ok(())
    }

    /// Writes the lock, with one package a line, so that a diff shows each change. The same content gives the same
    /// bytes.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        write_atomic(path, self.text()?.as_bytes())
    }

    fn text(&self) -> Result<String> {
        let text = toml::to_string_pretty(self).map_err(Error::cannot("write the lock"))?;
        Ok(format!("# Made by `bakehouse lock`; commit it. To take newer packages: `bakehouse lock --update`.\n{text}"))
    }

    /// Returns an image's packages, or only those that all images share.
    #[must_use]
    pub fn packages_of(&self, image: &str, base_only: bool) -> Vec<&Package> {
        let Some(locked) = self.images.get(image) else { return Vec::new() };
        let wanted: BTreeSet<&str> =
            if base_only { &locked.base } else { &locked.packages }.iter().map(String::as_str).collect();
        self.packages.iter().filter(|p| wanted.contains(p.id().as_str())).collect()
    }

    /// Returns the Python packages of an image.
    #[must_use]
    pub fn wheels_of(&self, image: &str) -> Vec<&Wheel> {
        let Some(locked) = self.images.get(image) else { return Vec::new() };
        self.wheels.iter().filter(|w| locked.wheels.contains(&w.id())).collect()
    }

    /// Returns the packages that differ from those of `old`.
    #[must_use]
    pub fn changes_from(&self, old: &Self) -> LockChanges {
        let versions = |lock: &Self| -> BTreeMap<String, BTreeSet<String>> {
            let mut map = BTreeMap::<_, BTreeSet<_>>::new();
            for p in &lock.packages {
                map.entry(p.name.clone()).or_default().insert(p.version.clone());
            }
            for w in &lock.wheels {
                map.entry(format!("{} (Python)", w.name)).or_default().insert(w.version.clone());
            }
            map
        };
        let (old, new) = (versions(old), versions(self));
        let join = |v: &BTreeSet<String>| v.iter().cloned().collect::<Vec<_>>().join(", ");
        let names: BTreeSet<&String> = old.keys().chain(new.keys()).collect();
        let mut changes = LockChanges::default();
        for name in names {
            let name_of = || name.clone();
            match (old.get(name), new.get(name)) {
                (Some(a), Some(b)) if a == b => {}
                (Some(a), Some(b)) => {
                    changes.changed.push(ChangedPackage { name: name_of(), from: join(a), to: join(b) });
                }
                (None, Some(b)) => changes.added.push(NamedVersion { name: name_of(), version: join(b) }),
                (Some(a), None) => changes.removed.push(NamedVersion { name: name_of(), version: join(a) }),
                (None, None) => {}
            }
        }
        changes
    }
}

/// Differences between the packages of two locks. Several versions of a package are separated by `, `.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct LockChanges {
    /// New packages.
    pub added: Vec<NamedVersion>,
    /// Packages that are no longer locked.
    pub removed: Vec<NamedVersion>,
    /// Packages with another version.
    pub changed: Vec<ChangedPackage>,
}

/// A package and its version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct NamedVersion {
    /// Name of the package.
    pub name: String,
    /// Version of the package.
    pub version: String,
}

/// A package whose version differs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct ChangedPackage {
    /// Name of the package.
    pub name: String,
    /// Version in the earlier lock.
    pub from: String,
    /// Version in the new lock.
    pub to: String,
}

impl fmt::Display for LockChanges {
    /// Writes one line for each change, by name.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let line = |sign: char, p: &NamedVersion| (p.name.clone(), format!("{sign} {} {}", p.name, p.version));
        let changed = self.changed.iter().map(|p| (p.name.clone(), format!("~ {} {} → {}", p.name, p.from, p.to)));
        let added = self.added.iter().map(|p| line('+', p));
        let lines: BTreeMap<_, _> = added.chain(self.removed.iter().map(|p| line('-', p))).chain(changed).collect();
        lines.values().try_for_each(|line| writeln!(f, "{line}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lock() -> Lock {
        let package = |name: &str| Package {
            name: name.to_owned(),
            version: "1:2.0-1~deb13u1".to_owned(),
            arch: "amd64".to_owned(),
            suite: "trixie".to_owned(),
            archive: "debian".to_owned(),
            path: format!("pool/{name}.deb"),
            sha256: "a".repeat(64),
            size: 1,
            installed_size: 1,
            essential: name == "bash",
        };
        let packages = ["bash", "gpg", "zlib1g"].map(package).to_vec();
        let ids: Vec<String> = packages.iter().map(Package::id).collect();
        let image = LockedImage {
            request: vec!["gpg".to_owned()],
            packages: ids.clone(),
            base: ids[..1].to_vec(),
            wheels: Vec::new(),
        };
        Lock {
            format: 1,
            epoch: 7,
            images: [("app".to_owned(), image)].into(),
            packages,
            wheels: Vec::new(),
            digest: String::new(),
        }
    }

    #[test]
    fn has_one_package_a_line() {
        let (lock, text) = (lock(), lock().text().unwrap());
        assert!(text.contains("packages = [\n    \"bash=1:2.0-1~deb13u1\",\n    \"gpg=1:2.0-1~deb13u1\",\n"), "{text}");
        assert!(text.lines().all(|line| line.len() < 120), "{text}");
        assert_eq!(text, lock.text().unwrap());
        let mut other = lock.clone();
        other.images.get_mut("app").unwrap().packages.remove(1);
        let (old, new): (Vec<&str>, String) = (text.lines().collect(), other.text().unwrap());
        assert_eq!(new.lines().count() + 1, old.len(), "one package is one line");
    }

    #[test]
    fn reads_locks_of_earlier_versions() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bakehouse.lock");
        // Earlier versions wrote each list on one line.
        fs::write(&path, toml::to_string(&lock()).unwrap()).unwrap();
        let old = Lock::read(&path).unwrap().unwrap();
        lock().write(&path).unwrap();
        let new = Lock::read(&path).unwrap().unwrap();
        assert_ne!(old.digest, new.digest);
        assert_eq!(old, Lock { digest: old.digest.clone(), ..lock() });
        assert_eq!(new, Lock { digest: new.digest.clone(), ..lock() });
    }
}
