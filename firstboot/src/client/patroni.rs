//! What the agent has to do with the database: Patroni's API on this node.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use fleet::{Node, Topology};
use serde_json::Value;
use tokio_rustls::rustls::ClientConfig;

use crate::error::{Error, Result};
use fleet_https::{Connection, request};

const PORT: u16 = 8008;
/// Longest answer that is read.
const LONGEST: usize = 1 << 20;
/// How long a standby is waited for to become the primary, and then this node to follow it.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where Patroni keeps what it knows in etcd.
#[must_use]
pub fn scope(topology: &Topology) -> String {
    let of = match &topology.backup.restore {
        Some(point) => format!("{}@{}", topology.name, point.replace(' ', "T")),
        None => topology.name.clone(),
    };
    format!("/bakehouse/{of}/")
}

/// Whether one of the members, as Patroni lists them, takes writes, is not `slot` (that one is listed as the leader
/// for as long as it has the key, though its PostgreSQL ends), and has chosen which standby its commits wait for, if
/// they wait for one. A standby that ends before that is in etcd is not let go first, and commits wait for it until
/// the primary's next look.
fn another_leads(members: &[u8], config: &[u8], slot: &str) -> bool {
    let read = |text: &[u8]| serde_json::from_slice::<Value>(text).unwrap_or_default();
    let (members, config) = (read(members), read(config));
    let members = members["members"].as_array().map(Vec::as_slice).unwrap_or_default();
    let leads = members.iter().any(|m| m["name"] != slot && m["role"] == "leader" && m["state"] == "running");
    // Where there was one database, nobody says otherwise before the first new primary.
    leads && (config["synchronous_mode"] == false || members.iter().any(|m| m["role"] == "sync_standby"))
}

/// Patroni on this node.
pub struct Patroni {
    slot: String,
    address: String,
    tls: Arc<ClientConfig>,
}

impl Patroni {
    /// None where the node has no database.
    #[must_use]
    pub fn of(node: &Node, tls: Arc<ClientConfig>) -> Option<Self> {
        node.has_role("db").then(|| Self { slot: node.name.clone(), address: node.address.to_string(), tls })
    }

    /// Whether this node has the primary.
    pub async fn is_primary(&self) -> bool {
        self.ask("GET", "/primary", "").await.is_ok()
    }

    /// Makes a standby the primary, where this node has it and there is one; waits until it is, and this node
    /// its standby.
    ///
    /// # Errors
    /// Patroni says no, as it does where there is no standby that could.
    pub async fn hand_over(&self) -> Result<()> {
        let until = Instant::now() + PATIENCE;
        let mut last = Ok(());
        while self.is_primary().await {
            if Instant::now() > until {
                return last;
            }
            // A standby that is slow to answer is none; the next time it may be.
            last = self.ask("POST", "/switchover", &format!("{{\"leader\":\"{}\"}}", self.slot)).await.map(drop);
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        // Whoever is told to end in the middle of it leaves the fleet without a primary for longer; and who
        // ends right afterwards, perhaps with the VIP, breaks off what clients have just begun again.
        let until = Instant::now() + PATIENCE;
        while !self.follows().await {
            if Instant::now() > until {
                return Err(Error::Failed("no other primary is in step with its standbys yet".to_owned()));
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        Ok(())
    }

    /// Whether another node has the primary, knows whom its commits wait for, and this one is its standby.
    async fn follows(&self) -> bool {
        let Ok(config) = self.ask("GET", "/config", "").await else { return false };
        let Ok(members) = self.ask("GET", "/cluster", "").await else { return false };
        another_leads(&members, &config, &self.slot) && self.ask("GET", "/replica", "").await.is_ok()
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

    /// As Patroni 4 answers.
    #[test]
    fn the_next_primary_is_another_one_that_runs() {
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
        // Its commits do not wait for anybody yet, or do already, and nobody can read that.
        let alone = members("replica", "leader", "running");
        assert!(!leads(alone.clone(), "db-1"));
        assert!(!another_leads(alone.as_bytes(), b"502", "db-1"));
        // They never do.
        assert!(another_leads(alone.as_bytes(), b"{\"synchronous_mode\": false}", "db-1"));
    }
}
