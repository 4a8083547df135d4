//! What an operator may ask of the hubs: orders that the fleet's root signs, each for one hub, one
//! connection and a few minutes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use fleet::{
    Departure, Node, OrderScope, PROTOCOL, Revocation, Rollout, RolloutOrder, RolloutRequest, SignedOrder, Tokens,
    TokensRequest, Topology, compare_versions, encoding,
};
use fleet_https::backoff::Backoff;
use fleet_https::{self as https, ClientConfig, Connection, Error as Failure};
use serde::de::DeserializeOwned;

use crate::error::{Error, Result, fail};
use crate::keys::authority::FleetKey;
use crate::util::random::random;

/// Longest answer that is read: a fleet's life of tokens.
const LONGEST: usize = 4 << 20;
/// How long hubs are asked again while etcd has no leader: an election, and the time that etcd needs to call itself
/// healthy.
const ELECTION: Duration = Duration::from_secs(30);

/// The hubs, as the operator's machine reaches them.
pub struct Hubs<'a> {
    pub authority: &'a FleetKey,
    pub topology: &'a Topology,
    /// Where they are, if not where `fleet.toml` says.
    pub endpoints: BTreeMap<String, String>,
}

impl Hubs<'_> {
    /// Makes a token worthless; returns the hub that took it.
    ///
    /// # Errors
    /// None does: what each of them said.
    pub fn revoke(&self, token: &str) -> Result<String> {
        let asked =
            Revocation { version: PROTOCOL, fleet: self.topology.name.clone(), token: token.to_owned(), scope: None };
        self.ask(&asked).map(|(hub, _)| hub)
    }

    /// What became of the tokens.
    ///
    /// # Errors
    /// No hub answers: what each of them said.
    pub fn tokens(&self) -> Result<Tokens> {
        let asked = TokensRequest { version: PROTOCOL, fleet: self.topology.name.clone(), scope: None };
        let (hub, answer) = self.ask(&asked)?;
        readable(&hub, &answer)
    }

    /// Has a node leave the fleet; `now` does not wait for its machine. Returns the hub that took it.
    ///
    /// # Errors
    /// None does: what each of them said.
    pub fn leave(&self, slot: &str, now: bool) -> Result<String> {
        // The owner that the operator means is the one of today.
        let tell = RolloutRequest {
            version: PROTOCOL,
            fleet: self.topology.name.clone(),
            order: RolloutOrder::Tell,
            scope: None,
        };
        let (hub, answer) = self.ask_others(&tell, slot)?;
        let seen: Rollout = readable(&hub, &answer)?;
        let (epoch, tls_key) = (seen.epochs.get(slot).copied(), seen.tls_keys.get(slot).cloned());
        let asked = Departure {
            version: PROTOCOL,
            fleet: self.topology.name.clone(),
            slot: slot.to_owned(),
            now,
            epoch,
            tls_key,
            scope: None,
        };
        self.ask_others(&asked, slot).map(|(hub, _)| hub)
    }

    /// Gives an order to the rollout, and tells how far it is.
    ///
    /// # Errors
    /// No hub takes it: what each of them said.
    pub fn rollout(&self, order: RolloutOrder) -> Result<Rollout> {
        let asked = RolloutRequest { version: PROTOCOL, fleet: self.topology.name.clone(), order, scope: None };
        let (hub, answer) = self.ask(&asked)?;
        readable(&hub, &answer)
    }

    /// The first answer, and the hub that gave it.
    fn ask<T: SignedOrder + Clone>(&self, order: &T) -> Result<(String, Vec<u8>)> {
        self.ask_of(order, &self.topology.hubs.iter().collect::<Vec<_>>())
    }

    /// As [`Self::ask`], of hubs other than `slot`: a hub that is to leave may be another's by now, and answers what
    /// it likes. Where there is no other hub, that one is asked.
    fn ask_others<T: SignedOrder + Clone>(&self, order: &T, slot: &str) -> Result<(String, Vec<u8>)> {
        let all = &self.topology.hubs;
        let others: Vec<&Node> = all.iter().filter(|hub| hub.name != slot).collect();
        if others.is_empty() { self.ask(order) } else { self.ask_of(order, &others) }
    }

    /// As [`Self::ask`], of these hubs. While etcd has no leader, hubs answer 503: then they are asked again, for orders
    /// that have been carried out already succeed.
    fn ask_of<T: SignedOrder + Clone>(&self, order: &T, hubs: &[&Node]) -> Result<(String, Vec<u8>)> {
        let tls = https::client(self.authority.root.certificate(), None).map_err(|e| Error::Failed(e.to_string()))?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|e| Error::Failed(format!("cannot reach the network: {e}")))?;
        let until = Instant::now() + ELECTION;
        let mut pause = Backoff::default();
        loop {
            let mut failures = Vec::new();
            for hub in hubs {
                let Some(host) = hub.endpoint_in(&self.endpoints) else { continue };
                match runtime.block_on(self.ask_one(order, hub, &host, &tls)) {
                    Ok(answer) => return Ok((hub.name.clone(), answer)),
                    Err(e) => failures.push(e),
                }
            }
            let is_temporary = |e: &Failure| matches!(e, Failure::Network { why, .. } if why.starts_with("503"));
            if !failures.iter().any(is_temporary) || Instant::now() > until {
                let failures: Vec<String> = failures.iter().map(ToString::to_string).collect();
                return fail(format!("no hub takes it: {}", failures.join("; ")));
            }
            std::thread::sleep(pause.next_delay());
        }
    }

    async fn ask_one<T: SignedOrder + Clone>(
        &self,
        order: &T,
        hub: &Node,
        host: &str,
        tls: &Arc<ClientConfig>,
    ) -> Result<Vec<u8>, Failure> {
        let root = &self.authority.root;
        let nonce = random::<16>().map_err(|e| Failure::Failed(e.to_string()))?;
        let order = order.clone().with_scope(OrderScope {
            path: T::PATH.to_owned(),
            hub: hub.name.clone(),
            issued_at: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
            nonce: encoding::encode(&nonce),
        });
        let body = serde_json::to_vec(&order).map_err(|e| Failure::Failed(e.to_string()))?;
        let mut connection = Connection::open(host, self.topology.mesh.port, &hub.name, tls).await?;
        let answer = connection.post_signed(T::PATH, &body, |message| root.sign(message), LONGEST).await?;
        Ok(answer.to_vec())
    }
}

