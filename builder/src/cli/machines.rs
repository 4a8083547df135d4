//! `bakehouse up`, `down` and `console`: local machines.

use super::args::MirrorArg;
use super::build::images_of;
use super::context::Context;
use super::next;
use super::output::print;
use super::results::{CommandResult, ConsoleResult, DownResult, Event};
use crate::error::{Error, Result};
use crate::keys::operator::{LocalFile, OperatorFile};
use crate::util::fs::shown;
use crate::util::time::rfc3339;
use crate::vm;

/// Builds missing images and starts machines.
pub(super) fn up(context: &Context, nodes: &[String], containers: bool, mirror: &MirrorArg) -> Result<CommandResult> {
    let Context { project, progress, output, .. } = *context;
    context.warn();
    let groups = vm::groups_of(project, nodes)?;
    vm::are_containers(project, containers)?;
    images_of(context, &groups, None, mirror)?;
    let on_ready = |node: &str| drop(output.event(Event::Node { node, state: vm::MachineState::Ready }));
    let text = match OperatorFile::for_local_machines(project)? {
        LocalFile::Real { path, expires } => Some(format!(
            "{}: a secret, valid until {}. The real fleet accepts it, too, because fleet.key has signed it",
            shown(&path),
            rfc3339(expires)
        )),
        LocalFile::Sealed => Some(
            "made no operator's file for the local machines, because fleet.key is encrypted. `bakehouse operator add NAME \
             --role admin --own` makes one"
                .to_owned(),
        ),
        LocalFile::Kept | LocalFile::Local => None,
    };
    if let Some(text) = text {
        progress.say("operator", &text);
    }
    vm::up(project, nodes, progress, &on_ready)?;
    let status = vm::FleetStatus::read(project);
    next::started(context, &status)?;
    Ok(CommandResult::Up(status))
}

/// Shuts machines down.
pub(super) fn down(context: &Context, nodes: &[String]) -> Result<CommandResult> {
    let stopped = vm::down(context.project, nodes, context.progress)?;
    Ok(CommandResult::Down(DownResult { stopped }))
}

/// Returns the text of a machine's console. With `follow`, prints it until the machine is off.
pub(super) fn console(context: &Context, node: &str, follow: bool) -> Result<CommandResult> {
    let vm = vm::Vm::for_node(context.project, node)?;
    let mut console = vm.console();
    if console.is_empty() && !vm.is_running() {
        return Err(Error::Failed(format!(
            "{node} has no console here: it was not started on this host\n  help: `bakehouse up {node}` starts it as a \
             local machine"
        )));
    }
    if follow {
        console.clear();
        vm.follow_console(|text| {
            context.output.event(Event::Console { node, text })?;
            if context.output.json {
                console.push_str(text);
                return Ok(());
            }
            print(text)
        })?;
    }
    let lines = console.lines().map(str::to_owned).collect();
    Ok(CommandResult::Console(ConsoleResult { node: node.to_owned(), lines }))
}
