//! Writes an image's files: disk, UKI, manifest, SBOM, checksums and build record.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crate::assemble::layout::{PartitionSizes, image_id};
use crate::assemble::manifest::{Manifest, Sizes, package_list, settings};
use crate::assemble::spdx::spdx;
use crate::bake::{Baked, Content, Entry};
use crate::error::{Error, Result};
use crate::image::Build;
use crate::image::build_record::{BuildRecord, outputs};
use crate::image::parts::{Assembled, Parts};
use crate::project::ImageSpec;
use crate::util::digest::sha256;
use crate::util::fs::write_atomic;
use crate::util::json::pretty_json;

/// Path of the list of add-ons in an image.
const ADDONS: &str = "usr/share/bakehouse/addons.json";

/// Folder, names and contents of an image's files.
pub(super) struct Output<'a> {
    /// Folder of the group's images.
    pub(super) dir: &'a Path,
    /// Prefix of the files' names: image and version.
    pub(super) name: &'a str,
    pub(super) spec: &'a ImageSpec,
    pub(super) sizes: PartitionSizes,
    /// Digest of each input of the build.
    pub(super) inputs: BTreeMap<String, String>,
}

impl Build<'_> {
    /// Gives the files of a build their final names. The build record is written last.
    pub(super) fn write(&self, output: Output, parts: &Parts, assembled: &Assembled) -> Result<()> {
        let Output { dir, name, .. } = output;
        let Assembled { disk, uki } = assembled;
        let manifest = self.manifest(&output, parts, uki.len() as u64)?;
        let topology = &self.project.topology;
        let packages = self.lock.packages_of(&output.spec.group, false);
        let wheels = self.lock.wheels_of(&output.spec.group);
        let id = image_id(self.project, &output.spec.group);
        let sbom = spdx(&id, &topology.version, self.lock.epoch, &packages, &wheels)?;
        let files = [(".efi", uki), (".manifest.json", &manifest), (".spdx.json", &sbom)];
        let sums: String = files.iter().map(|(suffix, bytes)| format!("{}  {name}{suffix}\n", sha256(bytes))).collect();
        // An image has no build record while its files change, so that an interrupted build does not look finished.
        let _ = fs::remove_file(dir.join("stamp.json"));
        for (suffix, bytes) in files {
            write_atomic(&dir.join(format!("{name}{suffix}")), bytes)?;
        }
        write_atomic(&dir.join("SHA256SUMS"), sums.as_bytes())?;
        fs::rename(disk, dir.join(format!("{name}.raw"))).map_err(Error::io("rename", disk))?;
        let record = BuildRecord { outputs: outputs(dir, name)?, inputs: output.inputs };
        write_atomic(&dir.join("stamp.json"), &pretty_json(&record)?)
    }

    fn manifest(&self, output: &Output, parts: &Parts, uki: u64) -> Result<Vec<u8>> {
        let Output { spec, sizes, inputs, .. } = output;
        let topology = &self.project.topology;
        let nodes = topology.nodes.iter().filter(|n| n.group == spec.group);
        let manifest = Manifest {
            format: 1,
            id: &image_id(self.project, &spec.group),
            version: &topology.version,
            fleet: &topology.name,
            group: &spec.group,
            roles: &spec.roles,
            revision: self.revision,
            bakehouse: env!("CARGO_PKG_VERSION"),
            lock: &inputs["bakehouse.lock"],
            kernel: &parts.info.kernel,
            roothash: &parts.root.hash,
            sizes: Sizes {
                disk: sizes.disk(),
                root_slot: sizes.root,
                root: parts.root.size,
                uki,
                tree: parts.info.bytes,
            },
            agent: &inputs["the agent"],
            packages: package_list(&self.lock.packages_of(&spec.group, false), &self.lock.wheels_of(&spec.group)),
            files: parts.baked.entries.iter().map(|(path, entry)| (path.as_str(), entry.sum())).collect(),
            nodes: nodes.map(|n| (n.name.as_str(), n.address)).collect(),
            hubs: topology.hubs.iter().map(|hub| hub.name.as_str()).collect(),
            voters: topology.voters.iter().map(String::as_str).collect(),
            state: fleet::STATE_VERSION,
            mesh: topology.mesh.subnet.to_string(),
            migrations: parts.baked.migrations.iter().map(|m| m.name.as_str()).collect(),
            settings: settings(topology),
            addons: addons(&parts.baked)?,
            restore: topology.backup.restore.as_deref().filter(|_| spec.roles.iter().any(|r| r == "db")),
        };
        pretty_json(&manifest)
    }
}

/// Reads the list of add-ons in an image, which the overlay `odoo` generates; `None` without Odoo.
fn addons(baked: &Baked) -> Result<Option<BTreeMap<String, String>>> {
    let Some(Entry { content: Content::File(bytes), .. }) = baked.entries.get(ADDONS) else { return Ok(None) };
    serde_json::from_slice(bytes).map(Some).map_err(Error::at(ADDONS))
}
