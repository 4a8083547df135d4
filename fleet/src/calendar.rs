//! Times in `fleet.toml`: calendar events of systemd's timers ([systemd.time(7)]), and points in time ([RFC 3339]).
//!
//! [systemd.time(7)]: https://www.freedesktop.org/software/systemd/man/latest/systemd.time.html#Calendar%20Events
//! [RFC 3339]: https://www.rfc-editor.org/rfc/rfc3339

/// Names that stand for a whole expression.
const SHORTHANDS: [&str; 12] = [
    "minutely",
    "hourly",
    "daily",
    "weekly",
    "monthly",
    "quarterly",
    "semiannually",
    "semi-annually",
    "biannually",
    "bi-annually",
    "annually",
    "yearly",
];

/// Weekdays in their long form. systemd also accepts the first three letters.
const WEEKDAYS: [&str; 7] = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"];

/// Microseconds in a second. systemd parses the last part of a time in microseconds.
const SECOND: u32 = 1_000_000;

/// Whether systemd accepts the text as `OnCalendar=`. A time zone at the end may be any name in the form of the
/// time zone database, because only the image has that database.
pub(crate) fn is_calendar_event(text: &str) -> bool {
    let text = without_zone(text).to_ascii_lowercase();
    if let Some(seconds) = text.strip_prefix('@') {
        return !seconds.is_empty() && seconds.len() <= 12 && seconds.bytes().all(|b| b.is_ascii_digit());
    }
    SHORTHANDS.contains(&text.as_str()) || (!text.is_empty() && Parser(&text).event().is_some())
}

/// Returns the text without the time zone at its end.
fn without_zone(text: &str) -> &str {
    let Some((rest, zone)) = text.rsplit_once(' ') else { return text };
    let is_name = |part: &str| {
        part.starts_with(|c: char| c.is_ascii_uppercase())
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "_+-".contains(c))
    };
    let is_zone = zone.eq_ignore_ascii_case("utc")
        || zone.contains('/') && zone.split('/').all(is_name)
        || is_name(zone) && zone.chars().all(|c| !c.is_ascii_lowercase());
    if is_zone && !rest.is_empty() { rest } else { text }
}

/// The part of an expression that is not parsed yet. Each method returns `None` if systemd rejects the text.
struct Parser<'a>(&'a str);

/// What follows the weekdays.
enum Rest {
    Nothing,
    DateOrTime,
}

/// Values that a part of a date or a time may have.
#[derive(Clone, Copy)]
struct Limits {
    from: u32,
    to: u32,
    /// Whether the text is in seconds, and the limits are in microseconds.
    seconds: bool,
    /// Whether the days count from the end of the month.
    from_end: bool,
    year: bool,
}

impl Limits {
    const fn new(from: u32, to: u32) -> Self {
        Self { from, to, seconds: false, from_end: false, year: false }
    }
}

/// An element of a list: `start`, `start..stop`, `start/repeat`, `start..stop/repeat`.
struct Component {
    start: u32,
    stop: Option<u32>,
    repeat: Option<u32>,
}

impl<'a> Parser<'a> {
    fn eat(&mut self, prefix: &str) -> bool {
        self.0.strip_prefix(prefix).map(|rest| self.0 = rest).is_some()
    }

    fn spaces(&mut self) {
        self.0 = self.0.trim_start_matches(' ');
    }

    fn event(mut self) -> Option<()> {
        if let Rest::Nothing = self.weekdays()? {
            return Some(());
        }
        self.date()?;
        self.time()
    }

    fn weekdays(&mut self) -> Option<Rest> {
        let mut range_from = None;
        for first in [true].into_iter().chain(std::iter::repeat(false)) {
            let Some(day) = self.weekday() else { return first.then_some(Rest::DateOrTime) };
            if range_from.is_some_and(|from| from > day) {
                return None;
            }
            if self.0.is_empty() {
                return Some(Rest::Nothing);
            }
            if self.0.starts_with(' ') {
                self.spaces();
                return Some(Rest::DateOrTime);
            }
            if self.eat("..") || self.eat("-") {
                if range_from.replace(day).is_some() {
                    return None;
                }
            } else {
                // After a weekday, `weekday` accepts only the end, a space, a comma or a range.
                self.eat(",");
                range_from = None;
            }
            if self.0.is_empty() || self.0.starts_with(' ') {
                // A list may end with a comma, but a range must be complete.
                self.spaces();
                return range_from.is_none().then_some(Rest::DateOrTime);
            }
        }
        None
    }

