//! Rewrites messages of the TOML parser and of serde: the new messages name keys, tables and numbers instead of Rust's
//! types.

use serde::de::DeserializeOwned;

use super::nearest;

/// Placeholder for a key or a value. No table has this key, and no setting accepts this value.
const UNKNOWN: &str = "?";

/// Returns a message and its help. `path`: names of the tables and of the key with the invalid value. `T`: type of the
/// whole file.
pub(super) fn plain<T: DeserializeOwned>(message: &str, path: Option<&[String]>) -> (String, Option<String>) {
    let path = path.unwrap_or_default();
    let shown = path.join(".");
    let mut quoted = message.split('`').skip(1).step_by(2);
    if message.starts_with("unknown field ") {
        let given = quoted.next().unwrap_or_default();
        let known: Vec<&str> = quoted.collect();
        if ["password", "token", "bot_token", "api_url"].contains(&given) && path.first().is_some_and(|p| p == "alerts")
        {
            let help = "fleet.toml has no passwords: `bakehouse secret` stores them (docs/howto/alerts.md)".to_owned();
            return (format!("unknown key `{given}`"), Some(help));
        }
        if ["password", "smtp_password"].contains(&given) && path.first().is_some_and(|p| p == "odoo") {
            let help = "fleet.toml has no passwords: `bakehouse secret odoo_mail` stores it (docs/howto/mail.md)";
            return (format!("unknown key `{given}`"), Some(help.to_owned()));
        }
        let list = (!known.is_empty()).then(|| format!("the keys here are {}", listed(&known, "and")));
        return (format!("unknown key `{given}`"), nearest(given, known.iter().copied()).or(list));
    }
    if message.starts_with("unknown variant ") {
        let given = quoted.next().unwrap_or_default();
        let known: Vec<&str> = quoted.collect();
        let help = nearest(given, known.iter().copied()).unwrap_or_else(|| format!("set {}", listed(&known, "or")));
        return (format!("`{shown}` cannot be `{given}`"), Some(help));
    }
    if message.starts_with("missing field ") {
        let key = quoted.next().unwrap_or_default();
        return (format!("the key `{key}` is missing"), (!shown.is_empty()).then(|| format!("add it to `{shown}`")));
    }
    if message.contains("IPv4 address syntax") {
        let help = "write four numbers, such as \"10.10.0.100\"".to_owned();
        return (format!("`{shown}` is not an IPv4 address"), Some(help));
    }
    if message.contains("IP address syntax") {
        let help = "write an address and a prefix length, such as \"10.10.0.0/24\"".to_owned();
        return (format!("`{shown}` is not a network"), Some(help));
    }
    // serde also accepts a list of values in place of a table. It reports this error if the list is too short.
    if message.starts_with("invalid length ") {
        let (wanted, help) = wanted::<T>("struct", path);
        return (format!("`{shown}` has to be {wanted}"), help);
    }
    // The parser reports these errors if the value of an enum is not a string.
    if message.starts_with("wanted string") || message.starts_with("expected table") {
        let (wanted, help) = wanted::<T>("", path);
        return (format!("`{shown}` has to be {wanted}"), help);
    }
    let parts = ["invalid type: ", "invalid value: "].iter().find_map(|start| message.strip_prefix(start));
    let Some((given, expected)) = parts.and_then(|rest| rest.rsplit_once(", expected ")) else {
        return (message.to_owned(), None);
    };
    let (wanted, help) = wanted::<T>(expected, path);
    (format!("`{shown}` is {}, but has to be {wanted}", found(given)), help)
}

/// Returns plain words for serde's description of a value.
fn found(given: &str) -> String {
    let (kind, value) = given.split_once(' ').unwrap_or((given, ""));
    let value = value.trim_start_matches("point ").trim_matches('`');
    match kind {
        "integer" | "floating" => format!("the number {value}"),
        "string" => format!("the text {value}"),
        "boolean" => format!("`{value}`"),
        "sequence" => "a list".to_owned(),
        "map" => "a table".to_owned(),
        _ => given.to_owned(),
    }
}

