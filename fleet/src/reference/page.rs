//! Generates `docs/fleet-toml.md` from the schemas.

use std::fmt::Write as _;

use schemars::JsonSchema;
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, Visitor, value::Error};
use serde_json::Value;

use super::{File, json_schema, literal, schema_of};
use crate::{
    Access, Alerts, Authority, Backup, Check, Database, Debian, Disk, Dns, Email, ExtraSource, FileMeta, Firewall,
    Fleet, Fonts, Group, Health, Image, Mail, Make, Matrix, Mesh, Migration, Netboot, Ntfy, Odoo, OdooSource, OpenPort,
    OverlayManifest, Port, Profile, Promise, Repository, S3, SecureBoot, Slack, Telegram, Trim, Units, Update, User,
    Vip, VmSize, Web,
};

/// A table of a file: its path in the schema, and its keys in the order of the type.
struct Section {
    /// Name of the table as TOML writes it. Empty for the keys of the whole file.
    title: &'static str,
    /// Names of properties that lead to the table. `*` is the item of a list or of a map.
    path: &'static [&'static str],
    keys: &'static [&'static str],
    /// Text about the table, from the type.
    introduction: String,
    /// Hand-written text below the table.
    note: &'static str,
}

fn section<T: JsonSchema + for<'de> Deserialize<'de>>(
    title: &'static str,
    path: &'static [&'static str],
    note: &'static str,
) -> Section {
    Section { title, path, keys: keys::<T>(), introduction: introduction(&schema_of::<T>()), note }
}

/// Returns the tables of `fleet.toml`.
fn fleet_sections() -> Vec<Section> {
    let given = "\
- Bakehouse gives the role `voter` (etcd) to three or five hubs. If there are fewer hubs, it also gives the role to
  monitors and then to other nodes, until there are three. Two nodes have one voter.
- Bakehouse gives the role `backup` to the node that keeps the backups, `update` to all nodes if `update.url` is set, and
  `dns` to all hubs if `dns.name` is set.";
    let later = "[The steps](getting-started.md#backups) of a restore are in getting-started.md.";
    vec![
        section::<Fleet>("", &[], ""),
        section::<Group>("[groups.NAME]", &["groups", "*"], given),
        section::<Image>("[image]", &["image"], ""),
        section::<Mesh>("[mesh]", &["mesh"], ""),
        section::<Vip>("[vip]", &["vip"], "[One name that never dies](howto/one-name.md) has the steps."),
        section::<Dns>("[dns]", &["dns"], "[One name that never dies](howto/one-name.md) has the steps."),
        section::<Firewall>("[firewall]", &["firewall"], ""),
        section::<OpenPort>("[[firewall.open]]", &["firewall", "open", "*"], ""),
        section::<Web>(
            "[web]",
            &["web"],
            "[Use a certificate that browsers trust](howto/certificate.md) has the steps.",
        ),
        section::<Authority>("[web.authority]", &["web", "authority"], ""),
        section::<Access>("[access]", &["access"], "[security.md](security.md) explains the roles of operators."),
        section::<Update>("[update]", &["update"], "[updates.md](updates.md) explains updates."),
        section::<Alerts>("[alerts]", &["alerts"], ""),
        section::<Email>("[alerts.email]", &["alerts", "email"], "[Get alerts](howto/alerts.md) has the steps."),
        section::<Telegram>("[[alerts.telegram]]", &["alerts", "telegram", "*"], ""),
        section::<Slack>("[[alerts.slack]]", &["alerts", "slack", "*"], ""),
        section::<Matrix>("[[alerts.matrix]]", &["alerts", "matrix", "*"], ""),
        section::<Ntfy>("[[alerts.ntfy]]", &["alerts", "ntfy", "*"], ""),
        section::<Database>("[database]", &["database"], ""),
        section::<Odoo>(
            "[odoo]",
            &["odoo"],
            "[Add-ons and languages](howto/addons.md) has the steps, and [Size Odoo](howto/sizing.md) the formulas.",
        ),
        section::<OdooSource>("[odoo.source]", &["odoo", "source"], ""),
        section::<Repository>("[[odoo.repositories]]", &["odoo", "repositories", "*"], ""),
        section::<Mail>("[odoo.mail]", &["odoo", "mail"], "[Send mail](howto/mail.md) has the steps."),
        section::<Backup>("[backup]", &["backup"], later),
        section::<S3>("[backup.s3]", &["backup", "s3"], ""),
        section::<Promise>("[promise]", &["promise"], ""),
        section::<Debian>("[debian]", &["debian"], ""),
        section::<ExtraSource>("[[debian.sources]]", &["debian", "sources", "*"], ""),
        section::<Netboot>("[netboot]", &["netboot"], "[netboot.md](netboot.md) has the steps."),
        section::<SecureBoot>("[secure_boot]", &["secure_boot"], "[secure-boot.md](secure-boot.md) has the steps."),
    ]
}

