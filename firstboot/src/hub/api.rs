//! The join API's requests and their answers; [`super::listener`] has the connections.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use fleet::{
    Departure, Grant, Introduction, Issuer, JoinReply, JoinRequest, Node, PROTOCOL, Peers, PublicKey, Reason, Refusal,
    Renewal, Report, Revocation, Rollout, RolloutOrder, RolloutRequest, Secrets, Tokens, TokensRequest, Topology,
    UpdateDecision, encoding,
};
use http_body_util::Full;
use hyper::{Method, Request, Response, StatusCode};
use serde::Serialize;

use super::claims::SlotAllocator;
use super::departures::Identified;
use super::orders::{OrderLog, Signed};
use super::peer::{Member, Peer};
use super::refusal::{self, no};
use super::rollout;
use super::token::verify;
use crate::error::{Error, Result};
use crate::node::etcd_user::{MEMBER, PATRONI, USER_HEADER};
use crate::node::neighbours::PeerTable;

/// What the API answers from.
pub struct Hub {
    pub topology: Topology,
    /// The fleet root's certificate, PEM.
    pub root: String,
    pub issuer: Issuer,
    pub secrets: Secrets,
    /// Of this hub's own grant.
    pub epoch: u64,
    pub desk: Arc<SlotAllocator>,
    pub neighbourhood: Arc<PeerTable>,
    /// The operator's orders that this hub has carried out.
    pub orders: OrderLog,
}

/// An extension of the response to a join that was granted.
#[derive(Clone, Copy)]
pub(super) struct Admitted;

/// Answers one request of a connection.
pub(super) async fn answer(hub: &Hub, peer: &Peer, request: Request<Bytes>) -> Response<Full<Bytes>> {
    let (head, body) = request.into_parts();
    let signed = Signed::of(peer, &head, &body);
    let user = head.headers.get(USER_HEADER).and_then(|v| v.to_str().ok());
    match (head.method.clone(), head.uri.path(), peer.member.as_ref()) {
        (Method::POST, "/v1/join", _) => {
            let reply = hub.join(&signed).await;
            let mut response = json(&reply);
            if matches!(reply, JoinReply::Granted(_)) {
                response.extensions_mut().insert(Admitted);
            }
            response
        }
        (Method::POST, "/v1/renew", Some(member)) => json(&hub.renew(member, &body).await),
        (Method::POST, "/v1/introduce", Some(member)) => match hub.introduce(member, &body, user == Some(MEMBER)) {
            Ok(peers) => json(&peers),
            Err(refusal) => plain(StatusCode::FORBIDDEN, &refusal.text),
        },
        (Method::POST, "/v1/revoke", _) => told(hub.revoke(&signed).await),
        (Method::POST, "/v1/leave", Some(member)) if !signed.is_signed() => told(hub.take_leave(member).await),
        (Method::POST, "/v1/leave", _) => told(hub.leave(&signed).await),
        (Method::POST, "/v1/left", Some(member)) => {
            told(hub.desk.left(&member.slot, &member.tls_key).await.unwrap_or_else(|e| Err(busy(e))))
        }
        (Method::POST, "/v1/tokens", _) => match hub.tokens(&signed).await {
            Ok(tokens) => json(&tokens),
            Err(refusal) => told(Err(refusal)),
        },
        (Method::POST, "/v1/rollout", _) => match hub.rollout(&signed).await {
            Ok(rollout) => json(&rollout),
            Err(refusal) if refusal.reason.passes() => plain(StatusCode::SERVICE_UNAVAILABLE, &refusal.text),
            Err(refusal) => plain(StatusCode::FORBIDDEN, &refusal.text),
        },
        (Method::POST, "/v1/turn", Some(member)) => match hub.turn(member, &body).await {
            Ok(answer) => json(&answer),
            Err(refusal) if refusal.reason.passes() => plain(StatusCode::SERVICE_UNAVAILABLE, &refusal.text),
            Err(refusal) => plain(StatusCode::FORBIDDEN, &refusal.text),
        },
        (Method::GET, "/v1/peers", Some(member)) => {
            let peers = hub.peers(member);
            // Another machine has its place: then it is not the slot's owner that lives.
            if peers.fenced.is_none() {
                let (desk, slot, tls_key) = (hub.desk.clone(), member.slot.clone(), member.tls_key.clone());
                let has_password = user == Some(PATRONI);
                tokio::spawn(async move {
                    if let Err(e) = desk.saw(&slot).await {
                        println!("{e}");
                    }
                    if has_password && let Err(e) = desk.has_etcd_password(&slot, &tls_key).await {
                        println!("{e}");
                    }
                });
            }
            json(&peers)
        }
        (_, "/v1/renew" | "/v1/introduce" | "/v1/peers" | "/v1/turn" | "/v1/left", None) => {
            plain(StatusCode::UNAUTHORIZED, "show a certificate of this fleet")
        }
        _ => plain(StatusCode::NOT_FOUND, "no such thing"),
    }
}

