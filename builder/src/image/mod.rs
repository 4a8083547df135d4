//! `bakehouse build`: builds the bootable disk image of each group from the lock.
//!
//! A root is the packages' erofs with the baked files appended. The builder creates the packages' erofs once for each
//! set of packages. The order never changes, so that a build with an empty store and one with a full store give the
//! same bytes.

mod build_record;
mod disk_space;
mod installer;

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use serde::Serialize;

use build_record::{BuildRecord, outputs};

use crate::assemble::disk::{self, Content};
use crate::assemble::layout::{self, image_id};
use crate::assemble::manifest::{Manifest, Sizes, package_list};
use crate::assemble::root::Erofs;
use crate::assemble::secure_boot::Signer;
use crate::assemble::spdx::spdx;
use crate::assemble::{grub, initrd, uki};
use crate::bake::{self, checks, generate};
use crate::compose::tar_index::Tree;
use crate::compose::{self, Layer};
use crate::error::{Error, Result, fail};
use crate::packages::lock::Lock;
use crate::progress::Progress;
use crate::project::{ImageSpec, Project};
use crate::store::{Kind, Store};
use crate::toolchain::Tools;
use crate::util::digest::sha256;
use crate::util::fs::write_atomic;
use crate::util::json::pretty_json;

/// Inputs that the builds of all groups share.
pub struct Build<'a> {
    pub project: &'a Project,
    pub lock: &'a Lock,
    pub store: &'a Store,
    pub progress: &'a Progress,
    /// Revision of the user's sources, for the manifest.
    pub revision: Option<&'a str>,
}

/// A built image.
#[derive(Clone, Debug, Serialize)]
pub struct BuiltImage {
    pub group: String,
    pub disk: PathBuf,
    pub uki: PathBuf,
    pub manifest: PathBuf,
    /// The image existed with the same inputs, so nothing was built.
    pub unchanged: bool,
}

