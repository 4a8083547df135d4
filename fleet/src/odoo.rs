//! `[odoo]`: content of the application images, Odoo's database, and the size of Odoo's processes.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Deserializer, Visitor};
use serde::{Deserialize, Serialize};

#[cfg(feature = "schema")]
use crate::form;
use crate::mail::Mail;
use crate::odoo_code::{OdooSource, Repository};
use crate::profile::parse_size;

/// PostgreSQL's `max_connections` (`overlays/patroni/run/bakehouse/patroni.yml.j2`).
pub(crate) const MAX_CONNECTIONS: u64 = 200;
/// Connections of PostgreSQL for Patroni, the exporter, operators and superusers.
pub(crate) const OTHER_CONNECTIONS: u64 = 8;
/// Bytes after which a process of Odoo ends with its request, and after which a request fails.
const MEMORY_SOFT: u64 = 640 << 20;
const MEMORY_HARD: u64 = 1024 << 20;

/// `[odoo]`: content of the application images, Odoo's database, and the size of Odoo's processes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct Odoo {
    /// Name of Odoo's database: lower-case letters, digits and `_`, a letter first. Default: `"odoo"`.
    #[cfg_attr(feature = "schema", schemars(with = "form::Identifier"))]
    pub database: String,
    /// Languages whose translations are in the image. English is always in it. Example: `["de", "pt_BR"]`. Default:
    /// none.
    #[cfg_attr(feature = "schema", schemars(with = "Vec<form::Language>"))]
    pub languages: Vec<String>,
    /// Folders with further add-ons, relative to `fleet.toml`. Each sub-folder is an add-on. Default: none.
    pub addons: Vec<String>,
    /// Add-ons and other Python packages for Odoo from the index of the host's pip, each with its version. `bakehouse lock`
    /// adds what they require: Debian's packages, or further wheels. Example:
    /// `["odoo-addon-account-financial-report==19.0.0.0.26.3"]`. Default: none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[cfg_attr(feature = "schema", schemars(with = "Vec<form::Wheel>"))]
    pub wheels: Vec<String>,
    /// Add-ons that Odoo installs when it creates the database, and in the rollout of the version that first names them.
    /// Default: `["web"]`.
    #[cfg_attr(feature = "schema", schemars(with = "Vec<form::Identifier>"))]
    pub modules: Vec<String>,
    /// Number of processes for HTTP requests on an app node, 1 to 256. Each answers one request at a time. Default: two
    /// for each CPU, at most one for each 512 MB of memory, and at least 2.
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = 256)))]
    pub workers: Option<u16>,
    /// Memory of a process after which Odoo replaces the process at the end of its request: a whole number with `K`, `M`
    /// or `G`, which are powers of 1024. Default: `"640M"`.
    #[cfg_attr(feature = "schema", schemars(with = "Option<form::Size>"))]
    pub memory_soft: Option<String>,
    /// Memory of a process with which its request fails. More than `memory_soft`. Default: `"1024M"`.
    #[cfg_attr(feature = "schema", schemars(with = "Option<form::Size>"))]
    pub memory_hard: Option<String>,
    /// Seconds of processor time that one request may take. At least 10. Default: `600`.
    #[cfg_attr(feature = "schema", schemars(range(min = 10)))]
    pub time_cpu: u32,
    /// Seconds that one request may take. At least `time_cpu`. Default: `1200`.
    #[cfg_attr(feature = "schema", schemars(range(min = 10)))]
    pub time_real: u32,
    /// Number of processes for scheduled jobs on each node that runs them, 1 to 16. Default: `1`.
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = 16)))]
    pub cron_threads: u16,
    /// Groups whose nodes run scheduled jobs. Default: every group with the role `app`.
    pub cron: Vec<String>,
    /// Number of connections to the database that one process of Odoo may have, 4 to 64. PostgreSQL accepts 200
    /// connections. Default: `16`.
    #[cfg_attr(feature = "schema", schemars(range(min = 4, max = 64)))]
    pub db_maxconn: u16,
    /// Whether Odoo takes the address of the client and `https` from the headers that the hubs send. Default: `true`.
    pub proxy: bool,
    /// Further keys of `odoo.conf`: texts, whole numbers and booleans. Bakehouse sets some keys itself, and refuses them
    /// here. Example: `{ log_level = "info" }`. Default: none.
    #[cfg_attr(feature = "schema", schemars(extend("x-type" = "table")))]
    pub options: BTreeMap<String, OdooOption>,
    /// The mail server. Default: no section, and Odoo sends mail only by the servers in its own settings.
    pub mail: Option<Mail>,
    /// Section `[odoo.source]`. Default: the code in Debian's package.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<OdooSource>,
    /// Sections `[[odoo.repositories]]`. Default: none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub repositories: Vec<Repository>,
}

