//! The operator's client of the hubs' API. The fleet key signs each order for one hub and one connection; an order
//! expires after a few minutes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use fleet::{
    Departure, Node, OperatorRevocation, OrderScope, PROTOCOL, Revocation, Rollout, RolloutOrder, RolloutRequest,
    SignedOrder, Tokens, TokensRequest, Topology, compare_versions, encoding,
};
use fleet_https::backoff::Backoff;
use fleet_https::{self as https, ClientConfig, Connection, PeerError};
use futures_util::future::join_all;
use serde::de::DeserializeOwned;

use crate::error::{Error, Result, fail};
use crate::keys::authority::FleetKey;
use crate::util::random::random;

/// Longest reply in bytes: all tokens that a fleet has had.
const LONGEST: usize = 4 << 20;
/// Time limit of a hub's answer about its version.
const ANSWER: Duration = Duration::from_secs(3);
/// Time for retries while etcd has no leader: an election, and the time until etcd reports itself healthy.
const ELECTION: Duration = Duration::from_secs(30);

/// Client of the hubs' API on the operator's machine.
pub struct Hubs<'a> {
    /// Key that signs the orders.
    pub authority: FleetKey,
    /// The fleet.
    pub topology: &'a Topology,
    /// Endpoints of hubs that replace those of `fleet.toml`.
    pub endpoints: BTreeMap<String, String>,
    /// What the user may do if no hub accepts an order.
    pub help: Option<&'static str>,
}

