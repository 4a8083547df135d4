//! The join API's requests and replies; [`super::listener`] handles the connections.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use fleet::node_api::{AUDIT_PATH, AUDIT_QUERY_PATH, DRAINED_PATH, DrainAnswer, DrainRequest, LOCK_PATH, LockRequest};
use fleet::{
    Departure, Eviction, Grant, Introduction, Issuer, JoinReply, JoinRequest, Node, OperatorRevocation, PROTOCOL,
    Peers, PublicKey, Reason, Refusal, Renewal, Report, Revocation, RevokedOperator, Rollout, RolloutOrder,
    RolloutRequest, Secrets, Tokens, TokensRequest, Topology, UpdateDecision, encoding, printable,
};
use fleet_https::OperatorCertificate;
use http_body_util::Full;
use hyper::{Method, Request, Response, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tracing::{info, warn};

use super::claims::SlotAllocator;
use super::departures::Identified;
use super::drains;
use super::lock;
use super::operators;
use super::orders::{OrderLog, Signed};
use super::peer::{Member, Peer};
use super::records::GrantedSlot;
use super::refusal::{self, refuse};
use super::rollout;
use super::token::verify;
use crate::error::{Error, Result};
use crate::node::etcd_user::{MEMBER, PATRONI, USER_HEADER};
use crate::node::neighbours::PeerTable;
use crate::node::operator_peers::OperatorPeers;
use crate::node::revocations::{Learned, Revocations};

/// Refusal of a request that only operators may send.
const NEEDS_OPERATOR: &str = "this path requires a valid certificate of an operator";

/// State of the join API on one hub.
pub struct Hub {
    /// All nodes, and the settings of the fleet.
    pub topology: Topology,
    /// The fleet root's certificate, PEM.
    pub root: String,
    /// The issuer with which this hub signs the certificates of joiners.
    pub issuer: Issuer,
    /// Passwords of the services, which a grant contains.
    pub secrets: Secrets,
    /// Epoch of this hub's own slot.
    pub epoch: u64,
    /// Decides claims in etcd.
    pub allocator: Arc<SlotAllocator>,
    /// Peers of this hub in the mesh.
    pub neighbourhood: Arc<PeerTable>,
    /// Orders that this hub has carried out.
    pub orders: OrderLog,
    /// Revoked certificates of operators.
    pub revocations: Arc<Revocations>,
    /// Operators' machines; `None` if the fleet has no addresses for them.
    pub operator_peers: Option<Arc<OperatorPeers>>,
}

/// Marks the response to a granted join.
#[derive(Clone, Copy)]
pub(super) struct Admitted;

/// Handles one request of a connection.
pub(super) async fn answer(hub: &Hub, peer: &Peer, request: Request<Bytes>) -> Response<Full<Bytes>> {
    let (head, body) = request.into_parts();
    let signed = Signed::new(peer, &head, &body);
    let user = head.headers.get(USER_HEADER).and_then(|v| v.to_str().ok());
    match (head.method.clone(), head.uri.path(), hub.member(peer)) {
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
        (Method::POST, "/v1/revoke", _) => status_reply(hub.revoke(&signed).await),
        (Method::POST, "/v1/leave", Some(member)) if !signed.is_signed() => status_reply(hub.take_leave(member).await),
        (Method::POST, "/v1/leave", _) => status_reply(hub.leave(&signed).await),
        (Method::POST, "/v1/left", Some(member)) => {
            status_reply(hub.allocator.left(&member.slot, &member.tls_key).await.map_err(refused))
        }
        (Method::POST, "/v1/tokens", _) => match hub.tokens(&signed).await {
            Ok(tokens) => json(&tokens),
            Err(refusal) => status_reply(Err(refusal)),
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
        (Method::POST, LOCK_PATH, Some(member)) => match hub.lock(member, &body).await {
            Ok(answer) => json(&answer),
            Err(refusal) => status_reply(Err(refusal)),
        },
        (Method::POST, DRAINED_PATH, Some(member)) => match hub.drain(member, &body).await {
            Ok(answer) => json(&answer),
            Err(refusal) => status_reply(Err(refusal)),
        },
        (Method::POST, AUDIT_PATH, Some(member)) => status_reply(hub.take_audit(member, &body).await),
        (Method::POST, AUDIT_QUERY_PATH, _) if hub.operator(peer).is_some() => match hub.audit(&body).await {
            Ok(log) => json(&log),
            Err(refusal) => status_reply(Err(refusal)),
        },
        (Method::GET, "/v1/peers", Some(member)) => {
            let peers = hub.peers(member);
            // A fenced client is not the slot's owner, so its request does not count as the owner's.
            if peers.fenced.is_none() {
                let (allocator, slot, tls_key) = (hub.allocator.clone(), member.slot.clone(), member.tls_key.clone());
                let has_password = user == Some(PATRONI);
                tokio::spawn(async move {
                    if let Err(e) = allocator.saw(&slot).await {
                        warn!(slot, "{slot}: cannot record the contact in etcd: {}", e.chain());
                    }
                    if has_password && let Err(e) = allocator.has_etcd_password(&slot, &tls_key).await {
                        warn!(slot, "{slot}: cannot record its etcd password in etcd: {}", e.chain());
                    }
                });
            }
            json(&peers)
        }
        (Method::POST, "/v1/operators/wireguard", _) => match hub.operator(peer) {
            Some(operator) => match hub.add_operator_peer(operator, &body).await {
                Ok(peering) => json(&peering),
                Err(refusal) => status_reply(Err(refusal)),
            },
            None => plain(StatusCode::UNAUTHORIZED, NEEDS_OPERATOR),
        },
        (Method::POST, AUDIT_QUERY_PATH, _) => plain(StatusCode::UNAUTHORIZED, NEEDS_OPERATOR),
        (Method::POST, "/v1/operators/revoke", _) => status_reply(hub.revoke_operator(&signed).await),
        (Method::GET, "/v1/operators/revoked", _) if hub.knows(peer) => json(&hub.revocations.orders()),
        (_, "/v1/operators/revoked", _) => {
            plain(StatusCode::UNAUTHORIZED, "this path requires a certificate of an operator or a node of this fleet")
        }
        (
            _,
            "/v1/renew" | "/v1/introduce" | "/v1/peers" | "/v1/turn" | LOCK_PATH | AUDIT_PATH | DRAINED_PATH
            | "/v1/left",
            None,
        ) => plain(StatusCode::UNAUTHORIZED, "this path requires the certificate of a node of this fleet"),
        _ => plain(StatusCode::NOT_FOUND, "unknown path or method"),
    }
}

impl Hub {
    /// Grants a slot to a node, or refuses.
    async fn join(&self, signed: &Signed<'_>) -> JoinReply {
        let granted = async {
            let signature = signed.signature()?;
            let request: JoinRequest = serde_json::from_slice(signed.body)
                .map_err(|e| refuse(Reason::Malformed, &format!("cannot parse the request: {e}")))?;
            if request.version != PROTOCOL {
                let text = format!(
                    "the request has format {}, this hub reads {PROTOCOL}; rebuild the older image",
                    request.version
                );
                return Err(refuse(Reason::Malformed, &text));
            }
            let key = tls_key(&request.tls_key)?;
            let claims = verify(&self.root, &self.topology.name, &request, &signed.message, signature)?;
            let given = self.allocator.claim(&claims, &request).await.map_err(|e| match e {
                Error::Refused(refusal) => refusal,
                e => {
                    let group = &claims.group;
                    warn!(group, "cannot decide a claim for the group {group}: {}", e.chain());
                    refuse(Reason::Busy, "etcd does not answer")
                }
            })?;
            let Some(node) = self.topology.node(&given.slot) else {
                return Err(refuse(Reason::Malformed, &format!("the fleet has no slot `{}` any more", given.slot)));
            };
            if claims.replace && self.topology.is_founder(node) {
                // The node repeats its claim until it has the grant, and starts etcd only then.
                self.allocator.readmit(&given.slot, given.epoch).await.map_err(|e| {
                    warn!(slot = given.slot, "cannot add the etcd member of {}: {}", given.slot, e.chain());
                    refuse(Reason::Busy, "etcd has not added the new member yet")
                })?;
            }
            let GrantedSlot { slot, epoch } = &given;
            info!(
                slot,
                epoch,
                token = claims.id,
                "granted: {} is {slot} (epoch {epoch}), token {}",
                request.mesh_key,
                claims.id
            );
            self.grant(node, given.epoch, &key)
        };
        reply(granted.await)
    }

    /// Grants the slot of a member to its new keys, or refuses.
    async fn renew(&self, member: &Member, body: &[u8]) -> JoinReply {
        let granted = async {
            let renewal: Renewal = serde_json::from_slice(body)
                .map_err(|e| refuse(Reason::Malformed, &format!("cannot parse the request: {e}")))?;
            if renewal.version != PROTOCOL {
                return Err(refuse(
                    Reason::Malformed,
                    &format!("the request has an unknown format; this hub reads format {PROTOCOL}"),
                ));
            }
            let key = tls_key(&renewal.tls_key)?;
            let node = self.topology.node(&member.slot);
            let node = node.ok_or_else(|| refuse(Reason::Malformed, &format!("the fleet has no `{}`", member.slot)))?;
            let given = self.allocator.renew(&member.slot, &member.tls_key, &renewal).await.map_err(refused)?;
            let GrantedSlot { slot, epoch } = &given;
            info!(slot, epoch, "renewed: {} is {slot} (epoch {epoch})", renewal.mesh_key);
            self.grant(node, given.epoch, &key)
        };
        reply(granted.await)
    }

    fn grant(&self, node: &Node, epoch: u64, key: &PublicKey) -> Result<Grant, Refusal> {
        let cert = self.issuer.node(&self.topology, node, key);
        let cert = cert.map_err(|e| refuse(Reason::Malformed, &format!("the TLS key is invalid: {e}")))?;
        let secrets = self.secrets.for_roles(&node.roles);
        Ok(Grant { slot: node.name.clone(), epoch, cert, secrets, hubs: self.founders() })
    }

    /// Revokes a token by the operator's order.
    async fn revoke(&self, signed: &Signed<'_>) -> Result<(), Refusal> {
        let order: Revocation = self.orders.verify(&self.root, &self.topology.name, &self.allocator.by, signed)?;
        info!(token = order.token, "revoking the token {}", order.token.escape_debug());
        self.allocator.revoke(&order.token).await.map_err(refused)
    }

    /// Revokes the certificate of an operator, by the owner's order.
    async fn revoke_operator(&self, signed: &Signed<'_>) -> Result<(), Refusal> {
        let order: OperatorRevocation =
            self.orders.verify(&self.root, &self.topology.name, &self.allocator.by, signed)?;
        let proof = signed.proof(&self.root).map(|Eviction { order, signature }| RevokedOperator { order, signature });
        let invalid = "the order has expired, is too long, or has no signature over its body; update bakehouse on the \
                       operator's machine";
        let proof = proof.filter(|proof| self.revocations.verify(proof).is_some());
        let proof = proof.ok_or_else(|| refuse(Reason::Malformed, invalid))?;
        info!(operator = order.name, "revoking the certificate of the operator {}", order.name.escape_debug());
        // This hub refuses the operator at once, also without a quorum of etcd. The other hubs read the order in etcd.
        if self.revocations.learn(&proof) == Learned::Full {
            return Err(operators::full());
        }
        self.allocator.revoke_operator(&self.revocations, &order, &proof).await.map_err(refused)
    }

    /// Returns the use counts of the tokens and the revoked tokens, by the operator's order.
    async fn tokens(&self, signed: &Signed<'_>) -> Result<Tokens, Refusal> {
        let _: TokensRequest = self.orders.verify(&self.root, &self.topology.name, &self.allocator.by, signed)?;
        self.allocator.tokens().await.map_err(refused)
    }

    /// Orders a node to leave, by the operator's order.
    async fn leave(&self, signed: &Signed<'_>) -> Result<(), Refusal> {
        let order: Departure = self.orders.verify(&self.root, &self.topology.name, &self.allocator.by, signed)?;
        let at_once = if order.now { " at once" } else { "" };
        info!(slot = order.slot, "ordered {} to leave{at_once}", order.slot.escape_debug());
        let owner = order.tls_key.as_deref().map_or(Identified::Epoch(order.epoch), Identified::Key);
        let proof = signed.proof(&self.root).filter(|proof| proof.owner(&self.topology.name).is_some());
        self.allocator.leave(&order.slot, order.now, owner, proof).await.map_err(refused)
    }

    /// Accepts a node's own request to leave.
    async fn take_leave(&self, member: &Member) -> Result<(), Refusal> {
        info!(slot = member.slot, "{} asks to leave", member.slot);
        let owner = Identified::Key(&member.tls_key);
        self.allocator.leave(&member.slot, false, owner, None).await.map_err(refused)
    }

    /// Carries out an order of the operator about the rollout, and returns its state.
    async fn rollout(&self, signed: &Signed<'_>) -> Result<Rollout, Refusal> {
        let request: RolloutRequest =
            self.orders.verify(&self.root, &self.topology.name, &self.allocator.by, signed)?;
        if let RolloutOrder::Skip { node } = &request.order
            && self.topology.node(node).is_none()
        {
            return Err(refuse(Reason::Malformed, &format!("the fleet has no node `{}`", node.escape_debug())));
        }
        if request.order != RolloutOrder::Tell {
            info!("rollout: order {:?}", request.order);
        }
        rollout::order(self.allocator.etcd(), &request.order).await.map_err(refused)
    }

    /// Takes a member's report of its version, and returns whether the member may change its image.
    async fn turn(&self, member: &Member, body: &[u8]) -> Result<UpdateDecision, Refusal> {
        let report: Report = serde_json::from_slice(body)
            .map_err(|e| refuse(Reason::Malformed, &format!("cannot parse the report: {e}")))?;
        if report.version != PROTOCOL {
            return Err(refuse(
                Reason::Malformed,
                &format!("the request has an unknown format; this hub reads format {PROTOCOL}"),
            ));
        }
        if let Some(epoch) = self.allocator.fenced(&member.slot, &member.tls_key) {
            let text = format!("another machine has owned {} since epoch {epoch}", member.slot);
            return Err(refuse(Reason::Fenced, &text));
        }
        // The rollout has no place for a node that only an older fleet.toml has.
        if self.topology.node(&member.slot).is_none() {
            return Err(refuse(Reason::Malformed, &format!("the fleet has no node `{}`", member.slot.escape_debug())));
        }
        rollout::report(self.allocator.etcd(), &self.topology, &member.slot, &report).await.map_err(refused)
    }

    /// Takes the fleet's lock for a member's action, or frees it.
    async fn lock(&self, member: &Member, body: &[u8]) -> Result<UpdateDecision, Refusal> {
        let request: LockRequest = self.of_owner(member, body)?;
        lock::lock(self.allocator.etcd(), &member.slot, request.seconds).await.map_err(refused)
    }

    /// Records that a member is drained, or not any more, and returns the drained nodes.
    async fn drain(&self, member: &Member, body: &[u8]) -> Result<DrainAnswer, Refusal> {
        let request: DrainRequest = self.of_owner(member, body)?;
        let own = self.topology.node(self.allocator.own());
        let own = own.ok_or_else(|| refuse(Reason::Busy, "this hub is not in its fleet.toml"))?;
        // Its own connection, because etcd may need seconds to elect a leader.
        let etcd = self.allocator.etcd().reconnected();
        drains::drain(&etcd, &self.topology, own, &member.slot, request).await.map_err(refused)
    }

    /// Parses a request of a member that owns its slot.
    fn of_owner<T: DeserializeOwned>(&self, member: &Member, body: &[u8]) -> Result<T, Refusal> {
        let request = serde_json::from_slice(body)
            .map_err(|e| refuse(Reason::Malformed, &format!("cannot parse the request: {e}")))?;
        if let Some(epoch) = self.allocator.fenced(&member.slot, &member.tls_key) {
            let text = format!("another machine has owned {} since epoch {epoch}", member.slot);
            return Err(refuse(Reason::Fenced, &text));
        }
        Ok(request)
    }

    /// Takes a founder's introduction, which the hubs need before they have an etcd to read keys from.
    fn introduce(&self, member: &Member, body: &[u8], takes_passwords: bool) -> Result<Peers, Refusal> {
        let introduction: Introduction = serde_json::from_slice(body)
            .map_err(|e| refuse(Reason::Malformed, &format!("cannot parse the introduction: {e}")))?;
        if introduction.version != PROTOCOL {
            return Err(refuse(
                Reason::Malformed,
                &format!("the request has an unknown format; this hub reads format {PROTOCOL}"),
            ));
        }
        if self.topology.node(&member.slot).is_none_or(|n| !self.topology.is_founder(n)) {
            return Err(refuse(Reason::Malformed, &format!("{} is not a founder", member.slot)));
        }
        let mut peers = self.peers(member);
        // The hub's stored records of etcd are valid without a quorum too.
        if self.neighbourhood.is_stranger(&member.slot, introduction.mesh_key) {
            peers.fenced.get_or_insert(1);
        }
        if peers.fenced.is_none() {
            self.neighbourhood.learn(&member.slot, introduction.mesh_key);
            // Voters that are not hubs cannot write to etcd, so a hub registers them.
            if self.topology.node(&member.slot).is_some_and(|n| n.hub == 0) {
                let (allocator, slot, tls_key) = (self.allocator.clone(), member.slot.clone(), member.tls_key.clone());
                tokio::spawn(async move {
                    if let Err(e) = allocator.enter_voter(&slot, introduction.mesh_key, &tls_key, takes_passwords).await
                    {
                        warn!(slot, "cannot register the voter {slot}: {}", e.chain());
                    }
                });
            }
        }
        Ok(peers)
    }

    /// Returns the node that a client authenticated as; `None` if neither the topology nor etcd has its slot. A node of
    /// an older `fleet.toml` has a record in etcd until it has left.
    pub(super) fn member<'a>(&self, peer: &'a Peer) -> Option<&'a Member> {
        let has_slot = |slot: &str| self.topology.node(slot).is_some() || self.allocator.owners().contains_key(slot);
        peer.member().filter(|member| has_slot(&member.slot))
    }

    /// Returns the operator that a client authenticated as; `None` if the certificate is revoked.
    pub(super) fn operator<'a>(&self, peer: &'a Peer) -> Option<&'a OperatorCertificate> {
        peer.operator().filter(|operator| !self.revocations.is_revoked(&operator.key))
    }

    /// Whether a client is a node that is not fenced, or an operator whose certificate is not revoked.
    fn knows(&self, peer: &Peer) -> bool {
        let is_fenced = |member: &Member| self.allocator.fenced(&member.slot, &member.tls_key).is_some();
        self.member(peer).is_some_and(|member| !is_fenced(member)) || self.operator(peer).is_some()
    }

    fn peers(&self, member: &Member) -> Peers {
        let fenced = self.allocator.fenced(&member.slot, &member.tls_key);
        let leaving = fenced.is_none() && self.allocator.is_leaving(&member.slot);
        let owners = self.allocator.owners();
        let vacant = owners.iter().filter(|(_, r)| r.vacant).map(|(slot, _)| slot.clone()).collect();
        let is_hub = |slot: &str| self.topology.hubs.iter().any(|hub| hub.name == slot);
        let hubs = owners.iter().filter(|(slot, r)| is_hub(slot) && !r.vacant);
        let hubs = hubs.map(|(slot, r)| (slot.clone(), r.tls_key.clone())).collect();
        let evicted = owners.iter().filter(|(slot, _)| is_hub(slot)).filter_map(|(_, r)| r.eviction.clone()).collect();
        Peers {
            keys: self.founders(),
            hubs,
            epoch: self.epoch,
            fenced,
            leaving,
            vacant,
            evicted,
            revoked_operators: self.revocations.orders(),
        }
    }

    /// Returns the founders' mesh keys, which every node needs.
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
    let key = encoding::decode(text).and_then(|k| PublicKey::from_point(&k));
    key.ok_or_else(|| refuse(Reason::Malformed, "the TLS key is invalid"))
}

