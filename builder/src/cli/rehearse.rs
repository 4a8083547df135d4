//! `bakehouse rehearse`.

use std::path::Path;
use std::process::ExitCode;

use super::context::Context;
use super::output::{print, print_json};
use crate::error::Result;
use crate::rehearse;

/// Injects faults into the running fleet, and prints what clients noticed.
pub(super) fn rehearse(
    context: &Context,
    scenarios: &[String],
    repeat: u32,
    page: Option<&Path>,
    revision: Option<&str>,
) -> Result<ExitCode> {
    let chosen = rehearse::chosen(scenarios)?;
    let rehearsal = rehearse::Rehearsal::new(context.project, context.progress)?;
    let page =
        page.map(|path| rehearse::Page::open(context.project, path, rehearsal.machines, revision)).transpose()?;
    let mut outcomes = Vec::new();
    // After an error, the command still prints the outcomes of earlier runs.
    let played = rehearsal.play(&chosen, repeat, |so_far| {
        outcomes = so_far.to_vec();
        page.as_ref().map_or(Ok(()), |page| page.write(so_far))
    });
    let printed = if context.json { print_json(true, &outcomes) } else { print(rehearse::table(&outcomes)) };
    played.and(printed)?;
    let is_kept = outcomes.iter().all(|o| o.broken.is_empty());
    Ok(if is_kept { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
