//! The slots in etcd. Every change of an owner is one transaction.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use fleet::etcd_keys::{REVOKED_TOKENS, SLOTS, TOKENS};
use fleet::{Claims, JoinRequest, MeshKey, Reason, SlotRecord, Tokens, Topology};
use tokio::sync::{oneshot, watch};

use super::hearing::{Hearing, seen};
use super::records::{EtcdKeys, GrantedSlot, Owners, PendingGrant, SlotState, TokenUsage, audit, forgotten_audit};
use super::refusal::{left_text, refuse};
use super::useless::UselessTokens;
use crate::client::etcd::{Compare, Etcd, KeyValue, Op};
use crate::error::{Error, Result};

/// Allocates slots to machines, on one hub.
pub struct SlotAllocator {
    pub(super) etcd: Etcd,
    pub(super) topology: Topology,
    /// This hub's slot.
    pub(super) by: String,
    /// Shared, not copied: every request of every node reads it.
    pub(super) owners: Arc<watch::Sender<Arc<Owners>>>,
    /// `owners` was read from etcd since the agent started.
    pub(super) has_heard: Arc<AtomicBool>,
    pub(super) waiting: Mutex<VecDeque<QueuedClaim>>,
    /// Serializes the batches of this hub, because concurrent transactions would conflict.
    pub(super) turn: tokio::sync::Mutex<()>,
    pub(super) hearing: Hearing,
    pub(super) useless: UselessTokens,
    /// Unix time of the image's build, a lower limit of the current time.
    pub(super) built: u64,
}

impl SlotAllocator {
    /// Returns an allocator for the hub `by`.
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

    /// Returns a second allocator of the same fleet with separate connections, so that neither waits for requests of
    /// the other. Both share the records that [`Self::follow`] reads.
    #[must_use]
    pub fn beside(&self, etcd: Etcd) -> Self {
        let other = Self::new(etcd, self.topology.clone(), &self.by);
        Self { owners: self.owners.clone(), has_heard: self.has_heard.clone(), built: self.built, ..other }
    }

    /// Sets the Unix time of the image's build, a lower limit of the current time.
    #[must_use]
    pub fn built_at(self, built: u64) -> Self {
        Self { built, ..self }
    }

    /// Returns the slot of this hub.
    #[must_use]
    pub(super) fn own(&self) -> &str {
        &self.by
    }

    /// Returns the client of the etcd cluster.
    #[must_use]
    pub fn etcd(&self) -> &Etcd {
        &self.etcd
    }