fn readable<T: DeserializeOwned>(hub: &str, answer: &[u8]) -> Result<T> {
    serde_json::from_slice(answer)
        .map_err(|e| Error::Failed(format!("{hub}'s answer is not readable ({e}); is this bakehouse older than it?")))
}

/// How far a rollout is, for a person.
#[must_use]
pub fn describe(rollout: &Rollout) -> String {
    let newest = rollout.nodes.values().map(|r| r.image.as_str()).max_by(|a, b| compare_versions(a, b));
    let mut text = String::new();
    for slot in &rollout.members {
        let skipped = if rollout.skipped.contains_key(slot) { ", skipped until it is well" } else { "" };
        let line = match rollout.nodes.get(slot) {
            None => format!("silent{skipped}"),
            Some(report) => {
                let doing = match &report.doing {
                    fleet::UpdateState::Starting => "starting".to_owned(),
                    fleet::UpdateState::Serving => "serving".to_owned(),
                    fleet::UpdateState::Available { image, unwell: true, .. } => {
                        format!("not well, would take version {image}")
                    }
                    fleet::UpdateState::Available { image, .. } => format!("serving, would take version {image}"),
                    fleet::UpdateState::RolledBack { from } => format!("serving, went back from version {from}"),
                };
                let mark = if Some(report.image.as_str()) == newest { " " } else { "<" };
                format!("{mark} version {}, {doing}{skipped}", report.image)
            }
        };
        text.push_str(&format!("{slot:<12} {line}\n"));
    }
    if let Some(turn) = &rollout.turn {
        text.push_str(&format!("{} changes from version {} to {}\n", turn.slot, turn.from, turn.to));
    }
    if let Some(why) = &rollout.paused {
        text.push_str(&format!("paused: {why}; go on with `bakehouse rollout --resume`\n"));
    }
    for (version, why) in &rollout.denied {
        text.push_str(&format!("nobody takes version {version}: {why}; publish a newer one, or try it again with `bakehouse rollout --allow \
             {version}`\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet::{Report, UpdateLock, UpdateState};

    #[test]
    fn a_rollout_is_told_node_by_node() {
        let says = |image: &str, doing| Report { version: PROTOCOL, image: image.into(), doing };
        let rollout = Rollout {
            turn: Some(UpdateLock { slot: "hub-1".into(), from: "1".into(), to: "2".into() }),
            held: true,
            paused: Some("month's end".into()),
            denied: BTreeMap::from([("3".into(), "it did not come up on app-1".into())]),
            nodes: BTreeMap::from([
                ("app-1".into(), says("2", UpdateState::Serving)),
                (
                    "app-2".into(),
                    says("2", UpdateState::Available { image: "4".into(), leads: false, primary: false, unwell: true }),
                ),
                (
                    "hub-1".into(),
                    says(
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
        for words in [
            "app-1          version 2, serving\n",
            "app-2          version 2, not well, would take version 4\n",
            "db-1         silent, skipped until it is well\n",
            "hub-1        < version 1, serving, would take version 2\n",
            "hub-1 changes from version 1 to 2\n",
            "paused: month's end",
            "nobody takes version 3",
            "--allow 3`",
        ] {
            assert!(text.contains(words), "`{words}` is not in\n{text}");
        }
    }
}
