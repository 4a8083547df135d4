//! The tree of an image in a sandbox: a layer, and the baked files over it.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::archive;
use super::layer::Layer;
use crate::error::{Error, Result};
use crate::sandbox::tree_root::{Room, Runner, with_tree};
use crate::sandbox::{Files, HostFile};

/// The tars of an image's tree.
#[derive(Debug, Serialize, Deserialize)]
pub struct ImageTree {
    room: Room,
    layer: PathBuf,
    baked: PathBuf,
}

impl ImageTree {
    /// The tree of a layer and a tar of baked files.
    ///
    /// # Errors
    /// If the layer in the store is damaged.
    pub fn new(layer: &Layer, baked: &Path) -> Result<Self> {
        Ok(Self { room: Room::for_tree(layer.info()?.bytes), layer: layer.tar(), baked: baked.to_owned() })
    }

    /// Returns the first files that a sandbox with this tree needs.
    #[must_use]
    pub fn host_files(&self) -> Vec<HostFile> {
        vec![HostFile::Read(self.layer.clone()), HostFile::Read(self.baked.clone())]
    }

    /// Runs in the sandbox: unpacks the tree, and calls `then` in a thread whose `/` is the tree.
    ///
    /// # Errors
    /// If a tar cannot be unpacked, or `then` fails.
    pub fn with<T: Send>(&self, files: &Files, then: impl FnOnce(&Path, &Runner) -> Result<T> + Send) -> Result<T> {
        with_tree(self.room, |root, runner| {
            for tar in [&self.layer, &self.baked] {
                files
                    .next()
                    .and_then(|file| archive::read_onto(file, root))
                    .map_err(Error::at(tar.display().to_string()))?;
            }
            then(root, runner)
        })
    }
}
