//! `bakehouse flash`, `vm` and `netboot`: nodes on machines.

use std::collections::BTreeMap;
use std::path::Path;

use ipnet::Ipv4Net;

use super::args::MirrorArg;
use super::build::images_of;
use super::context::Context;
use super::output::print_json;
use crate::deploy::export::{ExportOptions, export};
use crate::deploy::{flash, netboot};
use crate::error::{Error, Result};
use crate::image::Build;
use crate::keys::authority::FleetKey;
use crate::keys::ticket::{DEFAULT_TERMS, TicketTerms, mint};
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
pub(super) fn flash(context: &Context, source: &FlashSource, options: &flash::FlashOptions) -> Result<()> {
    let Context { project, progress, .. } = context;
    let group = flash::group_of(&project.topology, source.to)?.to_owned();
    let terms = TicketTerms { replace: source.replace, ..DEFAULT_TERMS };
    let mint = || mint(&FleetKey::of(project)?, &project.topology, source.to, &terms, BTreeMap::new());
    // Before the build, so that an impossible ticket fails early.
    let ticket = if source.no_ticket { None } else { Some(mint()?) };
    ticket.iter().try_for_each(|ticket| ticket_log::note(&project.dir, ticket))?;
    let images = images_of(context, &[group], None, source.mirror)?;
    let tools = Tools::prepare(&Lock::load(project)?, &Store::open()?, progress)?;
    for image in &images {
        let secure = project.fleet.secure_boot.is_some();
        let ticket = ticket.as_ref().map(|ticket| flash::TicketFile { ticket, secure, tools: &tools });
        flash::flash(&image.disk, ticket.as_ref(), options, progress)?;
    }
    Ok(())
}

/// Writes a node's disk and the definitions of its machine.
pub(super) fn vm(context: &Context, options: &ExportOptions, output: &Path, mirror: &MirrorArg) -> Result<()> {
    let Context { project, progress, .. } = context;
    let group = vm::groups_of(project, &[options.node.to_owned()])?;
    // Before the build, so that an existing file fails early.
    options.check(output)?;
    let images = images_of(context, &group, None, mirror)?;
    let tools = Tools::prepare(&Lock::load(project)?, &Store::open()?, progress)?;
    for image in &images {
        let written = export(project, image, options, output, &tools, progress)?;
        print_json(context.json, &written)?;
    }
    Ok(())
}

/// Confirms codes of machines, and serves machines that boot from the network.
pub(super) fn netboot(
    context: &Context,
    interface: Option<&str>,
    dhcp: Option<Ipv4Net>,
    again: &[String],
    approve: &[String],
    mirror: &MirrorArg,
) -> Result<()> {
    let Context { project, progress, json, .. } = *context;
    for code in netboot::approve(project, approve)? {
        progress.say("netboot", &format!("confirmed {code}; its machine continues within 15 s"));
    }
    let Some(interface) = interface else {
        if again.is_empty() && dhcp.is_none() {
            return Ok(());
        }
        return Err(Error::Usage(
            "--again and --dhcp start a server, which needs --interface\n  help: add --interface NAME".into(),
        ));
    };
    let images = images_of(context, &netboot::groups(project)?, None, mirror)?;
    let (store, lock) = (Store::open()?, Lock::load(project)?);
    let build = Build { project, lock: &lock, store: &store, progress, revision: None };
    netboot::netboot(&build, &images, &netboot::NetbootOptions { interface, dhcp, again, json })
}