/// Returns plain words for the type or value that serde expects, and the help.
fn wanted<T: DeserializeOwned>(expected: &str, path: &[String]) -> (String, Option<String>) {
    let plain = match expected {
        "a string" => "a text in quotes",
        "a boolean" => "`true` or `false`",
        "a sequence" => "a list, such as [\"a\", \"b\"]",
        "a map" => "a table",
        "u8" => "a whole number from 0 to 255",
        "u16" => "a whole number from 0 to 65535",
        "u32" => "a whole number from 0 to 4294967295",
        "u64" | "usize" => "a whole number",
        "IPv4 address" => "an IPv4 address, such as \"10.10.0.100\"",
        "IPv4 network address" => "a network, such as \"10.10.0.0/24\"",
        _ if expected.starts_with("struct") => {
            let keys = probe::<T>(path, true);
            let name = match path.last() {
                Some(last) if last.bytes().all(|b| b.is_ascii_digit()) => "{ … }".to_owned(),
                _ => format!("[{}]", path.join(".")),
            };
            let help = format!("write it as a table {name} with keys, such as {}", listed(&keys, "and"));
            return ("a table".to_owned(), (!keys.is_empty()).then_some(help));
        }
        _ => {
            let values = probe::<T>(path, false);
            let texts: Vec<String> = values.iter().map(|value| format!("\"{value}\"")).collect();
            let wanted = match texts.is_empty() {
                true if expected.is_empty() => "a text in quotes".to_owned(),
                true => expected.to_owned(),
                false => texts.join(" or "),
            };
            return (wanted, None);
        }
    };
    (plain.to_owned(), None)
}

/// Returns the keys that the table at `path` may have, or the strings that the value may be. Parses an unknown key or
/// value, because the parser's error lists the known ones.
fn probe<T: DeserializeOwned>(path: &[String], table: bool) -> Vec<String> {
    let quoted = |part: &String| format!("{part:?}");
    let is_number = |part: &String| part.bytes().all(|b| b.is_ascii_digit());
    let (name, parents) = match path.split_last() {
        Some((last, parents)) if !table => (last.as_str(), parents),
        _ => (UNKNOWN, path),
    };
    let (parents, brackets) = match parents.split_last() {
        Some((last, parents)) if is_number(last) => (parents, ("[[", "]]")),
        _ => (parents, ("[", "]")),
    };
    let header = match parents {
        [] => String::new(),
        parents => {
            let names: Vec<String> = parents.iter().filter(|part| !is_number(part)).map(quoted).collect();
            format!("{}{}{}\n", brackets.0, names.join("."), brackets.1)
        }
    };
    let text = format!("{header}{name:?} = \"{UNKNOWN}\"\n");
    let Err(e) = toml::from_str::<T>(&text) else { return Vec::new() };
    let wanted = format!("`{UNKNOWN}`");
    if !e.message().starts_with("unknown ") || !e.message().contains(&wanted) {
        return Vec::new();
    }
    e.message().split('`').skip(1).step_by(2).skip(1).map(str::to_owned).collect()
}

/// Returns names in backticks: "`a`, `b` and `c`".
fn listed(names: &[impl AsRef<str>], word: &str) -> String {
    let quoted: Vec<String> = names.iter().map(|name| format!("`{}`", name.as_ref())).collect();
    match quoted.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} {word} {last}", rest.join(", ")),
        _ => quoted.join(""),
    }
}

#[cfg(test)]
mod tests {
    use crate::{Fleet, OverlayManifest, Profile};

    fn message(text: &str) -> String {
        Fleet::parse("f", text.as_bytes()).map(drop).expect_err(text).to_string()
    }

    /// Words of Rust's and serde's types.
    const FOREIGN: [&str; 12] = [
        "struct", "enum", "variant", "u16", "u32", "u64", "a string", "boolean", "sequence", "map", "field", "integer",
    ];

