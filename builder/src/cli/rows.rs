//! Tables of the commands that look at one node.

use std::fmt;

use crate::util::terminal::visible;

/// Writes a section: its title, and its rows with aligned columns. Writes nothing without rows.
pub(super) fn section(f: &mut fmt::Formatter<'_>, title: &str, rows: &[Vec<String>]) -> fmt::Result {
    if rows.is_empty() {
        return Ok(());
    }
    writeln!(f, "{title}")?;
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    for row in rows {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        writeln!(f, "{}", visible(format!("  {}", cells.join("  ")).trim_end()))?;
    }
    Ok(())
}

/// Writes what a node could not read.
pub(super) fn missing(f: &mut fmt::Formatter<'_>, missing: &[String]) -> fmt::Result {
    section(f, "Could not be read", &missing.iter().map(|text| vec![text.clone()]).collect::<Vec<_>>())
}

/// Returns a size with a decimal unit: `812 B`, `9.4 kB`, `1.2 GB`.
pub(super) fn size(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "kB", "MB", "GB"] {
        // 999.95 would be printed as 1000.0.
        if value < 999.95 {
            return if unit == "B" { format!("{bytes} B") } else { format!("{value:.1} {unit}") };
        }
        value /= 1000.0;
    }
    format!("{value:.1} TB")
}

/// Returns a duration with its largest unit: `45 s`, `12 min`, `5 h`, `3 d`.
pub(super) fn duration(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// Returns a part in percent, rounded up: `34 %`; `-` if the whole is 0.
pub(super) fn percent(part: u64, whole: u64) -> String {
    if whole == 0 { "-".to_owned() } else { format!("{} %", part.saturating_mul(100).div_ceil(whole)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Sections(Vec<Vec<String>>);

    impl fmt::Display for Sections {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            section(f, "Title", &self.0)
        }
    }

    #[test]
    fn columns_are_aligned_and_cannot_control_the_terminal() {
        let row = |cells: &[&str]| cells.iter().map(|cell| (*cell).to_owned()).collect::<Vec<_>>();
        let rows = vec![row(&["a", "b\u{1b}[2J", "c"]), row(&["long", "", ""])];
        assert_eq!(Sections(rows).to_string(), "Title\n  a     b\u{fffd}[2J  c\n  long\n");
        assert_eq!(Sections(Vec::new()).to_string(), "");
    }

    #[test]
    fn sizes_have_decimal_units() {
        let shown = [0, 999, 1000, 999_949, 999_950, 1_234_567_890, 5_000_000_000_000].map(size);
        assert_eq!(shown, ["0 B", "999 B", "1.0 kB", "999.9 kB", "1.0 MB", "1.2 GB", "5.0 TB"]);
        assert_eq!([percent(1, 3), percent(0, 5), percent(1, 0)], ["34 %", "0 %", "-"]);
        assert_eq!([119, 120, 7200, 172_800].map(duration), ["119 s", "2 min", "2 h", "2 d"]);
    }
}
