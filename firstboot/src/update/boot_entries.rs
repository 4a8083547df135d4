//! The boot loader's entries: files `ID_VERSION.efi` on the EFI partition, with `+LEFT-DONE` before the suffix while
//! the boot loader counts their tries ([boot counting](https://systemd.io/AUTOMATIC_BOOT_ASSESSMENT)).

use std::fs;
use std::path::Path;

use fleet::compare_versions;

use crate::error::{Error, Result};

/// Folder of the entries, below the EFI partition.
pub const ENTRIES: &str = "EFI/Linux";

/// One image's entry.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    version: String,
    /// Tries left; `None` for a blessed entry.
    left: Option<u32>,
}

impl Entry {
    fn new((version, left): (&str, Option<u32>)) -> Self {
        Self { version: version.to_owned(), left }
    }
}

/// Entries of one image id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Boots(Vec<Entry>);

impl Boots {
    /// Reads the entries of the image `id` in the folder `dir`.
    ///
    /// # Errors
    /// If the folder cannot be read.
    pub fn read(dir: &Path, id: &str) -> Result<Self> {
        let names = fs::read_dir(dir).map_err(Error::io("read", dir))?;
        let names: std::io::Result<Vec<_>> = names.map(|e| Ok(e?.file_name())).collect();
        let names = names.map_err(Error::io("read", dir))?;
        Ok(Self(names.iter().filter_map(|n| split(n.to_str()?, id)).map(Entry::new).collect()))
    }

    /// Returns whether the entry of this version is blessed.
    #[must_use]
    pub fn is_blessed(&self, version: &str) -> bool {
        self.0.iter().any(|e| e.version == version && e.left.is_none())
    }

    /// Returns a newer version than the running one with no tries left.
    #[must_use]
    pub fn failed(&self, running: &str) -> Option<&str> {
        self.newer(running, |left| left == Some(0))
    }

    /// Returns a newer version than the running one that the next boot starts.
    #[must_use]
    pub fn pending(&self, running: &str) -> Option<&str> {
        self.newer(running, |left| left != Some(0))
    }

    /// Returns a newer version than the running one that is not blessed and has tries left.
    #[must_use]
    pub fn waiting(&self, running: &str) -> Option<&str> {
        self.newer(running, |left| left.is_some_and(|left| left > 0))
    }

    /// Removes the entries of newer versions that have tries left, so that they are downloaded again.
    ///
    /// # Errors
    /// If the EFI partition cannot be written.
    pub fn forget_pending(dir: &Path, id: &str, running: &str) -> Result<()> {
        for entry in fs::read_dir(dir).map_err(Error::io("read", dir))? {
            let path = entry.map_err(Error::io("read", dir))?.path();
            let name = path.file_name().and_then(|n| n.to_str()).and_then(|name| split(name, id));
            let pending = name.filter(|(version, left)| {
                left.is_some_and(|left| left > 0) && compare_versions(version, running).is_gt()
            });
            if pending.is_some() {
                fs::remove_file(&path).map_err(Error::io("remove", &path))?;
            }
        }
        Ok(())
    }

    /// Returns whether the boot loader can start another version.
    #[must_use]
    pub fn has_another(&self, running: &str) -> bool {
        self.0.iter().any(|e| e.version != running && e.left != Some(0))
    }

    fn newer(&self, running: &str, is: impl Fn(Option<u32>) -> bool) -> Option<&str> {
        let found = self.0.iter().filter(|e| is(e.left)).map(|e| e.version.as_str());
        found.filter(|v| compare_versions(v, running).is_gt()).max_by(|a, b| compare_versions(a, b))
    }
}

/// Parses a file name into version and tries left; `None` if it is not an entry of the image `id`.
pub(crate) fn split<'a>(name: &'a str, id: &str) -> Option<(&'a str, Option<u32>)> {
    let rest = name.strip_prefix(id)?.strip_prefix('_')?.strip_suffix(".efi")?;
    let Some((version, tries)) = rest.split_once('+') else {
        return Some((rest, None));
    };
    Some((version, Some(tries.split('-').next()?.parse().ok()?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn boots(names: &[&str]) -> Boots {
        let dir = tempfile::tempdir().unwrap();
        for name in names {
            fs::write(dir.path().join(name), b"").unwrap();
        }
        Boots::read(dir.path(), "acme-db").unwrap()
    }

    #[test]
    fn reads_the_state_of_each_version_from_names() {
        assert_eq!(boots(&["acme-db_1.efi", "acme-db_2.efi"]).waiting("1"), None);
        let fresh = boots(&["acme-db_1.efi", "acme-db_2+3.efi"]);
        assert_eq!(fresh.waiting("1"), Some("2"));
        assert_eq!((fresh.pending("1"), fresh.failed("1")), (Some("2"), None));
        let tried = boots(&["acme-db_1.efi", "acme-db_2+1-2.efi"]);
        assert!(tried.is_blessed("1") && !tried.is_blessed("2"));
        // The running version is never pending or failed.
        assert_eq!((tried.pending("2"), tried.failed("2")), (None, None));
        assert!(tried.has_another("2") && !boots(&["acme-db_1+2-1.efi"]).has_another("1"));
        let failed = boots(&["acme-db_1.efi", "acme-db_2+0-3.efi"]);
        assert!(!failed.has_another("1"));
        assert_eq!((failed.pending("1"), failed.failed("1")), (None, Some("2")));
        let over = boots(&["acme-db_1.efi", "acme-db_2.efi", "acme-hub_9.efi", "else.efi", "acme-db_3+x.efi"]);
        assert_eq!((over.pending("2"), over.failed("2"), over.is_blessed("2")), (None, None, true));
    }

    #[test]
    fn removes_only_entries_with_tries_left() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["acme-db_1.efi", "acme-db_2.efi", "acme-db_3+0-3.efi", "acme-db_4+3-0.efi", "acme-hub_4+3-0.efi"] {
            fs::write(dir.path().join(name), b"").unwrap();
        }
        Boots::forget_pending(dir.path(), "acme-db", "2").unwrap();
        let boots = Boots::read(dir.path(), "acme-db").unwrap();
        assert_eq!((boots.waiting("2"), boots.failed("2"), boots.0.len()), (None, Some("3"), 3));
        assert!(dir.path().join("acme-hub_4+3-0.efi").exists());
    }

    proptest::proptest! {
        #[test]
        fn arbitrary_names_do_not_panic(name: String, rest: String) {
            let _ = split(&name, "acme-db");
            let _ = split(&format!("acme-db_{rest}.efi"), "acme-db");
        }
    }
}
