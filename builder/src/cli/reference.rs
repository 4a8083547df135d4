//! The reference of the tool, generated from its own types: `bakehouse schema`, `completions` and `man`, and the page
//! `docs/cli.md`.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use clap::{Arg, Command, ValueEnum};
use clap_complete::Shell;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};
use fleet::reference::{File, Row, json_schema, tables};

use super::parse::{self, GROUPS};
use super::results::{CommandResult, CompletionsResult, ManResult, SchemaResult};
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::project::{Project, built_in_file};
use crate::util::fs::write_atomic;
use crate::util::json::pretty_json;

/// First line of the `fleet.toml` that `bakehouse init` writes. Editors find the schema by it.
pub(super) const DIRECTIVE: &str = "#:schema ./fleet.schema.json\n";
pub(super) const SCHEMA: &str = "fleet.schema.json";
/// Man page of the agent, in the overlay that adds the agent to every image.
const AGENT_PAGE: &str = "overlays/firstboot/usr/share/man/man8/firstboot.8";

/// File whose schema `bakehouse schema` prints.
#[derive(Clone, Copy, ValueEnum)]
pub(super) enum SchemaOf {
    /// fleet.toml
    Fleet,
    /// profiles/roles/ROLE.toml
    Profile,
    /// overlays/NAME/overlay.toml
    Overlay,
}

impl SchemaOf {
    fn json(self) -> serde_json::Value {
        json_schema(match self {
            Self::Fleet => File::Fleet,
            Self::Profile => File::Profile,
            Self::Overlay => File::Overlay,
        })
    }
}

/// `bakehouse schema`.
pub(super) fn schema(file: SchemaOf) -> CommandResult {
    CommandResult::Schema(SchemaResult { schema: file.json() })
}

/// Writes the schema beside a `fleet.toml` whose first line names it, if the file does not exist or is of another
/// version of Bakehouse. Returns the path of a written file.
pub(super) fn refresh_schema(project: &Project) -> Result<Option<PathBuf>> {
    let path = project.dir.join(SCHEMA);
    let wanted = pretty_json(&SchemaOf::Fleet.json())?;
    let first = project.fleet.source.text.lines().next().unwrap_or_default();
    if first.trim_end() != DIRECTIVE.trim_end() || fs::read(&path).ok().as_ref() == Some(&wanted) {
        return Ok(None);
    }
    write_atomic(&path, &wanted)?;
    Ok(Some(path))
}

/// Writes the schema as [`refresh_schema`] does, and prints a failure, because `bakehouse check` must also work in a
/// read-only folder.
pub(super) fn refresh_schema_for_check(project: &Project, progress: &Progress) {
    match refresh_schema(project) {
        Ok(None) => {}
        Ok(Some(path)) => progress.say("check", &format!("wrote {}: the schema of this version", path.display())),
        Err(e) => progress.say("check", &format!("the schema for editors is of another version: {}", e.chain())),
    }
}

/// `bakehouse completions`.
pub(super) fn completions(shell: Shell) -> CommandResult {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut parse::command(), "bakehouse", &mut text);
    let script = String::from_utf8_lossy(&text).into_owned();
    CommandResult::Completions(CompletionsResult { shell: shell.to_string(), script })
}

/// `bakehouse man`: writes a page for each command, and the agent's.
pub(super) fn man(dir: &Path, progress: &Progress) -> Result<CommandResult> {
    fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
    let mut root = parse::command().disable_help_subcommand(true);
    root.build();
    let mut files = Vec::new();
    let mut write = |name: String, page: &[u8]| {
        files.push(dir.join(name));
        files.last().map_or(Ok(()), |path| write_atomic(path, page))
    };
    for command in all(&root) {
        let name = command.get_display_name().unwrap_or(command.get_name()).to_owned();
        let page = man_page(command).map_err(|e| Error::Failed(format!("cannot render {name}(1): {e}")))?;
        write(format!("{name}.1"), &page)?;
    }
    let page = fleet_page().map_err(|e| Error::Failed(format!("cannot render fleet.toml(5): {e}")))?;
    write("fleet.toml.5".to_owned(), &page)?;
    write("firstboot.8".to_owned(), built_in_file(AGENT_PAGE)?)?;
    progress.say("man", &format!("wrote {} pages to {}", files.len(), dir.display()));
    Ok(CommandResult::Man(ManResult { files }))
}

