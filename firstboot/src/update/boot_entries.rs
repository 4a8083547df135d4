//! The images that this machine's boot loader knows, by the names of their files on the EFI
//! partition: `ID_VERSION.efi`, and `+LEFT-DONE` before the suffix while its tries are counted.

use std::fs;
use std::path::Path;

use fleet::compare_versions;

use crate::error::{Error, Result};

/// Where they are, below the EFI partition.
pub const ENTRIES: &str = "EFI/Linux";

/// One image's entry.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    version: String,
    /// Tries it has left; none where it has proven itself.
    left: Option<u32>,
}

impl Entry {
    fn of((version, left): (&str, Option<u32>)) -> Self {
        Self { version: version.to_owned(), left }
    }
}

/// Entries of one image id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Boots(Vec<Entry>);

impl Boots {
    /// # Errors
    /// The EFI partition can't be read.
    pub fn read(dir: &Path, id: &str) -> Result<Self> {
        let names = fs::read_dir(dir).map_err(Error::io("read", dir))?;
        let names: std::io::Result<Vec<_>> = names.map(|e| Ok(e?.file_name())).collect();
        let names = names.map_err(Error::io("read", dir))?;
        Ok(Self(names.iter().filter_map(|n| split(n.to_str()?, id)).map(Entry::of).collect()))
    }

    /// Whether this version has proven itself.
    #[must_use]
    pub fn is_blessed(&self, version: &str) -> bool {
        self.0.iter().any(|e| e.version == version && e.left.is_none())
    }

    /// A newer version than the one that runs, whose tries are used up.
    #[must_use]
    pub fn failed(&self, running: &str) -> Option<&str> {
        self.newer(running, |left| left == Some(0))
    }

    /// A newer version than the one that runs, which the next boot takes.
    #[must_use]
    pub fn pending(&self, running: &str) -> Option<&str> {
        self.newer(running, |left| left != Some(0))
    }

    /// A newer version whose tries are counted, and are not used up.
    #[must_use]
    pub fn waiting(&self, running: &str) -> Option<&str> {
        self.newer(running, |left| left.is_some_and(|left| left > 0))
    }

    /// Takes newer versions' entries away that have tries left: they are loaded again.
    ///
    /// # Errors
    /// The EFI partition can't be written.
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

    /// Whether there is another version that the boot loader may choose.
    #[must_use]
    pub fn has_another(&self, running: &str) -> bool {
        self.0.iter().any(|e| e.version != running && e.left != Some(0))
    }

    fn newer(&self, running: &str, is: impl Fn(Option<u32>) -> bool) -> Option<&str> {
        let found = self.0.iter().filter(|e| is(e.left)).map(|e| e.version.as_str());
        found.filter(|v| compare_versions(v, running).is_gt()).max_by(|a, b| compare_versions(a, b))
    }
}

/// Version and tries left by a file's name, if it is an entry of this image.
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
    fn names_tell_what_became_of_each_version() {
        assert_eq!(boots(&["acme-db_1.efi", "acme-db_2.efi"]).waiting("1"), None);
        let fresh = boots(&["acme-db_1.efi", "acme-db_2+3.efi"]);
        assert_eq!(fresh.waiting("1"), Some("2"));
        assert_eq!((fresh.pending("1"), fresh.failed("1")), (Some("2"), None));
        let tried = boots(&["acme-db_1.efi", "acme-db_2+1-2.efi"]);
        assert!(tried.is_blessed("1") && !tried.is_blessed("2"));
        // It runs, and its time is not over.
        assert_eq!((tried.pending("2"), tried.failed("2")), (None, None));
        assert!(tried.has_another("2") && !boots(&["acme-db_1+2-1.efi"]).has_another("1"));
        let failed = boots(&["acme-db_1.efi", "acme-db_2+0-3.efi"]);
        assert!(!failed.has_another("1"));
        assert_eq!((failed.pending("1"), failed.failed("1")), (None, Some("2")));
        let over = boots(&["acme-db_1.efi", "acme-db_2.efi", "acme-hub_9.efi", "else.efi", "acme-db_3+x.efi"]);
        assert_eq!((over.pending("2"), over.failed("2"), over.is_blessed("2")), (None, None, true));
    }

    #[test]
    fn only_what_waits_is_forgotten() {
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
        fn no_name_panics(name: String, rest: String) {
            let _ = split(&name, "acme-db");
            let _ = split(&format!("acme-db_{rest}.efi"), "acme-db");
        }
    }
}
