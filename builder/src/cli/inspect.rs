//! `bakehouse check` and `explain`: facts about a fleet and its images.

use fleet::ha_table;

use super::context::Context;
use super::reference;
use super::results::{CheckResult, CommandResult, Problem};
use crate::error::{Error, Result};
use crate::packages;
use crate::project::check as checks;

/// Checks fleet.toml, profiles and overlays.
pub(super) fn check(context: &Context) -> Result<CommandResult> {
    let project = context.project;
    context.warn();
    checks::dry_bake(project)?;
    reference::refresh_schema_for_check(project, context.progress);
    Ok(CommandResult::Check(CheckResult {
        warnings: project.warnings.iter().map(Problem::from).collect(),
        nodes: ha_table(&project.topology),
        voters: project.topology.voters.clone(),
        table: checks::table(project),
    }))
}

/// Returns the origin of a file in an image.
pub(super) fn explain(context: &Context, path: &str, group: Option<&str>) -> Result<CommandResult> {
    let project = context.project;
    let groups = project.groups(&group.iter().map(|&g| g.to_owned()).collect::<Vec<_>>())?;
    let [group] = groups[..] else {
        let groups = groups.join(", ");
        return Err(Error::Usage(format!("the fleet has several images\n  help: add --group, one of {groups}")));
    };
    packages::explain::explain(project, group, path).map(CommandResult::Explain)
}
