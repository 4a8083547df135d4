//! Registration of an operator's machine as a WireGuard peer of the hubs.

use fleet::{
    OperatorPeerRequest, OperatorPeering, PROTOCOL, PrivateKey, WireguardKey, encoding, operator_peer_message,
};

use super::any_hub::{Question, ask_any};
use super::nodes::Entry;
use crate::error::{Error, Result};
use crate::keys::operator::OperatorFile;

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
    let mesh_key = key.public();
    let signer = PrivateKey::from_pem(file.key().to_owned())?;
    let signature = encoding::encode(&signer.sign(&operator_peer_message(&file.fleet, &mesh_key))?);
    let body =
        serde_json::to_vec(&OperatorPeerRequest { version: PROTOCOL, mesh_key, signature }).map_err(Error::Json)?;
    let question = Question { does: "registers this machine", path: "/v1/operators/wireguard", body, longest: LONGEST };
    let (hub, reply) = ask_any(file, entries, port, question).await?;
    let reply = serde_json::from_slice(&reply).map_err(Error::cannot(format!("read the reply of {hub}")))?;
    Ok((hub, reply))
}
