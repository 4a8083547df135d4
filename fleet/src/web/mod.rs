//! `[web]`: HTTP and HTTPS of the hubs, and the certificate for browsers.

mod secrets;

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

pub use secrets::{HubKey, HubSecretError, HubSecrets};

#[cfg(feature = "schema")]
use crate::form;

/// `[web]`: HTTP and HTTPS of the hubs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct Web {
    /// Name that users type. The certificate for browsers has this name, and DNS resolves it to the hubs. Example:
    /// `"erp.example.com"`. Default: none, and hubs show a certificate of the fleet's own authority.
    #[cfg_attr(feature = "schema", schemars(with = "Option<form::Host>", extend("x-need" = "should")))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Whether the hubs order the certificate for `name` by ACME (RFC 8555), and renew it. Default: `false`.
    #[serde(skip_serializing_if = "is_false")]
    pub acme: bool,
    /// Path of a PEM file, relative to `fleet.toml`: the certificate for `name`, followed by those of its authorities.
    /// `bakehouse secret web_key` stores the private key. Not together with `acme`. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub certificate: Option<String>,
    /// Certificate authority that `acme` uses.
    #[serde(skip_serializing_if = "Authority::is_default")]
    pub authority: Authority,
    /// Whether hubs redirect HTTP requests to HTTPS, except those for `/web/health`. Default: `true` with `name`, else
    /// `false`.
    pub redirect: Option<bool>,
    /// Whether hubs send `Strict-Transport-Security` for a year: browsers then refuse HTTP for this name. Default: as
    /// `redirect`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hsts: Option<bool>,
    /// Number of connections that one address may have to a hub's ports 80 and 443 at the same time, 10 to 3000. One
    /// address may open four times as many connections in 10 s. An IPv6 /64 counts as one address. Raise the value
    /// if many users share one address. Default: `150`.
    #[cfg_attr(feature = "schema", schemars(range(min = 10, max = 3000)))]
    pub connections: u16,
    /// Number of attempts to log in that one address may make in 5 min, 10 to 10000. A quarter of them may fail. Hubs
    /// reply to further attempts with status 429. A browser that has logged in before has a limit of its own for the same
    /// user. Raise the value if many users share one address. Default: `120`.
    #[cfg_attr(feature = "schema", schemars(range(min = 10, max = 10_000)))]
    pub logins: u16,
}

/// `[web.authority]`: the certificate authority that `[web] acme` uses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct Authority {
    /// URL of the authority's ACME directory. Default: `"https://acme-v02.api.letsencrypt.org/directory"`.
    #[cfg_attr(feature = "schema", schemars(with = "form::HttpsUrl"))]
    pub directory: String,
    /// Mail address of the account, to which the authority sends messages. Default: none.
    pub email: Option<String>,
    /// Key identifier for external-account binding. `bakehouse secret acme_eab` stores the HMAC key. Default: none.
    pub eab_key_id: Option<String>,
    /// Path of a PEM file, relative to `fleet.toml`: the root certificate that signed the directory's own TLS
    /// certificate. Default: the authorities that Debian trusts.
    pub ca: Option<String>,
}

impl Default for Web {
    fn default() -> Self {
        Self {
            name: None,
            acme: false,
            certificate: None,
            authority: Authority::default(),
            redirect: None,
            hsts: None,
            connections: 150,
            logins: 120,
        }
    }
}

impl Default for Authority {
    fn default() -> Self {
        let directory = "https://acme-v02.api.letsencrypt.org/directory".to_owned();
        Self { directory, email: None, eab_key_id: None, ca: None }
    }
}

impl Authority {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl Web {
    /// Name of the secret with the HMAC key for external-account binding, base64url.
    pub const EAB: &str = "acme_eab";
    /// Name of the secret with the private key of `certificate`, PEM.
    pub const KEY: &str = "web_key";
    /// Path in the image of the file `authority.ca`.
    pub const CA_FILE: &str = "usr/share/bakehouse/acme-ca.crt";

    /// Returns the settings with the defaults that follow from other keys.
    #[must_use]
    pub fn resolved(self) -> Self {
        let redirect = self.redirect.unwrap_or(self.name.is_some());
        // Without the section, the settings have no key that earlier versions do not know.
        let hsts = self.hsts.or(redirect.then_some(true));
        Self { redirect: Some(redirect), hsts, ..self }
    }

    /// Returns the names of the secrets that the settings need.
    #[must_use]
    pub fn secrets(&self) -> BTreeSet<&'static str> {
        let eab = (self.acme && self.authority.eab_key_id.is_some()).then_some(Self::EAB);
        eab.into_iter().chain(self.certificate.is_some().then_some(Self::KEY)).collect()
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_false(value: &bool) -> bool {
    !*value
}
