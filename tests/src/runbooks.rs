//! Commands that the project tells people to type: in the alerts, in `docs/operations.md`, and in the messages that nodes
//! print.

use std::fs;
use std::path::{Path, PathBuf};

use builder::project::Project;
use fleet::{Backup, Membership};
use walkdir::WalkDir;

use crate::root;

/// An alert rule.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Alert {
    /// Group of the rule.
    pub group: String,
    /// Name of the alert.
    pub name: String,
    /// How long the condition lasts before the alert fires; empty if it fires at once.
    pub delay: String,
    /// `critical`, `warning` or `none`.
    pub severity: String,
    /// What happened.
    pub summary: String,
    /// What users notice.
    pub impact: String,
    /// What to do: one step a line.
    pub runbook: Vec<String>,
}

/// A command that a text quotes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quoted {
    /// Where it is: the alert, or the file and the line.
    pub at: String,
    /// The command, in the syntax of a shell.
    pub text: String,
    /// Whether a person can type it as it is. Messages and sentences may leave arguments out.
    pub whole: bool,
}

impl Quoted {
    /// Returns the words of the command.
    ///
    /// # Panics
    /// If its quotes are not balanced.
    pub fn words(&self) -> Vec<String> {
        shlex::split(&self.text).unwrap_or_else(|| panic!("{}: unbalanced quotes: {}", self.at, self.text))
    }
}

/// Reads the alerts of a file of rules. The files are our own, so this reads only the forms that they have: a key and
/// its value on one line, and `runbook: |` with one step a line.
pub fn alerts(text: &str) -> Vec<Alert> {
    let mut alerts: Vec<Alert> = Vec::new();
    let (mut group, mut in_alert, mut in_runbook) = (String::new(), false, None);
    for line in text.lines() {
        let indent = line.len() - line.trim_start().len();
        let line = line.trim();
        if in_runbook.is_some_and(|outer| indent > outer) && !line.is_empty() {
            alerts.last_mut().expect("an alert").runbook.push(line.to_owned());
            continue;
        }
        in_runbook = None;
        let (is_item, line) = line.strip_prefix("- ").map_or((false, line), |line| (true, line));
        let Some((key, value)) = line.split_once(':') else { continue };
        let value = value.trim();
        if is_item {
            in_alert = key == "alert";
        }
        match key {
            "name" if is_item => value.clone_into(&mut group),
            "alert" => alerts.push(Alert { group: group.clone(), name: value.to_owned(), ..Alert::default() }),
            _ if !in_alert => {}
            "for" => value.clone_into(&mut alerts.last_mut().expect("an alert").delay),
            "labels" => {
                let severity = value.split("severity: ").nth(1).expect("a severity");
                let end = severity.find([',', ' ', '}']).unwrap_or(severity.len());
                severity[..end].clone_into(&mut alerts.last_mut().expect("an alert").severity);
            }
            "summary" => alerts.last_mut().expect("an alert").summary = quoted(value),
            "impact" => alerts.last_mut().expect("an alert").impact = quoted(value),
            "runbook" => in_runbook = Some(indent),
            _ => {}
        }
    }
    alerts
}

/// Returns the text of a value in double quotes, which YAML and JSON write in the same way.
fn quoted(value: &str) -> String {
    serde_json::from_str(value).unwrap_or_else(|e| panic!("{e}: {value}"))
}

/// Returns the rules that every fleet has, and those of a fleet that has every rule.
///
/// # Panics
/// If a file of rules does not exist, or its template cannot be rendered.
pub fn all_alerts() -> Vec<Alert> {
    let mut project = Project::load(&root().join("tests/fleets/receivers.toml")).expect("a valid fleet.toml");
    project.topology.backup.stale_after = Backup::default().stale_after;
    let member = Membership::sample();
    let monitor = project.topology.nodes.iter().find(|n| n.has_role("monitor")).expect("a monitor");
    let context = project.context(monitor, &member);
    let overlay = project.overlay("prometheus").expect("the overlay exists");
    let file = |name: &str| {
        let (_, bytes) = overlay.files.iter().find(|(path, _)| *path == name).expect("a file of rules");
        String::from_utf8_lossy(bytes).into_owned()
    };
    let template = "run/bakehouse/rules.yml.j2";
    let rendered = fleet::render(template, &file(template), &context).unwrap_or_else(|e| panic!("{e}"));
    [alerts(&file("usr/share/bakehouse/prometheus/rules.yml")), alerts(&rendered)].concat()
}

