//! The hubs, as a node reaches them: at their mesh addresses once it is a member, and at their public
//! endpoints.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use fleet::encoding::{decode, encode};
use fleet::{
    Eviction, Introduction, JoinReply, LONGEST, Node, PROTOCOL, Peers, Renewal, Report, Topology, UpdateDecision,
};
use futures_util::future::join_all;
use serde::de::DeserializeOwned;
use tokio::time::timeout;
use tokio_rustls::rustls::ClientConfig;

use crate::client::backoff::chance;
use crate::error::{Error, Result};
use crate::node::etcd_user::{MEMBER, PATRONI, USER_HEADER, patroni_runs_with};
use crate::node::keys::Keys;
use crate::node::neighbours::PeerTable;
use crate::node::trust::{Decision, Heard, HubAnswer, signed_by_root};
use fleet_https::{Connection, request};

/// How long a hub's mesh address may take before its public endpoint is asked.
const MESH_PATIENCE: Duration = Duration::from_secs(2);
/// How long one hub may take in a round.
const ROUND_PATIENCE: Duration = Duration::from_secs(12);
/// Hubs that are asked in each round: an evicted one alone can't keep a node from hearing of it.
const ASKED: usize = 2;

/// The hubs, as this node reaches them.
pub struct Hubs {
    hubs: Vec<HubAddress>,
    port: u16,
    tls: Arc<ClientConfig>,
    /// What a member knows of the hubs; a machine that joins knows nothing.
    neighbourhood: Option<Arc<PeerTable>>,
    over_mesh: bool,
    /// The last round heard none of the hubs that are known.
    is_lost: AtomicBool,
    /// What this node's Patroni is to authenticate with at etcd; empty without a Patroni or a password.
    etcd_patroni: String,
    fleet: String,
    /// The fleet root's certificate, PEM: what evictions are verified with. Empty where the node acts on none.
    root: String,
}

/// Where one hub is.
pub(crate) struct HubAddress {
    pub(crate) slot: String,
    public: String,
    mesh: String,
}

impl Hubs {
    /// All hubs but this node itself.
    #[must_use]
    pub fn of(topology: &Topology, endpoints: &BTreeMap<String, String>, own: &str, tls: Arc<ClientConfig>) -> Self {
        let of = |hub: &Node| {
            let public = hub.endpoint_in(endpoints)?;
            Some(HubAddress { slot: hub.name.clone(), public, mesh: hub.address.to_string() })
        };
        let hubs = topology.hubs.iter().filter(|h| h.name != own).filter_map(of).collect();
        let port = topology.mesh.port;
        Self {
            hubs,
            port,
            tls,
            neighbourhood: None,
            over_mesh: false,
            is_lost: AtomicBool::new(false),
            etcd_patroni: String::new(),
            fleet: topology.name.clone(),
            root: String::new(),
        }
    }

    /// Verifies the operator's evictions of hubs, which hubs hand out, with the fleet root's certificate.
    #[must_use]
    pub fn with_root(self, root: &str) -> Self {
        Self { root: root.to_owned(), ..self }
    }

    /// Tells the hubs, with each question who is where, whether this node's Patroni runs with this etcd password.
    #[must_use]
    pub fn with_etcd_patroni(self, password: &str) -> Self {
        Self { etcd_patroni: password.to_owned(), ..self }
    }

    /// Asks only hubs whose TLS keys are those that the neighbourhood knows, once it knows any.
    #[must_use]
    pub fn known_by(self, neighbourhood: Arc<PeerTable>) -> Self {
        Self { neighbourhood: Some(neighbourhood), ..self }
    }

    /// Asks at the mesh addresses first.
    #[must_use]
    pub fn over_mesh(self) -> Self {
        Self { over_mesh: true, ..self }
    }

    /// Slots of all hubs of the plan but this node.
    #[must_use]
    pub fn slots(&self) -> Vec<String> {
        self.hubs.iter().map(|hub| hub.slot.clone()).collect()
    }

    /// All hubs in an order of chance, so that a rack that starts does not ask one of them alone.
    pub(crate) fn shuffled(&self) -> Vec<&HubAddress> {
        let mut hubs: Vec<_> = self.hubs.iter().collect();
        for i in (1..hubs.len()).rev() {
            hubs.swap(i, chance(i + 1));
        }
        hubs
    }

