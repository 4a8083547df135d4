//! The store: a cache on disk. The name of an entry is the digest of its content (packages) or of all its inputs
//! (layers, trees, images).
//!
//! The builder writes an entry to a scratch path, syncs it and renames it. No process therefore sees an incomplete
//! entry, even after a power cut. Builds that create the same entry wait for each other on a lock file.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::error::{Error, Result};

/// The store's folder.
#[derive(Clone, Debug)]
pub struct Store {
    root: PathBuf,
    /// Each process holds a shared lock on this file, so that [`Store::gc`] removes no entry in use.
    used: Arc<File>,
}

/// Kinds of entries. Each kind has a folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A package file.
    Deb,
    /// A Python package's file.
    Wheel,
    /// The tree of an image.
    Layer,
    /// The unpacked tools.
    Tools,
    /// The file system of a tree.
    Erofs,
    /// An initrd.
    Initrd,
    /// A daemon's approval of a configuration; the file is empty.
    Check,
    /// A file of a `[[make]]` table.
    GeneratedFile,
    /// apt's lists.
    Apt,
}

impl Kind {
    const ALL: [Self; 9] = [
        Self::Deb,
        Self::Wheel,
        Self::Layer,
        Self::Tools,
        Self::Erofs,
        Self::Initrd,
        Self::Check,
        Self::GeneratedFile,
        Self::Apt,
    ];

    fn folder(self) -> &'static str {
        match self {
            Self::Deb => "debs",
            Self::Wheel => "wheels",
            Self::Layer => "layers",
            Self::Tools => "tools",
            Self::Erofs => "erofs",
            Self::Initrd => "initrd",
            Self::Check => "checks",
            Self::GeneratedFile => "made",
            Self::Apt => "apt",
        }
    }
}

