//! Composes layers from packages. A layer is the root tree of an image as one tar, without the files that belong to the
//! build or to one node.
//!
//! The tree exists only inside a sandbox, on a tmpfs if the memory suffices. The result is a folder in the store:
//! `root.tar` (entries sorted, times zero), and for a finished layer `vmlinuz` and `layer.json`.

mod archive;
mod configure;
mod dpkg_database;
mod finish;
mod image_tree;
mod job;
mod layer;
pub(crate) mod tar_index;
mod unpack;
mod wheels;
mod work;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use fleet::{Trim, User};

pub use image_tree::ImageTree;
use job::{DebFile, Job, Rule, Stage, WheelFile};
pub use layer::{Layer, LayerInfo};
pub(crate) use work::work;

use crate::error::{Error, Result};
use crate::format::deb::Deb;
use crate::packages::lock::{Lock, Package};
use crate::progress::Progress;
use crate::project::ImageSpec;
use crate::sandbox::{self, HostFile, Limits, Room};
use crate::store::{Kind, Store};
use crate::util::digest::Key;

/// Digest of this step's code, so that a build does not reuse the layers of other code.
const CODE: &str = env!("CODE_COMPOSE");

/// Name of the sandbox's task.
pub(crate) const TASK: &str = "compose";

/// The file of a package, for [`TreeOrder`].
#[derive(Clone, Debug)]
pub struct PackageFile {
    /// Path of the .deb.
    pub path: PathBuf,
    /// sha256 of the .deb, in hex.
    pub sha256: String,
    /// Whether dpkg configures the package before others.
    pub essential: bool,
}

/// Packages to add to a tree, and the folder of the resulting `root.tar`.
#[derive(Clone, Debug)]
pub struct PackageSet {
    /// The packages, in any order.
    pub packages: Vec<PackageFile>,
    /// Python packages: path and sha256 of each wheel.
    pub wheels: Vec<(PathBuf, String)>,
    /// Folder for `root.tar`, which exists.
    pub out: PathBuf,
    /// Turns the tree into the tree of an image, and writes the kernel to `vmlinuz` in `out`. Needs a kernel package.
    pub finish: bool,
}

/// Returns the group's layer if the store has it; the build then needs none of the group's packages.
#[must_use]
pub fn in_store(recipe: &ImageSpec, lock: &Lock, store: &Store) -> Option<Layer> {
    let key = plan(recipe, lock).1;
    store.get(Kind::Layer, &key).map(|dir| Layer { key, dir })
}

/// Returns the layer of a group. Composes it if the store does not have it.
///
/// # Errors
/// If a package cannot be unpacked or configured. The error has the output of its scripts.
pub fn compose(recipe: &ImageSpec, lock: &Lock, store: &Store, progress: &Progress) -> Result<Layer> {
    let (base_key, key) = plan(recipe, lock);
    let _guard = store.lock(Kind::Layer, &key)?;
    if let Some(dir) = store.get(Kind::Layer, &key) {
        return Ok(Layer { key, dir });
    }
    let name = &recipe.group;
    // Groups with the same base wait for the first one to compose it.
    let base_guard = base_key.as_ref().map(|k| store.lock(Kind::Layer, k)).transpose()?;
    let start = base_key.as_ref().and_then(|k| store.get(Kind::Layer, k)).map(|d| d.join("root.tar"));
    let base_guard = if start.is_some() {
        drop(base_guard);
        None
    } else {
        base_guard
    };
    let step = progress.step("compose", &format!("{name}: {} packages", lock.packages_of(name, false).len()));

    let scratch = store.scratch(Kind::Layer, &key);
    let work = scratch.join("work");
    fs::create_dir_all(&work).map_err(Error::io("create", &work))?;
    let _cleanup = Cleanup(&scratch);
    let set = |packages: &[&Package], out: &str, finish: bool| PackageSet {
        packages: packages
            .iter()
            .map(|p| PackageFile {
                path: store.path(Kind::Deb, &p.sha256),
                sha256: p.sha256.clone(),
                essential: p.essential,
            })
            .collect(),
        wheels: if finish {
            lock.wheels_of(name).iter().map(|w| (store.path(Kind::Wheel, &w.sha256), w.sha256.clone())).collect()
        } else {
            Vec::new()
        },
        out: scratch.join(out),
        finish,
    };
    let all = lock.packages_of(name, false);
    let base = lock.packages_of(name, true);
    let rest: Vec<&Package> = all.iter().copied().filter(|p| !base.contains(p)).collect();
    let sets = match (&base_key, &start) {
        (Some(_), None) => vec![set(&base, "base", false), set(&rest, "layer", true)],
        (Some(_), Some(_)) => vec![set(&rest, "layer", true)],
        (None, _) => vec![set(&all, "layer", true)],
    };
    let bytes: u64 = all.iter().map(|p| p.installed_size * 1024).sum();
    let order = TreeOrder {
        room: Room::for_tree(bytes),
        start,
        sets,
        trim: rules(recipe),
        users: users(recipe),
        limits: Limits::for_folder(&work),
    };
    let info = order.compose_with_progress(&work, &mut |text| step.message(&format!("{name}: {text}"))).map_err(
        |e| match e {
            job @ Error::Sandbox(_) => Error::at(format!("{name}: cannot compose the packages"))(job),
            e => e,
        },
    )?;
    let base_out = scratch.join("base");
    if let (Some(base_key), Some(_)) = (&base_key, &base_guard) {
        store.put(Kind::Layer, base_key, &base_out)?;
    }
    let layer = scratch.join("layer");
    let json = serde_json::to_vec(&info).map_err(Error::Json)?;
    fs::write(layer.join("layer.json"), json).map_err(Error::io("write", &layer))?;
    let dir = store.put(Kind::Layer, &key, &layer)?;
    step.done(&format!("{name}: {} packages, {:.0} MB in {} files", all.len(), info.bytes as f64 / 1e6, info.files));
    Ok(Layer { key, dir })
}