/// Returns a command and the commands below it, without hidden ones.
fn all(command: &Command) -> Vec<&Command> {
    let below = command.get_subcommands().filter(|c| !c.is_hide_set()).flat_map(all);
    std::iter::once(command).chain(below).collect()
}

/// Returns the man page of a command. Keeps the lines of examples, which clap_mangen would join.
fn man_page(command: &Command) -> std::io::Result<Vec<u8>> {
    let source = concat!("Bakehouse ", env!("CARGO_PKG_VERSION"));
    let man = Man::new(command.clone()).source(source).manual("Bakehouse");
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    if command.has_subcommands() {
        man.render_subcommands_section(&mut page)?;
    }
    let mut roff = Roff::new();
    let mut notes = false;
    for part in parts_of(command) {
        match part {
            Part::Lines { title, lines } => {
                roff.control("SH", [title.to_uppercase().as_str()]).control("EX", []);
                for line in lines {
                    roff.text([roman(line)]);
                }
                roff.control("EE", []);
            }
            Part::Text(text) => {
                let (control, title) = if notes { ("PP", None) } else { ("SH", Some("NOTES")) };
                roff.control(control, title).text([roman(text)]);
                notes = true;
            }
        }
    }
    roff.control("SH", ["SEE ALSO"]).text([roman("bakehouse(1), fleet.toml(5), firstboot(8)")]);
    roff.to_writer(&mut page)?;
    Ok(page)
}

/// Returns the page fleet.toml(5): every key of the file.
fn fleet_page() -> std::io::Result<Vec<u8>> {
    let mut roff = Roff::new();
    roff.control("TH", ["fleet.toml", "5", "", "", "Bakehouse"]);
    roff.control("SH", ["NAME"]).text([roman("fleet.toml - description of a fleet")]);
    roff.control("SH", ["DESCRIPTION"]).text([roman(
        "`bakehouse init` writes the file, and `bakehouse check` checks it. `bakehouse schema fleet` prints its JSON \
         Schema.",
    )]);
    for table in tables(File::Fleet) {
        roff.control("SH", [if table.title.is_empty() { "KEYS" } else { table.title }]);
        roff.text([roman(table.introduction)]);
        for Row { key, kind, default, meaning } in table.rows {
            roff.control("TP", []).text([bold(key), roman(format!(" ({kind}; default: {default})"))]);
            roff.text([roman(meaning)]);
        }
    }
    roff.control("SH", ["SEE ALSO"]).text([roman("bakehouse(1), bakehouse-init(1), bakehouse-check(1)")]);
    let mut page = Vec::new();
    roff.to_writer(&mut page)?;
    Ok(page)
}

/// A part of the help text after a command's options.
enum Part {
    /// Lines that stay as they are, below a title: examples.
    Lines { title: String, lines: Vec<String> },
    /// A paragraph.
    Text(String),
}

/// Returns the parts of a command's `after_help`.
fn parts_of(command: &Command) -> Vec<Part> {
    let text = command.get_after_help().map(ToString::to_string).unwrap_or_default();
    let part = |block: &str| match block.split_once(":\n  ") {
        Some((title, lines)) if !title.contains('\n') => {
            let lines = lines.lines().map(|line| line.trim().to_owned()).collect();
            Part::Lines { title: title.to_owned(), lines }
        }
        _ => Part::Text(block.lines().map(str::trim).collect::<Vec<_>>().join(" ")),
    };
    text.split("\n\n").filter(|block| !block.trim().is_empty()).map(part).collect()
}

