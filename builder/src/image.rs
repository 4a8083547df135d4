//! `bakehouse build`: from a locked fleet to a bootable disk image of each group.
//!
//! Root = the packages' erofs, made once per set of packages, with the baked files appended.
//! It is always that, in this order, so that a cold and a warm build give the same bytes.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use fleet::netboot::InstallerTrust;
use serde::{Deserialize, Serialize};

use crate::bake::{self, pretty_json};
use crate::compose::{self, Layer};
use crate::digest::{Key, sha256};
use crate::disk::{self, Content, Slots};
use crate::error::{Error, Result, fail};
use crate::lock::Lock;
use crate::manifest::{Manifest, Sizes, package_list, spdx};
use crate::progress::Progress;
use crate::project::{Project, Recipe};
use crate::secure_boot::Signer;
use crate::store::{Kind, Store, write_atomic};
use crate::tools::{Tools, run};
use crate::tree::Tree;
use crate::{bios, checks, initrd, make, uki, verity};

/// What the installer says of itself.
const INSTALLER: &str = "NAME=Bakehouse\nID=bakehouse\nPRETTY_NAME=\"Bakehouse installer\"\n";

/// Room that kernels and initrds take while an image is written, bytes.
const KERNELS: u64 = 128 << 20;

/// What builds of all groups share.
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
pub struct Image {
    pub group: String,
    pub disk: PathBuf,
    pub uki: PathBuf,
    pub manifest: PathBuf,
    /// Nothing had to be done.
    pub unchanged: bool,
}

/// What a machine runs that is to get an image over the network.
pub struct Installer {
    /// For firmware.
    pub program: Vec<u8>,
    /// The kernel's, as it is in the program.
    pub cmdline: String,
}

/// What an image was made from, kept beside it: to know that nothing changed, and to say what did.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Stamp {
    inputs: BTreeMap<String, String>,
    /// Name, bytes and time of each file made.
    outputs: Vec<(String, u64, u64)>,
}

