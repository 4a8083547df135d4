//! `[odoo.mail]`: the mail server of Odoo, and its password, encrypted for the app nodes.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::alerts::{AlertKey, AlertSecretError, AlertSecrets, MailTls};
#[cfg(feature = "schema")]
use crate::form;

/// `[odoo.mail]`: the server that sends Odoo's mail, and the addresses to which answers go. Odoo verifies the server's
/// certificate. `bakehouse mail test ADDRESS` sends a mail. An outgoing server in Odoo's settings has priority over this
/// one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Mail {
    /// Mail server, `"host:port"`. Example: `"mail.example:587"`.
    pub smarthost: String,
    /// User at the mail server. `bakehouse secret odoo_mail` stores the password. Default: none, and Odoo does not log
    /// in.
    #[serde(default)]
    pub user: Option<String>,
    /// How the connection is encrypted: `"starttls"` from the command `STARTTLS` on, `"tls"` from the start (usually
    /// port 465), or `"none"`. Default: `"starttls"`.
    #[serde(default)]
    pub tls: MailTls,
    /// Path of a PEM file, relative to `fleet.toml`: the certificate of the authority that signed the mail server's
    /// certificate. Default: the authorities that Debian trusts.
    #[serde(default)]
    pub ca: Option<String>,
    /// Address of the sender of mails that have no other sender. Example: `"erp@example.com"`. Default: none, and Odoo
    /// takes `notifications` at `domain`.
    #[cfg_attr(feature = "schema", schemars(with = "Option<form::MailAddress>"))]
    #[serde(default)]
    pub from: Option<String>,
    /// Mail domain of the company: the domain of `catchall` and `bounce`, and of the aliases of records. Example:
    /// `"example.com"`. Default: none, and the domain is what a user sets in Odoo.
    #[cfg_attr(feature = "schema", schemars(with = "Option<form::MailDomain>"))]
    #[serde(default)]
    pub domain: Option<String>,
    /// Name in `domain` to which answers go. Default: none, and the name is what a user sets in Odoo, at first
    /// `catchall`.
    #[cfg_attr(feature = "schema", schemars(with = "Option<form::MailName>"))]
    #[serde(default)]
    pub catchall: Option<String>,
    /// Name in `domain` to which mail servers return what they cannot deliver. Default: none, and the name is what a user
    /// sets in Odoo, at first `bounce`.
    #[cfg_attr(feature = "schema", schemars(with = "Option<form::MailName>"))]
    #[serde(default)]
    pub bounce: Option<String>,
    /// Domains and addresses that the mail server accepts as senders. Odoo replaces other senders by `from`. Example:
    /// `["example.com"]`. Default: none, and the server accepts all.
    #[cfg_attr(feature = "schema", schemars(with = "Vec<form::MailSender>"))]
    #[serde(default)]
    pub from_filter: Vec<String>,
}

impl Mail {
    /// Name of the secret with the password.
    pub const SECRET: &str = "odoo_mail";
    /// Path of the file of `ca` in the image, without a leading `/`.
    pub const CA_FILE: &str = "usr/share/bakehouse/mail-ca.crt";

    /// Returns host and port of the server. The host has no brackets.
    #[must_use]
    pub fn server(&self) -> Option<(&str, u16)> {
        let (host, port) = self.smarthost.rsplit_once(':')?;
        let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        Some((host, port.parse().ok()?))
    }
}

/// What the templates of app nodes take from `[odoo.mail]` in addition to its keys.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct MailServer {
    /// Host of the server, without brackets.
    pub host: String,
    /// Port of the server.
    pub port: u16,
    /// Password; empty without `user`, and on nodes that cannot decrypt it.
    pub password: String,
}

/// Key with which the operator encrypts the password and the app nodes decrypt it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MailKey(AlertKey);

impl MailKey {
    /// The key in [`crate::Secrets::sample`]. With it, the password has a sample value.
    pub const SAMPLE: &str = "sample-mail";

    /// Derives the key from the password of etcd's user `root`, which only hubs have.
    #[must_use]
    pub fn derive(etcd_root: &str) -> Option<Self> {
        AlertKey::derive_for(etcd_root, b"odoo mail, v1").map(Self)
    }

    /// Reads the key that a hub has granted; `None` if the text is empty.
    #[must_use]
    pub fn granted(text: &str) -> Option<Self> {
        AlertKey::granted(text).map(Self)
    }

    /// Returns the text of the key, for a grant.
    #[must_use]
    pub fn text(&self) -> &str {
        self.0.text()
    }
}

/// The encrypted password: `odoo.secrets` beside `fleet.toml`, and a part of the topology in the images.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MailSecrets(AlertSecrets);

