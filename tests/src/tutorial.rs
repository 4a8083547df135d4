//! The tutorial as a reader types it: the commands of `docs/tutorial.md`, in order.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::{CommandOutput, root};

/// A command of the tutorial.
pub struct Step {
    /// The command: the text after `$ ` on the page.
    pub command: String,
    /// Lines that the page shows as its output.
    shown: Vec<String>,
}

/// Returns the commands of the page's `console` blocks. An unmarked block after such a block has lines of the output of
/// the block's last command.
pub fn steps(page: &str) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    let mut block: Option<&str> = None;
    let mut last = "";
    for line in page.lines() {
        match (block, line.strip_prefix("```")) {
            (None, Some(language)) => block = Some(language),
            (Some(language), Some(_)) => (last, block) = (language, None),
            (Some("console"), None) => {
                let command = line.strip_prefix("$ ").unwrap_or_else(|| panic!("no command: {line}")).to_owned();
                steps.push(Step { command, shown: Vec::new() });
            }
            (Some(""), None) if last == "console" => {
                steps.last_mut().expect("a command before its output").shown.push(line.to_owned());
            }
            _ => {}
        }
    }
    steps
}

/// Returns the commands of the tutorial.
pub fn tutorial() -> Vec<Step> {
    steps(&fs::read_to_string(root().join("docs/tutorial.md")).expect("docs/tutorial.md"))
}

impl Step {
    /// Runs the command in `dir` as a reader's shell does, and moves `dir` if the command is `cd`.
    ///
    /// # Panics
    /// If the command fails, or its output lacks a line that the page shows.
    pub fn run(&self, dir: &mut PathBuf) -> CommandOutput {
        println!("$ {}", self.command);
        if let Some(to) = self.command.strip_prefix("cd ") {
            *dir = dir.join(to);
        }
        let path = format!("{}:{}", programs().display(), std::env::var("PATH").unwrap_or_default());
        let mut shell = Command::new("bash");
        shell.args(["-c", if self.command.starts_with("cd ") { "true" } else { &self.command }]);
        shell.current_dir(&*dir).env("PATH", path).stdin(Stdio::null());
        let done = CommandOutput::new(&shell.output().expect("bash"));
        println!("{}{}", done.out, done.err);
        assert_eq!(done.status, 0, "docs/tutorial.md: `{}` failed", self.command);
        for line in &self.shown {
            assert!(done.out.lines().any(|l| l == line), "docs/tutorial.md: `{}` did not print {line}", self.command);
        }
        done
    }
}

fn programs() -> PathBuf {
    Path::new(root()).join("target/release")
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: &str = "Text\n\n```sh\nnot this\n```\n\n```console\n$ cd /tmp\n$ printf 'one\\ntwo\\n'\n```\n\nShown:\n\n\
        ```\ntwo\n```\n\n```console\n$ false\n```\n\n```text\nnot compared\n```\n";

    #[test]
    fn reads_commands_and_their_output() {
        let steps = steps(PAGE);
        let commands: Vec<&str> = steps.iter().map(|step| step.command.as_str()).collect();
        assert_eq!(commands, ["cd /tmp", "printf 'one\\ntwo\\n'", "false"]);
        assert_eq!(steps[1].shown, ["two"]);
        assert!(steps[2].shown.is_empty());
        let mut dir = PathBuf::from("/");
        assert_eq!(steps[0].run(&mut dir).status, 0);
        assert_eq!(dir, Path::new("/tmp"));
        assert_eq!(steps[1].run(&mut dir).out, "one\ntwo\n");
    }

    #[test]
    #[should_panic(expected = "`false` failed")]
    fn fails_if_a_command_fails() {
        steps(PAGE)[2].run(&mut PathBuf::from("/"));
    }

    #[test]
    #[should_panic(expected = "did not print two")]
    fn fails_if_the_output_lacks_a_line_of_the_page() {
        steps(&PAGE.replace("one\\ntwo", "one"))[1].run(&mut PathBuf::from("/"));
    }

    /// `machines/containers.rs` runs these commands. It needs the first two, and stops before the last.
    #[test]
    fn tutorial_has_the_commands_that_the_container_test_needs() {
        let commands: Vec<String> = tutorial().into_iter().map(|step| step.command).collect();
        assert_eq!(commands[..2], ["bakehouse init acme --from quick-ha", "cd acme"]);
        for command in ["bakehouse up --containers", "bakehouse rehearse db"] {
            assert!(commands.iter().any(|c| c == command), "{command}");
        }
        assert_eq!(commands.last().map(String::as_str), Some("bakehouse down"));
    }
}
