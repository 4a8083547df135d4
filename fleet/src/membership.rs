//! Credentials of a member: its certificate, and the passwords of its services.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::alerts::AlertKey;
use crate::mail::MailKey;

/// Format of a node's sealed `state.json`. The image's manifest has it, so `bakehouse plan` can warn that an older
/// image cannot read the state of a newer one.
pub const STATE_VERSION: u16 = 3;

/// Certificate and passwords of one node. They must not get into an image or a log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Membership {
    /// Certificates and key of the node.
    pub tls: Tls,
    /// Passwords of the services that run on the node.
    pub secrets: Secrets,
}

/// Certificates and key, PEM. The certificate has the node's name, its mesh address, and on hubs the VIP.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tls {
    /// The fleet's root certificate.
    pub ca: String,
    /// The node's certificate, followed by the issuer's.
    pub cert: String,
    /// The certificate's private key, PKCS #8.
    pub key: String,
    /// Root certificate that etcd trusts for clients, see [`crate::etcd_client_anchor`].
    #[serde(default)]
    pub etcd_clients: String,
}

/// Passwords of the fleet's services. Nodes that have a password have the same one.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Secrets {
    /// PostgreSQL's superuser, which only Patroni uses.
    pub postgres: String,
    /// PostgreSQL's user for replication.
    pub replication: String,
    /// PostgreSQL's user for `pg_rewind`.
    pub rewind: String,
    /// PostgreSQL's user for Odoo.
    pub odoo: String,
    /// Odoo's master password. The database manager is off, so nothing asks for it.
    pub odoo_master: String,
    /// Initial password of Odoo's administrator.
    pub odoo_admin: String,
    /// PostgreSQL's user that reads statistics.
    pub metrics: String,
    /// Access key of `[backup.s3]`; empty without it.
    pub s3_key: String,
    /// Secret key of `[backup.s3]`; empty without it.
    pub s3_secret: String,
    /// Password of etcd's user `root`, for hubs. Empty in files of versions without etcd users.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub etcd_root: String,
    /// Password of etcd's user `patroni`, which can read and write only below Patroni's prefix.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub etcd_patroni: String,
    /// Key that decrypts the passwords of `[alerts]`, for monitors. Hubs and the fleet key derive it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub alerts: String,
    /// Key that decrypts the password of `[odoo.mail]`, for app nodes. Hubs and the fleet key derive it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub mail: String,
}

impl Membership {
    /// Returns sample credentials, with which the builder renders configurations to check them.
    #[must_use]
    pub fn sample() -> Self {
        Self {
            tls: Tls {
                ca: "sample CA\n".into(),
                cert: "sample certificate\n".into(),
                key: "sample key\n".into(),
                etcd_clients: "sample CA for etcd's clients\n".into(),
            },
            secrets: Secrets::sample(),
        }
    }
}

impl Secrets {
    /// Returns sample passwords, such as `sample-postgres`.
    #[must_use]
    pub fn sample() -> Self {
        let secret = |name: &str| format!("sample-{name}");
        Self {
            postgres: secret("postgres"),
            replication: secret("replication"),
            rewind: secret("rewind"),
            odoo: secret("odoo"),
            odoo_master: secret("odoo-master"),
            odoo_admin: secret("odoo-admin"),
            metrics: secret("metrics"),
            s3_key: secret("s3-key"),
            s3_secret: secret("s3-secret"),
            etcd_root: secret("etcd-root"),
            etcd_patroni: secret("etcd-patroni"),
            alerts: secret("alerts"),
            mail: secret("mail"),
        }
    }