    /// Parses a weekday, if a separator follows.
    fn weekday(&mut self) -> Option<usize> {
        WEEKDAYS.iter().enumerate().find_map(|(number, name)| {
            let rest = self.0.strip_prefix(name).or_else(|| self.0.strip_prefix(&name[..3]))?;
            let ends = rest.is_empty() || rest.starts_with([' ', ',', '-']) || rest.starts_with("..");
            ends.then(|| {
                self.0 = rest;
                number
            })
        })
    }

    /// Parses a date, if there is one before the time.
    fn date(&mut self) -> Option<()> {
        let before = self.0;
        if before.is_empty() {
            return Some(());
        }
        let first = self.list()?;
        if self.0.is_empty() || self.0.starts_with(':') {
            // The list is the hour of a time, not a part of a date.
            self.0 = before;
            return Some(());
        }
        let mut from_end = self.eat("~");
        if !from_end && !self.eat("-") {
            return None;
        }
        let second = self.list()?;
        let (year, month, day) = if self.0.is_empty() || self.0.starts_with(' ') {
            (None, first, second)
        } else {
            if from_end {
                return None;
            }
            from_end = self.eat("~");
            if !from_end && !self.eat("-") {
                return None;
            }
            (Some(first), second, self.list()?)
        };
        if !self.0.is_empty() && !self.0.starts_with(' ') {
            return None;
        }
        self.spaces();
        let years = Limits { year: true, ..Limits::new(1970, 2199) };
        // Every month has 28 days before its end. systemd subtracts 3 more for each further element of the list.
        let last = if from_end { 28_u32.checked_sub(3 * day.matches(',').count() as u32)? } else { 31 };
        let days = Limits { from_end, ..Limits::new(1, last.max(1)) };
        let ok = year.is_none_or(|year| fits(year, years)) && fits(month, Limits::new(1, 12)) && fits(day, days);
        ok.then_some(())
    }

    fn time(&mut self) -> Option<()> {
        if self.0.is_empty() {
            return Some(());
        }
        let hour = self.list()?;
        let minute = self.eat(":").then(|| self.list())??;
        let second = if self.eat(":") { Some(self.list()?) } else { None };
        let seconds = Limits { seconds: true, ..Limits::new(0, 60 * SECOND - 1) };
        let ok = fits(hour, Limits::new(0, 23))
            && fits(minute, Limits::new(0, 59))
            && second.is_none_or(|second| fits(second, seconds));
        (ok && self.0.is_empty()).then_some(())
    }

    /// Splits a list off the text: up to the next separator of a date or a time.
    fn list(&mut self) -> Option<&'a str> {
        let end = self.0.find([' ', ':', '-', '~']).unwrap_or(self.0.len());
        let (list, rest) = self.0.split_at(end);
        self.0 = rest;
        (!list.is_empty()).then_some(list)
    }
}

/// Whether a list has the form that systemd accepts, and values within the limits.
fn fits(list: &str, limits: Limits) -> bool {
    list == "*" || list.split(',').all(|text| component(text, limits).is_some_and(|c| c.is_valid(limits)))
}

fn component(text: &str, limits: Limits) -> Option<Component> {
    let (range, repeat) = match text.split_once('/') {
        Some((range, repeat)) => (range, Some(number(repeat, limits.seconds)?)),
        None => (text, None),
    };
    let value = |text: &str| {
        let value = number(text, limits.seconds)?;
        Some(match value {
            0..70 if limits.year => value + 2000,
            70..100 if limits.year => value + 1900,
            value => value,
        })
    };
    let (start, stop) = match range.split_once("..") {
        Some((start, stop)) => (value(start)?, Some(value(stop)?)),
        None => (value(range)?, None),
    };
    Some(Component { start, stop, repeat })
}

impl Component {
    fn is_valid(&self, limits: Limits) -> bool {
        let Self { start, stop, repeat } = *self;
        let within = limits.from..=limits.to;
        if !within.contains(&start) || stop.is_some_and(|stop| stop < start || !within.contains(&stop)) {
            return false;
        }
        if repeat == Some(0) || repeat.is_some_and(|repeat| repeat > limits.to - limits.from) {
            return false;
        }
        match (stop, repeat) {
            // Without a step, a range of seconds has a step of one second, which must fit the range.
            (Some(stop), None) => !limits.seconds || start.saturating_add(SECOND) <= stop,
            // systemd ignores a step that is longer than the range.
            (Some(_), Some(_)) | (None, None) => true,
            (None, Some(repeat)) if limits.from_end => start >= limits.from.saturating_add(repeat),
            (None, Some(repeat)) => start.saturating_add(repeat) <= limits.to,
        }
    }
}

