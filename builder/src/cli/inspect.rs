//! `bakehouse check`.

use fleet::ha_table;

use super::context::Context;
use super::problem::Problem;
use super::reference;
use super::results::{CheckResult, CommandResult};
use crate::error::Result;
use crate::project::check as checks;
use crate::util::terminal::columns;

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
        table: checks::table(project, columns()),
    }))
}
