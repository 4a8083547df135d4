//! Query strings of the node API.

use fleet::node_api::{JournalQuery, MOST_JOURNAL_LINES, unit_name};
use hyper::StatusCode;
use percent_encoding::percent_decode_str;

use super::reply::Refusal;

/// Longest cursor, in bytes.
const LONGEST_CURSOR: usize = 512;

/// Parses a query of the journal. Ignores unknown keys.
pub(super) fn journal(query: &str) -> Result<JournalQuery, Refusal> {
    let mut parsed = JournalQuery::default();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        let value = percent_decode_str(value).decode_utf8().map_err(|_| invalid(key))?;
        let number = || value.parse::<u64>().map_err(|_| invalid(key));
        match key {
            "unit" => parsed.unit = Some(unit_name(&value).ok_or_else(|| invalid(key))?),
            "lines" => {
                let lines = u32::try_from(number()?).ok().filter(|lines| *lines <= MOST_JOURNAL_LINES);
                let help = format!("`lines` is at most {MOST_JOURNAL_LINES}");
                parsed.lines = Some(lines.ok_or_else(|| invalid(key).help(help))?);
            }
            "since" => parsed.since = Some(number()?),
            "after" if is_cursor(&value) => parsed.after = Some(value.into_owned()),
            "of" if is_node(&value) => parsed.of = Some(value.into_owned()),
            "boot" => parsed.boot = flag(key, &value)?,
            "follow" => parsed.follow = flag(key, &value)?,
            "after" | "of" => return Err(invalid(key)),
            _ => {}
        }
    }
    Ok(parsed)
}

fn invalid(key: &str) -> Refusal {
    Refusal::new(StatusCode::BAD_REQUEST, format!("the value of `{}` is not valid", key.escape_debug()))
}

fn flag(key: &str, value: &str) -> Result<bool, Refusal> {
    match value {
        "" | "true" => Ok(true),
        "false" => Ok(false),
        _ => Err(invalid(key)),
    }
}

fn is_cursor(cursor: &str) -> bool {
    let permitted = |c: char| c.is_ascii_alphanumeric() || c == '=' || c == ';';
    !cursor.is_empty() && cursor.len() <= LONGEST_CURSOR && cursor.chars().all(permitted)
}

/// Whether a text has the characters of a node's name.
fn is_node(name: &str) -> bool {
    let permitted = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    (1..=64).contains(&name.len()) && name.chars().all(permitted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_every_key() {
        let query =
            "unit=etcd.service&lines=7&since=1732900000&after=s%3Dab%3Bi%3D5&of=db-1&boot=true&follow=false&later=1";
        let expected = JournalQuery {
            unit: Some("etcd.service".to_owned()),
            lines: Some(7),
            since: Some(1_732_900_000),
            after: Some("s=ab;i=5".to_owned()),
            of: Some("db-1".to_owned()),
            boot: true,
            follow: false,
        };
        assert_eq!(journal(query).unwrap(), expected);
        assert_eq!(journal("").unwrap(), JournalQuery::default());
        assert_eq!(journal("unit=patroni").unwrap().unit.as_deref(), Some("patroni.service"));
    }

    #[test]
    fn rejects_values_that_would_change_the_request() {
        for query in [
            "unit=a%0d%0aX",
            "unit=",
            "unit=a.service%26follow",
            "lines=-1",
            "lines=100001",
            "lines=x",
            "since=now",
            "after=",
            "after=a:1:9",
            "after=a%0aRange:",
            "of=",
            "of=db-1%26_UID%3D0",
            "boot=2",
            "follow=yes",
            "unit=%ff.service",
        ] {
            assert_eq!(journal(query).map_err(|r| r.status), Err(StatusCode::BAD_REQUEST), "{query}");
        }
    }

    proptest::proptest! {
        #[test]
        fn arbitrary_queries_do_not_panic(query: String) {
            let _ = journal(&query);
        }
    }
}
