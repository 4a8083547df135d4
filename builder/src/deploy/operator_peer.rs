//! Registration of an operator's machine as a WireGuard peer of the hubs.

use std::time::Duration;

use fleet::{
    OperatorPeerRequest, OperatorPeering, PROTOCOL, PrivateKey, WireguardKey, encoding, operator_peer_message,
};
use fleet_https::{Connection, Error as HttpsError, Identity, PeerError, request};
use tokio::time::timeout;

use super::nodes::Entry;
use crate::error::{Error, Result};
use crate::keys::operator::OperatorFile;

/// Time limit of one hub.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Longest reply, in bytes.
const LONGEST: usize = 64 << 10;

/// Registers a WireGuard key with the first hub that answers. Returns the hub's name and reply.
///
/// # Errors
/// If no hub answers, or a hub refuses the operator or the key.
pub(crate) async fn register(
    file: &OperatorFile,
    entries: &[Entry],
    port: u16,
    key: &WireguardKey,
) -> Result<(String, OperatorPeering)> {
    let own = Identity { cert: &file.certificate, key: file.key() };
    let tls = fleet_https::client(&file.root, Some(own))?;
    let mesh_key = key.public();
    let signer = PrivateKey::from_pem(file.key().to_owned())?;
    let signature = encoding::encode(&signer.sign(&operator_peer_message(&file.fleet, &mesh_key))?);
    let body =
        serde_json::to_vec(&OperatorPeerRequest { version: PROTOCOL, mesh_key, signature }).map_err(Error::Json)?;
    let mut failures = Vec::new();
    for Entry { hub, host } in entries {
        let asked = timeout(TIMEOUT, async {
            let mut connection = Connection::open(host, port, hub, &tls).await?;
            let sent = request("POST", "hub", "/v1/operators/wireguard", &[], body.clone().into())?;
            connection.ask(sent, LONGEST).await
        });
        match asked.await.unwrap_or_else(|_| Err(HttpsError::no_answer(format!("{hub} ({host}:{port})")))) {
            Ok(reply) => {
                let reply =
                    serde_json::from_slice(&reply).map_err(Error::cannot(format!("read the reply of {hub}")))?;
                return Ok((hub.clone(), reply));
            }
            // The other hubs would refuse it, too.
            Err(e) if is_refusal(&e) => return Err(e.into()),
            Err(e) => failures.push(Error::from(e).chain()),
        }
    }
    Err(Error::Failed(format!("no hub registers this machine:\n  {}", failures.join("\n  "))))
}

fn is_refusal(e: &HttpsError) -> bool {
    let HttpsError::Network { source: PeerError::Status { status, .. }, .. } = e else { return false };
    matches!(status.as_u16(), 401 | 403)
}