/// Returns the tables of a profile.
fn profile_sections() -> Vec<Section> {
    let sources = "`[[sources]]` has the keys of `[[debian.sources]]` of fleet.toml.";
    vec![
        section::<Profile>("", &[], sources),
        section::<Port>("[[ports]]", &["ports", "*"], "[ports.md](ports.md) has the built-in rules."),
        section::<Units>("[units]", &["units"], ""),
        section::<Health>("[health]", &["health"], ""),
        section::<Trim>("[trim]", &["trim"], ""),
        section::<Fonts>("[fonts.LANGUAGE]", &["fonts", "*"], ""),
        section::<User>("[users]", &["users", "*"], ""),
        section::<Disk>("[disk]", &["disk"], ""),
        section::<VmSize>("[vm]", &["vm"], ""),
    ]
}

/// Returns the tables of an overlay's manifest.
fn overlay_sections() -> Vec<Section> {
    vec![
        section::<OverlayManifest>("", &[], ""),
        section::<FileMeta>("[files.\"PATH\"]", &["files", "*"], ""),
        section::<Check>("[[check]]", &["check", "*"], ""),
        section::<Make>("[[make]]", &["make", "*"], ""),
        section::<Migration>(
            "[[migration]]",
            &["migration", "*"],
            "[updates.md](updates.md#what-a-node-keeps) explains migrations.",
        ),
    ]
}

/// A table of a file, as the reference prints it.
pub struct Table {
    /// Name of the table as TOML writes it. Empty for the keys of the whole file.
    pub title: &'static str,
    /// Text before the rows.
    pub introduction: String,
    /// Keys of the table, in the order of the file's types.
    pub rows: Vec<Row>,
}

/// A key of a table.
pub struct Row {
    /// Name of the key.
    pub key: String,
    /// Type of the value, such as `number, 1 to 4000`.
    pub kind: String,
    /// Value if the file does not have the key, or `required`, or `none`. Markdown.
    pub default: String,
    /// Meaning of the value, one paragraph of Markdown.
    pub meaning: String,
}

/// Returns the tables of a file with their keys. The first table lacks the keys that have a table of their own.
#[must_use]
pub fn tables(file: File) -> Vec<Table> {
    let schema = json_schema(file);
    sections(file).into_iter().map(|section| section.read(&schema)).collect()
}

fn sections(file: File) -> Vec<Section> {
    match file {
        File::Fleet => fleet_sections(),
        File::Profile => profile_sections(),
        File::Overlay => overlay_sections(),
    }
}

/// Returns the text of `docs/fleet-toml.md`.
#[must_use]
pub fn page() -> String {
    let fleet = json_schema(File::Fleet);
    let mut page = include_str!("head.md").to_owned();
    for (title, need, text) in [
        ("You must set", "must", "Without these keys, `bakehouse check` reports an error.\n"),
        ("You should set", "should", "These keys have a default that fits a trial, and not a fleet in production.\n"),
    ] {
        let _ = write!(page, "\n## {title}\n\n{text}\n{HEADER}");
        for section in fleet_sections().iter().filter(|section| need != "must" || section.is_required(&fleet)) {
            let table = section.table(&fleet);
            // `groups` is a table, whose keys have rows of their own.
            let keys = section.keys.iter().filter(|key| **key != "groups" && need_of(table, key).starts_with(need));
            for key in keys {
                let name = section.full_name(key);
                write_row(&mut page, &row(name, &table["properties"][*key], &need_of(table, key)));
            }
        }
    }
    page.push_str("\n## You may set\n\nAll keys, by table. Every other key has a default.\n");
    write_tables(&mut page, File::Fleet);
    for (text, file) in [(include_str!("profiles.md"), File::Profile), (include_str!("overlays.md"), File::Overlay)] {
        page.push('\n');
        page.push_str(text);
        write_tables(&mut page, file);
    }
    page
}

