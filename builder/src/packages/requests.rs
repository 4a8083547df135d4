//! Packages that each image, and the build's tools, request from the archive.

use std::collections::BTreeMap;

use crate::project::Project;

/// Name of the image with the build's tools.
pub(crate) const TOOLS: &str = "tools";

/// The package that apt regards as installed. It provides an initrd generator, so that the kernel's package installs
/// none.
pub(crate) const INITRD_PROVIDER: &str = "\
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

/// Packages of the tools: mkfs.erofs, mcopy, mkfs.vfat, zstd, systemd-boot and its stub.
const PACKAGES: [&str; 5] = ["dosfstools", "erofs-utils", "mtools", "systemd-boot-efi", "zstd"];
/// Further packages of the tools if a legacy BIOS may start the images: GRUB and grub-mkimage.
const GRUB: [&str; 2] = ["grub-common", "grub-pc-bin"];
/// Further packages of the tools if the fleet has a key for Secure Boot.
const SECURE_BOOT: [&str; 3] = ["libfaketime", "openssl", "systemd-repart"];

/// Returns the requested packages by image.
#[must_use]
pub(crate) fn requests(project: &Project) -> BTreeMap<String, Vec<String>> {
    let mut all: BTreeMap<String, Vec<String>> =
        project.fleet.groups.keys().map(|g| (g.clone(), project.recipe(g).packages)).collect();
    all.insert(TOOLS.to_owned(), tools(project.fleet.secure_boot.is_some()));
    all
}

/// Returns the requested Python packages by image, each as `name==version`, sorted.
#[must_use]
pub(crate) fn wheel_requests(project: &Project) -> BTreeMap<String, Vec<String>> {
    project.fleet.groups.keys().map(|g| (g.clone(), project.recipe(g).wheels)).collect()
}

/// Returns the packages of the tools, for signed or unsigned images.
fn tools(signs: bool) -> Vec<String> {
    let more: &[&str] = if signs { &SECURE_BOOT } else { &GRUB };
    PACKAGES.iter().chain(more).map(|p| (*p).to_owned()).collect()
}
