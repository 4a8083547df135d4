//! Requests of an operator that any hub answers.

use std::time::Duration;

use bytes::Bytes;
use fleet_https::{Connection, Error as HttpsError, Identity, PeerError, request};
use tokio::time::timeout;

use super::nodes::Entry;
use crate::error::{Error, Result};
use crate::keys::operator::OperatorFile;

/// Time limit of one hub.
const TIMEOUT: Duration = Duration::from_secs(5);

/// A request that any hub answers: its path, its body, and the longest reply in bytes.
pub(super) struct Question {
    /// What the hub does, for the error: `no hub {does}`.
    pub does: &'static str,
    pub path: &'static str,
    pub body: Vec<u8>,
    pub longest: usize,
}

/// Posts a request to one hub after the other. Returns the name and the reply of the first one that answers.
///
/// # Errors
/// If no hub answers, or a hub refuses the operator or the request.
pub(super) async fn ask_any(
    file: &OperatorFile,
    entries: &[Entry],
    port: u16,
    question: Question,
) -> Result<(String, Bytes)> {
    let own = Identity { cert: &file.certificate, key: file.key() };
    let tls = fleet_https::client(&file.root, Some(own))?;
    let Question { does, path, body, longest } = question;
    let body = Bytes::from(body);
    let (mut failures, mut old) = (Vec::new(), 0);
    for Entry { hub, host } in entries {
        let asked = timeout(TIMEOUT, async {
            let mut connection = Connection::open(host, port, hub, &tls).await?;
            connection.ask(request("POST", "hub", path, &[], body.clone())?, longest).await
        });
        match asked.await.unwrap_or_else(|_| Err(HttpsError::no_answer(format!("{hub} ({host}:{port})")))) {
            Ok(reply) => return Ok((hub.clone(), reply)),
            // The other hubs would refuse it, too.
            Err(e) if matches!(status(&e), Some(401 | 403)) => return Err(e.into()),
            Err(e) => {
                old += usize::from(status(&e) == Some(404));
                failures.push(Error::from(e).chain());
            }
        }
    }
    let help = if old > 0 { "\n  help: hubs that reply 404 have an earlier version: `bakehouse rollout`" } else { "" };
    Err(Error::Failed(format!("no hub {does}:\n  {}{help}", failures.join("\n  "))))
}

fn status(e: &HttpsError) -> Option<u16> {
    let HttpsError::Network { source: PeerError::Status { status, .. }, .. } = e else { return None };
    Some(status.as_u16())
}
