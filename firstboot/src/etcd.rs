//! etcd, by its JSON gateway: the same way Patroni takes, without a gRPC stack in the agent.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use fleet::encoding::{decode, encode};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::Mutex;
use tokio::time::timeout;
use tokio_rustls::rustls::ClientConfig;

use crate::error::{Error, Result};
use crate::https::{Connection, PATIENCE, request};

/// Longest answer: every slot of the largest fleet, several times over.
const LONGEST: usize = 64 << 20;

/// A cluster, reached by whichever member answers.
pub struct Etcd {
    /// Addresses of members, the nearest first.
    members: Vec<(String, u16)>,
    tls: Arc<ClientConfig>,
    connection: Mutex<Option<(String, Connection)>>,
    /// Where to begin: another member after each failure. One that answers may still be of no
    /// use, as a learner is, or a member that has lost the others.
    first: AtomicUsize,
    /// How long a member may take to be reached, or to answer in full: as its connection's own limits, or less.
    patience: Duration,
}

/// One key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pair {
    pub key: String,
    pub value: Vec<u8>,
    /// Revision of its last change; 0 where there is no such key.
    pub revision: u64,
}

/// What must hold for a transaction to take place.
#[derive(Clone, Copy, Debug)]
pub enum If<'a> {
    /// The key's last change is this one; 0: there is no such key.
    Unchanged(&'a str, u64),
}

#[derive(Clone, Copy, Debug)]
pub enum Then<'a> {
    Put(&'a str, &'a [u8]),
    /// As long as a lease lasts.
    PutFor(&'a str, &'a [u8], &'a str),
    Delete(&'a str),
}

/// Changes as they happen.
pub struct Watch {
    body: Incoming,
    rest: BytesMut,
}

/// One change: the key, and its value if it has one now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    pub key: String,
    pub value: Option<Vec<u8>>,
}

#[derive(Deserialize)]
struct Kv {
    key: String,
    #[serde(default)]
    value: String,
    #[serde(default)]
    mod_revision: String,
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

/// One of the cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct EtcdMember {
    #[serde(rename = "ID")]
    pub id: String,
    /// Empty until it has started.
    pub name: String,
    #[serde(rename = "peerURLs")]
    pub peer_urls: Vec<String>,
    #[serde(rename = "isLearner")]
    pub is_learner: bool,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Members {
    members: Vec<EtcdMember>,
}

#[derive(Deserialize)]
struct Watched {
    result: Result1,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Result1 {
    events: Vec<Event>,
    canceled: bool,
    cancel_reason: String,
}

#[derive(Deserialize)]
struct Event {
    #[serde(default, rename = "type")]
    kind: String,
    kv: Kv,
}

impl Etcd {
    #[must_use]
    pub fn new(members: Vec<(String, u16)>, tls: Arc<ClientConfig>) -> Self {
        Self { members, tls, connection: Mutex::new(None), first: AtomicUsize::new(0), patience: 2 * PATIENCE }
    }

    /// Gives a member up, and asks the next, when it has not answered for so long.
    #[must_use]
    pub fn with_patience(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }

    /// The same cluster by a connection of its own: calls of the two don't wait for each other.
    #[must_use]
    pub fn reconnected(&self) -> Self {
        Self::new(self.members.clone(), self.tls.clone()).with_patience(self.patience)
    }

    /// Every key below a prefix, and the revision they are of.
    ///
    /// # Errors
    /// No member answers.
    pub async fn list(&self, prefix: &str) -> Result<(u64, Vec<Pair>)> {
        let body = json!({ "key": encode(prefix.as_bytes()), "range_end": encode(&after(prefix)) });
        let answered: Answered = self.call("/v3/kv/range", &body).await?;
        let pairs: Option<Vec<Pair>> = answered.kvs.iter().map(pair).collect();
        Ok((number(&answered.header.revision), pairs.ok_or_else(foreign)?))
    }

    /// These keys, as of one moment, in this order; revision 0 where there is none.
    ///
    /// # Errors
    /// No member answers.
    pub async fn get(&self, keys: &[&str]) -> Result<Vec<Pair>> {
        let ranges: Vec<Value> =
            keys.iter().map(|k| json!({ "request_range": { "key": encode(k.as_bytes()) } })).collect();
        let answered: Answered = self.call("/v3/kv/txn", &json!({ "success": ranges })).await?;
        if answered.responses.len() != keys.len() {
            return Err(foreign());
        }
        let of = |(key, response): (&&str, &Response)| match response.response_range.kvs.first() {
            Some(kv) => pair(kv),
            None => Some(Pair { key: (*key).to_owned(), value: Vec::new(), revision: 0 }),
        };
        keys.iter().zip(&answered.responses).map(of).collect::<Option<_>>().ok_or_else(foreign)
    }

