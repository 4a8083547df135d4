//! Claims of slots. etcd decides all claims that wait at the same time in one transaction.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fleet::etcd_keys::SLOTS;
use fleet::{Claims, JoinRequest, Reason, SlotRecord};
use tokio::sync::oneshot;
use tokio::sync::oneshot::error::TryRecvError;
use tracing::error;

use super::claims::{QueuedClaim, SlotAllocator};
use super::records::{EtcdKeys, GrantedSlot, PendingGrant, TokenUsage};
use super::refusal::refuse;
use super::terms::TokenState;
use crate::client::backoff::jitter;
use crate::client::etcd::WatchEvent;
use crate::error::{Error, Result};

/// How often a batch is retried when another hub's transaction wins.
const ATTEMPTS: u64 = 16;
/// Claims in one transaction: etcd accepts 128 operations, and each claim needs up to five.
const BATCH_SIZE: usize = 24;

impl SlotAllocator {
    /// Grants a slot to a node with a verified token. Keys that own a slot get the same slot again, before the
    /// token's terms are checked.
    ///
    /// Claims that arrive while a transaction runs are decided together in the next one: the nodes of a rack share
    /// one token, and each claim changes its use count.
    ///
    /// # Errors
    /// [`Error::Refused`] if the claim gets no slot; another error if etcd does not answer. The transaction may then
    /// have been carried out; repeating the claim returns its result.
    pub async fn claim(&self, claims: &Claims, request: &JoinRequest) -> Result<GrantedSlot> {
        // A node that repeats its claim may have a spent or expired token, and etcd may have its record before this hub
        // has. Strangers with such tokens must not overload etcd.
        if self.useless.is_refused(claims) && !self.is_owner(request.mesh_key) {
            let text = "too many requests with expired, spent or revoked tokens";
            return Err(refuse(Reason::Busy, text).into());
        }
        let (reply, mut answer) = oneshot::channel();
        self.queue().push_back(QueuedClaim { claims: claims.clone(), request: request.clone(), reply });
        let _turn = self.turn.lock().await;
        loop {
            // The task that held the lock before may have decided this claim with its own.
            match answer.try_recv() {
                Ok(answer) => return answer,
                Err(TryRecvError::Closed) => return Err(Error::Failed("the claim was aborted".to_owned())),
                Err(TryRecvError::Empty) => {}
            }
            let batch = {
                let mut queue = self.queue();
                // Some clients may have disconnected.
                queue.retain(|w| !w.reply.is_closed());
                let count = queue.len().min(BATCH_SIZE);
                queue.drain(..count).collect()
            };
            self.decide(batch).await;
        }
    }

