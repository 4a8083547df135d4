//! A primary that no hub reaches is shut out of the mesh, and its place is free at once: Patroni
//! alone would wait for its lease to end.
//!
//! Each hub that has had no way to it for a while takes its key out of the kernel, and says so in
//! etcd, for as long as it does not let it in again. Once most hubs have, Patroni's leader key goes, in one
//! transaction with what they said: a standby with every acknowledged write takes it. The primary, should
//! it still run, reaches neither clients nor etcd until it has lost its lease by itself.
//!
//! ```text
//! /bakehouse/shut/SLOT/HUB    empty    the hub lets nothing through from it (a lease)
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use fleet::{Node, Topology};
use serde::Deserialize;

use crate::console::say;
use crate::database::scope;
use crate::error::{Error, Result};
use crate::etcd::{Etcd, If, Pair, Then};
use crate::journal::Event;
use crate::mesh::Routes;
use crate::neighbours::Neighbourhood;
use crate::ticker::Ticker;

const SHUT: &str = "/bakehouse/shut/";
/// How often hubs look.
const LOOK: Duration = Duration::from_millis(250);
/// Out of reach for so long, after BFD has given up: not a moment's trouble.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long one member of etcd may take: it may be on the very machine that is gone.
pub const ANSWER: Duration = Duration::from_secs(1);
/// How long the door stays shut after what is said in etcd has ended.
const MARGIN: Duration = Duration::from_secs(10);

/// One hub's part.
pub struct Fence<'a> {
    pub etcd: &'a Etcd,
    pub topology: &'a Topology,
    /// This hub.
    pub own: &'a Node,
    pub neighbourhood: &'a Neighbourhood,
    /// How much longer time-outs are on this machine.
    pub slow: u32,
}

/// Since when there is no way to a node that there was one to.
#[derive(Default)]
struct Absent {
    reached: BTreeSet<String>,
    since: BTreeMap<String, Instant>,
}

/// A node that this hub has shut out.
#[derive(Clone, Copy, Debug)]
pub struct Shut {
    until: Instant,
    /// etcd has it.
    said: bool,
}

/// What Patroni keeps of who follows.
#[derive(Default, Deserialize)]
struct Sync {
    leader: Option<String>,
    /// Names, with commas.
    sync_standby: Option<String>,
}

impl Fence<'_> {
    /// Looks, for ever.
    ///
    /// # Errors
    /// The kernel says no.
    pub async fn keep(&self) -> Result<()> {
        let databases: Vec<&Node> =
            self.topology.nodes.iter().filter(|n| n.has_role("db") && n.name != self.own.name).collect();
        if databases.is_empty() || self.topology.hubs.len() < 2 {
            return std::future::pending().await;
        }
        // An agent that starts lets everybody in.
        let own: Vec<String> = databases.iter().map(|n| self.key(&n.name)).collect();
        let gone: Vec<Then> = own.iter().map(|key| Then::Delete(key)).collect();
        while let Err(e) = self.etcd.transact(&[], &gone).await {
            println!("{e}");
            tokio::time::sleep(Duration::from_secs(5)).await;
        }
        let routes = Routes::open()?;
        let mut absent = Absent::default();
        let mut shut: BTreeMap<String, Shut> = BTreeMap::new();
        let mut ticker = Ticker::new("the fence", LOOK * self.slow.min(3));
        loop {
            ticker.tick().await;
            let ways = routes.hosts().await?;
            let reached = databases.iter().filter(|n| ways.contains(&n.address)).map(|n| n.name.clone()).collect();
            let now = Instant::now();
            for slot in absent.for_long(reached, now, PATIENCE * self.slow) {
                match self.depose(&slot, &absent.reached, &mut shut).await {
                    Ok(true) => absent.forget(&slot),
                    Ok(false) => {}
                    Err(e) => println!("{slot} is out of reach: {e}"),
                }
            }
            shut.retain(|slot, shut| {
                let stays = now < shut.until;
                if !stays {
                    println!("{slot} may come back");
                    self.neighbourhood.let_in(slot);
                }
                stays
            });
        }
    }

    /// Frees the primary's place, if that is what the slot has, and most hubs have shut it out.
    /// True if there is nothing left to do.
    ///
    /// # Errors
    /// etcd does not answer: asked again, it goes on.
    pub async fn depose(
        &self,
        slot: &str,
        reached: &BTreeSet<String>,
        shut: &mut BTreeMap<String, Shut>,
    ) -> Result<bool> {
        let scope = scope(self.topology);
        let (leader, sync) = (format!("{scope}leader"), format!("{scope}sync"));
        let found = self.etcd.get(&[&leader, &sync]).await?;
        let [holds, follows] = &found[..] else { return Err(Error::Failed("etcd lost a key".to_owned())) };
        if holds.value != slot.as_bytes() {
            return Ok(true);
        }
        // Nobody could take its place.
        let heirs = heirs(slot, follows);
        if !heirs.iter().any(|heir| *heir == self.own.name || reached.contains(heir)) {
            return Ok(false);
        }
        let lasts = self.topology.database.ttl * u16::try_from(self.slow.min(3)).unwrap_or(3);
        let key = self.key(slot);
        if !shut.get(slot).is_some_and(|shut| shut.said) {
            self.neighbourhood.shut_out(slot).await;
            // Whoever is not told that it was said may have said it, and stands by that.
            let stays = |said| Shut { until: Instant::now() + Duration::from_secs(lasts.into()) + MARGIN, said };
            shut.insert(slot.to_owned(), stays(false));
            let lease = self.etcd.lease(lasts.into()).await?;
            self.etcd.transact(&[], &[Then::PutFor(&key, b"", &lease)]).await?;
            shut.insert(slot.to_owned(), stays(true));
            println!("{slot}, the primary, is out of reach: it is shut out");
        }
        let (_, said) = self.etcd.list(&format!("{SHUT}{slot}/")).await?;
        let said: Vec<&Pair> = said.iter().filter(|p| self.is_hubs(slot, &p.key)).collect();
        if 2 * said.len() <= self.topology.hubs.len() {
            return Ok(false);
        }
        let mut when: Vec<If> = said.iter().map(|p| If::Unchanged(&p.key, p.revision)).collect();
        when.push(If::Unchanged(&leader, holds.revision));
        if !self.etcd.transact(&when, &[Then::Delete(&leader)]).await? {
            return Ok(false);
        }
        let text = format!("{slot} is out of reach of {} hubs: {} may take its place", said.len(), heirs.join(" or "));
        say(Event::Deposed, &text);
        Ok(true)
    }

    fn key(&self, slot: &str) -> String {
        format!("{SHUT}{slot}/{}", self.own.name)
    }

    fn is_hubs(&self, slot: &str, key: &str) -> bool {
        let by = key.strip_prefix(SHUT).and_then(|k| k.strip_prefix(slot)).and_then(|k| k.strip_prefix('/'));
        by.is_some_and(|by| self.topology.hubs.iter().any(|hub| hub.name == by))
    }
}

