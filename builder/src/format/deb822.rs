//! Parses Debian's control format ([deb822(5)](https://manpages.debian.org/deb822.5)): paragraphs of `Key: value`
//! lines.

/// Returns the paragraphs of a control file.
pub(crate) fn paragraphs(text: &str) -> impl Iterator<Item = &str> {
    text.split("\n\n").map(|p| p.trim_start_matches('\n')).filter(|p| !p.is_empty())
}

/// Returns the first line of a field.
#[must_use]
pub(crate) fn field<'a>(paragraph: &'a str, key: &str) -> Option<&'a str> {
    paragraph.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case(key).then(|| value.trim())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_fields_of_paragraphs() {
        let text = "Package: a\nVersion: 1:2\n\nPackage: b\nDescription: x\n more: y\n";
        let all: Vec<_> = paragraphs(text).collect();
        assert_eq!(all.len(), 2);
        assert_eq!(field(all[0], "version"), Some("1:2"));
        assert_eq!(field(all[1], "Package"), Some("b"));
        assert_eq!(field(all[1], "Version"), None);
    }
}
