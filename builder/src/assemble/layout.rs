//! Where the parts of a disk are, how large they are, and what an image is called.

use fleet::parse_size;

use crate::error::{Error, Result};
use crate::format::verity::tree_size;
use crate::project::{ImageSpec, Project};

const MIB: u64 = 1 << 20;
/// Room for two versions of a metal node's UKI, and for a third while one is replaced.
pub const ESP_SIZE: u64 = 256 * MIB;
/// Where it begins on the disk.
pub const ESP_START: u64 = MIB;
/// Where root A begins.
pub const ROOT_START: u64 = ESP_START + ESP_SIZE;

/// Sizes of the slots, fixed for an installation's life.
#[derive(Clone, Copy, Debug)]
pub struct PartitionSizes {
    pub root: u64,
    pub verity: u64,
}

impl PartitionSizes {
    #[must_use]
    pub fn of(root: u64) -> Self {
        let root = root.next_multiple_of(MIB);
        Self { root, verity: tree_size(root).next_multiple_of(MIB) }
    }

    /// Where the hash tree of root A begins on the disk.
    #[must_use]
    pub fn verity_start(&self) -> u64 {
        ROOT_START + self.root
    }

    /// Bytes of the image: the GPT and its copy take a MiB each.
    #[must_use]
    pub fn disk(&self) -> u64 {
        ESP_SIZE + self.root + self.verity + 2 * MIB
    }

    /// Bytes of a machine's disk: the image, the second slot, and this much of /var.
    #[must_use]
    pub fn machine_disk(&self, var: u64) -> u64 {
        self.disk() + self.root + self.verity + var.next_multiple_of(MIB)
    }
}

/// Name of a group's image, and prefix of its partition labels.
#[must_use]
pub fn image_id(project: &Project, group: &str) -> String {
    format!("{}-{group}", project.topology.name)
}

/// Size of the root slot: the fleet's wish, or the largest its roles ask for.
///
/// # Errors
/// No profile says a size.
pub fn slots(project: &Project, recipe: &ImageSpec) -> Result<PartitionSizes> {
    let wish = project.fleet.image.root_size.as_ref().map(|s| s.get_ref().as_str());
    let size = match wish {
        Some(size) => parse_size(size),
        None => recipe.profiles.iter().filter_map(|p| parse_size(p.disk.root.as_deref()?)).max(),
    };
    size.map(PartitionSizes::of).ok_or_else(|| Error::Failed("profiles/roles/base.toml sets no `disk.root`".to_owned()))
}

/// Least size of /var: what every role keeps there, added up.
#[must_use]
pub fn var_size(recipe: &ImageSpec) -> u64 {
    recipe.profiles.iter().filter_map(|p| parse_size(p.disk.var.as_deref()?)).sum()
}
