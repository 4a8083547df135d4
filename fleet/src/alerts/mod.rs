//! `[alerts]`: receivers of alerts, and their passwords.

mod secrets;

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

pub use secrets::{AlertKey, AlertSecretError, AlertSecrets};

#[cfg(feature = "schema")]
use crate::form;

/// `[alerts]`: receivers of alerts. `bakehouse secret` stores their passwords, tokens and secret addresses, encrypted
/// for the monitors.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct Alerts {
    /// Receiver of alerts by e-mail. Default: none.
    #[cfg_attr(feature = "schema", schemars(extend("x-need" = "should")))]
    pub email: Option<Email>,
    /// Chats of Telegram: `[[alerts.telegram]]`. Default: none.
    pub telegram: Vec<Telegram>,
    /// Channels of Slack, or of a service that accepts Slack's webhooks (Mattermost, Rocket.Chat):
    /// `[[alerts.slack]]`. Default: none.
    pub slack: Vec<Slack>,
    /// Rooms of Matrix, by the bridge matrix-hookshot: `[[alerts.matrix]]`. Default: none.
    pub matrix: Vec<Matrix>,
    /// Topics of ntfy: `[[alerts.ntfy]]`. Default: none.
    pub ntfy: Vec<Ntfy>,
    /// Addresses to which Alertmanager posts its JSON. Example: `["https://chat.example/hook"]`. Default: none.
    #[cfg_attr(feature = "schema", schemars(with = "Vec<form::Url>", extend("x-need" = "should")))]
    pub webhooks: Vec<String>,
    /// Address of a dead man's switch. The monitor calls it every minute while it receives metrics of the fleet, and
    /// the service behind it has to raise an alarm when no call arrives. Default: none.
    #[cfg_attr(feature = "schema", schemars(with = "Option<form::Url>", extend("x-need" = "should")))]
    pub dead_man: Option<String>,
    /// Address of your copy of the page `alerts.html` of this documentation. Messages then have a link to the part of
    /// the page about the alert. Example: `"https://docs.acme.example/alerts.html"`. Default: none, and messages have
    /// the instructions without a link.
    #[cfg_attr(feature = "schema", schemars(with = "Option<form::Url>"))]
    pub page: Option<String>,
}

/// `[alerts.email]`: alerts by e-mail.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Email {
    /// Address of the receiver. Several addresses have commas between them.
    pub to: String,
    /// Address of the sender.
    pub from: String,
    /// Mail server, `"host:port"`. Example: `"mail.example:587"`.
    pub smarthost: String,
    /// User at the mail server. `bakehouse secret email` stores the password. Default: none, and the monitor does not
    /// log in.
    #[serde(default)]
    pub user: Option<String>,
    /// How the connection is encrypted: `"starttls"` from the command `STARTTLS` on, `"tls"` from the start (port 465
    /// only), or `"none"`. Default: `"starttls"`.
    #[serde(default)]
    pub tls: MailTls,
    /// Name with which the monitor greets the mail server (`EHLO`). Default: none, and the name is `localhost`.
    #[cfg_attr(feature = "schema", schemars(with = "Option<form::Host>"))]
    #[serde(default)]
    pub hello: Option<String>,
}

/// Encryption of the connection to a mail server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum MailTls {
    /// The client requires `STARTTLS` (RFC 3207).
    #[default]
    Starttls,
    /// TLS from the start (RFC 8314).
    Tls,
    /// No encryption.
    None,
}

/// `[[alerts.telegram]]`: a chat of Telegram. A bot sends the messages.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Telegram {
    /// Number of the chat. Groups have negative numbers. Example: `-1001234567890`.
    #[cfg_attr(feature = "schema", schemars(extend("x-type" = "number")))]
    pub chat: i64,
    /// Name of the secret with the bot's token. Default: `"telegram"`.
    #[cfg_attr(feature = "schema", schemars(with = "form::Identifier"))]
    #[serde(default = "telegram")]
    pub secret: String,
}

/// `[[alerts.slack]]`: a channel of Slack. The secret is the address of an incoming webhook.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Slack {
    /// Name of the secret with the webhook's address. Default: `"slack"`.
    #[cfg_attr(feature = "schema", schemars(with = "form::Identifier"))]
    #[serde(default = "slack")]
    pub secret: String,
    /// Channel, for services that do not take it from the webhook. Example: `"#operations"`. Default: none.
    #[serde(default)]
    pub channel: Option<String>,
}

/// `[[alerts.matrix]]`: a room of Matrix. The secret is the address of an inbound webhook of matrix-hookshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Matrix {
    /// Name of the secret with the webhook's address. Default: `"matrix"`.
    #[cfg_attr(feature = "schema", schemars(with = "form::Identifier"))]
    #[serde(default = "matrix")]
    pub secret: String,
}

/// `[[alerts.ntfy]]`: a topic of ntfy. The server has to be version 2.10 or later.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Ntfy {
    /// Name of the topic.
    #[cfg_attr(feature = "schema", schemars(with = "form::Topic"))]
    pub topic: String,
    /// Address of the server. Default: `"https://ntfy.sh"`.
    #[cfg_attr(feature = "schema", schemars(with = "form::Url"))]
    #[serde(default = "ntfy")]
    pub url: String,
    /// Name of the secret with an access token of the server. Default: none, for a topic to which every client may
    /// write.
    #[cfg_attr(feature = "schema", schemars(with = "Option<form::Identifier>"))]
    #[serde(default)]
    pub secret: Option<String>,
}

fn telegram() -> String {
    "telegram".to_owned()
}

fn slack() -> String {
    "slack".to_owned()
}

fn matrix() -> String {
    "matrix".to_owned()
}

fn ntfy() -> String {
    "https://ntfy.sh".to_owned()
}

impl Alerts {
    /// Name of the secret with the password of the mail server.
    pub const EMAIL_SECRET: &str = "email";

    /// Whether alerts reach people.
    #[must_use]
    pub fn has_receiver(&self) -> bool {
        let lists = [self.telegram.len(), self.slack.len(), self.matrix.len(), self.ntfy.len(), self.webhooks.len()];
        self.email.is_some() || lists.iter().any(|count| *count > 0)
    }

    /// Returns the names of the secrets that the receivers need.
    ///
    /// # Examples
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let toml = b"name = \"acme\"\n[[alerts.telegram]]\nchat = -100\n[[alerts.ntfy]]\ntopic = \"acme\"\n[groups]\n";
    /// let fleet = fleet::Fleet::parse("fleet.toml", toml)?;
    /// assert_eq!(fleet.alerts.get_ref().secrets().into_iter().collect::<Vec<_>>(), ["telegram"]);
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn secrets(&self) -> BTreeSet<&str> {
        let email = self.email.iter().filter(|email| email.user.is_some()).map(|_| Self::EMAIL_SECRET);
        let telegram = self.telegram.iter().map(|telegram| telegram.secret.as_str());
        let slack = self.slack.iter().map(|slack| slack.secret.as_str());
        let matrix = self.matrix.iter().map(|matrix| matrix.secret.as_str());
        let ntfy = self.ntfy.iter().filter_map(|ntfy| ntfy.secret.as_deref());
        email.chain(telegram).chain(slack).chain(matrix).chain(ntfy).collect()
    }
}
