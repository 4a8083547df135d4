//! Rules for `[odoo.source]` and `[[odoo.repositories]]`.

use super::Lint;
use crate::odoo_code::{CodeOrigin, OdooSource, Repository};

/// Starts of addresses that git gets.
const GIT: [&str; 6] = ["https://", "http://", "ssh://", "git://", "file:///", "git@"];

impl Lint<'_> {
    pub(super) fn odoo_code(&mut self) {
        let odoo = self.fleet.odoo.get_ref();
        if let Some(source) = &odoo.source {
            let OdooSource { url, commit, archive, sha256 } = source;
            self.origin(&["odoo", "source"], [url, commit, archive, sha256], source.origin());
        }
        for (number, repository) in odoo.repositories.iter().enumerate() {
            let number = number.to_string();
            let table = ["odoo", "repositories", number.as_str()];
            let Repository { url, commit, archive, sha256, .. } = repository;
            self.origin(&table, [url, commit, archive, sha256], repository.origin());
            self.folder(&table, repository);
        }
    }

    /// Reports keys that do not belong together, and invalid values.
    fn origin(&mut self, table: &[&str], keys: [&Option<String>; 4], origin: Option<CodeOrigin<'_>>) {
        let [url, commit, archive, sha256] = keys;
        let source = &self.fleet.source;
        let at = |key: &str| source.value(&table.iter().copied().chain([key]).collect::<Vec<_>>());
        let mut found = Vec::new();
        if origin.is_none() {
            found.push((
                source.value(table),
                "the code has no exact origin".to_owned(),
                "set `url` and `commit` of a git repository, or `archive` and `sha256` of a .tar.gz".to_owned(),
            ));
        }
        if let Some(url) = url {
            let rest = GIT.iter().find_map(|start| url.strip_prefix(start));
            let has_password = url.split_once("://").is_some_and(|(_, rest)| {
                rest.split('/')
                    .next()
                    .is_some_and(|host| host.rsplit_once('@').is_some_and(|(user, _)| user.contains(':')))
            });
            if rest.is_none_or(str::is_empty) || url.chars().any(|c| c.is_whitespace() || c.is_control()) {
                found.push((
                    at("url"),
                    format!("`{}` is not the address of a git repository", url.escape_debug()),
                    "write https://HOST/PATH, ssh://, git:// or file:///PATH".to_owned(),
                ));
            } else if has_password {
                found.push((
                    at("url"),
                    "the address has a password, and fleet.toml is no place for secrets".to_owned(),
                    "remove it, and let git ask its credential helper (`git help credentials`), or use an SSH key"
                        .to_owned(),
                ));
            }
        }
        for (key, value, lengths, help) in [
            ("commit", commit, &[40, 64][..], "write all of its digits, as `git rev-parse HEAD` prints them"),
            ("sha256", sha256, &[64], "write the 64 digits that `sha256sum` prints"),
        ] {
            let is_hex = |c: char| c.is_ascii_digit() || ('a'..='f').contains(&c);
            if let Some(value) = value.as_deref().filter(|v| !lengths.contains(&v.len()) || !v.chars().all(is_hex)) {
                let text = format!("`{}` is not a {key} in hex", value.escape_debug());
                found.push((at(key), text, help.to_owned()));
            }
        }
        if let Some(archive) = archive.as_deref().filter(|a| !a.ends_with(".tar.gz") && !a.ends_with(".tgz")) {
            let text = format!("`{}` is no .tar.gz", archive.escape_debug());
            found.push((at("archive"), text, "take the .tar.gz of this release".to_owned()));
        }
        for (span, message, help) in found {
            self.error(span, message, help);
        }
    }

    fn folder(&mut self, table: &[&str], repository: &Repository) {
        let folder = &repository.folder;
        let is_inside = folder.split('/').all(|part| !matches!(part, "" | "." | ".."));
        if !folder.is_empty() && !is_inside {
            let path: Vec<&str> = table.iter().copied().chain(["folder"]).collect();
            self.error(
                self.fleet.source.value(&path),
                format!("`{}` is no folder inside the repository", folder.escape_debug()),
                "write its path from the repository's top, such as \"addons\"".to_owned(),
            );
        }
        for (number, name) in repository.addons.iter().enumerate() {
            let is_name = name.starts_with(|c: char| c.is_ascii_lowercase())
                && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
            if !is_name {
                let number = number.to_string();
                let path: Vec<&str> = table.iter().copied().chain(["addons", &number]).collect();
                self.error(
                    self.fleet.source.value(&path),
                    format!("`{}` is not the name of an add-on", name.escape_debug()),
                    "write the name of its folder".to_owned(),
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use crate::lint::lint;
    use crate::{Fleet, Profiles, Severity};

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    fn profiles() -> Profiles {
        let hub = crate::Profile::parse("profiles/roles/hub.toml", b"packages = []\n").unwrap();
        BTreeMap::from([("hub".to_owned(), hub)])
    }

    /// Expects one error, with this text, at the line of `at`.
    fn error(more: &str, message: &str, at: &str) {
        let text = format!("name = \"acme\"\n[groups.hub]\ncount = 1\nendpoints = [\"a\"]\n{more}");
        let fleet = Fleet::parse("f", text.as_bytes()).unwrap();
        let found = lint(&fleet, &profiles()).into_iter().filter(|d| d.severity == Severity::Error);
        let found: Vec<String> = found.map(|d| d.to_string()).collect();
        let [one] = &found[..] else { panic!("{more}: {found:#?}") };
        let line = text.lines().position(|line| line.contains(at)).unwrap() + 1;
        assert!(one.starts_with(&format!("f:{line}: ")) && one.contains(message), "{one}");
    }

    fn repository(keys: &str) -> String {
        format!("[[odoo.repositories]]\n{keys}\n")
    }

    #[test]
    fn code_has_one_exact_origin() {
        let git = format!("url = \"https://example.com/a.git\"\ncommit = \"{COMMIT}\"");
        let both = format!("{git}\narchive = \"a.tar.gz\"\nsha256 = \"{}\"", "a".repeat(64));
        for keys in ["url = \"https://example.com/a\"", "archive = \"a.tar.gz\"", &both, "folder = \"x\""] {
            error(&repository(keys), "no exact origin", "[[odoo.repositories]]");
        }
        error("[odoo.source]\nurl = \"https://example.com/odoo\"\n", "no exact origin", "[odoo.source]");
    }

    #[test]
    fn addresses_and_hashes_are_checked() {
        let with = |url: &str, commit: &str| repository(&format!("url = \"{url}\"\ncommit = \"{commit}\""));
        for url in ["ext::sh -c x", "--upload-pack=x", "https://", "a/b", "https://a b/"] {
            error(&with(url, COMMIT), "not the address of a git repository", url);
        }
        error(&with("https://anna:s3cret@example.com/a", COMMIT), "has a password", "s3cret");
        error(&with("https://example.com/a", "main"), "`main` is not a commit in hex", "\"main\"");
        let archive = format!("[odoo.source]\narchive = \"odoo.zip\"\nsha256 = \"{}\"\n", "a".repeat(64));
        error(&archive, "`odoo.zip` is no .tar.gz", "odoo.zip");
    }

    #[test]
    fn folders_are_inside_the_repository() {
        let with = |more: &str| repository(&format!("url = \"https://a.b/c\"\ncommit = \"{COMMIT}\"\n{more}"));
        for folder in ["../x", "/x", "a//b", "a/../.."] {
            error(&with(&format!("folder = \"{folder}\"")), "no folder inside", folder);
        }
        error(&with("addons = [\"web\", \"../etc\"]"), "`../etc` is not the name of an add-on", "../etc");
    }

    #[test]
    fn a_repository_is_named_after_its_address() {
        for (url, name) in [
            ("https://github.com/OCA/partner-contact.git/", "partner-contact"),
            ("git@example.com:addons.git", "addons"),
            ("file:///srv/git/x", "x"),
        ] {
            let origin = crate::CodeOrigin::Git { url, commit: COMMIT };
            assert_eq!((origin.name(), origin.revision()), (name, COMMIT));
        }
    }
}
