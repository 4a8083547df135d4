//! Finished layers in the store.

use std::fs;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Properties of a finished layer: `layer.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LayerInfo {
    /// Version of the kernel, as `uname -r` prints it.
    pub kernel: String,
    /// Size of all files in bytes.
    pub bytes: u64,
    /// Number of files.
    pub files: u64,
}

/// A finished layer in the store.
#[derive(Clone, Debug)]
pub struct Layer {
    /// Key in the store: a digest of all inputs.
    pub key: String,
    /// Folder in the store.
    pub dir: PathBuf,
}

impl Layer {
    /// Returns the path of the tree's tar.
    #[must_use]
    pub fn tar(&self) -> PathBuf {
        self.dir.join("root.tar")
    }

    /// Returns the path of the kernel.
    #[must_use]
    pub fn kernel(&self) -> PathBuf {
        self.dir.join("vmlinuz")
    }

    /// Reads the layer's properties.
    ///
    /// # Errors
    /// If the file cannot be read or parsed.
    pub fn info(&self) -> Result<LayerInfo> {
        let path = self.dir.join("layer.json");
        let bytes = fs::read(&path).map_err(Error::io("read", &path))?;
        serde_json::from_slice(&bytes).map_err(Error::damaged(&path, "run `bakehouse store gc --older-than 0`"))
    }
}
