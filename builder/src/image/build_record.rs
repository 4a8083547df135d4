//! Records an image's inputs, to skip a build without changes and to print what changed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::time::UNIX_EPOCH;

use serde::{Deserialize, Serialize};

use crate::assemble::secure_boot::Signer;
use crate::error::{Error, Result};
use crate::image::Build;
use crate::image::node_programs::AGENT;
use crate::project::ImageSpec;
use crate::util::digest::sha256;

/// Inputs and outputs of a finished build: `stamp.json`, beside the image.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct BuildRecord {
    /// Digest of each input, by a name that `-v` prints.
    pub(super) inputs: BTreeMap<String, String>,
    /// Name, size in bytes and modification time in nanoseconds of each output file.
    pub(super) outputs: Vec<(String, u64, u64)>,
}

impl Build<'_> {
    /// Returns the digest of everything that the image depends on, by name.
    pub(super) fn inputs(
        &self,
        recipe: &ImageSpec,
        programs: &BTreeMap<String, Vec<u8>>,
    ) -> Result<BTreeMap<String, String>> {
        let mut inputs = BTreeMap::from([
            ("bakehouse itself".to_owned(), env!("CODE_ALL").to_owned()),
            ("bakehouse.lock".to_owned(), self.lock.digest.clone()),
            ("fleet.toml".to_owned(), sha256(format!("{:?} {recipe:?}", self.project.topology).as_bytes())),
            ("--revision".to_owned(), self.revision.unwrap_or_default().to_owned()),
        ]);
        for (name, program) in programs {
            let input = if name == AGENT { "the agent".to_owned() } else { format!("the program {name}") };
            inputs.insert(input, sha256(program));
        }
        let overlays: Vec<String> = recipe.overlays.iter().map(|o| format!("overlays/{o}/")).collect();
        inputs.insert("update key".to_owned(), self.project.update_keyring().map_or_else(String::new, |k| sha256(&k)));
        for (path, bytes) in self.project.files() {
            if path == "profiles/initrd.toml" || overlays.iter().any(|o| path.starts_with(o)) {
                inputs.insert(path.to_owned(), sha256(bytes));
            }
        }
        if let Some(signer) = Signer::for_project(self.project) {
            inputs.insert("the key for Secure Boot".to_owned(), signer.id()?);
        }
        Ok(inputs)
    }

    /// Returns why the image must be built; `None` if it exists and has these inputs.
    pub(super) fn stale(out: &Path, name: &str, inputs: &BTreeMap<String, String>) -> Option<String> {
        let record = fs::read(out.join("stamp.json")).ok().and_then(|b| serde_json::from_slice::<BuildRecord>(&b).ok());
        let Some(record) = record else { return Some("there is no finished build".to_owned()) };
        let all: BTreeSet<&String> = record.inputs.keys().chain(inputs.keys()).collect();
        let changed: Vec<&str> =
            all.into_iter().filter(|k| record.inputs.get(*k) != inputs.get(*k)).map(String::as_str).collect();
        if !changed.is_empty() {
            return Some(format!("changed: {}", changed.join(", ")));
        }
        match outputs(out, name) {
            Ok(found) if found == record.outputs => None,
            _ => Some("its files changed since the last build".to_owned()),
        }
    }
}

/// Returns name, size in bytes and modification time in nanoseconds of each file of an image.
pub(super) fn outputs(out: &Path, name: &str) -> Result<Vec<(String, u64, u64)>> {
    [".raw", ".efi", ".manifest.json", ".spdx.json"]
        .iter()
        .map(|suffix| {
            let path = out.join(format!("{name}{suffix}"));
            let meta = fs::metadata(&path).map_err(Error::io("read", &path))?;
            let time = meta.modified().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok()).map_or(0, |d| d.as_nanos());
            Ok((format!("{name}{suffix}"), meta.len(), u64::try_from(time).unwrap_or(0)))
        })
        .collect()
}
