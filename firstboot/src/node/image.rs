//! What the image knows: the fleet's plan, and what this image is.

use std::fs;
use std::path::Path;

use fleet::Topology;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, Result};

/// `image.json`, baked by the builder.
#[derive(Clone, Debug, Deserialize)]
pub struct ImageInfo {
    pub id: String,
    pub version: String,
    pub group: String,
    pub roles: Vec<String>,
    /// Units that run where all is well.
    pub health: Vec<String>,
}

/// Everything read from the image.
#[derive(Clone, Debug)]
pub struct Image {
    pub info: ImageInfo,
    pub topology: Topology,
}

impl Image {
    /// Reads `fleet.json` and `image.json` below `dir`.
    ///
    /// # Errors
    /// The image is damaged.
    pub fn read(dir: &Path) -> Result<Self> {
        Ok(Self { info: json(&dir.join("image.json"))?, topology: json(&dir.join("fleet.json"))? })
    }
}

fn json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let bytes = fs::read(path).map_err(Error::io("read", path))?;
    serde_json::from_slice(&bytes).map_err(|e| {
        Error::Configuration(format!("{} is not what this agent reads: {e}; rebuild the image", path.display()))
    })
}
