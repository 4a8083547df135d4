//! Packages → a layer: the root tree of an image, as one tar, with everything that belongs
//! to a build or to a node taken out.
//!
//! The tree lives only inside a sandbox, on a tmpfs where memory allows. What comes out is a
//! folder in the store: `root.tar` (entries sorted, times zero), and for a finished layer
//! `vmlinuz` and `layer.json`.

mod archive;
mod configure;
mod deb;
mod dpkgdb;
mod finish;
mod image_tree;
mod unpack;
mod work;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use fleet::{Trim, User};
use serde::{Deserialize, Serialize};

pub use configure::{IN_ROOT, Said, enter, in_root_with};
pub use deb::{Deb, data_entries};
pub use image_tree::ImageTree;
pub use work::{Work, inner};

use crate::digest::Key;
use crate::error::{Error, Result};
use crate::lock::{Lock, Package};
use crate::progress::Progress;
use crate::project::Recipe;
use crate::sandbox;
use crate::store::{Kind, Store};

/// Digest of compose's own code: another program's layers are not reused.
const CODE: &str = env!("CODE_COMPOSE");

/// What the sandbox is to do.
#[derive(Debug, Serialize, Deserialize)]
pub struct Job {
    /// A folder of ours to work in.
    work: PathBuf,
    /// Work in memory.
    ram: bool,
    /// Tree to start from.
    start: Option<PathBuf>,
    stages: Vec<Stage>,
    trim: Vec<Rule>,
    users: BTreeMap<String, (u32, String, bool)>,
}

/// Packages to add, and where the tree goes after.
#[derive(Debug, Serialize, Deserialize)]
struct Stage {
    debs: Vec<DebFile>,
    out: PathBuf,
    /// Take out what belongs to the build; nothing can be installed after.
    finish: bool,
}

#[derive(Debug, Serialize, Deserialize)]
struct DebFile {
    path: PathBuf,
    sha256: String,
    essential: bool,
}

/// A path pattern in dpkg's language; the last that matches decides.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Rule {
    pub pattern: String,
    pub keep: bool,
}

/// What a finished layer says of itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LayerInfo {
    /// `uname -r` of the kernel in it.
    pub kernel: String,
    /// Bytes of all files.
    pub bytes: u64,
    pub files: u64,
}

/// A finished layer in the store.
#[derive(Clone, Debug)]
pub struct Layer {
    pub key: String,
    pub dir: PathBuf,
}

impl Layer {
    #[must_use]
    pub fn tar(&self) -> PathBuf {
        self.dir.join("root.tar")
    }

    #[must_use]
    pub fn kernel(&self) -> PathBuf {
        self.dir.join("vmlinuz")
    }

    /// # Errors
    /// The store is damaged.
    pub fn info(&self) -> Result<LayerInfo> {
        let path = self.dir.join("layer.json");
        let bytes = fs::read(&path).map_err(Error::io("read", &path))?;
        serde_json::from_slice(&bytes).map_err(|e| {
            Error::Failed(format!("{} is damaged ({e}); run `bakehouse store gc --older-than 0`", path.display()))
        })
    }
}

/// The group's layer, if it is made: then no package of it is needed.
#[must_use]
pub fn in_store(recipe: &Recipe, lock: &Lock, store: &Store) -> Option<Layer> {
    let key = plan(recipe, lock).1;
    store.get(Kind::Layer, &key).map(|dir| Layer { key, dir })
}

/// The layer of a group; made if it is not in the store.
///
/// # Errors
/// A package can't be unpacked or configured: its own words.
pub fn compose(recipe: &Recipe, lock: &Lock, store: &Store, progress: &Progress) -> Result<Layer> {
    let (base_key, key) = plan(recipe, lock);
    let _guard = store.lock(Kind::Layer, &key)?;
    if let Some(dir) = store.get(Kind::Layer, &key) {
        return Ok(Layer { key, dir });
    }
    let name = &recipe.group;
    // Images that start from the same base wait for the first to make it.
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
    let debs = |packages: &[&Package]| -> Vec<DebFile> {
        packages
            .iter()
            .map(|p| DebFile {
                path: store.path(Kind::Deb, &p.sha256),
                sha256: p.sha256.clone(),
                essential: p.essential,
            })
            .collect()
    };
    let all = lock.packages_of(name, false);
    let base = lock.packages_of(name, true);
    let rest: Vec<&Package> = all.iter().copied().filter(|p| !base.contains(p)).collect();
    let mut stages = Vec::new();
    let base_out = scratch.join("base");
    match (&base_key, &start) {
        (Some(_), None) => {
            stages.push(Stage { debs: debs(&base), out: base_out.clone(), finish: false });
            stages.push(Stage { debs: debs(&rest), out: scratch.join("layer"), finish: true });
        }
        (Some(_), Some(_)) => stages.push(Stage { debs: debs(&rest), out: scratch.join("layer"), finish: true }),
        (None, _) => stages.push(Stage { debs: debs(&all), out: scratch.join("layer"), finish: true }),
    }
    for stage in &stages {
        fs::create_dir_all(&stage.out).map_err(Error::io("create", &stage.out))?;
    }
    let bytes: u64 = all.iter().map(|p| p.installed_size * 1024).sum();
    let job = Job { work, ram: fits_in_memory(bytes), start, stages, trim: rules(recipe), users: users(recipe) };
    let info: LayerInfo = sandbox::run(&Work::Compose(job)).map_err(|e| match e {
        Error::Failed(words) => Error::Failed(format!("{name}: the packages could not be put together:\n{words}")),
        e => e,
    })?;
    if let (Some(base_key), Some(_)) = (&base_key, &base_guard) {
        store.put(Kind::Layer, base_key, &base_out)?;
    }
    let layer = scratch.join("layer");
    let json = serde_json::to_vec(&info).map_err(|e| Error::Failed(e.to_string()))?;
    fs::write(layer.join("layer.json"), json).map_err(Error::io("write", &layer))?;
    let dir = store.put(Kind::Layer, &key, &layer)?;
    step.done(&format!("{name}: {} packages, {:.0} MB in {} files", all.len(), info.bytes as f64 / 1e6, info.files));
    Ok(Layer { key, dir })
}

/// Keys of the shared base, if this image has one, and of the layer itself.
fn plan(recipe: &Recipe, lock: &Lock) -> (Option<String>, String) {
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
    (base, layer.finish())
}

/// Exclusions of all profiles in their order, then what they keep.
fn rules(recipe: &Recipe) -> Vec<Rule> {
    let of = |keep: bool| {
        recipe.profiles.iter().flat_map(move |p| {
            let trim: &Trim = &p.trim;
            let patterns = if keep { &trim.include } else { &trim.exclude };
            patterns.iter().map(move |pattern| Rule { pattern: pattern.clone(), keep })
        })
    };
    of(false).chain(of(true)).collect()
}

fn users(recipe: &Recipe) -> BTreeMap<String, (u32, String, bool)> {
    let of = |u: &User| (u.id, u.home.clone(), u.group_only);
    recipe.profiles.iter().flat_map(|p| &p.users).map(|(name, u)| (name.clone(), of(u))).collect()
}

/// Whether a tree of this size, and the compressed files beside it, fit in free memory.
fn fits_in_memory(bytes: u64) -> bool {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib =
        text.lines().find_map(|l| l.strip_prefix("MemAvailable:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kib.is_some_and(|kib| kib * 1024 > bytes + bytes / 2 + (512 << 20))
}

struct Cleanup<'a>(&'a Path);

impl Drop for Cleanup<'_> {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(self.0);
    }
}
