//! Rules of a mail server, and of `[odoo.mail]`.

use super::Lint;
use super::names::is_host;
use crate::alerts::MailTls;

/// Port of TLS from the start (RFC 8314).
pub(super) const TLS_PORT: u16 = 465;

impl Lint<'_> {
    /// Reports an invalid mail server, and a user without TLS. `table`: the names of the section. Returns the port.
    pub(super) fn mail_server(
        &mut self,
        table: [&str; 2],
        smarthost: &str,
        tls: MailTls,
        user: Option<&str>,
    ) -> Option<u16> {
        let fleet = self.fleet;
        let title = table.join(".");
        let at = |key: &str| fleet.source.value(&[table[0], table[1], key]);
        let server = smarthost.rsplit_once(':');
        let port = server.and_then(|(_, port)| port.parse::<u16>().ok()).filter(|port| *port > 0);
        let is_name = |host: &str| is_host(host) || host.starts_with('[') && host.ends_with(']');
        let Some(port) = port.filter(|_| server.is_some_and(|(host, _)| is_name(host))) else {
            let message = format!("[{title}] `{}` is not a mail server", smarthost.escape_debug());
            self.error(at("smarthost"), message, "write host and port, such as \"mail.acme.example:587\"".to_owned());
            return None;
        };
        if tls != MailTls::Tls && port == TLS_PORT {
            let message = format!("[{title}] port {TLS_PORT} needs TLS from the start");
            self.error(at("smarthost"), message, "set `tls = \"tls\"`, or port 587".to_owned());
        }
        if user.is_some_and(|user| user.is_empty() || user.contains(char::is_control) || user.trim() != user) {
            let message = format!("[{title}] `user` is empty or has control characters");
            let help = "write the name with which the mail server knows the fleet".to_owned();
            self.error(at("user"), message, help);
        }
        if tls == MailTls::None && user.is_some() {
            let message = format!("[{title}] `user` needs TLS: the password would be readable on the path");
            self.error(at("user"), message, "set `tls = \"starttls\"`, or remove `user`".to_owned());
        }
        Some(port)
    }

    /// Reports invalid addresses of `[odoo.mail]`, and names without a domain.
    pub(super) fn odoo_mail(&mut self) {
        let fleet = self.fleet;
        let Some(mail) = &fleet.odoo.get_ref().mail else { return };
        let at = |key: &str| fleet.source.value(&["odoo", "mail", key]);
        self.mail_server(["odoo", "mail"], &mail.smarthost, mail.tls, mail.user.as_deref());
        if mail.tls == MailTls::None {
            let message = "[odoo.mail] tls = \"none\": everyone on the path to the mail server can read Odoo's mail";
            self.warning(at("tls"), message.to_owned(), None);
        }
        if let Some(from) = mail.from.as_ref().filter(|from| !is_address(from)) {
            let message = format!("[odoo.mail] `{}` is not a mail address", from.escape_debug());
            self.error(at("from"), message, "write it as \"name@host\", in lower case and without a name".to_owned());
        }
        if let Some(domain) = mail.domain.as_ref().filter(|domain| !is_domain(domain)) {
            let message = format!("[odoo.mail] `{}` is not a mail domain", domain.escape_debug());
            self.error(at("domain"), message, "write it in lower case, such as \"acme.example\"".to_owned());
        }
        let names = [("catchall", &mail.catchall), ("bounce", &mail.bounce)];
        for (key, name) in names.into_iter().filter_map(|(key, name)| Some((key, name.as_ref()?))) {
            if !is_name(name) {
                let message = format!("[odoo.mail] `{}` is not a name in `domain`", name.escape_debug());
                self.error(at(key), message, "write what stands before the `@`, in lower case".to_owned());
            }
            if mail.domain.is_none() {
                let message = format!("[odoo.mail] `{key}` needs `domain`");
                self.error(at(key), message, "add `domain = \"acme.example\"`".to_owned());
            }
        }
        if mail.bounce.is_some() && mail.bounce == mail.catchall {
            let message = "[odoo.mail] `bounce` and `catchall` are the same address".to_owned();
            self.error(at("bounce"), message, "give them two names, such as \"bounce\" and \"catchall\"".to_owned());
        }
        for (number, sender) in mail.from_filter.iter().enumerate() {
            if !is_address(sender) && !is_domain(sender) {
                let span = fleet.source.value(&["odoo", "mail", "from_filter", &number.to_string()]);
                let message = format!("[odoo.mail] `{}` is neither a domain nor an address", sender.escape_debug());
                self.error(span, message, "write it in lower case, such as \"acme.example\"".to_owned());
            }
        }
        if mail.from.is_none() && mail.domain.is_none() {
            let message = "[odoo.mail] has neither `from` nor `domain`: mails without a sender of their own fail";
            self.warning(
                fleet.source.value(&["odoo", "mail"]),
                message.to_owned(),
                "add `from = \"erp@acme.example\"`".to_owned(),
            );
        }
        let is_filtered = |from: &str| {
            let domain = from.rsplit_once('@').map_or("", |(_, domain)| domain);
            !mail.from_filter.is_empty() && !mail.from_filter.iter().any(|sender| sender == from || sender == domain)
        };
        if let Some(from) = mail.from.as_deref().filter(|from| is_address(from) && is_filtered(from)) {
            let message = format!("[odoo.mail] `from_filter` does not have `{from}`, the address of other senders");
            self.error(at("from_filter"), message, "add its domain to `from_filter`".to_owned());
        }
    }
}

