//! A finished layer in the store.

use std::fs;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// What a finished layer says of itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LayerInfo {
    /// `uname -r` of the kernel in it.
    pub kernel: String,
    /// Bytes of all files.
    pub bytes: u64,
    pub files: u64,
}

/// A finished layer in the store.
#[derive(Clone, Debug)]
pub struct Layer {
    pub key: String,
    pub dir: PathBuf,
}

impl Layer {
    #[must_use]
    pub fn tar(&self) -> PathBuf {
        self.dir.join("root.tar")
    }

    #[must_use]
    pub fn kernel(&self) -> PathBuf {
        self.dir.join("vmlinuz")
    }

    /// # Errors
    /// The store is damaged.
    pub fn info(&self) -> Result<LayerInfo> {
        let path = self.dir.join("layer.json");
        let bytes = fs::read(&path).map_err(Error::io("read", &path))?;
        serde_json::from_slice(&bytes).map_err(|e| {
            Error::Failed(format!("{} is damaged ({e}); run `bakehouse store gc --older-than 0`", path.display()))
        })
    }
}
