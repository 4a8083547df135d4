//! Claims of slots: decided by etcd, those that wait together in one transaction.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fleet::{Claims, JoinRequest, Reason, Refusal, SlotRecord};
use tokio::sync::oneshot;
use tokio::sync::oneshot::error::TryRecvError;

use super::claims::{QueuedClaim, SlotAllocator};
use super::records::{EtcdKeys, GrantedSlot, PendingGrant, SLOTS, TokenUsage};
use super::refusal::no;
use super::terms::TokenState;
use crate::client::backoff::jitter;
use crate::client::etcd::WatchEvent;
use crate::error::{Error, Result};

/// Others may claim at the same moment: then again, that often.
const ATTEMPTS: u64 = 16;
/// Claims in one transaction: etcd takes 128 operations, each claim needs up to five.
const TOGETHER: usize = 24;

impl SlotAllocator {
    /// Gives a slot to a node whose token was verified. The same keys get the same slot again, before anything
    /// else is looked at.
    ///
    /// Claims that come while etcd is busy with others are decided together, by one transaction: the nodes of a
    /// rack share one token, and each claim changes its count.
    ///
    /// # Errors
    /// etcd does not answer. The transaction may have taken place: the same claim again returns its result.
    pub async fn claim(&self, claims: &Claims, request: &JoinRequest) -> Result<Result<GrantedSlot, Refusal>> {
        // A token that gives nothing any more may still be of a node that asks again for its grant, which etcd
        // knows better than this hub. Strangers with such tokens must not keep etcd busy.
        if self.useless.is_refused(claims) && !self.is_owner(request.mesh_key) {
            return Ok(Err(no(Reason::Busy, "too many nodes ask with tokens that are expired, spent or revoked")));
        }
        let (reply, mut answer) = oneshot::channel();
        self.queue().push_back(QueuedClaim { claims: claims.clone(), request: request.clone(), reply });
        let _turn = self.turn.lock().await;
        loop {
            // The claim that had the turn before may have been decided together with this one.
            match answer.try_recv() {
                Ok(answer) => return answer,
                Err(TryRecvError::Closed) => return Err(Error::Failed("the claim was cut off".to_owned())),
                Err(TryRecvError::Empty) => {}
            }
            let batch = {
                let mut queue = self.queue();
                // Some have gone away in the meantime.
                queue.retain(|w| !w.reply.is_closed());
                let count = queue.len().min(TOGETHER);
                queue.drain(..count).collect()
            };
            self.decide(batch).await;
        }
    }

    fn queue(&self) -> MutexGuard<'_, VecDeque<QueuedClaim>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers every claim of a batch.
    async fn decide(&self, mut batch: Vec<QueuedClaim>) {
        for attempt in 0..ATTEMPTS {
            if let Err(e) = self.attempt(&mut batch, attempt).await {
                let why = e.to_string();
                for waiting in batch {
                    waiting.tell(Err(Error::Failed(why.clone())));
                }
                return;
            }
            if batch.is_empty() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(jitter(attempt))).await;
        }
        for waiting in batch {
            waiting.tell(Ok(Err(no(Reason::Busy, "too many nodes ask at the same time"))));
        }
    }

    /// Answers the claims that it can; leaves those that have to be looked at again.
    async fn attempt(&self, batch: &mut Vec<QueuedClaim>, attempt: u64) -> Result<()> {
        let clock = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let now = clock.max(self.time_floor());
        if now > clock {
            eprintln!("this hub's clock is {} s behind the fleet's: set it", now - clock);
        }
        // What was heard may be late: then the transaction fails, and etcd itself is asked.
        if attempt > 0 {
            let groups: BTreeSet<&str> = batch.iter().map(|w| w.claims.group.as_str()).collect();
            for group in groups {
                let (_, pairs) = self.etcd.list(&format!("{SLOTS}{group}-")).await?;
                self.heard(pairs.into_iter().map(|p| WatchEvent { key: p.key, value: Some(p.value) }).collect(), false);
            }
        }
        let keys: Vec<EtcdKeys> = batch.iter().map(|w| EtcdKeys::of(w.request.mesh_key, &w.claims.id)).collect();
        let asked: Vec<&str> = keys.iter().flat_map(|k| [k.owner.as_str(), &k.token, &k.revoked]).collect();
        let found = self.etcd.get(&asked).await?;
        let mut tokens: BTreeMap<String, TokenUsage> = BTreeMap::new();
        let mut takings: Vec<PendingGrant> = Vec::new();
        let mut taking = Vec::new();
        let mut later = Vec::new();
        let mut asking = std::mem::take(batch).into_iter().zip(keys).zip(found.chunks(3));
        // Claims that are not answered yet stay in the batch if etcd fails.
        let failed = loop {
            let Some(((waiting, keys), found)) = asking.next() else { break None };
            let [owner, token, revoked] = found else {
                break Some((waiting, Error::Failed("etcd lost a key".to_owned())));
            };
            let state = TokenState::of(token, revoked, now);
            if owner.revision != 0 {
                let slot = String::from_utf8_lossy(&owner.value);
                match self.again(&slot, &waiting.claims, &waiting.request, state).await {
                    Ok(answer) => waiting.tell(Ok(answer)),
                    Err(e) => break Some((waiting, e)),
                }
                continue;
            }
            // The same machine, twice in one batch: its slot is known the next time.
            if takings.iter().any(|t| t.keys.owner == keys.owner) {
                later.push(waiting);
                continue;
            }
            // Others of this batch may be about to use it, too.
            let used = tokens.get(&waiting.claims.id).map_or(state.used, |count| Some(count.used));
            let used = match (TokenState { used, ..state }).uses(&waiting.claims) {
                Ok(used) => used,
                Err(refusal) => {
                    self.useless.remember(&waiting.claims.id);
                    waiting.tell(Ok(Err(refusal)));
                    continue;
                }
            };
            let place = match self.choose(&waiting.claims, &takings).await {
                Ok(Ok(Some(place))) => place,
                Ok(Ok(None)) => {
                    later.push(waiting);
                    continue;
                }
                Ok(Err(refusal)) => {
                    waiting.tell(Ok(Err(refusal)));
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
            takings.push(PendingGrant { place, record, keys, former: None });
            taking.push(waiting);
        };
        let unanswered = asking.map(|((waiting, _), _)| waiting).collect::<Vec<_>>();
        let taken = match failed {
            None if takings.is_empty() => Ok(true),
            None => self.take(&takings, &tokens).await,
            Some((waiting, e)) => {
                later.push(waiting);
                Err(e)
            }
        };
        if matches!(taken, Ok(true)) {
            for (waiting, PendingGrant { place, record, .. }) in taking.drain(..).zip(takings) {
                waiting.tell(Ok(Ok(GrantedSlot { slot: place.slot, epoch: record.epoch })));
            }
        }
        batch.extend(taking.into_iter().chain(later).chain(unanswered));
        taken.map(drop)
    }
}