impl Hub {
    /// Lets a node in, or says why not.
    async fn join(&self, signed: &Signed<'_>) -> JoinReply {
        let granted = async {
            let signature = signed.signature()?;
            let request: JoinRequest = serde_json::from_slice(signed.body)
                .map_err(|e| no(Reason::Malformed, &format!("the request is not readable: {e}")))?;
            if request.version != PROTOCOL {
                let text = format!(
                    "the request has format {}, this hub reads {PROTOCOL}; rebuild the older image",
                    request.version
                );
                return Err(no(Reason::Malformed, &text));
            }
            let key = tls_key(&request.tls_key)?;
            let claims = verify(&self.root, &self.topology.name, &request, &signed.message, signature)?;
            let given = self.desk.claim(&claims, &request).await.map_err(|e| {
                eprintln!("a claim for {}: {e}", claims.group);
                no(Reason::Busy, "etcd does not answer")
            })??;
            let Some(node) = self.topology.node(&given.slot) else {
                return Err(no(Reason::Malformed, &format!("the fleet has no slot `{}` any more", given.slot)));
            };
            if claims.replace && self.topology.is_founder(node) {
                // A node asks until it has its grant, and starts etcd afterwards.
                self.desk.readmit(&given.slot, given.epoch).await.map_err(|e| {
                    eprintln!("etcd's members: {e}");
                    no(Reason::Busy, "etcd does not let the new machine in yet")
                })?;
            }
            println!("{} is {} (epoch {}), token {}", request.mesh_key, given.slot, given.epoch, claims.id);
            self.grant(node, given.epoch, &key)
        };
        reply(granted.await)
    }

    /// Gives a node's new keys the slot of its old ones, or says why not.
    async fn renew(&self, member: &Member, body: &[u8]) -> JoinReply {
        let granted = async {
            let asked: Renewal = serde_json::from_slice(body)
                .map_err(|e| no(Reason::Malformed, &format!("the request is not readable: {e}")))?;
            if asked.version != PROTOCOL {
                return Err(no(Reason::Malformed, &format!("this hub reads format {PROTOCOL}")));
            }
            let key = tls_key(&asked.tls_key)?;
            let node = self.topology.node(&member.slot);
            let node = node.ok_or_else(|| no(Reason::Malformed, &format!("the fleet has no `{}`", member.slot)))?;
            let given = self.desk.renew(&member.slot, &member.tls_key, &asked).await.map_err(busy)??;
            println!("{} is {} (epoch {}), renewed", asked.mesh_key, given.slot, given.epoch);
            self.grant(node, given.epoch, &key)
        };
        reply(granted.await)
    }

