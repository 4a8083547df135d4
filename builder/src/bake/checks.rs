//! Validates every configuration with the daemon that reads it, inside the image's tree. A file that is the same on all
//! nodes is validated once, and a file that the node renders once for each slot.

use std::collections::BTreeMap;
use std::fs;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use fleet::{Diagnostic, Diagnostics, Membership, Severity, is_of};
use serde::{Deserialize, Serialize};

use crate::bake::{Baked, BuildContext, OverlayCheck};
use crate::compose::{ImageTree, Layer};
use crate::error::{Error, Result};
use crate::keys::authority::FleetKey;
use crate::project::Project;
use crate::sandbox::chroot::{CommandOutput, Commands};
use crate::sandbox::tree_root::Runner;
use crate::sandbox::{self, Files, Limits};
use crate::store::Kind;
use crate::util::digest::Key;
use crate::util::fs::write_atomic;

/// Name of the sandbox's task.
pub(crate) const TASK: &str = "check";

/// The task's input.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Job {
    tree: ImageTree,
    /// Subnet of the mesh. All its addresses are local in the sandbox, so that daemons can bind to them.
    mesh: String,
    cases: Vec<Case>,
}

/// A command, with the files of a node.
#[derive(Debug, Serialize, Deserialize)]
struct Case {
    files: Vec<(String, String)>,
    command: Vec<String>,
}

/// Validates every configuration that no earlier build has validated. Returns their number.
///
/// # Errors
/// If a daemon rejects its configuration. The error has the daemon's output, with the template and its line.
pub(crate) fn check(context: &BuildContext) -> Result<usize> {
    let BuildContext { project, spec, layer, baked, baked_tar, store, progress } = *context;
    let mut open = Vec::new();
    // Daemons parse the certificates, so they need real ones. The fleet key that signs them is discarded.
    let authority = FleetKey::create(&project.topology.name)?;
    let nodes: Vec<&fleet::Node> = project.topology.nodes.iter().filter(|n| n.group == spec.group).collect();
    for check in &baked.checks {
        let per_node = check.check.of.iter().any(|f| f.starts_with("run/"));
        // An image has the overlays of all roles in its group. A node without such a role, for example `voter`, does not
        // start the role's daemons.
        let starts = |node: &&&fleet::Node| !per_node || project.has_overlay(node, &check.overlay);
        for node in nodes.iter().filter(starts).take(if per_node { nodes.len() } else { 1 }) {
            // The key depends on a fixed sample, because the certificates differ from build to build.
            let sample = Membership::sample();
            let files = render(project, baked, node, &sample)?;
            let key = key(layer, check, baked, &files);
            if store.get(Kind::Check, &key).is_none() {
                let member = authority.membership(&project.topology, node)?;
                open.push((check, *node, key, render(project, baked, node, &member)?));
            }
        }
    }
    if open.is_empty() {
        return Ok(0);
    }
    let step = progress.step("check", &format!("{}: {} configurations", spec.group, open.len()));
    let work = store.scratch(Kind::Check, &spec.group);
    fs::create_dir_all(&work).map_err(Error::io("create", &work))?;
    let job = Job {
        tree: ImageTree::new(layer, baked_tar)?,
        mesh: project.topology.mesh.subnet.to_string(),
        cases: open
            .iter()
            .map(|(check, _, _, files)| Case { files: files.clone(), command: check.check.command.clone() })
            .collect(),
    };
    let files = job.tree.host_files();
    let outputs: Result<Vec<CommandOutput>> = sandbox::run(TASK, &job, &files, &work, &Limits::for_folder(&work));
    let _ = fs::remove_dir_all(&work);
    let mut errors = Vec::new();
    for ((check, node, key, _), output) in open.iter().zip(outputs?) {
        if output.ok {
            write_atomic(&store.path(Kind::Check, key), b"")?;
        } else {
            errors.push(diagnose(project, check, node, baked, &output.text));
        }
    }
    if !errors.is_empty() {
        return Err(Error::Config(Diagnostics(errors)));
    }
    step.done(&format!("{}: {} configurations accepted", spec.group, open.len()));
    Ok(open.len())
}

/// Runs in the sandbox: unpacks the tree once, and runs all cases in parallel.
pub(crate) fn work(job: &Job, files: &Files) -> Result<Vec<CommandOutput>> {
    job.tree.with(files, |_, runner| Ok(run_cases(job, runner)))
}

