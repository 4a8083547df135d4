//! Votes in etcd: a voter's place has one as long as a machine is in it.

use fleet::MeshKey;

use super::claims::SlotAllocator;
use crate::client::etcd::{Compare, Op};
use crate::error::{Error, Result};

/// Epoch of the machine that etcd made room for, by slot.
const READMITTED: &str = "/bakehouse/readmitted/";

impl SlotAllocator {
    /// Makes room in etcd for the machine that has a voter's slot since `epoch`, and has not started
    /// etcd yet: its predecessor goes, it may listen. etcd keeps for which epoch that was done: done
    /// again, by a request that was repeated, it changes nothing.
    ///
    /// # Errors
    /// The cluster refuses, or another hub does the same at this moment.
    pub async fn readmit(&self, slot: &str, epoch: u64) -> Result<()> {
        let Some(url) = self.peer_url(slot) else { return Ok(()) };
        let key = format!("{READMITTED}{slot}");
        let found = self.etcd.get(&[&key]).await?;
        let done = found.first().ok_or_else(|| Error::Failed("etcd lost a key".to_owned()))?;
        if done.revision != 0 {
            let last = std::str::from_utf8(&done.value).ok().and_then(|text| text.parse::<u64>().ok());
            let last = last.ok_or_else(|| Error::Failed(format!("etcd's {key} is not a number; delete it")))?;
            if last >= epoch {
                return Ok(());
            }
        }
        let members = self.etcd.members().await?;
        let before = members.iter().find(|m| m.peer_urls.contains(&url));
        // One that was added has no name until it starts.
        let listens = before.is_some_and(|m| m.name.is_empty());
        if let Some(predecessor) = before.filter(|_| !listens) {
            println!("etcd: {slot}'s predecessor goes");
            self.etcd.remove(predecessor).await?;
        }
        if !listens {
            self.etcd.add_learner(&url).await?;
        }
        let epoch = epoch.to_string();
        if self.etcd.transact(&[Compare::Unchanged(&key, done.revision)], &[Op::Put(&key, epoch.as_bytes())]).await? {
            return Ok(());
        }
        Err(Error::Failed(format!("another hub makes room for {slot} in etcd at this moment")))
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

    /// Enters a voter that is not a hub as its slot's owner, unless another machine is, and gives it its vote. The
    /// voter says whether its etcd takes passwords.
    /// Done again, it changes nothing.
    ///
    /// # Errors
    /// etcd has no quorum, or the voter has not caught up yet: its next introduction tries again.
    pub async fn enter_voter(&self, slot: &str, mesh_key: MeshKey, tls_key: &str, takes_passwords: bool) -> Result<()> {
        let owned = self.owners().get(slot).is_some_and(|r| !r.vacant && r.mesh_key == mesh_key);
        if !owned {
            // An introduction does not name its image: it is the fleet's version, or the one before.
            let version = self.topology.version.clone();
            if let Err(refusal) = self.register(slot, mesh_key, tls_key, &version).await? {
                println!("{slot} is not entered: {}", refusal.text);
                return Ok(());
            }
        }
        if takes_passwords {
            self.has_etcd_password(slot, tls_key).await?;
        }
        self.vote(slot).await
    }

    /// etcd's name for a voter's place.
    fn peer_url(&self, slot: &str) -> Option<String> {
        let voter = self.topology.voters.iter().find(|v| *v == slot)?;
        Some(format!("https://{}:2380", self.topology.node(voter)?.address))
    }

    /// Takes a voter out of etcd, if it is there.
    pub(super) async fn unvote(&self, slot: &str) -> Result<()> {
        let Some(url) = self.peer_url(slot) else { return Ok(()) };
        if let Some(member) = self.etcd.members().await?.iter().find(|m| m.peer_urls.contains(&url)) {
            println!("etcd: {slot} goes");
            self.etcd.remove(member).await?;
        }
        Ok(())
    }
}
