//! Rules of `[alerts]`.

use super::Lint;
use super::mail::TLS_PORT;
use super::names::is_host;
use super::services::is_identifier;
use crate::alerts::{Email, MailTls, Slack};

impl Lint<'_> {
    /// Reports invalid receivers of alerts, and a monitor without a receiver.
    pub(super) fn alerts(&mut self) {
        let alerts = self.fleet.alerts.get_ref().clone();
        let hooks = alerts
            .webhooks
            .iter()
            .enumerate()
            .map(|(number, url)| (vec!["webhooks".to_owned(), number.to_string()], url));
        let one = |key: &str, url| (vec![key.to_owned()], url);
        let dead_man = alerts.dead_man.iter().map(|url| one("dead_man", url));
        let page = alerts.page.iter().map(|url| one("page", url));
        let servers = alerts.ntfy.iter().enumerate();
        let servers =
            servers.map(|(number, ntfy)| (vec!["ntfy".to_owned(), number.to_string(), "url".to_owned()], &ntfy.url));
        for (path, url) in hooks.chain(dead_man).chain(page).chain(servers) {
            if !(url.starts_with("http://") || url.starts_with("https://")) || url.contains(char::is_whitespace) {
                self.alert_error(
                    &path,
                    format!("[alerts] `{url}` is not an address"),
                    "begin it with https:// or http://",
                );
            }
        }
        if let Some(email) = &alerts.email {
            self.email(email);
        }
        for (number, ntfy) in alerts.ntfy.iter().enumerate() {
            let is_topic = (1..=64).contains(&ntfy.topic.len())
                && ntfy.topic.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c));
            if !is_topic {
                self.alert_error(
                    &["ntfy".to_owned(), number.to_string(), "topic".to_owned()],
                    format!("[[alerts.ntfy]] `{}` is not a topic", ntfy.topic.escape_debug()),
                    "use 1 to 64 letters, digits, `-` and `_`",
                );
            }
        }
        self.secret_names();
        let watched = self.topology.nodes.iter().any(|n| n.has_role("monitor"));
        if watched && !alerts.has_receiver() {
            self.warning(
                self.fleet.source.value(&["alerts"]),
                "[alerts] has no receiver: failures raise no message".to_owned(),
                "add `[alerts] webhooks = [\"https://…\"]` or `[alerts.email]`".to_owned(),
            );
        }
    }

    /// Reports invalid addresses and combinations that the mail server or Alertmanager would refuse.
    fn email(&mut self, email: &Email) {
        let at = |key: &str| ["email".to_owned(), key.to_owned()];
        for (key, address) in [("to", &email.to), ("from", &email.from)] {
            if !address.contains('@') || address.contains(|c: char| c.is_control() || c == '"') {
                let message = format!("[alerts.email] `{}` is not a mail address", address.escape_debug());
                self.alert_error(&at(key), message, "write it as \"name@host\"");
            }
        }
        let server = self.mail_server(["alerts", "email"], &email.smarthost, email.tls, email.user.as_deref());
        let Some(port) = server else { return };
        // Alertmanager starts TLS at once on port 465, and on no other port.
        if email.tls == MailTls::Tls && port != TLS_PORT {
            let message = format!("[alerts.email] tls = \"tls\" does not work with port {port}");
            self.alert_error(&at("tls"), message, "use port 465, or `tls = \"starttls\"`");
        }
        if let Some(hello) = email.hello.as_ref().filter(|hello| !is_host(hello)) {
            let message = format!("[alerts.email] `{}` is not a host name", hello.escape_debug());
            self.alert_error(&at("hello"), message, "write the name of a host, such as \"fleet.acme.example\"");
        }
        if email.tls == MailTls::None {
            let warning = "[alerts.email] tls = \"none\": everyone on the path to the mail server can read the alerts";
            self.warning(self.fleet.source.value(&["alerts", "email", "tls"]), warning.to_owned(), None);
        }
    }

    /// Reports secrets with invalid names, and two channels with one address.
    fn secret_names(&mut self) {
        let alerts = self.fleet.alerts.get_ref().clone();
        let telegram = alerts.telegram.iter().map(|receiver| Some(&receiver.secret)).enumerate();
        let slack = alerts.slack.iter().map(|receiver| Some(&receiver.secret)).enumerate();
        let matrix = alerts.matrix.iter().map(|receiver| Some(&receiver.secret)).enumerate();
        let ntfy = alerts.ntfy.iter().map(|receiver| receiver.secret.as_ref()).enumerate();
        let of = |kind: &'static str| move |(number, name)| (kind, number, name);
        let chats = telegram.map(of("telegram")).chain(slack.map(of("slack"))).chain(matrix.map(of("matrix")));
        for (kind, number, name) in chats.chain(ntfy.map(of("ntfy"))) {
            let Some(name) = name else { continue };
            let path = [kind.to_owned(), number.to_string(), "secret".to_owned()];
            if !is_identifier(name) {
                let message = format!("[[alerts.{kind}]] `{}` cannot be a secret's name", name.escape_debug());
                self.alert_error(&path, message, "use lower-case letters, digits and `_`, a letter first");
            }
            let slack = |before: &Slack| before.secret == *name && before.channel == alerts.slack[number].channel;
            let is_twice = match kind {
                "slack" => alerts.slack[..number].iter().any(slack),
                "matrix" => alerts.matrix[..number].iter().any(|before| before.secret == *name),
                _ => false,
            };
            if is_twice {
                let message = format!("[[alerts.{kind}]] two entries have the secret `{name}`, which is one channel");
                let help = format!("give each channel a secret of its own: `secret = \"{kind}_2\"`");
                self.alert_error(&path, message, &help);
            }
        }
    }

    fn alert_error(&mut self, path: &[String], message: String, help: &str) {
        let path: Vec<&str> = std::iter::once("alerts").chain(path.iter().map(String::as_str)).collect();
        self.error(self.fleet.source.value(&path), message, help.to_owned());
    }
}

