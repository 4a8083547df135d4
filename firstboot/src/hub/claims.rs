//! Who has which slot: decided by etcd, in one transaction for each claim.
//!
//! ```text
//! /bakehouse/slots/SLOT     SlotRecord      who has it
//! /bakehouse/owners/KEY     slot's name     what this mesh key has
//! /bakehouse/tokens/ID      number          how often it was used
//! /bakehouse/revoked/ID     anything        it is of no use any more
//! /bakehouse/audit/SLOT/EPOCH  SlotRecord   what was ever granted
//! /bakehouse/seen/SLOT      hub's name      as long as its owner was seen not long ago (a lease)
//! ```

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fleet::{Claims, JoinRequest, MeshKey, Node, Reason, Refusal, SlotRecord, Tokens, Topology};
use tokio::sync::oneshot::error::TryRecvError;
use tokio::sync::{oneshot, watch};

use super::refusal::{gone, no};
use super::silence::{Hearing, seen};
use super::terms::TokenState;
use super::useless::UselessTokens;
use crate::client::backoff::jitter;
use crate::client::etcd::{Change, Etcd, If, Pair, Then};
use crate::error::{Error, Result};

pub(super) const SLOTS: &str = "/bakehouse/slots/";
const TOKENS: &str = "/bakehouse/tokens/";
const REVOKED: &str = "/bakehouse/revoked/";
/// Others may claim at the same moment: then again, that often.
const ATTEMPTS: u64 = 16;
/// Claims in one transaction: etcd takes 128 operations, each claim needs up to five.
const TOGETHER: usize = 24;
/// Grants of a slot that stay on record.
const AUDITED: u64 = 32;

/// Every slot's owner, as this hub has heard: the truth is etcd's.
pub type Owners = BTreeMap<String, SlotRecord>;

pub struct ClaimsDesk {
    pub(super) etcd: Etcd,
    pub(super) topology: Topology,
    /// This hub.
    pub(super) by: String,
    /// Shared, not copied: it is looked at for every question of every node.
    pub(super) owners: Arc<watch::Sender<Arc<Owners>>>,
    /// etcd's word is among them since this start.
    pub(super) has_heard: Arc<AtomicBool>,
    waiting: Mutex<VecDeque<Waiting>>,
    /// One batch of this hub's is under way at a time: two would only get into each other's way
    /// in etcd.
    turn: tokio::sync::Mutex<()>,
    pub(super) hearing: Hearing,
    useless: UselessTokens,
    /// When this hub's image was built, in seconds since 1970: it is not earlier, whatever its clock says.
    pub(super) built: u64,
}

/// A slot that was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Given {
    pub slot: String,
    pub epoch: u64,
}

impl ClaimsDesk {
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

