//! `bakehouse ticket` and `bakehouse leave`.

use std::io::IsTerminal as _;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::context::Context;
use super::next;
use super::results::{CommandResult, LeaveResult, NewTicketResult, RescueResult, RevokedTicket, TicketResult};
use crate::error::{Error, Result};
use crate::keys::authority::FleetKey;
use crate::keys::rescue::{image, order};
use crate::keys::ticket::{TicketSummary, TicketTerms, mint};
use crate::keys::ticket_log;
use crate::util::fs::{shown, write_private};

/// Options of a new ticket.
pub(super) struct NewTicket<'a> {
    /// Node or group.
    pub(super) to: &'a str,
    pub(super) uses: Option<u32>,
    pub(super) days: Option<u32>,
    pub(super) replace: bool,
    pub(super) output: Option<&'a Path>,
    /// Options `--endpoint`.
    pub(super) endpoint: &'a [String],
}

/// Mints a ticket.
pub(super) fn new(context: &Context, options: &NewTicket) -> Result<CommandResult> {
    let Context { project, progress, .. } = context;
    let &NewTicket { to, replace, .. } = options;
    let limited = options.uses.is_some() || options.days.is_some();
    let (uses, days) = (options.uses.unwrap_or(1), options.days.unwrap_or(1));
    let lasts = Duration::from_secs(u64::from(days) * 86_400);
    let terms = TicketTerms { uses, lasts, replace };
    next::refuse_terminal(to, options.output, std::io::stdout().is_terminal())?;
    let endpoints = context.endpoints(options.endpoint)?;
    let ticket = mint(&FleetKey::load(project)?, &project.topology, to, &terms, endpoints)?;
    let message = if let Some(claims) = ticket.token().and_then(fleet::Token::read) {
        format!("number {}: for {to}, {uses} uses within {days} days", claims.id)
    } else if limited {
        return Err(Error::Usage(format!(
            "{to} is a founder (hub or voter), whose ticket has no limits\n  help: leave out --uses and --days"
        )));
    } else {
        format!("for {to}, a founder (hub or voter): it does not expire; keep it secret")
    };
    ticket_log::note(&project.dir, &ticket)?;
    progress.say("ticket", &message);
    let summary = TicketSummary::from_ticket(&ticket);
    let path = options.output.map(Path::to_owned);
    let ticket = if let Some(path) = &path {
        write_private(path, &serde_json::to_vec(&ticket).map_err(Error::Json)?)?;
        None
    } else {
        Some(ticket)
    };
    Ok(CommandResult::Ticket(TicketResult::New(NewTicketResult { summary, path, ticket })))
}

/// Makes a rescue disk.
pub(super) fn rescue(context: &Context, node: &str, hours: u32, output: Option<&Path>) -> Result<CommandResult> {
    let Context { project, progress, .. } = context;
    let output = output.ok_or_else(|| Error::Usage("--rescue needs --output FILE".to_owned()))?;
    let file = shown(output);
    // The image replaces the file, and a device is no file.
    if output.metadata().is_ok_and(|found| !found.is_file()) {
        return Err(Error::Usage(format!(
            "{file} is not a file\n  help: make the image in a file with `-o rescue.img`, and copy it to the device: \
             `dd if=rescue.img of={file} conv=fsync`"
        )));
    }
    if !project.topology.access.rescue {
        return Err(Error::Failed(
            "the nodes of this fleet ignore rescue disks\n  help: remove `rescue = false` from [access] in fleet.toml, \
             and roll the new images out"
                .to_owned(),
        ));
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let order = order(&project.topology, node, now, Duration::from_secs(u64::from(hours) * 3600))?;
    write_private(output, &image(&FleetKey::load(project)?, &order)?)?;
    progress.say(
        "ticket",
        &format!(
            "{file}: opens the maintenance console of {node} until {} (order {}); copy the image to a USB stick, or \
             attach it to the machine as a disk",
            order.expires_at(),
            order.id
        ),
    );
    Ok(CommandResult::Ticket(TicketResult::Rescue(RescueResult {
        rescue: order.node.clone(),
        id: order.id.clone(),
        expires: order.expires,
        expires_at: order.expires_at(),
        path: output.to_owned(),
    })))
}

/// Lists the minted tickets.
pub(super) fn list(context: &Context, endpoint: &[String]) -> Result<CommandResult> {
    let known = context.hubs(endpoint)?.tokens();
    if let Err(e) = &known {
        context.warn_that("ticket", format!("cannot list how often each ticket was used: {}", e.chain()));
    }
    let rows = ticket_log::rows(&context.project.dir, known.ok().as_ref())?;
    Ok(CommandResult::Ticket(TicketResult::List(rows)))
}

/// Revokes a ticket.
pub(super) fn revoke(context: &Context, number: &str, endpoint: &[String]) -> Result<CommandResult> {
    let hub = context.hubs(endpoint)?.revoke(number)?;
    context.progress.say("ticket", &format!("{hub} revoked {number}"));
    Ok(CommandResult::Ticket(TicketResult::Revoked(RevokedTicket { number: number.to_owned(), hub })))
}

/// Removes a node from the fleet.
pub(super) fn leave(context: &Context, node: &str, now: bool, endpoint: &[String]) -> Result<CommandResult> {
    context.project.node(node)?;
    let hub = context.hubs(endpoint)?.leave(node, now)?;
    let message = if now { format!("{hub} evicted {node}") } else { format!("{hub} asked {node} to leave") };
    context.progress.say("leave", &message);
    Ok(CommandResult::Leave(LeaveResult { node: node.to_owned(), now, hub }))
}
