//! Positions and sizes of a disk's partitions, and names of images.

use fleet::parse_size;

use crate::error::{Error, Result};
use crate::format::verity::tree_size;
use crate::project::{ImageSpec, Project};

const MIB: u64 = 1 << 20;
/// Size of the ESP in bytes: two versions of a metal node's UKI, and a third one during an update.
pub(crate) const ESP_SIZE: u64 = 256 * MIB;
/// Start of the ESP in bytes.
pub(crate) const ESP_START: u64 = MIB;
/// Start of root A in bytes.
pub(crate) const ROOT_START: u64 = ESP_START + ESP_SIZE;

/// Sizes of root A and root B in bytes. They do not change after the installation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PartitionSizes {
    /// Size of a root partition.
    pub root: u64,
    /// Size of the partition with the hash tree of a root.
    pub verity: u64,
}

impl PartitionSizes {
    /// Returns the sizes for a root of at least `root` bytes.
    #[must_use]
    pub(crate) fn for_root(root: u64) -> Self {
        let root = root.next_multiple_of(MIB);
        Self { root, verity: tree_size(root).next_multiple_of(MIB) }
    }

    /// Returns the start of root A's verity tree in bytes.
    #[must_use]
    pub(crate) fn verity_start(&self) -> u64 {
        ROOT_START + self.root
    }

    /// Returns the size of the image in bytes. The GPT and its copy need 1 MiB each.
    #[must_use]
    pub(crate) fn disk(&self) -> u64 {
        ESP_SIZE + self.root + self.verity + 2 * MIB
    }

    /// Returns the size of a machine's disk in bytes: the image, root B, and `var` bytes for /var.
    #[must_use]
    pub(crate) fn machine_disk(&self, var: u64) -> u64 {
        self.disk() + self.root + self.verity + var.next_multiple_of(MIB)
    }
}

/// Returns the name of a group's image, which is also the prefix of its partition labels.
#[must_use]
pub(crate) fn image_id(project: &Project, group: &str) -> String {
    format!("{}-{group}", project.topology.name)
}

/// Returns the sizes of the root partitions: `[image] root_size`, else the largest size that a role requires.
///
/// # Errors
/// If no profile has a size.
pub(crate) fn slots(project: &Project, recipe: &ImageSpec) -> Result<PartitionSizes> {
    let configured = project.fleet.image.root_size.as_ref().map(|s| s.get_ref().as_str());
    let size = match configured {
        Some(size) => parse_size(size),
        None => recipe.profiles.iter().filter_map(|p| parse_size(p.disk.root.as_deref()?)).max(),
    };
    size.map(PartitionSizes::for_root)
        .ok_or_else(|| Error::Failed("profiles/roles/base.toml sets no `disk.root`".to_owned()))
}

/// Returns the minimum size of /var in bytes: the sum of the roles' sizes.
#[must_use]
pub(crate) fn var_size(recipe: &ImageSpec) -> u64 {
    recipe.profiles.iter().filter_map(|p| parse_size(p.disk.var.as_deref()?)).sum()
}
