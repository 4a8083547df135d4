//! Tests of the documentation: the command line accepts every `bakehouse` command in it, the fleet in README.md is valid,
//! the site has every page, and the glossary has every term of STYLE.md.

use std::fs;
use std::path::{Path, PathBuf};

use super::accepts::accepts;
use crate::project::{Project, check};

/// A command in a page.
struct Quoted {
    /// Line of the page, from 1 on.
    line: usize,
    words: Vec<String>,
    /// Whether a reader can type it as it is. A command in a sentence may lack arguments.
    whole: bool,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// Returns the Markdown files of a folder and of its folders.
fn pages(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let mut pages: Vec<PathBuf> = entries
        .flat_map(|path| if path.is_dir() { pages(&path) } else { vec![path] })
        .filter(|path| path.extension().is_some_and(|e| e == "md"))
        .collect();
    pages.sort();
    pages
}

/// Returns the `bakehouse` commands of a line of shell: `sudo bakehouse lock && bakehouse build` has two.
fn of_shell(text: &str) -> Vec<Vec<String>> {
    if !text.contains("bakehouse") {
        return Vec::new();
    }
    let words = shlex::split(text).unwrap_or_else(|| panic!("unbalanced quotes: {text}"));
    let simple = words.split(|word| ["&&", "||", "|", ";", "&"].contains(&word.as_str()));
    let commands = simple.map(|words| {
        let mut words = words.iter().take_while(|word| !word.starts_with(['>', '<'])).peekable();
        while words.next_if(|word| ["sudo", "watch"].contains(&word.as_str()) || word.contains('=')).is_some() {}
        words.cloned().collect::<Vec<_>>()
    });
    commands.filter(|words| words.first().is_some_and(|word| word == "bakehouse")).collect()
}

/// Returns the commands of a page: those in blocks of shell, those after `$ ` in blocks of a terminal, and those in the
/// code of a sentence.
fn commands(page: &str) -> Vec<Quoted> {
    let mut found = Vec::new();
    let mut block: Option<&str> = None;
    let (mut command, mut prose) = (String::new(), String::new());
    for (at, text) in page.lines().enumerate() {
        if at > 0 {
            prose.push('\n');
        }
        let fence = text.trim_start().strip_prefix("```");
        match (block, fence) {
            (None, Some(language)) => block = Some(language),
            (Some(_), Some(_)) => block = None,
            (Some(language), None) => {
                let shell = match language {
                    "sh" => Some(text),
                    "console" => text.trim_start().strip_prefix("$ "),
                    _ => None,
                };
                command.push_str(shell.unwrap_or_default());
                // The command continues on the next line.
                if command.ends_with('\\') {
                    command.pop();
                    continue;
                }
                let whole = of_shell(&std::mem::take(&mut command));
                found.extend(whole.into_iter().map(|words| Quoted { line: at + 1, words, whole: true }));
            }
            (None, None) => prose.push_str(text),
        }
    }
    let mut line = 1;
    for (at, part) in prose.split('`').enumerate() {
        if at % 2 == 1 && part.starts_with("bakehouse ") {
            let cited = of_shell(part).into_iter().next();
            found.extend(cited.map(|words| Quoted { line, words, whole: false }));
        }
        line += part.matches('\n').count();
    }
    found
}

/// Returns why the command line does not accept a command.
fn refusal(quoted: &Quoted) -> Option<String> {
    accepts(&quoted.words, quoted.whole).err()
}

#[test]
fn every_command_in_the_documentation_is_accepted() {
    let top = ["README.md", "README.vi.md", "CONTRIBUTING.md", "SECURITY.md"].map(|name| root().join(name));
    let (mut count, mut wrong) = (0, Vec::new());
    for page in top.into_iter().filter(|path| path.exists()).chain(pages(&root().join("docs"))) {
        let name = page.strip_prefix(root()).unwrap().display();
        for quoted in commands(&fs::read_to_string(&page).unwrap()) {
            count += 1;
            if let Some(why) = refusal(&quoted) {
                wrong.push(format!("{name}:{}: `{}`: {why}", quoted.line, quoted.words.join(" ")));
            }
        }
    }
    assert!(wrong.is_empty(), "bakehouse does not accept these commands:\n{}", wrong.join("\n"));
    assert!(count > 150, "only {count} commands found");
}

#[test]
fn finds_and_refuses_a_command_that_does_not_exist() {
    let page = "Run `bakehouse\nlok`, or `bakehouse ticket`.\n\n```sh\nA=1 true && \\\nsudo bakehouse fly --now | less\n\
                bakehouse ticket          # lacks its argument\n```\n\n```console\n$ bakehouse check\nbakehouse 1\n```\n";
    let found = commands(page);
    let words: Vec<String> = found.iter().map(|quoted| quoted.words.join(" ")).collect();
    let all = ["bakehouse fly --now", "bakehouse ticket", "bakehouse check", "bakehouse ticket"];
    assert_eq!(words, all);
    let refused: Vec<bool> = found.iter().map(|quoted| refusal(quoted).is_some()).collect();
    assert_eq!(refused, [true, true, false, false]);
    assert!(refusal(&Quoted { line: 1, words: vec!["bakehouse".into(), "lok".into()], whole: false }).is_some());
}

#[test]
fn fleet_in_readme_passes_check() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let block = readme.split("```toml\n").nth(1).unwrap().split("```").next().unwrap();
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("fleet.toml"), block).unwrap();
    let project = Project::load(dir.path()).unwrap();
    check::dry_bake(&project).unwrap();
    assert_eq!(project.topology.nodes.len(), 8);
}

#[test]
fn the_site_has_every_page() {
    let docs = root().join("docs");
    let summary = fs::read_to_string(docs.join("SUMMARY.md")).unwrap();
    for page in pages(&docs) {
        let name = page.strip_prefix(&docs).unwrap().display().to_string();
        assert!(name == "SUMMARY.md" || summary.contains(&format!("({name})")), "docs/SUMMARY.md lacks {name}");
    }
}

#[test]
fn the_glossary_has_every_term_of_style_md() {
    let style = fs::read_to_string(root().join("STYLE.md")).unwrap();
    let glossary = fs::read_to_string(root().join("docs/glossary.md")).unwrap();
    let terms = style.split("\n## ").find_map(|section| section.strip_prefix("Terms\n")).unwrap();
    for row in terms.lines().filter(|line| line.starts_with("| ")).skip(2) {
        assert!(glossary.lines().any(|line| line == row), "docs/glossary.md lacks {row}");
    }
}
