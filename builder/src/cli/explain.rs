//! `bakehouse explain`.

use super::context::Context;
use super::results::{CommandResult, ExplainResult};
use crate::compose;
use crate::compose::tar_index::Tree;
use crate::error::Result;
use crate::packages::explain::explain as sources;
use crate::packages::lock::Lock;
use crate::project::Project;
use crate::store::Store;

/// Returns the source of a path in the image of a group, or in those of all groups that have it.
pub(super) fn explain(context: &Context, path: &str, group: Option<&str>) -> Result<CommandResult> {
    let Context { project, progress, .. } = *context;
    let groups = project.groups(&group.map(str::to_owned).into_iter().collect::<Vec<_>>())?;
    let mut found = sources(project, &groups, path, &|group| in_image(project, group, path), progress)?;
    // Scripts for earlier versions expect one object for one image.
    if groups.len() == 1 && found.len() == 1 {
        return Ok(CommandResult::Explain(ExplainResult::One(found.remove(0))));
    }
    Ok(CommandResult::Explain(ExplainResult::All(found)))
}

/// Returns whether a path exists after the group's packages are unpacked and configured. Returns `None` if the store
/// does not have the result.
fn in_image(project: &Project, group: &str, path: &str) -> Result<Option<bool>> {
    let (lock, store) = (Lock::load(project)?, Store::open()?);
    let Some(layer) = compose::in_store(&project.recipe(group), &lock, &store) else { return Ok(None) };
    let tree = Tree::open(&layer.tar())?;
    Ok(Some(tree.get(&merged(path)).is_some()))
}

/// Returns a path without a leading `/`. Below `/bin` and other links to /usr, returns the path of the link's target:
/// `/bin/sh` is `usr/bin/sh`.
fn merged(path: &str) -> String {
    let path = path.trim_start_matches('/');
    let top = path.split('/').next().unwrap_or_default();
    let is_link = ["bin", "sbin", "lib", "lib64"].contains(&top) && path != top;
    if is_link { format!("usr/{path}") } else { path.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolves_links_of_the_merged_usr() {
        for (path, inner) in
            [("/bin/sh", "usr/bin/sh"), ("/etc/passwd", "etc/passwd"), ("/lib", "lib"), ("lib/x", "usr/lib/x")]
        {
            assert_eq!(merged(path), inner);
        }
    }
}
