//! The JSON schema of `--json`, and its reference `docs/json.md`, from the types of the results.

use std::fmt::Write as _;

use schemars::generate::SchemaSettings;
use serde_json::Value;

use super::envelope::Line;
use super::parse;

/// Returns the schema of a line of standard output with `--json`.
#[must_use]
pub fn json_schema() -> Value {
    let generator = SchemaSettings::draft2020_12().for_serialize().into_generator();
    let mut schema = generator.into_root_schema_for::<Line>().to_value();
    schema["title"] = "A line that `bakehouse --json` prints".into();
    schema
}

/// Returns the names of all commands of the command line.
#[must_use]
pub fn commands() -> Vec<String> {
    fn leaves(command: &clap::Command, prefix: &str, found: &mut Vec<String>) {
        for below in command.get_subcommands() {
            let name = format!("{prefix}{}", below.get_name());
            if below.has_subcommands() {
                leaves(below, &format!("{name} "), found);
            } else {
                found.push(name);
            }
        }
    }
    let mut found = Vec::new();
    leaves(&parse::command(), "", &mut found);
    found
}

/// Returns the text of `docs/json.md`.
#[must_use]
pub fn json_page() -> String {
    let page = Page { schema: json_schema() };
    let mut text = INTRODUCTION.to_owned();
    page.table(&mut text, &page.schema["$defs"]["ResultLine"], &[]);
    text.push_str("| `command` | string | The command: `flash`, `store gc` and so on. |\n");
    text.push_str("| `result` | see [Results](#results) | The result of the command. |\n");
    text.push_str(
        "\n## Errors\n\nThe exit code is the same as without `--json`, and standard error has the same text.\n\n",
    );
    page.table(&mut text, &page.schema["$defs"]["ErrorLine"], &[]);
    text.push_str(EVENTS);
    for event in variants(&page.schema["$defs"]["Event"]) {
        let kind = event["properties"]["kind"]["const"].as_str().unwrap_or_default();
        let _ = write!(text, "\n### `{kind}`\n\n{}\n\n", description(event));
        page.table(&mut text, event, &["kind"]);
    }
    text.push_str("\n## Results\n");
    for command in commands() {
        let Some((about, result)) = page.result_of(&command) else { continue };
        let _ = write!(text, "\n### `{command}`\n\n{about}\n\n");
        page.result(&mut text, result);
    }
    text
}

/// Writes the page of a schema.
struct Page {
    schema: Value,
}

impl Page {
    /// Returns a command's description, and the schema of its result.
    fn result_of(&self, command: &str) -> Option<(String, &Value)> {
        let all = variants(&self.schema["$defs"]["ResultLine"]);
        let found = all.into_iter().find(|variant| variant["properties"]["command"]["const"] == command)?;
        Some((description(found), &found["properties"]["result"]))
    }

    /// Follows a reference.
    fn resolved<'a>(&'a self, schema: &'a Value) -> &'a Value {
        let name = schema["$ref"].as_str().and_then(|path| path.strip_prefix("#/$defs/"));
        name.map_or(schema, |name| &self.schema["$defs"][name])
    }

    /// Writes the result of a command: a table, or one for each alternative.
    fn result(&self, text: &mut String, schema: &Value) {
        let resolved = self.resolved(schema);
        if resolved["type"] == "array" {
            text.push_str("A list. Each element has these keys:\n\n");
            return self.table(text, self.resolved(&resolved["items"]), &[]);
        }
        let all = variants(resolved);
        if all.is_empty() || resolved["properties"].is_object() {
            return self.table(text, resolved, &[]);
        }
        for (i, variant) in all.into_iter().enumerate() {
            let separator = if i == 0 { "" } else { "\n" };
            let _ = write!(text, "{separator}{}\n\n", description(variant));
            self.result(text, variant);
        }
    }

    /// Writes the table of an object's keys, and those of the objects in it.
    fn table(&self, text: &mut String, schema: &Value, without: &[&str]) {
        text.push_str("| key | type | meaning |\n| --- | --- | --- |\n");
        self.rows(text, self.resolved(schema), "", without);
    }

    fn rows(&self, text: &mut String, schema: &Value, prefix: &str, without: &[&str]) {
        for (key, value) in schema["properties"].as_object().into_iter().flatten() {
            if without.contains(&key.as_str()) {
                continue;
            }
            let required = schema["required"].as_array().is_some_and(|all| all.iter().any(|name| name == key));
            let optional = if required { "" } else { ", may be absent" };
            let path = format!("{prefix}{key}");
            // The only key of an alternative may have the alternative's description.
            let about = [value, self.content(value), schema].map(description);
            let about = about.into_iter().find(|about| !about.is_empty()).unwrap_or_default();
            let _ = writeln!(text, "| `{path}` | {}{optional} | {about} |", self.kind(value));
            self.below(text, value, &path);
        }
    }

