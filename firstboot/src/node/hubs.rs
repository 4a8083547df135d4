//! Client of the hubs' API. A member connects to the hubs' mesh addresses first, and other machines to their public
//! endpoints.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use fleet::encoding::{decode, encode};
use fleet::node_api::{AUDIT_PATH, AuditEntry, DRAINED_PATH, DrainAnswer, DrainRequest, LOCK_PATH, LockRequest};
use fleet::{
    Eviction, Introduction, JoinReply, LONGEST, Node, PROTOCOL, Peers, Renewal, Report, Topology, UpdateDecision,
};
use futures_util::future::{join_all, select_ok};
use serde::de::DeserializeOwned;
use tokio::time::timeout;
use tokio_rustls::rustls::ClientConfig;
use tracing::{debug, warn};

use crate::client::backoff::chance;
use crate::error::{Error, Result};
use crate::host::screen;
use crate::node::etcd_user::{MEMBER, PATRONI, USER_HEADER, patroni_runs_with};
use crate::node::keys::Keys;
use crate::node::neighbours::PeerTable;
use crate::node::revocations::Revocations;
use crate::node::trust::{Decision, Heard, HubAnswer, signed_by_root};
use fleet_https::{Connection, request};

/// Time limit for a connection to a hub's mesh address, before the node tries its public endpoint.
const MESH_TIMEOUT: Duration = Duration::from_secs(2);
/// Time limit for the reply of one hub to a request for peers.
const ROUND_TIMEOUT: Duration = Duration::from_secs(12);
/// Head start of a hub over the next one in a request for which an operator waits.
const HEAD_START: Duration = Duration::from_millis(700);
/// Number of hubs from which a node requests its peers at a time. With two, an evicted hub alone cannot hide its
/// eviction from the node.
const ASKED: usize = 2;

/// Client of the hubs' API.
pub struct Hubs {
    hubs: Vec<HubAddress>,
    port: u16,
    tls: Arc<ClientConfig>,
    /// Keys of the hubs; `None` on a machine that joins.
    neighbourhood: Option<Arc<PeerTable>>,
    /// Takes the revocations in the hubs' replies.
    revocations: Option<Arc<Revocations>>,
    over_mesh: bool,
    /// Whether no hub of the peer table replied to the last requests for peers.
    is_lost: AtomicBool,
    /// Patroni's etcd password; empty without Patroni or a password.
    etcd_patroni: String,
    fleet: String,
    /// The fleet's root certificate, PEM, which verifies evictions. If it is empty, the node accepts no eviction.
    root: String,
}

/// Addresses of a hub.
pub(crate) struct HubAddress {
    pub(crate) slot: String,
    public: String,
    mesh: String,
}