    fn grant(&self, node: &Node, epoch: u64, key: &PublicKey) -> Result<Grant, Refusal> {
        let cert = self.issuer.node(&self.topology, node, key);
        let cert = cert.map_err(|e| no(Reason::Malformed, &format!("the TLS key is not one: {e}")))?;
        let secrets = self.secrets.for_roles(&node.roles);
        Ok(Grant { slot: node.name.clone(), epoch, cert, secrets, hubs: self.founders() })
    }

    /// The operator takes a token back.
    async fn revoke(&self, signed: &Signed<'_>) -> Result<(), Refusal> {
        let asked: Revocation = self.orders.verify(&self.root, &self.topology.name, &self.desk.by, signed)?;
        println!("token {} is revoked", asked.token.escape_debug());
        self.desk.revoke(&asked.token).await.map_err(busy)
    }

    /// The operator asks what became of the tokens.
    async fn tokens(&self, signed: &Signed<'_>) -> Result<Tokens, Refusal> {
        let _: TokensRequest = self.orders.verify(&self.root, &self.topology.name, &self.desk.by, signed)?;
        self.desk.tokens().await.map_err(busy)
    }

    /// The operator has a node go.
    async fn leave(&self, signed: &Signed<'_>) -> Result<(), Refusal> {
        let asked: Departure = self.orders.verify(&self.root, &self.topology.name, &self.desk.by, signed)?;
        println!("{} is to leave{}", asked.slot.escape_debug(), if asked.now { " at once" } else { "" });
        let owner = asked.tls_key.as_deref().map_or(Identified::Epoch(asked.epoch), Identified::Key);
        let proof = signed.proof(&self.root).filter(|proof| proof.owner(&self.topology.name).is_some());
        self.desk.leave(&asked.slot, asked.now, owner, proof).await.unwrap_or_else(|e| Err(busy(e)))
    }

    /// A node goes by itself.
    async fn take_leave(&self, member: &Member) -> Result<(), Refusal> {
        println!("{} leaves", member.slot);
        let owner = Identified::Key(&member.tls_key);
        self.desk.leave(&member.slot, false, owner, None).await.unwrap_or_else(|e| Err(busy(e)))
    }

    /// The operator looks at the rollout, pauses it, or lets it go on.
    async fn rollout(&self, signed: &Signed<'_>) -> Result<Rollout, Refusal> {
        let asked: RolloutRequest = self.orders.verify(&self.root, &self.topology.name, &self.desk.by, signed)?;
        if let RolloutOrder::Skip { node } = &asked.order
            && self.topology.node(node).is_none()
        {
            return Err(no(Reason::Malformed, &format!("the fleet has no node `{}`", node.escape_debug())));
        }
        if asked.order != RolloutOrder::Tell {
            println!("rollout: {:?}", asked.order);
        }
        rollout::order(self.desk.etcd(), &asked.order).await.map_err(busy)
    }

    /// A member says what it runs, and may be told to change.
    async fn turn(&self, member: &Member, body: &[u8]) -> Result<UpdateDecision, Refusal> {
        let said: Report = serde_json::from_slice(body)
            .map_err(|e| no(Reason::Malformed, &format!("the report is not readable: {e}")))?;
        if said.version != PROTOCOL {
            return Err(no(Reason::Malformed, &format!("this hub reads format {PROTOCOL}")));
        }
        if let Some(epoch) = self.desk.fenced(&member.slot, &member.tls_key) {
            let text = format!("{} is another machine's since epoch {epoch}", member.slot);
            return Err(no(Reason::Fenced, &text));
        }
        rollout::report(self.desk.etcd(), &self.topology, &member.slot, &said).await.map_err(busy)
    }

