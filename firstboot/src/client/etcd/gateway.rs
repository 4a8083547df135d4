//! Client of [etcd's JSON gateway], which Patroni also uses. The agent then needs no gRPC stack.
//!
//! [etcd's JSON gateway]: https://etcd.io/docs/v3.5/dev-guide/api_grpc_gateway/

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use bytes::Bytes;
use fleet::encoding::{decode, encode};
use http_body_util::Full;
use hyper::Request;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::Mutex;
use tokio::time::timeout;
use tokio_rustls::rustls::ClientConfig;
use tracing::debug;

use crate::error::{Error, Result};
use fleet_https::{Connection, PeerError, TIMEOUT, request};

/// Longest reply, in bytes: several times all slots of the largest fleet.
pub(super) const LONGEST: usize = 64 << 20;
/// Time limit for the local member to prove that it reaches the quorum again.
const PROBE: Duration = Duration::from_secs(2);
/// Errors of etcd for a token that is missing, unknown or too old. etcd has then not executed the request.
const TOKEN_REFUSED: [&str; 3] = ["user name is empty", "invalid auth token", "revision of auth store is old"];
const AUTH_NOT_ENABLED: &str = "authentication is not enabled";

/// Client of an etcd cluster. It uses the first member that answers.
pub struct Etcd {
    /// Addresses of the members, the nearest first.
    members: Vec<(String, u16)>,
    tls: Arc<ClientConfig>,
    pub(super) connection: Mutex<Option<(String, Connection)>>,
    /// Index of the first member to try. It moves on after each failure, because a member that answers can still be
    /// unusable: a learner, or a member without quorum.
    pub(super) first: AtomicUsize,
    /// Time limit for the connection to a member, and for a complete reply.
    timeout: Duration,
    /// Name and password of the etcd user, if this node has one.
    user: Option<(String, String)>,
    /// Token of the last authentication. Tokens expire, and also become invalid when the member restarts.
    token: RwLock<Option<String>>,
}

/// A key and its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyValue {
    /// The key.
    pub key: String,
    /// The value.
    pub value: Vec<u8>,
    /// Revision of the key's last change; 0 if the key does not exist.
    pub revision: u64,
}

