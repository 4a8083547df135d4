//! Layout of the page: text on the left, and the same text as a QR code on the right.

use std::fmt::Write as _;

use qrcode::{Color, EcLevel, QrCode};

/// Lines of the smallest screen. A page never has more.
const ROWS: usize = 25;
/// Columns of the smallest screen, and of the widest page.
const COLUMNS: (usize, usize) = (80, 132);
/// Columns of a page on a serial console.
const SERIAL: usize = 100;
/// Fewest columns of text beside a QR code.
const NARROWEST: usize = 30;
/// Bytes that a QR code of version 6 holds at the level L. With its border, that code has 23 lines of half blocks.
const QR_BYTES: usize = 134;
/// Light modules around the code. The standard asks for 4, and readers accept 2.
const BORDER: usize = 2;

/// Content of a page. All texts are plain.
pub(super) struct Page {
    pub(super) title: String,
    /// What the node waits for.
    pub(super) why: String,
    pub(super) minutes: u64,
    pub(super) addresses: Vec<String>,
    /// Entries of the journal, the newest last.
    pub(super) entries: Vec<String>,
}

/// Replaces the characters that a screen's font may not have, and control characters.
pub(super) fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_ascii_graphic() || c == ' ' { c } else { '?' }).collect()
}

impl Page {
    /// Returns the page for a screen with this number of columns and rows; 0 if it is not known.
    pub(super) fn for_screen(&self, (columns, rows): (u16, u16)) -> String {
        let given = |n: u16, least: usize| if n == 0 { least } else { usize::from(n) };
        let columns = given(columns, COLUMNS.0).min(COLUMNS.1);
        let rows = given(rows, ROWS).min(ROWS);
        let code = self.code().filter(|code| {
            code.len() <= rows && code.first().is_some_and(|line| line.chars().count() + 1 + NARROWEST <= columns)
        });
        let code = code.unwrap_or_default();
        let beside = code.first().map_or(0, |line| line.chars().count() + 1);
        let text = self.lines(columns - beside, rows);
        let mut page = "\x1b[H\x1b[J".to_owned();
        for row in 0..text.len().max(code.len()) {
            // A line break after the last row would scroll the screen.
            let line_break = if row == 0 { "" } else { "\r\n" };
            let left = text.get(row).map_or("", String::as_str);
            let _ = match code.get(row) {
                // Bright white on black, because light modules are drawn.
                Some(code) => {
                    write!(page, "{line_break}{left:width$} \x1b[97;40m{code}\x1b[0m", width = columns - beside)
                }
                None => write!(page, "{line_break}{left}"),
            };
        }
        page
    }

    /// Returns the page for a serial console: the text, and the QR code below it. It has no escape sequences, because a
    /// log may follow it. No line begins as the agent's messages do, because programs read those.
    pub(super) fn for_serial(&self) -> String {
        let code = self.code().unwrap_or_default();
        let lines = self.lines(SERIAL, ROWS);
        lines.iter().chain(&code).fold("\r\n".to_owned(), |page, line| page + line + "\r\n")
    }

    /// Returns the text in lines of at most `width` characters. If there is too much, old entries of the journal are
    /// left out.
    fn lines(&self, width: usize, rows: usize) -> Vec<String> {
        let mut lines = wrapped(&self.title, width);
        lines.extend(wrapped(&format!("Waiting for {} min: {}", self.minutes, self.why), width));
        lines.push(String::new());
        lines.extend(self.addresses.iter().flat_map(|line| wrapped(line, width)));
        lines.truncate(rows);
        let mut newest: Vec<Vec<String>> = Vec::new();
        // An empty line and the heading.
        let mut left = rows.saturating_sub(lines.len() + 2);
        for entry in self.entries.iter().rev() {
            let entry = wrapped(entry, width);
            let Some(rest) = left.checked_sub(entry.len()) else { break };
            left = rest;
            newest.push(entry);
        }
        if !newest.is_empty() {
            lines.extend([String::new(), "Last warnings:".to_owned()]);
            lines.extend(newest.into_iter().rev().flatten());
        }
        lines
    }

    /// Returns the QR code as lines of half blocks: name, addresses, reason, and as much of the last warning as fits.
    fn code(&self) -> Option<Vec<String>> {
        let last = self.entries.last().map_or("", String::as_str);
        let mut text = format!("{}\n{}\n{}\n{last}", self.title, self.addresses.join("\n"), self.why);
        // The text is ASCII.
        text.truncate(QR_BYTES);
        let code = QrCode::with_error_correction_level(text.trim_end(), EcLevel::L).ok()?;
        let (width, modules) = (code.width(), code.to_colors());
        let light = |x: usize, y: usize| {
            let inner = |n: usize| n.checked_sub(BORDER).filter(|n| *n < width);
            inner(x).zip(inner(y)).is_none_or(|(x, y)| modules[y * width + x] == Color::Light)
        };
        let size = width + 2 * BORDER;
        let half = |x: usize, y: usize| match (light(x, y), light(x, y + 1)) {
            (true, true) => '█',
            (true, false) => '▀',
            (false, true) => '▄',
            (false, false) => ' ',
        };
        Some((0..size).step_by(2).map(|y| (0..size).map(|x| half(x, y)).collect()).collect())
    }
}

