//! Many packages into one tree at once, leaving out what is trimmed as it streams.

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
use crate::format::deb::{Deb, data_entries};
use crate::sandbox::Files;
use crate::util::digest::hex;

/// What the dpkg database has to know of an unpacked package.
pub struct Unpacked {
    pub deb: Deb,
    pub essential: bool,
    /// Every path, trimmed ones too, as dpkg lists them.
    pub paths: Vec<String>,
    /// Digests of the configuration files.
    pub conffiles: Vec<(String, String)>,
    dirs: Vec<(String, u32, u32, u32)>,
    files: Vec<String>,
}

/// Patterns, compiled.
pub struct Trimmer(Vec<(Pattern, bool)>);

impl Trimmer {
    pub fn new(rules: &[Rule]) -> Result<Self, String> {
        rules
            .iter()
            .map(|r| {
                Pattern::new(&r.pattern).map(|p| (p, r.keep)).map_err(|e| format!("the pattern `{}`: {e}", r.pattern))
            })
            .collect::<Result<_, _>>()
            .map(Self)
    }

    fn drops(&self, path: &str) -> bool {
        self.0.iter().rev().find(|(p, _)| p.matches(path)).is_some_and(|(_, keep)| !keep)
    }
}

/// Unpacks all packages below `root`, each from the next of `files`; the result is sorted by
/// package name.
pub fn unpack(debs: &[DebFile], files: &Files, root: &Path, trim: &Trimmer) -> Result<Vec<Unpacked>, String> {
    skeleton(root).map_err(|e| format!("cannot start the tree: {e}"))?;
    let next = AtomicUsize::new(0);
    let results = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        let threads = std::thread::available_parallelism().map_or(2, usize::from).min(8);
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let taken = files.next_for(|| debs.get(next.fetch_add(1, Ordering::Relaxed)));
                    let done = match taken {
                        Ok(Some((info, file))) => Deb::read(file, &info.name, &info.sha256).and_then(|deb| {
                            let name = deb.name.clone();
                            one(deb, info.essential, root, trim).map_err(|e| format!("{name}: {e}"))
                        }),
                        Ok(None) => break,
                        Err(e) => Err(format!("cannot get a package's file: {e}")),
                    };
                    results.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(done);
                }
            });
        }
    });
    let results = results.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut all = results.into_iter().collect::<Result<Vec<_>, _>>()?;
    all.sort_by(|a, b| a.deb.name.cmp(&b.deb.name));
    no_file_twice(&all)?;
    directories(&all, root).map_err(|e| format!("cannot set a folder's owner or mode: {e}"))?;
    Ok(all)
}

/// The merged-/usr links first, so that no thread makes a real `/bin`.
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

/// Threads write in any order, so two packages with one file would give either's.
fn no_file_twice(all: &[Unpacked]) -> Result<(), String> {
    let mut owners: BTreeMap<&str, &str> = BTreeMap::new();
    for package in all {
        for file in &package.files {
            if let Some(other) = owners.insert(file, &package.deb.name) {
                return Err(format!("{other} and {} both have {file}", package.deb.name));
            }
        }
    }
    Ok(())
}

/// A folder of several packages has the owner and mode that the first of them by name says,
/// as dpkg does for the first it unpacks.
fn directories(all: &[Unpacked], root: &Path) -> io::Result<()> {
    let mut first: BTreeMap<&str, (u32, u32, u32)> = BTreeMap::new();
    // base-files owns the tree's frame.
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

fn one(deb: Deb, essential: bool, root: &Path, trim: &Trimmer) -> Result<Unpacked, String> {
    let (mut paths, mut conffiles, mut dirs, mut files) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    data_entries(&deb, |path, entry| {
        paths.push(path.to_owned());
        let header = entry.header();
        let kind = header.entry_type();
        let number = |n: io::Result<u64>| n.map(|n| u32::try_from(n).unwrap_or(0)).map_err(|e| e.to_string());
        let (mode, uid, gid) =
            (header.mode().map_err(|e| e.to_string())?, number(header.uid())?, number(header.gid())?);
        let full = root.join(&path[1..]);
        let told = |e: io::Error| format!("{path}: {e}");
        if kind.is_dir() {
            fs::create_dir_all(&full).map_err(told)?;
            dirs.push((path.to_owned(), mode, uid, gid));
            return Ok(());
        }
        if trim.drops(path) {
            return Ok(());
        }
        if let Some(parent) = full.parent() {
            fs::create_dir_all(parent).map_err(told)?;
        }
        if kind.is_symlink() {
            let target = entry.link_name_bytes().ok_or("a link without a target")?.into_owned();
            let target = String::from_utf8(target).map_err(|_| "a link's target is not UTF-8")?;
            match symlink(&target, &full) {
                Err(e)
                    if e.kind() == io::ErrorKind::AlreadyExists
                        && fs::read_link(&full).is_ok_and(|t| t.to_str() == Some(&target)) =>
                {
                    return Ok(());
                }
                done => done.map_err(told)?,
            }
            lchown(&full, Some(uid), Some(gid)).map_err(told)?;
        } else if kind.is_hard_link() {
            let target = entry.link_name_bytes().ok_or("a link without a target")?.into_owned();
            let target = String::from_utf8(target).map_err(|_| "a link's target is not UTF-8")?;
            let target = target.trim_start_matches("./").trim_start_matches('/');
            // A link to a file that was trimmed goes with it.
            if !trim.drops(&format!("/{target}")) {
                fs::hard_link(root.join(target), &full).map_err(told)?;
            }
        } else if kind.is_file() {
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&full).map_err(told)?;
            if deb.conffiles.iter().any(|c| c == path) {
                let mut content = Vec::new();
                io::Read::read_to_end(entry, &mut content).map_err(told)?;
                conffiles.push((path.to_owned(), hex(&Md5::digest(&content))));
                file.write_all(&content).map_err(told)?;
            } else {
                io::copy(entry, &mut file).map_err(told)?;
            }
            if (uid, gid) != (0, 0) {
                fchown(&file, Some(uid), Some(gid)).map_err(told)?;
            }
            file.set_permissions(Permissions::from_mode(mode & 0o7777)).map_err(told)?;
        } else {
            return Err(format!("{path} is a device or a pipe, which no image holds"));
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
    fn the_last_rule_that_matches_decides() {
        let rule = |pattern: &str, keep| Rule { pattern: pattern.to_owned(), keep };
        let trim = Trimmer::new(&[rule("/usr/share/doc/*", false), rule("/usr/share/doc/*/copyright", true)]).unwrap();
        assert!(trim.drops("/usr/share/doc/x/changelog.gz"));
        assert!(!trim.drops("/usr/share/doc/x/copyright"));
        assert!(!trim.drops("/usr/bin/x"));
    }
}
