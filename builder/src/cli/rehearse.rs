//! `bakehouse rehearse`.

use std::path::Path;

use super::context::Context;
use super::output::print;
use super::results::{CommandResult, Event};
use crate::error::Result;
use crate::rehearse;

/// Injects faults into the running fleet, and returns what clients noticed.
pub(super) fn rehearse(
    context: &Context,
    scenarios: &[String],
    repeat: u32,
    page: Option<&Path>,
    revision: Option<&str>,
) -> Result<CommandResult> {
    let chosen = rehearse::chosen(scenarios)?;
    let rehearsal = rehearse::Rehearsal::new(context.project, context.progress)?;
    let page =
        page.map(|path| rehearse::Page::open(context.project, path, rehearsal.machines, revision)).transpose()?;
    let mut outcomes = Vec::new();
    let played = rehearsal.play(&chosen, repeat, |so_far| {
        outcomes = so_far.to_vec();
        if let Some(outcome) = so_far.last() {
            let _ = context.output.event(Event::Run(outcome));
        }
        page.as_ref().map_or(Ok(()), |page| page.write(so_far))
    });
    // After an error, the command still prints the outcomes of earlier runs. As JSON, it has printed them as events.
    if played.is_err() && !context.output.json {
        print(rehearse::table(&outcomes))?;
    }
    played.map(|()| CommandResult::Rehearse(outcomes))
}
