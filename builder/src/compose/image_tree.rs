//! The tree of an image, in a sandbox: a layer, with what is baked laid over it.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::work::fresh_root;
use super::{Layer, archive, fits_in_memory};
use crate::error;

#[derive(Debug, Serialize, Deserialize)]
pub struct ImageTree {
    /// A folder of ours to work in.
    work: PathBuf,
    /// Work in memory.
    ram: bool,
    layer: PathBuf,
    /// A tar.
    baked: PathBuf,
}

impl ImageTree {
    /// # Errors
    /// The layer in the store is damaged.
    pub fn of(work: &Path, layer: &Layer, baked: &Path) -> error::Result<Self> {
        let ram = fits_in_memory(layer.info()?.bytes);
        Ok(Self { work: work.to_owned(), ram, layer: layer.tar(), baked: baked.to_owned() })
    }

    /// The sandbox's part: lays it out, and has something done below its root.
    ///
    /// # Errors
    /// It can't be laid out.
    pub fn with<T>(&self, then: impl FnOnce(&Path) -> T) -> Result<T, String> {
        let root = fresh_root(&self.work, self.ram)?;
        for tar in [&self.layer, &self.baked] {
            archive::read_onto(tar, &root).map_err(|e| format!("{}: {e}", tar.display()))?;
        }
        let done = then(&root);
        if !self.ram {
            // The files belong to mapped ids: from outside they could not be removed.
            let _ = fs::remove_dir_all(&root);
        }
        Ok(done)
    }
}
