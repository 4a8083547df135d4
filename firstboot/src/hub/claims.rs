//! The store of slots in etcd, as a hub sees it: each change of an owner is one transaction.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use fleet::{Claims, JoinRequest, MeshKey, Reason, Refusal, SlotRecord, Tokens, Topology};
use tokio::sync::{oneshot, watch};

use super::hearing::{Hearing, seen};
use super::records::{
    EtcdKeys, GrantedSlot, Owners, PendingGrant, REVOKED, SLOTS, SlotState, TOKENS, TokenUsage, audit, forgotten_audit,
};
use super::refusal::{gone, no};
use super::useless::UselessTokens;
use crate::client::etcd::{Compare, Etcd, KeyValue, Op};
use crate::error::{Error, Result};

pub struct SlotAllocator {
    pub(super) etcd: Etcd,
    pub(super) topology: Topology,
    /// This hub.
    pub(super) by: String,
    /// Shared, not copied: it is looked at for every question of every node.
    pub(super) owners: Arc<watch::Sender<Arc<Owners>>>,
    /// etcd's word is among them since this start.
    pub(super) has_heard: Arc<AtomicBool>,
    pub(super) waiting: Mutex<VecDeque<QueuedClaim>>,
    /// One batch of this hub's is under way at a time: two would only get into each other's way
    /// in etcd.
    pub(super) turn: tokio::sync::Mutex<()>,
    pub(super) hearing: Hearing,
    pub(super) useless: UselessTokens,
    /// When this hub's image was built, in seconds since 1970: it is not earlier, whatever its clock says.
    pub(super) built: u64,
}

impl SlotAllocator {
    #[must_use]
    pub fn new(etcd: Etcd, topology: Topology, by: &str) -> Self {
        Self {
            etcd,
            topology,
            by: by.to_owned(),
            owners: Arc::default(),
            has_heard: Arc::default(),
            waiting: Mutex::default(),
            turn: tokio::sync::Mutex::default(),
            hearing: Hearing::default(),
            useless: UselessTokens::default(),
            built: 0,
        }
    }

    /// A second store of the same fleet that uses connections of its own and shares what [`Self::follow`] has
    /// read: work of one does not wait for requests of the other.
    #[must_use]
    pub fn beside(&self, etcd: Etcd) -> Self {
        let other = Self::new(etcd, self.topology.clone(), &self.by);
        Self { owners: self.owners.clone(), has_heard: self.has_heard.clone(), built: self.built, ..other }
    }

    /// Takes no time before the image's build for the present, in seconds since 1970.
    #[must_use]
    pub fn built_at(self, built: u64) -> Self {
        Self { built, ..self }
    }

    /// The cluster that decides.
    #[must_use]
    pub fn etcd(&self) -> &Etcd {
        &self.etcd
    }

    /// A founder enters itself: it needs nobody's leave, but the slot may have another owner.
    ///
    /// # Errors
    /// etcd does not answer.
    pub async fn register(
        &self,
        slot: &str,
        mesh_key: MeshKey,
        tls_key: &str,
        image: &str,
    ) -> Result<Result<GrantedSlot, Refusal>> {
        let place = self.place(slot).await?;
        let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        match &place.before {
            Some(record) if record.vacant && record.mesh_key == mesh_key => {
                return Ok(Err(no(Reason::Fenced, &gone(slot))));
            }
            Some(record) if record.mesh_key == mesh_key => {
                return Ok(Ok(GrantedSlot { slot: slot.to_owned(), epoch: record.epoch }));
            }
            Some(record) => {
                let text = format!(
                    "{slot} is another machine's since epoch {}; give this one a ticket made by `bakehouse ticket --replace {slot}`",
                    record.epoch
                );
                return Ok(Err(no(Reason::Taken, &text)));
            }
            None => {}
        }
        let record = SlotRecord {
            epoch: 1,
            mesh_key,
            tls_key: tls_key.to_owned(),
            token: None,
            image: image.to_owned(),
            by: self.by.clone(),
            at,
            leaving: false,
            vacant: false,
            eviction: None,
        };
        let taking = PendingGrant { place, record, keys: EtcdKeys::of(mesh_key, ""), former: None };
        if self.take(&[taking], &BTreeMap::new()).await? {
            return Ok(Ok(GrantedSlot { slot: slot.to_owned(), epoch: 1 }));
        }
        Ok(Err(no(Reason::Busy, "somebody else wrote at the same time")))
    }

