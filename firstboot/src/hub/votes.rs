//! etcd members: each voter's slot has one vote while a machine owns the slot.

use fleet::MeshKey;
use fleet::etcd_keys::READMITTED;
use tracing::{info, warn};

use super::claims::SlotAllocator;
use crate::client::etcd::{Compare, Op};
use crate::error::{Error, Result};

impl SlotAllocator {
    /// Prepares etcd for the machine that has owned a voter's slot since `epoch` and has not started etcd yet:
    /// removes its predecessor's member and adds a learner. etcd stores the epoch, so that a repeated request
    /// changes nothing.
    ///
    /// # Errors
    /// If etcd refuses the change of its members, or another hub makes the same change at the same time.
    pub async fn readmit(&self, slot: &str, epoch: u64) -> Result<()> {
        let Some(url) = self.peer_url(slot) else { return Ok(()) };
        let key = format!("{READMITTED}{slot}");
        let found = self.etcd.get(&[&key]).await?;
        let done = found.first().ok_or_else(|| Error::MissingKeys)?;
        if done.revision != 0 {
            let last = std::str::from_utf8(&done.value).ok().and_then(|text| text.parse::<u64>().ok());
            let last = last
                .ok_or_else(|| Error::Failed(format!("the value of {key} in etcd is not a number; delete the key")))?;
            if last >= epoch {
                return Ok(());
            }
        }
        let members = self.etcd.members().await?;
        let before = members.iter().find(|m| m.peer_urls.contains(&url));
        // A member that was added has no name until it starts.
        let is_added = before.is_some_and(|m| m.name.is_empty());
        if let Some(predecessor) = before.filter(|_| !is_added) {
            info!(slot, "etcd: removing the member of {slot}'s previous machine");
            self.etcd.remove(predecessor).await?;
        }
        if !is_added {
            self.etcd.add_learner(&url).await?;
        }
        let epoch = epoch.to_string();
        if self.etcd.transact(&[Compare::Unchanged(&key, done.revision)], &[Op::Put(&key, epoch.as_bytes())]).await? {
            return Ok(());
        }
        Err(Error::Failed(format!("another hub is adding the member of {slot} to etcd at the same time")))
    }

    /// Promotes this voter's etcd member from learner to voting member; does nothing if it votes already.
    ///
    /// # Errors
    /// If the learner has not caught up yet, or etcd has no quorum.
    pub async fn vote(&self, slot: &str) -> Result<()> {
        let Some(url) = self.peer_url(slot) else { return Ok(()) };
        let members = self.etcd.members().await?;
        match members.iter().find(|m| m.peer_urls.contains(&url) && m.is_learner) {
            Some(learner) => self.etcd.promote(learner).await,
            None => Ok(()),
        }
    }

    /// Registers a voter that is not a hub as the owner of its slot, unless another machine owns the slot, and
    /// promotes its etcd member. `takes_passwords`: the voter reports that its etcd accepts passwords. Idempotent.
    ///
    /// # Errors
    /// If etcd has no quorum, or the voter has not caught up yet. The voter's next introduction retries.
    pub async fn enter_voter(&self, slot: &str, mesh_key: MeshKey, tls_key: &str, takes_passwords: bool) -> Result<()> {
        let owned = self.owners().get(slot).is_some_and(|r| !r.vacant && r.mesh_key == mesh_key);
        if !owned {
            // An introduction does not name the image version, so the record gets this hub's version.
            let version = self.topology.version.clone();
            match self.register(slot, mesh_key, tls_key, &version).await {
                Ok(_) => {}
                Err(Error::Refused(refusal)) => {
                    warn!(slot, "cannot register {slot}: {}", refusal.text);
                    return Ok(());
                }
                Err(e) => return Err(e),
            }
        }
        if takes_passwords {
            self.has_etcd_password(slot, tls_key).await?;
        }
        self.vote(slot).await
    }

    /// Returns the etcd peer URL of a voter's slot; `None` if the slot has no vote.
    fn peer_url(&self, slot: &str) -> Option<String> {
        let voter = self.topology.voters.iter().find(|v| *v == slot)?;
        Some(format!("https://{}:2380", self.topology.node(voter)?.address))
    }

    /// Removes a voter's member from etcd, if etcd has it.
    pub(super) async fn unvote(&self, slot: &str) -> Result<()> {
        let Some(url) = self.peer_url(slot) else { return Ok(()) };
        if let Some(member) = self.etcd.members().await?.iter().find(|m| m.peer_urls.contains(&url)) {
            info!(slot, "etcd: removing the member of {slot}");
            self.etcd.remove(member).await?;
        }
        Ok(())
    }
}
