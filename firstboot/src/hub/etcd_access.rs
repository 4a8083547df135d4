//! The hubs enable etcd's access control. Hubs use the user `root`; the user `patroni` can access only Patroni's keys.
//! A client without a password can neither read nor write.
//!
//! ```text
//! /bakehouse/etcd-ready/SLOT    owner's TLS key    this client has its etcd password, or this voter's etcd
//!                                                  accepts passwords (older configurations refuse them)
//! ```

use std::collections::BTreeMap;
use std::time::Duration;

use fleet::etcd_keys::{ETCD_READY, SLOTS, TURN};
use fleet::{Secrets, SlotRecord, Topology};
use tracing::{info, warn};

use super::claims::SlotAllocator;
use crate::client::etcd::{Compare, Etcd, Op};
use crate::error::{Error, Result};
use crate::node::etcd_user::{PATRONI, patroni_runs_with};

/// Name of etcd's administrator. etcd requires this user before it enables access control.
pub const ROOT: &str = "root";
/// Time between two checks, seconds: until access control is enabled, and afterwards.
const CHECK_INTERVAL: u64 = 10;
const RECHECK_INTERVAL: u64 = 300;

/// State of etcd's access control.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Access {
    /// etcd requires a user of every client.
    Enabled,
    /// These hubs, database nodes and voters have not reported that they are ready.
    WaitsFor(Vec<String>),
    /// A node changes its image, and may roll back to an image without the password.
    WaitsForRollout,
}

/// One hub's part in enabling access control.
pub struct EtcdAccess<'a> {
    /// Reads and writes the records in etcd.
    pub allocator: &'a SlotAllocator,
    /// All nodes, and the settings of the fleet.
    pub topology: &'a Topology,
    /// Passwords of etcd's users.
    pub secrets: &'a Secrets,
    /// This hub's slot.
    pub slot: &'a str,
    /// Base64 of the public key in this hub's certificate.
    pub tls_key: &'a str,
}

impl EtcdAccess<'_> {
    /// Enables access control when the fleet is ready, then keeps Patroni's permissions up to date. Never returns.
    ///
    /// # Errors
    /// Never: failed checks are logged and retried.
    pub async fn keep(&self) -> Result<()> {
        if self.secrets.etcd_root.is_empty() || self.secrets.etcd_patroni.is_empty() {
            warn!(
                "etcd's access control stays disabled: this hub's ticket has no etcd passwords; replace one hub with \
                 `bakehouse ticket {} --replace`",
                self.slot
            );
            return std::future::pending().await;
        }
        let mut before = None;
        loop {
            let now = self.step().await;
            let pause = if matches!(now, Ok(Access::Enabled)) { RECHECK_INTERVAL } else { CHECK_INTERVAL };
            let now = now.map_err(|e| e.chain());
            if before.as_ref() != Some(&now) {
                match &now {
                    Ok(Access::Enabled) => info!("etcd's access control is enabled"),
                    Ok(Access::WaitsFor(slots)) => {
                        info!("etcd's access control waits for the passwords of {}", slots.join(", "));
                    }
                    Ok(Access::WaitsForRollout) => {
                        info!("etcd's access control waits until no node holds the update lock");
                    }
                    Err(e) => warn!("cannot enable etcd's access control: {e}"),
                }
                before = Some(now);
            }
            tokio::time::sleep(Duration::from_secs(pause)).await;
        }
    }

    /// Checks the fleet once, and enables access control if the fleet is ready. Every step is idempotent: several hubs
    /// may run it at the same time, and again after a power cut.
    ///
    /// # Errors
    /// If etcd does not answer.
    pub async fn step(&self) -> Result<Access> {
        let etcd = self.allocator.etcd();
        if etcd.has_auth().await? {
            // A newer version may use other prefixes.
            permit_patroni(etcd, &self.topology.name).await?;
            return Ok(Access::Enabled);
        }
        let has_database = self.topology.node(self.slot).is_some_and(|n| n.has_role("db"));
        if !has_database || patroni_runs_with(&self.secrets.etcd_patroni) {
            self.allocator.has_etcd_password(self.slot, self.tls_key).await?;
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

    /// Returns the hubs, database nodes and voters that have not reported that they are ready.
    async fn waits_for(&self) -> Result<Vec<String>> {
        let etcd = self.allocator.etcd();
        let (_, ready) = etcd.list(ETCD_READY).await?;
        let ready: BTreeMap<&str, &[u8]> =
            ready.iter().filter_map(|p| Some((p.key.strip_prefix(ETCD_READY)?, p.value.as_slice()))).collect();
        let mut waits = Vec::new();
        for pair in etcd.list(SLOTS).await?.1 {
            let Some(slot) = pair.key.strip_prefix(SLOTS) else { continue };
            let needs_password = |n: &fleet::Node| n.has_role("db") || self.topology.is_founder(n);
            if !self.topology.node(slot).is_some_and(needs_password) {
                continue;
            }
            let record: SlotRecord = serde_json::from_slice(&pair.value)
                .map_err(|source| Error::Record { slot: slot.to_owned(), source })?;
            if !record.vacant && ready.get(slot) != Some(&record.tls_key.as_bytes()) {
                waits.push(slot.to_owned());
            }
        }
        Ok(waits)
    }
}

impl SlotAllocator {
    /// Records in etcd that a hub or database node uses its etcd password, or that a voter's etcd accepts passwords.
    /// Writes once per owner.
    ///
    /// # Errors
    /// If etcd does not answer.
    pub async fn has_etcd_password(&self, slot: &str, tls_key: &str) -> Result<()> {
        let key = format!("{ETCD_READY}{slot}");
        let found = self.etcd.get(&[&key]).await?;
        if found.iter().any(|pair| pair.value == tls_key.as_bytes()) {
            return Ok(());
        }
        let revision = found.first().map_or(0, |pair| pair.revision);
        self.etcd.transact(&[Compare::Unchanged(&key, revision)], &[Op::Put(&key, tls_key.as_bytes())]).await.map(drop)
    }
}

/// Permits Patroni's keys: those of the fleet's scope `NAME`, and of restored databases, `NAME@TIME`.
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