    #[test]
    fn names_keys_and_values_instead_of_rust_types() {
        for (text, expected) in [
            ("name = 2", "`name` is the number 2, but has to be a text in quotes"),
            ("name = \"x\"\nversion = 2", "f:2: `version` is the number 2, but has to be a text in quotes"),
            (
                "name = \"x\"\n[groups.hub]\ncount = \"3\"",
                "`groups.hub.count` is the text \"3\", but has to be a whole",
            ),
            (
                "name = \"x\"\n[groups.hub]\ncount = -1",
                "is the number -1, but has to be a whole number from 0 to 65535",
            ),
            ("name = \"x\"\n[groups.hub]\ncount = 1.5", "is the number 1.5, but has to be a whole number"),
            ("name = \"x\"\n[groups.hub]\n", "the key `count` is missing (add it to `groups.hub`)"),
            ("name = \"x\"\ngroups.hub = 3", "`groups.hub` is the number 3, but has to be a table"),
            ("[groups]", "the key `name` is missing"),
            (
                "name = \"x\"\n[alerts]\nemail = \"me@acme.example\"",
                "`alerts.email` is the text \"me@acme.example\", but has to be a table (write it as a table \
                 [alerts.email] with keys, such as `to`, `from`, `smarthost`, `user`, `tls` and `hello`)",
            ),
            ("name = \"x\"\n[odoo]\nlanguages = \"de\"", "has to be a list, such as"),
            ("name = \"x\"\n[web]\nredirect = \"yes\"", "is the text \"yes\", but has to be `true` or `false`"),
            ("name = \"x\"\n[image]\nhardware = \"mettal\"", "`image.hardware` cannot be `mettal` (did you mean"),
            ("name = \"x\"\n[image]\nhardware = \"server\"", "(set `cloud` or `metal`)"),
            ("name = \"x\"\n[image]\nhardware = 1", "`image.hardware` has to be \"cloud\" or \"metal\""),
            ("name = \"x\"\n[vip]\naddress = \"10.10.0\"", "`vip.address` is not an IPv4 address (write four"),
            ("name = \"x\"\n[vip]\naddress = 10", "is the number 10, but has to be an IPv4 address"),
            ("name = \"x\"\n[mesh]\nsubnet = \"10.10.0.0\"", "`mesh.subnet` is not a network (write an address and a"),
            ("name = \"x\"\n[[firewall.open]]\nport = \"ssh\"", "`firewall.open.0.port` is the text \"ssh\""),
            ("name = \"x\"\n[firewall]\nopen = [22]", "with keys, such as `port`, `proto` and `role`"),
            ("name = \"x\"\nhardware = \"metal\"", "unknown key `hardware` (the keys here are `name`, `version`"),
        ] {
            let message = message(text);
            assert!(message.contains(expected), "{message}\n  instead of {expected}");
        }
    }

    /// Puts a value of each kind in the place of each table and each key of fleet.toml.
    #[test]
    fn no_message_names_a_rust_type() {
        let tables = [
            "image",
            "mesh",
            "vip",
            "dns",
            "debian",
            "database",
            "backup",
            "backup.s3",
            "odoo",
            "odoo.mail",
            "odoo.options",
            "alerts",
            "alerts.email",
            "firewall",
            "web",
            "access",
            "promise",
            "update",
            "netboot",
            "netboot.machines",
            "secure_boot",
            "groups.hub",
        ];
        let mut seen = 0;
        for table in tables {
            let keys = super::probe::<Fleet>(&table.split('.').map(str::to_owned).collect::<Vec<_>>(), true);
            let places = keys.iter().map(|key| format!("{table}.{key}")).chain([table.to_owned()]);
            for place in places {
                for value in ["7", "-7", "1.5", "\"text\"", "true", "[1]", "{ a = 1 }", "1979-05-27"] {
                    let Err(e) = Fleet::parse("f", format!("name = \"x\"\n{place} = {value}\n").as_bytes()) else {
                        continue;
                    };
                    seen += 1;
                    let foreign = FOREIGN.iter().find(|word| e.message.contains(*word));
                    assert_eq!(foreign, None, "{place} = {value}: {}", e.message);
                }
            }
        }
        assert!(seen > 200, "{seen}");
    }

    #[test]
    fn errors_of_profiles_and_overlays_name_no_rust_type() {
        let e = Profile::parse("p", b"ports = [{ port = 70000, proto = \"tcp\", service = \"x\" }]").unwrap_err();
        assert!(e.message.contains("is the number 70000, but has to be a whole number from 0 to 65535"), "{e}");
        let e = OverlayManifest::parse("o", b"check = \"x\"").unwrap_err();
        assert!(e.message.contains("`check` is the text \"x\", but has to be a list"), "{e}");
    }
}
