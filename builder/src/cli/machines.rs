//! `bakehouse up`, `down`, `status`, `console`, `exec` and `report`: local machines.

use std::path::Path;
use std::process::ExitCode;

use super::args::MirrorArg;
use super::build::images_of;
use super::context::Context;
use super::output::{print, print_json};
use crate::error::{Error, Result};
use crate::vm::{self, report};

/// Builds missing images and starts machines.
pub(super) fn up(context: &Context, nodes: &[String], containers: bool, mirror: &MirrorArg) -> Result<()> {
    let Context { project, progress, .. } = context;
    context.warn();
    let groups = vm::groups_of(project, nodes)?;
    vm::are_containers(project, containers)?;
    images_of(context, &groups, None, mirror)?;
    vm::up(project, nodes, progress)?;
    status(context)
}

/// Prints the state of the machines.
pub(super) fn status(context: &Context) -> Result<()> {
    let status = vm::FleetStatus::read(context.project);
    print_json(context.json, &status)?;
    if context.json { Ok(()) } else { print(status) }
}

/// Prints a machine's console.
pub(super) fn console(context: &Context, node: &str) -> Result<()> {
    let console = vm::Vm::of(context.project, node)?.console();
    if console.is_empty() {
        return Err(Error::Failed(format!(
            "{node} has no console here: it was not started on this host\n  help: `bakehouse up {node}` starts it as a \
             local machine"
        )));
    }
    print(console)
}

/// Runs a command in a machine. Returns its status as the exit code.
pub(super) fn exec(context: &Context, node: &str, command: &[String]) -> Result<ExitCode> {
    let vm = vm::Vm::of(context.project, node)?;
    if !vm.is_running() {
        return Err(Error::Failed(format!(
            "{node} does not run on this host\n  help: `bakehouse up {node}` starts it as a local machine"
        )));
    }
    let done = vm.exec(&vm::command_line(command))?;
    print(done.output)?;
    Ok(ExitCode::from(u8::try_from(done.status).unwrap_or(1)))
}

/// Collects journals, configurations and states from all machines.
pub(super) fn report(context: &Context, output: &Path) -> Result<()> {
    let Context { project, progress, .. } = context;
    let nodes = &project.topology.nodes;
    if !nodes.iter().any(|node| vm::Vm::of(project, &node.name).is_ok_and(|vm| vm.is_running())) {
        return Err(Error::Failed(
            "no machine of the fleet runs on this host\n  help: `bakehouse up` starts local machines; `bakehouse rollout` \
             shows the nodes of a real fleet"
                .to_owned(),
        ));
    }
    report::collect(project, output, progress)
}