    /// Returns the passwords that a node with these roles needs. The others are empty.
    #[must_use]
    pub fn for_roles(&self, roles: &[String]) -> Self {
        let needs = |wanted: &[&str], secret: &str| {
            let needed = roles.iter().any(|r| wanted.contains(&r.as_str()));
            if needed { secret.to_owned() } else { String::new() }
        };
        Self {
            postgres: needs(&["db"], &self.postgres),
            replication: needs(&["db"], &self.replication),
            rewind: needs(&["db"], &self.rewind),
            // The db nodes create the user.
            odoo: needs(&["db", "app"], &self.odoo),
            odoo_master: needs(&["app"], &self.odoo_master),
            odoo_admin: needs(&["app"], &self.odoo_admin),
            metrics: needs(&["db", "monitor"], &self.metrics),
            s3_key: needs(&["db"], &self.s3_key),
            s3_secret: needs(&["db"], &self.s3_secret),
            etcd_root: needs(&["hub"], &self.etcd_root),
            etcd_patroni: needs(&["hub", "db"], &self.etcd_patroni),
            alerts: self.alert_key().map_or_else(String::new, |key| needs(&["monitor"], key.text())),
            mail: self.mail_key().map_or_else(String::new, |key| needs(&["app"], key.text())),
        }
    }

    /// Returns the key for the passwords of `[alerts]`: the granted one, or the one that hubs derive. `None` on nodes
    /// with neither.
    #[must_use]
    pub fn alert_key(&self) -> Option<AlertKey> {
        AlertKey::granted(&self.alerts).or_else(|| AlertKey::derive(&self.etcd_root))
    }

    /// Returns the key for the password of `[odoo.mail]`: the granted one, or the one that hubs derive. `None` on nodes
    /// with neither.
    #[must_use]
    pub fn mail_key(&self) -> Option<MailKey> {
        MailKey::granted(&self.mail).or_else(|| MailKey::derive(&self.etcd_root))
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tls(…)")
    }
}

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secrets(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn node_gets_only_passwords_of_its_roles() {
        let app = Secrets::sample().for_roles(&["app".to_owned()]);
        assert_eq!((app.odoo.as_str(), app.postgres.as_str()), ("sample-odoo", ""));
        assert_eq!((app.etcd_root.as_str(), app.etcd_patroni.as_str()), ("", ""));
        let db = Secrets::sample().for_roles(&["voter".to_owned(), "db".to_owned()]);
        assert_eq!((db.etcd_root.as_str(), db.etcd_patroni.as_str()), ("", "sample-etcd-patroni"));
        let hub = Secrets::sample().for_roles(&["voter".to_owned(), "hub".to_owned()]);
        assert_eq!((hub.etcd_root.as_str(), hub.etcd_patroni.as_str()), ("sample-etcd-root", "sample-etcd-patroni"));
        assert_eq!((hub.alerts.as_str(), db.alerts.as_str()), ("", ""));
        let monitor = Secrets::sample().for_roles(&["monitor".to_owned()]);
        assert_eq!((monitor.alerts.as_str(), monitor.etcd_root.as_str()), ("sample-alerts", ""));
        let derived = Secrets { alerts: String::new(), ..Secrets::sample() };
        let granted = derived.for_roles(&["monitor".to_owned()]);
        assert!(granted.alert_key().is_some() && granted.alert_key() == derived.alert_key());
        assert!(db.alert_key().is_none());
        assert_eq!((app.mail.as_str(), monitor.mail.as_str(), db.mail.as_str()), ("sample-mail", "", ""));
        let derived = Secrets { mail: String::new(), ..Secrets::sample() };
        assert_eq!(derived.for_roles(&["app".to_owned()]).mail_key(), derived.mail_key());
        assert!(app.alert_key().is_none() && monitor.mail_key().is_none());
        let both = Secrets::sample().for_roles(&["db".to_owned(), "app".to_owned()]);
        assert_eq!((both.odoo_admin.as_str(), both.rewind.as_str()), ("sample-odoo-admin", "sample-rewind"));
    }

    #[test]
    fn debug_shows_no_secret() {
        let shown = format!("{:?}", Membership::sample());
        assert_eq!(shown, "Membership { tls: Tls(…), secrets: Secrets(…) }");
    }
}
