//! Taking a ticket back: the one thing about tickets that a hub has to be asked for.

use std::collections::BTreeMap;

use firstboot::https::{self, Connection, request};
use firstboot::join::endpoint;
use fleet::{PROTOCOL, Revocation, SIGNATURE_HEADER, Topology, encoding};

use crate::authority::Authority;
use crate::error::{Error, Result, fail};

/// Tells the hubs that a token is of no use any more; returns the hub that took it.
///
/// # Errors
/// None does: what each of them said.
pub fn revoke(
    authority: &Authority,
    topology: &Topology,
    token: &str,
    endpoints: &BTreeMap<String, String>,
) -> Result<String> {
    let asked = Revocation { version: PROTOCOL, fleet: topology.name.clone(), token: token.to_owned() };
    let body = serde_json::to_vec(&asked).map_err(|e| Error::Failed(e.to_string()))?;
    let signature = encoding::encode(&authority.root.sign(&body)?);
    let tls = https::client(authority.root.certificate(), None).map_err(|e| Error::Failed(e.to_string()))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|e| Error::Failed(format!("cannot reach the network: {e}")))?;
    let mut said = Vec::new();
    for hub in &topology.hubs {
        let Some(host) = endpoint(hub, endpoints) else { continue };
        let answer = runtime.block_on(async {
            let mut connection = Connection::open(&host, topology.mesh.port, &hub.name, &tls).await?;
            let headers = [(SIGNATURE_HEADER, signature.as_str())];
            connection.ask(request("POST", &host, "/v1/revoke", &headers, body.clone().into())?, 1 << 10).await
        });
        match answer {
            Ok(_) => return Ok(hub.name.clone()),
            Err(e) => said.push(e.to_string()),
        }
    }
    fail(format!("no hub takes it: {}", said.join("; ")))
}