impl Default for Odoo {
    fn default() -> Self {
        Self {
            database: "odoo".to_owned(),
            languages: Vec::new(),
            addons: Vec::new(),
            wheels: Vec::new(),
            modules: vec!["web".to_owned()],
            workers: None,
            memory_soft: None,
            memory_hard: None,
            time_cpu: 600,
            time_real: 1200,
            cron_threads: 1,
            cron: Vec::new(),
            db_maxconn: 16,
            proxy: true,
            options: BTreeMap::new(),
            mail: None,
            source: None,
            repositories: Vec::new(),
        }
    }
}

impl Odoo {
    /// Returns what a node gets of the section: not where code comes from.
    #[must_use]
    pub fn on_nodes(&self) -> Self {
        Self { addons: Vec::new(), wheels: Vec::new(), source: None, repositories: Vec::new(), ..self.clone() }
    }

    /// Whether the nodes of a group run scheduled jobs, if they have the role `app`.
    #[must_use]
    pub fn runs_jobs(&self, group: &str) -> bool {
        self.cron.is_empty() || self.cron.iter().any(|name| name == group)
    }

    /// Returns the memory, in bytes, at which a process ends with its request, and at which its request fails.
    #[must_use]
    pub fn memory(&self) -> (u64, u64) {
        let size = |text: &Option<String>, default| text.as_deref().and_then(parse_size).unwrap_or(default);
        (size(&self.memory_soft, MEMORY_SOFT), size(&self.memory_hard, MEMORY_HARD))
    }

    /// Returns the memory that a process has on average, in bytes: less than the limit at which it ends.
    #[must_use]
    pub fn memory_of_worker(&self) -> u64 {
        self.memory().0 / 5 * 4
    }

    /// Returns the number of processes for HTTP requests on a machine with this memory, in MiB.
    ///
    /// # Examples
    ///
    /// ```
    /// let odoo = fleet::Odoo::default();
    /// assert_eq!([(1024, 2), (8192, 4), (2048, 8)].map(|(memory, cpus)| odoo.workers_on(memory, cpus)), [2, 8, 4]);
    /// assert_eq!(fleet::Odoo { workers: Some(5), ..odoo }.workers_on(1024, 2), 5);
    /// ```
    #[must_use]
    pub fn workers_on(&self, memory: u64, cpus: u64) -> u64 {
        let by_memory = (memory << 20) / self.memory_of_worker().max(1);
        self.workers.map_or((cpus * 2).min(by_memory).max(2), u64::from)
    }
}

/// Value of a key in `odoo.options`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(untagged)]
pub enum OdooOption {
    /// `True` or `False`.
    Boolean(bool),
    /// A whole number.
    Number(i64),
    /// A text of one line.
    Text(String),
}

impl<'de> Deserialize<'de> for OdooOption {
    /// Reads the value. serde's own code for such a type names the Rust type in its errors.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OptionVisitor;

        impl Visitor<'_> for OptionVisitor {
            type Value = OdooOption;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text, a whole number or a boolean")
            }

            fn visit_bool<E>(self, value: bool) -> Result<OdooOption, E> {
                Ok(OdooOption::Boolean(value))
            }

            fn visit_i64<E>(self, value: i64) -> Result<OdooOption, E> {
                Ok(OdooOption::Number(value))
            }

            fn visit_u64<E>(self, value: u64) -> Result<OdooOption, E> {
                Ok(i64::try_from(value).map_or_else(|_| OdooOption::Text(value.to_string()), OdooOption::Number))
            }

            fn visit_str<E>(self, value: &str) -> Result<OdooOption, E> {
                Ok(OdooOption::Text(value.to_owned()))
            }
        }

        deserializer.deserialize_any(OptionVisitor)
    }
}

impl fmt::Display for OdooOption {
    /// Writes the value as `odoo.conf` has it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Boolean(true) => f.write_str("True"),
            Self::Boolean(false) => f.write_str("False"),
            Self::Number(number) => write!(f, "{number}"),
            Self::Text(text) => f.write_str(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limit_of_connections_is_that_of_the_template() {
        let template = include_str!("../../overlays/patroni/run/bakehouse/patroni.yml.j2");
        assert!(template.contains(&format!("max_connections: {MAX_CONNECTIONS}\n")));
    }
}
