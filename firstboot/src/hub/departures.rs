//! Nodes that leave the fleet: told to, or shut out.

use std::time::{SystemTime, UNIX_EPOCH};

use fleet::{Eviction, Reason, Refusal, SlotRecord};

use super::claims::SlotAllocator;
use super::records::{SLOTS, SlotState, audit, forgotten_audit};
use super::refusal::no;
use crate::client::etcd::{Compare, Op};
use crate::error::{Error, Result};

/// Which owner of a slot is meant.
#[derive(Clone, Copy, Debug)]
pub enum Identified<'a> {
    /// The one with this TLS key: a node that speaks for itself.
    Key(&'a str),
    /// The one of this epoch, as the operator saw it; `None`: whichever it is now.
    Epoch(Option<u64>),
}

impl SlotAllocator {
    /// A node is to go. Its machine hears of it and does so by itself; with `now` it is not
    /// waited for, and is fenced. `owner` is who is meant: another owner of the slot stays. Said
    /// again, it goes on from where it was. `proof` is the operator's order, for nodes to verify.
    ///
    /// # Errors
    /// etcd does not answer.
    pub async fn leave(
        &self,
        slot: &str,
        now: bool,
        owner: Identified<'_>,
        proof: Option<Eviction>,
    ) -> Result<Result<(), Refusal>> {
        if self.topology.voters == [slot] {
            let text = format!("{slot} has the fleet's only vote: nothing could be decided without it");
            return Ok(Err(no(Reason::Malformed, &text)));
        }
        let place = self.place(slot).await?;
        let done = |record: &SlotRecord| {
            record.vacant && matches!(owner, Identified::Epoch(Some(epoch)) if epoch + 1 == record.epoch)
        };
        if place.before.as_ref().is_some_and(done) {
            return Ok(Ok(()));
        }
        let Some(record) = place.before.as_ref().filter(|r| !r.vacant) else {
            return Ok(Err(no(Reason::Malformed, &format!("nobody has the slot `{slot}`"))));
        };
        // What this hub has heard may be late: another machine may have it.
        let meant = match owner {
            Identified::Key(key) => key == record.tls_key,
            Identified::Epoch(epoch) => epoch.is_none_or(|epoch| epoch == record.epoch),
        };
        if !meant {
            let text = format!("{slot} is another machine's since epoch {}", record.epoch);
            return Ok(Err(no(Reason::Fenced, &text)));
        }
        if now {
            return self.vacate(&place, record, proof).await;
        }
        if !record.leaving {
            let record = SlotRecord { leaving: true, ..record.clone() };
            let value = serde_json::to_vec(&record).map_err(|e| Error::Failed(e.to_string()))?;
            let key = format!("{SLOTS}{slot}");
            if !self.etcd.transact(&[Compare::Unchanged(&key, place.revision)], &[Op::Put(&key, &value)]).await? {
                return Ok(Err(no(Reason::Busy, "somebody else wrote at the same time")));
            }
        }
        // Before anything stops: etcd says no where it can't do without this vote.
        Ok(self.unvote(slot).await.map_err(|e| {
            let text = format!("{slot} leaves as soon as etcd can do without it, which is not now: {e}");
            no(Reason::Busy, &text)
        }))
    }

    /// The owner of a slot has stopped, and gives it back. Said again, it changes nothing.
    ///
    /// # Errors
    /// etcd does not answer, or can't do without the node's vote.
    pub async fn left(&self, slot: &str, tls_key: &str) -> Result<Result<(), Refusal>> {
        let place = self.place(slot).await?;
        match &place.before {
            Some(record) if record.tls_key == tls_key && !record.vacant => self.vacate(&place, record, None).await,
            _ => Ok(Ok(())),
        }
    }

    /// Nobody has the slot any more, as of the next epoch. Its vote goes first: done again after a
    /// cut, it is gone.
    async fn vacate(
        &self,
        place: &SlotState,
        record: &SlotRecord,
        proof: Option<Eviction>,
    ) -> Result<Result<(), Refusal>> {
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
        let value = serde_json::to_vec(&record).map_err(|e| Error::Failed(e.to_string()))?;
        let (key, audit) = (format!("{SLOTS}{slot}"), audit(slot, record.epoch));
        let mut then = vec![Op::Put(&key, &value), Op::Put(&audit, &value)];
        let forgotten = forgotten_audit(slot, record.epoch);
        then.extend(forgotten.iter().map(|audit| Op::Delete(audit)));
        let done = self.etcd.transact(&[Compare::Unchanged(&key, place.revision)], &then).await?;
        println!("{slot} has no owner any more (epoch {})", record.epoch);
        Ok(if done { Ok(()) } else { Err(no(Reason::Busy, "somebody else wrote at the same time")) })
    }
}