    /// Writes the rows of the objects in a value.
    fn below(&self, text: &mut String, value: &Value, path: &str) {
        let content = self.content(value);
        if content["type"] == "array" {
            return self.below(text, &content["items"], &format!("{path}[]"));
        }
        if content["additionalProperties"].is_object() {
            return self.below(text, &content["additionalProperties"], &format!("{path}.KEY"));
        }
        self.rows(text, content, &format!("{path}."), &[]);
        for variant in variants(content) {
            self.rows(text, self.resolved(variant), &format!("{path}."), &[]);
        }
    }

    /// Returns the schema of a value that may be `null`.
    fn content<'a>(&'a self, value: &'a Value) -> &'a Value {
        let resolved = self.resolved(value);
        match variants(resolved)[..] {
            [only] if resolved["properties"].is_null() => self.resolved(only),
            _ => resolved,
        }
    }

    /// Returns the type of a value: `string or null`, `list of object`, or the possible strings.
    fn kind(&self, value: &Value) -> String {
        let content = self.content(value);
        let nullable = ["oneOf", "anyOf"].iter().filter_map(|key| value[*key].as_array()).flatten();
        let null = if nullable.into_iter().any(|variant| variant["type"] == "null") { " or null" } else { "" };
        let kind = match &content["type"] {
            Value::String(kind) if kind == "array" => format!("list of {}", self.kind(&content["items"])),
            Value::String(kind) if content["additionalProperties"].is_object() => {
                format!("{kind} of {}", self.kind(&content["additionalProperties"]))
            }
            Value::String(kind) => content["enum"].as_array().map_or_else(|| kind.clone(), |all| quoted(all.iter())),
            Value::Array(kinds) => kinds.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(" or "),
            _ => {
                let all = variants(content);
                let names = quoted(all.iter().filter_map(|variant| variant.get("const")));
                let is_text = !names.is_empty() && all.iter().all(|variant| variant.get("const").is_some());
                let object = if names.is_empty() { "object" } else { " or object" };
                if is_text { names } else { names + object }
            }
        };
        if let Some(constant) = content.get("const") { format!("{constant}{null}") } else { kind + null }
    }
}

/// Returns the alternatives of a schema, without `null`.
fn variants(schema: &Value) -> Vec<&Value> {
    let list = ["oneOf", "anyOf"].iter().find_map(|key| schema[*key].as_array());
    list.into_iter().flatten().filter(|variant| variant["type"] != "null").collect()
}

fn quoted<'a>(values: impl Iterator<Item = &'a Value>) -> String {
    values.filter_map(Value::as_str).map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

fn description(schema: &Value) -> String {
    schema["description"].as_str().unwrap_or_default().replace(['\n', '|'], " ")
}

const INTRODUCTION: &str = "\
# Output of `--json`

<!-- Generated by `UPDATE_GOLDEN=1 cargo test -p builder --test json` from builder/src/cli/results.rs. -->

With `--json`, each line that a command prints to standard output is one JSON document. The last line is the result or
the error. The commands `console --follow`, `exec`, `flash`, `logs`, `netboot`, `odoo shell`, `open`, `rehearse`,
`status --watch`, `top --watch` and `up` print events before it; all other commands print one line. Progress and messages for people go to standard error.

```sh
bakehouse build hub --json | jq -r '.result[].disk'
bakehouse flash app disk.raw --json | tail -n 1 | jq -r '.result.ticket.number'
bakehouse check --json | jq -r '.error.diagnostics[] | \"\\(.file):\\(.line // 1): \\(.message)\"'
```

A result and an error look like this:

```json
{\"version\":1,\"command\":\"down\",\"result\":{\"stopped\":[\"hub-1\"]},\"warnings\":[]}
{\"version\":1,\"command\":\"fetch\",\"error\":{\"code\":1,\"message\":\"...\",\"help\":\"...\",\"causes\":[],\"diagnostics\":[]}}
```

[json.schema.json](json.schema.json) is the JSON Schema of a line. `--help` and `--version` print text. A command that
finds standard output closed prints nothing more, and exits with 141.

## Stability

`version` is 1. Within a version, keys keep their names, types and meanings. New commands, keys, events and values of
enumerations may be added, so ignore what you do not know. A change that breaks this raises `version`, and
`CHANGELOG.md` names it. The texts of messages may change at any time: use keys and exit codes, not texts.

Times are in seconds since 1970, and for people in RFC 3339 under the same name with `_at`. Sizes are in bytes.

## Envelope of a result

";

const EVENTS: &str = "
## Events

An event has the keys `version`, `command` and `event`. `event.kind` selects the other keys of `event`.
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_a_result_type() {
        let page = Page { schema: json_schema() };
        let all = variants(&page.schema["$defs"]["ResultLine"]);
        let mut typed: Vec<&str> =
            all.iter().filter_map(|variant| variant["properties"]["command"]["const"].as_str()).collect();
        let mut commands = commands();
        typed.sort_unstable();
        commands.sort_unstable();
        assert_eq!(typed, commands);
    }

    #[test]
    fn every_key_has_a_description() {
        let page = json_page();
        assert!(!page.contains(" |  |"), "{page}");
    }
}
