//! `bakehouse plan`, `publish` and `rollout`: updates of the nodes.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use fleet::RolloutOrder;

use super::args::MirrorArg;
use super::build::images_of;
use super::context::Context;
use super::next;
use super::results::{CommandResult, PlanResult};
use crate::deploy::publish;
use crate::error::Result;
use crate::keys::authority::FleetKey;
use crate::packages::lock::Lock;

/// Compares the built images with the published version.
pub(super) fn plan(context: &Context, dir: &Path, groups: &[String], mirror: &MirrorArg) -> Result<CommandResult> {
    let images = images_of(context, groups, None, mirror)?;
    let groups = images.iter().map(|i| publish::compare(i, dir)).collect::<Result<Vec<_>>>()?;
    let course = publish::RolloutSchedule::new(&context.project.topology, &groups);
    Ok(CommandResult::Plan(PlanResult { groups, course }))
}

/// Publishes the images for the nodes' updates.
pub(super) fn publish(context: &Context, dir: &Path, groups: &[String], mirror: &MirrorArg) -> Result<CommandResult> {
    let Context { project, progress, .. } = context;
    // Before the build, so that a missing key fails early.
    let key = FleetKey::load(project)?.update_key()?;
    let images = images_of(context, groups, None, mirror)?;
    // Nodes raise an alert if the signature is old. A new publication has to clear it, so it gets today's date.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let time = Lock::load(project)?.epoch.max(now);
    let first = !publish::has_version(dir, &images);
    let published =
        images.iter().map(|i| publish::publish(i, dir, &key, time, progress)).collect::<Result<Vec<_>>>()?;
    next::published(context, dir, &published, first);
    Ok(CommandResult::Publish(published))
}

/// Sends an order for the rollout to the hubs. Returns its state.
pub(super) fn rollout(context: &Context, order: RolloutOrder, endpoint: &[String]) -> Result<CommandResult> {
    if let RolloutOrder::Skip { node } = &order {
        context.project.node(node)?;
    }
    context.hubs(endpoint)?.rollout(order).map(CommandResult::Rollout)
}