    fn queue(&self) -> MutexGuard<'_, VecDeque<QueuedClaim>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replies to every claim of a batch.
    async fn decide(&self, mut batch: Vec<QueuedClaim>) {
        for attempt in 0..ATTEMPTS {
            if let Err(e) = self.attempt(&mut batch, attempt).await {
                let shared = Arc::new(e);
                for waiting in batch {
                    waiting.answer(Err(shared.clone().into()));
                }
                return;
            }
            if batch.is_empty() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(jitter(attempt))).await;
        }
        for waiting in batch {
            waiting.answer(Err(refuse(Reason::Busy, "too many nodes claim slots at the same time").into()));
        }
    }

    /// Replies to the claims that can be decided now, and leaves the others in `batch`.
    async fn attempt(&self, batch: &mut Vec<QueuedClaim>, attempt: u64) -> Result<()> {
        let clock = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let now = clock.max(self.time_floor());
        if now > clock {
            error!("this hub's clock is {} s behind the fleet's; set this hub's clock", now - clock);
        }
        // The watch may lag behind etcd, so a failed transaction is followed by a read.
        if attempt > 0 {
            let groups: BTreeSet<&str> = batch.iter().map(|w| w.claims.group.as_str()).collect();
            for group in groups {
                let (_, pairs) = self.etcd.list(&format!("{SLOTS}{group}-")).await?;
                self.apply_events(pairs.into_iter().map(WatchEvent::from).collect(), false);
            }
        }
        let keys: Vec<EtcdKeys> = batch.iter().map(|w| EtcdKeys::new(w.request.mesh_key, &w.claims.id)).collect();
        let requested: Vec<&str> = keys.iter().flat_map(|k| [k.owner.as_str(), &k.token, &k.revoked]).collect();
        let found = self.etcd.get(&requested).await?;
        let mut tokens: BTreeMap<String, TokenUsage> = BTreeMap::new();
        let mut grants: Vec<PendingGrant> = Vec::new();
        let mut granted = Vec::new();
        let mut later = Vec::new();
        let mut undecided = std::mem::take(batch).into_iter().zip(keys).zip(found.chunks(3));
        // If etcd fails, the claims without a reply stay in the batch.
        let failed = loop {
            let Some(((waiting, keys), found)) = undecided.next() else { break None };
            let [owner, token, revoked] = found else {
                break Some((waiting, Error::MissingKeys));
            };
            let state = TokenState::new(token, revoked, now);
            if owner.revision != 0 {
                let slot = String::from_utf8_lossy(&owner.value);
                match self.repeat_grant(&slot, &waiting.claims, &waiting.request, state).await {
                    Err(e) if !matches!(e, Error::Refused(_)) => break Some((waiting, e)),
                    answer => waiting.answer(answer),
                }
                continue;
            }
            // The batch has two claims of one machine: the next attempt finds its slot.
            if grants.iter().any(|t| t.keys.owner == keys.owner) {
                later.push(waiting);
                continue;
            }
            // Earlier claims of this batch may use the same token.
            let used = tokens.get(&waiting.claims.id).map_or(state.used, |count| Some(count.used));
            let used = match (TokenState { used, ..state }).uses(&waiting.claims) {
                Ok(used) => used,
                Err(refusal) => {
                    self.useless.remember(&waiting.claims.id);
                    waiting.answer(Err(refusal.into()));
                    continue;
                }
            };
            let place = match self.choose(&waiting.claims, &grants).await {
                Ok(Some(place)) => place,
                Ok(None) => {
                    later.push(waiting);
                    continue;
                }
                Err(refused @ Error::Refused(_)) => {
                    waiting.answer(Err(refused));
                    continue;
                }
                Err(e) => break Some((waiting, e)),
            };
            let count = TokenUsage { used: used + 1, revision: token.revision };
            tokens.insert(waiting.claims.id.clone(), count);
            let eviction = place.before.as_ref().and_then(|r| r.eviction.clone());
            let record = SlotRecord {
                epoch: place.before.as_ref().map_or(1, |r| r.epoch + 1),
                mesh_key: waiting.request.mesh_key,
                tls_key: waiting.request.tls_key.clone(),
                token: Some(waiting.claims.id.clone()),
                image: waiting.request.image.clone(),
                by: self.by.clone(),
                at: now,
                leaving: false,
                vacant: false,
                eviction,
            };
            grants.push(PendingGrant { place, record, keys, former: None });
            granted.push(waiting);
        };
        let unanswered = undecided.map(|((waiting, _), _)| waiting).collect::<Vec<_>>();
        let taken = match failed {
            None if grants.is_empty() => Ok(true),
            None => self.take(&grants, &tokens).await,
            Some((waiting, e)) => {
                later.push(waiting);
                Err(e)
            }
        };
        if matches!(taken, Ok(true)) {
            for (waiting, PendingGrant { place, record, .. }) in granted.drain(..).zip(grants) {
                waiting.answer(Ok(GrantedSlot { slot: place.slot, epoch: record.epoch }));
            }
        }
        batch.extend(granted.into_iter().chain(later).chain(unanswered));
        taken.map(drop)
    }
}
