//! `bakehouse check` and `explain`: facts about a fleet and its images.

use fleet::ha_table;

use super::context::Context;
use super::output::{print, print_json};
use super::reference;
use crate::error::{Error, Result};
use crate::packages;
use crate::project::check as checks;

/// Checks fleet.toml, profiles and overlays.
pub(super) fn check(context: &Context) -> Result<()> {
    let project = context.project;
    context.warn();
    checks::dry_bake(project)?;
    reference::refresh_schema_for_check(project, context.progress);
    let table = ha_table(&project.topology);
    print_json(
        context.json,
        &serde_json::json!({ "warnings": project.warnings, "nodes": table, "voters": project.topology.voters }),
    )?;
    if context.json { Ok(()) } else { print(format_args!("{}\n", checks::table(project))) }
}

/// Prints the origin of a file in an image.
pub(super) fn explain(context: &Context, path: &str, group: Option<&str>) -> Result<()> {
    let project = context.project;
    let groups = project.groups(&group.iter().map(|&g| g.to_owned()).collect::<Vec<_>>())?;
    let [group] = groups[..] else {
        let groups = groups.join(", ");
        return Err(Error::Usage(format!("the fleet has several images\n  help: add --group, one of {groups}")));
    };
    let explanation = packages::explain::explain(project, group, path)?;
    print_json(context.json, &explanation)?;
    if context.json { Ok(()) } else { print(format_args!("{explanation}\n")) }
}