/// Parses a whole number, or seconds with up to six decimals as microseconds.
fn number(text: &str, seconds: bool) -> Option<u32> {
    let digits = |text: &str| -> Option<u32> {
        let plain = !text.is_empty() && text.len() <= 9 && text.bytes().all(|b| b.is_ascii_digit());
        plain.then(|| text.parse().ok())?
    };
    if !seconds {
        return digits(text);
    }
    let (whole, decimals) = text.split_once('.').map_or((text, None), |(whole, decimals)| (whole, Some(decimals)));
    let micros = match decimals {
        None => 0,
        Some(decimals) if decimals.len() <= 6 => digits(&format!("{decimals:0<6}")).filter(|_| !decimals.is_empty())?,
        Some(_) => return None,
    };
    digits(whole)?.checked_mul(SECOND)?.checked_add(micros)
}

/// Returns a point in time in the form that pgBackRest and PostgreSQL take: `2026-11-23 10:00:00+00`. The text has that
/// form, or that of RFC 3339: `2026-11-23T10:00:00Z`. If the text has no offset, the result has none.
pub(crate) fn point_in_time(text: &str) -> Option<String> {
    let (date, rest) = (text.get(..10)?, text.get(10..)?);
    let time = rest.strip_prefix([' ', 'T', 't'])?;
    let (clock, zone) = time.split_at(time.find(['Z', 'z', '+', '-']).unwrap_or(time.len()));
    let (clock, fraction) = clock.split_once('.').map_or((clock, None), |(clock, f)| (clock, Some(f)));
    let [year, month, day] = fields(date, '-')?;
    let [hour, minute, second] = fields(clock, ':')?;
    let is_plain = date.len() == 10 && clock.len() == 8;
    let in_range = (1..=days(year, month)?).contains(&day) && hour < 24 && minute < 60 && second < 60;
    let good_fraction = fraction.is_none_or(|f| !f.is_empty() && f.bytes().all(|b| b.is_ascii_digit()));
    if !is_plain || !in_range || !good_fraction {
        return None;
    }
    let zone = match zone {
        "" => String::new(),
        "Z" | "z" => "+00".to_owned(),
        offset => {
            let digits = offset[1..].replacen(':', "", usize::from(offset.len() == 6 && offset.as_bytes()[3] == b':'));
            let good = matches!(digits.len(), 2 | 4) && digits.bytes().all(|b| b.is_ascii_digit());
            let (hours, minutes) = digits.get(..2).filter(|_| good).map(|h| (h, &digits[2..]))?;
            let small = hours <= "15" && (minutes.is_empty() || minutes < "60");
            small.then(|| offset.to_owned())?
        }
    };
    let fraction = fraction.map(|f| format!(".{f}")).unwrap_or_default();
    Some(format!("{date} {clock}{fraction}{zone}"))
}

fn fields(text: &str, separator: char) -> Option<[u16; 3]> {
    let number = |text: &str| text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok())?;
    let all: Vec<u16> = text.split(separator).map(number).collect::<Option<_>>()?;
    all.try_into().ok()
}

