//! `bakehouse lock`, `fetch`, `build` and `store gc`, and the images of commands that build first.

use std::time::{Duration, Instant};

use super::args::MirrorArg;
use super::context::Context;
use super::next;
use super::results::{CommandResult, FetchResult, GcResult, LockResult};
use crate::compose;
use crate::error::Result;
use crate::image::{Build, BuiltImage};
use crate::packages::fetch;
use crate::packages::lock::{Lock, LockChanges};
use crate::packages::mirror::Mirror;
use crate::packages::requests::TOOLS;
use crate::packages::resolve::resolve;
use crate::packages::wheels;
use crate::progress::Progress;
use crate::project::ImageSpec;
use crate::sandbox;
use crate::store::Store;
use crate::util::fs::shown;

/// Selects package versions and writes `bakehouse.lock`. Keeps a valid lock unless `update` is set.
pub(super) fn lock(context: &Context, update: bool, mirror: &MirrorArg) -> Result<CommandResult> {
    let Context { project, progress, .. } = context;
    let store = Store::open()?;
    let mirror = Mirror::for_project(project, mirror.mirror.as_deref())?;
    let path = Lock::path(project);
    if !update && let Ok(lock) = Lock::load(project) {
        let message = format!("{} is up to date; `bakehouse lock --update` takes newer packages", shown(&path));
        progress.say("lock", &message);
        let (packages, changes) = (lock.packages.len(), LockChanges::default());
        return Ok(CommandResult::Lock(LockResult { path, unchanged: true, packages, changes }));
    }
    let old = Lock::read(&path).unwrap_or(None);
    let new = resolve(project, &mirror, &store, progress)?;
    new.write(&path)?;
    let changes = old.map(|old| new.changes_from(&old)).unwrap_or_default();
    Ok(CommandResult::Lock(LockResult { path, unchanged: false, packages: new.packages.len(), changes }))
}

/// Downloads the locked packages into the store.
pub(super) fn fetch(context: &Context, mirror: &MirrorArg) -> Result<CommandResult> {
    let Context { project, progress, .. } = context;
    let store = Store::open()?;
    let mirror = Mirror::for_project(project, mirror.mirror.as_deref())?;
    let lock = Lock::load(project)?;
    let missing: Vec<_> = lock.packages.iter().filter(|p| !store.has_deb(&p.sha256)).collect();
    let bytes = missing.iter().map(|p| p.size).sum();
    let packages = fetch::fetch(&missing, &mirror, &store, progress)?;
    let packages = packages + wheels::fetch(&lock.wheels.iter().collect::<Vec<_>>(), &lock, &store, progress)?;
    Ok(CommandResult::Fetch(FetchResult { packages, bytes, locked: lock.packages.len() }))
}

/// Builds the images of groups.
pub(super) fn build(
    context: &Context,
    groups: &[String],
    revision: Option<&str>,
    mirror: &MirrorArg,
) -> Result<CommandResult> {
    let started = Instant::now();
    let images = images_of(context, groups, revision, mirror)?;
    next::built(context, &images, started);
    Ok(CommandResult::Build(images))
}

/// Builds the images of groups, or of all groups if `groups` is empty. Downloads missing packages first.
pub(super) fn images_of(
    context: &Context,
    groups: &[String],
    revision: Option<&str>,
    mirror: &MirrorArg,
) -> Result<Vec<BuiltImage>> {
    let Context { project, progress, .. } = *context;
    let store = Store::open()?;
    let lock = Lock::load(project)?;
    let groups = project.groups(groups)?;
    let recipes: Vec<ImageSpec> = groups.iter().map(|g| project.recipe(g)).collect();
    let unbuilt: Vec<_> = recipes.iter().filter(|r| compose::in_store(r, &lock, &store).is_none()).collect();
    if !unbuilt.is_empty() {
        // Before the downloads, so that a host without these ids fails early.
        sandbox::check_ids()?;
    }
    let missing: Vec<_> = unbuilt
        .iter()
        .map(|r| r.group.as_str())
        .chain([TOOLS])
        .flat_map(|image| lock.packages_of(image, false))
        .filter(|p| !store.has_deb(&p.sha256))
        .collect();
    if !missing.is_empty() {
        fetch::fetch(&missing, &Mirror::for_project(project, mirror.mirror.as_deref())?, &store, progress)?;
    }
    let of_unbuilt: Vec<_> = unbuilt.iter().flat_map(|r| lock.wheels_of(&r.group)).collect();
    wheels::fetch(&of_unbuilt, &lock, &store, progress)?;
    let build = Build { project, lock: &lock, store: &store, progress, revision };
    groups.iter().map(|g| build.image(g)).collect()
}

/// Removes old entries of the store.
pub(super) fn gc(progress: &Progress, older_than: u64) -> Result<CommandResult> {
    let (entries, bytes) = Store::open()?.gc(Duration::from_secs(older_than * 86_400))?;
    progress.say("gc", &format!("removed {entries} entries, {:.0} MB", bytes as f64 / 1e6));
    Ok(CommandResult::StoreGc(GcResult { entries, bytes }))
}
