//! Results of the commands for running nodes, and of `bakehouse operator`.

use std::fmt;
use std::path::PathBuf;

use fleet::OperatorRole;
use fleet::node_api::UnitStatus;
use schemars::JsonSchema;
use serde::Serialize;

use crate::util::terminal::visible;

/// Result of `operator add`.
#[derive(Serialize, JsonSchema)]
pub(super) struct NewOperatorResult {
    /// Name of the operator.
    pub(super) name: String,
    /// What the operator may do.
    pub(super) role: OperatorRole,
    /// Base64 of the public key.
    pub(super) key: String,
    /// Expiry of the certificate, in seconds since 1970.
    pub(super) expires: u64,
    /// The same time, RFC 3339.
    pub(super) expires_at: String,
    /// The operator's file.
    pub(super) path: PathBuf,
    /// Whether the file has the private key, which is a secret.
    pub(super) secret: bool,
}

/// Result of `operator request`.
#[derive(Serialize, JsonSchema)]
pub(super) struct OperatorRequestResult {
    /// Name of the operator.
    pub(super) name: String,
    /// The private key, a secret.
    pub(super) key: PathBuf,
    /// The request.
    pub(super) request: PathBuf,
}

/// Result of `operator wireguard`.
#[derive(Serialize, JsonSchema)]
pub(super) struct OperatorWireguardResult {
    /// Name of the operator.
    pub(super) name: String,
    /// The configuration for wg-quick, a secret.
    pub(super) path: PathBuf,
    /// Address of this machine in the mesh.
    pub(super) address: String,
    /// Hubs that the configuration has.
    pub(super) hubs: Vec<String>,
    /// Expiry of the operator's certificate, in seconds since 1970. Hubs then remove the machine.
    pub(super) expires: u64,
    /// The same time as a text.
    pub(super) expires_at: String,
}

/// Result of `operator revoke`.
#[derive(Serialize, JsonSchema)]
pub(super) struct RevokedOperatorResult {
    /// Name of the operator.
    pub(super) name: String,
    /// Base64 of the public keys of the revoked certificates.
    pub(super) keys: Vec<String>,
    /// Name of the hub that accepted the last order.
    pub(super) hub: String,
}

/// Result of `logs`.
#[derive(Serialize, JsonSchema)]
pub(super) struct LogsResult {
    /// Number of printed messages.
    pub(super) lines: u64,
    /// Nodes whose journals are incomplete. The warnings have the reasons.
    pub(super) incomplete: Vec<String>,
}

/// Result of `units`.
#[derive(Serialize, JsonSchema)]
pub(super) struct UnitsResult {
    /// Name of the node.
    pub(super) node: String,
    /// The units.
    pub(super) units: Vec<UnitStatus>,
}

impl fmt::Display for UnitsResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width =
            |text: fn(&UnitStatus) -> &str| self.units.iter().map(|u| text(u).chars().count()).max().unwrap_or(0);
        let (name, active, sub) = (width(|u| &u.name), width(|u| &u.active), width(|u| &u.sub));
        for unit in &self.units {
            let line = format!("{:<name$} {:<active$} {:<sub$} {}", unit.name, unit.active, unit.sub, unit.description);
            writeln!(f, "{}", visible(line.trim_end()))?;
        }
        Ok(())
    }
}

/// Result of `restart`, `reboot`, `poweroff`, `switchover`, `drain` and `undrain`. A failed action is an error.
#[derive(Serialize, JsonSchema)]
pub(super) struct ActionResult {
    /// Name of the node.
    pub(super) node: String,
    /// The unit, for `restart`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) unit: Option<String>,
    /// Whether the action has ended: the node is ready again, or off. `false` with `--no-wait`.
    pub(super) done: bool,
    /// What the node replied.
    pub(super) message: String,
    /// The node with the primary now, for `switchover`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) primary: Option<String>,
}

impl ActionResult {
    pub(super) fn new(node: &str, message: String) -> Self {
        Self { node: node.to_owned(), unit: None, done: true, message, primary: None }
    }
}

/// Result of `open`.
#[derive(Serialize, JsonSchema)]
pub(super) struct OpenResult {
    /// The page or service: `page`, `prometheus`, `alertmanager`, `haproxy` or `postgres`.
    pub(super) page: String,
    /// Name of the node.
    pub(super) node: String,
    /// Address on this host; for `postgres` a connection URI of PostgreSQL.
    pub(super) url: String,
}