impl MailSecrets {
    /// Name of the file, beside `fleet.toml`.
    pub const FILE: &str = "odoo.secrets";

    /// Reads the file.
    ///
    /// # Errors
    /// If the text is not a TOML table of texts.
    pub fn parse(text: &str) -> Result<Self, AlertSecretError> {
        AlertSecrets::parse(text).map(Self)
    }

    /// Returns the content of the file.
    #[must_use]
    pub fn file(&self) -> String {
        let about = "# Secrets of [odoo.mail], encrypted for the fleet's app nodes: `bakehouse secret` writes this \
                     file.\n# You may commit it.\n";
        self.0.file_with(about)
    }

    /// Whether there is no password.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the secrets without those that `[odoo.mail]` does not use.
    #[must_use]
    pub fn used_by(&self, mail: Option<&Mail>) -> Self {
        let used = mail.filter(|mail| mail.user.is_some()).map(|_| Mail::SECRET);
        Self(self.0.only(&used.into_iter().collect::<BTreeSet<_>>()))
    }

    /// Encrypts the password, and keeps it.
    ///
    /// # Errors
    /// If the password is empty, longer than 4096 bytes or of several lines, or begins or ends with a space, which Odoo
    /// would remove.
    pub fn seal(&mut self, key: &MailKey, fleet: &str, password: &str) -> Result<(), AlertSecretError> {
        if password.trim() != password || password.eq_ignore_ascii_case("false") {
            let why = "Odoo cannot read a password that begins or ends with a space, or is `False`";
            return Err(AlertSecretError::new(format!("cannot encrypt the secret `{}`: {why}", Mail::SECRET)));
        }
        self.0.seal(&key.0, fleet, Mail::SECRET, password)
    }

    /// Removes the password. Returns whether there was one.
    pub fn remove(&mut self) -> bool {
        self.0.remove(Mail::SECRET)
    }

    /// Returns the password, for the templates; an empty text if it cannot be decrypted.
    #[must_use]
    pub fn password(&self, key: Option<&MailKey>, fleet: &str) -> String {
        match key {
            Some(key) if key.text() == MailKey::SAMPLE => "sample-odoo-mail".to_owned(),
            Some(key) => self.0.open(&key.0, fleet, Mail::SECRET).unwrap_or_default(),
            None => String::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_app_nodes_decrypt_the_password() {
        let key = MailKey::derive("password of etcd").unwrap();
        let mut secrets = MailSecrets::default();
        secrets.seal(&key, "acme", "p\"ss; w=rd%").unwrap();
        assert_eq!(secrets.password(Some(&key), "acme"), "p\"ss; w=rd%");
        let monitors = AlertKey::derive("password of etcd").unwrap();
        assert_eq!(secrets.password(MailKey::granted(monitors.text()).as_ref(), "acme"), "");
        assert_eq!(secrets.password(Some(&key), "other"), "");
        assert_eq!(secrets.password(None, "acme"), "");
        assert_eq!(secrets.password(MailKey::granted(MailKey::SAMPLE).as_ref(), "acme"), "sample-odoo-mail");
        let text = secrets.file();
        assert!(text.starts_with("# Secrets of [odoo.mail]") && !text.contains("ss; w"), "{text}");
        assert_eq!(MailSecrets::parse(&text).unwrap(), secrets);
        assert!(secrets.remove() && secrets.is_empty() && !secrets.remove());
    }

    #[test]
    fn passwords_that_odoo_would_change_are_refused() {
        let key = MailKey::derive("x").unwrap();
        for bad in [" a", "a ", "False", "false", "", "a\nb"] {
            MailSecrets::default().seal(&key, "acme", bad).unwrap_err();
        }
    }

    #[test]
    fn server_is_split_into_host_and_port() {
        let server = |smarthost: &str| {
            let mail: Mail = toml::from_str(&format!("smarthost = \"{smarthost}\"")).unwrap();
            mail.server().map(|(host, port)| (host.to_owned(), port))
        };
        assert_eq!(server("mail.example:587"), Some(("mail.example".to_owned(), 587)));
        assert_eq!(server("[2001:db8::1]:25"), Some(("2001:db8::1".to_owned(), 25)));
        assert_eq!(server("mail.example"), None);
    }

    #[test]
    fn password_of_a_server_without_a_user_is_left_out() {
        let mut mail: Mail = toml::from_str("smarthost = \"a:25\"\nuser = \"u\"").unwrap();
        let mut secrets = MailSecrets::default();
        secrets.seal(&MailKey::derive("x").unwrap(), "acme", "p").unwrap();
        assert_eq!(secrets.used_by(Some(&mail)), secrets);
        mail.user = None;
        assert!(secrets.used_by(Some(&mail)).is_empty() && secrets.used_by(None).is_empty());
    }
}
