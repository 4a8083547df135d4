//! The tree of an image, in a sandbox: a layer, with what is baked laid over it.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::archive;
use super::layer::Layer;
use crate::error;
use crate::sandbox::tree_root::{Room, Runner, with_tree};
use crate::sandbox::{Files, HostFile};

#[derive(Debug, Serialize, Deserialize)]
pub struct ImageTree {
    room: Room,
    layer: PathBuf,
    /// A tar.
    baked: PathBuf,
}

impl ImageTree {
    /// # Errors
    /// The layer in the store is damaged.
    pub fn of(layer: &Layer, baked: &Path) -> error::Result<Self> {
        Ok(Self { room: Room::for_tree(layer.info()?.bytes), layer: layer.tar(), baked: baked.to_owned() })
    }

    /// The files that a sandbox with this tree needs first.
    #[must_use]
    pub fn host_files(&self) -> Vec<HostFile> {
        vec![HostFile::Read(self.layer.clone()), HostFile::Read(self.baked.clone())]
    }

    /// The sandbox's part: lays it out, and calls `then` in a thread whose `/` is the tree.
    ///
    /// # Errors
    /// It can't be laid out, or `then`'s own.
    pub fn with<T: Send>(
        &self,
        files: &Files,
        then: impl FnOnce(&Path, &Runner) -> Result<T, String> + Send,
    ) -> Result<T, String> {
        with_tree(self.room, |root, runner| {
            for tar in [&self.layer, &self.baked] {
                files
                    .next()
                    .and_then(|file| archive::read_onto(file, root))
                    .map_err(|e| format!("{}: {e}", tar.display()))?;
            }
            then(root, runner)
        })
    }
}