impl Hubs<'_> {
    /// Revokes a token. Returns the hub that accepted the order.
    ///
    /// # Errors
    /// If no hub accepts the order. The message lists the reply of each hub.
    pub fn revoke(&self, token: &str) -> Result<String> {
        let order =
            Revocation { version: PROTOCOL, fleet: self.topology.name.clone(), token: token.to_owned(), scope: None };
        self.send(&order).map(|(hub, _)| hub)
    }

    /// Revokes an operator's certificate with this public key (base64). Returns the hub that accepted the order.
    ///
    /// # Errors
    /// If no hub accepts the order. The message lists the reply of each hub.
    pub fn revoke_operator(&self, name: &str, key: &str, expires: u64) -> Result<String> {
        let order = OperatorRevocation {
            version: PROTOCOL,
            fleet: self.topology.name.clone(),
            name: name.to_owned(),
            key: key.to_owned(),
            expires,
            scope: None,
        };
        self.send(&order).map(|(hub, _)| hub)
    }

    /// Asks all hubs with an endpoint whether their versions forward connections of operators. Returns the hubs that do
    /// not, and those that do not answer.
    ///
    /// # Errors
    /// If the fleet's root certificate is invalid.
    pub fn without_operators(&self) -> Result<(Vec<String>, Vec<String>)> {
        let tls = https::client(self.authority.root.certificate(), None)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(Error::cannot("start the network client"))?;
        let ask = |hub: &Node| {
            let (name, host) = (hub.name.clone(), hub.endpoint_in(&self.endpoints)?);
            let (port, tls) = (self.topology.mesh.port, tls.clone());
            let asked = async move {
                let answer = async { Connection::open(&host, port, &name, &tls).await?.forwards_operators().await };
                let answer = tokio::time::timeout(ANSWER, answer).await;
                (name, answer.ok().and_then(std::result::Result::ok))
            };
            Some(asked)
        };
        let answers = runtime.block_on(join_all(self.topology.hubs.iter().filter_map(ask)));
        // A lookup of a name may still run.
        runtime.shutdown_background();
        let of = |wanted| answers.iter().filter(move |(_, found)| *found == wanted).map(|(name, _)| name.clone());
        Ok((of(Some(false)).collect(), of(None).collect()))
    }

    /// Returns the state of the fleet's tokens.
    ///
    /// # Errors
    /// If no hub replies. The message lists the failure of each hub.
    pub fn tokens(&self) -> Result<Tokens> {
        let order = TokensRequest { version: PROTOCOL, fleet: self.topology.name.clone(), scope: None };
        let (hub, reply) = self.send(&order)?;
        parse(&hub, &reply)
    }

    /// Removes a node from the fleet; `now` does not wait for its machine. Returns the hub that accepted the order.
    ///
    /// # Errors
    /// If no hub accepts the order. The message lists the reply of each hub.
    pub fn leave(&self, slot: &str, now: bool) -> Result<String> {
        // The order names the slot's current owner, so that a later owner is safe from a delayed order.
        let query = RolloutRequest {
            version: PROTOCOL,
            fleet: self.topology.name.clone(),
            order: RolloutOrder::Tell,
            scope: None,
        };
        let (hub, reply) = self.send_to_others(&query, slot)?;
        let seen: Rollout = parse(&hub, &reply)?;
        let (epoch, tls_key) = (seen.epochs.get(slot).copied(), seen.tls_keys.get(slot).cloned());
        let order = Departure {
            version: PROTOCOL,
            fleet: self.topology.name.clone(),
            slot: slot.to_owned(),
            now,
            epoch,
            tls_key,
            scope: None,
        };
        self.send_to_others(&order, slot).map(|(hub, _)| hub)
    }

    /// Sends an order for the rollout. Returns the state of the rollout.
    ///
    /// # Errors
    /// If no hub accepts the order. The message lists the reply of each hub.
    pub fn rollout(&self, order: RolloutOrder) -> Result<Rollout> {
        let request = RolloutRequest { version: PROTOCOL, fleet: self.topology.name.clone(), order, scope: None };
        let (hub, reply) = self.send(&request)?;
        parse(&hub, &reply)
    }

    /// Sends an order to one hub after the other. Returns the first hub that accepts it, and its reply.
    fn send<T: SignedOrder + Clone>(&self, order: &T) -> Result<(String, Vec<u8>)> {
        self.send_to(order, &self.topology.hubs.iter().collect::<Vec<_>>())
    }

    /// Sends an order to hubs other than `slot`, because an attacker may control the hub that is to leave. Sends it to
    /// that hub only if the fleet has no other.
    fn send_to_others<T: SignedOrder + Clone>(&self, order: &T, slot: &str) -> Result<(String, Vec<u8>)> {
        let all = &self.topology.hubs;
        let others: Vec<&Node> = all.iter().filter(|hub| hub.name != slot).collect();
        if others.is_empty() { self.send(order) } else { self.send_to(order, &others) }
    }

    /// Sends an order to these hubs. Retries while etcd has no leader and the hubs return 503; hubs accept an order
    /// again that they have carried out already.
    fn send_to<T: SignedOrder + Clone>(&self, order: &T, hubs: &[&Node]) -> Result<(String, Vec<u8>)> {
        let tls = https::client(self.authority.root.certificate(), None)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(Error::cannot("start the network client"))?;
        let until = Instant::now() + ELECTION;
        let mut pause = Backoff::default();
        loop {
            let mut failures = Vec::new();
            for hub in hubs {
                let Some(host) = hub.endpoint_in(&self.endpoints) else { continue };
                match runtime.block_on(self.send_to_hub(order, hub, &host, &tls)) {
                    Ok(reply) => return Ok((hub.name.clone(), reply)),
                    Err(e) => failures.push(e),
                }
            }
            let is_temporary = |e: &Error| {
                let Error::Https(https::Error::Network { source, .. }) = e else { return false };
                matches!(source, PeerError::Status { status, .. } if status.as_u16() == 503)
            };
            if !failures.iter().any(is_temporary) || Instant::now() > until {
                let failures: Vec<String> = failures.iter().map(Error::chain).collect();
                let help = self.help.map(|help| format!("\n  help: {help}")).unwrap_or_default();
                return fail(format!("no hub accepts the order:\n  {}{help}", failures.join("\n  ")));
            }
            std::thread::sleep(pause.next_delay());
        }
    }

    async fn send_to_hub<T: SignedOrder + Clone>(
        &self,
        order: &T,
        hub: &Node,
        host: &str,
        tls: &Arc<ClientConfig>,
    ) -> Result<Vec<u8>> {
        let root = &self.authority.root;
        let nonce = random::<16>()?;
        let order = order.clone().with_scope(OrderScope {
            path: T::PATH.to_owned(),
            hub: hub.name.clone(),
            issued_at: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
            nonce: encoding::encode(&nonce),
        });
        let body = serde_json::to_vec(&order).map_err(Error::Json)?;
        let mut connection = Connection::open(host, self.topology.mesh.port, &hub.name, tls).await?;
        let reply = connection.post_signed(T::PATH, &body, |message| root.sign(message), LONGEST).await?;
        Ok(reply.to_vec())
    }
}