    /// Hubs that are current as far as this node knows; all of the plan where it knows none, or hears
    /// none of those that it knows.
    fn current(&self) -> Vec<&HubAddress> {
        let mut hubs = self.shuffled();
        let pins = self.pins();
        if !pins.is_empty() && !self.is_lost.load(Ordering::Relaxed) {
            hubs.retain(|hub| pins.contains_key(&hub.slot));
        }
        hubs
    }

    fn pins(&self) -> BTreeMap<String, String> {
        self.neighbourhood.as_ref().map(|n| n.pins()).unwrap_or_default()
    }

    /// Opens a connection at the public endpoint.
    pub(crate) async fn public(&self, hub: &HubAddress) -> Result<Connection> {
        Ok(Connection::open(&hub.public, self.port, &hub.slot, &self.tls).await?)
    }

    async fn connect(&self, hub: &HubAddress) -> Result<Connection> {
        if self.over_mesh
            && let Ok(Ok(connection)) =
                timeout(MESH_PATIENCE, Connection::open(&hub.mesh, self.port, &hub.slot, &self.tls)).await
        {
            return Ok(connection);
        }
        self.public(hub).await
    }

    /// Asks one hub something, if it is the hub that this node knows.
    async fn ask(&self, hub: &HubAddress, method: &str, path: &str, body: &[u8]) -> Result<bytes::Bytes> {
        let mut connection = self.connect(hub).await?;
        let pins = self.pins();
        if !pins.is_empty() && pins.get(&hub.slot).map(String::as_str) != connection.peer_key() {
            let why = "the other hubs know it by another key: it is not asked until they name this one".to_owned();
            return Err(Error::Network { to: hub.slot.clone(), why });
        }
        Ok(connection.ask(request(method, "hub", path, &[], body.to_vec().into())?, LONGEST).await?)
    }

    /// The first hub's answer, of those that are current.
    async fn first<T>(
        &self,
        method: &str,
        path: &str,
        body: &[u8],
        read: impl Fn(&str, &[u8]) -> Result<T>,
    ) -> Result<T> {
        let mut last = Error::Failed("the fleet has no other hub".to_owned());
        for hub in self.current() {
            match self.ask(hub, method, path, body).await.and_then(|answer| read(&hub.slot, &answer)) {
                Ok(answer) => return Ok(answer),
                Err(e) => last = e,
            }
        }
        Err(last)
    }

    /// What one hub says of the fleet, with the key that it says it with.
    async fn heard(&self, hub: &HubAddress) -> Result<HubAnswer> {
        let asked = async {
            let mut connection = self.connect(hub).await?;
            let user = patroni_runs_with(&self.etcd_patroni).then_some((USER_HEADER, PATRONI));
            let sent = request("GET", "hub", "/v1/peers", user.as_slice(), "".into())?;
            let answer = connection.ask(sent, LONGEST).await?;
            self.answered(&hub.slot, &connection, &answer)
        };
        let late = |_| Err(Error::Network { to: hub.slot.clone(), why: "no answer".to_owned() });
        timeout(ROUND_PATIENCE, asked).await.unwrap_or_else(late)
    }

    fn answered(&self, slot: &str, connection: &Connection, answer: &[u8]) -> Result<HubAnswer> {
        let peers: Peers = read(slot, answer)?;
        let is_signed = |proof: &&Eviction| {
            decode(&proof.signature).is_some_and(|s| signed_by_root(&self.root, proof.order.as_bytes(), &s))
        };
        let evicted = peers.evicted.iter().filter(is_signed).filter_map(|proof| proof.owner(&self.fleet)).collect();
        let tls_key = connection.peer_key().unwrap_or_default().to_owned();
        Ok(HubAnswer { hub: slot.to_owned(), tls_key, peers, evicted })
    }

    /// Their answers, and why others do not answer.
    async fn all_heard(&self, hubs: &[&HubAddress]) -> (Vec<HubAnswer>, Vec<Error>) {
        let (mut answers, mut errors) = (Vec::new(), Vec::new());
        for answer in join_all(hubs.iter().map(|hub| self.heard(hub))).await {
            match answer {
                Ok(answer) => answers.push(answer),
                Err(e) => errors.push(e),
            }
        }
        (answers, errors)
    }

