//! Renewal of nodes' keys.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use fleet::etcd_keys::RENEWED;
use fleet::{Reason, Renewal, SlotRecord};

use super::claims::SlotAllocator;
use super::records::{EtcdKeys, GrantedSlot, PendingGrant};
use super::refusal::{left_text, refuse};
use crate::client::etcd::Op;
use crate::error::{Error, Result};

/// Minimum time between two renewals of a slot, seconds. Each renewal writes to etcd and to every hub's disk, and a
/// compromised node must not fill them.
const RENEWAL_INTERVAL: u64 = 24 * 3600;

impl SlotAllocator {
    /// Gives the owner of a slot, whose TLS key is `own`, new keys from the next epoch on. A repeated request with the
    /// same keys gets the same reply, because the first reply may have been lost.
    ///
    /// # Errors
    /// [`Error::Refused`] if the slot has no such owner, or got new keys less than a day ago; another error if etcd does
    /// not answer. The transaction may then have been carried out; repeating the request returns its result.
    pub async fn renew(&self, slot: &str, own: &str, renewal: &Renewal) -> Result<GrantedSlot> {
        let place = self.place(slot).await?;
        let Some(before) = place.before.clone() else {
            return Err(Error::from(refuse(Reason::Busy, &format!("{slot} is not registered in etcd yet"))));
        };
        if before.vacant {
            return Err(Error::from(refuse(Reason::Fenced, &left_text(slot))));
        }
        if (before.mesh_key, &before.tls_key) == (renewal.mesh_key, &renewal.tls_key) {
            return Ok(GrantedSlot { slot: slot.to_owned(), epoch: before.epoch });
        }
        if before.tls_key != own {
            let text = format!("another machine has owned {slot} since epoch {}", before.epoch);
            return Err(Error::from(refuse(Reason::Fenced, &text)));
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let renewed = format!("{RENEWED}{slot}");
        let found = self.etcd.get(&[&renewed]).await?;
        let last = found.first().and_then(|pair| std::str::from_utf8(&pair.value).ok()?.parse::<u64>().ok());
        let next = last.map_or(0, |last| last.min(now) + RENEWAL_INTERVAL);
        if next > now {
            let text = format!(
                "{slot} renewed its keys {} h ago, and can renew them again in {} h",
                (RENEWAL_INTERVAL - (next - now)) / 3600,
                (next - now).div_ceil(3600)
            );
            return Err(Error::from(refuse(Reason::Busy, &text)));
        }
        let former = EtcdKeys::new(before.mesh_key, "").owner;
        let record = SlotRecord {
            epoch: before.epoch + 1,
            mesh_key: renewal.mesh_key,
            tls_key: renewal.tls_key.clone(),
            by: self.by.clone(),
            at: now,
            ..before
        };
        let epoch = record.epoch;
        let grant = PendingGrant { place, record, keys: EtcdKeys::new(renewal.mesh_key, ""), former: Some(former) };
        if self.take(&[grant], &BTreeMap::new()).await? {
            // A separate write: after a power cut here, the slot may renew once more.
            self.etcd.transact(&[], &[Op::Put(&renewed, now.to_string().as_bytes())]).await?;
            return Ok(GrantedSlot { slot: slot.to_owned(), epoch });
        }
        Err(Error::from(refuse(
            Reason::Busy,
            "another request changed the slot at the same time, or the mesh key is in use",
        )))
    }
}
