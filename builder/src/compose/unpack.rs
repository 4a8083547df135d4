//! Unpacks many packages into one tree in parallel, without the files that the profiles trim.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, chown, fchown, lchown, symlink};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use glob::Pattern;
use md5::{Digest as _, Md5};

use super::job::{DebFile, Rule};
use crate::error::{Error, Result, fail};
use crate::format::deb::{Deb, data_entries};
use crate::sandbox::Files;
use crate::util::digest::hex;

/// The data of an unpacked package for dpkg's database.
pub(super) struct Unpacked {
    /// The package.
    pub deb: Deb,
    /// Whether dpkg configures the package before others.
    pub essential: bool,
    /// Every path in dpkg's form, including trimmed files.
    pub paths: Vec<String>,
    /// MD5 digests of the configuration files, by path.
    pub conffiles: Vec<(String, String)>,
    dirs: Vec<(String, u32, u32, u32)>,
    files: Vec<String>,
}

/// Compiled patterns of files to trim.
pub(super) struct Trimmer(Vec<(Pattern, bool)>);

impl Trimmer {
    /// Compiles the patterns.
    pub(super) fn new(rules: &[Rule]) -> Result<Self> {
        rules
            .iter()
            .map(|r| {
                Pattern::new(&r.pattern)
                    .map(|p| (p, r.keep))
                    .map_err(Error::at(format!("invalid pattern `{}`", r.pattern)))
            })
            .collect::<Result<_, _>>()
            .map(Self)
    }

    pub(super) fn drops(&self, path: &str) -> bool {
        self.0.iter().rev().find(|(p, _)| p.matches(path)).is_some_and(|(_, keep)| !keep)
    }
}

/// Unpacks all packages below `root`, each from the next of `files`, and calls `done` with the number of unpacked
/// packages. The result is sorted by the packages' names.
pub(super) fn unpack(
    debs: &[DebFile],
    files: &Files,
    root: &Path,
    trim: &Trimmer,
    done: &(dyn Fn(usize) + Sync),
) -> Result<Vec<Unpacked>> {
    skeleton(root).map_err(Error::cannot("create the tree"))?;
    let next = AtomicUsize::new(0);
    let results = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        let threads = std::thread::available_parallelism().map_or(2, usize::from).min(8);
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let next = files.next_for(|| debs.get(next.fetch_add(1, Ordering::Relaxed)));
                    let result = match next {
                        Ok(Some((info, file))) => Deb::read(file, &info.name, &info.sha256).and_then(|deb| {
                            let name = deb.name.clone();
                            unpack_one(deb, info.essential, root, trim).map_err(Error::at(name))
                        }),
                        Ok(None) => break,
                        Err(e) => Err(Error::cannot("open a package's file")(e)),
                    };
                    let mut results = results.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                    results.push(result);
                    done(results.len());
                }
            });
        }
    });
    let results = results.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut all = results.into_iter().collect::<Result<Vec<_>, _>>()?;
    all.sort_by(|a, b| a.deb.name.cmp(&b.deb.name));
    no_file_twice(&all)?;
    directories(&all, root).map_err(Error::cannot("set a folder's owner or mode"))?;
    Ok(all)
}

/// Creates the links of the merged /usr first, so that no thread creates a folder `/bin`.
fn skeleton(root: &Path) -> io::Result<()> {
    for dir in ["usr", "usr/bin", "usr/sbin", "usr/lib", "usr/lib64"] {
        fs::create_dir_all(root.join(dir))?;
    }
    for link in ["bin", "sbin", "lib", "lib64"] {
        if fs::symlink_metadata(root.join(link)).is_err() {
            symlink(format!("usr/{link}"), root.join(link))?;
        }
    }
    Ok(())
}

/// Fails if two packages have the same file: threads write in any order, so the content would be random.
fn no_file_twice(all: &[Unpacked]) -> Result<()> {
    let mut owners: BTreeMap<&str, &str> = BTreeMap::new();
    for package in all {
        for file in &package.files {
            if let Some(other) = owners.insert(file, &package.deb.name) {
                return fail(format!("{other} and {} both have {file}", package.deb.name));
            }
        }
    }
    Ok(())
}