/// Returns whether a text is a mail domain in lower case.
fn is_domain(text: &str) -> bool {
    is_host(text) && text.contains('.') && !text.contains(|c: char| c.is_ascii_uppercase())
}

/// Returns whether a text is what stands before the `@`, as Odoo stores it.
fn is_name(text: &str) -> bool {
    let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "_+-".contains(c);
    text.len() <= 64 && text.split('.').all(|part| !part.is_empty() && part.chars().all(fits))
}

/// Returns whether a text is a mail address without a name, in lower case.
fn is_address(text: &str) -> bool {
    text.len() <= 254 && text.split_once('@').is_some_and(|(name, domain)| is_name(name) && is_domain(domain))
}

#[cfg(test)]
mod tests {
    use crate::{Fleet, Profiles, Severity, lint};

    /// Returns the errors and warnings about `[odoo.mail]`: severity, the underlined text, and the message.
    fn found(mail: &str) -> Vec<(Severity, String)> {
        let text =
            format!("name = \"x\"\n[odoo.mail]\n{mail}\n[groups.hub]\ncount = 1\nendpoints = [\"hub.acme.com\"]\n");
        let fleet = Fleet::parse("f", text.as_bytes()).unwrap_or_else(|e| panic!("{mail}: {}", e.message));
        let found = lint(&fleet, &Profiles::new()).into_iter().filter(|d| d.message.contains("[odoo.mail]"));
        found.map(|d| (d.severity, d.render(false))).collect()
    }

    fn one(mail: &str, severity: Severity, message: &str, underlined: &str) {
        let all = found(mail);
        let [(found, shown)] = &all[..] else { panic!("{mail}: {all:?}") };
        assert!(*found == severity && shown.contains(message), "{shown}");
        assert!(shown.lines().any(|line| line.contains('|') && line.contains(underlined)), "{shown}");
    }

    fn with(more: &str) -> String {
        format!("smarthost = \"mail.acme.com:587\"\nfrom = \"erp@acme.com\"\n{more}")
    }

    #[test]
    fn errors_underline_the_value() {
        let error = |mail: &str, message: &str, at: &str| one(mail, Severity::Error, message, at);
        error("smarthost = \"mail.acme.com\"\nfrom = \"a@b.de\"", "is not a mail server", "mail.acme.com");
        error("smarthost = \"mail.acme.com:465\"\nfrom = \"a@b.de\"", "needs TLS from the start", "465");
        error(&with("user = \"\""), "`user` is empty", "user = ");
        error(&with("").replace("erp@acme.com", "ERP <erp@acme.com>"), "is not a mail address", "ERP <erp");
        error(&with("domain = \"Acme.com\""), "is not a mail domain", "Acme.com");
        error(&with("catchall = \"catchall\""), "`catchall` needs `domain`", "catchall");
        error(&with("domain = \"acme.com\"\nbounce = \"a@b\""), "is not a name in `domain`", "a@b");
        let same = "domain = \"acme.com\"\nbounce = \"all\"\ncatchall = \"all\"";
        error(&with(same), "are the same address", "bounce = ");
        error(&with("from_filter = [\"acme.com\", \"x y\"]"), "is neither a domain nor an address", "x y");
        error(&with("from_filter = [\"acme.de\"]"), "does not have `erp@acme.com`", "acme.de");
    }

    #[test]
    fn a_server_without_tls_or_without_a_sender_is_a_warning() {
        one(&with("tls = \"none\""), Severity::Warning, "can read Odoo's mail", "none");
        one("smarthost = \"mail.acme.com:25\"", Severity::Warning, "neither `from` nor `domain`", "[odoo.mail]");
        let all = found(&with("tls = \"none\"\nuser = \"u\""));
        assert!(all.iter().any(|(s, text)| *s == Severity::Error && text.contains("needs TLS")), "{all:?}");
    }

    #[test]
    fn valid_servers_have_no_error() {
        for good in [
            with("user = 'ACME\\erp'\ndomain = \"acme.com\"\ncatchall = \"re.plies+erp\"\nbounce = \"bounce\""),
            with("from_filter = [\"acme.com\"]").replace("587", "465") + "\ntls = \"tls\"",
            with("tls = \"tls\"").replace("587", "4650"),
            "smarthost = \"[2001:db8::1]:25\"\ndomain = \"acme.com\"".to_owned(),
        ] {
            assert_eq!(found(&good), [], "{good}");
        }
    }

    #[test]
    fn password_in_the_file_is_an_error_that_names_the_command() {
        let text = "name = \"x\"\n[odoo.mail]\nsmarthost = \"a.de:25\"\npassword = \"hunter2\"\n[groups]\n";
        let error = Fleet::parse("f", text.as_bytes()).unwrap_err();
        assert_eq!((error.line, error.message.as_str()), (4, "unknown key `password`"));
        assert!(error.help.unwrap().contains("`bakehouse secret odoo_mail`"));
    }
}