/// Replaces Prometheus' variables by what they stand for: `{{ $labels.node }}` by `NODE`.
///
/// # Panics
/// If a variable has no word.
pub fn plain(alert: &Alert, text: &str) -> String {
    let mut plain = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("{{ ") {
        let (variable, after) = after.split_once(" }}").expect("an end of the variable");
        let name = match variable.split_whitespace().next().expect("a variable") {
            // The monitor, which receives the journal of another node.
            "$labels.node" if alert.name == "JournalNotArriving" => "MONITOR",
            "$labels.node" | "$labels.source" => "NODE",
            // The name of a BGP session is that of the hub.
            "$labels.name" if alert.name == "PathDown" => "HUB",
            "$labels.name" => "UNIT",
            "$labels.instance" | "$labels.address" => "ADDRESS",
            "$labels.receiver_name" => "RECEIVER",
            "$labels.job" => "SERVICE",
            "$value" => "…",
            other => panic!("{other} has no word on the page"),
        };
        plain += before;
        plain += name;
        rest = after;
    }
    plain + rest
}

/// Returns the commands in the steps of an alert.
pub fn of_alert(alert: &Alert) -> Vec<Quoted> {
    let steps = alert.runbook.iter().map(|step| plain(alert, step));
    let all = steps.flat_map(|step| in_backticks(&step));
    all.map(|text| Quoted { at: alert.name.clone(), text, whole: true }).collect()
}

/// Returns the `bakehouse` commands between backticks.
fn in_backticks(text: &str) -> Vec<String> {
    let parts = text.split('`').enumerate().filter(|(number, _)| number % 2 == 1).map(|(_, part)| part);
    parts.filter(|part| part.starts_with("bakehouse ")).map(|part| part.replace('\n', " ")).collect()
}

/// Returns the commands of `docs/operations.md`: the lines of its blocks of shell, and those in its sentences.
///
/// # Panics
/// If the page cannot be read.
pub fn of_operations() -> Vec<Quoted> {
    let name = "docs/operations.md";
    let page = fs::read_to_string(root().join(name)).expect("the page exists");
    let (mut found, mut sentences, mut in_block) = (Vec::new(), String::new(), false);
    for (number, line) in page.lines().enumerate() {
        if line.starts_with("```") {
            in_block = !in_block;
        } else if in_block && line.starts_with("bakehouse ") {
            found.push(Quoted { at: format!("{name}:{}", number + 1), text: without_comment(line), whole: true });
        } else if !in_block {
            sentences += line;
            sentences.push('\n');
        }
    }
    let cited = in_backticks(&sentences).into_iter();
    found.extend(cited.map(|text| Quoted { at: name.to_owned(), text, whole: false }));
    found
}

fn without_comment(line: &str) -> String {
    line.split(" #").next().unwrap_or_default().trim_end().to_owned()
}

/// Returns the commands in the messages of the programs that run on nodes. A value that a program inserts is `VALUE`.
///
/// # Panics
/// If the sources cannot be read.
pub fn of_messages() -> Vec<Quoted> {
    let mut found = Vec::new();
    for (file, text) in sources() {
        for (number, message) in messages(&file, &text) {
            let at = format!("{}:{number}", file.strip_prefix(root()).unwrap_or(&file).display());
            let quote = |text: String| Quoted { at: at.clone(), text, whole: false };
            let cited = in_backticks(&message);
            // A message may end with a command, or be one, without backticks.
            let last = message.rsplit_once(": ").map_or(message.as_str(), |(_, last)| last);
            if cited.is_empty() && last.starts_with("bakehouse ") {
                found.push(quote(last.to_owned()));
            }
            found.extend(cited.into_iter().map(quote));
        }
    }
    found
}

/// Returns the messages of the programs that run on nodes, with the number of their first line.
///
/// # Panics
/// If the sources cannot be read.
pub fn all_messages() -> Vec<(String, String)> {
    let of = |(file, text): (PathBuf, String)| -> Vec<(String, String)> {
        let at = |number: usize| format!("{}:{number}", file.strip_prefix(root()).unwrap_or(&file).display());
        messages(&file, &text).into_iter().map(|(number, message)| (at(number), message)).collect()
    };
    sources().into_iter().flat_map(of).collect()
}

/// Returns the sources of the agent, and of the programs in the overlays.
fn sources() -> Vec<(PathBuf, String)> {
    let of_agent = WalkDir::new(root().join("firstboot/src")).into_iter();
    let of_overlays = WalkDir::new(root().join("overlays")).into_iter();
    let files = of_agent.chain(of_overlays).map(|entry| entry.expect("a readable folder").into_path());
    let is_program = |path: &PathBuf| {
        let text = path.to_string_lossy();
        !text.ends_with("tests.rs") && (text.ends_with(".rs") || text.contains("/usr/lib/bakehouse/"))
    };
    let mut files: Vec<PathBuf> = files.filter(|path| path.is_file() && is_program(path)).collect();
    files.sort();
    files.into_iter().map(|path| (path.clone(), fs::read_to_string(path).expect("a text"))).collect()
}

