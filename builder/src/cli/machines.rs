//! `bakehouse up`, `down`, `status`, `console`, `exec` and `report`: local machines.

use std::path::Path;

use super::args::MirrorArg;
use super::build::images_of;
use super::context::Context;
use super::results::{CommandResult, ConsoleResult, DownResult, Event, ExecResult, ReportResult};
use crate::error::{Error, Result};
use crate::vm::{self, report};

/// Builds missing images and starts machines.
pub(super) fn up(context: &Context, nodes: &[String], containers: bool, mirror: &MirrorArg) -> Result<CommandResult> {
    let Context { project, progress, output, .. } = *context;
    context.warn();
    let groups = vm::groups_of(project, nodes)?;
    vm::are_containers(project, containers)?;
    images_of(context, &groups, None, mirror)?;
    let on_ready = |node: &str| output.event(Event::Node { node, state: vm::MachineState::Ready });
    vm::up(project, nodes, progress, &on_ready)?;
    Ok(CommandResult::Up(vm::FleetStatus::read(project)))
}

/// Shuts machines down.
pub(super) fn down(context: &Context, nodes: &[String]) -> Result<CommandResult> {
    let stopped = vm::down(context.project, nodes, context.progress)?;
    Ok(CommandResult::Down(DownResult { stopped }))
}

/// Returns the state of the machines.
pub(super) fn status(context: &Context) -> CommandResult {
    CommandResult::Status(vm::FleetStatus::read(context.project))
}

/// Returns the text of a machine's console.
pub(super) fn console(context: &Context, node: &str) -> Result<CommandResult> {
    let console = vm::Vm::of(context.project, node)?.console();
    if console.is_empty() {
        return Err(Error::Failed(format!(
            "{node} has no console here: it was not started on this host\n  help: `bakehouse up {node}` starts it as a \
             local machine"
        )));
    }
    let lines = console.lines().map(str::to_owned).collect();
    Ok(CommandResult::Console(ConsoleResult { node: node.to_owned(), lines }))
}

/// Runs a command in a machine.
pub(super) fn exec(context: &Context, node: &str, command: &[String]) -> Result<CommandResult> {
    let vm = vm::Vm::of(context.project, node)?;
    if !vm.is_running() {
        return Err(Error::Failed(format!(
            "{node} does not run on this host\n  help: `bakehouse up {node}` starts it as a local machine"
        )));
    }
    let done = vm.exec(&vm::command_line(command))?;
    Ok(CommandResult::Exec(ExecResult { node: node.to_owned(), status: done.status, output: done.output }))
}

/// Collects journals, configurations and states from all machines.
pub(super) fn report(context: &Context, output: &Path) -> Result<CommandResult> {
    let Context { project, progress, .. } = context;
    let nodes = &project.topology.nodes;
    if !nodes.iter().any(|node| vm::Vm::of(project, &node.name).is_ok_and(|vm| vm.is_running())) {
        return Err(Error::Failed(
            "no machine of the fleet runs on this host\n  help: `bakehouse up` starts local machines; `bakehouse rollout` \
             shows the nodes of a real fleet"
                .to_owned(),
        ));
    }
    let files = report::collect(project, output, progress)?;
    Ok(CommandResult::Report(ReportResult { path: output.to_owned(), files }))
}
