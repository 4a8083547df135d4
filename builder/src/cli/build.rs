//! `bakehouse lock`, `fetch`, `build` and `store gc`, and the images of commands that build first.

use std::time::Duration;

use super::args::MirrorArg;
use super::context::Context;
use super::output::{print, print_json};
use crate::compose;
use crate::error::Result;
use crate::image::{Build, BuiltImage};
use crate::packages::fetch;
use crate::packages::lock::Lock;
use crate::packages::mirror::Mirror;
use crate::packages::requests::TOOLS;
use crate::packages::resolve::resolve;
use crate::progress::Progress;
use crate::project::ImageSpec;
use crate::store::Store;

/// Selects package versions and writes `bakehouse.lock`. Keeps a valid lock unless `update` is set.
pub(super) fn lock(context: &Context, update: bool, mirror: &MirrorArg) -> Result<()> {
    let Context { project, progress, .. } = context;
    let store = Store::open()?;
    let mirror = Mirror::of(project, mirror.mirror.as_deref())?;
    let path = Lock::path(project);
    if !update && Lock::load(project).is_ok() {
        let message = format!("{} is valid; for newer packages, run bakehouse lock --update", path.display());
        progress.say("lock", &message);
        return Ok(());
    }
    let old = Lock::read(&path).unwrap_or(None);
    let new = resolve(project, &mirror, &store, progress)?;
    new.write(&path)?;
    let changes = old.map(|old| new.changes_from(&old)).unwrap_or_default();
    changes.iter().try_for_each(|change| print(format_args!("{change}\n")))
}

/// Downloads the locked packages into the store.
pub(super) fn fetch(context: &Context, mirror: &MirrorArg) -> Result<()> {
    let Context { project, progress, .. } = context;
    let store = Store::open()?;
    let mirror = Mirror::of(project, mirror.mirror.as_deref())?;
    let lock = Lock::load(project)?;
    fetch::fetch(&lock.packages.iter().collect::<Vec<_>>(), &mirror, &store, progress)?;
    Ok(())
}

/// Builds the images of groups.
pub(super) fn build(context: &Context, groups: &[String], revision: Option<&str>, mirror: &MirrorArg) -> Result<()> {
    let images = images_of(context, groups, revision, mirror)?;
    print_json(context.json, &images)
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
    let missing: Vec<_> = recipes
        .iter()
        .filter(|r| compose::in_store(r, &lock, &store).is_none())
        .map(|r| r.group.as_str())
        .chain([TOOLS])
        .flat_map(|image| lock.packages_of(image, false))
        .filter(|p| !store.has_deb(&p.sha256))
        .collect();
    if !missing.is_empty() {
        fetch::fetch(&missing, &Mirror::of(project, mirror.mirror.as_deref())?, &store, progress)?;
    }
    let build = Build { project, lock: &lock, store: &store, progress, revision };
    groups.iter().map(|g| build.image(g)).collect()
}

/// Removes old entries of the store.
pub(super) fn gc(progress: &Progress, older_than: u64) -> Result<()> {
    let (count, bytes) = Store::open()?.gc(Duration::from_secs(older_than * 86_400))?;
    progress.say("gc", &format!("removed {count} entries, {:.0} MB", bytes as f64 / 1e6));
    Ok(())
}
