//! Client of [Patroni's REST API] on this node.
//!
//! [Patroni's REST API]: https://patroni.readthedocs.io/en/latest/rest_api.html

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use fleet::node_api::{DatabaseStatus, StandbyStatus};
use fleet::{Node, Topology};
use serde_json::Value;
use tokio_rustls::rustls::ClientConfig;

use crate::error::{Error, Result};
use fleet_https::{Connection, request};

const PORT: u16 = 8008;
/// Longest reply, in bytes.
const LONGEST: usize = 1 << 20;
/// Time limit for the promotion of a standby, and then for this node to follow it.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Returns the prefix of Patroni's keys in etcd.
#[must_use]
pub(crate) fn scope(topology: &Topology) -> String {
    let scope = match &topology.backup.restore {
        Some(point) => format!("{}@{}", topology.name, point.replace(' ', "T")),
        None => topology.name.clone(),
    };
    format!("/bakehouse/{scope}/")
}

/// Whether another member than `slot` is the running primary, and has selected its synchronous standby, if it needs
/// one.
///
/// `slot` itself does not count, because Patroni lists it as the leader while it has the leader key, even if its
/// PostgreSQL stops. If a standby stops before the selection is in etcd, it cannot remove itself from the synchronous
/// set first, and commits wait for it until Patroni's next cycle on the primary.
fn another_leads(members: &[u8], config: &[u8], slot: &str) -> bool {
    let read = |text: &[u8]| serde_json::from_slice::<Value>(text).unwrap_or_default();
    let (members, config) = (read(members), read(config));
    let members = members["members"].as_array().map(Vec::as_slice).unwrap_or_default();
    let leads = members.iter().any(|m| m["name"] != slot && m["role"] == "leader" && m["state"] == "running");
    // `synchronous_mode` stays off in a fleet that had one database node, until the first new primary turns it on.
    leads && (config["synchronous_mode"] == false || members.iter().any(|m| m["role"] == "sync_standby"))
}

/// Whether a member, or a reply to `GET /patroni`, has the tag of a drained node (`drain-db.service`).
fn is_drained(member: &Value) -> bool {
    member["tags"]["nofailover"] == true
}

/// Returns the standbys other than `slot` that replicate and can become the primary, from a reply to `GET /cluster`.
fn reserve(members: &[u8], slot: &str) -> Vec<String> {
    let members = serde_json::from_slice::<Value>(members).unwrap_or_default();
    let members = members["members"].as_array().map(Vec::as_slice).unwrap_or_default();
    let is_standby = |m: &&Value| {
        let replicates = m["state"] == "streaming" || m["state"] == "running";
        m["name"] != slot && (m["role"] == "sync_standby" || m["role"] == "replica") && replicates && !is_drained(m)
    };
    members.iter().filter(is_standby).filter_map(|m| m["name"].as_str().map(str::to_owned)).collect()
}

/// Parses the replies to `GET /patroni` and `GET /cluster`.
fn status(own: &[u8], members: &[u8]) -> DatabaseStatus {
    let read = |text: &[u8]| serde_json::from_slice::<Value>(text).unwrap_or_default();
    let (own, members) = (read(own), read(members));
    let members = members["members"].as_array().map(Vec::as_slice).unwrap_or_default();
    // `lag` is the lag of the replay, and Patroni 4.1 names it. An unknown lag is a text.
    let lag = |name: &str| {
        let member = members.iter().find(|m| m["name"] == name)?;
        member["replay_lag"].as_u64().or_else(|| member["lag"].as_u64())
    };
    let replication = own["replication"].as_array().map(Vec::as_slice).unwrap_or_default();
    let standbys = replication.iter().filter(|r| r["state"] == "streaming").filter_map(|r| {
        let node = r["application_name"].as_str()?;
        // PostgreSQL's name of a synchronous standby depends on whether Patroni asks for one of several.
        let sync = r["sync_state"] == "sync" || r["sync_state"] == "quorum";
        let drained = members.iter().any(|m| m["name"] == node && is_drained(m));
        Some(StandbyStatus { node: node.to_owned(), sync, lag: lag(node).unwrap_or(u64::MAX), drained })
    });
    let primary = own["role"] == "primary" || own["role"] == "master";
    DatabaseStatus {
        primary,
        state: own["state"].as_str().unwrap_or_default().to_owned(),
        // A standby may have standbys, too.
        standbys: standbys.filter(|_| primary).collect(),
    }
}