/// The lock of an entry. The kernel releases it when the process ends.
pub struct Guard(#[allow(dead_code)] File);

impl Store {
    /// Opens the store: `$BAKEHOUSE_STORE`, else `bakehouse` in the user's cache folder.
    ///
    /// # Errors
    /// If neither variable is set, or the folder cannot be created.
    pub fn open() -> Result<Self> {
        let var = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let root = var("BAKEHOUSE_STORE")
            .or_else(|| var("XDG_CACHE_HOME").map(|d| d.join("bakehouse")))
            .or_else(|| var("HOME").map(|d| d.join(".cache/bakehouse")))
            .ok_or_else(|| {
                Error::Usage("BAKEHOUSE_STORE and HOME are not set; set BAKEHOUSE_STORE to a folder".to_owned())
            })?;
        Self::at(&root)
    }

    /// Opens the store in a given folder.
    ///
    /// # Errors
    /// If the folder cannot be created or locked.
    pub fn at(root: &Path) -> Result<Self> {
        for folder in Kind::ALL.map(Kind::folder).into_iter().chain(["locks", "tmp"]) {
            let path = root.join(folder);
            fs::create_dir_all(&path).map_err(Error::io("create", &path))?;
        }
        let root = root.canonicalize().map_err(Error::io("open", root))?;
        let path = root.join("in-use");
        let used = File::create(&path).map_err(Error::io("open", &path))?;
        used.lock_shared().map_err(Error::io("lock", &path))?;
        Ok(Self { root, used: Arc::new(used) })
    }

    /// Returns the store's folder.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Whether the store has the package with this hash.
    #[must_use]
    pub fn has_deb(&self, sha256: &str) -> bool {
        self.get(Kind::Deb, sha256).is_some()
    }

    /// Returns the path of an entry, whether it exists or not.
    #[must_use]
    pub fn path(&self, kind: Kind, key: &str) -> PathBuf {
        self.root.join(kind.folder()).join(key)
    }

    /// Returns the path of an existing entry, and marks the entry as used.
    #[must_use]
    pub fn get(&self, kind: Kind, key: &str) -> Option<PathBuf> {
        let path = self.path(kind, key);
        path.exists().then(|| {
            // `store gc` reads this time. A store on a read-only disk remains usable.
            let _ = File::open(&path).and_then(|f| f.set_modified(SystemTime::now()));
            path
        })
    }

    /// Returns a path to write to before [`Store::put`], on the same file system as the entries.
    #[must_use]
    pub fn scratch(&self, kind: Kind, key: &str) -> PathBuf {
        self.root.join("tmp").join(format!("{}-{}.{}", kind.folder(), key, std::process::id()))
    }

    /// Moves a complete file or folder to its path in the store.
    ///
    /// # Errors
    /// If the file cannot be synced or renamed.
    pub fn put(&self, kind: Kind, key: &str, scratch: &Path) -> Result<PathBuf> {
        let path = self.path(kind, key);
        if scratch.is_file() {
            File::open(scratch).and_then(|f| f.sync_data()).map_err(Error::io("sync", scratch))?;
        }
        match fs::rename(scratch, &path) {
            Ok(()) => Ok(path),
            // Another build was first. Its folder has the same content.
            Err(_) if path.is_dir() => {
                let _ = fs::remove_dir_all(scratch);
                Ok(path)
            }
            Err(e) => Err(Error::io("rename", scratch)(e)),
        }
    }

    /// Locks an entry. Waits while another build creates it.
    ///
    /// # Errors
    /// If the lock file cannot be opened or locked.
    pub fn lock(&self, kind: Kind, key: &str) -> Result<Guard> {
        let path = self.root.join("locks").join(format!("{}-{key}", kind.folder()));
        let file = File::create(&path).map_err(Error::io("open", &path))?;
        file.lock().map_err(Error::io("lock", &path))?;
        Ok(Guard(file))
    }

    /// Removes entries that no build has used for `age`. Returns the number of removed entries and bytes.
    ///
    /// # Errors
    /// If another process uses the store, or an entry cannot be listed or removed.
    pub fn gc(&self, age: Duration) -> Result<(usize, u64)> {
        self.used.unlock().and_then(|()| self.used.try_lock().map_err(io::Error::from)).map_err(|_| {
            Error::Failed(format!(
                "another bakehouse uses the store {}; try again when it has finished",
                self.root.display()
            ))
        })?;
        let limit = SystemTime::now().checked_sub(age).unwrap_or(SystemTime::UNIX_EPOCH);
        let (mut count, mut bytes) = (0, 0);
        for folder in Kind::ALL.map(Kind::folder).into_iter().chain(["tmp", "locks"]) {
            let folder = self.root.join(folder);
            for entry in fs::read_dir(&folder).map_err(Error::io("list", &folder))? {
                let path = entry.map_err(Error::io("list", &folder))?.path();
                let Ok(meta) = path.symlink_metadata() else { continue };
                if meta.modified().is_ok_and(|t| t > limit) {
                    continue;
                }
                bytes += size_of_tree(&path);
                count += 1;
                let removed = if meta.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
                match removed {
                    Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(Error::io("remove", &path)(e)),
                    _ => {}
                }
            }
        }
        Ok((count, bytes))
    }
}

fn size_of_tree(path: &Path) -> u64 {
    walkdir::WalkDir::new(path).into_iter().flatten().filter_map(|e| e.metadata().ok()).map(|m| m.len()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gc_removes_old_entries_only() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::at(dir.path()).unwrap();
        assert!(store.get(Kind::Deb, "a").is_none());
        let scratch = store.scratch(Kind::Deb, "a");
        fs::write(&scratch, "x").unwrap();
        store.put(Kind::Deb, "a", &scratch).unwrap();
        assert!(store.get(Kind::Deb, "a").is_some());
        assert_eq!(store.gc(Duration::from_hours(1)).unwrap(), (0, 0));
        assert_eq!(store.gc(Duration::ZERO).unwrap().1, 1);
        assert!(store.get(Kind::Deb, "a").is_none());
    }

    #[test]
    fn gc_fails_while_the_store_is_in_use() {
        let dir = tempfile::tempdir().unwrap();
        let (in_use, store) = (Store::at(dir.path()).unwrap(), Store::at(dir.path()).unwrap());
        assert!(store.gc(Duration::ZERO).unwrap_err().to_string().contains("another bakehouse"));
        drop(in_use);
        store.gc(Duration::ZERO).unwrap();
    }

    #[test]
    fn lock_excludes_other_builds() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::at(dir.path()).unwrap();
        let guard = store.lock(Kind::Layer, "k").unwrap();
        let (send, receive) = std::sync::mpsc::channel();
        let other = store.clone();
        std::thread::spawn(move || {
            let _guard = other.lock(Kind::Layer, "k").unwrap();
            send.send(()).unwrap();
        });
        assert!(receive.recv_timeout(Duration::from_millis(100)).is_err());
        drop(guard);
        receive.recv_timeout(Duration::from_secs(10)).unwrap();
    }
}