const HEADER: &str = "| key | type | default | meaning |\n| --- | --- | --- | --- |\n";

fn write_tables(page: &mut String, file: File) {
    for (section, table) in sections(file).iter().zip(tables(file)) {
        if !table.title.is_empty() {
            let _ = write!(page, "\n### `{}`\n\n{}\n", table.title, table.introduction);
        }
        let _ = write!(page, "\n{HEADER}");
        table.rows.iter().for_each(|row| write_row(page, row));
        if !section.note.is_empty() {
            let _ = write!(page, "\n{}\n", section.note);
        }
    }
}

fn write_row(page: &mut String, Row { key, kind, default, meaning }: &Row) {
    let cell = |text: &str| text.replace('|', "\\|");
    let _ = writeln!(page, "| `{key}` | {} | {} | {} |", cell(kind), cell(default), cell(meaning));
}

impl Section {
    fn read(self, file: &Value) -> Table {
        let table = self.table(file);
        let property = |key: &str| &table["properties"][key];
        // A key of the whole file that is a table has a section of its own.
        let own = |key: &&&str| !self.path.is_empty() || property(key).get("properties").is_none();
        let rows = self.keys.iter().filter(own);
        let rows = rows.map(|key| row((*key).to_owned(), property(key), &need_of(table, key))).collect();
        Table { title: self.title, introduction: self.introduction, rows }
    }

    /// Returns whether the file must have the table.
    fn is_required(&self, file: &Value) -> bool {
        self.path.iter().filter(|name| **name != "*").all(|name| requires(file, name))
    }

    /// Returns the schema of the table.
    fn table<'a>(&self, file: &'a Value) -> &'a Value {
        self.path.iter().fold(file, |schema, name| match *name {
            "*" if schema["items"].is_object() => &schema["items"],
            "*" => &schema["additionalProperties"],
            name => &schema["properties"][name],
        })
    }

    /// Returns the key with the name of its table: `groups.NAME.count`.
    fn full_name(&self, key: &str) -> String {
        let table = self.title.trim_matches(['[', ']']);
        if table.is_empty() { key.to_owned() } else { format!("{table}.{key}") }
    }
}

/// Returns `must` for a required key, else the `x-need` of its type, such as `should`, or an empty string.
fn need_of(table: &Value, key: &str) -> String {
    let need = table["properties"][key]["x-need"].as_str();
    if requires(table, key) { "must".to_owned() } else { need.unwrap_or_default().to_owned() }
}

fn requires(table: &Value, key: &str) -> bool {
    table["required"].as_array().is_some_and(|all| all.iter().any(|k| k == key))
}

/// Returns the text about a table, without the table's name.
fn introduction(table: &Value) -> String {
    let text = table["description"].as_str().unwrap_or_default();
    let text = text.split_once("]`: ").or_else(|| text.split_once("]]`: ")).map_or(text, |(_, rest)| rest);
    let mut chars = text.chars();
    chars.next().map(|first| first.to_uppercase().chain(chars).collect()).unwrap_or_default()
}

fn row(key: String, schema: &Value, need: &str) -> Row {
    let (meaning, default) = without_default(schema["description"].as_str().unwrap_or_default(), schema);
    let default = match need {
        "must" => "required".to_owned(),
        "must, for hubs" => "required for hubs".to_owned(),
        _ => default,
    };
    Row { key, kind: type_of(schema), default, meaning }
}

/// Splits a description into its meaning and its default: the value, or the sentence that starts with `Default`.
fn without_default(text: &str, schema: &Value) -> (String, String) {
    let value = schema.get("default").filter(|d| d.is_number() || d.is_boolean() || d.is_string() && *d != "");
    let (before, rest) = text.split_once("Default: ").unwrap_or((text, ""));
    // The default is one sentence; an example or another sentence may follow.
    let (sentence, behind) = match literal(rest) {
        Some(_) => {
            let end = rest[1..].find('`').map_or(rest.len(), |at| at + 2);
            (&rest[..end], rest[end..].trim_start_matches('.'))
        }
        None => rest.split_once(". ").map_or((rest.trim_end_matches('.'), ""), |(default, rest)| (default, rest)),
    };
    let default = match value {
        Some(value) => format!("`{value}`"),
        None if sentence.is_empty() => "none".to_owned(),
        None => sentence.to_owned(),
    };
    (format!("{} {}", before.trim(), behind.trim()).trim().to_owned(), default)
}