fn days(year: u16, month: u16) -> Option<u16> {
    let leap = year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    match month {
        1 | 3 | 5 | 7 | 8 | 10 | 12 => Some(31),
        4 | 6 | 9 | 11 => Some(30),
        2 => Some(if leap { 29 } else { 28 }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    const GOOD: &[&str] = &[
        "*:0/5",
        "Sun 01:30",
        "Mon..Sat 01:30",
        "Sun *-*-* 02..04:0/5",
        "Mon,Wed,Fri 1:00 UTC",
        "02:00 Europe/Berlin",
        "Mon-Fri 1:00",
        "*-*~1",
        "2026-10-*",
        "2026-02~03",
        "daily",
        "Weekly UTC",
        "@1395716396",
        "Sun",
        "Mon,",
        "*-*-1..7 4:00",
        "1:00:00.5/0.25",
        "03-05 08:05:40",
        "*-5~07/1",
        "99-1-1",
        "Mon  *-1-1   1:00",
        "*:0/59",
        "1:0:0/59",
        "*-*-*",
        "*:*",
        "*:*:*",
        "1:00:00 utc",
        "2:00 CET",
        // The examples of systemd.time(7).
        "Sat,Thu,Mon..Wed,Sat..Sun",
        "Mon,Sun 12-*-* 2,1:23",
        "Wed *-1",
        "Wed..Wed,Wed *-1",
        "Wed, 17:48",
        "Wed..Sat,Tue 12-10-15 1:2:3",
        "*-*-7 0:0:0",
        "10-15",
        "monday *-12-* 17:00",
        "Mon,Fri *-*-3,1,2 *:30:45",
        "12,14,13,12:20,10,30",
        "12..14:10,20,30",
        "mon,fri *-1/2-1,3 *:30:45",
        "03-05 08:05",
        "08:05:40",
        "Sat,Sun 08:05",
    ];
    const BAD: &[&str] = &[
        "",
        "Someday",
        "sunday at 1",
        "*:*/5",
        "2026-*",
        "10",
        "2:3..1",
        "5..3:00",
        "0/0:1",
        "0/24:00",
        "23/2:00",
        "2026~02-03",
        "Sat..Tue 1:00",
        "1969-1-1",
        " 1:00",
        "1:00 ",
        "1:60",
        "24:00",
        "*:0/60",
        "*-*-0",
        "*-13-1",
        "hourly ",
        "*-*~29",
        "*~7,27 1:00",
        "1:0:0..0",
        "1:0:0/70",
        "1:0:0/60",
        "*-*-31/1",
        "1,2,:00",
        "*,1:00",
        "Mon..",
        "Mon Tue",
        "at noon",
        "1:00 tomorrow",
    ];

    /// Returns the expressions that the host's systemd rejects.
    fn rejected(expressions: &[&str]) -> Vec<String> {
        let output = Command::new("systemd-analyze").arg("calendar").args(expressions).output();
        let output = output.expect("systemd-analyze: install systemd");
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        // Hints about other commands quote expressions, too.
        let failed = errors.lines().filter(|line| line.starts_with("Failed to parse"));
        let quoted = failed.filter_map(|line| line.split('\'').nth(1).map(str::to_owned));
        quoted.collect()
    }

    #[test]
    fn accepts_and_rejects_calendar_events() {
        for (texts, accepted) in [(GOOD, true), (BAD, false)] {
            for text in texts {
                assert_eq!(is_calendar_event(text), accepted, "{text}");
            }
        }
    }

    #[test]
    fn systemd_accepts_and_rejects_the_same_examples() {
        assert_eq!(rejected(GOOD), Vec::<String>::new());
        assert_eq!(rejected(BAD), BAD);
    }

    #[test]
    fn systemd_accepts_every_event_that_the_parser_accepts() {
        use proptest::strategy::{Strategy as _, ValueTree as _};
        use proptest::test_runner::TestRunner;
        const PART: &str = r"(\*|[0-9]{1,2}(\.\.[0-9]{1,2})?(/[0-9]{1,2})?(,[0-9]{1,2})?)";
        let expression = format!(
            "((Mon|tue|Wednesday|Sun)((\\.\\.|,|-)(Wed|Sat|Sunday))? ?)?(({PART}|20[0-9]{{2}})[-~])?({PART}[-~]{PART} \
             )?{PART}:{PART}(:{PART}(\\.[0-9]{{1,7}})?)?( UTC)?"
        );
        let strategy = proptest::string::string_regex(&expression).unwrap();
        let mut runner = TestRunner::default();
        let texts: Vec<String> = (0..4000).map(|_| strategy.new_tree(&mut runner).unwrap().current()).collect();
        let accepted: Vec<&str> = texts.iter().map(String::as_str).filter(|text| is_calendar_event(text)).collect();
        assert!(accepted.len() > 100, "{} of 4000", accepted.len());
        for some in accepted.chunks(500) {
            assert_eq!(rejected(some), Vec::<String>::new());
        }
    }

    #[test]
    fn reads_points_in_time() {
        for (text, read) in [
            ("2026-11-23 10:00:00+00", "2026-11-23 10:00:00+00"),
            ("2026-11-23T10:00:00Z", "2026-11-23 10:00:00+00"),
            ("2024-02-29t23:59:59.25z", "2024-02-29 23:59:59.25+00"),
            ("2026-11-23T10:00:00+07:00", "2026-11-23 10:00:00+07:00"),
            ("2026-11-23 10:00:00-0330", "2026-11-23 10:00:00-0330"),
            ("2026-11-23 10:00:00", "2026-11-23 10:00:00"),
        ] {
            assert_eq!(point_in_time(text).as_deref(), Some(read), "{text}");
        }
        for text in [
            "yesterday",
            "",
            "2026-11-23",
            "2026-02-29 10:00:00+00",
            "2026-13-01 10:00:00",
            "2026-11-23 24:00:00",
            "2026-11-23 10:00",
            "2026-11-23T10:00:00+7",
            "2026-11-23T10:00:00+99",
            "2026-11-23T10:00:00.Z",
            "23.11.2026 10:00:00",
            "2026-11-2é 10:00:00",
        ] {
            assert_eq!(point_in_time(text), None, "{text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn never_panics(text: String) {
            is_calendar_event(&text);
            point_in_time(&text);
        }
    }
}
