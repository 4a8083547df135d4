//! A test mail of an app node.

use serde::{Deserialize, Serialize};

/// `POST`, operator, on an app node, with a [`MailTestRequest`]: [`super::ExecEvent`]s, one a line. The last line of
/// `stdout` is a [`MailReport`]. Nodes of earlier versions reply 404.
pub const MAIL_TEST_PATH: &str = "/v1/mail/test";
/// Longest address, in bytes (RFC 5321).
pub const LONGEST_MAIL_ADDRESS: usize = 254;
/// Seconds after which the node stops the test. Odoo waits for up to 60 s for each answer of a mail server.
pub const MAIL_TEST_SECONDS: u32 = 150;

/// A mail to send.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MailTestRequest {
    /// Address of the recipient.
    pub to: String,
}

/// What the mail server answered.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct MailReport {
    /// Host and port of the mail server.
    pub server: String,
    /// `fleet` for the server of `[odoo.mail]`, or `odoo` for one of Odoo's settings.
    pub source: String,
    /// Name of the server in Odoo's settings; empty for that of `[odoo.mail]`.
    pub name: String,
    /// Sender that the mail shows.
    pub sender: String,
    /// Address to which the mail returns if it cannot be delivered.
    pub envelope: String,
    /// Recipient.
    pub to: String,
    /// Step that failed; empty if the server has accepted the mail. `no_server`, `no_sender`, `name`, `connection`,
    /// `greeting`, `starttls`, `tls`, `certificate`, `login`, `sender`, `recipient`, `content` or `odoo`.
    pub step: String,
    /// Answer of the mail server, word for word, or the error of the node. Up to 600 characters.
    pub message: String,
}

/// Returns whether a text is a mail address that a node sends to: ASCII, one `@`, and no character with a meaning in a
/// header or in a shell.
///
/// ```
/// # use fleet::node_api::is_mail_address;
/// assert!(is_mail_address("anna+test@mail.example.com"));
/// for bad in ["anna", "@example.com", "a@b@c", "-a@b", "a b@c", "a@b,c@d", "<a@b>", "a@b\r\nBcc: c@d", "ä@b"] {
///     assert!(!is_mail_address(bad), "{bad}");
/// }
/// ```
#[must_use]
pub fn is_mail_address(text: &str) -> bool {
    let fits = |part: &str| {
        !part.is_empty()
            && !part.starts_with(['-', '.'])
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "!#%&'*+-./=?^_{|}~".contains(c))
    };
    text.len() <= LONGEST_MAIL_ADDRESS && text.split_once('@').is_some_and(|(name, host)| fits(name) && fits(host))
}