/// Returns the type of a value as the reference prints it: `number, 1 to 4000`.
fn type_of(schema: &Value) -> String {
    if let Some(variants) = schema["oneOf"].as_array().or_else(|| schema["anyOf"].as_array()) {
        let names =
            variants.iter().map(|v| format!("`{}`", if v["const"].is_null() { &v["enum"][0] } else { &v["const"] }));
        return names.collect::<Vec<_>>().join(" or ");
    }
    if let Some(values) = schema["enum"].as_array() {
        return values.iter().map(|value| format!("`{value}`")).collect::<Vec<_>>().join(" or ");
    }
    if let Some(name) = schema["x-type"].as_str() {
        return name.to_owned();
    }
    let number = |key: &str| schema[key].as_f64().map(|n| n as i64);
    match schema["type"].as_str() {
        Some("integer") => match (number("minimum").unwrap_or(0), number("maximum").unwrap_or(i64::MAX)) {
            (0, 65535..) => "number".to_owned(),
            (least, 65535..) => format!("number, at least {least}"),
            (least, most) => format!("number, {least} to {most}"),
        },
        Some("string") | None => "text".to_owned(),
        Some("array") if schema["items"]["type"] == "object" => "list of tables".to_owned(),
        Some("array") => format!("list of {}", plural(&type_of(&schema["items"]))),
        Some("object") if schema["additionalProperties"].is_object() => {
            let inner = &schema["additionalProperties"];
            if inner["type"] == "object" {
                "tables".to_owned()
            } else {
                format!("table of {}", plural(&type_of(inner)))
            }
        }
        Some("object") => "table".to_owned(),
        Some(other) => other.to_owned(),
    }
}

fn plural(name: &str) -> String {
    match name.split_once(' ') {
        Some((first, rest)) => format!("{} {rest}", plural(first)),
        None if name.ends_with('s') => format!("{name}es"),
        None => format!("{name}s"),
    }
}

/// Returns the keys of a struct in the order of its fields, as serde names them.
fn keys<T: for<'de> Deserialize<'de>>() -> &'static [&'static str] {
    struct Names<'a>(&'a mut &'static [&'static str]);

    impl<'de> Deserializer<'de> for Names<'_> {
        type Error = Error;

        fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Error> {
            Err(Error::custom("only structs have keys"))
        }

        fn deserialize_struct<V: Visitor<'de>>(
            self,
            _: &'static str,
            fields: &'static [&'static str],
            _: V,
        ) -> Result<V::Value, Error> {
            *self.0 = fields;
            Err(Error::custom("only the names are of interest"))
        }

        serde::forward_to_deserialize_any! {
            bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
            newtype_struct seq tuple tuple_struct map enum identifier ignored_any
        }
    }

    let mut names: &'static [&'static str] = &[];
    let _ = T::deserialize(Names(&mut names));
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_have_every_key_of_the_schemas() {
        for (file, sections) in
            [(File::Fleet, fleet_sections()), (File::Profile, profile_sections()), (File::Overlay, overlay_sections())]
        {
            let schema = json_schema(file);
            for section in &sections {
                let table = section.table(&schema)["properties"].as_object().expect(section.title);
                assert_eq!(table.len(), section.keys.len(), "{}", section.title);
                for key in section.keys {
                    let property = table.get(*key).unwrap_or_else(|| panic!("{}: no {key}", section.title));
                    let inner = [property, &property["items"], &property["additionalProperties"]];
                    if inner.iter().any(|schema| schema.get("properties").is_some()) && *key != "sources" {
                        let prefix = [section.path, &[*key]].concat();
                        assert!(sections.iter().any(|s| s.path.starts_with(&prefix)), "no section for {prefix:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn page_groups_keys_by_need() {
        let page = page();
        let part = |from: &str, to: &str| page.split_once(from).unwrap().1.split_once(to).unwrap().0.to_owned();
        let must = part("## You must set", "## You should set");
        for key in ["| `name` | name | required |", "`groups.NAME.count` | number, 1 to 4000 | required |"] {
            assert!(must.contains(key), "{must}");
        }
        assert!(!must.contains("sources") && !must.contains("bucket"), "{must}");
        let should = part("## You should set", "## You may set");
        assert!(should.contains("| `image.hardware` | `\"cloud\"` or `\"metal\"` | `\"cloud\"` |"), "{should}");
        assert!(page.contains("| `ttl` | number, at least 20 | `20` |"));
    }
}
