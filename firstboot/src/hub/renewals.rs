//! Nodes that have new keys.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use fleet::{Reason, Refusal, Renewal, SlotRecord};

use super::claims::SlotAllocator;
use super::records::{EtcdKeys, GrantedSlot, PendingGrant};
use super::refusal::{gone, no};
use crate::client::etcd::Op;
use crate::error::Result;

/// Seconds between two renewals of a slot: each is a write in etcd and on every hub's disk, and a
/// node that was taken over must not fill them.
const RENEWAL_INTERVAL: u64 = 24 * 3600;
const RENEWED: &str = "/bakehouse/renewed/";

impl SlotAllocator {
    /// The owner of a slot, whose TLS key is `own`, has other keys from the next epoch on. Asked
    /// again with the same ones, the answer is the same: the reply may have been lost.
    ///
    /// # Errors
    /// etcd does not answer: nobody knows whether it took place, and asking again tells.
    pub async fn renew(&self, slot: &str, own: &str, asked: &Renewal) -> Result<Result<GrantedSlot, Refusal>> {
        let place = self.place(slot).await?;
        let Some(before) = place.before.clone() else {
            return Ok(Err(no(Reason::Busy, &format!("{slot} has not been entered yet"))));
        };
        if before.vacant {
            return Ok(Err(no(Reason::Fenced, &gone(slot))));
        }
        if (before.mesh_key, &before.tls_key) == (asked.mesh_key, &asked.tls_key) {
            return Ok(Ok(GrantedSlot { slot: slot.to_owned(), epoch: before.epoch }));
        }
        if before.tls_key != own {
            let text = format!("{slot} is another machine's since epoch {}", before.epoch);
            return Ok(Err(no(Reason::Fenced, &text)));
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let renewed = format!("{RENEWED}{slot}");
        let found = self.etcd.get(&[&renewed]).await?;
        let last = found.first().and_then(|pair| std::str::from_utf8(&pair.value).ok()?.parse::<u64>().ok());
        let next = last.map_or(0, |last| last.min(now) + RENEWAL_INTERVAL);
        if next > now {
            let text = format!(
                "{slot} had new keys {} h ago, and may have others in {} h",
                (RENEWAL_INTERVAL - (next - now)) / 3600,
                (next - now).div_ceil(3600)
            );
            return Ok(Err(no(Reason::Busy, &text)));
        }
        let former = EtcdKeys::of(before.mesh_key, "").owner;
        let record = SlotRecord {
            epoch: before.epoch + 1,
            mesh_key: asked.mesh_key,
            tls_key: asked.tls_key.clone(),
            by: self.by.clone(),
            at: now,
            ..before
        };
        let epoch = record.epoch;
        let taking = PendingGrant { place, record, keys: EtcdKeys::of(asked.mesh_key, ""), former: Some(former) };
        if self.take(&[taking], &BTreeMap::new()).await? {
            // Cut before this, the slot may renew once more.
            self.etcd.transact(&[], &[Op::Put(&renewed, now.to_string().as_bytes())]).await?;
            return Ok(Ok(GrantedSlot { slot: slot.to_owned(), epoch }));
        }
        Ok(Err(no(Reason::Busy, "somebody else wrote at the same time, or the mesh key is in use")))
    }
}
