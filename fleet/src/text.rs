//! Texts of other machines, before a terminal, a console or a page gets them.

/// Returns a text without characters that control a terminal or change the order of a line's characters. U+FFFD
/// replaces each of them. Line breaks and tabs stay.
///
/// ```
/// assert_eq!(fleet::printable("one\u{1b}]52;c;AAAA\u{7}\ntwo"), "one\u{fffd}]52;c;AAAA\u{fffd}\ntwo");
/// ```
#[must_use]
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if is_unsafe(c) && !matches!(c, '\n' | '\t') { '\u{fffd}' } else { c }).collect()
}

/// Returns a text as [`printable`] does, on one line: a space replaces each line break and tab. White space at the end
/// is left out.
///
/// ```
/// assert_eq!(fleet::one_line("not ready\ndb-2 ready\n"), "not ready db-2 ready");
/// ```
#[must_use]
pub fn one_line(text: &str) -> String {
    let replaced = |c| match c {
        '\n' | '\t' => ' ',
        c if is_unsafe(c) => '\u{fffd}',
        c => c,
    };
    text.trim_end().chars().map(replaced).collect()
}

/// Whether a character controls a terminal (C0, DEL, C1), ends a line in another way, or reorders the line's characters
/// ([UAX #9](https://www.unicode.org/reports/tr9/)).
#[must_use]
pub fn is_unsafe(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_character_moves_the_cursor_or_reorders_a_line() {
        let text = "a\r\u{8}\u{9b}2J\u{7f}\u{202e}b\u{2066}c\u{2028}d\u{200f}\u{61c}";
        let r = '\u{fffd}';
        assert_eq!(printable(text), format!("a{r}{r}{r}2J{r}{r}b{r}c{r}d{r}{r}"));
        assert_eq!(one_line("x\n\ty \u{1b}[2J\n\n"), "x  y \u{fffd}[2J");
        assert_eq!(printable("Größe: 5 µm\tübrig – 日本\n"), "Größe: 5 µm\tübrig – 日本\n");
    }
}