    /// All of `then`, or nothing when something of `when` does not hold. Says which.
    ///
    /// # Errors
    /// No member answers: it may have taken place, or not.
    pub async fn transact(&self, when: &[If<'_>], then: &[Then<'_>]) -> Result<bool> {
        let compare = |c: &If| match c {
            If::Unchanged(key, revision) => json!({
                "key": encode(key.as_bytes()), "target": "MOD", "result": "EQUAL", "mod_revision": revision.to_string(),
            }),
        };
        let operation = |o: &Then| match o {
            Then::Put(key, value) => {
                json!({ "request_put": { "key": encode(key.as_bytes()), "value": encode(value) } })
            }
            Then::PutFor(key, value, lease) => json!({
                "request_put": { "key": encode(key.as_bytes()), "value": encode(value), "lease": lease },
            }),
            Then::Delete(key) => json!({ "request_delete_range": { "key": encode(key.as_bytes()) } }),
        };
        let body = json!({
            "compare": when.iter().map(compare).collect::<Vec<_>>(),
            "success": then.iter().map(operation).collect::<Vec<_>>(),
        });
        let answered: Answered = self.call("/v3/kv/txn", &body).await?;
        Ok(answered.succeeded)
    }

    /// A lease of so many seconds: its name.
    ///
    /// # Errors
    /// No member answers.
    pub async fn lease(&self, seconds: u32) -> Result<String> {
        #[derive(Deserialize)]
        struct Granted {
            #[serde(rename = "ID")]
            id: String,
        }
        let granted: Granted = self.call("/v3/lease/grant", &json!({ "TTL": seconds.to_string() })).await?;
        Ok(granted.id)
    }

    /// Ends a lease, and what was put for it.
    ///
    /// # Errors
    /// No member answers.
    pub async fn revoke(&self, lease: &str) -> Result<()> {
        self.call("/v3/lease/revoke", &json!({ "ID": lease })).await.map(|_: Value| ())
    }

    /// Every change below a prefix from a revision on.
    ///
    /// # Errors
    /// No member answers.
    pub async fn watch(&self, prefix: &str, revision: u64) -> Result<Watch> {
        let body = json!({ "create_request": {
            "key": encode(prefix.as_bytes()), "range_end": encode(&after(prefix)),
            "start_revision": revision.to_string(),
        } });
        let body = serde_json::to_vec(&body).map_err(|e| Error::Failed(e.to_string()))?;
        // A connection of its own: the answer never ends.
        let (host, mut connection) = self.connect().await?;
        let response = connection.send(request("POST", &host, "/v3/watch", &[], body.into())?).await?;
        if !response.status().is_success() {
            self.first.fetch_add(1, Ordering::Relaxed);
            return Err(Error::Network { to: host, why: format!("{} to a watch", response.status()) });
        }
        Ok(Watch { body: response.into_body(), rest: BytesMut::new() })
    }

    /// The cluster, as it agrees that it is.
    ///
    /// # Errors
    /// It does not agree now.
    pub async fn members(&self) -> Result<Vec<EtcdMember>> {
        let found: Members = self.call("/v3/cluster/member/list", &json!({ "linearizable": true })).await?;
        Ok(found.members)
    }

    /// # Errors
    /// The cluster says no, as it does where it would lose its quorum.
    pub async fn remove(&self, member: &EtcdMember) -> Result<()> {
        self.call("/v3/cluster/member/remove", &json!({ "ID": member.id })).await.map(|_: Value| ())
    }

    /// Adds one that listens and has no vote yet.
    ///
    /// # Errors
    /// The cluster says no.
    pub async fn add_learner(&self, peer_url: &str) -> Result<()> {
        let body = json!({ "peerURLs": [peer_url], "isLearner": true });
        self.call("/v3/cluster/member/add", &body).await.map(|_: Value| ())
    }

    /// Gives a learner its vote.
    ///
    /// # Errors
    /// It has not caught up yet.
    pub async fn promote(&self, member: &EtcdMember) -> Result<()> {
        self.call("/v3/cluster/member/promote", &json!({ "ID": member.id })).await.map(|_: Value| ())
    }