/// All inputs of a tree of packages.
#[derive(Debug)]
pub struct TreeOrder {
    room: Room,
    /// Tar of the tree to start from.
    start: Option<PathBuf>,
    sets: Vec<PackageSet>,
    trim: Vec<Rule>,
    users: BTreeMap<String, (u32, String, bool)>,
    limits: Limits,
}

impl TreeOrder {
    /// Adds the sets of packages, one after the other, to an empty tree.
    #[must_use]
    pub fn new(sets: Vec<PackageSet>, room: Room, limits: Limits) -> Self {
        Self { room, start: None, sets, trim: Vec::new(), users: BTreeMap::new(), limits }
    }

    /// Composes the tree in a sandbox. `work` is an empty folder for the sandbox alone.
    ///
    /// # Errors
    /// If a package cannot be unpacked or configured, or its scripts exceed a limit.
    pub fn compose(self, work: &Path) -> Result<LayerInfo> {
        self.compose_with_progress(work, &mut |_| {})
    }

    /// Composes the tree as [`TreeOrder::compose`] does, and calls `progress` with what the sandbox does.
    fn compose_with_progress(self, work: &Path, progress: &mut dyn FnMut(&str)) -> Result<LayerInfo> {
        let mut files: Vec<HostFile> = self.start.iter().cloned().map(HostFile::Read).collect();
        let mut stages = Vec::new();
        let mut packages = Vec::new();
        for mut set in self.sets {
            fs::create_dir_all(&set.out).map_err(Error::io("create", &set.out))?;
            // The largest package first, so that no thread unpacks it alone at the end.
            let size = |p: &PackageFile| fs::metadata(&p.path).map_or(0, |m| m.len());
            set.packages.sort_by_cached_key(|p| std::cmp::Reverse(size(p)));
            files.extend(set.packages.iter().map(|p| HostFile::Read(p.path.clone())));
            files.extend(set.wheels.iter().map(|(path, _)| HostFile::Read(path.clone())));
            let outputs = [set.finish.then_some("vmlinuz"), Some("root.tar")];
            files.extend(outputs.into_iter().flatten().map(|name| HostFile::Create(set.out.join(name))));
            let debs = set.packages.iter().map(|p| DebFile {
                name: p.path.display().to_string(),
                sha256: p.sha256.clone(),
                essential: p.essential,
            });
            let wheels =
                set.wheels.into_iter().map(|(path, sha256)| WheelFile { name: path.display().to_string(), sha256 });
            stages.push(Stage { debs: debs.collect(), wheels: wheels.collect(), finish: set.finish });
            packages.extend(set.packages);
        }
        let start = self.start.is_some();
        let job = Job { room: self.room, start, stages, trim: self.trim, users: self.users };
        sandbox::run_with_progress(TASK, &job, &files, work, &self.limits, progress)
            .map_err(|e| removed_damage(&packages).unwrap_or(e))
    }
}

/// Removes packages that changed in the store since they were fetched. Returns the error of the first one.
fn removed_damage(packages: &[PackageFile]) -> Option<Error> {
    // `Deb::open` removes a damaged package.
    packages.iter().find_map(|p| Deb::open(&p.path, &p.sha256).err())
}

/// Returns the keys of the shared base, if the image has one, and of the layer.
fn plan(recipe: &ImageSpec, lock: &Lock) -> (Option<String>, String) {
    let mut common = Key::new(CODE);
    for rule in rules(recipe) {
        common.add(if rule.keep { "keep" } else { "drop" }, &rule.pattern);
    }
    for (name, user) in users(recipe) {
        common.add("user", format!("{name} {user:?}"));
    }
    let key_of = |packages: &[&Package], what: &str| {
        let mut key = Key::new(what);
        key.add("common", common.finish());
        for p in packages {
            key.add(if p.essential { "essential" } else { "deb" }, &p.sha256);
        }
        key.finish()
    };
    let base = lock.packages_of(&recipe.group, true);
    let base = (!base.is_empty()).then(|| key_of(&base, "base"));
    let mut layer = Key::new("layer");
    layer.add("base", base.clone().unwrap_or_default());
    layer.add("packages", key_of(&lock.packages_of(&recipe.group, false), "all"));
    for wheel in lock.wheels_of(&recipe.group) {
        layer.add("wheel", &wheel.sha256);
    }
    (base, layer.finish())
}

/// Returns the exclusions of all profiles in their order, then the exceptions from them.
fn rules(recipe: &ImageSpec) -> Vec<Rule> {
    let rules = |keep: bool| {
        recipe.profiles.iter().flat_map(move |p| {
            let trim: &Trim = &p.trim;
            let patterns = if keep { &trim.include } else { &trim.exclude };
            patterns.iter().map(move |pattern| Rule { pattern: pattern.clone(), keep })
        })
    };
    rules(false).chain(rules(true)).collect()
}

fn users(recipe: &ImageSpec) -> BTreeMap<String, (u32, String, bool)> {
    let entry = |u: &User| (u.id, u.home.clone(), u.group_only);
    recipe.profiles.iter().flat_map(|p| &p.users).map(|(name, u)| (name.clone(), entry(u))).collect()
}

struct Cleanup<'a>(&'a Path);

impl Drop for Cleanup<'_> {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(self.0);
    }
}
