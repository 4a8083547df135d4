//! The audit log in etcd, as hubs return it.

use fleet::node_api::{AUDIT_QUERY_PATH, AuditLog, AuditQuery, LONGEST_AUDIT_ENTRY, MOST_AUDIT_ENTRIES};

use super::any_hub::{Question, ask_any};
use super::nodes::Entry;
use crate::error::{Error, Result};
use crate::keys::operator::OperatorFile;

/// Longest reply, in bytes: the most entries of the largest size, with separators.
const LONGEST: usize = (MOST_AUDIT_ENTRIES as usize + 1) * (LONGEST_AUDIT_ENTRY + 1);

/// Reads entries of the log through the first hub that answers. Returns the hub's name and reply.
///
/// # Errors
/// If no hub answers, or a hub refuses the operator.
pub(crate) async fn read(
    file: &OperatorFile,
    entries: &[Entry],
    port: u16,
    query: &AuditQuery,
) -> Result<(String, AuditLog)> {
    let body = serde_json::to_vec(query).map_err(Error::Json)?;
    let question = Question { does: "returns the audit log", path: AUDIT_QUERY_PATH, body, longest: LONGEST };
    let (hub, reply) = ask_any(file, entries, port, question).await?;
    let log = serde_json::from_slice(&reply).map_err(Error::cannot(format!(
        "read the reply of {hub}\n  help: use a version of bakehouse that is not older than the hub's"
    )))?;
    Ok((hub, log))
}
