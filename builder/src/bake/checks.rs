//! Every configuration is handed to the daemon that will read it, inside the image's own
//! tree: what is the same on all nodes once, what is rendered on the node for every slot.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use fleet::{Diagnostic, Diagnostics, Membership, Severity, is_of};
use serde::{Deserialize, Serialize};

use crate::bake::{Baked, OverlayCheck};
use crate::compose::{ImageTree, Layer};
use crate::error::{Error, Result};
use crate::keys::authority::FleetKey;
use crate::progress::Progress;
use crate::project::{ImageSpec, Project};
use crate::sandbox::chroot::{CommandOutput, Commands};
use crate::sandbox::tree_root::Runner;
use crate::sandbox::{self, Files, Limits};
use crate::store::{Kind, Store};
use crate::util::digest::Key;
use crate::util::fs::write_atomic;

/// Name of the sandbox's task.
pub const TASK: &str = "check";

/// What the sandbox is to check.
#[derive(Debug, Serialize, Deserialize)]
pub struct Job {
    tree: ImageTree,
    /// The mesh's addresses: all of them are this machine's in the sandbox, so that daemons
    /// can listen where they will.
    mesh: String,
    cases: Vec<Case>,
}

/// One command, with the files of one node.
#[derive(Debug, Serialize, Deserialize)]
struct Case {
    files: Vec<(String, String)>,
    command: Vec<String>,
}

/// Asks every daemon whose answer is not known yet; returns how many were asked.
///
/// # Errors
/// A daemon says no: its words, with the template and its line.
pub fn check(
    project: &Project,
    recipe: &ImageSpec,
    layer: &Layer,
    baked: &Baked,
    baked_tar: &Path,
    store: &Store,
    progress: &Progress,
) -> Result<usize> {
    let mut open = Vec::new();
    // Real certificates of an authority that is thrown away: daemons look into them.
    let authority = FleetKey::create(&project.topology.name)?;
    let nodes: Vec<&fleet::Node> = project.topology.nodes.iter().filter(|n| n.group == recipe.group).collect();
    for check in &baked.checks {
        let per_node = check.check.of.iter().any(|f| f.starts_with("run/"));
        for node in nodes.iter().take(if per_node { nodes.len() } else { 1 }) {
            // Known answers are found by what does not change from build to build.
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
    let step = progress.step("check", &format!("{}: {} configurations", recipe.group, open.len()));
    let work = store.scratch(Kind::Check, &recipe.group);
    fs::create_dir_all(&work).map_err(Error::io("create", &work))?;
    let job = Job {
        tree: ImageTree::of(layer, baked_tar)?,
        mesh: project.topology.mesh.subnet.to_string(),
        cases: open
            .iter()
            .map(|(check, _, _, files)| Case { files: files.clone(), command: check.check.command.clone() })
            .collect(),
    };
    let files = job.tree.host_files();
    let said: Result<Vec<CommandOutput>> = sandbox::run(TASK, &job, &files, &work, &Limits::for_folder(&work));
    let _ = fs::remove_dir_all(&work);
    let mut wrong = Vec::new();
    for ((check, node, key, _), said) in open.iter().zip(said?) {
        if said.ok {
            write_atomic(&store.path(Kind::Check, key), b"")?;
        } else {
            wrong.push(diagnose(project, check, node, baked, &said.text));
        }
    }
    if !wrong.is_empty() {
        return Err(Error::Config(Diagnostics(wrong)));
    }
    step.done(&format!("{}: {} configurations accepted", recipe.group, open.len()));
    Ok(open.len())
}

/// The sandbox's part: the tree once, the cases side by side.
pub fn work(job: &Job, files: &Files) -> Result<Vec<CommandOutput>, String> {
    job.tree.with(files, |_, runner| Ok(ask(job, runner)))
}

fn ask(job: &Job, runner: &Runner) -> Vec<CommandOutput> {
    let next = AtomicUsize::new(0);
    let answers = Mutex::new(BTreeMap::new());
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, usize::from) {
            scope.spawn(|| {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    let Some(case) = job.cases.get(i) else { break };
                    let network = [
                        "ip link set lo up",
                        // Of a kind that every kernel has; only its name is looked at.
                        "ip link add mesh0 type bridge",
                        &format!("ip route add local {} dev lo", job.mesh),
                    ]
                    .map(|line| line.split(' ').map(str::to_owned).collect());
                    let commands = network.into_iter().chain([case.command.clone()]).collect();
                    let commands =
                        Commands { commands, stand_ins: Vec::new(), files: case.files.clone(), own_network: true };
                    let answer = match runner.run(commands) {
                        Ok(()) => CommandOutput { ok: true, text: String::new() },
                        Err(text) => CommandOutput { ok: false, text },
                    };
                    answers.lock().unwrap_or_else(std::sync::PoisonError::into_inner).insert(i, answer);
                }
            });
        }
    });
    answers.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner).into_values().collect()
}

/// Every file the agent renders on the node: path and text.
fn render(project: &Project, baked: &Baked, node: &fleet::Node, member: &Membership) -> Result<Vec<(String, String)>> {
    let context = project.context(node, member);
    let web = format!("{}{}", member.tls.cert, member.tls.key);
    let context = fleet::NodeContext { web: &web, ..context };
    baked.templates.iter().map(|(path, t)| Ok((path.clone(), fleet::render(&t.origin, &t.text, &context)?))).collect()
}

/// An answer holds as long as the daemon, the command, the files it reads and the code that asks are the same.
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

fn diagnose(project: &Project, check: &OverlayCheck, node: &fleet::Node, baked: &Baked, words: &str) -> Diagnostic {
    // A folder stands for the files that are baked into it.
    let in_folder = |of: &str| {
        let files = baked.entries.keys().filter(|p| p.starts_with(of));
        files.cloned().collect::<Vec<_>>()
    };
    let candidates =
        check.check.of.iter().flat_map(|of| if of.ends_with('/') { in_folder(of) } else { vec![of.clone()] });
    let spoken_of = candidates.into_iter().find_map(|path| Some((line_in(words, &path)?, path)));
    let (line, path) = spoken_of.unwrap_or_else(|| (0, check.check.of.first().cloned().unwrap_or_default()));
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
            // A rendered file's lines are not its template's.
            Some(entry) if line > 0 && !entry.origin.ends_with(".j2") => format!("{}:{line}", entry.origin),
            Some(entry) => entry.origin.clone(),
            None => format!("overlays/{}", check.overlay),
        },
    };
    let program = check.check.command.first().map_or("", String::as_str);
    let message = format!("{program} does not accept what {} would get:\n{}", node.name, words.trim_end());
    Diagnostic::whole_file(Severity::Error, &file, message, None)
}

/// The line of `path` that a daemon's words are about: `path:14`, `path: Line 14`.
fn line_in(words: &str, path: &str) -> Option<usize> {
    let after = &words[words.find(path)? + path.len()..];
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
    fn the_line_in_each_daemons_words() {
        for words in [
            "[ALERT] (7) : config : parsing [/run/haproxy/haproxy.cfg:14] : unknown keyword 'frob'",
            "/run/haproxy/haproxy.cfg:14:3-7 Error: syntax error",
            "(/run/haproxy/haproxy.cfg: Line 14) Unknown keyword 'frob'",
        ] {
            assert_eq!(line_in(words, "run/haproxy/haproxy.cfg"), Some(14), "{words}");
        }
        assert_eq!(line_in("nothing about it", "run/x"), None);
    }
}
