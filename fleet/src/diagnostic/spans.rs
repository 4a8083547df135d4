//! Positions of keys and values in a TOML file, for the carets of diagnostics.

use std::ops::Range;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::Source;

/// A key's position, and its value with its position.
struct Found<'a> {
    key: Range<usize>,
    value: &'a Spanned<DeValue<'a>>,
}

impl Source {
    /// Returns the position of a value, in bytes. `path` has the names of the tables and of the key, and the numbers of
    /// elements of lists, from 0. If the file does not have the value, returns the position of the nearest table above
    /// it, or `0..0` if the file has none of these tables.
    #[must_use]
    pub fn value(&self, path: &[&str]) -> Range<usize> {
        self.find(path, |found| match found.value.get_ref() {
            // The span of a table with a header is the whole header. The span of the key is more exact.
            DeValue::Table(_) => found.key.clone(),
            _ => found.value.span(),
        })
    }

    /// Returns the position of a key, in bytes. `path` is as in [`Source::value`].
    #[must_use]
    pub fn key(&self, path: &[&str]) -> Range<usize> {
        self.find(path, |found| found.key.clone())
    }

    fn find(&self, path: &[&str], span: impl Fn(&Found) -> Range<usize>) -> Range<usize> {
        let Ok(document) = DeTable::parse(&self.text) else { return 0..0 };
        let mut nearest = 0..0;
        let mut table = Some(document.get_ref());
        let mut list: Option<&[Spanned<DeValue>]> = None;
        for (depth, name) in path.iter().enumerate() {
            let found = match (table, list) {
                (Some(table), _) => {
                    let entry = table.iter().find(|(key, _)| key.get_ref() == name);
                    entry.map(|(key, value)| Found { key: key.span(), value })
                }
                (None, Some(list)) => {
                    let element = name.parse::<usize>().ok().and_then(|number| list.get(number));
                    element.map(|value| Found { key: value.span(), value })
                }
                (None, None) => None,
            };
            let Some(found) = found else { break };
            nearest = if depth + 1 == path.len() { span(&found) } else { found.key.clone() };
            table = found.value.get_ref().as_table();
            list = found.value.get_ref().as_array().map(|array| &**array);
        }
        nearest
    }

    /// Returns the path of the key or value at a position: `["groups", "hub", "count"]`.
    pub(super) fn path_at(&self, span: &Range<usize>) -> Option<Vec<String>> {
        let document = DeTable::parse(&self.text).ok()?;
        let mut path = Vec::new();
        in_table(document.get_ref(), span, &mut path).then_some(path)
    }
}

fn in_table(table: &DeTable, span: &Range<usize>, path: &mut Vec<String>) -> bool {
    table.iter().any(|(key, value)| {
        path.push(key.get_ref().to_string());
        key.span() == *span || in_value(value, span, path) || {
            path.pop();
            false
        }
    })
}

fn in_value(value: &Spanned<DeValue>, span: &Range<usize>, path: &mut Vec<String>) -> bool {
    if value.span() == *span {
        return true;
    }
    match value.get_ref() {
        DeValue::Table(table) => in_table(table, span, path),
        DeValue::Array(array) => array.iter().enumerate().any(|(number, value)| {
            path.push(number.to_string());
            in_value(value, span, path) || {
                path.pop();
                false
            }
        }),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_values_keys_and_the_nearest_table() {
        let text = "name = \"x\"\n[backup]\nfull = \"Someday\"\n[odoo]\nlanguages = [\"de\", \"xx\"]\n\
                    [[firewall.open]]\nport = 22\n[groups]\nhub.count = 3\n";
        let source = Source { name: "f".to_owned(), text: text.to_owned() };
        let value = |path: &[&str]| &text[source.value(path)];
        let key = |path: &[&str]| &text[source.key(path)];
        assert_eq!(value(&["backup", "full"]), "\"Someday\"");
        assert_eq!(key(&["backup", "full"]), "full");
        assert_eq!(value(&["backup", "restore"]), "backup");
        assert_eq!(value(&["backup"]), "backup");
        assert_eq!(value(&["odoo", "languages", "1"]), "\"xx\"");
        assert_eq!(value(&["firewall", "open", "0", "port"]), "22");
        assert_eq!(value(&["groups", "hub", "count"]), "3");
        assert_eq!(key(&["groups", "hub"]), "hub");
        assert_eq!(source.value(&["update", "url"]), 0..0);
        let count = source.value(&["groups", "hub", "count"]);
        assert_eq!(source.path_at(&count).unwrap(), ["groups", "hub", "count"]);
    }
}