impl Hubs {
    /// Makes a client of all hubs except this node itself.
    #[must_use]
    pub fn new(topology: &Topology, endpoints: &BTreeMap<String, String>, own: &str, tls: Arc<ClientConfig>) -> Self {
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
            revocations: None,
            over_mesh: false,
            is_lost: AtomicBool::new(false),
            etcd_patroni: String::new(),
            fleet: topology.name.clone(),
            root: String::new(),
        }
    }

    /// Accepts evictions of hubs that the fleet's root signed.
    #[must_use]
    pub fn with_root(self, root: &str) -> Self {
        Self { root: root.to_owned(), ..self }
    }

    /// Reports to the hubs, with each request for peers, whether this node's Patroni runs with this etcd password.
    #[must_use]
    pub fn with_etcd_patroni(self, password: &str) -> Self {
        Self { etcd_patroni: password.to_owned(), ..self }
    }

    /// Sends requests only to hubs whose TLS keys are in the peer table, if the table has any.
    #[must_use]
    pub fn known_by(self, neighbourhood: Arc<PeerTable>) -> Self {
        Self { neighbourhood: Some(neighbourhood), ..self }
    }

    /// Adds the operators' certificates that hubs report as revoked. A reply proves each with the root's signature, so
    /// one hub is enough.
    #[must_use]
    pub fn with_revocations(self, revocations: Arc<Revocations>) -> Self {
        Self { revocations: Some(revocations), ..self }
    }

    /// Tries the mesh addresses first.
    #[must_use]
    pub fn over_mesh(self) -> Self {
        Self { over_mesh: true, ..self }
    }

    /// Returns the slots of all hubs of the topology except this node.
    #[must_use]
    pub fn slots(&self) -> Vec<String> {
        self.hubs.iter().map(|hub| hub.slot.clone()).collect()
    }

    /// Returns all hubs in random order, so that machines that start together do not all ask the same hub.
    pub(crate) fn shuffled(&self) -> Vec<&HubAddress> {
        let mut hubs: Vec<_> = self.hubs.iter().collect();
        for i in (1..hubs.len()).rev() {
            hubs.swap(i, chance(i + 1));
        }
        hubs
    }

    /// Returns the hubs whose keys are in the peer table. If there are none, or no such hub replied to the last
    /// requests for peers, returns all hubs of the topology.
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

    /// Connects to the hub's public endpoint.
    pub(crate) async fn public(&self, hub: &HubAddress) -> Result<Connection> {
        Ok(Connection::open(&hub.public, self.port, &hub.slot, &self.tls).await?)
    }

    async fn connect(&self, hub: &HubAddress) -> Result<Connection> {
        if self.over_mesh
            && let Ok(Ok(connection)) =
                timeout(MESH_TIMEOUT, Connection::open(&hub.mesh, self.port, &hub.slot, &self.tls)).await
        {
            return Ok(connection);
        }
        self.public(hub).await
    }

    /// Sends a request to one hub, if the hub has the key that this node knows.
    async fn ask(&self, hub: &HubAddress, method: &str, path: &str, body: &[u8]) -> Result<bytes::Bytes> {
        let mut connection = self.connect(hub).await?;
        let pins = self.pins();
        if !pins.is_empty() && pins.get(&hub.slot).map(String::as_str) != connection.peer_key() {
            let why = "the hub has another key than the other hubs report; no request was sent";
            return Err(Error::network(&hub.slot, why));
        }
        Ok(connection.ask(request(method, "hub", path, &[], body.to_vec().into())?, LONGEST).await?)
    }

    /// Returns the reply of the first current hub that answers.
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
                Err(e) => {
                    debug!(peer = hub.slot, "{path}: {}", e.chain());
                    last = e;
                }
            }
        }
        Err(last)
    }

    /// Returns one hub's reply to a request for peers.
    async fn heard(&self, hub: &HubAddress) -> Result<HubAnswer> {
        let asked = async {
            let mut connection = self.connect(hub).await?;
            let user = patroni_runs_with(&self.etcd_patroni).then_some((USER_HEADER, PATRONI));
            let sent = request("GET", "hub", "/v1/peers", user.as_slice(), "".into())?;
            let answer = connection.ask(sent, LONGEST).await?;
            self.answered(&hub.slot, &connection, &answer)
        };
        let late = |_| Err(fleet_https::Error::no_answer(&hub.slot).into());
        timeout(ROUND_TIMEOUT, asked).await.unwrap_or_else(late)
    }

    fn answered(&self, slot: &str, connection: &Connection, answer: &[u8]) -> Result<HubAnswer> {
        let peers: Peers = read(slot, answer)?;
        if let Some(revocations) = &self.revocations {
            revocations.learn_all(&peers.revoked_operators);
        }
        let is_signed = |proof: &&Eviction| {
            decode(&proof.signature).is_some_and(|s| signed_by_root(&self.root, proof.order.as_bytes(), &s))
        };
        let evicted = peers.evicted.iter().filter(is_signed).filter_map(|proof| proof.owner(&self.fleet)).collect();
        let tls_key = connection.peer_key().unwrap_or_default().to_owned();
        Ok(HubAnswer { hub: slot.to_owned(), tls_key, peers, evicted })
    }

    /// Returns the replies of these hubs, and the errors of the others.
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

    /// Returns the replies of all hubs of the topology to a request for peers.
    pub async fn answers(&self) -> Vec<HubAnswer> {
        self.all_heard(&self.shuffled()).await.0
    }

    /// Requests the peers from two hubs. `decide` makes a decision from their replies. If the decision is open, or
    /// no reply is valid, requests the peers from the other hubs, too, and decides again.
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
            let (heard, failed) = self.all_heard(&left).await;
            answers.extend(heard);
            errors.extend(failed);
            decision = decide(&answers);
        }
        if decision.heard == Heard::None {
            for e in &errors {
                warn!("cannot get the peers: {}", e.chain());
            }
            for answer in &answers {
                warn!(
                    peer = answer.hub,
                    "{}: reply ignored: the hub has another key than the other hubs report", answer.hub
                );
            }
        }
        self.is_lost.store(decision.heard == Heard::None, Ordering::Relaxed);
        let why = || {
            let strangers = answers.iter().map(|answer| format!("{} has another key", answer.hub));
            let mut all: Vec<String> = errors.iter().map(Error::chain).chain(strangers).collect();
            // The node asks the hubs in random order, and equal reasons give the same text.
            all.sort_unstable();
            format!("no hub replies: {}", all.join("; "))
        };
        screen::waits((decision.heard == Heard::None).then(why));
        decision
    }

    /// Reports this node's version and state to the first hub that answers, and asks for the update lock.
    ///
    /// # Errors
    /// If no hub answers, or all refuse the report.
    pub async fn turn(&self, report: &Report) -> Result<UpdateDecision> {
        let body = serde_json::to_vec(report).map_err(Error::json("the report"))?;
        self.first("POST", "/v1/turn", &body, read).await
    }

    /// Returns the first good reply of a hub. Each hub has a head start over the next one.
    async fn raced<T>(&self, path: &str, body: &[u8], read: impl Fn(&str, &[u8]) -> Result<T>) -> Result<T> {
        let read = &read;
        let asked = self.current().into_iter().zip(0..).map(|(hub, place)| {
            Box::pin(async move {
                tokio::time::sleep(HEAD_START * place).await;
                read(&hub.slot, &self.ask(hub, "POST", path, body).await?)
            })
        });
        let asked: Vec<_> = asked.collect();
        if asked.is_empty() {
            return Err(Error::Failed("the fleet has no other hub".to_owned()));
        }
        select_ok(asked).await.map(|(reply, _)| reply)
    }

    /// Takes the fleet's lock for this number of seconds, or frees it for 0, through the hub that answers first.
    ///
    /// # Errors
    /// If no hub answers, or none reaches etcd.
    pub async fn lock(&self, seconds: u32) -> Result<UpdateDecision> {
        let body = serde_json::to_vec(&LockRequest { seconds }).map_err(Error::json("the request for the lock"))?;
        self.raced(LOCK_PATH, &body, read).await
    }

    /// Sends this node's entries of the audit log to the first hub that stores them in etcd.
    ///
    /// # Errors
    /// If no hub answers, or all refuse the entries.
    pub async fn audit(&self, entries: &[AuditEntry]) -> Result<()> {
        let body = serde_json::to_vec(entries).map_err(Error::json("the audit log"))?;
        self.raced(AUDIT_PATH, &body, |_, _| Ok(())).await
    }

    /// Reports to the first hub that answers whether this node is drained, and asks which nodes are.
    ///
    /// # Errors
    /// If no hub answers, or none reaches etcd.
    pub async fn drained(&self, request: DrainRequest) -> Result<DrainAnswer> {
        let body = serde_json::to_vec(&request).map_err(Error::json("the request about drained nodes"))?;
        self.raced(DRAINED_PATH, &body, read).await
    }

    /// Reports to the first hub that answers that this node leaves the fleet.
    ///
    /// # Errors
    /// If no hub answers, or etcd would lose its quorum without this node.
    pub async fn leave(&self) -> Result<()> {
        self.first("POST", "/v1/leave", b"", |_, _| Ok(())).await
    }

    /// Reports that this node has stopped, and its slot is free.
    ///
    /// # Errors
    /// If no hub answers.
    pub async fn left(&self) -> Result<()> {
        self.first("POST", "/v1/left", b"", |_, _| Ok(())).await
    }

    /// Sends this node's next keys to a hub. After a temporary refusal it tries the next hub.
    ///
    /// # Errors
    /// If no hub answers.
    pub async fn renew(&self, next: &Keys) -> Result<JoinReply> {
        let asked = Renewal {
            version: PROTOCOL,
            mesh_key: next.mesh_public()?,
            tls_key: encode(next.tls.public()?.as_bytes()),
        };
        let body = serde_json::to_vec(&asked).map_err(Error::json("the renewal"))?;
        let mut last = Err(Error::Failed("the fleet has no other hub".to_owned()));
        for hub in self.current() {
            last = self.ask(hub, "POST", "/v1/renew", &body).await.and_then(|b| read(&hub.slot, &b));
            let later = match &last {
                Ok(JoinReply::Refused(refusal)) => refusal.reason.passes(),
                Ok(JoinReply::Granted(_)) => false,
                Err(_) => true,
            };
            if !later {
                break;
            }
        }
        last
    }

    /// Introduces this founder to every hub whose key is not `known`. Returns their replies.
    pub async fn introduce(&self, own: &Introduction, known: impl Fn(&str) -> bool) -> Vec<HubAnswer> {
        let body = serde_json::to_vec(own).unwrap_or_default();
        let asked = self.hubs.iter().filter(|hub| !known(&hub.slot)).map(async |hub| {
            let answer = async {
                // Before two founders know each other's keys, there is no mesh between them.
                let mut connection = self.public(hub).await?;
                let sent = request("POST", "hub", "/v1/introduce", &[(USER_HEADER, MEMBER)], body.clone().into())?;
                let answer = connection.ask(sent, LONGEST).await?;
                self.answered(&hub.slot, &connection, &answer)
            };
            answer.await.inspect_err(|e| warn!(peer = hub.slot, "introduction failed: {}", e.chain())).ok()
        });
        join_all(asked).await.into_iter().flatten().collect()
    }
}

/// Parses a hub's reply.
pub(crate) fn read<T: DeserializeOwned>(slot: &str, bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|e| Error::network(slot, Error::cannot("read the reply")(e)))
}