    async fn call<T: for<'de> Deserialize<'de>>(&self, path: &str, body: &impl Serialize) -> Result<T> {
        let body = Bytes::from(serde_json::to_vec(body).map_err(|e| Error::Failed(e.to_string()))?);
        let mut kept = self.connection.lock().await;
        // The one that was kept may have ended meanwhile: then a new one, once.
        if let Some((host, connection)) = kept.as_mut() {
            match self.in_time(host, connection.ask(request("POST", host, path, &[], body.clone())?, LONGEST)).await {
                Ok(answer) => return read(&answer),
                Err(e) => {
                    *kept = None;
                    self.first.fetch_add(1, Ordering::Relaxed);
                    // It may have been carried out: whoever asks has to look first.
                    if path.ends_with("txn") {
                        return Err(e);
                    }
                }
            }
        }
        let (host, mut connection) = self.connect().await?;
        let asked = self.in_time(&host, connection.ask(request("POST", &host, path, &[], body)?, LONGEST)).await;
        let answer = asked.inspect_err(|_| {
            self.first.fetch_add(1, Ordering::Relaxed);
        })?;
        *kept = Some((host, connection));
        read(&answer)
    }

    async fn connect(&self) -> Result<(String, Connection)> {
        let mut last = Error::Failed("etcd has no members".to_owned());
        let first = self.first.load(Ordering::Relaxed) % self.members.len().max(1);
        for (host, port) in self.members[first..].iter().chain(&self.members[..first]) {
            match self.in_time(host, Connection::open(host, *port, host, &self.tls)).await {
                Ok(connection) => return Ok((format!("{host}:{port}"), connection)),
                Err(e) => last = e,
            }
        }
        Err(last)
    }

    async fn in_time<T>(&self, member: &str, answer: impl Future<Output = Result<T>>) -> Result<T> {
        let late = |_| Err(Error::Network { to: member.to_owned(), why: "no answer".to_owned() });
        timeout(self.patience, answer).await.unwrap_or_else(late)
    }
}

impl Watch {
    /// The next changes; none when the watch has ended and everything has to be listed again.
    ///
    /// # Errors
    /// The connection broke.
    pub async fn next(&mut self) -> Result<Option<Vec<Change>>> {
        let broken = |why: String| Error::Network { to: "etcd".to_owned(), why };
        loop {
            if let Some(end) = self.rest.iter().position(|b| *b == b'\n') {
                let line = self.rest.split_to(end + 1);
                let watched: Watched = read(&line)?;
                if watched.result.canceled {
                    eprintln!("etcd ended a watch: {}", watched.result.cancel_reason);
                    return Ok(None);
                }
                let changes = watched.result.events.iter().map(|e| {
                    let value = if e.kind == "DELETE" { None } else { Some(decode(&e.kv.value)?) };
                    Some(Change { key: String::from_utf8(decode(&e.kv.key)?).ok()?, value })
                });
                let changes: Vec<Change> = changes.collect::<Option<_>>().ok_or_else(foreign)?;
                if !changes.is_empty() {
                    return Ok(Some(changes));
                }
                continue;
            }
            if self.rest.len() > LONGEST {
                return Err(broken("a line without end".to_owned()));
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(Err(e)) => return Err(broken(e.to_string())),
                Some(Ok(frame)) => {
                    if let Some(data) = frame.data_ref() {
                        self.rest.extend_from_slice(data);
                    }
                }
            }
        }
    }
}

/// The first key that does not begin with `prefix`.
fn after(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    if let Some(last) = end.last_mut() {
        // Prefixes are ours and end in `/`.
        *last += 1;
    }
    end
}

fn number(text: &str) -> u64 {
    text.parse().unwrap_or_default()
}

fn pair(kv: &Kv) -> Option<Pair> {
    Some(Pair {
        key: String::from_utf8(decode(&kv.key)?).ok()?,
        value: decode(&kv.value)?,
        revision: number(&kv.mod_revision),
    })
}

fn read<T: for<'de> Deserialize<'de>>(bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|_| foreign())
}

fn foreign() -> Error {
    Error::Network { to: "etcd".to_owned(), why: "it answers what this agent does not understand".to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_ends_before_its_neighbour() {
        assert_eq!(after("/bakehouse/slots/"), b"/bakehouse/slots0");
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_panic(bytes: Vec<u8>) {
            let _ = read::<Answered>(&bytes);
            let _ = read::<Watched>(&bytes);
        }
    }
}