/// Returns the text of `docs/cli.md`.
#[must_use]
pub fn page() -> String {
    let mut root = parse::command().disable_help_subcommand(true);
    root.build();
    let mut page = INTRODUCTION.to_owned();
    for (title, names) in GROUPS {
        let _ = write!(page, "\n**{title}**\n\n");
        for command in names.iter().filter_map(|name| root.find_subcommand(name)) {
            let name = command.get_name();
            let _ = writeln!(page, "- [`{name}`](#bakehouse-{name}): {}", about(command));
        }
    }
    page.push_str("\n## Global options\n\nEvery command has these options.\n");
    options(&mut page, root.get_arguments().filter(|arg| arg.is_global_set()));
    for part in parts_of(&root) {
        match part {
            Part::Text(text) => write!(page, "\n{text}\n"),
            Part::Lines { title, lines } => write!(page, "\n## {title}\n\n{}\n", bullets(&lines)),
        }
        .expect("writing to a string");
    }
    for (title, names) in GROUPS {
        let _ = write!(page, "\n## {title}\n");
        for command in names.iter().filter_map(|name| root.find_subcommand(name)) {
            for command in all(command) {
                describe(&mut page, command);
            }
        }
    }
    page
}

fn describe(page: &mut String, command: &Command) {
    let name = command.get_bin_name().unwrap_or(command.get_name());
    let usage = command.clone().render_usage().to_string();
    let usage = usage.trim_start_matches("Usage: ");
    let _ = write!(page, "\n### {name}\n\n{}.\n\n```text\n{usage}\n```\n", about(command));
    options(page, command.get_arguments().filter(|arg| !arg.is_global_set() && arg.get_id() != "help"));
    for part in parts_of(command) {
        let _ = match part {
            Part::Text(text) => write!(page, "\n{text}\n"),
            Part::Lines { title, lines } if title.starts_with("Example") => {
                write!(page, "\n```sh\n{}\n```\n", lines.join("\n"))
            }
            Part::Lines { title, lines } => write!(page, "\n{title}:\n\n{}\n", bullets(&lines)),
        };
    }
}

/// Makes a list of lines such as `hub         a hub dies`.
fn bullets(lines: &[String]) -> String {
    let bullet = |line: &String| match line.split_once("  ") {
        Some((name, about)) => format!("- `{name}`: {}", about.trim()),
        None => format!("- {line}"),
    };
    lines.iter().map(bullet).collect::<Vec<_>>().join("\n")
}

fn about(command: &Command) -> String {
    command.get_about().map(ToString::to_string).unwrap_or_default()
}

/// Writes the table of a command's arguments and options.
fn options<'a>(page: &mut String, args: impl Iterator<Item = &'a Arg>) {
    let rows: Vec<String> = args.filter(|arg| !arg.is_hide_set()).map(row).collect();
    if !rows.is_empty() {
        let _ = write!(page, "\n| argument | meaning |\n| --- | --- |\n{}\n", rows.join("\n"));
    }
}

fn row(arg: &Arg) -> String {
    let short = arg.get_short().map(|c| format!("-{c}, ")).unwrap_or_default();
    let mut text = arg.get_help().map(ToString::to_string).unwrap_or_default();
    let values: Vec<String> = if arg.get_action().takes_values() {
        arg.get_possible_values().iter().map(|value| format!("`{}`", value.get_name())).collect()
    } else {
        Vec::new()
    };
    if !values.is_empty() {
        let _ = write!(text, ". One of {}", values.join(", "));
    }
    let defaults: Vec<String> = arg.get_default_values().iter().map(|v| format!("`{}`", v.display())).collect();
    if !defaults.is_empty() && arg.get_action().takes_values() {
        let _ = write!(text, ". Default: {}", defaults.join(", "));
    }
    let cell = |text: &str| text.replace('|', "\\|");
    format!("| `{}` | {} |", cell(&format!("{short}{arg}")), cell(&text))
}