fn parse<T: DeserializeOwned>(hub: &str, reply: &[u8]) -> Result<T> {
    let help = "use a version of bakehouse that is not older than the hub's";
    serde_json::from_slice(reply).map_err(Error::cannot(format!("read the reply of {hub}\n  help: {help}")))
}

/// Returns the state of a rollout as text: a line for each node, then the update lock, pauses and denials.
#[must_use]
pub fn describe(rollout: &Rollout) -> String {
    let newest = rollout.nodes.values().map(|r| r.image.as_str()).max_by(|a, b| compare_versions(a, b));
    let mut text = String::new();
    for slot in &rollout.members {
        let drained = if rollout.drained.contains_key(slot) { ", drained" } else { "" };
        let skipped = if rollout.skipped.contains_key(slot) { ", skipped until it is well" } else { "" };
        let line = match rollout.nodes.get(slot) {
            None => format!("silent{drained}{skipped}"),
            Some(report) => {
                let state = match &report.doing {
                    fleet::UpdateState::Starting => "starting".to_owned(),
                    fleet::UpdateState::Serving => "serving".to_owned(),
                    fleet::UpdateState::Available { image, unwell: true, .. } => {
                        format!("unwell, would take version {image}")
                    }
                    fleet::UpdateState::Available { image, .. } => format!("serving, would take version {image}"),
                    fleet::UpdateState::RolledBack { from } => format!("serving, rolled back from version {from}"),
                };
                let mark = if Some(report.image.as_str()) == newest { " " } else { "<" };
                format!("{mark} version {}, {state}{drained}{skipped}", report.image)
            }
        };
        text.push_str(&format!("{slot:<12} {line}\n"));
    }
    if let Some(lock) = &rollout.turn {
        text.push_str(&format!("{} changes from version {} to {}\n", lock.slot, lock.from, lock.to));
    }
    if let Some(why) = &rollout.paused {
        text.push_str(&format!("paused: {why}; continue with `bakehouse rollout --resume`\n"));
    }
    for (version, why) in &rollout.denied {
        text.push_str(&format!(
            "no node takes version {version}: {why}; publish a newer version, or retry this one with \
             `bakehouse rollout --allow {version}`\n"
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet::{Report, UpdateLock, UpdateState};

    #[test]
    fn describes_each_node_of_a_rollout() {
        let report = |image: &str, doing| Report { version: PROTOCOL, image: image.into(), doing };
        let rollout = Rollout {
            turn: Some(UpdateLock { slot: "hub-1".into(), from: "1".into(), to: "2".into() }),
            held: true,
            paused: Some("month's end".into()),
            denied: BTreeMap::from([("3".into(), "it did not come up on app-1".into())]),
            nodes: BTreeMap::from([
                ("app-1".into(), report("2", UpdateState::Serving)),
                (
                    "app-2".into(),
                    report(
                        "2",
                        UpdateState::Available { image: "4".into(), leads: false, primary: false, unwell: true },
                    ),
                ),
                (
                    "hub-1".into(),
                    report(
                        "1",
                        UpdateState::Available { image: "2".into(), leads: false, primary: false, unwell: false },
                    ),
                ),
            ]),
            members: ["app-1", "app-2", "db-1", "hub-1"].map(String::from).into(),
            skipped: BTreeMap::from([("db-1".into(), 1)]),
            ..Rollout::default()
        };
        let text = describe(&rollout);
        for part in [
            "app-1          version 2, serving\n",
            "app-2          version 2, unwell, would take version 4\n",
            "db-1         silent, skipped until it is well\n",
            "hub-1        < version 1, serving, would take version 2\n",
            "hub-1 changes from version 1 to 2\n",
            "paused: month's end",
            "no node takes version 3",
            "--allow 3`",
        ] {
            assert!(text.contains(part), "`{part}` is not in\n{text}");
        }
    }
}
