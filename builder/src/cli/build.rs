//! `bakehouse lock` and `bakehouse build`, also for commands that build first.

use super::args::MirrorArg;
use super::output::print;
use crate::compose;
use crate::error::Result;
use crate::image::{Build, BuiltImage};
use crate::packages::fetch::fetch;
use crate::packages::lock::Lock;
use crate::packages::mirror::Mirror;
use crate::packages::requests::TOOLS;
use crate::packages::resolve::resolve;
use crate::progress::Progress;
use crate::project::{ImageSpec, Project};
use crate::store::Store;

/// Selects package versions and writes `bakehouse.lock`. Keeps a valid lock unless `update` is set.
pub(super) fn lock(project: &Project, mirror: &Mirror, store: &Store, progress: &Progress, update: bool) -> Result<()> {
    let path = Lock::path(project);
    if !update && Lock::load(project).is_ok() {
        let message = format!("{} is valid; for newer packages, run bakehouse lock --update", path.display());
        progress.say("lock", &message);
        return Ok(());
    }
    let old = Lock::read(&path).unwrap_or(None);
    let new = resolve(project, mirror, store, progress)?;
    new.write(&path)?;
    let changes = old.map(|old| new.changes_from(&old)).unwrap_or_default();
    changes.iter().try_for_each(|change| print(format_args!("{change}\n")))
}

/// Builds the images of groups, or of all groups if `groups` is empty. Downloads missing packages first.
pub(super) fn build(
    project: &Project,
    groups: &[String],
    revision: Option<&str>,
    mirror: &MirrorArg,
    progress: &Progress,
) -> Result<Vec<BuiltImage>> {
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
        fetch(&missing, &Mirror::of(project, mirror.mirror.as_deref())?, &store, progress)?;
    }
    let build = Build { project, lock: &lock, store: &store, progress, revision };
    groups.iter().map(|g| build.image(g)).collect()
}