const INTRODUCTION: &str = "\
# Command line

<!-- Generated by `UPDATE_GOLDEN=1 cargo test --test fast golden::` from builder/src/cli. -->

`bakehouse help` and the man pages have the same text.
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_option_and_value_has_a_help_text() {
        let mut root = parse::command();
        root.build();
        for command in all(&root) {
            for arg in command.get_arguments() {
                let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
                assert!(help.len() > 6, "{} {arg}: `{help}`", command.get_name());
            }
        }
    }

    #[test]
    fn every_command_is_in_one_group() {
        let grouped: Vec<&str> = GROUPS.iter().flat_map(|(_, names)| names.iter().copied()).collect();
        let mut sorted = grouped.clone();
        sorted.sort_unstable();
        sorted.dedup();
        assert_eq!(sorted.len(), grouped.len(), "a command is in two groups");
        let mut commands: Vec<String> =
            parse::command().get_subcommands().map(|command| command.get_name().to_owned()).collect();
        commands.sort_unstable();
        assert_eq!(sorted, commands);
    }

    #[test]
    fn help_lists_commands_by_group() {
        let help = parse::command().render_help().to_string();
        for (title, names) in GROUPS {
            let group = help.split_once(&format!("\n{title}:\n")).expect(title).1.split("\n\n").next().unwrap();
            for name in *names {
                assert!(group.lines().any(|line| line.trim().starts_with(name)), "{group}");
            }
        }
        assert!(help.contains("\nGlobal options:\n  -C, --fleet <PATH>"), "{help}");
    }

    #[test]
    fn completions_contain_every_command() {
        for shell in Shell::value_variants() {
            let mut text = Vec::new();
            clap_complete::generate(*shell, &mut parse::command(), "bakehouse", &mut text);
            let text = String::from_utf8(text).unwrap();
            for command in parse::command().get_subcommands() {
                assert!(text.contains(command.get_name()), "{shell}: {}", command.get_name());
            }
        }
    }

    #[test]
    fn man_pages_in_unit_files_exist() {
        let overlays = Path::new(env!("CARGO_MANIFEST_DIR")).join("../overlays");
        let mut named = 0;
        for entry in walkdir::WalkDir::new(&overlays).into_iter().map(Result::unwrap) {
            if !entry.path().to_string_lossy().contains("/systemd/system/") || !entry.file_type().is_file() {
                continue;
            }
            let unit = fs::read_to_string(entry.path()).unwrap();
            let lines = unit.lines().filter_map(|line| line.strip_prefix("Documentation="));
            for page in lines.flat_map(str::split_whitespace).filter_map(|page| page.strip_prefix("man:firstboot")) {
                assert_eq!(page, "(8)", "{}", entry.path().display());
                built_in_file(AGENT_PAGE).expect("the page exists");
                named += 1;
            }
        }
        assert!(named >= 8, "{named}");
    }

    #[test]
    fn man_writes_a_page_for_each_command_and_the_agent() {
        let dir = tempfile::tempdir().unwrap();
        man(dir.path(), &Progress::new(true, false)).unwrap();
        let page = |name: &str| fs::read_to_string(dir.path().join(name)).expect(name);
        for command in parse::command().get_subcommands() {
            let text = page(&format!("bakehouse-{}.1", command.get_name()));
            assert!(text.contains(".SH NAME") && text.contains(".SH EXAMPLE"), "{text}");
        }
        assert!(page("bakehouse-lock.1").contains(".EX\nbakehouse lock\nbakehouse lock \\-\\-update"));
        assert!(page("bakehouse.1").contains("bakehouse\\-init(1)") && page("bakehouse-store-gc.1").contains("30"));
        assert!(
            page("fleet.toml.5").contains("\n.SH \"[groups.NAME]\"\n")
                || page("fleet.toml.5").contains("\n.SH [groups.NAME]\n")
        );
        assert!(page("firstboot.8").contains(".TH FIRSTBOOT 8"));
    }
}
