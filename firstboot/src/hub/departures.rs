//! Nodes that leave the fleet, or are evicted.

use std::time::{SystemTime, UNIX_EPOCH};

use fleet::etcd_keys::SLOTS;
use fleet::{Eviction, Reason, SlotRecord};
use tracing::info;

use super::claims::SlotAllocator;
use super::records::{SlotState, audit, forgotten_audit};
use super::refusal::refuse;
use crate::client::etcd::{Compare, Op};
use crate::error::{Error, Result};

/// Identifies one owner of a slot.
#[derive(Clone, Copy, Debug)]
pub enum Identified<'a> {
    /// The owner with this TLS key: the node itself sends the request.
    Key(&'a str),
    /// The owner with this epoch, as the operator read it; `None`: the current owner.
    Epoch(Option<u64>),
}

impl SlotAllocator {
    /// Orders a node to leave. The node reads the order, hands over and stops; with `now` the hub vacates the slot at
    /// once and fences the node. `owner`: the order does not apply to another owner of the slot. A repeated order
    /// continues where the previous one stopped. `proof`: the operator's signed order, for other nodes to verify.
    ///
    /// # Errors
    /// [`Error::Refused`] if the slot has no such owner, or etcd needs its vote; another error if etcd does not answer.
    pub async fn leave(&self, slot: &str, now: bool, owner: Identified<'_>, proof: Option<Eviction>) -> Result<()> {
        if self.topology.voters == [slot] {
            let text = format!("{slot} has the fleet's only vote; without this vote etcd has no quorum");
            return Err(Error::from(refuse(Reason::Malformed, &text)));
        }
        let place = self.place(slot).await?;
        let done = |record: &SlotRecord| {
            record.vacant
                && matches!(owner, Identified::Epoch(Some(epoch)) if record.epoch.checked_sub(1) == Some(epoch))
        };
        if place.before.as_ref().is_some_and(done) {
            return Ok(());
        }
        let Some(record) = place.before.as_ref().filter(|r| !r.vacant) else {
            return Err(Error::from(refuse(Reason::Malformed, &format!("the slot `{slot}` has no owner"))));
        };
        // Another machine may have taken the slot since the operator or the node read the epoch.
        let is_current = match owner {
            Identified::Key(key) => key == record.tls_key,
            Identified::Epoch(epoch) => epoch.is_none_or(|epoch| epoch == record.epoch),
        };
        if !is_current {
            let text = format!("another machine has owned {slot} since epoch {}", record.epoch);
            return Err(Error::from(refuse(Reason::Fenced, &text)));
        }
        if now {
            return self.vacate(&place, record, proof).await;
        }
        if !record.leaving {
            let record = SlotRecord { leaving: true, ..record.clone() };
            let value = serde_json::to_vec(&record).map_err(Error::json("a slot's record"))?;
            let key = format!("{SLOTS}{slot}");
            if !self.etcd.transact(&[Compare::Unchanged(&key, place.revision)], &[Op::Put(&key, &value)]).await? {
                return Err(Error::from(refuse(
                    Reason::Busy,
                    "another request changed the slot at the same time; retry",
                )));
            }
        }
        // The hub removes the vote before anything stops, because etcd refuses if it would lose its quorum.
        self.unvote(slot).await.map_err(|e| {
            let text = format!("{slot} cannot leave before etcd removes its member: {}", e.chain());
            refuse(Reason::Busy, &text).into()
        })
    }

    /// Vacates a slot after its owner has stopped. Idempotent.
    ///
    /// # Errors
    /// If etcd does not answer, or refuses to remove the node's member.
    pub async fn left(&self, slot: &str, tls_key: &str) -> Result<()> {
        let place = self.place(slot).await?;
        match &place.before {
            Some(record) if record.tls_key == tls_key && !record.vacant => self.vacate(&place, record, None).await,
            _ => Ok(()),
        }
    }

    /// Vacates the slot with the next epoch. The etcd member is removed first, so that a repeated call after a power
    /// cut finds the slot still owned and completes.
    async fn vacate(&self, place: &SlotState, record: &SlotRecord, proof: Option<Eviction>) -> Result<()> {
        let slot = &place.slot;
        self.unvote(slot).await?;
        let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let record = SlotRecord {
            epoch: record.epoch + 1,
            leaving: false,
            vacant: true,
            by: self.by.clone(),
            at,
            eviction: proof.or_else(|| record.eviction.clone()),
            ..record.clone()
        };
        let value = serde_json::to_vec(&record).map_err(Error::json("a slot's record"))?;
        let (key, audit) = (format!("{SLOTS}{slot}"), audit(slot, record.epoch));
        let mut then = vec![Op::Put(&key, &value), Op::Put(&audit, &value)];
        let forgotten = forgotten_audit(slot, record.epoch);
        then.extend(forgotten.iter().map(|audit| Op::Delete(audit)));
        let done = self.etcd.transact(&[Compare::Unchanged(&key, place.revision)], &then).await?;
        if !done {
            return Err(refuse(Reason::Busy, "another request changed the slot at the same time; retry").into());
        }
        info!(slot, epoch = record.epoch, "{slot} has no owner since epoch {}", record.epoch);
        Ok(())
    }
}