/// Condition of a transaction.
#[derive(Clone, Copy, Debug)]
pub enum Compare<'a> {
    /// The key's last change has this revision; 0 if the key does not exist.
    Unchanged(&'a str, u64),
    /// No key below this prefix was set after this revision. A deletion is no change.
    NoneSince(&'a str, u64),
}

/// Operation of a transaction.
#[derive(Clone, Copy, Debug)]
pub enum Op<'a> {
    /// Sets a key.
    Put(&'a str, &'a [u8]),
    /// Sets a key for as long as a lease lasts: key, value, lease.
    PutFor(&'a str, &'a [u8], &'a str),
    /// Deletes a key.
    Delete(&'a str),
}

#[derive(Deserialize)]
pub(super) struct Kv {
    pub(super) key: String,
    #[serde(default)]
    pub(super) value: String,
    #[serde(default)]
    pub(super) mod_revision: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Range {
    kvs: Vec<Kv>,
}

#[derive(Deserialize)]
struct Header {
    revision: String,
}

#[derive(Deserialize)]
struct Answered {
    header: Header,
    #[serde(default)]
    kvs: Vec<Kv>,
    #[serde(default)]
    succeeded: bool,
    #[serde(default)]
    responses: Vec<Response>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Response {
    response_range: Range,
}

/// A member of the cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct EtcdMember {
    /// Id of the member.
    #[serde(rename = "ID")]
    pub id: String,
    /// Name of the member; empty before its first start.
    pub name: String,
    /// Addresses for the other members.
    #[serde(rename = "peerURLs")]
    pub peer_urls: Vec<String>,
    /// Whether the member is a learner, which has no vote.
    #[serde(rename = "isLearner")]
    pub is_learner: bool,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Members {
    members: Vec<EtcdMember>,
}

impl Etcd {
    /// Makes a client of these members (host and port), the nearest first.
    #[must_use]
    pub fn new(members: Vec<(String, u16)>, tls: Arc<ClientConfig>) -> Self {
        Self {
            members,
            tls,
            connection: Mutex::new(None),
            first: AtomicUsize::new(0),
            timeout: 2 * TIMEOUT,
            user: None,
            token: RwLock::default(),
        }
    }

    /// Authenticates as this etcd user if etcd requires it. An empty password means no user.
    #[must_use]
    pub fn with_user(self, name: &str, password: &str) -> Self {
        let user = (!password.is_empty()).then(|| (name.to_owned(), password.to_owned()));
        Self { user, ..self }
    }

    /// Sets the time limit after which the client tries the next member.
    #[must_use]
    pub fn with_timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    /// Returns a client of the same cluster and user with its own connection. Calls of the two clients do not wait for
    /// each other.
    #[must_use]
    pub fn reconnected(&self) -> Self {
        let own = Self::new(self.members.clone(), self.tls.clone()).with_timeout(self.timeout);
        Self { user: self.user.clone(), ..own }
    }

    /// Returns a client of each member alone.
    pub(super) fn each_member(&self) -> impl Iterator<Item = Self> {
        self.members.iter().map(|member| {
            let own = Self::new(vec![member.clone()], self.tls.clone()).with_timeout(self.timeout);
            Self { user: self.user.clone(), ..own }
        })
    }

    /// Lists the keys below a prefix. Returns the revision of the list, and the keys.
    ///
    /// # Errors
    /// If no member answers.
    pub async fn list(&self, prefix: &str) -> Result<(u64, Vec<KeyValue>)> {
        let body = json!({ "key": encode(prefix.as_bytes()), "range_end": encode(&after(prefix)) });
        listed(&self.call("/v3/kv/range", &body).await?)
    }

    /// Reads keys in one transaction. Returns them in the same order, with revision 0 for keys that do not exist.
    ///
    /// # Errors
    /// If no member answers.
    pub async fn get(&self, keys: &[&str]) -> Result<Vec<KeyValue>> {
        let ranges: Vec<Value> =
            keys.iter().map(|k| json!({ "request_range": { "key": encode(k.as_bytes()) } })).collect();
        let answered: Answered = self.call("/v3/kv/txn", &json!({ "success": ranges })).await?;
        if answered.responses.len() != keys.len() {
            return Err(foreign());
        }
        let of = |(key, response): (&&str, &Response)| match response.response_range.kvs.first() {
            Some(kv) => pair(kv),
            None => Some(KeyValue { key: (*key).to_owned(), value: Vec::new(), revision: 0 }),
        };
        keys.iter().zip(&answered.responses).map(of).collect::<Option<_>>().ok_or_else(foreign)
    }

    /// Executes `then` if all conditions of `when` hold. Returns whether they held.
    ///
    /// # Errors
    /// If no member answers. The transaction may or may not have been executed then.
    pub async fn transact(&self, when: &[Compare<'_>], then: &[Op<'_>]) -> Result<bool> {
        let compare = |c: &Compare| match c {
            Compare::Unchanged(key, revision) => json!({
                "key": encode(key.as_bytes()), "target": "MOD", "result": "EQUAL", "mod_revision": revision.to_string(),
            }),
            Compare::NoneSince(prefix, revision) => json!({
                "key": encode(prefix.as_bytes()), "range_end": encode(&after(prefix)),
                "target": "MOD", "result": "LESS", "mod_revision": (revision + 1).to_string(),
            }),
        };
        let operation = |o: &Op| match o {
            Op::Put(key, value) => {
                json!({ "request_put": { "key": encode(key.as_bytes()), "value": encode(value) } })
            }
            Op::PutFor(key, value, lease) => json!({
                "request_put": { "key": encode(key.as_bytes()), "value": encode(value), "lease": lease },
            }),
            Op::Delete(key) => json!({ "request_delete_range": { "key": encode(key.as_bytes()) } }),
        };
        let body = json!({
            "compare": when.iter().map(compare).collect::<Vec<_>>(),
            "success": then.iter().map(operation).collect::<Vec<_>>(),
        });
        let answered: Answered = self.call("/v3/kv/txn", &body).await?;
        Ok(answered.succeeded)
    }

    /// Grants a lease of this number of seconds. Returns its id.
    ///
    /// # Errors
    /// If no member answers.
    pub async fn lease(&self, seconds: u32) -> Result<String> {
        #[derive(Deserialize)]
        struct Granted {
            #[serde(rename = "ID")]
            id: String,
        }
        let granted: Granted = self.call("/v3/lease/grant", &json!({ "TTL": seconds.to_string() })).await?;
        Ok(granted.id)
    }

    /// Revokes a lease, which deletes its keys.
    ///
    /// # Errors
    /// If no member answers.
    pub async fn revoke(&self, lease: &str) -> Result<()> {
        self.call("/v3/lease/revoke", &json!({ "ID": lease })).await.map(|_: Value| ())
    }

    /// Lists the members of the cluster (a linearizable read).
    ///
    /// # Errors
    /// If no member answers, or the cluster has no quorum.
    pub async fn members(&self) -> Result<Vec<EtcdMember>> {
        let found: Members = self.call("/v3/cluster/member/list", &json!({ "linearizable": true })).await?;
        Ok(found.members)
    }

    /// Removes a member.
    ///
    /// # Errors
    /// If no member answers, or the cluster would lose its quorum.
    pub async fn remove(&self, member: &EtcdMember) -> Result<()> {
        self.call("/v3/cluster/member/remove", &json!({ "ID": member.id })).await.map(|_: Value| ())
    }

    /// Adds a learner, a member without a vote.
    ///
    /// # Errors
    /// If no member answers, or the cluster refuses another learner.
    pub async fn add_learner(&self, peer_url: &str) -> Result<()> {
        let body = json!({ "peerURLs": [peer_url], "isLearner": true });
        self.call("/v3/cluster/member/add", &body).await.map(|_: Value| ())
    }

    /// Promotes a learner to a voting member.
    ///
    /// # Errors
    /// If no member answers, or the learner has not caught up yet.
    pub async fn promote(&self, member: &EtcdMember) -> Result<()> {
        self.call("/v3/cluster/member/promote", &json!({ "ID": member.id })).await.map(|_: Value| ())
    }

    /// Returns to the first member, which is this node's own, if it answers again.
    pub async fn prefer_first(&self) {
        if self.first.load(Ordering::Relaxed).is_multiple_of(self.members.len().max(1)) {
            return;
        }
        let Some((host, port)) = self.members.first() else { return };
        let probed = timeout(PROBE, async {
            let mut connection = Connection::open(host, *port, host, &self.tls).await?;
            // Only a member that reaches the quorum can answer a linearizable read.
            let body = Bytes::from_static(br#"{"linearizable":true}"#);
            let asked = self.request(host, "/v3/cluster/member/list", body)?;
            match connection.ask(asked, LONGEST).await.map_err(Error::from) {
                Err(e) if !contains(&e, &TOKEN_REFUSED) => Err(e),
                _ => Ok(()),
            }
        });
        if let Ok(Ok(())) = probed.await {
            self.first.store(0, Ordering::Relaxed);
            *self.connection.lock().await = None;
        }
    }

    pub(super) async fn call<T: for<'de> Deserialize<'de>>(&self, path: &str, body: &impl Serialize) -> Result<T> {
        let body = Bytes::from(serde_json::to_vec(body).map_err(Error::json("a request to etcd"))?);
        let mut kept = self.connection.lock().await;
        let answer = match self.ask(&mut kept, path, &body).await {
            // etcd has not executed the request, so even a transaction can be repeated.
            Err(e) if self.user.is_some() && contains(&e, &TOKEN_REFUSED) => {
                self.authenticate(&mut kept).await?;
                self.ask(&mut kept, path, &body).await?
            }
            answer => answer?,
        };
        read(&answer)
    }

    /// Sends a request over the kept connection, or over a new one, which is then kept.
    async fn ask(&self, kept: &mut Option<(String, Connection)>, path: &str, body: &Bytes) -> Result<Bytes> {
        // If the kept connection has ended, the request is sent once more over a new one.
        if let Some((host, connection)) = kept.as_mut() {
            let asked = self.request(host, path, body.clone())?;
            match self.in_time(host, connection.ask(asked, LONGEST)).await {
                Ok(answer) => return Ok(answer),
                Err(e) if contains(&e, &TOKEN_REFUSED) => return Err(e),
                Err(e) => {
                    *kept = None;
                    self.first.fetch_add(1, Ordering::Relaxed);
                    // The transaction may have been executed, so the caller has to read the keys first.
                    if path.ends_with("txn") {
                        return Err(e);
                    }
                }
            }
        }
        let (host, mut connection) = self.connect().await?;
        let asked = self.request(&host, path, body.clone())?;
        let answer = self.in_time(&host, connection.ask(asked, LONGEST)).await;
        match &answer {
            Err(e) if !contains(e, &TOKEN_REFUSED) => drop(self.first.fetch_add(1, Ordering::Relaxed)),
            _ => *kept = Some((host, connection)),
        }
        answer
    }

    /// Gets a token for this node's user. If etcd requires no authentication, there is no token.
    async fn authenticate(&self, kept: &mut Option<(String, Connection)>) -> Result<()> {
        #[derive(Deserialize)]
        struct Token {
            token: String,
        }
        let Some((name, password)) = &self.user else { return Ok(()) };
        let body = json!({ "name": name, "password": password }).to_string();
        *self.token.write().unwrap_or_else(PoisonError::into_inner) = None;
        let token = match self.ask(kept, "/v3/auth/authenticate", &body.into()).await {
            Ok(answer) => Some(read::<Token>(&answer)?.token),
            Err(e) if contains(&e, &[AUTH_NOT_ENABLED]) => None,
            Err(e) => return Err(e),
        };
        *self.token.write().unwrap_or_else(PoisonError::into_inner) = token;
        Ok(())
    }

    pub(super) fn request(&self, host: &str, path: &str, body: Bytes) -> Result<Request<Full<Bytes>>> {
        let token = self.token.read().unwrap_or_else(PoisonError::into_inner).clone();
        // Without this header, a watch continues on a member that has lost its quorum.
        let mut headers = vec![("grpc-metadata-hasleader", "true")];
        headers.extend(token.as_deref().map(|token| ("authorization", token)));
        Ok(request("POST", host, path, &headers, body)?)
    }

    pub(super) async fn connect(&self) -> Result<(String, Connection)> {
        let mut last = Error::Failed("etcd has no members".to_owned());
        let first = self.first.load(Ordering::Relaxed) % self.members.len().max(1);
        for (host, port) in self.members[first..].iter().chain(&self.members[..first]) {
            match self.in_time(host, Connection::open(host, *port, host, &self.tls)).await {
                Ok(connection) => return Ok((format!("{host}:{port}"), connection)),
                Err(e) => {
                    debug!(peer = host, "cannot use the etcd member {host}: {}", e.chain());
                    last = e;
                }
            }
        }
        Err(last)
    }

    pub(super) async fn in_time<T>(
        &self,
        member: &str,
        answer: impl Future<Output = Result<T, fleet_https::Error>>,
    ) -> Result<T> {
        let late = |_| Err(fleet_https::Error::no_answer(member).into());
        timeout(self.timeout, answer).await.map_or_else(late, |answer| Ok(answer?))
    }
}

/// Returns the first key after those that begin with `prefix`.
pub(super) fn after(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    if let Some(last) = end.last_mut() {
        // The agent's prefixes end in `/`, so this does not overflow.
        *last += 1;
    }
    end
}

fn number(text: &str) -> u64 {
    text.parse().unwrap_or_default()
}

fn pair(kv: &Kv) -> Option<KeyValue> {
    Some(KeyValue {
        key: String::from_utf8(decode(&kv.key)?).ok()?,
        value: decode(&kv.value)?,
        revision: number(&kv.mod_revision),
    })
}

/// Parses a reply to a range request. Returns its revision and keys.
///
/// # Errors
/// If the bytes are not such a reply, or a key is not UTF-8.
pub fn pairs(bytes: &[u8]) -> Result<(u64, Vec<KeyValue>)> {
    listed(&read(bytes)?)
}

fn listed(answered: &Answered) -> Result<(u64, Vec<KeyValue>)> {
    let pairs: Option<Vec<KeyValue>> = answered.kvs.iter().map(pair).collect();
    Ok((number(&answered.header.revision), pairs.ok_or_else(foreign)?))
}

pub(super) fn read<T: for<'de> Deserialize<'de>>(bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|e| Error::network("etcd", Error::cannot("read the reply")(e)))
}

pub(super) fn contains(e: &Error, messages: &[&str]) -> bool {
    let Error::Https(fleet_https::Error::Network { source: PeerError::Status { text, .. }, .. }) = e else {
        return false;
    };
    messages.iter().any(|m| text.contains(m))
}

pub(super) fn foreign() -> Error {
    Error::network("etcd", "the reply has an unknown format")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn range_of_prefix_excludes_next_prefix() {
        assert_eq!(after("/bakehouse/slots/"), b"/bakehouse/slots0");
    }

    proptest::proptest! {
        #[test]
        fn pairs_round_trip(all: Vec<(String, Vec<u8>, u64)>, revision: u64) {
            let kvs: Vec<Value> = all.iter().map(|(key, value, revision)| json!({
                "key": encode(key.as_bytes()), "value": encode(value), "mod_revision": revision.to_string(),
            })).collect();
            let answer = json!({ "header": { "revision": revision.to_string() }, "kvs": kvs, "count": "1" });
            let read = pairs(answer.to_string().as_bytes()).unwrap();
            let written = all.into_iter().map(|(key, value, revision)| KeyValue { key, value, revision }).collect();
            proptest::prop_assert_eq!(read, (revision, written));
        }
    }
}