/// Breaks a text into lines of at most `width` characters, after a space if possible.
fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines = Vec::new();
    let mut rest = text.trim_end();
    while rest.len() > width {
        let end = rest[..=width].rfind(' ').filter(|end| *end > 0);
        let (line, next) = rest.split_at(end.unwrap_or(width));
        lines.push(line.to_owned());
        rest = next.trim_start();
    }
    lines.push(rest.to_owned());
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(entries: usize) -> Page {
        Page {
            title: "app-2 of acme".to_owned(),
            why: "hub-1 does not answer: connection timed out; hub-2: no such host is known".to_owned(),
            minutes: 12,
            addresses: vec!["enp1s0 192.0.2.17 2001:db8::17".to_owned(), "enp2s0 has no link".to_owned()],
            entries: (1..=entries)
                .map(|n| format!("kernel: fault {n} with a text that is long {}", "x".repeat(60)))
                .collect(),
        }
    }

    /// Returns the rows of a page as a terminal shows them.
    fn rows(page: &str) -> Vec<String> {
        let page = page.strip_prefix("\x1b[H\x1b[J").unwrap();
        page.split("\r\n").map(|row| row.replace("\x1b[97;40m", "").replace("\x1b[0m", "")).collect()
    }

    #[test]
    fn page_fits_the_screen() {
        for size in [(80, 25), (0, 0), (128, 48), (240, 67), (80, 24), (100, 30), (40, 10), (64, 20)] {
            for entries in [0, 1, 12] {
                let page = page(entries).for_screen(size);
                let (columns, rows_of) = (if size.0 == 0 { 80 } else { size.0 }, if size.1 == 0 { 25 } else { size.1 });
                let rows = rows(&page);
                assert!(rows.len() <= usize::from(rows_of).min(25), "{size:?}: {}", rows.len());
                let widest = rows.iter().map(|row| row.chars().count()).max().unwrap();
                assert!(widest <= usize::from(columns), "{size:?}: {widest}");
                assert!(rows[0].starts_with("app-2 of acme"), "{rows:?}");
            }
        }
    }

    #[test]
    fn newest_entry_is_shown_and_oldest_is_left_out() {
        let text = rows(&page(12).for_screen((80, 25))).join("\n");
        assert!(text.contains("fault 12") && !text.contains("fault 1 "), "{text}");
        let serial = page(12).for_serial();
        let (code, text): (Vec<&str>, Vec<&str>) = serial.lines().partition(|line| line.starts_with('█'));
        assert!(text.len() <= ROWS + 1 && serial.contains("fault 12"), "{serial}");
        assert_eq!(code, page(12).code().unwrap());
        assert!(!serial.contains('\x1b'), "{serial}");
    }

    #[test]
    fn small_screen_has_text_only() {
        let text = page(3).for_screen((60, 25));
        assert!(!text.contains('█') && text.contains("12 min"), "{text}");
    }

    /// Reads the modules back from the blocks, and compares them with those of the code.
    #[test]
    fn code_has_the_modules_of_its_text() {
        let page = page(12);
        let lines = page.code().unwrap();
        let expected = format!("{}\n{}\n{}\n{}", page.title, page.addresses.join("\n"), page.why, page.entries[11]);
        let code = QrCode::with_error_correction_level(expected[..QR_BYTES].trim_end(), EcLevel::L).unwrap();
        assert_eq!(lines.len(), (code.width() + 2 * BORDER).div_ceil(2));
        for (y, row) in code.to_colors().chunks(code.width()).enumerate() {
            for (x, color) in row.iter().enumerate() {
                let (x, y) = (x + BORDER, y + BORDER);
                let block = lines[y / 2].chars().nth(x).unwrap();
                let is_light = if y % 2 == 0 { "█▀".contains(block) } else { "█▄".contains(block) };
                assert_eq!(is_light, *color == Color::Light, "{x} {y}");
            }
        }
        assert!(lines[0].chars().all(|c| c == '█'), "{}", lines[0]);
    }

    #[test]
    fn lines_break_at_spaces() {
        assert_eq!(wrapped("one two three", 7), ["one two", "three"]);
        assert_eq!(wrapped("onetwothree", 4), ["onet", "woth", "ree"]);
        assert_eq!(wrapped("", 4), [""]);
    }

    #[test]
    fn other_characters_are_replaced() {
        assert_eq!(plain("a\x1b[2J\nü"), "a?[2J??");
    }
}