/// Standbys that have every acknowledged write of this primary.
fn heirs(primary: &str, sync: &Pair) -> Vec<String> {
    let sync: Sync = serde_json::from_slice(&sync.value).unwrap_or_default();
    if sync.leader.as_deref() != Some(primary) {
        return Vec::new();
    }
    let names = sync.sync_standby.unwrap_or_default();
    names.split(',').map(|n| n.trim().to_owned()).filter(|n| !n.is_empty() && n != primary).collect()
}

impl Absent {
    /// Takes in who is reached now; gives those who were once, and have not been for so long.
    fn for_long(&mut self, reached: BTreeSet<String>, now: Instant, patience: Duration) -> Vec<String> {
        for slot in self.reached.difference(&reached) {
            self.since.entry(slot.clone()).or_insert(now);
        }
        self.since.retain(|slot, _| !reached.contains(slot));
        self.reached = reached;
        self.since.iter().filter(|(_, since)| now - **since >= patience).map(|(slot, _)| slot.clone()).collect()
    }

    /// It is not asked about again before it was reached.
    fn forget(&mut self, slot: &str) {
        self.since.remove(slot);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn these(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|n| (*n).to_owned()).collect()
    }

    #[test]
    fn only_who_was_reached_is_missed_and_not_at_once() {
        let (start, patience) = (Instant::now(), Duration::from_secs(1));
        let at = |ms| start + Duration::from_millis(ms);
        let mut absent = Absent::default();
        assert!(absent.for_long(these(&[]), at(0), patience).is_empty());
        assert!(absent.for_long(these(&["db-1", "db-2"]), at(5000), patience).is_empty());
        assert!(absent.for_long(these(&["db-2"]), at(6000), patience).is_empty());
        assert!(absent.for_long(these(&["db-2"]), at(6900), patience).is_empty());
        // It was there again in between.
        assert!(absent.for_long(these(&["db-1", "db-2"]), at(7000), patience).is_empty());
        assert!(absent.for_long(these(&["db-2"]), at(7200), patience).is_empty());
        assert!(absent.for_long(these(&["db-2"]), at(8100), patience).is_empty());
        assert_eq!(absent.for_long(these(&["db-2"]), at(8200), patience), ["db-1"]);
        absent.forget("db-1");
        assert!(absent.for_long(these(&["db-2"]), at(99_000), patience).is_empty());
        assert!(absent.for_long(these(&["db-1", "db-2"]), at(99_500), patience).is_empty());
        assert!(absent.for_long(these(&[]), at(100_000), patience).is_empty());
        assert_eq!(absent.for_long(these(&[]), at(101_000), patience), ["db-1", "db-2"]);
    }

    #[test]
    fn heirs_are_the_synchronous_standbys_of_this_primary() {
        let sync = |text: &str| Pair { key: String::new(), value: text.as_bytes().to_vec(), revision: 1 };
        assert_eq!(
            heirs("db-1", &sync(r#"{"leader":"db-1","sync_standby":"db-2,db-3","quorum":0}"#)),
            ["db-2", "db-3"]
        );
        for nobody in [
            r#"{"leader":"db-2","sync_standby":"db-3"}"#,
            r#"{"leader":"db-1","sync_standby":null}"#,
            r#"{"leader":"db-1","sync_standby":""}"#,
            r#"{"leader":null}"#,
            "",
            "[]",
        ] {
            assert!(heirs("db-1", &sync(nobody)).is_empty(), "{nobody}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_panic(value: Vec<u8>) {
            let _ = heirs("db-1", &Pair { key: String::new(), value, revision: 1 });
        }
    }
}
