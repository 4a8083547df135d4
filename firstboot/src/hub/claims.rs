//! Who has which slot: decided by etcd, in one transaction for each claim.
//!
//! ```text
//! /bakehouse/slots/SLOT     SlotRecord      who has it
//! /bakehouse/owners/KEY     slot's name     what this mesh key has
//! /bakehouse/tokens/ID      number          how often it was used
//! /bakehouse/revoked/ID     anything        it is of no use any more
//! /bakehouse/audit/SLOT/EPOCH  SlotRecord   what was ever granted
//! ```

use std::collections::BTreeMap;
use std::sync::RwLock;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fleet::{Claims, JoinRequest, MeshKey, Reason, Refusal, SlotRecord, Topology};

use super::token::no;
use crate::error::{Error, Result};
use crate::etcd::{Change, Etcd, If, Then};

const SLOTS: &str = "/bakehouse/slots/";
/// Others may claim at the same moment: then again, that often.
const ATTEMPTS: u64 = 16;

/// Every slot's owner, as this hub has heard: the truth is etcd's.
pub type Owners = BTreeMap<String, SlotRecord>;

pub struct ClaimsDesk {
    etcd: Etcd,
    topology: Topology,
    /// This hub.
    by: String,
    owners: RwLock<Owners>,
    /// Claims of this hub are made one after the other: they would only get into each
    /// other's way in etcd.
    one: tokio::sync::Mutex<()>,
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
        Self { etcd, topology, by: by.to_owned(), owners: RwLock::default(), one: tokio::sync::Mutex::default() }
    }

    /// Gives a slot to whoever asks with a token that was verified. The same keys get the same
    /// slot again, before anything else is looked at.
    ///
    /// # Errors
    /// etcd does not answer: nobody knows whether it took place, and asking again tells.
    pub async fn claim(&self, claims: &Claims, request: &JoinRequest) -> Result<Result<Given, Refusal>> {
        let _one = self.one.lock().await;
        let keys = Keys::of(request.mesh_key, &claims.id);
        for attempt in 0..ATTEMPTS {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
            let found = self.etcd.get(&[&keys.owner, &keys.token, &keys.revoked]).await?;
            let [owner, token, revoked] = &found[..] else { return Err(Error::Failed("etcd lost a key".to_owned())) };
            if owner.revision != 0 {
                return self.again(&String::from_utf8_lossy(&owner.value), request).await;
            }
            let used: u32 = std::str::from_utf8(&token.value).ok().and_then(|n| n.parse().ok()).unwrap_or(0);
            if revoked.revision != 0 {
                return Ok(Err(no(Reason::Revoked, "the token was revoked; mint another with `bakehouse ticket`")));
            }
            if now > claims.expires {
                return Ok(Err(no(Reason::Expired, "the token has expired; mint another with `bakehouse ticket`")));
            }
            if used >= claims.uses {
                let text = format!(
                    "the token was used {used} times, as often as it may be; mint another with `bakehouse ticket`"
                );
                return Ok(Err(no(Reason::Spent, &text)));
            }
            let place = match self.choose(claims, attempt).await? {
                Ok(place) => place,
                Err(refusal) => return Ok(Err(refusal)),
            };
            let record = SlotRecord {
                epoch: place.before.as_ref().map_or(1, |r| r.epoch + 1),
                mesh_key: request.mesh_key,
                tls_key: request.tls_key.clone(),
                token: Some(claims.id.clone()),
                image: request.image.clone(),
                by: self.by.clone(),
                at: now,
            };
            if self.take(&place, &record, &keys, Some((used, token.revision))).await? {
                return Ok(Ok(Given { slot: place.slot, epoch: record.epoch }));
            }
            tokio::time::sleep(Duration::from_millis(jitter(attempt))).await;
        }
        Ok(Err(no(Reason::Busy, "too many nodes ask at the same time")))
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
        };
        let keys = Keys::of(mesh_key, "");
        if self.take(&place, &record, &keys, None).await? {
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

    /// Makes room in etcd for the machine that has a voter's slot now, and has not started etcd
    /// yet: its predecessor goes, it may listen. Done again, it changes nothing.
    ///
    /// # Errors
    /// The cluster says no.
    pub async fn readmit(&self, slot: &str) -> Result<()> {
        let Some(url) = self.peer_url(slot) else { return Ok(()) };
        let members = self.etcd.members().await?;
        let before = members.iter().find(|m| m.peer_urls.contains(&url));
        // One that was added has no name until it starts.
        if let Some(predecessor) = before.filter(|m| !m.name.is_empty()) {
            println!("etcd: {slot}'s predecessor goes");
            self.etcd.remove(predecessor).await?;
        } else if before.is_some() {
            return Ok(());
        }
        self.etcd.add_learner(&url).await
    }

    /// Gives this voter its vote, if it has none.
    ///
    /// # Errors
    /// It has not caught up yet, or there is no quorum.
    pub async fn vote(&self, slot: &str) -> Result<()> {
        let Some(url) = self.peer_url(slot) else { return Ok(()) };
        let members = self.etcd.members().await?;
        match members.iter().find(|m| m.peer_urls.contains(&url) && m.is_learner) {
            Some(learner) => self.etcd.promote(learner).await,
            None => Ok(()),
        }
    }

    /// etcd's name for a voter's place.
    fn peer_url(&self, slot: &str) -> Option<String> {
        let voter = self.topology.voters.iter().find(|v| *v == slot)?;
        Some(format!("https://{}:2380", self.topology.node(voter)?.address))
    }

    /// What this hub has heard of every slot.
    #[must_use]
    pub fn owners(&self) -> Owners {
        self.owners.read().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    /// Whether somebody else has a slot now: then since which epoch.
    #[must_use]
    pub fn fenced(&self, slot: &str, tls_key: &str) -> Option<u64> {
        let owners = self.owners.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        owners.get(slot).filter(|r| r.tls_key != tls_key).map(|r| r.epoch)
    }

    /// Follows etcd: calls `changed` with everything first, then with each change; returns
    /// when etcd has to be asked anew.
    ///
    /// # Errors
    /// etcd does not answer any more.
    pub async fn follow(&self, mut changed: impl AsyncFnMut(&Owners)) -> Result<()> {
        let (revision, pairs) = self.etcd.list(SLOTS).await?;
        let listed: Vec<Change> = pairs.into_iter().map(|p| Change { key: p.key, value: Some(p.value) }).collect();
        self.heard(listed, true);
        changed(&self.owners()).await;
        let mut watch = self.etcd.watch(SLOTS, revision + 1).await?;
        while let Some(changes) = watch.next().await? {
            self.heard(changes, false);
            changed(&self.owners()).await;
        }
        Ok(())
    }

    fn heard(&self, changes: Vec<Change>, all: bool) {
        let mut owners = self.owners.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        if all {
            owners.clear();
        }
        for change in changes {
            let Some(slot) = change.key.strip_prefix(SLOTS) else { continue };
            match change.value.map(|v| serde_json::from_slice(&v)) {
                Some(Ok(record)) => drop(owners.insert(slot.to_owned(), record)),
                Some(Err(e)) => eprintln!("etcd's record of {slot} is not readable: {e}"),
                None => drop(owners.remove(slot)),
            }
        }
    }

    /// This key has a slot, or had one.
    async fn again(&self, slot: &str, request: &JoinRequest) -> Result<Result<Given, Refusal>> {
        Ok(match self.place(slot).await?.before {
            Some(record) if record.mesh_key == request.mesh_key && record.tls_key == request.tls_key => {
                Ok(Given { slot: slot.to_owned(), epoch: record.epoch })
            }
            Some(record) if record.mesh_key == request.mesh_key => {
                Err(no(Reason::Forged, "this mesh key is of a node with another TLS key"))
            }
            record => {
                let epoch = record.map_or(0, |r| r.epoch);
                let text =
                    format!("{slot} is another machine's since epoch {epoch}; wipe this one to make it a new node");
                Err(no(Reason::Fenced, &text))
            }
        })
    }

    /// The slot a token leads to: its own, or the first that is free.
    async fn choose(&self, claims: &Claims, attempt: u64) -> Result<Result<Place, Refusal>> {
        if let Some(slot) = &claims.slot {
            if self.topology.node(slot).is_none_or(|n| n.group != claims.group) {
                let text = format!("the fleet has no slot `{slot}` in the group `{}`", claims.group);
                return Ok(Err(no(Reason::Malformed, &text)));
            }
            let place = self.place(slot).await?;
            if place.before.is_some() && !claims.replace {
                let text = format!(
                    "{slot} has an owner; to put this machine in its place, mint a ticket with `bakehouse ticket --replace {slot}`"
                );
                return Ok(Err(no(Reason::Taken, &text)));
            }
            return Ok(Ok(place));
        }
        // What was heard may be late: then the transaction fails, and etcd itself is asked.
        if attempt > 0 {
            let (_, pairs) = self.etcd.list(&format!("{SLOTS}{}-", claims.group)).await?;
            self.heard(pairs.into_iter().map(|p| Change { key: p.key, value: Some(p.value) }).collect(), false);
        }
        let owners = self.owners();
        let free = self.topology.nodes.iter().find(|n| {
            // Founders' slots are given by their tickets alone.
            n.group == claims.group && !self.topology.is_founder(n) && !owners.contains_key(&n.name)
        });
        Ok(free.map(|node| Place { slot: node.name.clone(), before: None, revision: 0 }).ok_or_else(|| {
            let text = format!(
                "every slot of the group `{0}` has an owner; raise groups.{0}.count in fleet.toml and rebuild, or `bakehouse ticket --replace` a dead node",
                claims.group
            );
            no(Reason::Full, &text)
        }))
    }

    async fn place(&self, slot: &str) -> Result<Place> {
        let found = self.etcd.get(&[&format!("{SLOTS}{slot}")]).await?;
        let pair = found.into_iter().next().ok_or_else(|| Error::Failed("etcd lost a key".to_owned()))?;
        let before = if pair.revision == 0 {
            None
        } else {
            let record = serde_json::from_slice(&pair.value);
            Some(record.map_err(|e| Error::Failed(format!("etcd's record of {slot} is not readable: {e}")))?)
        };
        Ok(Place { slot: slot.to_owned(), before, revision: pair.revision })
    }

    /// One transaction: the slot is as it was seen, the key new, the token as it was seen.
    async fn take(&self, place: &Place, record: &SlotRecord, keys: &Keys, token: Option<(u32, u64)>) -> Result<bool> {
        let value = serde_json::to_vec(record).map_err(|e| Error::Failed(e.to_string()))?;
        let slot = format!("{SLOTS}{}", place.slot);
        let audit = format!("/bakehouse/audit/{}/{:08}", place.slot, record.epoch);
        let mut when = vec![If::Unchanged(&slot, place.revision), If::Unchanged(&keys.owner, 0)];
        let mut then =
            vec![Then::Put(&slot, &value), Then::Put(&keys.owner, place.slot.as_bytes()), Then::Put(&audit, &value)];
        let used;
        if let Some((before, revision)) = token {
            used = (before + 1).to_string();
            when.extend([If::Unchanged(&keys.token, revision), If::Unchanged(&keys.revoked, 0)]);
            then.push(Then::Put(&keys.token, used.as_bytes()));
        }
        self.etcd.transact(&when, &then).await
    }
}

struct Place {
    slot: String,
    before: Option<SlotRecord>,
    revision: u64,
}

struct Keys {
    owner: String,
    token: String,
    revoked: String,
}

impl Keys {
    fn of(mesh_key: MeshKey, token: &str) -> Self {
        Self {
            owner: format!("/bakehouse/owners/{mesh_key}"),
            token: format!("/bakehouse/tokens/{token}"),
            revoked: format!("/bakehouse/revoked/{token}"),
        }
    }
}

/// Milliseconds until the next attempt: longer each time, never the same for two hubs.
fn jitter(attempt: u64) -> u64 {
    let mut byte = [0; 1];
    let _ = getrandom::fill(&mut byte);
    (2 << attempt.min(6)) * (128 + u64::from(byte[0])) / 256
}