    /// A token is of no use any more. Who came in with it stays.
    ///
    /// # Errors
    /// etcd does not answer.
    pub async fn revoke(&self, token: &str) -> Result<()> {
        let keys = EtcdKeys::of(MeshKey([0; 32]), token);
        self.etcd.transact(&[], &[Op::Put(&keys.revoked, b"")]).await.map(drop)
    }

    /// What became of all tokens.
    ///
    /// # Errors
    /// etcd does not answer.
    pub async fn tokens(&self) -> Result<Tokens> {
        let ids = |pairs: Vec<KeyValue>, prefix: &str| -> Vec<(String, Vec<u8>)> {
            pairs.into_iter().filter_map(|p| Some((p.key.strip_prefix(prefix)?.to_owned(), p.value))).collect()
        };
        let (_, used) = self.etcd.list(TOKENS).await?;
        let (_, revoked) = self.etcd.list(REVOKED).await?;
        let count = |value: &[u8]| std::str::from_utf8(value).ok().and_then(|n| n.parse().ok()).unwrap_or(0);
        Ok(Tokens {
            used: ids(used, TOKENS).into_iter().map(|(id, value)| (id, count(&value))).collect(),
            revoked: ids(revoked, REVOKED).into_iter().map(|(id, _)| id).collect(),
        })
    }

    pub(super) async fn place(&self, slot: &str) -> Result<SlotState> {
        let found = self.etcd.get(&[&format!("{SLOTS}{slot}")]).await?;
        let pair = found.into_iter().next().ok_or_else(|| Error::Failed("etcd lost a key".to_owned()))?;
        let before = if pair.revision == 0 {
            None
        } else {
            let record = serde_json::from_slice(&pair.value);
            Some(record.map_err(|e| Error::Failed(format!("etcd's record of {slot} is not readable: {e}")))?)
        };
        Ok(SlotState { slot: slot.to_owned(), before, revision: pair.revision, silent: false })
    }

    /// One transaction: the slots are as they were seen, the keys new, the tokens as they were seen.
    pub(super) async fn take(&self, takings: &[PendingGrant], tokens: &BTreeMap<String, TokenUsage>) -> Result<bool> {
        let mut when = Vec::new();
        let mut then = Vec::new();
        let written: Vec<(String, String, Option<String>, Vec<u8>)> = takings
            .iter()
            .map(|t| {
                let slot = format!("{SLOTS}{}", t.place.slot);
                let audit = audit(&t.place.slot, t.record.epoch);
                let value = serde_json::to_vec(&t.record).map_err(|e| Error::Failed(e.to_string()))?;
                Ok((slot, audit, t.place.silent.then(|| seen(&t.place.slot)), value))
            })
            .collect::<Result<_>>()?;
        for (taking, (slot, audit, seen, value)) in takings.iter().zip(&written) {
            when.extend([Compare::Unchanged(slot, taking.place.revision), Compare::Unchanged(&taking.keys.owner, 0)]);
            if let Some(seen) = seen {
                when.push(Compare::Unchanged(seen, 0));
            }
            then.push(Op::Put(slot, value));
            then.push(Op::Put(&taking.keys.owner, taking.place.slot.as_bytes()));
            then.push(Op::Put(audit, value));
            if let Some(former) = &taking.former {
                then.push(Op::Delete(former));
            }
        }
        let forgotten: Vec<String> =
            takings.iter().filter_map(|t| forgotten_audit(&t.place.slot, t.record.epoch)).collect();
        then.extend(forgotten.iter().map(|audit| Op::Delete(audit)));
        let counts: Vec<(EtcdKeys, String, u64)> = tokens
            .iter()
            .filter(|(id, _)| takings.iter().any(|t| t.record.token.as_ref() == Some(id)))
            .map(|(id, count)| (EtcdKeys::of(MeshKey([0; 32]), id), count.used.to_string(), count.revision))
            .collect();
        for (keys, used, revision) in &counts {
            when.extend([Compare::Unchanged(&keys.token, *revision), Compare::Unchanged(&keys.revoked, 0)]);
            then.push(Op::Put(&keys.token, used.as_bytes()));
        }
        self.etcd.transact(&when, &then).await
    }
}

/// A claim that is not answered yet.
pub(super) struct QueuedClaim {
    pub(super) claims: Claims,
    pub(super) request: JoinRequest,
    pub(super) reply: oneshot::Sender<Result<Result<GrantedSlot, Refusal>>>,
}

impl QueuedClaim {
    pub(super) fn tell(self, answer: Result<Result<GrantedSlot, Refusal>>) {
        // A node that has hung up asks again.
        let _ = self.reply.send(answer);
    }
}