    /// What every hub of the plan says of the fleet.
    pub async fn answers(&self) -> Vec<HubAnswer> {
        self.all_heard(&self.shuffled()).await.0
    }

    /// Asks two hubs who is where, and the others where these leave something open; `decide` says what
    /// follows from the answers.
    pub async fn round(&self, decide: impl Fn(&[HubAnswer]) -> Decision) -> Decision {
        let mut left = self.current();
        let (mut answers, mut errors) = (Vec::new(), Vec::new());
        while answers.len() < ASKED && !left.is_empty() {
            let next: Vec<_> = left.drain(..left.len().min(ASKED - answers.len())).collect();
            let (heard, failed) = self.all_heard(&next).await;
            answers.extend(heard);
            errors.extend(failed);
        }
        let mut decision = decide(&answers);
        if (decision.is_open || decision.heard == Heard::None) && !left.is_empty() {
            answers.extend(self.all_heard(&left).await.0);
            decision = decide(&answers);
        }
        if decision.heard == Heard::None {
            for e in &errors {
                println!("{e}");
            }
            for answer in &answers {
                println!("{}: its key is not the one that the other hubs name", answer.hub);
            }
        }
        self.is_lost.store(decision.heard == Heard::None, Ordering::Relaxed);
        decision
    }

    /// Says what this node runs, to whichever hub answers first.
    ///
    /// # Errors
    /// No hub answers, or the one that does refuses.
    pub async fn turn(&self, report: &Report) -> Result<UpdateDecision> {
        let body = serde_json::to_vec(report).map_err(|e| Error::Failed(e.to_string()))?;
        self.first("POST", "/v1/turn", &body, read).await
    }

    /// Says that this node is about to leave, to whichever hub answers first.
    ///
    /// # Errors
    /// No hub answers, or etcd can't do without this node now.
    pub async fn leave(&self) -> Result<()> {
        self.first("POST", "/v1/leave", b"", |_, _| Ok(())).await
    }

    /// Says that this node has stopped for good.
    ///
    /// # Errors
    /// No hub answers.
    pub async fn left(&self) -> Result<()> {
        self.first("POST", "/v1/left", b"", |_, _| Ok(())).await
    }

    /// Gives the hubs this node's next keys. A hub that says "later" is not the last one asked.
    ///
    /// # Errors
    /// No hub answers.
    pub async fn renew(&self, next: &Keys) -> Result<JoinReply> {
        let asked = Renewal {
            version: PROTOCOL,
            mesh_key: next.mesh_public()?,
            tls_key: encode(next.tls.public()?.as_bytes()),
        };
        let body = serde_json::to_vec(&asked).map_err(|e| Error::Failed(e.to_string()))?;
        let mut last = Err(Error::Failed("the fleet has no other hub".to_owned()));
        for hub in self.current() {
            last = self.ask(hub, "POST", "/v1/renew", &body).await.and_then(|b| read(&hub.slot, &b));
            let later = match &last {
                Ok(JoinReply::Refused(no)) => no.reason.passes(),
                Ok(JoinReply::Granted(_)) => false,
                Err(_) => true,
            };
            if !later {
                break;
            }
        }
        last
    }

    /// Tells every hub whose key is not known who this founder is; gives what they answer.
    pub async fn introduce(&self, own: &Introduction, known: impl Fn(&str) -> bool) -> Vec<HubAnswer> {
        let body = serde_json::to_vec(own).unwrap_or_default();
        let asked = self.hubs.iter().filter(|hub| !known(&hub.slot)).map(async |hub| {
            let answer = async {
                // Before they know each other, there is no mesh between them.
                let mut connection = self.public(hub).await?;
                let sent = request("POST", "hub", "/v1/introduce", &[(USER_HEADER, MEMBER)], body.clone().into())?;
                let answer = connection.ask(sent, LONGEST).await?;
                self.answered(&hub.slot, &connection, &answer)
            };
            answer.await.inspect_err(|e| println!("{e}")).ok()
        });
        join_all(asked).await.into_iter().flatten().collect()
    }
}

pub(crate) fn read<T: DeserializeOwned>(slot: &str, bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes)
        .map_err(|e| Error::Network { to: slot.to_owned(), why: format!("its answer is not readable: {e}") })
}
