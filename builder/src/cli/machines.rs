//! `bakehouse up`, `down`, `status`, `console`, `exec` and `report`: local machines.

use std::path::Path;

use super::args::MirrorArg;
use super::build::images_of;
use super::context::Context;
use super::next;
use super::output::print;
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
    let on_ready = |node: &str| drop(output.event(Event::Node { node, state: vm::MachineState::Ready }));
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

/// Returns the state of the machines.
pub(super) fn status(context: &Context) -> CommandResult {
    let status = vm::FleetStatus::read(context.project);
    if status.is_off() {
        next::no_machines(context);
    }
    CommandResult::Status(status)
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

/// Runs a command in a machine.
pub(super) fn exec(context: &Context, node: &str, command: &[String]) -> Result<CommandResult> {
    let vm = vm::Vm::for_node(context.project, node)?;
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
    if !nodes.iter().any(|node| vm::Vm::for_node(project, &node.name).is_ok_and(|vm| vm.is_running())) {
        return Err(Error::Failed(
            "no machine of the fleet runs on this host\n  help: `bakehouse up` starts local machines; `bakehouse rollout` \
             shows the nodes of a real fleet"
                .to_owned(),
        ));
    }
    let files = report::collect(project, output, progress)?;
    Ok(CommandResult::Report(ReportResult { path: output.to_owned(), files }))
}
