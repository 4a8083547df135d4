//! Whether this node is drained: it has given its work away, and takes none, also after a reboot.
//!
//! The file on the disk decides, and `/run` follows it. So a power cut leaves the node drained or not, and nothing in
//! between: `/run` is empty after it, and the agent applies the file before the roles start.

use std::fs::{self, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tracing::warn;

use super::state::{read_json, sync, write_json};
use crate::error::{Error, Result};

const FILE: &str = "drained.json";
/// File in `/run/bakehouse` that programs of a drained node read.
const MARK: &str = "drained";
/// Metric for the node exporter.
const METRIC: &str = "metrics/drained.prom";

/// A drain of this node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drained {
    version: u16,
    /// Time of the operator's request, in seconds since 1970.
    pub since: u64,
    /// DNS name of the operator's certificate.
    pub by: String,
}

impl Drained {
    const VERSION: u16 = 1;

    /// Makes a drain that begins now.
    #[must_use]
    pub fn now(by: &str) -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        Self { version: Self::VERSION, since, by: by.to_owned() }
    }
}

/// The node's drain, on its disk and in `/run`.
pub struct DrainState {
    path: PathBuf,
    run: PathBuf,
    current: watch::Sender<Option<Drained>>,
}

impl DrainState {
    /// Loads the drain from the folder `state`. `run`: `/run/bakehouse`.
    ///
    /// A file that cannot be read counts as a drain: the operator who drained the node may be repairing it, and the
    /// other nodes have its work.
    #[must_use]
    pub fn load(state: &Path, run: &Path) -> Self {
        let path = state.join(FILE);
        let versions = Drained::VERSION..=Drained::VERSION;
        let current = read_json(&path, &versions, None).unwrap_or_else(|e| {
            warn!("the node counts as drained: {}", e.chain());
            Some(Drained::now(""))
        });
        Self { path, run: run.to_owned(), current: watch::Sender::new(current) }
    }

    /// Returns the drain; `None` if the node is not drained.
    #[must_use]
    pub fn current(&self) -> Option<Drained> {
        self.current.borrow().clone()
    }

    /// Returns a receiver of changes.
    pub(crate) fn changes(&self) -> watch::Receiver<Option<Drained>> {
        self.current.subscribe()
    }

    /// Writes the drain to the disk.
    ///
    /// # Errors
    /// If the file cannot be written. The node is then not drained.
    pub(crate) fn store(&self, drained: Drained) -> Result<()> {
        write_json(&self.path, &drained)?;
        self.current.send_replace(Some(drained));
        Ok(())
    }

    /// Removes the drain from the disk.
    ///
    /// # Errors
    /// If the file cannot be removed. The node is then still drained.
    pub(crate) fn remove(&self) -> Result<()> {
        match fs::remove_file(&self.path) {
            Ok(()) => sync(self.path.parent().unwrap_or(Path::new("/")))?,
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) => return Err(Error::io("remove", &self.path)(e)),
        }
        self.current.send_replace(None);
        Ok(())
    }

    /// Writes the mark and the metric to `/run`, or removes them, as the file on the disk says.
    ///
    /// # Errors
    /// If a file cannot be written or removed.
    pub(crate) fn publish(&self) -> Result<()> {
        let Some(drained) = self.current() else {
            return [MARK, METRIC].into_iter().try_for_each(|name| {
                let path = self.run.join(name);
                match fs::remove_file(&path) {
                    Err(e) if e.kind() != ErrorKind::NotFound => Err(Error::io("remove", &path)(e)),
                    _ => Ok(()),
                }
            });
        };
        let metric = format!(
            "# HELP bakehouse_drained_since_seconds Time at which an operator drained this node.\n\
             # TYPE bakehouse_drained_since_seconds gauge\n\
             bakehouse_drained_since_seconds {}\n",
            drained.since
        );
        self.write(MARK, "")?;
        self.write(METRIC, &metric)
    }

    /// Writes a file that every user may read.
    fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.run.join(name);
        let dir = path.parent().unwrap_or(&self.run);
        fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
        fs::set_permissions(dir, Permissions::from_mode(0o755)).map_err(Error::io("set the mode of", dir))?;
        let beside = path.with_extension("new");
        fs::write(&beside, text).map_err(Error::io("write", &beside))?;
        fs::set_permissions(&beside, Permissions::from_mode(0o644)).map_err(Error::io("set the mode of", &beside))?;
        fs::rename(&beside, &path).map_err(Error::io("rename", &beside))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dirs() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("run");
        (dir, run)
    }

    fn files(run: &Path) -> [bool; 2] {
        [MARK, METRIC].map(|name| run.join(name).exists())
    }

    #[test]
    fn a_drain_outlasts_a_boot_and_its_file_is_private() {
        let (dir, run) = dirs();
        let state = DrainState::load(dir.path(), &run);
        assert_eq!(state.current(), None);
        state.store(Drained::now("anna.operator.operator")).unwrap();
        // A power cut here: the file is on the disk, and /run is empty.
        let again = DrainState::load(dir.path(), &run);
        assert_eq!(again.current(), state.current());
        assert_eq!(files(&run), [false; 2]);
        again.publish().unwrap();
        assert_eq!(files(&run), [true; 2]);
        let mode = |path: PathBuf| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(dir.path().join(FILE)), mode(run.join(MARK)), mode(run.join(METRIC))), (0o600, 0o644, 0o644));
        let metric = fs::read_to_string(run.join(METRIC)).unwrap();
        assert!(metric.ends_with(&format!("_seconds {}\n", state.current().unwrap().since)), "{metric}");
    }

    #[test]
    fn the_mark_goes_after_the_file() {
        let (dir, run) = dirs();
        let state = DrainState::load(dir.path(), &run);
        state.store(Drained::now("")).unwrap();
        state.publish().unwrap();
        state.remove().unwrap();
        // The agent stops here, and starts again: it removes the mark.
        assert_eq!(files(&run), [true; 2]);
        let again = DrainState::load(dir.path(), &run);
        again.publish().unwrap();
        assert_eq!((again.current(), files(&run)), (None, [false; 2]));
        again.remove().unwrap();
        again.publish().unwrap();
    }

    #[test]
    fn a_damaged_or_newer_file_counts_as_a_drain() {
        let (dir, run) = dirs();
        for text in ["", "{", "{\"version\":9}", "{\"version\":1}"] {
            fs::write(dir.path().join(FILE), text).unwrap();
            assert!(DrainState::load(dir.path(), &run).current().is_some(), "{text}");
        }
        // A field of a later version.
        fs::write(dir.path().join(FILE), r#"{"version":1,"since":7,"by":"a","later":1}"#).unwrap();
        assert_eq!(DrainState::load(dir.path(), &run).current().unwrap().since, 7);
        fs::write(dir.path().join("drained.new"), "{\"ver").unwrap();
        assert_eq!(DrainState::load(dir.path(), &run).current().unwrap().by, "a");
        let state = DrainState::load(dir.path(), &run);
        state.remove().unwrap();
        assert_eq!(DrainState::load(dir.path(), &run).current(), None);
    }
}
