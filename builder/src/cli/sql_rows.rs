//! Rows that PostgreSQL returns, as a table, CSV or JSON.

use std::fmt::Write as _;

use clap::ValueEnum;
use fleet::postgres::{Column, Message, Report, columns, kind, report, row, text};
use fleet::{one_line, printable};
use schemars::JsonSchema;
use serde::Serialize;

use crate::error::{Error, Result, fail};

/// Largest table, and largest result of `--json`, in bytes of values. CSV and JSON have no limit.
const LARGEST_TABLE: usize = 64 << 20;

/// Format of rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum RowFormat {
    /// Aligned columns, for people
    Table,
    /// CSV with a line of names; an empty field is NULL, and `""` an empty text
    Csv,
    /// A JSON object for each row, one a line
    Json,
}

/// Result of a statement.
#[derive(Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub(super) struct StatementResult {
    /// PostgreSQL's tag of the statement, such as `SELECT 1`.
    pub(super) tag: String,
    /// Names of the columns.
    pub(super) columns: Vec<String>,
    /// Numbers of the columns' types in `pg_type`.
    pub(super) types: Vec<u32>,
    /// Rows: PostgreSQL's text of each value, or `null`.
    pub(super) rows: Vec<Vec<Option<String>>>,
}

/// What PostgreSQL has sent.
pub(super) struct Rows {
    /// Format of what is printed; `None`: everything is kept for the result.
    format: Option<RowFormat>,
    /// Whether standard output is a terminal.
    is_terminal: bool,
    columns: Vec<Column>,
    rows: Vec<Vec<Option<String>>>,
    /// Bytes of the rows that are kept.
    kept: usize,
    sets: usize,
    /// Results of statements, if everything is kept.
    pub(super) statements: Vec<StatementResult>,
    /// The error that ended the statements.
    pub(super) error: Option<Report>,
    /// Notices that were not printed yet.
    pub(super) notices: Vec<String>,
}

impl Rows {
    pub(super) fn new(format: Option<RowFormat>, is_terminal: bool) -> Self {
        Self {
            format,
            is_terminal,
            columns: Vec::new(),
            rows: Vec::new(),
            kept: 0,
            sets: 0,
            statements: Vec::new(),
            error: None,
            notices: Vec::new(),
        }
    }

    /// Takes a message of PostgreSQL. Returns the text to print.
    ///
    /// # Errors
    /// If the message is malformed, or a table becomes too large.
    pub(super) fn take(&mut self, message: &Message) -> Result<String> {
        let malformed = || Error::Failed("PostgreSQL's reply is malformed".to_owned());
        let text = match message.kind {
            kind::COLUMNS => {
                self.columns = columns(&message.body).ok_or_else(malformed)?;
                self.head()
            }
            kind::ROW => {
                let row = row(&message.body).filter(|row| row.len() == self.columns.len()).ok_or_else(malformed)?;
                self.row(row)?
            }
            kind::COMPLETE => self.complete(text(&message.body)),
            kind::COPY_DATA if self.format.is_some() => String::from_utf8_lossy(&message.body).into_owned(),
            kind::ERROR => {
                self.error = Some(report(&message.body));
                String::new()
            }
            kind::NOTICE => {
                let notice = report(&message.body);
                self.notices.push(one_line(&format!("{}: {}", notice.severity, notice.message)));
                String::new()
            }
            _ => String::new(),
        };
        // A program that reads the output gets each character.
        Ok(if self.is_terminal { printable(&text) } else { text })
    }

    fn head(&mut self) -> String {
        self.sets += 1;
        let separator = if self.sets > 1 { "\n" } else { "" };
        match self.format {
            Some(RowFormat::Csv) => {
                let names: Vec<String> = self.columns.iter().map(|column| csv_field(Some(&column.name))).collect();
                format!("{separator}{}\n", names.join(","))
            }
            Some(RowFormat::Table) => separator.to_owned(),
            _ => String::new(),
        }
    }

    fn row(&mut self, row: Vec<Option<String>>) -> Result<String> {
        match self.format {
            Some(RowFormat::Csv) => {
                let fields: Vec<String> = row.iter().map(|value| csv_field(value.as_deref())).collect();
                Ok(format!("{}\n", fields.join(",")))
            }
            Some(RowFormat::Json) => Ok(json_object(&self.columns, &row)),
            Some(RowFormat::Table) | None => {
                self.kept += row.iter().map(|value| value.as_ref().map_or(0, String::len) + 24).sum::<usize>();
                if self.kept > LARGEST_TABLE {
                    return fail("the rows are too many for a table\n  help: add `-o csv` or `-o json`, or a LIMIT");
                }
                self.rows.push(row);
                Ok(String::new())
            }
        }
    }

