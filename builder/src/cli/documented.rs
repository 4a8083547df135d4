//! Tests the commands and the fleet that the documentation shows.

use std::fs;
use std::path::{Path, PathBuf};

use clap::Parser as _;

use super::args::Cli;
use crate::project::{Project, check};

/// Returns README.md, its translations, and all pages in docs/.
fn pages() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut folders = vec![root.join("docs")];
    let mut pages: Vec<PathBuf> = ["README.md", "README.vi.md"].map(|name| root.join(name)).into();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "md") {
                pages.push(path);
            }
        }
    }
    pages
}

/// Returns the lines of code blocks in one of these languages, with their numbers.
fn code<'a>(text: &'a str, languages: &[&str]) -> Vec<(usize, &'a str)> {
    let mut language = None;
    let mut lines = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        match (line.trim_start().strip_prefix("```"), language) {
            (Some(of), None) => language = Some(of.trim()),
            (Some(_), Some(_)) => language = None,
            (None, Some(of)) if languages.contains(&of) => lines.push((number, line)),
            (None, _) => {}
        }
    }
    lines
}

/// Returns the commands of a shell's line as words, without prompt and comment.
fn commands(line: &str) -> Vec<Vec<String>> {
    let mut commands = vec![Vec::new()];
    let (mut word, mut quote) = (String::new(), None);
    for c in line.trim_start_matches("$ ").chars().chain([' ']) {
        match (c, quote) {
            ('\'' | '"', None) => quote = Some(c),
            (_, Some(end)) if c == end => quote = None,
            ('#', None) if word.is_empty() => break,
            (' ', None) => match std::mem::take(&mut word).as_str() {
                "" => {}
                "&&" | "|" | "||" => commands.push(Vec::new()),
                complete => commands.last_mut().unwrap().push(complete.to_owned()),
            },
            _ => word.push(c),
        }
    }
    commands
}

#[test]
fn documented_commands_are_valid() {
    let mut count = 0;
    for page in pages() {
        let text = fs::read_to_string(&page).unwrap();
        for (number, line) in code(&text, &["sh", "console"]) {
            for words in commands(line) {
                let words = if words.first().is_some_and(|w| w == "sudo") { &words[1..] } else { &words[..] };
                if words.first().is_some_and(|w| w == "bakehouse") {
                    count += 1;
                    if let Err(e) = Cli::try_parse_from(words) {
                        panic!("{}:{number}: {line}\n{e}", page.display());
                    }
                }
            }
        }
    }
    assert!(count > 20, "{count} commands");
}

#[test]
fn fleet_in_readme_passes_check() {
    let text = fs::read_to_string(&pages()[0]).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let lines: Vec<&str> = code(&text, &["toml"]).into_iter().map(|(_, line)| line).collect();
    fs::write(dir.path().join("fleet.toml"), lines.join("\n")).unwrap();
    let project = Project::load(dir.path()).unwrap();
    check::dry_bake(&project).unwrap();
    assert_eq!(project.topology.nodes.len(), 8);
}