/// Client of Patroni on this node.
pub struct Patroni {
    slot: String,
    address: String,
    tls: Arc<ClientConfig>,
}

impl Patroni {
    /// Makes the client; `None` if the node has no database.
    #[must_use]
    pub fn for_node(node: &Node, tls: Arc<ClientConfig>) -> Option<Self> {
        node.has_role("db").then(|| Self { slot: node.name.clone(), address: node.address.to_string(), tls })
    }

    /// Whether this node is the primary.
    pub async fn is_primary(&self) -> bool {
        self.ask("GET", "/primary", "").await.is_ok()
    }

    /// Returns the state of this node's PostgreSQL, and on the primary that of its standbys.
    ///
    /// # Errors
    /// If Patroni does not answer.
    pub async fn status(&self) -> Result<DatabaseStatus> {
        let own = self.ask("GET", "/patroni", "").await?;
        // The lag is in the list of members only. Patroni reads that list in etcd, so it may be missing.
        let members = self.ask("GET", "/cluster", "").await.unwrap_or_default();
        Ok(status(&own, &members))
    }

    /// Returns the standbys on other nodes that replicate and can become the primary.
    ///
    /// # Errors
    /// If Patroni does not answer, or does not reach etcd.
    pub async fn reserve(&self) -> Result<Vec<String>> {
        Ok(reserve(&self.ask("GET", "/cluster", "").await?, &self.slot))
    }

    /// Whether this node's Patroni has read that the node is drained.
    ///
    /// # Errors
    /// If Patroni does not answer.
    pub async fn is_drained(&self) -> Result<bool> {
        let own = self.ask("GET", "/patroni", "").await?;
        Ok(is_drained(&serde_json::from_slice::<Value>(&own).unwrap_or_default()))
    }