    fn complete(&mut self, tag: String) -> String {
        let (columns, rows) = (std::mem::take(&mut self.columns), std::mem::take(&mut self.rows));
        match self.format {
            None => {
                let types = columns.iter().map(|column| column.type_id).collect();
                let columns = columns.into_iter().map(|column| column.name).collect();
                self.statements.push(StatementResult { tag, columns, types, rows });
                String::new()
            }
            Some(RowFormat::Table) if columns.is_empty() && !tag.starts_with("SELECT") => format!("{tag}\n"),
            Some(RowFormat::Table) => {
                self.kept = 0;
                table(&columns, &rows)
            }
            Some(_) => String::new(),
        }
    }
}

/// Returns the text of an error, and its help.
pub(super) fn error_text(node: &str, error: &Report, writes: bool) -> String {
    let mut text = format!("{node}: {}: {} ({})", error.severity, error.message, error.code);
    if let Some(position) = error.position {
        let _ = write!(text, ", at character {position}");
    }
    if let Some(detail) = &error.detail {
        let _ = write!(text, "; {detail}");
    }
    let text = one_line(&text);
    let help = match error.code.as_str() {
        // A read-only transaction, and a missing right.
        "25006" | "42501" if !writes => {
            Some("add `--write` to run it with the rights of Odoo's database user".to_owned())
        }
        "55P03" => Some("another session has the lock; begin with `SET lock_timeout = 0;` to wait for it".to_owned()),
        "57014" => Some("`--seconds` sets the time limit".to_owned()),
        _ => error.hint.as_ref().map(|hint| one_line(hint)),
    };
    help.map_or_else(|| text.clone(), |help| format!("{text}\n  help: {help}"))
}

/// Returns a field of CSV.
fn csv_field(value: Option<&str>) -> String {
    match value {
        None => String::new(),
        Some(text) if text.is_empty() || text.contains([',', '"', '\n', '\r']) => {
            format!("\"{}\"", text.replace('"', "\"\""))
        }
        Some(text) => text.to_owned(),
    }
}

/// Returns a row as a line of JSON, with the columns in their order.
fn json_object(columns: &[Column], row: &[Option<String>]) -> String {
    let string = |text: &str| serde_json::Value::from(text).to_string();
    let value = |column: &Column, value: &Option<String>| {
        value
            .as_ref()
            .map_or("null".to_owned(), |text| json_value(column.type_id, text).unwrap_or_else(|| string(text)))
    };
    let fields = columns.iter().zip(row).map(|(column, of)| format!("{}:{}", string(&column.name), value(column, of)));
    format!("{{{}}}\n", fields.collect::<Vec<_>>().join(","))
}

/// Returns a value as JSON, if its type is a number, a truth value, or JSON.
fn json_value(type_id: u32, text: &str) -> Option<String> {
    match type_id {
        // bool
        16 => Some(if text == "t" { "true" } else { "false" }.to_owned()),
        // int8, int2, int4, oid, float4, float8, numeric: `NaN` and `Infinity` are no JSON.
        20 | 21 | 23 | 26 | 700 | 701 | 1700 => {
            serde_json::from_str::<serde_json::Number>(text).ok().map(|_| text.to_owned())
        }
        // json, jsonb: on one line.
        114 | 3802 => serde_json::from_str::<serde_json::Value>(text).ok().map(|value| value.to_string()),
        _ => None,
    }
}

fn is_number(column: &Column) -> bool {
    matches!(column.type_id, 20 | 21 | 23 | 26 | 700 | 701 | 790 | 1700)
}

