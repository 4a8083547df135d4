//! Watches: changes of the keys below a prefix.

use std::time::Duration;

use bytes::BytesMut;
use fleet::encoding::{decode, encode};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use serde::Deserialize;
use serde_json::json;
use std::sync::atomic::Ordering;
use tokio::time::{Instant, timeout, timeout_at};
use tracing::warn;

use super::gateway::{Etcd, KeyValue, Kv, LONGEST, after, foreign, read};
use crate::error::{Error, Result};
use fleet_https::Connection;

/// Longest time without data from a member. It sends a progress notification every 5 s (`etcd.yml`), so one that sends
/// nothing for longer hangs, or cannot be reached.
const SILENCE: Duration = Duration::from_secs(12);
/// Longest duration of a watch. The caller then lists all keys again.
const LONGEST_WATCH: Duration = Duration::from_secs(60);

/// A running watch.
pub struct Watch {
    /// Owned here, so that dropping the watch closes it.
    _connection: Connection,
    body: Incoming,
    rest: BytesMut,
    /// Revision of the caller's list. The watch begins there, and leaves out what the list already has.
    seen: u64,
    ends: Instant,
    silence: Duration,
}

/// A change of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchEvent {
    /// Revision of the change.
    pub revision: u64,
    /// The key.
    pub key: String,
    /// Its new value; `None` if the key was deleted.
    pub value: Option<Vec<u8>>,
}

impl From<KeyValue> for WatchEvent {
    /// Returns the last change of a listed key.
    fn from(listed: KeyValue) -> Self {
        Self { revision: listed.revision, key: listed.key, value: Some(listed.value) }
    }
}

#[derive(Deserialize)]
struct Watched {
    result: Outcome,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Outcome {
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
    /// Watches all keys below a prefix, for changes after the revision `seen`, for up to 60 s.
    ///
    /// # Errors
    /// If no member answers.
    pub async fn watch(&self, prefix: &str, seen: u64) -> Result<Watch> {
        // A member sends no progress notification to a watch that begins after its last revision, so the watch of an
        // idle etcd would appear to hang.
        let body = json!({ "create_request": {
            "key": encode(prefix.as_bytes()), "range_end": encode(&after(prefix)),
            "start_revision": seen.to_string(), "progress_notify": true,
        } });
        let body = serde_json::to_vec(&body).map_err(Error::json("a request to etcd"))?;
        // The watch needs its own connection, because the reply lasts as long as the watch.
        let (host, mut connection) = self.connect().await?;
        let asked = self.request(&host, "/v3/watch", body.into())?;
        let response = self.in_time(&host, connection.send(asked)).await.inspect_err(|_| {
            self.first.fetch_add(1, Ordering::Relaxed);
        })?;
        if !response.status().is_success() {
            self.first.fetch_add(1, Ordering::Relaxed);
            return Err(Error::network(host, format!("the watch was refused: {}", response.status())));
        }
        Ok(Watch {
            _connection: connection,
            body: response.into_body(),
            rest: BytesMut::new(),
            seen,
            ends: Instant::now() + LONGEST_WATCH,
            silence: SILENCE,
        })
    }

    /// Selects another member for the next request, after a watch ended without a message of its member.
    pub(super) async fn give_up_member(&self) {
        self.first.fetch_add(1, Ordering::Relaxed);
        *self.connection.lock().await = None;
    }

    /// Waits for the next changes of a watch. Returns `None` when the watch has ended, and the caller has to list all
    /// keys again.
    ///
    /// # Errors
    /// If the connection breaks, or the member sends nothing for 12 s. The next request then goes to another member.
    pub async fn next(&self, watch: &mut Watch) -> Result<Option<Vec<WatchEvent>>> {
        match watch.next().await {
            Err(e) => {
                self.give_up_member().await;
                Err(e)
            }
            next => Ok(next?),
        }
    }
}

impl Watch {
    async fn next(&mut self) -> Result<Option<Vec<WatchEvent>>> {
        let broken = |why: String| Error::network("etcd", why);
        loop {
            if let Some(end) = self.rest.iter().position(|b| *b == b'\n') {
                let line = self.rest.split_to(end + 1);
                let Some(mut changes) = changes(&line)? else { return Ok(None) };
                changes.retain(|change| change.revision > self.seen);
                if changes.is_empty() {
                    continue;
                }
                return Ok(Some(changes));
            }
            if self.rest.len() > LONGEST {
                return Err(broken("a line of the watch is too long".to_owned()));
            }
            let Ok(frame) = timeout_at(self.ends, timeout(self.silence, self.body.frame())).await else {
                return Ok(None);
            };
            match frame.map_err(|_| broken(format!("a watch was silent for {} s", self.silence.as_secs())))? {
                None => return Ok(None),
                Some(Err(e)) => return Err(Error::network("etcd", e)),
                Some(Ok(frame)) => {
                    if let Some(data) = frame.data_ref() {
                        self.rest.extend_from_slice(data);
                    }
                }
            }
        }
    }
}

/// Parses one line of a watch. Returns its changes; `None` if the member has ended the watch.
///
/// # Errors
/// If the line is not JSON of a watch, a key is not UTF-8, or a change has no revision.
pub fn changes(line: &[u8]) -> Result<Option<Vec<WatchEvent>>> {
    let watched: Watched = read(line)?;
    if watched.result.canceled {
        warn!("etcd cancelled a watch: {}", watched.result.cancel_reason);
        return Ok(None);
    }
    let changes = watched.result.events.iter().map(|e| {
        let value = if e.kind == "DELETE" { None } else { Some(decode(&e.kv.value)?) };
        Some(WatchEvent {
            revision: e.kv.mod_revision.parse().ok()?,
            key: String::from_utf8(decode(&e.kv.key)?).ok()?,
            value,
        })
    });
    changes.collect::<Option<_>>().map(Some).ok_or_else(foreign)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_has_no_changes_and_cancelled_watch_ends() {
        let progress = br#"{"result":{"header":{"revision":"7"}}}"#;
        assert_eq!(changes(progress).unwrap(), Some(Vec::new()));
        let cancelled = br#"{"result":{"canceled":true,"created":true,"cancel_reason":"permission denied"}}"#;
        assert_eq!(changes(cancelled).unwrap(), None);
    }

    /// Such a change could not be told from one that the caller's list already has, and must not be lost.
    #[test]
    fn change_without_revision_is_an_error() {
        for revision in ["", r#","mod_revision":"""#, r#","mod_revision":"-1""#] {
            let line = format!(r#"{{"result":{{"events":[{{"kv":{{"key":"YQ==","value":"Yg=="{revision}}}}}]}}}}"#);
            assert!(changes(line.as_bytes()).is_err(), "{line}");
        }
    }

    proptest::proptest! {
        #[test]
        fn changes_round_trip(all: Vec<(u64, String, Option<Vec<u8>>)>) {
            let events: Vec<_> = all.iter().map(|(revision, key, value)| {
                let (key, revision) = (encode(key.as_bytes()), revision.to_string());
                match value {
                    Some(value) => json!({ "kv": { "key": key, "value": encode(value), "mod_revision": revision } }),
                    None => json!({ "type": "DELETE", "kv": { "key": key, "mod_revision": revision } }),
                }
            }).collect();
            let line = json!({ "result": { "events": events } }).to_string();
            let written =
                all.into_iter().map(|(revision, key, value)| WatchEvent { revision, key, value }).collect();
            proptest::prop_assert_eq!(changes(line.as_bytes()).unwrap(), Some(written));
        }
    }
}