    /// Gives a slot to whoever asks with a token that was verified. The same keys get the same
    /// slot again, before anything else is looked at.
    ///
    /// Those who ask while etcd is busy with others are answered together, by one transaction:
    /// a rack that starts shares one token, and each claim changes its count.
    ///
    /// # Errors
    /// etcd does not answer: nobody knows whether it took place, and asking again tells.
    pub async fn claim(&self, claims: &Claims, request: &JoinRequest) -> Result<Result<Given, Refusal>> {
        // A token that gives nothing any more may still be of a node that asks again for its grant, which etcd
        // knows better than this hub. Strangers with such tokens must not keep etcd busy.
        if self.useless.is_refused(claims) && !self.is_owner(request.mesh_key) {
            return Ok(Err(no(Reason::Busy, "too many nodes ask with tokens that are expired, spent or revoked")));
        }
        let (reply, mut answer) = oneshot::channel();
        self.queue().push_back(Waiting { claims: claims.clone(), request: request.clone(), reply });
        let _turn = self.turn.lock().await;
        loop {
            // Whoever had the turn before may have asked for this one too.
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

    fn queue(&self) -> MutexGuard<'_, VecDeque<Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers everybody of a batch.
    async fn decide(&self, mut batch: Vec<Waiting>) {
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

    /// Answers whom it can; leaves those who have to be looked at again.
    async fn attempt(&self, batch: &mut Vec<Waiting>, attempt: u64) -> Result<()> {
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
                self.heard(pairs.into_iter().map(|p| Change { key: p.key, value: Some(p.value) }).collect(), false);
            }
        }
        let keys: Vec<Keys> = batch.iter().map(|w| Keys::of(w.request.mesh_key, &w.claims.id)).collect();
        let asked: Vec<&str> = keys.iter().flat_map(|k| [k.owner.as_str(), &k.token, &k.revoked]).collect();
        let found = self.etcd.get(&asked).await?;
        let mut tokens: BTreeMap<String, Count> = BTreeMap::new();
        let mut takings: Vec<Taking> = Vec::new();
        let mut taking = Vec::new();
        let mut later = Vec::new();
        let mut asking = std::mem::take(batch).into_iter().zip(keys).zip(found.chunks(3));
        // Whoever is not answered yet stays in the batch if etcd fails.
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
            let count = Count { used: used + 1, revision: token.revision };
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
            takings.push(Taking { place, record, keys, former: None });
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
            for (waiting, Taking { place, record, .. }) in taking.drain(..).zip(takings) {
                waiting.tell(Ok(Ok(Given { slot: place.slot, epoch: record.epoch })));
            }
        }
        batch.extend(taking.into_iter().chain(later).chain(unanswered));
        taken.map(drop)
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
    ) -> Result<Result<Given, Refusal>> {
        let place = self.place(slot).await?;
        let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        match &place.before {
            Some(record) if record.vacant && record.mesh_key == mesh_key => {
                return Ok(Err(no(Reason::Fenced, &gone(slot))));
            }
            Some(record) if record.mesh_key == mesh_key => {
                return Ok(Ok(Given { slot: slot.to_owned(), epoch: record.epoch }));
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
        let taking = Taking { place, record, keys: Keys::of(mesh_key, ""), former: None };
        if self.take(&[taking], &BTreeMap::new()).await? {
            return Ok(Ok(Given { slot: slot.to_owned(), epoch: 1 }));
        }
        Ok(Err(no(Reason::Busy, "somebody else wrote at the same time")))
    }

    /// A token is of no use any more. Who came in with it stays.
    ///
    /// # Errors
    /// etcd does not answer.
    pub async fn revoke(&self, token: &str) -> Result<()> {
        let keys = Keys::of(MeshKey([0; 32]), token);
        self.etcd.transact(&[], &[Then::Put(&keys.revoked, b"")]).await.map(drop)
    }

    /// What became of all tokens.
    ///
    /// # Errors
    /// etcd does not answer.
    pub async fn tokens(&self) -> Result<Tokens> {
        let ids = |pairs: Vec<Pair>, prefix: &str| -> Vec<(String, Vec<u8>)> {
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

    /// The slot a token leads to: its own, or the first that is free. None where somebody else of
    /// the batch is about to have it: whether he gets it is known the next time.
    async fn choose(&self, claims: &Claims, takings: &[Taking]) -> Result<Result<Option<Place>, Refusal>> {
        let promised = |slot: &str| takings.iter().any(|t| t.place.slot == slot);
        if let Some(slot) = &claims.slot {
            if self.topology.node(slot).is_none_or(|n| n.group != claims.group) {
                let text = format!("the fleet has no slot `{slot}` in the group `{}`", claims.group);
                return Ok(Err(no(Reason::Malformed, &text)));
            }
            let place = self.place(slot).await?;
            let owned = place.before.as_ref().is_some_and(|r| !r.vacant);
            let place = if owned && !claims.replace { self.abandoned(place).await? } else { Ok(place) };
            let Ok(place) = place else {
                let replace = format!(
                    "to put this machine in its place now, mint a ticket with `bakehouse ticket --replace {slot}`"
                );
                return Ok(Err(match self.topology.node(slot).and_then(|n| n.reclaim_after) {
                    // That passes: this machine may wait for it.
                    Some(after) => no(
                        Reason::Full,
                        &format!("{slot} has an owner, who loses it after {after} s of silence; {replace}"),
                    ),
                    None => no(Reason::Taken, &format!("{slot} has an owner; {replace}")),
                }));
            };
            return Ok(Ok((!promised(slot)).then_some(place)));
        }
        let owners = self.owners();
        // Founders' slots are given by their tickets alone.
        let mine = |n: &&Node| n.group == claims.group && !self.topology.is_founder(n);
        let nobodys = |n: &&Node| owners.get(&n.name).is_none_or(|r| r.vacant);
        let free: Vec<&Node> = self.topology.nodes.iter().filter(mine).filter(nobodys).collect();
        if free.is_empty() {
            for slot in self.silent(&claims.group, &owners).await? {
                if promised(&slot) {
                    continue;
                }
                if let Ok(place) = self.abandoned(self.place(&slot).await?).await? {
                    return Ok(Ok(Some(place)));
                }
            }
            let text = format!(
                "every slot of the group `{0}` has an owner; raise groups.{0}.count in fleet.toml and rebuild, or `bakehouse ticket --replace` a dead node",
                claims.group
            );
            return Ok(Err(no(Reason::Full, &text)));
        }
        let Some(node) = free.into_iter().find(|n| !promised(&n.name)) else { return Ok(Ok(None)) };
        // What was never taken need not be looked up.
        let new = Place { slot: node.name.clone(), before: None, revision: 0, silent: false };
        let place = if owners.contains_key(&node.name) { self.place(&node.name).await? } else { new };
        // Somebody was faster.
        let owned = place.before.as_ref().is_some_and(|r| !r.vacant);
        Ok(Ok((!owned).then_some(place)))
    }

    pub(super) async fn place(&self, slot: &str) -> Result<Place> {
        let found = self.etcd.get(&[&format!("{SLOTS}{slot}")]).await?;
        let pair = found.into_iter().next().ok_or_else(|| Error::Failed("etcd lost a key".to_owned()))?;
        let before = if pair.revision == 0 {
            None
        } else {
            let record = serde_json::from_slice(&pair.value);
            Some(record.map_err(|e| Error::Failed(format!("etcd's record of {slot} is not readable: {e}")))?)
        };
        Ok(Place { slot: slot.to_owned(), before, revision: pair.revision, silent: false })
    }

    /// One transaction: the slots are as they were seen, the keys new, the tokens as they were seen.
    pub(super) async fn take(&self, takings: &[Taking], tokens: &BTreeMap<String, Count>) -> Result<bool> {
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
            when.extend([If::Unchanged(slot, taking.place.revision), If::Unchanged(&taking.keys.owner, 0)]);
            if let Some(seen) = seen {
                when.push(If::Unchanged(seen, 0));
            }
            then.push(Then::Put(slot, value));
            then.push(Then::Put(&taking.keys.owner, taking.place.slot.as_bytes()));
            then.push(Then::Put(audit, value));
            if let Some(former) = &taking.former {
                then.push(Then::Delete(former));
            }
        }
        let forgotten: Vec<String> =
            takings.iter().filter_map(|t| forgotten_audit(&t.place.slot, t.record.epoch)).collect();
        then.extend(forgotten.iter().map(|audit| Then::Delete(audit)));
        let counts: Vec<(Keys, String, u64)> = tokens
            .iter()
            .filter(|(id, _)| takings.iter().any(|t| t.record.token.as_ref() == Some(id)))
            .map(|(id, count)| (Keys::of(MeshKey([0; 32]), id), count.used.to_string(), count.revision))
            .collect();
        for (keys, used, revision) in &counts {
            when.extend([If::Unchanged(&keys.token, *revision), If::Unchanged(&keys.revoked, 0)]);
            then.push(Then::Put(&keys.token, used.as_bytes()));
        }
        self.etcd.transact(&when, &then).await
    }
}

/// Somebody who asked, and is not answered yet.
struct Waiting {
    claims: Claims,
    request: JoinRequest,
    reply: oneshot::Sender<Result<Result<Given, Refusal>>>,
}

impl Waiting {
    fn tell(self, answer: Result<Result<Given, Refusal>>) {
        // Who has hung up asks again.
        let _ = self.reply.send(answer);
    }
}

/// A slot that somebody is about to have.
pub(super) struct Taking {
    pub(super) place: Place,
    pub(super) record: SlotRecord,
    pub(super) keys: Keys,
    /// Key in etcd of the owner that it replaces by itself: of a renewal.
    pub(super) former: Option<String>,
}

/// How often a token was used, as of a revision.
pub(super) struct Count {
    used: u32,
    revision: u64,
}

pub(super) struct Place {
    pub(super) slot: String,
    pub(super) before: Option<SlotRecord>,
    pub(super) revision: u64,
    /// Its owner says nothing; if it does before the slot is taken, it is not.
    pub(super) silent: bool,
}

pub(super) struct Keys {
    pub(super) owner: String,
    token: String,
    revoked: String,
}

impl Keys {
    pub(super) fn of(mesh_key: MeshKey, token: &str) -> Self {
        Self {
            owner: format!("/bakehouse/owners/{mesh_key}"),
            token: format!("{TOKENS}{token}"),
            revoked: format!("{REVOKED}{token}"),
        }
    }
}

/// Where a grant of a slot is recorded.
pub(super) fn audit(slot: &str, epoch: u64) -> String {
    format!("/bakehouse/audit/{slot}/{epoch:08}")
}

/// The record of a slot's grants that is dropped with a new one: etcd's space has an end.
pub(super) fn forgotten_audit(slot: &str, epoch: u64) -> Option<String> {
    epoch.checked_sub(AUDITED).filter(|epoch| *epoch > 0).map(|epoch| audit(slot, epoch))
}