/// Sets owners and modes of folders. A folder of several packages gets those of the first package by name, as with
/// dpkg, which keeps those of the first package that it unpacks.
fn directories(all: &[Unpacked], root: &Path) -> io::Result<()> {
    let mut first: BTreeMap<&str, (u32, u32, u32)> = BTreeMap::new();
    // base-files has the top-level folders with their correct modes.
    let base_first = all.iter().filter(|p| p.deb.name == "base-files").chain(all.iter());
    for (path, mode, uid, gid) in base_first.flat_map(|p| &p.dirs) {
        first.entry(path).or_insert((*mode, *uid, *gid));
    }
    for (path, (mode, uid, gid)) in first {
        let full = root.join(&path[1..]);
        if !fs::symlink_metadata(&full)?.is_dir() {
            continue;
        }
        if (uid, gid) != (0, 0) {
            chown(&full, Some(uid), Some(gid))?;
        }
        fs::set_permissions(&full, Permissions::from_mode(mode & 0o7777))?;
    }
    Ok(())
}

fn unpack_one(deb: Deb, essential: bool, root: &Path, trim: &Trimmer) -> Result<Unpacked> {
    let (mut paths, mut conffiles, mut dirs, mut files) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    data_entries(&deb, |path, entry| {
        paths.push(path.to_owned());
        let header = entry.header();
        let kind = header.entry_type();
        let context = |e: io::Error| Error::at(path)(e);
        let number = |n: io::Result<u64>| n.map(|n| u32::try_from(n).unwrap_or(0)).map_err(context);
        let (mode, uid, gid) = (header.mode().map_err(context)?, number(header.uid())?, number(header.gid())?);
        let full = root.join(&path[1..]);
        let invalid = |what: &str| Error::At { place: path.to_owned(), source: what.into() };
        if kind.is_dir() {
            fs::create_dir_all(&full).map_err(context)?;
            dirs.push((path.to_owned(), mode, uid, gid));
            return Ok(());
        }
        if trim.drops(path) {
            return Ok(());
        }
        if let Some(parent) = full.parent() {
            fs::create_dir_all(parent).map_err(context)?;
        }
        if kind.is_symlink() {
            let target = entry.link_name_bytes().ok_or_else(|| invalid("a link without a target"))?.into_owned();
            let target = String::from_utf8(target).map_err(|_| invalid("a link's target is not UTF-8"))?;
            match symlink(&target, &full) {
                Err(e)
                    if e.kind() == io::ErrorKind::AlreadyExists
                        && fs::read_link(&full).is_ok_and(|t| t.to_str() == Some(&target)) =>
                {
                    return Ok(());
                }
                result => result.map_err(context)?,
            }
            lchown(&full, Some(uid), Some(gid)).map_err(context)?;
        } else if kind.is_hard_link() {
            let target = entry.link_name_bytes().ok_or_else(|| invalid("a link without a target"))?.into_owned();
            let target = String::from_utf8(target).map_err(|_| invalid("a link's target is not UTF-8"))?;
            let target = target.trim_start_matches("./").trim_start_matches('/');
            // A hard link to a trimmed file is trimmed, too.
            if !trim.drops(&format!("/{target}")) {
                fs::hard_link(root.join(target), &full).map_err(context)?;
            }
        } else if kind.is_file() {
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&full).map_err(context)?;
            if deb.conffiles.iter().any(|c| c == path) {
                let mut content = Vec::new();
                io::Read::read_to_end(entry, &mut content).map_err(context)?;
                conffiles.push((path.to_owned(), hex(&Md5::digest(&content))));
                file.write_all(&content).map_err(context)?;
            } else {
                io::copy(entry, &mut file).map_err(context)?;
            }
            if (uid, gid) != (0, 0) {
                fchown(&file, Some(uid), Some(gid)).map_err(context)?;
            }
            file.set_permissions(Permissions::from_mode(mode & 0o7777)).map_err(context)?;
        } else {
            return fail(format!("{path} is a device or a pipe; images cannot contain these"));
        }
        files.push(path.to_owned());
        Ok(())
    })?;
    Ok(Unpacked { deb, essential, paths, conffiles, dirs, files })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_matching_rule_decides() {
        let rule = |pattern: &str, keep| Rule { pattern: pattern.to_owned(), keep };
        let trim = Trimmer::new(&[rule("/usr/share/doc/*", false), rule("/usr/share/doc/*/copyright", true)]).unwrap();
        assert!(trim.drops("/usr/share/doc/x/changelog.gz"));
        assert!(!trim.drops("/usr/share/doc/x/copyright"));
        assert!(!trim.drops("/usr/bin/x"));
    }
}
