//! Tables of outcomes: a row per run, and minimum, median and maximum of scenarios that ran more than once.

use std::fmt::Write as _;

use super::outcome::Outcome;

pub(super) const HEAD: [&str; 11] = [
    "scenario",
    "victim",
    "VIP s",
    "writes s",
    "HTTP s",
    "errors",
    "lost",
    "logouts",
    "primaries",
    "alert s",
    "promise",
];

/// Returns the outcomes as a Markdown table with aligned columns.
#[must_use]
pub(crate) fn table(outcomes: &[Outcome]) -> String {
    let rows: Vec<TableRow> = outcomes.iter().map(row).collect();
    with_summary(lay_out(&HEAD, &rows), &rows)
}

/// Row of a run, with the columns of [`HEAD`].
pub(super) type TableRow = [String; 11];

/// Returns the row of an outcome.
pub(super) fn row(o: &Outcome) -> TableRow {
    // A cell of a Markdown table must not contain newlines or bars.
    let broken = || o.broken.join("; ").replace('\n', " ").replace('|', "/");
    let kept = if o.broken.is_empty() { "kept".to_owned() } else { format!("BROKEN: {}", broken()) };
    let victims = if o.victims.len() > 2 { format!("{} machines", o.victims.len()) } else { o.victims.join(", ") };
    [
        o.scenario.to_owned(),
        victims,
        seconds(o.vip),
        seconds(o.writes),
        seconds(o.http),
        format!("{}/{}", o.errors, o.errors + o.pages),
        format!("{}/{}", o.lost, o.acknowledged),
        o.logouts.to_string(),
        o.primaries.to_string(),
        seconds(o.alert),
        kept,
    ]
}

/// Appends minimum, median and maximum of scenarios that ran more than once.
pub(super) fn with_summary(mut text: String, rows: &[TableRow]) -> String {
    let mut names: Vec<&str> = rows.iter().map(|r| r[0].as_str()).collect();
    names.dedup();
    let repeated = |name: &&str| rows.iter().filter(|r| r[0] == **name).count() > 1;
    let summary: Vec<[String; 5]> = names.into_iter().filter(repeated).map(|name| summary(name, rows)).collect();
    if !summary.is_empty() {
        text += "\n";
        text += &lay_out(&["scenario", "runs", "VIP s", "writes s", "HTTP s"], &summary);
    }
    text
}

fn summary(name: &str, rows: &[TableRow]) -> [String; 5] {
    let runs: Vec<&TableRow> = rows.iter().filter(|r| r[0] == name).collect();
    let spread = |column: usize| {
        let mut all: Vec<f64> = runs.iter().filter_map(|r| r[column].parse().ok()).collect();
        all.sort_unstable_by(f64::total_cmp);
        match all[..] {
            [] => "-".to_owned(),
            _ => format!("{:.1} / {:.1} / {:.1}", all[0], all[all.len() / 2], all[all.len() - 1]),
        }
    };
    [name.to_owned(), runs.len().to_string(), spread(2), spread(3), spread(4)]
}

/// Returns a Markdown table with aligned columns.
pub(super) fn lay_out<const N: usize>(head: &[&str; N], rows: &[[String; N]]) -> String {
    let head = head.map(str::to_owned);
    let rows: Vec<&[String; N]> = std::iter::once(&head).chain(rows).collect();
    let widths: [usize; N] = std::array::from_fn(|i| rows.iter().map(|r| r[i].chars().count()).max().unwrap_or(0));
    let mut text = String::new();
    for (n, row) in rows.into_iter().enumerate() {
        for (cell, width) in row.iter().zip(widths) {
            let _ = write!(text, "| {cell:<width$} ");
        }
        text += "|\n";
        if n == 0 {
            for width in widths {
                let _ = write!(text, "|{:-<1$}", "", width + 2);
            }
            text += "|\n";
        }
    }
    text
}

fn seconds(of: Option<f64>) -> String {
    of.map_or_else(|| "-".to_owned(), |s| format!("{s:.1}"))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(crate) fn outcome(scenario: &'static str, vip: f64, broken: &[&str]) -> Outcome {
        Outcome {
            scenario,
            victims: vec!["hub-1".into()],
            vip: Some(vip),
            writes: None,
            http: None,
            acknowledged: 10,
            lost: 0,
            errors: 0,
            pages: 0,
            logouts: 0,
            primaries: 1,
            alert: None,
            whole: 9.0,
            broken: broken.iter().map(|b| (*b).to_owned()).collect(),
        }
    }

    #[test]
    fn table_has_a_row_per_run_and_a_summary_of_repeated_scenarios() {
        let text = table(&[outcome("hub", 1.0, &[]), outcome("hub", 3.0, &["VIP: 3.0 s"]), outcome("db", 2.0, &[])]);
        assert!(text.contains("| hub      | hub-1  | 1.0   | -        |"), "{text}");
        assert!(text.contains("BROKEN: VIP: 3.0 s"), "{text}");
        assert!(text.contains("| hub      | 2    | 1.0 / 3.0 / 3.0 |"), "{text}");
        assert_eq!(text.matches("| db ").count(), 1);
    }
}