#[cfg(test)]
mod tests {
    use crate::{Fleet, Profiles, Severity, lint};

    /// Returns the errors and warnings about `[alerts]`: severity, the underlined text, and the message.
    fn found(alerts: &str) -> Vec<(Severity, String)> {
        let text = format!("name = \"x\"\n{alerts}\n[groups.hub]\ncount = 1\nendpoints = [\"hub.acme.com\"]\n");
        let fleet = Fleet::parse("f", text.as_bytes()).unwrap_or_else(|e| panic!("{alerts}: {}", e.message));
        let found = lint(&fleet, &Profiles::new()).into_iter().filter(|d| d.message.contains("[alerts"));
        found.map(|d| (d.severity, d.render(false))).collect()
    }

    fn one(alerts: &str, severity: Severity, message: &str, underlined: &str) {
        let all = found(alerts);
        let [(found, shown)] = &all[..] else { panic!("{alerts}: {all:?}") };
        assert!(*found == severity && shown.contains(message), "{shown}");
        assert!(shown.lines().any(|line| line.contains('|') && line.contains(underlined)), "{shown}");
    }

    fn mail(smarthost: &str, more: &str) -> String {
        format!("[alerts.email]\nto = \"a@acme.com\"\nfrom = \"f@acme.com\"\nsmarthost = \"{smarthost}\"\n{more}\n")
    }

    #[test]
    fn errors_of_receivers_underline_the_value() {
        let error = |alerts: &str, message: &str, at: &str| one(alerts, Severity::Error, message, at);
        error("[alerts]\npage = \"docs.acme.com\"", "`docs.acme.com` is not an address", "docs.acme.com");
        error("[[alerts.ntfy]]\ntopic = \"a\"\nurl = \"ntfy.sh\"", "`ntfy.sh` is not an address", "url = ");
        error("[[alerts.ntfy]]\ntopic = \"a/b\"", "`a/b` is not a topic", "a/b");
        error("[[alerts.telegram]]\nchat = -1\nsecret = \"A B\"", "cannot be a secret's name", "A B");
        error("[[alerts.slack]]\n[[alerts.slack]]\n", "two entries have the secret `slack`", "[alerts.slack]");
        error("[[alerts.matrix]]\n[[alerts.matrix]]\n", "two entries have the secret `matrix`", "[alerts.matrix]");
        error(&mail("mail.acme.com", ""), "is not a mail server", "mail.acme.com");
        error(&mail("mail.acme.com:0", ""), "is not a mail server", "mail.acme.com:0");
        error(&mail("mail.acme.com:587", "tls = \"tls\""), "does not work with port 587", "\"tls\"");
        error(&mail("mail.acme.com:465", ""), "needs TLS from the start", "mail.acme.com:465");
        error(&mail("mail.acme.com:587", "hello = \"a b\""), "is not a host name", "a b");
        error(&mail("mail.acme.com:587", "user = \"\""), "`user` is empty", "user = ");
        error(&mail("mail.acme.com:587", "").replace("a@acme.com", "root"), "`root` is not a mail address", "\"root\"");
    }

    #[test]
    fn unencrypted_mail_is_a_warning_and_with_a_password_an_error() {
        one(&mail("mail.acme.com:25", "tls = \"none\""), Severity::Warning, "can read the alerts", "tls = \"none\"");
        let all = found(&mail("mail.acme.com:25", "tls = \"none\"\nuser = \"u\""));
        assert!(all.iter().any(|(s, text)| *s == Severity::Error && text.contains("needs TLS")), "{all:?}");
    }

    #[test]
    fn valid_receivers_have_no_error() {
        for good in [
            mail("mail.acme.com:587", "user = \"u\"\nhello = \"fleet.acme.com\""),
            mail("mail.acme.com:465", "tls = \"tls\""),
            mail("[2001:db8::1]:25", ""),
            "[[alerts.slack]]\n[[alerts.slack]]\nsecret = \"slack_2\"\n[[alerts.telegram]]\nchat = 7\n".to_owned(),
            "[[alerts.ntfy]]\ntopic = \"acme-alerts_1\"\nsecret = \"ntfy\"\n".to_owned(),
        ] {
            assert_eq!(found(&good), [], "{good}");
        }
    }

    #[test]
    fn password_in_the_file_is_an_error_that_names_the_command() {
        let text = format!("name = \"x\"\n{}[groups]\n", mail("mail.acme.com:587", "password = \"hunter2\""));
        let error = Fleet::parse("f", text.as_bytes()).unwrap_err();
        assert_eq!((error.line, error.message.as_str()), (6, "unknown key `password`"));
        assert!(error.help.unwrap().contains("`bakehouse secret`"));
    }
}
