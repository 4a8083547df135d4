//! Rules of `[web]`.

use std::net::IpAddr;

use super::Lint;
use super::names::is_host;

impl Lint<'_> {
    /// Reports invalid names, limits and authorities, and keys that exclude each other.
    pub(super) fn web(&mut self) {
        let web = self.fleet.web.get_ref().clone();
        if let Some(name) = &web.name {
            self.web_name(name);
        }
        let needs_name = [("acme", web.acme), ("certificate", web.certificate.is_some())];
        for (key, _) in needs_name.into_iter().filter(|(_, is_set)| *is_set && web.name.is_none()) {
            self.web_error(
                &[key],
                format!("[web] `{key}` needs the name that the certificate is for"),
                "add the name that users type: `name = \"erp.example.com\"`",
            );
        }
        if web.acme && web.certificate.is_some() {
            self.web_error(
                &["certificate"],
                "[web] has both `acme` and `certificate`".to_owned(),
                "remove `certificate` if the hubs order the certificate, or set `acme = false`",
            );
        }
        // A browser opens several connections in parallel.
        if !(10..=3000).contains(&web.connections) {
            let message = format!("[web] connections = {} is out of range", web.connections);
            self.web_error(&["connections"], message, "set 10 to 3000; the default is 150");
        }
        if !(10..=10_000).contains(&web.logins) {
            let message = format!("[web] logins = {} is out of range", web.logins);
            self.web_error(&["logins"], message, "set 10 to 10000; the default is 120");
        }
        self.authority();
    }

    fn web_name(&mut self, name: &str) {
        let shown = name.escape_debug();
        if name.parse::<IpAddr>().is_ok() {
            self.web_error(
                &["name"],
                format!("[web] `{shown}` is an address, and not a name"),
                "write the name that users type, such as \"erp.example.com\", and let DNS resolve it to the hubs",
            );
        } else if !is_host(name) || !name.contains('.') || name.chars().any(|c| c.is_ascii_uppercase()) {
            self.web_error(
                &["name"],
                format!("[web] `{shown}` is not the full name of a host"),
                "write it in lower case with its domain, such as \"erp.example.com\"",
            );
        }
    }

    fn authority(&mut self) {
        let web = self.fleet.web.get_ref().clone();
        let authority = &web.authority;
        let host = authority.directory.strip_prefix("https://").and_then(|rest| rest.split(['/', ':']).next());
        let is_plain = authority.directory.chars().all(|c| c.is_ascii_graphic() && !"\"'\\".contains(c));
        if !host.is_some_and(is_host) || !is_plain {
            self.web_error(
                &["authority", "directory"],
                format!("[web.authority] `{}` is not the address of a directory", authority.directory.escape_debug()),
                "begin it with https:// and a host, such as \"https://acme-v02.api.letsencrypt.org/directory\"",
            );
        }
        let is_mail = |text: &String| {
            text.split_once('@').is_some_and(|(user, host)| !user.is_empty() && is_host(host))
                && text.chars().all(|c| c.is_ascii_graphic() && !",;<>\"".contains(c))
        };
        if let Some(email) = authority.email.as_ref().filter(|email| !is_mail(email)) {
            let message = format!("[web.authority] `{}` is not a mail address", email.escape_debug());
            self.web_error(&["authority", "email"], message, "write it as \"name@host\"");
        }
        let is_id = |id: &String| !id.is_empty() && id.len() <= 256 && id.chars().all(|c| c.is_ascii_graphic());
        if let Some(id) = authority.eab_key_id.as_ref().filter(|id| !is_id(id)) {
            let message = format!("[web.authority] `{}` is not a key identifier", id.escape_debug());
            self.web_error(&["authority", "eab_key_id"], message, "copy it from the authority's page of your account");
        }
        if *authority != crate::Authority::default() && !web.acme {
            self.warning(
                self.fleet.source.value(&["web", "authority"]),
                "[web.authority] has no effect: the hubs order no certificate".to_owned(),
                "set `acme = true` in [web]".to_owned(),
            );
        }
    }

    fn web_error(&mut self, path: &[&str], message: String, help: &str) {
        let path: Vec<&str> = std::iter::once("web").chain(path.iter().copied()).collect();
        self.error(self.fleet.source.value(&path), message, help.to_owned());
    }
}

#[cfg(test)]
mod tests {
    use crate::{Fleet, Profiles, Severity, lint};

    /// Returns the diagnostics about `[web]`: severity, line and the shown text.
    fn found(web: &str) -> Vec<(Severity, usize, String)> {
        let text = format!("name = \"x\"\n[web]\n{web}\n[groups.hub]\ncount = 1\nendpoints = [\"hub.acme.com\"]\n");
        let fleet = Fleet::parse("f", text.as_bytes()).unwrap_or_else(|e| panic!("{web}: {}", e.message));
        let found = lint(&fleet, &Profiles::new()).into_iter().filter(|d| d.message.contains("[web"));
        found.map(|d| (d.severity, d.line, d.render(false))).collect()
    }

    #[test]
    fn errors_have_their_line_and_a_fix() {
        for (web, line, message, help) in [
            ("acme = true", 3, "`acme` needs the name", "name = \"erp.example.com\""),
            ("certificate = \"a.pem\"", 3, "`certificate` needs the name", "name = "),
            ("name = \"192.0.2.1\"\nacme = true", 3, "is an address", "DNS"),
            ("name = \"2001:db8::1\"", 3, "is an address", "DNS"),
            ("name = \"erp\"", 3, "not the full name", "domain"),
            ("name = \"*.acme.com\"", 3, "not the full name", "domain"),
            (
                "name = \"a.example\"\nacme = true\ncertificate = \"a.pem\"",
                5,
                "both `acme` and `certificate`",
                "remove",
            ),
            ("connections = 5", 3, "connections = 5", "10 to 3000"),
            ("logins = 5", 3, "logins = 5", "10 to 10000"),
            (
                "name = \"a.example\"\nacme = true\nauthority.directory = \"http://a.example/d\"",
                5,
                "not the address",
                "https://",
            ),
            ("name = \"a.example\"\nacme = true\nauthority.email = \"root\"", 5, "not a mail address", "name@host"),
            ("name = \"a.example\"\nacme = true\nauthority.eab_key_id = \"\"", 5, "key identifier", "copy it"),
        ] {
            let all = found(web);
            let [(Severity::Error, at, shown)] = &all[..] else { panic!("{web}: {all:?}") };
            assert!(*at == line && shown.contains(message) && shown.contains(help), "{web}: {shown}");
        }
    }

    #[test]
    fn name_implies_redirect_and_hsts_and_both_can_be_off() {
        let web = |text: &str| {
            let text = format!("name = \"x\"\n[web]\n{text}\n[groups]\n");
            let fleet = Fleet::parse("f", text.as_bytes()).unwrap();
            let web = crate::Topology::from_fleet(&fleet).web;
            (web.redirect, web.hsts)
        };
        assert_eq!(web(""), (Some(false), None));
        assert_eq!(web("name = \"a.example\""), (Some(true), Some(true)));
        assert_eq!(web("name = \"a.example\"\nredirect = false"), (Some(false), None));
        assert_eq!(web("name = \"a.example\"\nhsts = false"), (Some(true), Some(false)));
        assert_eq!(
            found(
                "name = \"erp.acme.com\"\nacme = true\nauthority = { directory = \"https://ca.acme.com:9000/acme/acme/directory\", email = \"it@acme.com\", eab_key_id = \"kid-1\" }"
            ),
            []
        );
        assert!(found("authority.email = \"it@acme.com\"")[0].2.contains("no effect"));
    }
}