fn run_cases(job: &Job, runner: &Runner) -> Vec<CommandOutput> {
    let next = AtomicUsize::new(0);
    let outputs = Mutex::new(BTreeMap::new());
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, usize::from) {
            scope.spawn(|| {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    let Some(case) = job.cases.get(i) else { break };
                    let network = [
                        "ip link set lo up",
                        // Daemons look for the interface by name. A bridge needs no module that the host may lack.
                        "ip link add mesh0 type bridge",
                        &format!("ip route add local {} dev lo", job.mesh),
                    ]
                    .map(|line| line.split(' ').map(str::to_owned).collect());
                    let commands = network.into_iter().chain([case.command.clone()]).collect();
                    let commands =
                        Commands { commands, stand_ins: Vec::new(), files: case.files.clone(), own_network: true };
                    let output = match runner.run(commands) {
                        Ok(()) => CommandOutput { ok: true, text: String::new() },
                        Err(e) => CommandOutput { ok: false, text: e.chain() },
                    };
                    outputs.lock().unwrap_or_else(std::sync::PoisonError::into_inner).insert(i, output);
                }
            });
        }
    });
    outputs.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner).into_values().collect()
}

/// Returns every file that the agent renders on the node: path and text.
fn render(project: &Project, baked: &Baked, node: &fleet::Node, member: &Membership) -> Result<Vec<(String, String)>> {
    let context = project.context(node, member);
    let web = format!("{}{}", member.tls.cert, member.tls.key);
    let context = fleet::NodeContext { web: &web, ..context };
    baked.templates.iter().map(|(path, t)| Ok((path.clone(), fleet::render(&t.origin, &t.text, &context)?))).collect()
}

/// Returns the key of a result. It covers the daemon, the command, the files that it reads, and this code.
fn key(layer: &Layer, check: &OverlayCheck, baked: &Baked, files: &[(String, String)]) -> String {
    let mut key = Key::new(env!("CODE_CHECK"));
    key.add("layer", &layer.key);
    for word in &check.check.command {
        key.add("word", word);
    }
    for (path, text) in files.iter().filter(|(p, _)| is_of(&check.check.of, p)) {
        key.add(path, text);
    }
    baked.add_to(&mut key, &check.check.of);
    key.finish()
}

fn diagnose(project: &Project, check: &OverlayCheck, node: &fleet::Node, baked: &Baked, output: &str) -> Diagnostic {
    // A folder stands for its baked files.
    let in_folder = |of: &str| {
        let files = baked.entries.keys().filter(|p| p.starts_with(of));
        files.cloned().collect::<Vec<_>>()
    };
    let candidates =
        check.check.of.iter().flat_map(|of| if of.ends_with('/') { in_folder(of) } else { vec![of.clone()] });
    let mentioned = candidates.into_iter().find_map(|path| Some((line_in(output, &path)?, path)));
    let (line, path) = mentioned.unwrap_or_else(|| (0, check.check.of.first().cloned().unwrap_or_default()));
    let path = path.as_str();
    let file = match baked.templates.get(path) {
        Some(template) => {
            let sample = Membership::sample();
            let context = project.context(node, &sample);
            let map = fleet::line_map(&template.origin, &template.text, &context);
            match line.checked_sub(1).and_then(|l| map.get(l)).filter(|l| **l > 0) {
                Some(line) => format!("{}:{line}", template.origin),
                None => template.origin.clone(),
            }
        }
        None => match baked.entries.get(path) {
            // The line numbers of a rendered file differ from its template's.
            Some(entry) if line > 0 && !entry.origin.ends_with(".j2") => format!("{}:{line}", entry.origin),
            Some(entry) => entry.origin.clone(),
            None => format!("overlays/{}", check.overlay),
        },
    };
    let program = check.check.command.first().map_or("", String::as_str);
    let output = with_origins(baked, output.trim_end());
    let message = format!("{program} rejects the configuration of {}:\n{output}", node.name);
    Diagnostic::whole_file(Severity::Error, &file, message, None)
}

/// Replaces the paths of files in the image by their paths in the fleet's folder, where these differ.
fn with_origins(baked: &Baked, output: &str) -> String {
    let of_fleet = |origin: &str| !origin.starts_with("overlays/") && origin != "bakehouse";
    let moved = baked.entries.iter().filter(|(_, entry)| of_fleet(&entry.origin));
    moved.fold(output.to_owned(), |text, (path, entry)| text.replace(path.as_str(), &entry.origin))
}

/// Returns the line of `path` that a daemon's output names: `path:14`, `path: Line 14`.
fn line_in(output: &str, path: &str) -> Option<usize> {
    let after = &output[output.find(path)? + path.len()..];
    let digits_at = |text: &str| {
        let digits: String = text.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().ok()
    };
    let after = after.trim_start_matches([':', ' ', ',', '\'', ']']);
    let after = after.strip_prefix("Line ").or_else(|| after.strip_prefix("line ")).unwrap_or(after);
    digits_at(after)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_line_in_output_of_each_daemon() {
        for output in [
            "[ALERT] (7) : config : parsing [/run/haproxy/haproxy.cfg:14] : unknown keyword 'frob'",
            "/run/haproxy/haproxy.cfg:14:3-7 Error: syntax error",
            "(/run/haproxy/haproxy.cfg: Line 14) Unknown keyword 'frob'",
        ] {
            assert_eq!(line_in(output, "run/haproxy/haproxy.cfg"), Some(14), "{output}");
        }
        assert_eq!(line_in("nothing about it", "run/x"), None);
    }
}
