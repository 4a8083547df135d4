//! Order of image versions: the [version format] of the UAPI group, which systemd-sysupdate and systemd-boot use.
//!
//! [version format]: https://uapi-group.org/specifications/specs/version_format_specification/

use std::cmp::Ordering;

/// Compares as `systemd-analyze compare-versions` does.
///
/// # Examples
///
/// ```
/// use std::cmp::Ordering;
///
/// assert_eq!(fleet::compare_versions("1.9", "1.10"), Ordering::Less);
/// // A release candidate is older than its release.
/// assert_eq!(fleet::compare_versions("2~rc1", "2"), Ordering::Less);
/// assert_eq!(fleet::compare_versions("2", "2"), Ordering::Equal);
/// ```
#[must_use]
pub fn compare_versions(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a.as_bytes(), b.as_bytes());
    loop {
        a = skip_separators(a);
        b = skip_separators(b);
        // `~` sorts before everything, including the end of the text.
        match (a.first() == Some(&b'~'), b.first() == Some(&b'~')) {
            (true, true) => {
                (a, b) = (&a[1..], &b[1..]);
                continue;
            }
            (true, false) => return Ordering::Less,
            (false, true) => return Ordering::Greater,
            _ => {}
        }
        if a.is_empty() || b.is_empty() {
            return a.len().min(1).cmp(&b.len().min(1));
        }
        // Then `-`, `^` and `.`, in this order: a version whose part ends here is older.
        let mut ended = false;
        for separator in [b'-', b'^', b'.'] {
            match (a.first() == Some(&separator), b.first() == Some(&separator)) {
                (true, true) => {
                    (a, b) = (&a[1..], &b[1..]);
                    ended = true;
                    break;
                }
                (true, false) => return Ordering::Less,
                (false, true) => return Ordering::Greater,
                _ => {}
            }
        }
        if ended {
            continue;
        }
        let order = if a[0].is_ascii_digit() || b[0].is_ascii_digit() {
            let (x, rest_a) = take(a, u8::is_ascii_digit);
            let (y, rest_b) = take(b, u8::is_ascii_digit);
            (a, b) = (rest_a, rest_b);
            // A missing number is older than 0.
            match (x.is_empty(), y.is_empty()) {
                (true, false) => Ordering::Less,
                (false, true) => Ordering::Greater,
                _ => {
                    let (x, y) = (trim_zeros(x), trim_zeros(y));
                    x.len().cmp(&y.len()).then(x.cmp(y))
                }
            }
        } else {
            let (x, rest_a) = take(a, u8::is_ascii_alphabetic);
            let (y, rest_b) = take(b, u8::is_ascii_alphabetic);
            (a, b) = (rest_a, rest_b);
            x.cmp(y)
        };
        if order.is_ne() {
            return order;
        }
    }
}

fn skip_separators(text: &[u8]) -> &[u8] {
    let known = |c: &u8| c.is_ascii_alphanumeric() || b"~-^.".contains(c);
    let start = text.iter().position(known).unwrap_or(text.len());
    &text[start..]
}

fn take(text: &[u8], of: impl Fn(&u8) -> bool) -> (&[u8], &[u8]) {
    text.split_at(text.iter().position(|c| !of(c)).unwrap_or(text.len()))
}

fn trim_zeros(digits: &[u8]) -> &[u8] {
    let start = digits.iter().position(|c| *c != b'0').unwrap_or(digits.len());
    &digits[start..]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_versions_as_the_specification() {
        // Oldest first.
        let ordered = ["~1", "", "0", "1~rc1", "1", "1-1", "1^20", "1.0", "1.2", "1.10", "2", "10", "10a"];
        for (i, older) in ordered.iter().enumerate() {
            assert_eq!(compare_versions(older, older), Ordering::Equal, "{older}");
            for newer in &ordered[i + 1..] {
                assert_eq!(compare_versions(older, newer), Ordering::Less, "{older} {newer}");
                assert_eq!(compare_versions(newer, older), Ordering::Greater, "{newer} {older}");
            }
        }
        assert_eq!(compare_versions("007", "7"), Ordering::Equal);
    }

    proptest::proptest! {
        #[test]
        fn order_is_antisymmetric(a in "[0-9a-z.~^-]{0,8}", b in "[0-9a-z.~^-]{0,8}") {
            assert_eq!(compare_versions(&a, &b), compare_versions(&b, &a).reverse());
        }
    }
}