/// Returns a table as psql prints it. Each value has one line.
fn table(columns: &[Column], rows: &[Vec<Option<String>>]) -> String {
    let names: Vec<String> = columns.iter().map(|column| one_line(&column.name)).collect();
    let cell = |value: &Option<String>| value.as_deref().map(one_line).unwrap_or_default();
    let cells: Vec<Vec<String>> = rows.iter().map(|row| row.iter().map(cell).collect()).collect();
    let width = |at: usize| cells.iter().map(|row| row[at].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = names.iter().enumerate().map(|(at, name)| name.chars().count().max(width(at))).collect();
    let mut table = String::new();
    let mut line = |cells: Vec<String>| {
        let _ = writeln!(table, " {}", cells.join(" | ").trim_end());
    };
    line(names.iter().zip(&widths).map(|(name, width)| format!("{name:^width$}")).collect());
    let rule: Vec<String> = widths.iter().map(|width| "-".repeat(width + 2)).collect();
    let aligned = |(at, text): (usize, &String)| {
        let width = widths[at];
        if is_number(&columns[at]) { format!("{text:>width$}") } else { format!("{text:<width$}") }
    };
    let body: Vec<Vec<String>> = cells.iter().map(|row| row.iter().enumerate().map(aligned).collect()).collect();
    body.into_iter().for_each(&mut line);
    let rule = format!("{}\n", rule.join("+"));
    table.insert_str(table.find('\n').map_or(0, |end| end + 1), &rule);
    let _ = writeln!(table, "({} row{})", rows.len(), if rows.len() == 1 { "" } else { "s" });
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u8, body: &[u8]) -> Message {
        Message { kind, body: body.to_vec() }
    }

    /// Returns the messages of a query with two columns, a number and a text.
    fn answer(rows: &[(&str, Option<&str>)]) -> Vec<Message> {
        let column = |name: &str, type_id: u32| [name.as_bytes(), &[0; 7], &type_id.to_be_bytes(), &[0; 8]].concat();
        let head = [&[0, 2][..], &column("id", 23), &column("na\u{1b}me", 25)].concat();
        let value = |text: Option<&str>| match text {
            Some(text) => [&u32::try_from(text.len()).unwrap().to_be_bytes(), text.as_bytes()].concat(),
            None => vec![255; 4],
        };
        let row = |(id, name): &(&str, Option<&str>)| {
            message(kind::ROW, &[&[0, 2][..], &value(Some(id)), &value(*name)].concat())
        };
        let complete = message(kind::COMPLETE, format!("SELECT {}\0", rows.len()).as_bytes());
        [message(kind::COLUMNS, &head)].into_iter().chain(rows.iter().map(row)).chain([complete]).collect()
    }

    fn printed(format: RowFormat, is_terminal: bool, messages: &[Message]) -> String {
        let mut rows = Rows::new(Some(format), is_terminal);
        messages.iter().map(|message| rows.take(message).unwrap()).collect()
    }

    #[test]
    fn rows_have_the_format_that_was_asked_for() {
        let all = answer(&[("7", Some("a,\"b\"\nc")), ("10", None), ("11", Some(""))]);
        let csv = "id,na\u{1b}me\n7,\"a,\"\"b\"\"\nc\"\n10,\n11,\"\"\n";
        assert_eq!(printed(RowFormat::Csv, false, &all), csv);
        assert_eq!(printed(RowFormat::Csv, true, &all), csv.replace('\u{1b}', "\u{fffd}"));
        let json = "{\"id\":7,\"na\\u001bme\":\"a,\\\"b\\\"\\nc\"}\n{\"id\":10,\"na\\u001bme\":null}\n\
                    {\"id\":11,\"na\\u001bme\":\"\"}\n";
        assert_eq!(printed(RowFormat::Json, false, &all), json);
        let table = " id |  na\u{fffd}me\n----+---------\n  7 | a,\"b\" c\n 10 |\n 11 |\n(3 rows)\n";
        assert_eq!(printed(RowFormat::Table, false, &all), table);
    }

    #[test]
    fn a_table_shows_tags_of_statements_without_rows_and_separates_results() {
        let one = answer(&[("1", Some("x"))]);
        let all = [vec![message(kind::COMPLETE, b"CREATE TABLE\0")], one.clone(), one].concat();
        let table = " id | na\u{fffd}me\n----+-------\n  1 | x\n(1 row)\n";
        assert_eq!(printed(RowFormat::Table, false, &all), format!("CREATE TABLE\n{table}\n{table}"));
    }

    #[test]
    fn the_result_of_json_keeps_every_value() {
        let mut rows = Rows::new(None, false);
        for message in answer(&[("7", None)]) {
            assert_eq!(rows.take(&message).unwrap(), "");
        }
        let statement = &rows.statements[0];
        assert_eq!((statement.tag.as_str(), &statement.types[..]), ("SELECT 1", &[23, 25][..]));
        assert_eq!(statement.rows, [[Some("7".to_owned()), None]]);
        assert!(rows.take(&message(kind::ROW, &[0, 1, 255, 255, 255, 255])).is_err(), "a row without its columns");
    }

    #[test]
    fn values_keep_their_type_in_json() {
        for (type_id, text, expected) in [
            (16, "t", Some("true")),
            (20, "-7", Some("-7")),
            (1700, "1.50", Some("1.50")),
            (1700, "NaN", None),
            (701, "Infinity", None),
            (3802, "{\"a\": [1,\n2]}", Some("{\"a\":[1,2]}")),
            (25, "7", None),
        ] {
            assert_eq!(json_value(type_id, text).as_deref(), expected, "{text}");
        }
    }

    #[test]
    fn an_error_has_its_fix() {
        let body = b"VERROR\0C25006\0Mcannot execute\n\x1b[2J\0P3\0Dmore\0Hhint\0\0";
        let error = report(body);
        let text = error_text("db-1", &error, false);
        assert!(text.starts_with(
            "db-1: ERROR: cannot execute \u{fffd}[2J (25006), at character 3; more\n  help: add `--write`"
        ));
        assert!(error_text("db-1", &error, true).ends_with("\n  help: hint"));
    }
}
