//! `bakehouse flash`, `vm` and `netboot`: nodes on machines.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use ipnet::Ipv4Net;

use super::args::MirrorArg;
use super::build::images_of;
use super::context::Context;
use super::next;
use super::results::{CommandResult, Event, FlashResult, NetbootResult, VmResult};
use crate::deploy::export::{ExportOptions, export};
use crate::deploy::{flash, netboot};
use crate::error::{Error, Result, fail};
use crate::image::Build;
use crate::keys::authority::FleetKey;
use crate::keys::ticket::{DEFAULT_TERMS, TicketSummary, TicketTerms, mint};
use crate::keys::ticket_log;
use crate::packages::lock::Lock;
use crate::store::Store;
use crate::toolchain::Tools;
use crate::vm;

/// What `flash` writes, besides the options of the target.
pub(super) struct FlashSource<'a> {
    /// Node or group.
    pub(super) to: &'a str,
    pub(super) replace: bool,
    pub(super) no_ticket: bool,
    pub(super) mirror: &'a MirrorArg,
}

/// Writes a node's image and its ticket to a disk or a file.
pub(super) fn flash(context: &Context, source: &FlashSource, options: &flash::FlashOptions) -> Result<CommandResult> {
    let Context { project, progress, .. } = context;
    let group = flash::group_of(&project.topology, source.to)?.to_owned();
    next::drivers(context, options.target);
    let terms = TicketTerms { replace: source.replace, ..DEFAULT_TERMS };
    let mint = || mint(&FleetKey::load(project)?, &project.topology, source.to, &terms, BTreeMap::new());
    // Before the build, so that an impossible ticket fails early.
    let ticket = if source.no_ticket { None } else { Some(mint()?) };
    ticket.iter().try_for_each(|ticket| ticket_log::note(&project.dir, ticket))?;
    let images = images_of(context, std::slice::from_ref(&group), None, source.mirror)?;
    let tools = Tools::prepare(&Lock::load(project)?, &Store::open()?, progress)?;
    let mut bytes = 0;
    for image in &images {
        let secure = project.fleet.secure_boot.is_some();
        let file = ticket.as_ref().map(|ticket| flash::TicketFile { ticket, secure, tools: &tools });
        bytes = flash::flash(&image.disk, file.as_ref(), options, progress)?;
        next::flashed(context, source.to, options.target, ticket.as_ref());
    }
    let ticket = ticket.as_ref().map(TicketSummary::from_ticket);
    Ok(CommandResult::Flash(FlashResult { done: options.target.to_owned(), bytes, group, ticket }))
}

/// Writes a node's disk and the definitions of its machine.
pub(super) fn vm(
    context: &Context,
    options: &ExportOptions,
    output: &Path,
    mirror: &MirrorArg,
) -> Result<CommandResult> {
    let Context { project, progress, .. } = context;
    let group = vm::groups_of(project, &[options.node.to_owned()])?;
    // Before the build, so that an existing file fails early.
    options.check(output)?;
    let images = images_of(context, &group, None, mirror)?;
    let tools = Tools::prepare(&Lock::load(project)?, &Store::open()?, progress)?;
    let [image] = &images[..] else { return fail("there is no image of the node's group") };
    let (files, ticket) = export(project, image, options, output, &tools, progress)?;
    Ok(CommandResult::Vm(VmResult { node: options.node.to_owned(), files, ticket }))
}

/// Confirms codes of machines, and serves machines that boot from the network.
pub(super) fn netboot(
    context: &Context,
    interface: Option<&str>,
    dhcp: Option<Ipv4Net>,
    again: &[String],
    approve: &[String],
    mirror: &MirrorArg,
) -> Result<CommandResult> {
    let Context { project, progress, output, .. } = *context;
    let approved = netboot::approve(project, approve)?;
    for code in &approved {
        progress.say("netboot", &format!("confirmed {code}; its machine continues within 15 s"));
    }
    let Some(interface) = interface else {
        if again.is_empty() && dhcp.is_none() {
            return Ok(CommandResult::Netboot(NetbootResult { approved }));
        }
        return Err(Error::Usage(
            "--again and --dhcp start a server, which needs --interface\n  help: add --interface NAME".into(),
        ));
    };
    let images = images_of(context, &netboot::groups(project)?, None, mirror)?;
    let (store, lock) = (Store::open()?, Lock::load(project)?);
    let build = Build { project, lock: &lock, store: &store, progress, revision: None };
    let on_change: netboot::MachineEvents =
        Arc::new(move |change: netboot::MachineChange| drop(output.event(Event::Machine(change))));
    let on_change = output.json.then_some(on_change);
    netboot::netboot(&build, &images, &netboot::NetbootOptions { interface, dhcp, again, on_change })?;
    Ok(CommandResult::Netboot(NetbootResult { approved }))
}
