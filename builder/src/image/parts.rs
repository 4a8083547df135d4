//! The parts of an image, and the disk and the UKI that contain them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::assemble::disk::{self, Content};
use crate::assemble::layout::{PartitionSizes, image_id};
use crate::assemble::root::{Erofs, Root};
use crate::assemble::secure_boot::Signer;
use crate::assemble::{grub, initrd, uki};
use crate::bake::{self, Baked, BuildContext, checks, generate};
use crate::compose::tar_index::Tree;
use crate::compose::{self, Layer, LayerInfo};
use crate::error::{Error, Result};
use crate::image::{Build, cmdline};
use crate::project::ImageSpec;
use crate::toolchain::Tools;

/// Inputs of an image's disk.
pub(super) struct Parts {
    tools: Tools,
    layer: Layer,
    pub(super) info: LayerInfo,
    pub(super) baked: Baked,
    pub(super) root: Root,
    initrd: Vec<u8>,
}

/// An image's disk and UKI, before they get their final names.
pub(super) struct Assembled {
    /// Path of the raw disk image.
    pub(super) disk: PathBuf,
    /// The kernel with initrd and command line, signed if the fleet has a key for Secure Boot.
    pub(super) uki: Vec<u8>,
}

impl Build<'_> {
    /// Composes the packages, bakes the fleet's files, validates them, and builds root and initrd in `scratch`.
    pub(super) fn parts(
        &self,
        spec: &ImageSpec,
        programs: &BTreeMap<String, Vec<u8>>,
        scratch: &Path,
    ) -> Result<Parts> {
        let tools = Tools::prepare(self.lock, self.store, self.progress)?;
        let layer = compose::compose(spec, self.lock, self.store, self.progress)?;
        let tree = Tree::open(&layer.tar())?;
        let info = layer.info()?;
        let mut baked = bake::bake(self.project, spec, &tree, programs)?;
        let baked_tar = scratch.join("baked.tar");
        baked.write_tar(&tree, &baked_tar)?;
        // These four steps do not depend on each other: validation, initrd, generated files, root.
        let context = BuildContext {
            project: self.project,
            spec,
            layer: &layer,
            baked: &baked,
            baked_tar: &baked_tar,
            store: self.store,
            progress: self.progress,
        };
        let initrd_spec = self.initrd_spec(&["profiles/initrd.toml"])?;
        let source = initrd::Source { tree: &tree, layer: &layer, kernel: &info.kernel, tools: &tools };
        let erofs =
            Erofs { layer: &layer, tools: &tools, epoch: self.lock.epoch, store: self.store, progress: self.progress };
        let (root, generated, initrd) = std::thread::scope(|scope| {
            let checked = scope.spawn(|| checks::check(&context));
            let initrd = scope.spawn(|| initrd_spec.build(&source, self.store, self.progress, scratch));
            let generated = scope.spawn(|| generate::generate(&context));
            let root = if context.baked.makes.is_empty() {
                erofs.root(&baked_tar, scratch).map(Some)
            } else {
                erofs.packages().map(|_| None)
            };
            let panicked = |_| Error::Failed("a build thread panicked".to_owned());
            checked.join().map_err(panicked)??;
            let generated = generated.join().map_err(panicked)??;
            Ok::<_, Error>((root?, generated, initrd.join().map_err(panicked)??))
        })?;
        let root = if let Some(root) = root {
            root
        } else {
            for file in generated {
                baked.add(file)?;
            }
            baked.write_tar(&tree, &baked_tar)?;
            erofs.root(&baked_tar, scratch)?
        };
        Ok(Parts { tools, layer, info, baked, root, initrd })
    }

    /// Writes the disk in `scratch`, with the label `name`.
    pub(super) fn assemble(
        &self,
        spec: &ImageSpec,
        sizes: PartitionSizes,
        parts: &Parts,
        name: &str,
        scratch: &Path,
    ) -> Result<Assembled> {
        let Parts { tools, layer, info, baked, root, initrd } = parts;
        let cmdline = format!("roothash={} {}", root.hash, cmdline(spec));
        let text = uki::Text { cmdline: &cmdline, os_release: &baked.os_release, uname: &info.kernel };
        // A legacy BIOS verifies no signature, so images with Secure Boot boot only under UEFI.
        let legacy = Signer::for_project(self.project).is_none();
        let uki = self.uki(tools, layer, &text, initrd, legacy)?;
        let mut esp = self.boot_files(spec, tools, uki.clone())?;
        let mut bios = grub::refusal();
        if legacy {
            esp.extend(grub::files(name)?);
            bios = grub::grub(tools, scratch)?;
        }
        let disk = scratch.join("disk");
        let content = Content {
            label: name,
            root: &root.path,
            verity: &root.verity,
            roothash: &root.hash,
            bios,
            esp,
            epoch: self.lock.epoch,
        };
        disk::write(&disk, sizes, &content, tools, scratch)?;
        Ok(Assembled { disk, uki })
    }

    pub(super) fn initrd_spec(&self, recipes: &[&'static str]) -> Result<initrd::InitrdSpec<'_>> {
        let recipes = recipes.iter().map(|path| Ok((*path, self.project.file(path)?)));
        Ok(initrd::InitrdSpec { recipes: recipes.collect::<Result<_>>()?, programs: Vec::new(), files: Vec::new() })
    }

    /// Builds a UKI, and signs it if the fleet has a key for Secure Boot. `bios`: with the sections for GRUB.
    pub(super) fn uki(
        &self,
        tools: &Tools,
        layer: &Layer,
        text: &uki::Text,
        initrd: &[u8],
        bios: bool,
    ) -> Result<Vec<u8>> {
        let read = |path: PathBuf| fs::read(&path).map_err(Error::io("read", &path));
        let stub = read(tools.file("usr/lib/systemd/boot/efi/linuxx64.efi.stub"))?;
        self.signed(tools, uki::build(&stub, &read(layer.kernel())?, initrd, text, bios)?)
    }

    /// Signs a program if the fleet has a key for Secure Boot.
    fn signed(&self, tools: &Tools, program: Vec<u8>) -> Result<Vec<u8>> {
        match Signer::for_project(self.project) {
            Some(signer) => signer.sign(tools, &program, self.lock.epoch),
            None => Ok(program),
        }
    }

    fn boot_files(&self, spec: &ImageSpec, tools: &Tools, uki: Vec<u8>) -> Result<BTreeMap<String, Vec<u8>>> {
        let boot = tools.file("usr/lib/systemd/boot/efi/systemd-bootx64.efi");
        let boot = self.signed(tools, fs::read(&boot).map_err(Error::io("read", &boot))?)?;
        let id = image_id(self.project, &spec.group);
        let signer = Signer::for_project(self.project);
        let keys = signer.as_ref().map(|s| s.enrolment(tools)).transpose()?.unwrap_or_default();
        // `if-safe`: systemd-boot enrols the key automatically only in virtual machines. Elsewhere the operator selects
        // it.
        let enrol = if signer.is_some() { "secure-boot-enroll if-safe\n" } else { "" };
        let mut files = BTreeMap::from([
            ("EFI/BOOT/BOOTX64.EFI".to_owned(), boot.clone()),
            ("EFI/systemd/systemd-bootx64.efi".to_owned(), boot),
            // systemd-boot tries this version three times, then starts the previous one.
            (format!("EFI/Linux/{id}_{}+3.efi", self.project.topology.version), uki),
            ("loader/loader.conf".to_owned(), format!("timeout 0\neditor no\n{enrol}").into_bytes()),
            ("loader/entries.srel".to_owned(), b"type1\n".to_vec()),
        ]);
        files.extend(keys);
        Ok(files)
    }
}
