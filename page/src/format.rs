//! Values as texts for people.

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Longest text of a node that the page shows, in characters.
const LONGEST: usize = 400;

/// Returns a text of a node without characters that change the display of others, and not longer than 400 characters.
pub(crate) fn plain(text: &str) -> String {
    let hides = |c: char| {
        c.is_control() && c != '\n'
            || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    let mut shown: String = text.chars().take(LONGEST).map(|c| if hides(c) { '\u{fffd}' } else { c }).collect();
    if text.chars().nth(LONGEST).is_some() {
        shown.push('…');
    }
    shown
}

/// Unit of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    /// Bytes.
    Bytes,
    /// Bytes each second.
    BytesPerSecond,
    /// Seconds.
    Seconds,
    /// Share of a whole, 0 to 1.
    Share,
    /// Events each second.
    PerSecond,
    /// A number without a unit.
    Number,
}

impl Unit {
    /// Returns a value with its unit.
    pub(crate) fn text(self, value: f64) -> String {
        if !value.is_finite() {
            return "–".to_owned();
        }
        match self {
            Self::Bytes => decimal(value, &["B", "kB", "MB", "GB", "TB"]),
            Self::BytesPerSecond => format!("{}/s", decimal(value, &["B", "kB", "MB", "GB", "TB"])),
            Self::Seconds if value < 1.0 => format!("{} ms", short(value * 1000.0)),
            Self::Seconds if value < 120.0 => format!("{} s", short(value)),
            Self::Seconds => duration(value),
            Self::Share => format!("{} %", short(value * 100.0)),
            Self::PerSecond => format!("{}/s", short(value)),
            Self::Number => short(value),
        }
    }
}

fn decimal(mut value: f64, units: &[&str]) -> String {
    let mut units = units.iter();
    let mut unit = units.next().unwrap_or(&"");
    while value.abs() >= 1000.0 {
        let Some(next) = units.next() else { break };
        value /= 1000.0;
        unit = next;
    }
    format!("{} {unit}", short(value))
}

/// Returns a number with up to three digits.
fn short(value: f64) -> String {
    let digits = match value.abs() {
        v if v >= 99.95 => 0,
        v if v >= 9.995 => 1,
        0.0 => 0,
        _ => 2,
    };
    let text = format!("{value:.digits$}");
    let text = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    if text == "-0" { "0".to_owned() } else { text.to_owned() }
}

/// Returns a value as a whole number, rounded down; 0 if it is negative or no number.
pub(crate) fn whole(value: f64) -> usize {
    #[expect(clippy::cast_sign_loss, reason = "a negative value is 0")]
    let whole = value.max(0.0) as usize;
    whole
}

/// Returns a duration with its two largest units, such as `3 d 4 h`.
pub(crate) fn duration(seconds: f64) -> String {
    let seconds = if seconds.is_finite() { whole(seconds) } else { 0 };
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{minutes} min"),
        3600..86400 if minutes % 60 == 0 => format!("{hours} h"),
        3600..86400 => format!("{hours} h {} min", minutes % 60),
        _ if hours % 24 == 0 => format!("{days} d"),
        _ => format!("{days} d {} h", hours % 24),
    }
}

/// Returns a duration with its largest unit, rounded down.
pub(crate) fn rough(seconds: f64) -> String {
    let text = duration(seconds);
    text.split(' ').take(2).collect::<Vec<_>>().join(" ")
}

/// Returns a Unix time in RFC 3339, UTC; empty if the time has no such form.
pub(crate) fn rfc3339(at: f64) -> String {
    let time = OffsetDateTime::from_unix_timestamp(at as i64).ok();
    time.and_then(|time| time.format(&Rfc3339).ok()).unwrap_or_default()
}

/// Returns the Unix time of a text in RFC 3339.
pub(crate) fn parse_rfc3339(text: &str) -> Option<f64> {
    OffsetDateTime::parse(text, &Rfc3339).ok().map(|time| time.unix_timestamp() as f64)
}

/// Returns a Unix time as date and time of day, UTC, without seconds.
pub(crate) fn minute(at: f64) -> String {
    rfc3339(at).get(..16).map(|text| text.replace('T', " ")).unwrap_or_default()
}

/// Returns the label of a time on the axis of a graph with this length in seconds.
pub(crate) fn axis_time(at: f64, length: f64) -> String {
    let text = rfc3339(at);
    let part = if length > 3.0 * 86400.0 { text.get(5..10) } else { text.get(11..16) };
    part.unwrap_or_default().to_owned()
}

/// Returns the Unix time at which the month of a time began.
pub(crate) fn month_start(at: f64) -> f64 {
    let text = rfc3339(at);
    let first = text.get(..7).map(|month| format!("{month}-01T00:00:00Z"));
    first.and_then(|text| parse_rfc3339(&text)).unwrap_or(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_have_three_digits_and_decimal_units() {
        for (unit, value, text) in [
            (Unit::Bytes, 0.0, "0 B"),
            (Unit::Bytes, 999.4, "999 B"),
            (Unit::Bytes, 1_234.0, "1.23 kB"),
            (Unit::Bytes, 45_600_000.0, "45.6 MB"),
            (Unit::Bytes, 5e15, "5000 TB"),
            (Unit::BytesPerSecond, 1e6, "1 MB/s"),
            (Unit::Seconds, 0.012_34, "12.3 ms"),
            (Unit::Seconds, 4.2, "4.2 s"),
            (Unit::Seconds, 4000.0, "1 h 6 min"),
            (Unit::Share, 0.999_87, "100 %"),
            (Unit::Share, 0.051, "5.1 %"),
            (Unit::PerSecond, 12.0, "12/s"),
            (Unit::Number, -0.001, "0"),
            (Unit::Number, f64::NAN, "–"),
        ] {
            assert_eq!(unit.text(value), text, "{unit:?} {value}");
        }
        assert_eq!(
            [59.0, 60.0, 7200.0, 90_000.0, 864_000.0].map(duration),
            ["59 s", "1 min", "2 h", "1 d 1 h", "10 d"]
        );
        assert_eq!((duration(f64::NAN), rough(90_061.0)), ("0 s".to_owned(), "1 d".to_owned()));
    }

    #[test]
    fn times_are_utc() {
        assert_eq!(rfc3339(1_796_000_000.0), "2026-11-30T00:53:20Z");
        assert_eq!(minute(1_796_000_000.0), "2026-11-30 00:53");
        assert_eq!(parse_rfc3339("2026-11-30T00:53:20.5Z"), Some(1_796_000_000.0));
        assert_eq!(parse_rfc3339("yesterday"), None);
        assert_eq!(rfc3339(month_start(1_796_000_000.0)), "2026-11-01T00:00:00Z");
        assert_eq!(
            (axis_time(1_796_000_000.0, 3600.0), axis_time(1_796_000_000.0, 1e6)),
            ("00:53".into(), "11-30".into())
        );
        assert_eq!(rfc3339(f64::INFINITY), "");
    }

    #[test]
    fn texts_of_nodes_are_short_and_cannot_reorder_others() {
        assert_eq!(plain("a\u{1b}[2J\u{202e}b"), "a\u{fffd}[2J\u{fffd}b");
        assert_eq!(plain(&"x".repeat(500)).chars().count(), 401);
    }
}
