//! Whether the disks have room for an image, said before the work.

use std::path::Path;

use crate::assemble::layout::PartitionSizes;
use crate::compose;
use crate::error::{Result, fail};
use crate::image::Build;
use crate::project::ImageSpec;

/// Room that kernels and initrds take while an image is written, bytes.
const KERNELS: u64 = 128 << 20;

impl Build<'_> {
    /// Refuses an image that does not fit its root slot, the store or its folder.
    pub(super) fn room(&self, recipe: &ImageSpec, slots: PartitionSizes, out: &Path) -> Result<()> {
        let packages = self.lock.packages_of(&recipe.group, false);
        // A .deb is compressed harder than a root is, and holds more: less than a third of
        // the slot's overflow can't be known before, two thirds can.
        let debs: u64 = packages.iter().map(|p| p.size).sum();
        if debs / 2 > slots.root {
            return fail(format!(
                "{}: {} packages of {} MiB compressed don't fit a root slot of {} MiB; raise `[image] root_size`",
                recipe.group,
                packages.len(),
                debs >> 20,
                slots.root >> 20
            ));
        }
        // The size of a finished layer is known, and is less than its packages claim: a build is not refused for space
        // that it does not need. While an image is written, its root (less than two thirds of the tree) is there
        // twice, and so are kernel and initrd.
        let (store, image) = if let Some(layer) = compose::in_store(recipe, self.lock, self.store) {
            let bytes = layer.info()?.bytes;
            (bytes, bytes * 3 / 2 + KERNELS)
        } else {
            let installed: u64 = packages.iter().map(|p| p.installed_size * 1024).sum();
            (installed * 2, installed + KERNELS)
        };
        let free = |path: &Path| {
            nix::sys::statvfs::statvfs(path).map_or(u64::MAX, |s| s.blocks_available() * s.fragment_size())
        };
        let store = (self.store.root(), store, "the store", " (`bakehouse store gc`) or set BAKEHOUSE_STORE");
        for (path, need, what, or) in [store, (out, image, "the image", "")] {
            if free(path) < need {
                return fail(format!(
                    "{}: {what} may take {} MiB in {} and {} are free; make room{or}",
                    recipe.group,
                    need >> 20,
                    path.display(),
                    free(path) >> 20
                ));
            }
        }
        Ok(())
    }
}