/// Returns the texts in double quotes of a program, without comments and tests, with the number of their first line.
fn messages(file: &Path, text: &str) -> Vec<(usize, String)> {
    let is_rust = file.extension().is_some_and(|e| e == "rs");
    let text = if is_rust { text.split("#[cfg(test)]\nmod tests {").next().unwrap_or(text) } else { text };
    let comment = if is_rust { "//" } else { "#" };
    let mut found = Vec::new();
    // The text of a message that continues on the next line, and the line of its beginning.
    let mut open: Option<(usize, String)> = None;
    for (number, line) in text.lines().enumerate() {
        if open.is_none() && line.trim_start().starts_with(comment) {
            continue;
        }
        let mut rest = if open.is_some() { line.trim_start() } else { line };
        loop {
            if let Some((from, mut message)) = open.take() {
                let (part, after) = until_quote(rest);
                message += &part;
                let Some(after) = after else {
                    open = Some((from, message.trim_end_matches('\\').to_owned()));
                    break;
                };
                found.push((from, with_values(&message)));
                rest = after;
            }
            // `'"'` is a character.
            let Some((_, after)) = rest.replacen("'\"'", "   ", 1).split_once('"').map(|(a, b)| (a.len(), b.len()))
            else {
                break;
            };
            rest = &rest[rest.len() - after..];
            open = Some((number + 1, String::new()));
        }
    }
    found
}

/// Returns the text before the closing quote, and what follows it.
fn until_quote(text: &str) -> (String, Option<&str>) {
    let mut part = String::new();
    let mut characters = text.char_indices().peekable();
    while let Some((at, c)) = characters.next() {
        match c {
            '"' => return (part, Some(&text[at + 1..])),
            '\\' => match characters.next() {
                Some((_, 'n')) => part.push('\n'),
                Some((_, other)) => part.push(other),
                None => part.push('\\'),
            },
            c => part.push(c),
        }
    }
    (part, None)
}

/// Replaces `{}` and `{name}` by `VALUE`.
fn with_values(text: &str) -> String {
    let mut plain = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('{') {
        let Some((_, after)) = after.split_once('}') else { break };
        plain += before;
        plain += "VALUE";
        rest = after;
    }
    plain + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_read_line_by_line() {
        let text = "\
groups:
  - name: nodes
    rules:
      - record: a:b
        expr: up
      - alert: NodeDown
        # Comment: none.
        expr: up == 0
        for: 10s
        labels: { severity: critical, node: x }
        annotations:
          summary: \"{{ $labels.node }} is \\\"down\\\"\"
          impact: \"Nothing.\"
          runbook: |
            One: `bakehouse top`, then `b`.
            Two.
      - alert: Other
        labels: { severity: none }
";
        let found = alerts(text);
        assert_eq!(found.len(), 2);
        let down = &found[0];
        assert_eq!((down.group.as_str(), down.delay.as_str(), down.severity.as_str()), ("nodes", "10s", "critical"));
        assert_eq!(plain(down, &down.summary), "NODE is \"down\"");
        assert_eq!(down.runbook, ["One: `bakehouse top`, then `b`.", "Two."]);
        assert_eq!(of_alert(down).iter().map(|quoted| quoted.text.as_str()).collect::<Vec<_>>(), ["bakehouse top"]);
        assert_eq!((found[1].name.as_str(), found[1].severity.as_str()), ("Other", "none"));
    }

    #[test]
    fn messages_of_programs_are_found_with_their_continuations() {
        let rust = "//! `bakehouse no`\nlet a = '\"'; let b = format!(\"one {x}: type `bakehouse ticket \\\n    {} \
                    --replace`\");\nlet c = \"see: bakehouse logs {n}\"; // \"x\"\n#[cfg(test)]\nmod tests {\n\"not\"\n";
        let found = messages(Path::new("a.rs"), rust);
        assert_eq!(found[0], (2, "one VALUE: type `bakehouse ticket VALUE --replace`".to_owned()));
        assert_eq!(found[1], (4, "see: bakehouse logs VALUE".to_owned()));
        let shell = "# \"no\"\necho \"see: bakehouse top\"\n";
        assert_eq!(messages(Path::new("run"), shell), [(2, "see: bakehouse top".to_owned())]);
    }
}
