//! Checks the free disk space before a build.

use std::path::Path;

use crate::assemble::layout::PartitionSizes;
use crate::compose;
use crate::error::{Result, fail};
use crate::image::Build;
use crate::project::ImageSpec;

/// Space for kernels and initrds while a build writes an image, in bytes.
const KERNELS: u64 = 128 << 20;

impl Build<'_> {
    /// Fails if the image does not fit its root partition, the store or its folder.
    pub(super) fn room(&self, recipe: &ImageSpec, slots: PartitionSizes, out: &Path) -> Result<()> {
        let packages = self.lock.packages_of(&recipe.group, false);
        // The size of the root is known only after mkfs.erofs. A .deb compresses better than erofs, but also contains
        // files that the image drops. This check therefore refuses only what cannot fit.
        let debs: u64 = packages.iter().map(|p| p.size).sum();
        if debs / 2 > slots.root {
            return fail(format!(
                "{}: {} packages of {:.0} MB compressed do not fit a root partition of {:.0} MB; raise `[image] root_size`",
                recipe.group,
                packages.len(),
                debs as f64 / 1e6,
                slots.root as f64 / 1e6
            ));
        }
        // A finished layer is smaller than the installed sizes that its packages declare, so its own size is used if
        // the store has it. While a build writes an image, the disk holds the root (less than two thirds of the tree),
        // the kernel and the initrd twice.
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
                    "{}: {what} may need {:.0} MB in {}, but {:.0} MB are free; make room{or}",
                    recipe.group,
                    need as f64 / 1e6,
                    path.display(),
                    free(path) as f64 / 1e6
                ));
            }
        }
        Ok(())
    }
}