    /// Registers a founder as the owner of its slot, without a token.
    ///
    /// # Errors
    /// [`Error::Refused`] if the slot has another owner; another error if etcd does not answer.
    pub async fn register(&self, slot: &str, mesh_key: MeshKey, tls_key: &str, image: &str) -> Result<GrantedSlot> {
        let place = self.place(slot).await?;
        let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        match &place.before {
            Some(record) if record.vacant && record.mesh_key == mesh_key => {
                return Err(Error::from(refuse(Reason::Fenced, &left_text(slot))));
            }
            Some(record) if record.mesh_key == mesh_key => {
                return Ok(GrantedSlot { slot: slot.to_owned(), epoch: record.epoch });
            }
            Some(record) => {
                let text = format!(
                    "another machine has owned {slot} since epoch {}; give this machine a ticket made by \
                     `bakehouse ticket --replace {slot}`",
                    record.epoch
                );
                return Err(Error::from(refuse(Reason::Taken, &text)));
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
        let grant = PendingGrant { place, record, keys: EtcdKeys::new(mesh_key, ""), former: None };
        if self.take(&[grant], &BTreeMap::new()).await? {
            return Ok(GrantedSlot { slot: slot.to_owned(), epoch: 1 });
        }
        Err(Error::from(refuse(Reason::Busy, "another request changed the slot at the same time; retry")))
    }

    /// Revokes a token. Nodes that joined with the token stay members.
    ///
    /// # Errors
    /// If etcd does not answer.
    pub async fn revoke(&self, token: &str) -> Result<()> {
        let keys = EtcdKeys::new(MeshKey([0; 32]), token);
        self.etcd.transact(&[], &[Op::Put(&keys.revoked, b"")]).await.map(drop)
    }

    /// Returns the use counts of all tokens, and the revoked tokens.
    ///
    /// # Errors
    /// If etcd does not answer.
    pub async fn tokens(&self) -> Result<Tokens> {
        let ids = |pairs: Vec<KeyValue>, prefix: &str| -> Vec<(String, Vec<u8>)> {
            pairs.into_iter().filter_map(|p| Some((p.key.strip_prefix(prefix)?.to_owned(), p.value))).collect()
        };
        let (_, used) = self.etcd.list(TOKENS).await?;
        let (_, revoked) = self.etcd.list(REVOKED_TOKENS).await?;
        let count = |value: &[u8]| std::str::from_utf8(value).ok().and_then(|n| n.parse().ok()).unwrap_or(0);
        Ok(Tokens {
            used: ids(used, TOKENS).into_iter().map(|(id, value)| (id, count(&value))).collect(),
            revoked: ids(revoked, REVOKED_TOKENS).into_iter().map(|(id, _)| id).collect(),
        })
    }

    /// Reads a slot's record from etcd.
    pub(super) async fn place(&self, slot: &str) -> Result<SlotState> {
        let found = self.etcd.get(&[&format!("{SLOTS}{slot}")]).await?;
        let pair = found.into_iter().next().ok_or(Error::MissingKeys)?;
        let before = if pair.revision == 0 {
            None
        } else {
            let record = serde_json::from_slice(&pair.value);
            Some(record.map_err(|source| Error::Record { slot: slot.to_owned(), source })?)
        };
        Ok(SlotState { slot: slot.to_owned(), before, revision: pair.revision, silent: false })
    }

    /// Writes the grants in one transaction, which fails if a slot or a token has changed since it was read, or a mesh
    /// key has an owner already. Returns whether the transaction succeeded.
    pub(super) async fn take(&self, grants: &[PendingGrant], tokens: &BTreeMap<String, TokenUsage>) -> Result<bool> {
        let mut when = Vec::new();
        let mut then = Vec::new();
        let written: Vec<(String, String, Option<String>, Vec<u8>)> = grants
            .iter()
            .map(|t| {
                let slot = format!("{SLOTS}{}", t.place.slot);
                let audit = audit(&t.place.slot, t.record.epoch);
                let value = serde_json::to_vec(&t.record).map_err(Error::json("a slot's record"))?;
                Ok((slot, audit, t.place.silent.then(|| seen(&t.place.slot)), value))
            })
            .collect::<Result<_>>()?;
        for (grant, (slot, audit, seen, value)) in grants.iter().zip(&written) {
            when.extend([Compare::Unchanged(slot, grant.place.revision), Compare::Unchanged(&grant.keys.owner, 0)]);
            if let Some(seen) = seen {
                when.push(Compare::Unchanged(seen, 0));
            }
            then.push(Op::Put(slot, value));
            then.push(Op::Put(&grant.keys.owner, grant.place.slot.as_bytes()));
            then.push(Op::Put(audit, value));
            if let Some(former) = &grant.former {
                then.push(Op::Delete(former));
            }
        }
        let forgotten: Vec<String> =
            grants.iter().filter_map(|t| forgotten_audit(&t.place.slot, t.record.epoch)).collect();
        then.extend(forgotten.iter().map(|audit| Op::Delete(audit)));
        let counts: Vec<(EtcdKeys, String, u64)> = tokens
            .iter()
            .filter(|(id, _)| grants.iter().any(|t| t.record.token.as_ref() == Some(id)))
            .map(|(id, count)| (EtcdKeys::new(MeshKey([0; 32]), id), count.used.to_string(), count.revision))
            .collect();
        for (keys, used, revision) in &counts {
            when.extend([Compare::Unchanged(&keys.token, *revision), Compare::Unchanged(&keys.revoked, 0)]);
            then.push(Op::Put(&keys.token, used.as_bytes()));
        }
        self.etcd.transact(&when, &then).await
    }
}

/// A claim that waits for its decision.
pub(super) struct QueuedClaim {
    pub(super) claims: Claims,
    pub(super) request: JoinRequest,
    pub(super) reply: oneshot::Sender<Result<GrantedSlot>>,
}

impl QueuedClaim {
    pub(super) fn answer(self, answer: Result<GrantedSlot>) {
        // A node that has disconnected repeats its claim.
        let _ = self.reply.send(answer);
    }
}
