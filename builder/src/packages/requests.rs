//! What each image, and the tools tree, asks of the archive.

use std::collections::BTreeMap;

use crate::project::Project;

/// Name of the image that holds the build's own tools.
pub const TOOLS: &str = "tools";

/// What the machine that apt sees has: our initrd, so that no generator of initrds is pulled
/// in by the kernel package.
pub const INITRD_PROVIDER: &str = "\
Package: bakehouse-initrd
Status: install ok installed
Priority: optional
Section: admin
Maintainer: Bakehouse
Architecture: all
Version: 1
Provides: linux-initramfs-tool
Description: stands for the initrd that Bakehouse composes
";

/// What the tools tree has: mkfs.erofs, mcopy, mkfs.vfat, zstd, systemd-boot and its stub.
const PACKAGES: [&str; 5] = ["dosfstools", "erofs-utils", "mtools", "systemd-boot-efi", "zstd"];
/// What it has beside them where a BIOS may start the images: GRUB, and what makes its core.
const GRUB: [&str; 2] = ["grub-common", "grub-pc-bin"];
/// What it has beside them where programs are signed.
const SECURE_BOOT: [&str; 3] = ["libfaketime", "openssl", "systemd-repart"];

/// What each image asks of the archive.
#[must_use]
pub fn requests(project: &Project) -> BTreeMap<String, Vec<String>> {
    let mut all: BTreeMap<String, Vec<String>> =
        project.fleet.groups.keys().map(|g| (g.clone(), project.recipe(g).packages)).collect();
    all.insert(TOOLS.to_owned(), tools(project.fleet.secure_boot.is_some()));
    all
}

/// Packages of the tools tree, for images that are signed or not.
fn tools(signs: bool) -> Vec<String> {
    let more: &[&str] = if signs { &SECURE_BOOT } else { &GRUB };
    PACKAGES.iter().chain(more).map(|p| (*p).to_owned()).collect()
}