impl Build<'_> {
    /// Builds a group's image.
    ///
    /// # Errors
    /// If any step fails. Incomplete files never have the final names.
    pub fn image(&self, group: &str) -> Result<BuiltImage> {
        let recipe = self.project.recipe(group);
        let slots = layout::slots(self.project, &recipe)?;
        let agent_path = beside("firstboot")?;
        let agent = fs::read(&agent_path).map_err(Error::io("read", &agent_path))?;
        let inputs = self.inputs(&recipe, &agent)?;
        let out = self.project.out_dir(group);
        let name = format!("{}_{}", image_id(self.project, group), self.project.topology.version);
        let path = |suffix: &str| out.join(format!("{name}{suffix}"));
        let mut image = BuiltImage {
            group: group.to_owned(),
            disk: path(".raw"),
            uki: path(".efi"),
            manifest: path(".manifest.json"),
            unchanged: true,
        };
        fs::create_dir_all(&out).map_err(Error::io("create", &out))?;
        let _guard = self.store.lock(Kind::Erofs, &sha256(out.as_os_str().as_encoded_bytes()))?;
        let why = Self::stale(&out, &name, &inputs);
        let Some(why) = why else {
            self.progress.say("build", &format!("{group}: unchanged"));
            return Ok(image);
        };
        self.progress.verbose("why", &format!("{group}: {why}"));
        image.unchanged = false;
        self.room(&recipe, slots, &out)?;

        let tools = Tools::prepare(self.lock, self.store, self.progress)?;
        let layer = compose::compose(&recipe, self.lock, self.store, self.progress)?;
        let tree = Tree::open(&layer.tar())?;
        let info = layer.info()?;
        let mut baked = bake::bake(self.project, &recipe, &tree, &agent)?;

        let scratch =
            tempfile::Builder::new().prefix(".build-").tempdir_in(&out).map_err(Error::io("write in", &out))?;
        let baked_tar = scratch.path().join("baked.tar");
        baked.write_tar(&tree, &baked_tar)?;
        // These four steps do not depend on each other: validation, initrd, generated files, root.
        let spec = self.initrd_spec(&["profiles/initrd.toml"])?;
        let source = initrd::Source { tree: &tree, layer: &layer, kernel: &info.kernel, tools: &tools };
        let erofs =
            Erofs { layer: &layer, tools: &tools, epoch: self.lock.epoch, store: self.store, progress: self.progress };
        let (root, generated, initrd) = std::thread::scope(|scope| {
            let checked = scope
                .spawn(|| checks::check(self.project, &recipe, &layer, &baked, &baked_tar, self.store, self.progress));
            let initrd = scope.spawn(|| spec.build(&source, self.store, self.progress, scratch.path()));
            let generated =
                scope.spawn(|| generate::generate(&recipe, &layer, &baked, &baked_tar, self.store, self.progress));
            let root = if baked.makes.is_empty() {
                erofs.root(&baked_tar, scratch.path()).map(Some)
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
            erofs.root(&baked_tar, scratch.path())?
        };
        if root.size > slots.root {
            return fail(format!(
                "{group}: the root needs {} MiB, but its partition has {} MiB; raise `[image] root_size`, and \
                 reinstall running nodes",
                root.size >> 20,
                slots.root >> 20
            ));
        }
        let step = self.progress.step("assemble", group);
        let cmdline = format!("roothash={} {}", root.hash, cmdline(&recipe));
        let text = uki::Text { cmdline: &cmdline, os_release: &baked.os_release, uname: &info.kernel };
        // A legacy BIOS verifies no signature, so images with Secure Boot start by UEFI only.
        let legacy = Signer::of(self.project).is_none();
        let uki = self.uki(&tools, &layer, &text, &initrd, legacy)?;
        let mut esp = self.boot_files(&recipe, &tools, uki.clone())?;
        let mut bios = grub::refusal();
        if legacy {
            esp.extend(grub::files(&name)?);
            bios = grub::grub(&tools, scratch.path())?;
        }
        let disk = scratch.path().join("disk");
        let content = Content {
            label: &name,
            root: &root.path,
            verity: &root.verity,
            roothash: &root.hash,
            bios,
            esp,
            epoch: self.lock.epoch,
        };
        disk::write(&disk, slots, &content, &tools, scratch.path())?;
        let packages = self.lock.packages_of(group, false);
        let manifest = Manifest {
            format: 1,
            id: &image_id(self.project, group),
            version: &self.project.topology.version,
            fleet: &self.project.topology.name,
            group,
            roles: &recipe.roles,
            revision: self.revision,
            bakehouse: env!("CARGO_PKG_VERSION"),
            lock: &inputs["bakehouse.lock"],
            kernel: &info.kernel,
            roothash: &root.hash,
            sizes: Sizes {
                disk: slots.disk(),
                root_slot: slots.root,
                root: root.size,
                uki: uki.len() as u64,
                tree: info.bytes,
            },
            agent: &inputs["the agent"],
            packages: package_list(&packages),
            files: baked.entries.iter().map(|(path, entry)| (path.as_str(), entry.sum())).collect(),
            nodes: (self.project.topology.nodes.iter())
                .filter(|n| n.group == group)
                .map(|n| (n.name.as_str(), n.address))
                .collect(),
            hubs: self.project.topology.hubs.iter().map(|hub| hub.name.as_str()).collect(),
            voters: self.project.topology.voters.iter().map(String::as_str).collect(),
            state: fleet::STATE_VERSION,
            mesh: self.project.topology.mesh.subnet.to_string(),
            migrations: baked.migrations.iter().map(|m| m.name.as_str()).collect(),
            restore: self.project.topology.backup.restore.as_deref().filter(|_| recipe.roles.iter().any(|r| r == "db")),
        };
        let manifest = pretty_json(&manifest)?;
        let sbom = spdx(&image_id(self.project, group), &self.project.topology.version, self.lock.epoch, &packages)?;
        let sums: String = [(".efi", &uki), (".manifest.json", &manifest), (".spdx.json", &sbom)]
            .iter()
            .map(|(suffix, bytes)| format!("{}  {name}{suffix}\n", sha256(bytes)))
            .collect();
        // An image has no build record while its files change, so that an interrupted build does not look finished.
        let _ = fs::remove_file(out.join("stamp.json"));
        for (suffix, bytes) in [(".efi", &uki), (".manifest.json", &manifest), (".spdx.json", &sbom)] {
            write_atomic(&path(suffix), bytes)?;
        }
        write_atomic(&out.join("SHA256SUMS"), sums.as_bytes())?;
        fs::rename(&disk, &image.disk).map_err(Error::io("rename", &disk))?;
        let outputs = outputs(&out, &name)?;
        write_atomic(&out.join("stamp.json"), &pretty_json(&BuildRecord { inputs, outputs })?)?;
        step.done(&format!(
            "{group}: {} ({:.1} MB root, {:.1} MB UKI, {:.0} MB disk)",
            image.disk.display(),
            root.size as f64 / 1e6,
            uki.len() as f64 / 1e6,
            slots.disk() as f64 / 1e6
        ));
        Ok(image)
    }

    fn initrd_spec(&self, recipes: &[&'static str]) -> Result<initrd::InitrdSpec<'_>> {
        let recipes = recipes.iter().map(|path| Ok((*path, self.project.file(path)?)));
        Ok(initrd::InitrdSpec { recipes: recipes.collect::<Result<_>>()?, programs: Vec::new(), files: Vec::new() })
    }

    fn uki(&self, tools: &Tools, layer: &Layer, text: &uki::Text, initrd: &[u8], bios: bool) -> Result<Vec<u8>> {
        let read = |path: PathBuf| fs::read(&path).map_err(Error::io("read", &path));
        let stub = read(tools.file("usr/lib/systemd/boot/efi/linuxx64.efi.stub"))?;
        self.signed(tools, uki::build(&stub, &read(layer.kernel())?, initrd, text, bios)?)
    }

    /// Signs a program if the fleet has a key for Secure Boot.
    fn signed(&self, tools: &Tools, program: Vec<u8>) -> Result<Vec<u8>> {
        match Signer::of(self.project) {
            Some(signer) => signer.sign(tools, &program, self.lock.epoch),
            None => Ok(program),
        }
    }

    fn boot_files(&self, recipe: &ImageSpec, tools: &Tools, uki: Vec<u8>) -> Result<BTreeMap<String, Vec<u8>>> {
        let boot = tools.file("usr/lib/systemd/boot/efi/systemd-bootx64.efi");
        let boot = self.signed(tools, fs::read(&boot).map_err(Error::io("read", &boot))?)?;
        let id = image_id(self.project, &recipe.group);
        let signer = Signer::of(self.project);
        let keys = signer.as_ref().map(|s| s.enrolment(tools)).transpose()?.unwrap_or_default();
        // `if-safe`: systemd-boot enrols the key by itself in virtual machines only. Elsewhere the operator selects it.
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

/// Returns the kernel options of the profiles.
fn cmdline(recipe: &ImageSpec) -> String {
    recipe.profiles.iter().flat_map(|p| &p.cmdline).map(String::as_str).collect::<Vec<_>>().join(" ")
}

/// Returns the path of a program for nodes, which is installed beside `bakehouse`.
fn beside(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe().map_err(Error::io("find", "bakehouse's own program"))?;
    let path = own.with_file_name(name);
    if path.is_file() {
        return Ok(path);
    }
    fail(format!("{} is missing; build it with `cargo build --release`", path.display()))
}
