//! Hubs turn on etcd's access control: the user `root` is the hubs', the user `patroni` reaches Patroni's own
//! keys and nothing else. A client without a password reads and writes nothing.
//!
//! ```text
//! /bakehouse/etcd-ready/SLOT    owner's TLS key    this client has its etcd password, this voter runs an etcd
//!                                                  that takes passwords (older configurations refuse them)
//! ```

use std::collections::BTreeMap;
use std::time::Duration;

use fleet::{Secrets, SlotRecord, Topology};

use super::claims::SlotAllocator;
use super::records::SLOTS;
use crate::client::etcd::{Compare, Etcd, Op};
use crate::error::{Error, Result};
use crate::node::etcd_user::{PATRONI, patroni_runs_with};

/// etcd's administrator: its own name for the user that must exist before access control is turned on.
pub const ROOT: &str = "root";
const READY: &str = "/bakehouse/etcd-ready/";
/// Some node changes its image now (`hub/rollout.rs`).
const TURN: &str = "/bakehouse/rollout/turn";
/// Pause between two looks, in seconds, until access control is on, and afterwards.
const LOOK: u64 = 10;
const LOOK_AGAIN: u64 = 300;

/// How far the fleet is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Access {
    /// etcd asks every client for a user.
    Enabled,
    /// These hubs, database nodes and voters have not shown that they are ready.
    WaitsFor(Vec<String>),
    /// A node changes its image: it may go back to one that has no password.
    WaitsForRollout,
}

/// One hub's part.
pub struct EtcdAccess<'a> {
    pub desk: &'a SlotAllocator,
    pub topology: &'a Topology,
    pub secrets: &'a Secrets,
    /// This hub's slot, and its TLS key.
    pub slot: &'a str,
    pub tls_key: &'a str,
}

impl EtcdAccess<'_> {
    /// Turns access control on as soon as the fleet is ready, and looks after it as long as the agent runs.
    ///
    /// # Errors
    /// None: etcd is asked again.
    pub async fn keep(&self) -> Result<()> {
        if self.secrets.etcd_root.is_empty() || self.secrets.etcd_patroni.is_empty() {
            println!(
                "etcd's access control stays off: this hub's ticket has no etcd passwords; replace one hub with \
                 `bakehouse ticket {} --replace`",
                self.slot
            );
            return std::future::pending().await;
        }
        let mut before = None;
        loop {
            let now = self.step().await;
            let pause = if matches!(now, Ok(Access::Enabled)) { LOOK_AGAIN } else { LOOK };
            let now = now.map_err(|e| e.to_string());
            if before.as_ref() != Some(&now) {
                match &now {
                    Ok(Access::Enabled) => println!("etcd's access control is on"),
                    Ok(Access::WaitsFor(slots)) => {
                        println!("etcd's access control waits for the passwords of {}", slots.join(", "));
                    }
                    Ok(Access::WaitsForRollout) => println!("etcd's access control waits for the rollout"),
                    Err(e) => println!("etcd's access control: {e}"),
                }
                before = Some(now);
            }
            tokio::time::sleep(Duration::from_secs(pause)).await;
        }
    }

    /// Looks once, and turns access control on if the fleet is ready. Each part can be done again, by several
    /// hubs at once, and after a power cut anywhere.
    ///
    /// # Errors
    /// etcd does not answer.
    pub async fn step(&self) -> Result<Access> {
        let etcd = self.desk.etcd();
        if etcd.has_auth().await? {
            // A later version may name another prefix.
            permit_patroni(etcd, &self.topology.name).await?;
            return Ok(Access::Enabled);
        }
        let has_database = self.topology.node(self.slot).is_some_and(|n| n.has_role("db"));
        if !has_database || patroni_runs_with(&self.secrets.etcd_patroni) {
            self.desk.has_etcd_password(self.slot, self.tls_key).await?;
        }
        if etcd.get(&[TURN]).await?.iter().any(|turn| turn.revision != 0) {
            return Ok(Access::WaitsForRollout);
        }
        let waits = self.waits_for().await?;
        if !waits.is_empty() {
            return Ok(Access::WaitsFor(waits));
        }
        etcd.put_user(ROOT, &self.secrets.etcd_root).await?;
        etcd.grant_role(ROOT, ROOT).await?;
        etcd.put_role(PATRONI).await?;
        permit_patroni(etcd, &self.topology.name).await?;
        etcd.put_user(PATRONI, &self.secrets.etcd_patroni).await?;
        etcd.grant_role(PATRONI, PATRONI).await?;
        etcd.enable_auth().await?;
        Ok(Access::Enabled)
    }

    /// Hubs, database nodes and voters in the fleet that have not shown that they are ready.
    async fn waits_for(&self) -> Result<Vec<String>> {
        let etcd = self.desk.etcd();
        let (_, ready) = etcd.list(READY).await?;
        let ready: BTreeMap<&str, &[u8]> =
            ready.iter().filter_map(|p| Some((p.key.strip_prefix(READY)?, p.value.as_slice()))).collect();
        let mut waits = Vec::new();
        for pair in etcd.list(SLOTS).await?.1 {
            let Some(slot) = pair.key.strip_prefix(SLOTS) else { continue };
            let counts = |n: &fleet::Node| n.has_role("db") || self.topology.is_founder(n);
            if !self.topology.node(slot).is_some_and(counts) {
                continue;
            }
            let record: SlotRecord = serde_json::from_slice(&pair.value)
                .map_err(|e| Error::Failed(format!("etcd's record of {slot} is not readable: {e}")))?;
            if !record.vacant && ready.get(slot) != Some(&record.tls_key.as_bytes()) {
                waits.push(slot.to_owned());
            }
        }
        Ok(waits)
    }
}

impl SlotAllocator {
    /// A hub or database node has shown that it runs with its etcd password, or a voter that its etcd takes
    /// passwords. Written once for each owner.
    ///
    /// # Errors
    /// etcd does not answer.
    pub async fn has_etcd_password(&self, slot: &str, tls_key: &str) -> Result<()> {
        let key = format!("{READY}{slot}");
        let found = self.etcd.get(&[&key]).await?;
        if found.iter().any(|pair| pair.value == tls_key.as_bytes()) {
            return Ok(());
        }
        let revision = found.first().map_or(0, |pair| pair.revision);
        self.etcd.transact(&[Compare::Unchanged(&key, revision)], &[Op::Put(&key, tls_key.as_bytes())]).await.map(drop)
    }
}

/// Patroni's keys: those of the fleet's own scope, `NAME`, and of restored databases, `NAME@TIME`.
async fn permit_patroni(etcd: &Etcd, fleet: &str) -> Result<()> {
    for last in ["/", "@"] {
        let first = format!("/bakehouse/{fleet}{last}");
        let mut end = first.clone().into_bytes();
        if let Some(byte) = end.last_mut() {
            *byte += 1;
        }
        etcd.permit(PATRONI, first.as_bytes(), &end).await?;
    }
    Ok(())
}
