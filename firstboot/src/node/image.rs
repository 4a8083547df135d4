//! Data of the image: the fleet's topology, and the image's name, version, group and roles.

use std::fs;
use std::path::Path;

use fleet::Topology;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, Result};

/// `image.json`, baked by the builder.
#[derive(Clone, Debug, Deserialize)]
pub struct ImageInfo {
    /// Name of the image, `FLEET-GROUP`.
    pub id: String,
    /// Version of the image.
    pub version: String,
    /// Group of the image.
    pub group: String,
    /// Roles of the image.
    pub roles: Vec<String>,
    /// Units that must run for the image to be good.
    pub health: Vec<String>,
}

/// Data of the image.
#[derive(Clone, Debug)]
pub struct Image {
    /// Content of `image.json`.
    pub info: ImageInfo,
    /// Content of `fleet.json`.
    pub topology: Topology,
}

impl Image {
    /// Reads `fleet.json` and `image.json` below `dir`.
    ///
    /// # Errors
    /// If a file cannot be read, or has another format.
    pub fn read(dir: &Path) -> Result<Self> {
        Ok(Self { info: json(&dir.join("image.json"))?, topology: json(&dir.join("fleet.json"))? })
    }
}

fn json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let bytes = fs::read(path).map_err(Error::io("read", path))?;
    serde_json::from_slice(&bytes).map_err(|e| Error::Unusable {
        path: path.to_owned(),
        fix: "build the image again",
        source: e.into(),
    })
}
