//! Votes in etcd: a voter's place has one as long as a machine is in it.

use super::claims::ClaimsDesk;
use crate::error::Result;

impl ClaimsDesk {
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
