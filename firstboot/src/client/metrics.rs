//! Client of exporters on this node, in [Prometheus's text format].
//!
//! [Prometheus's text format]: https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format

use std::collections::BTreeMap;

use fleet_https::{Connection, request};

use crate::error::Result;

/// Longest reply, in bytes. A line has about 100 bytes.
const LONGEST: usize = 8 << 20;

/// A value with its labels.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Sample {
    /// Name of the metric.
    pub name: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Value.
    pub value: f64,
}

impl Sample {
    /// Returns a label's value; an empty text without the label.
    pub(crate) fn label(&self, name: &str) -> &str {
        self.labels.get(name).map_or("", String::as_str)
    }

    /// Returns the value as a whole number; 0 for a value that is negative or not a number.
    pub(crate) fn count(&self) -> u64 {
        // `as` saturates, and turns NaN into 0.
        #[expect(clippy::cast_sign_loss, reason = "negative values become 0")]
        let count = self.value as u64;
        count
    }
}

/// Reads the samples of an exporter whose names begin with one of `prefixes`.
///
/// # Errors
/// If the exporter does not answer.
pub(crate) async fn samples(host: &str, port: u16, prefixes: &[&str]) -> Result<Vec<Sample>> {
    let mut connection = Connection::plain(host, port).await?;
    let text = connection.ask(request("GET", host, "/metrics", &[], "".into())?, LONGEST).await?;
    Ok(parse(&String::from_utf8_lossy(&text), prefixes))
}

/// Parses the format. Skips comments, and lines that do not have the format.
pub(crate) fn parse(text: &str, prefixes: &[&str]) -> Vec<Sample> {
    let wanted = text.lines().filter(|line| prefixes.iter().any(|prefix| line.starts_with(prefix)));
    wanted.filter_map(sample).collect()
}

fn sample(line: &str) -> Option<Sample> {
    let end = line.find(['{', ' ', '\t'])?;
    let (name, mut rest) = line.split_at(end);
    let mut labels = BTreeMap::new();
    if let Some(inner) = rest.strip_prefix('{') {
        rest = inner.trim_start();
        while !rest.starts_with('}') {
            let (label, after) = rest.split_once('=')?;
            let (value, after) = quoted(after.trim_start())?;
            labels.insert(label.trim().to_owned(), value);
            rest = after.trim_start();
            rest = rest.strip_prefix(',').unwrap_or(rest).trim_start();
        }
        rest = &rest[1..];
    }
    // A time may follow the value.
    let value = rest.split_whitespace().next()?.parse().ok()?;
    Some(Sample { name: name.to_owned(), labels, value })
}

/// Returns a quoted text without its escapes, and what follows it.
fn quoted(text: &str) -> Option<(String, &str)> {
    let inner = text.strip_prefix('"')?;
    let (mut value, mut escaped) = (String::new(), false);
    for (at, c) in inner.char_indices() {
        match c {
            _ if escaped => {
                value.push(if c == 'n' { '\n' } else { c });
                escaped = false;
            }
            '\\' => escaped = true,
            '"' => return Some((value, &inner[at + 1..])),
            _ => value.push(c),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_have_labels_and_values() {
        let text = "# HELP bird_protocol_up Protocol is up\n# TYPE bird_protocol_up gauge\n\
                    bird_protocol_up{name=\"hub-1\",proto=\"BGP\",state=\"Established\"} 1\n\
                    bird_protocol_up{ name = \"a\\\"b\\\\c\\nd\" , } 0 1700000000\n\
                    go_threads 7\npg_wal_size_bytes 1.6777216e+07\n\
                    bird_broken{name=\"x} 1\nbird_broken\nbird_broken{name} 1\nbird_broken x\n";
        let found = parse(text, &["bird_", "pg_wal"]);
        let shown: Vec<_> =
            found.iter().map(|s| (s.name.as_str(), s.label("name"), s.label("proto"), s.count())).collect();
        assert_eq!(
            shown,
            [
                ("bird_protocol_up", "hub-1", "BGP", 1),
                ("bird_protocol_up", "a\"b\\c\nd", "", 0),
                ("pg_wal_size_bytes", "", "", 16_777_216)
            ]
        );
        let odd = parse("a NaN\na -5\na +Inf\n", &["a"]);
        assert_eq!(odd.iter().map(Sample::count).collect::<Vec<_>>(), [0, 0, u64::MAX]);
    }

    proptest::proptest! {
        #[test]
        fn arbitrary_texts_do_not_panic(text in "a[ -~\n]{0,200}", other: String) {
            let _ = parse(&text, &["a"]);
            let _ = parse(&other, &[""]);
        }
    }
}