impl Build<'_> {
    /// Builds a group's image.
    ///
    /// # Errors
    /// Whatever keeps it from being whole; nothing half-made has the final name.
    pub fn image(&self, group: &str) -> Result<Image> {
        let recipe = self.project.recipe(group);
        let slots = bake::slots(self.project, &recipe)?;
        let agent_path = beside("firstboot")?;
        let agent = fs::read(&agent_path).map_err(Error::io("read", &agent_path))?;
        let inputs = self.inputs(&recipe, &agent)?;
        let out = self.project.out_dir(group);
        let name = format!("{}_{}", bake::image_id(self.project, group), self.project.topology.version);
        let path = |suffix: &str| out.join(format!("{name}{suffix}"));
        let mut image = Image {
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
        // The daemons' opinion, the initrd, what is made and the root wait for nothing of each other.
        let order = self.order(&["profiles/initrd.toml"])?;
        let (root, made, initrd) = std::thread::scope(|scope| {
            let checked = scope
                .spawn(|| checks::check(self.project, &recipe, &layer, &baked, &baked_tar, self.store, self.progress));
            let initrd = scope.spawn(|| self.initrd(&order, &tree, &layer, &info.kernel, &tools, scratch.path()));
            let made = scope.spawn(|| make::make(&recipe, &layer, &baked, &baked_tar, self.store, self.progress));
            let root = if baked.makes.is_empty() {
                self.root(&layer, &tools, &baked_tar, scratch.path()).map(Some)
            } else {
                self.packages_erofs(&layer, &tools).map(|_| None)
            };
            let panicked = |_| Error::Failed("a build thread panicked".to_owned());
            checked.join().map_err(panicked)??;
            let made = made.join().map_err(panicked)??;
            Ok::<_, Error>((root?, made, initrd.join().map_err(panicked)??))
        })?;
        let root = if let Some(root) = root {
            root
        } else {
            for made in made {
                baked.add(made)?;
            }
            baked.write_tar(&tree, &baked_tar)?;
            self.root(&layer, &tools, &baked_tar, scratch.path())?
        };
        if root.size > slots.root {
            return fail(format!(
                "{group}: the root takes {} MiB and its slot has {}; raise `[image] root_size` (on running nodes: reinstall)",
                root.size >> 20,
                slots.root >> 20
            ));
        }
        let step = self.progress.step("assemble", group);
        let words = format!("roothash={} {}", root.hash, cmdline(&recipe));
        let text = uki::Text { cmdline: &words, os_release: &baked.os_release, uname: &info.kernel };
        // A BIOS asks for no signature: who wants them has UEFI.
        let legacy = Signer::of(self.project).is_none();
        let uki = self.uki(&tools, &layer, &text, &initrd, legacy)?;
        let mut esp = self.boot_files(&recipe, &tools, uki.clone())?;
        let mut bios = bios::refusal();
        if legacy {
            esp.extend(bios::files(&name)?);
            bios = bios::grub(&tools, scratch.path())?;
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
            id: &bake::image_id(self.project, group),
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
            state: fleet::STATE_VERSION,
            mesh: self.project.topology.mesh.subnet.to_string(),
            migrations: baked.migrations.iter().map(|m| m.name.as_str()).collect(),
            restore: self.project.topology.backup.restore.as_deref().filter(|_| recipe.roles.iter().any(|r| r == "db")),
        };
        let manifest = pretty_json(&manifest)?;
        let sbom =
            spdx(&bake::image_id(self.project, group), &self.project.topology.version, self.lock.epoch, &packages)?;
        let sums: String = [(".efi", &uki), (".manifest.json", &manifest), (".spdx.json", &sbom)]
            .iter()
            .map(|(suffix, bytes)| format!("{}  {name}{suffix}\n", sha256(bytes)))
            .collect();
        // The stamp goes first and comes last: between, the files belong to no build.
        let _ = fs::remove_file(out.join("stamp.json"));
        for (suffix, bytes) in [(".efi", &uki), (".manifest.json", &manifest), (".spdx.json", &sbom)] {
            write_atomic(&path(suffix), bytes)?;
        }
        write_atomic(&out.join("SHA256SUMS"), sums.as_bytes())?;
        fs::rename(&disk, &image.disk).map_err(Error::io("rename", &disk))?;
        let outputs = outputs(&out, &name)?;
        write_atomic(&out.join("stamp.json"), &pretty_json(&Stamp { inputs, outputs })?)?;
        step.done(&format!(
            "{group}: {} ({:.1} MB root, {:.1} MB UKI, {:.0} MB disk)",
            image.disk.display(),
            root.size as f64 / 1e6,
            uki.len() as f64 / 1e6,
            slots.disk() as f64 / 1e6
        ));
        Ok(image)
    }

    /// Everything the image depends on, by name.
    fn inputs(&self, recipe: &Recipe, agent: &[u8]) -> Result<BTreeMap<String, String>> {
        let mut inputs = BTreeMap::from([
            ("bakehouse itself".to_owned(), env!("CODE_ALL").to_owned()),
            ("bakehouse.lock".to_owned(), self.lock.digest.clone()),
            ("the agent".to_owned(), sha256(agent)),
            ("fleet.toml".to_owned(), sha256(format!("{:?} {recipe:?}", self.project.topology).as_bytes())),
            ("--revision".to_owned(), self.revision.unwrap_or_default().to_owned()),
        ]);
        let overlays: Vec<String> = recipe.overlays.iter().map(|o| format!("overlays/{o}/")).collect();
        inputs.insert("update key".to_owned(), self.project.update_keyring().map_or_else(String::new, |k| sha256(&k)));
        for (path, bytes) in self.project.files() {
            if path == "profiles/initrd.toml" || overlays.iter().any(|o| path.starts_with(o)) {
                inputs.insert(path.to_owned(), sha256(bytes));
            }
        }
        if let Some(signer) = Signer::of(self.project) {
            inputs.insert("the key for Secure Boot".to_owned(), signer.id()?);
        }
        Ok(inputs)
    }

    /// Why the image has to be made; `None` when it is there and of these inputs.
    fn stale(out: &Path, name: &str, inputs: &BTreeMap<String, String>) -> Option<String> {
        let stamp = fs::read(out.join("stamp.json")).ok().and_then(|b| serde_json::from_slice::<Stamp>(&b).ok());
        let Some(stamp) = stamp else { return Some("there is no finished build of it".to_owned()) };
        let all: std::collections::BTreeSet<&String> = stamp.inputs.keys().chain(inputs.keys()).collect();
        let changed: Vec<&str> =
            all.into_iter().filter(|k| stamp.inputs.get(*k) != inputs.get(*k)).map(String::as_str).collect();
        if !changed.is_empty() {
            return Some(format!("changed: {}", changed.join(", ")));
        }
        match outputs(out, name) {
            Ok(found) if found == stamp.outputs => None,
            _ => Some("its files were touched since".to_owned()),
        }
    }

    /// Said before the work, with numbers.
    fn room(&self, recipe: &Recipe, slots: Slots, out: &Path) -> Result<()> {
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
        // Of a layer that is made the tree's size is known, which is less than its packages say: nobody
        // is sent away for room that is not needed. While an image is written, its root (less than two thirds
        // of the tree) is there twice, and so are kernel and initrd.
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

    /// Kernel and initrd of a group's packages, as one program for firmware, that install what the
    /// server at this address says. `trust` says which images it may enter from memory.
    ///
    /// # Errors
    /// Whatever keeps it from being whole.
    pub fn installer(&self, group: &str, server: &str, trust: &InstallerTrust) -> Result<Installer> {
        let recipe = self.project.recipe(group);
        let tools = Tools::prepare(self.lock, self.store, self.progress)?;
        let layer = compose::compose(&recipe, self.lock, self.store, self.progress)?;
        let tree = Tree::open(&layer.tar())?;
        let kernel = layer.info()?.kernel;
        let path = beside("firstboot-install")?;
        let program = fs::read(&path).map_err(Error::io("read", &path))?;
        let mut order = self.order(&["profiles/initrd.toml", "profiles/netboot.toml"])?;
        order.programs.push(("usr/bin/firstboot-install", program));
        let trust = serde_json::to_vec(trust).map_err(|e| Error::Failed(e.to_string()))?;
        order.files.push((InstallerTrust::PATH, trust));
        let scratch = tempfile::tempdir().map_err(Error::io("create", "a temporary folder"))?;
        let initrd = self.initrd(&order, &tree, &layer, &kernel, &tools, scratch.path())?;
        let server = format!("{}={server}", fleet::netboot::Machine::SERVER);
        // Of a root that is entered, which is one in memory, no disk is a part.
        let words = ["rd.systemd.unit=netboot.target", "fstab=no", "systemd.mask=systemd-repart.service"];
        let cmdline = [&words.join(" "), server.as_str(), &cmdline(&recipe)].join(" ");
        let text = uki::Text { cmdline: &cmdline, os_release: INSTALLER, uname: &kernel };
        Ok(Installer { program: self.uki(&tools, &layer, &text, &initrd, false)?, cmdline })
    }

    fn order(&self, recipes: &[&'static str]) -> Result<initrd::Order<'_>> {
        let recipes = recipes.iter().map(|path| Ok((*path, self.project.file(path)?)));
        Ok(initrd::Order { recipes: recipes.collect::<Result<_>>()?, programs: Vec::new(), files: Vec::new() })
    }

    fn initrd(
        &self,
        order: &initrd::Order,
        tree: &Tree,
        layer: &Layer,
        kernel: &str,
        tools: &Tools,
        scratch: &Path,
    ) -> Result<Vec<u8>> {
        let mut key = Key::new(initrd::CODE);
        key.add("layer", &layer.key).add("tools", &tools.key);
        for (path, text) in &order.recipes {
            key.add(path, text);
        }
        for (path, program) in order.programs.iter().chain(&order.files) {
            key.add(path, sha256(program));
        }
        let key = key.finish();
        if let Some(path) = self.store.get(Kind::Initrd, &key) {
            return fs::read(&path).map_err(Error::io("read", &path));
        }
        let step = self.progress.step("initrd", "composing");
        let (cpio, compressed) = (scratch.join("initrd"), scratch.join("initrd.zst"));
        fs::write(&cpio, initrd::compose(tree, kernel, order)?).map_err(Error::io("write", &cpio))?;
        // One thread: the bytes must not depend on the machine.
        run(
            tools.command("usr/bin/zstd").args(["-q", "-9", "--single-thread", "-o"]).arg(&compressed).arg(&cpio),
            "zstd",
        )?;
        let bytes = fs::read(&compressed).map_err(Error::io("read", &compressed))?;
        write_atomic(&self.store.path(Kind::Initrd, &key), &bytes)?;
        step.done(&format!("{:.1} MB", bytes.len() as f64 / 1e6));
        Ok(bytes)
    }

    /// The packages' erofs from the store, and the baked files appended to a copy.
    fn root(&self, layer: &Layer, tools: &Tools, baked_tar: &Path, scratch: &Path) -> Result<Root> {
        let base = self.packages_erofs(layer, tools)?;
        let path = scratch.join("root.erofs");
        fs::copy(base.join("root.erofs"), &path).map_err(Error::io("copy", &base))?;
        run(self.mkfs(tools).arg("--incremental=data").arg(&path).arg(baked_tar), "mkfs.erofs")?;
        let known = fs::read(base.join("leaves")).map_err(Error::io("read", &base))?;
        let leaves = leaves_of(&path, &base.join("root.erofs"), &known).map_err(Error::io("read", &path))?;
        let (verity, hash) = verity::tree(&leaves);
        let size = (leaves.len() / 32 * verity::BLOCK) as u64;
        Ok(Root { path, size, verity, hash })
    }

    fn packages_erofs(&self, layer: &Layer, tools: &Tools) -> Result<PathBuf> {
        let key = Key::new("erofs-1")
            .add("layer", &layer.key)
            .add("tools", &tools.key)
            .add("options", format!("{:?}", self.mkfs(tools).get_args().skip(3).collect::<Vec<_>>()))
            .finish();
        let _guard = self.store.lock(Kind::Erofs, &key)?;
        if let Some(dir) = self.store.get(Kind::Erofs, &key) {
            return Ok(dir);
        }
        let step = self.progress.step("erofs", "compressing the packages");
        let dir = self.store.scratch(Kind::Erofs, &key);
        fs::create_dir_all(&dir).map_err(Error::io("create", &dir))?;
        let path = dir.join("root.erofs");
        run(self.mkfs(tools).arg(&path).arg(layer.tar()), "mkfs.erofs")?;
        let data = fs::read(&path).map_err(Error::io("read", &path))?;
        fs::write(dir.join("leaves"), verity::leaves(&data)).map_err(Error::io("write", &dir))?;
        let put = self.store.put(Kind::Erofs, &key, &dir)?;
        step.done(&format!("{:.1} MB", data.len() as f64 / 1e6));
        Ok(put)
    }

    /// lz4: the fastest to make and to read. Appending repeats every option.
    fn mkfs(&self, tools: &Tools) -> std::process::Command {
        let mut command = tools.command("usr/bin/mkfs.erofs");
        command.args([
            "--quiet",
            "-zlz4",
            "-C65536",
            "--all-time",
            "-Uba4e4005-e000-4000-8000-00000000e0f5",
            "--tar=f",
        ]);
        command.arg(format!("-T{}", self.lock.epoch));
        command
    }

    fn uki(&self, tools: &Tools, layer: &Layer, text: &uki::Text, initrd: &[u8], bios: bool) -> Result<Vec<u8>> {
        let read = |path: PathBuf| fs::read(&path).map_err(Error::io("read", &path));
        let stub = read(tools.file("usr/lib/systemd/boot/efi/linuxx64.efi.stub"))?;
        self.signed(tools, uki::build(&stub, &read(layer.kernel())?, initrd, text, bios)?)
    }

    /// Signed, where the fleet has a key for that.
    fn signed(&self, tools: &Tools, program: Vec<u8>) -> Result<Vec<u8>> {
        match Signer::of(self.project) {
            Some(signer) => signer.sign(tools, &program, self.lock.epoch),
            None => Ok(program),
        }
    }

    fn boot_files(&self, recipe: &Recipe, tools: &Tools, uki: Vec<u8>) -> Result<BTreeMap<String, Vec<u8>>> {
        let boot = tools.file("usr/lib/systemd/boot/efi/systemd-bootx64.efi");
        let boot = self.signed(tools, fs::read(&boot).map_err(Error::io("read", &boot))?)?;
        let id = bake::image_id(self.project, &recipe.group);
        let signer = Signer::of(self.project);
        let keys = signer.as_ref().map(|s| s.enrolment(tools)).transpose()?.unwrap_or_default();
        // In a virtual machine the key is enrolled at once; elsewhere somebody chooses it from the menu.
        let enrol = if signer.is_some() { "secure-boot-enroll if-safe\n" } else { "" };
        let mut files = BTreeMap::from([
            ("EFI/BOOT/BOOTX64.EFI".to_owned(), boot.clone()),
            ("EFI/systemd/systemd-bootx64.efi".to_owned(), boot),
            // Three tries, then the version before it.
            (format!("EFI/Linux/{id}_{}+3.efi", self.project.topology.version), uki),
            ("loader/loader.conf".to_owned(), format!("timeout 0\neditor no\n{enrol}").into_bytes()),
            ("loader/entries.srel".to_owned(), b"type1\n".to_vec()),
        ]);
        files.extend(keys);
        Ok(files)
    }
}

/// The profiles' words for the kernel.
fn cmdline(recipe: &Recipe) -> String {
    recipe.profiles.iter().flat_map(|p| &p.cmdline).map(String::as_str).collect::<Vec<_>>().join(" ")
}

struct Root {
    path: PathBuf,
    size: u64,
    verity: Vec<u8>,
    hash: String,
}

/// Verity leaves of a file of which most blocks are those of `base`.
fn leaves_of(path: &Path, base: &Path, known: &[u8]) -> std::io::Result<Vec<u8>> {
    const CHUNK: usize = 4 << 20;
    let (mut file, mut base) = (File::open(path)?, File::open(base)?);
    let (mut data, mut old) = (Vec::new(), Vec::new());
    let mut leaves = Vec::new();
    loop {
        data.clear();
        old.clear();
        file.by_ref().take(CHUNK as u64).read_to_end(&mut data)?;
        base.by_ref().take(CHUNK as u64).read_to_end(&mut old)?;
        if data.is_empty() {
            return Ok(leaves);
        }
        let from = leaves.len().min(known.len());
        leaves.extend(verity::leaves_from(&data, &old, &known[from..]));
    }
}

fn outputs(out: &Path, name: &str) -> Result<Vec<(String, u64, u64)>> {
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

/// A binary for nodes: installed beside this one.
fn beside(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe().map_err(Error::io("find", "bakehouse's own program"))?;
    let path = own.with_file_name(name);
    if path.is_file() {
        return Ok(path);
    }
    fail(format!("{} is missing; build it with `cargo build --release`", path.display()))
}
