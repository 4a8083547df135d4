//! The log of the operators' certificates. It has no keys.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use fleet::{Operator, OperatorRole, PublicKey, encoding};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::operator::now;
use crate::error::{Error, Result};
use crate::util::fs::append_line;
use crate::util::time::rfc3339;

/// Name of the file, beside `fleet.toml`. Each line is the JSON of an [`Entry`].
const FILE: &str = "operators.jsonl";

/// A line of the log: a certificate, or the revocation of a key.
#[derive(Serialize, Deserialize)]
struct Entry {
    #[serde(flatten)]
    operator: Operator,
    /// Base64 of the public key.
    key: String,
    /// Seconds since 1970.
    expires: u64,
    /// Hub that accepted the revocation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    revoked: Option<String>,
}

/// A certificate of an operator, as `bakehouse operator list` prints it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub(crate) struct OperatorRow {
    /// Name of the operator.
    pub name: String,
    /// What the operator may do.
    pub role: OperatorRole,
    /// Base64 of the public key.
    pub key: String,
    /// Expiry of the certificate, in seconds since 1970.
    pub expires: u64,
    /// The same time, RFC 3339.
    pub expires_at: String,
    /// Whether nodes accept the certificate.
    pub state: CertificateState,
}

/// Whether a certificate is still valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum CertificateState {
    /// Nodes accept the certificate.
    Good,
    /// The time of the certificate has passed.
    Expired,
    /// A hub accepted the revocation.
    Revoked,
}

impl CertificateState {
    fn as_str(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::Expired => "expired",
            Self::Revoked => "revoked",
        }
    }
}

/// Appends a new certificate to the log.
///
/// # Errors
/// If the log cannot be written.
pub(crate) fn note(dir: &Path, operator: &Operator, key: &PublicKey, expires: u64) -> Result<()> {
    let key = encoding::encode(key.as_bytes());
    append(dir, &Entry { operator: operator.clone(), key, expires, revoked: None })
}

/// Appends the revocation of a certificate, which the hub `hub` accepted.
///
/// # Errors
/// If the log cannot be written.
pub(crate) fn note_revoked(dir: &Path, row: &OperatorRow, hub: &str) -> Result<()> {
    let operator = Operator { name: row.name.clone(), role: row.role };
    append(dir, &Entry { operator, key: row.key.clone(), expires: row.expires, revoked: Some(hub.to_owned()) })
}

fn append(dir: &Path, entry: &Entry) -> Result<()> {
    let path = dir.join(FILE);
    append_line(&path, &serde_json::to_vec(entry).map_err(Error::Json)?)
}

/// Returns the certificates in the log, sorted by name and expiry.
///
/// # Errors
/// If the log cannot be read.
pub(crate) fn rows(dir: &Path) -> Result<Vec<OperatorRow>> {
    let path = dir.join(FILE);
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == ErrorKind::NotFound => String::new(),
        Err(e) => return Err(Error::io("read", &path)(e)),
    };
    // An incomplete line comes from a power cut. The operator never received that certificate.
    let entries = text.lines().filter_map(|line| serde_json::from_str::<Entry>(line).ok());
    // A revocation is for a key. A later certificate for the same key is revoked, too.
    let (revoked, made): (Vec<Entry>, Vec<Entry>) = entries.partition(|entry| entry.revoked.is_some());
    let revoked: BTreeSet<String> = revoked.into_iter().map(|entry| entry.key).collect();
    let now = now();
    let mut rows: Vec<OperatorRow> = made
        .into_iter()
        .map(|entry| OperatorRow {
            state: if revoked.contains(&entry.key) {
                CertificateState::Revoked
            } else if entry.expires < now {
                CertificateState::Expired
            } else {
                CertificateState::Good
            },
            name: entry.operator.name,
            role: entry.operator.role,
            key: entry.key,
            expires: entry.expires,
            expires_at: rfc3339(entry.expires),
        })
        .collect();
    rows.sort_by(|a, b| (&a.name, a.expires).cmp(&(&b.name, b.expires)));
    Ok(rows)
}

/// Formats the certificates as a table.
#[must_use]
pub(crate) fn table(rows: &[OperatorRow]) -> String {
    let width = rows.iter().map(|row| row.name.len()).max().unwrap_or(0).max(12);
    let mut text = format!("{:<width$} {:<8} {:<20} state\n", "name", "role", "expires");
    for row in rows {
        text +=
            &format!("{:<width$} {:<8} {:<20} {}\n", row.name, row.role.as_str(), row.expires_at, row.state.as_str());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet::PrivateKey;

    #[test]
    fn revocation_is_the_state_of_a_key() {
        let dir = tempfile::tempdir().unwrap();
        let key = || PrivateKey::generate().unwrap().public().unwrap();
        let of = |name: &str, role| Operator::new(name, role).unwrap();
        let anna = of("anna", OperatorRole::Admin);
        note(dir.path(), &of("ben", OperatorRole::Viewer), &key(), 1).unwrap();
        note(dir.path(), &anna, &key(), now() + 100).unwrap();
        note(dir.path(), &anna, &key(), now() + 200).unwrap();
        let states = || rows(dir.path()).unwrap().into_iter().map(|r| (r.name, r.state)).collect::<Vec<_>>();
        let state = |name: &str, state| (name.to_owned(), state);
        let good = CertificateState::Good;
        assert_eq!(states(), [state("anna", good), state("anna", good), state("ben", CertificateState::Expired)]);
        note_revoked(dir.path(), &rows(dir.path()).unwrap()[0], "hub-1").unwrap();
        assert_eq!(states()[..2], [state("anna", CertificateState::Revoked), state("anna", good)]);
        let text = table(&rows(dir.path()).unwrap());
        assert!(text.contains("anna         admin ") && text.contains("revoked\n"), "{text}");
        // A power cut leaves an incomplete line.
        let path = dir.path().join(FILE);
        let cut = fs::read_to_string(&path).unwrap() + "{\"name\":\"ce";
        fs::write(&path, cut).unwrap();
        note(dir.path(), &of("dora", OperatorRole::Viewer), &key(), u64::MAX).unwrap();
        assert_eq!(states().last(), Some(&state("dora", good)));
    }
}