    /// A founder says who it is, before there is an etcd to read it from.
    fn introduce(&self, member: &Member, body: &[u8], takes_passwords: bool) -> Result<Peers, Refusal> {
        let said: Introduction = serde_json::from_slice(body)
            .map_err(|e| no(Reason::Malformed, &format!("the introduction is not readable: {e}")))?;
        if said.version != PROTOCOL {
            return Err(no(Reason::Malformed, &format!("this hub reads format {PROTOCOL}")));
        }
        if self.topology.node(&member.slot).is_none_or(|n| !self.topology.is_founder(n)) {
            return Err(no(Reason::Malformed, &format!("{} is no founder", member.slot)));
        }
        let mut peers = self.peers(member);
        // Where etcd can't be asked, what it said is still true.
        if self.neighbourhood.is_stranger(&member.slot, said.mesh_key) {
            peers.fenced.get_or_insert(1);
        }
        if peers.fenced.is_none() {
            self.neighbourhood.learn(&member.slot, said.mesh_key);
            // Voters that are not hubs are no clients of etcd: a hub enters them.
            if self.topology.node(&member.slot).is_some_and(|n| n.hub == 0) {
                let (desk, slot, tls_key) = (self.desk.clone(), member.slot.clone(), member.tls_key.clone());
                tokio::spawn(async move {
                    if let Err(e) = desk.enter_voter(&slot, said.mesh_key, &tls_key, takes_passwords).await {
                        println!("{slot}: {e}");
                    }
                });
            }
        }
        Ok(peers)
    }

    fn peers(&self, member: &Member) -> Peers {
        let fenced = self.desk.fenced(&member.slot, &member.tls_key);
        let leaving = fenced.is_none() && self.desk.is_leaving(&member.slot);
        let owners = self.desk.owners();
        let vacant = owners.iter().filter(|(_, r)| r.vacant).map(|(slot, _)| slot.clone()).collect();
        let is_hub = |slot: &str| self.topology.hubs.iter().any(|hub| hub.name == slot);
        let hubs = owners.iter().filter(|(slot, r)| is_hub(slot) && !r.vacant);
        let hubs = hubs.map(|(slot, r)| (slot.clone(), r.tls_key.clone())).collect();
        let evicted = owners.iter().filter(|(slot, _)| is_hub(slot)).filter_map(|(_, r)| r.eviction.clone()).collect();
        Peers { keys: self.founders(), hubs, epoch: self.epoch, fenced, leaving, vacant, evicted }
    }

    /// Keys of those that everybody has to know.
    fn founders(&self) -> BTreeMap<String, fleet::MeshKey> {
        let mut keys = self.neighbourhood.keys();
        keys.retain(|slot, _| self.topology.node(slot).is_some_and(|n| self.topology.is_founder(n)));
        keys
    }
}

fn reply(granted: Result<Grant, Refusal>) -> JoinReply {
    match granted {
        Ok(grant) => JoinReply::Granted(grant),
        Err(refusal) => {
            refusal::log(&refusal);
            JoinReply::Refused(refusal)
        }
    }
}

fn tls_key(text: &str) -> Result<PublicKey, Refusal> {
    let key = encoding::decode(text).and_then(|k| PublicKey::of(&k));
    key.ok_or_else(|| no(Reason::Malformed, "the TLS key is not one"))
}

#[allow(clippy::needless_pass_by_value, reason = "it is given to map_err")]
fn busy(e: Error) -> Refusal {
    eprintln!("{e}");
    no(Reason::Busy, "etcd does not answer")
}

fn told(done: Result<(), Refusal>) -> Response<Full<Bytes>> {
    match done {
        Ok(()) => plain(StatusCode::OK, ""),
        Err(refusal) if refusal.reason.passes() => plain(StatusCode::SERVICE_UNAVAILABLE, &refusal.text),
        Err(refusal) => plain(StatusCode::FORBIDDEN, &refusal.text),
    }
}

fn json(value: &impl Serialize) -> Response<Full<Bytes>> {
    let mut response = plain(StatusCode::OK, &serde_json::to_string(value).unwrap_or_default());
    response.headers_mut().insert("content-type", hyper::header::HeaderValue::from_static("application/json"));
    response
}

pub(super) fn plain(status: StatusCode, text: &str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(text.to_owned())));
    *response.status_mut() = status;
    response
}