    /// Switches over to a standby, if this node is the primary. Waits until the standby is the primary, and this node
    /// follows it.
    ///
    /// # Errors
    /// If Patroni refuses for 60 s, for example because no standby is healthy, or this node does not follow a new
    /// primary within 60 s.
    pub async fn hand_over(&self) -> Result<()> {
        let until = Instant::now() + TIMEOUT;
        let mut last = Ok(());
        while self.is_primary().await {
            if Instant::now() > until {
                return last;
            }
            // Patroni does not count a standby that answers slowly. The next attempt may succeed.
            last = self.ask("POST", "/switchover", &format!("{{\"leader\":\"{}\"}}", self.slot)).await.map(drop);
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        // If the node stopped during the switchover, the outage would be longer. If it stopped right after it, perhaps
        // as the holder of the VIP, it would break connections that clients have just opened again.
        let until = Instant::now() + TIMEOUT;
        while !self.follows().await {
            if Instant::now() > until {
                return Err(Error::Failed(
                    "the switchover is not complete: no other primary has its synchronous standby".to_owned(),
                ));
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        Ok(())
    }

    /// Whether another node is the primary and has its synchronous standby, and this node is a running replica.
    async fn follows(&self) -> bool {
        let Ok(config) = self.ask("GET", "/config", "").await else { return false };
        let Ok(members) = self.ask("GET", "/cluster", "").await else { return false };
        // `/replica` fails on a drained node.
        let Ok(own) = self.ask("GET", "/patroni", "").await else { return false };
        let own = serde_json::from_slice::<Value>(&own).unwrap_or_default();
        another_leads(&members, &config, &self.slot) && own["role"] == "replica" && own["state"] == "running"
    }

    async fn ask(&self, method: &str, path: &str, body: &str) -> Result<Bytes> {
        let mut connection = Connection::open(&self.address, PORT, &self.address, &self.tls).await?;
        let headers = [("content-type", "application/json")];
        Ok(connection.ask(request(method, &self.address, path, &headers, body.to_owned().into())?, LONGEST).await?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The replies have the format of Patroni 4.
    #[test]
    fn status_has_the_streaming_standbys_of_the_primary() {
        let own = r#"{"state": "running", "role": "primary", "server_version": 170006, "xlog": {"location": 67395656},
            "timeline": 1, "replication": [
            {"usename": "replicator", "application_name": "db-2", "client_addr": "10.10.0.11", "state": "streaming",
             "sync_state": "sync", "sync_priority": 1},
            {"usename": "replicator", "application_name": "db-3", "client_addr": "10.10.0.12", "state": "streaming",
             "sync_state": "async", "sync_priority": 0},
            {"usename": "replicator", "application_name": "db-4", "client_addr": "10.10.0.13", "state": "backup",
             "sync_state": "async", "sync_priority": 0}]}"#;
        let cluster = r#"{"members": [{"name": "db-1", "role": "leader", "state": "running", "timeline": 1},
            {"name": "db-2", "role": "sync_standby", "state": "streaming", "timeline": 1, "lag": 48},
            {"name": "db-3", "role": "replica", "state": "streaming", "timeline": 1, "lag": "unknown",
             "tags": {"nofailover": true, "noloadbalance": true}}], "scope": "x"}"#;
        let standby = |node: &str, sync, lag, drained| StandbyStatus { node: node.to_owned(), sync, lag, drained };
        let expected = vec![standby("db-2", true, 48, false), standby("db-3", false, u64::MAX, true)];
        let found = status(own.as_bytes(), cluster.as_bytes());
        assert_eq!((found.primary, found.state.as_str(), found.standbys), (true, "running", expected));
        let replica = status(br#"{"state": "starting", "role": "replica"}"#, b"502");
        assert_eq!(replica, DatabaseStatus { state: "starting".to_owned(), ..DatabaseStatus::default() });
    }

    #[test]
    fn a_drained_or_broken_standby_is_no_reserve() {
        let cluster = |tags: &str, state: &str| {
            format!(
                "{{\"members\": [{{\"name\": \"db-1\", \"role\": \"leader\", \"state\": \"running\"}}, \
                 {{\"name\": \"db-2\", \"role\": \"sync_standby\", \"state\": \"{state}\"{tags}}}, \
                 {{\"name\": \"db-3\", \"role\": \"replica\", \"state\": \"streaming\"}}]}}"
            )
        };
        let of = |text: String, slot: &str| reserve(text.as_bytes(), slot);
        assert_eq!(of(cluster("", "streaming"), "db-3"), ["db-2"]);
        assert_eq!(of(cluster("", "streaming"), "db-1"), ["db-2", "db-3"]);
        let drained = ", \"tags\": {\"nofailover\": true}";
        assert!(of(cluster(drained, "streaming"), "db-3").is_empty());
        assert!(of(cluster("", "start failed"), "db-3").is_empty() && reserve(b"502", "db-1").is_empty());
    }

    /// The replies have the format of Patroni 4.
    #[test]
    fn another_node_leads_if_its_primary_runs_with_a_sync_standby() {
        let members = |own: &str, role: &str, state: &str| {
            format!(
                "{{\"members\": [{{\"name\": \"db-1\", \"role\": \"{own}\", \"state\": \"streaming\"}}, \
                 {{\"name\": \"db-2\", \"role\": \"{role}\", \"state\": \"{state}\", \"timeline\": 2}}], \
                 \"scope\": \"ha\"}}"
            )
        };
        let leads = |members: String, slot: &str| {
            another_leads(members.as_bytes(), b"{\"ttl\": 20, \"synchronous_mode\": true}", slot)
        };
        assert!(leads(members("sync_standby", "leader", "running"), "db-1"));
        assert!(!leads(members("sync_standby", "leader", "running"), "db-2"));
        for (role, state) in [("leader", "stopped"), ("leader", "starting"), ("sync_standby", "streaming")] {
            assert!(!leads(members("sync_standby", role, state), "db-1"), "{role} {state}");
        }
        assert!(!leads("502".to_owned(), "db-1"));
        // The primary has no synchronous standby yet. The configuration may be unreadable.
        let alone = members("replica", "leader", "running");
        assert!(!leads(alone.clone(), "db-1"));
        assert!(!another_leads(alone.as_bytes(), b"502", "db-1"));
        // The primary needs no synchronous standby.
        assert!(another_leads(alone.as_bytes(), b"{\"synchronous_mode\": false}", "db-1"));
    }
}
