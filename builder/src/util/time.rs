//! Formats and parses times.

use time::OffsetDateTime;
use time::format_description::well_known::{Rfc2822, Rfc3339};

/// 9999-12-31T23:59:59Z. RFC 3339 has no later time.
const LAST: u64 = 253_402_300_799;

/// Formats seconds since 1970 as `2025-01-31T12:00:00Z` ([RFC 3339](https://www.rfc-editor.org/rfc/rfc3339)). A time
/// after the year 9999 becomes that year's last second.
pub(crate) fn rfc3339(seconds: u64) -> String {
    let time = OffsetDateTime::from_unix_timestamp(seconds.min(LAST).cast_signed()).expect("at most the year 9999");
    time.format(&Rfc3339).expect("a year of four digits, in UTC")
}

/// Parses `Sat, 15 Nov 2025 10:15:00 UTC`, the date of an archive's Release file
/// ([RFC 2822](https://www.rfc-editor.org/rfc/rfc2822)). Returns seconds since 1970.
pub(crate) fn rfc2822(text: &str) -> Option<u64> {
    // RFC 2822 has `GMT` and `UT`, but no `UTC`.
    let text = text.strip_suffix("UTC").map_or_else(|| text.to_owned(), |date| format!("{date}GMT"));
    let time = OffsetDateTime::parse(&text, &Rfc2822).ok()?;
    u64::try_from(time.unix_timestamp()).ok()
}

/// Parses an age (`30s`, `10min`, `2h`, `3d`) before `now`, or a time in UTC (`2026-12-01`, `2026-12-01 08:30`, RFC
/// 3339). Returns seconds since 1970.
pub(crate) fn since(text: &str, now: u64) -> Option<u64> {
    let text = text.trim();
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let seconds = match unit.trim() {
        "s" | "sec" => 1,
        "m" | "min" => 60,
        "h" | "hour" | "hours" => 3600,
        "d" | "day" | "days" => 86_400,
        _ => 0,
    };
    if seconds > 0 {
        return Some(now.saturating_sub(number.parse::<u64>().ok()?.saturating_mul(seconds)));
    }
    let rest = match text.len() {
        10 => "T00:00:00Z",
        16 => ":00Z",
        19 => "Z",
        _ => "",
    };
    let time = OffsetDateTime::parse(&(text.replacen(' ', "T", 1) + rest), &Rfc3339).ok()?;
    u64::try_from(time.unix_timestamp()).ok()
}

/// Formats microseconds since 1970 as `2025-01-31T12:00:00.123Z`.
pub(crate) fn rfc3339_millis(micros: u64) -> String {
    let seconds = rfc3339(micros / 1_000_000);
    format!("{}.{:03}Z", seconds.trim_end_matches('Z'), micros / 1000 % 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_times() {
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00Z");
        assert_eq!(rfc3339(1_709_251_199), "2024-02-29T23:59:59Z");
        assert_eq!(rfc3339(1_757_153_702), "2025-09-06T10:15:02Z");
        assert_eq!(rfc3339(LAST), "9999-12-31T23:59:59Z");
        assert_eq!(rfc3339(u64::MAX), rfc3339(LAST));
    }

    #[test]
    fn parses_release_dates() {
        assert_eq!(rfc2822("Thu, 01 Jan 1970 00:00:00 UTC"), Some(0));
        assert_eq!(rfc2822("Sat, 06 Sep 2025 10:15:02 UTC"), Some(1_757_153_702));
        assert_eq!(rfc2822("Sat,  6 Sep 2025 12:15:02 +0200"), Some(1_757_153_702));
        assert_eq!(rfc2822("Thu, 29 Feb 2024 23:59:59 UTC"), Some(1_709_251_199));
        for text in ["nonsense", "Wed, 31 Dec 1969 23:59:59 UTC", "Sun, 31 Feb 2025 00:00:00 UTC", ""] {
            assert_eq!(rfc2822(text), None, "{text}");
        }
    }

    #[test]
    fn since_is_an_age_or_a_time() {
        for (text, seconds) in [
            ("30s", 999_970),
            ("10min", 999_400),
            ("2 h", 992_800),
            ("3d", 740_800),
            ("99999999999d", 0),
            ("1970-01-02", 86_400),
            ("1970-01-02 00:01", 86_460),
            ("1970-01-02 00:01:01", 86_461),
            ("1970-01-02T00:01:01Z", 86_461),
            ("1970-01-02T01:01:01+01:00", 86_461),
        ] {
            assert_eq!(since(text, 1_000_000), Some(seconds), "{text}");
        }
        for text in ["", "h", "10", "10 years", "yesterday", "2026-13-01", "1969-12-31", "2026-12-01 8:30"] {
            assert_eq!(since(text, 1_000_000), None, "{text}");
        }
        assert_eq!(rfc3339_millis(1_709_251_199_042_001), "2024-02-29T23:59:59.042Z");
    }
}