/// Returns the refusal for an error: the refusal itself, or a temporary one if etcd does not answer.
pub(super) fn refused(e: Error) -> Refusal {
    match e {
        Error::Refused(refusal) => refusal,
        e => {
            warn!("cannot handle a request: {}", e.chain());
            refuse(Reason::Busy, "etcd does not answer")
        }
    }
}

/// Replies to a request without a result: 200, or the refusal as 503 or 403.
fn status_reply(done: Result<(), Refusal>) -> Response<Full<Bytes>> {
    match done {
        Ok(()) => plain(StatusCode::OK, ""),
        Err(refusal) if refusal.reason.passes() => plain(StatusCode::SERVICE_UNAVAILABLE, &refusal.text),
        Err(refusal) => plain(StatusCode::FORBIDDEN, &refusal.text),
    }
}

fn json(value: &impl Serialize) -> Response<Full<Bytes>> {
    let mut response = with_body(StatusCode::OK, serde_json::to_string(value).unwrap_or_default());
    response.headers_mut().insert("content-type", hyper::header::HeaderValue::from_static("application/json"));
    response
}

/// Returns a response with a plain text. The text may quote a client's request, and another client may print it.
pub(super) fn plain(status: StatusCode, text: &str) -> Response<Full<Bytes>> {
    with_body(status, printable(text))
}

fn with_body(status: StatusCode, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response
}
