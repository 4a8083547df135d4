//! Forms of names: of fleets, groups and hosts.

/// Returns whether a fleet may have this name: it becomes a part of host names and of file names.
#[must_use]
pub fn is_fleet_name(text: &str) -> bool {
    is_dns_label(text, 32)
}

pub(super) fn is_dns_label(text: &str, longest: usize) -> bool {
    text.len() <= longest
        && text.starts_with(|c: char| c.is_ascii_lowercase())
        && !text.ends_with('-')
        && text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
}

pub(super) fn is_host(text: &str) -> bool {
    text.len() <= 253
        && !text.is_empty()
        && text.split('.').all(|label| {
            (1..=63).contains(&label.len())
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
        })
}
