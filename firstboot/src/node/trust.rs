//! Decides which replies of hubs a node acts on.
//!
//! Certificates do not expire, so a machine that was a hub can reply long after its eviction. A node therefore stores
//! the TLS keys of the current hubs ("pins"), which come from etcd's records. Some replies stop a node or redirect it:
//! the node is fenced or has to leave, or a hub has left or has another key. The node acts on such a reply when two
//! pinned hubs send it in one round. The hub that the reply is about does not count. If there is only one other hub,
//! its reply is enough, unless the hub that it is about also replies, or did so a moment ago. An order of the operator to evict a hub is
//! signed, so one hub is enough to deliver it.

use std::collections::{BTreeMap, BTreeSet};

use fleet::{MeshKey, Peers};
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use webpki::{EndEntityCert, ring::ECDSA_P256_SHA256};

/// A hub's reply, and the TLS key of its connection.
#[derive(Clone, Debug)]
pub struct HubAnswer {
    /// Slot of the hub.
    pub hub: String,
    /// Base64 of the TLS key, as in [`fleet::SlotRecord`].
    pub tls_key: String,
    /// The reply.
    pub peers: Peers,
    /// Slots and TLS keys of evicted hubs, from orders in the reply whose signature is valid.
    pub evicted: BTreeSet<(String, String)>,
}

/// Data of the node before a round.
pub(crate) struct Known<'a> {
    /// Slot and epoch of the node.
    pub own: (&'a str, u64),
    /// Hubs of the topology.
    pub plan: &'a [String],
    /// TLS keys of the current hubs, by slot; empty before the first successful round.
    pub pins: &'a BTreeMap<String, String>,
    /// Mesh keys of hubs and other founders.
    pub keys: &'a BTreeMap<String, MeshKey>,
    /// Pinned hubs that replied a moment ago, also if they are silent in this round.
    pub recent: &'a BTreeSet<String>,
    /// Whether the node, as far as it knows, has no grant yet. One hub is then enough to stop it.
    pub is_new: bool,
}

/// Standing of a node in the fleet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Standing {
    /// The node owns its slot.
    #[default]
    Owner,
    /// The node has to leave.
    Leaving,
    /// Another machine has the slot since this epoch.
    Fenced(u64),
    /// No machine has the slot.
    Left,
}

/// Kind of hubs whose replies counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Heard {
    /// No reply counted.
    #[default]
    None,
    /// Hubs with pinned keys, or all hubs if the node has no pins.
    Known,
    /// Hubs without pinned keys that confirm each other's keys.
    Confirmed,
}

/// Result of a round.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decision {
    /// Standing of the node.
    pub standing: Standing,
    /// Mesh keys that change, by slot; `None` for a slot without an owner.
    pub keys: BTreeMap<String, Option<MeshKey>>,
    /// TLS keys of hubs that change, by slot; `None` for a slot without an owner.
    pub pins: BTreeMap<String, Option<String>>,
    /// Whether a hub reports something new that too few others confirm. The node then asks again soon.
    pub is_open: bool,
    /// Kind of hubs whose replies counted.
    pub heard: Heard,
    /// Hubs whose replies counted.
    pub replied: BTreeSet<String>,
}

/// Decides what a node acts on after a round.
#[must_use]
pub(crate) fn decide(known: &Known<'_>, answers: &[HubAnswer]) -> Decision {
    let evicted: BTreeSet<&(String, String)> = answers.iter().flat_map(|answer| &answer.evicted).collect();
    let is_evicted = |hub: &String, key: &String| evicted.contains(&(hub.clone(), key.clone()));
    let (gone, pins): (BTreeMap<_, _>, BTreeMap<_, _>) =
        known.pins.clone().into_iter().partition(|(hub, key)| is_evicted(hub, key));
    let answers: Vec<HubAnswer> = answers.iter().filter(|a| !is_evicted(&a.hub, &a.tls_key)).cloned().collect();
    let mut decision = decide_among(&Known { pins: &pins, ..*known }, &answers);
    for slot in gone.into_keys() {
        decision.keys.entry(slot.clone()).or_insert(None);
        decision.pins.entry(slot).or_insert(None);
    }
    decision
}

/// Returns mesh keys for slots of which the node has no key. One hub is enough to report such a key, so that a first
/// quorum of two can form. A hub that was evicted does not count, nor does a hub without its pinned key: the node has
/// no key for the slot of an evicted hub, and must not take one from it.
#[must_use]
pub(crate) fn first_keys(known: &Known<'_>, answers: &[HubAnswer]) -> BTreeMap<String, MeshKey> {
    let is_pinned = |a: &&HubAnswer| known.pins.is_empty() || known.pins.get(&a.hub) == Some(&a.tls_key);
    let is_evicted =
        |a: &HubAnswer| answers.iter().any(|other| other.evicted.contains(&(a.hub.clone(), a.tls_key.clone())));
    let counted = answers.iter().filter(|a| is_pinned(a) && !is_evicted(a));
    let keys = counted.flat_map(|a| a.peers.keys.iter().filter(|(slot, _)| !a.peers.vacant.contains(*slot)));
    let is_new = |slot: &String| *slot != known.own.0 && !known.keys.contains_key(slot);
    keys.filter(|(slot, _)| is_new(slot)).map(|(slot, key)| (slot.clone(), *key)).collect()
}

/// As [`decide`], with the replies of hubs that were not evicted.
fn decide_among(known: &Known<'_>, answers: &[HubAnswer]) -> Decision {
    let votes = counted(known, answers);
    let is_known = |vote: &&HubAnswer| known.pins.is_empty() || known.pins.get(&vote.hub) == Some(&vote.tls_key);
    let heard = match votes.first() {
        None => Heard::None,
        Some(vote) if is_known(vote) => Heard::Known,
        Some(_) => Heard::Confirmed,
    };
    let replied = votes.iter().map(|vote| vote.hub.clone()).collect();
    let mut decision = Decision { heard, replied, ..Decision::default() };
    let (own, own_epoch) = known.own;

    let count = |holds: &dyn Fn(&Peers) -> bool| votes.iter().filter(|v| holds(&v.peers)).count();
    let needed = if known.is_new { 1 } else { needed(known, None) };
    // A hub that has not seen this node's grant yet still reports the previous owner.
    let is_fenced = |p: &Peers| p.fenced.is_some_and(|epoch| epoch >= own_epoch);
    let (fenced, leaving) = (count(&is_fenced), count(&|p| p.leaving));
    let left = count(&|p| is_fenced(p) && p.vacant.contains(own));
    let epoch = votes.iter().filter(|v| is_fenced(&v.peers)).filter_map(|v| v.peers.fenced).max();
    decision.standing = match epoch {
        Some(_) if left >= needed => Standing::Left,
        Some(epoch) if fenced >= needed => Standing::Fenced(epoch),
        _ if leaving >= needed => Standing::Leaving,
        _ => Standing::Owner,
    };
    decision.is_open = (1..needed).contains(&fenced) || (1..needed).contains(&leaving);

    let mentioned = votes.iter().flat_map(|v| v.peers.keys.keys().chain(&v.peers.vacant).chain(v.peers.hubs.keys()));
    let slots: BTreeSet<&String> = mentioned.filter(|slot| *slot != own).collect();
    for slot in slots {
        let vacant = |p: &Peers| p.vacant.contains(slot);
        let key = |p: &Peers| p.keys.get(slot).map(|key| Some(*key)).filter(|_| !vacant(p));
        let key = |p: &Peers| if vacant(p) { Some(None) } else { key(p) };
        match agreed(known, &votes, slot, false, key) {
            Agreed::On(key) if known.keys.get(slot) != key.as_ref() => drop(decision.keys.insert(slot.clone(), key)),
            Agreed::Open(values) => {
                decision.is_open |= values.iter().any(|key| known.keys.get(slot) != key.as_ref());
            }
            Agreed::On(_) | Agreed::No => {}
        }
        let pin = |p: &Peers| if vacant(p) { Some(None) } else { p.hubs.get(slot).map(|pin| Some(pin.clone())) };
        match agreed(known, &votes, slot, known.pins.is_empty(), pin) {
            Agreed::On(pin) if known.pins.get(slot) != pin.as_ref() => drop(decision.pins.insert(slot.clone(), pin)),
            _ => {}
        }
    }
    decision
}

/// Returns the replies that count: those of pinned hubs. If no pinned hub replies, as after months without power, the
/// replies of hubs count that confirm each other's keys.
fn counted<'a>(known: &Known<'_>, answers: &'a [HubAnswer]) -> Vec<&'a HubAnswer> {
    let planned = answers.iter().filter(|a| known.plan.contains(&a.hub) && a.hub != known.own.0);
    if known.pins.is_empty() {
        return planned.collect();
    }
    let planned: Vec<&HubAnswer> = planned.collect();
    let pinned: Vec<&HubAnswer> =
        planned.iter().copied().filter(|a| known.pins.get(&a.hub) == Some(&a.tls_key)).collect();
    if !pinned.is_empty() {
        return pinned;
    }
    let knows = |one: &HubAnswer, other: &HubAnswer| one.peers.hubs.get(&other.hub) == Some(&other.tls_key);
    let confirmed =
        |one: &&HubAnswer| planned.iter().any(|other| other.hub != one.hub && knows(one, other) && knows(other, one));
    planned.iter().copied().filter(confirmed).collect()
}

/// Returns the number of hubs that have to agree on something about `subject`.
fn needed(known: &Known<'_>, subject: Option<&str>) -> usize {
    let is_elector = |slot: &&String| **slot != known.own.0 && Some(slot.as_str()) != subject;
    let electors = if known.pins.is_empty() {
        known.plan.iter().filter(is_elector).count()
    } else {
        known.pins.keys().filter(is_elector).count()
    };
    electors.clamp(1, 2)
}

/// Result of a vote on one value.
enum Agreed<T> {
    /// Enough hubs agree on this value.
    On(T),
    /// Too few hubs agree on each of these values, or enough hubs agree on several.
    Open(Vec<T>),
    /// No hub has a value.
    No,
}

/// Returns the value of `subject` on which enough hubs agree. The reply of `subject` itself counts only for the first
/// pins (`first`), for which its connection proves that it has the key.
fn agreed<T: Clone + PartialEq>(
    known: &Known<'_>,
    votes: &[&HubAnswer],
    subject: &str,
    first: bool,
    value_of: impl Fn(&Peers) -> Option<T>,
) -> Agreed<T> {
    let needed = needed(known, (!first).then_some(subject));
    let mut values: Vec<(T, usize)> = Vec::new();
    for vote in votes {
        let proves = first && vote.peers.hubs.get(subject) == Some(&vote.tls_key);
        if vote.hub == subject && !proves {
            continue;
        }
        let Some(value) = value_of(&vote.peers) else { continue };
        match values.iter_mut().find(|(there, _)| *there == value) {
            Some((_, count)) => *count += 1,
            None => values.push((value, 1)),
        }
    }
    let mut enough = values.iter().filter(|(_, count)| *count >= needed);
    match (enough.next(), enough.next()) {
        // Only one hub sends the value, and the hub that it is about also replies with the pinned key, or did so a
        // moment ago. The node cannot detect which of the two lies. The operator's order decides.
        (Some((value, 1)), None)
            if !first && (known.recent.contains(subject) || votes.iter().any(|vote| vote.hub == subject)) =>
        {
            Agreed::Open(vec![value.clone()])
        }
        (Some((value, _)), None) => Agreed::On(value.clone()),
        _ if values.is_empty() => Agreed::No,
        _ => Agreed::Open(values.into_iter().map(|(value, _)| value).collect()),
    }
}

/// Whether the fleet root's key made this signature.
#[must_use]
pub fn signed_by_root(root: &str, message: &[u8], signature: &[u8]) -> bool {
    let Ok(cert) = CertificateDer::from_pem_slice(root.as_bytes()) else { return false };
    EndEntityCert::try_from(&cert)
        .is_ok_and(|cert| cert.verify_signature(ECDSA_P256_SHA256, message, signature).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: MeshKey = MeshKey([7; 32]);

    fn plan(hubs: usize) -> Vec<String> {
        (1..=hubs).map(|i| format!("hub-{i}")).collect()
    }

    fn pins(hubs: &[&str]) -> BTreeMap<String, String> {
        hubs.iter().map(|hub| ((*hub).to_owned(), format!("key of {hub}"))).collect()
    }

    fn keys(hubs: &[&str]) -> BTreeMap<String, MeshKey> {
        hubs.iter().map(|hub| ((*hub).to_owned(), key(hub))).collect()
    }

    fn key(hub: &str) -> MeshKey {
        MeshKey([hub.as_bytes()[hub.len() - 1]; 32])
    }

    /// Returns the correct reply of a hub if `hubs` are the current hubs.
    fn reply(hub: &str, hubs: &[&str], change: impl FnOnce(&mut Peers)) -> HubAnswer {
        let mut peers = Peers {
            keys: keys(hubs),
            hubs: pins(hubs),
            epoch: 1,
            fenced: None,
            leaving: false,
            vacant: BTreeSet::new(),
            evicted: Vec::new(),
            revoked_operators: Vec::new(),
        };
        change(&mut peers);
        HubAnswer { hub: hub.to_owned(), tls_key: format!("key of {hub}"), peers, evicted: BTreeSet::new() }
    }

    fn worker(hubs: usize, pinned: &[&str], answers: &[HubAnswer]) -> Decision {
        worker_that_heard(&[], hubs, pinned, answers)
    }

    /// As [`worker`], if these hubs replied a moment ago.
    fn worker_that_heard(recent: &[&str], hubs: usize, pinned: &[&str], answers: &[HubAnswer]) -> Decision {
        let recent = recent.iter().map(|hub| (*hub).to_owned()).collect();
        let (plan, pins, keys) =
            (plan(hubs), pins(pinned), keys(&plan(hubs).iter().map(String::as_str).collect::<Vec<_>>()));
        let known = Known { own: ("db-1", 3), plan: &plan, pins: &pins, keys: &keys, recent: &recent, is_new: false };
        decide(&known, answers)
    }

    const THREE: [&str; 3] = ["hub-1", "hub-2", "hub-3"];

    #[test]
    fn one_hub_alone_neither_stops_nor_redirects_a_node() {
        let lies = |hub: &str| {
            reply(hub, &THREE, |p| {
                p.fenced = Some(99_999);
                p.leaving = true;
                p.keys.insert("hub-1".into(), KEY);
                p.hubs.insert("hub-1".into(), "key of the attacker".into());
                p.vacant.insert("hub-3".into());
            })
        };
        for answers in [
            vec![lies("hub-2")],
            vec![lies("hub-2"), reply("hub-1", &THREE, |_| {}), reply("hub-3", &THREE, |_| {})],
            // The attacker presents certificates of its own issuer for the other hubs.
            vec![
                lies("hub-2"),
                HubAnswer { tls_key: "key of the attacker".into(), ..lies("hub-1") },
                HubAnswer { tls_key: "key of the attacker".into(), ..lies("hub-3") },
            ],
        ] {
            let decision = worker(3, &THREE, &answers);
            assert_eq!(decision.standing, Standing::Owner);
            assert_eq!((&decision.keys, &decision.pins), (&BTreeMap::new(), &BTreeMap::new()));
            assert!(decision.is_open && decision.heard == Heard::Known);
        }
    }

    #[test]
    fn node_acts_if_two_hubs_agree() {
        let gone = |hub: &str| {
            reply(hub, &["hub-1", "hub-3"], |p| {
                p.vacant.insert("hub-2".into());
            })
        };
        let lie = reply("hub-2", &THREE, |p| p.fenced = Some(99));
        let decision = worker(3, &THREE, &[gone("hub-1"), lie, gone("hub-3")]);
        assert_eq!(decision.keys, BTreeMap::from([("hub-2".to_owned(), None)]));
        assert_eq!(decision.pins, BTreeMap::from([("hub-2".to_owned(), None)]));
        assert_eq!(decision.standing, Standing::Owner);
        // A hub has new keys. The node itself is fenced, or has to leave.
        let renewed = |hub: &str| {
            reply(hub, &THREE, |p| {
                p.keys.insert("hub-2".into(), KEY);
                p.hubs.insert("hub-2".into(), "next".into());
            })
        };
        let decision = worker(3, &THREE, &[renewed("hub-1"), renewed("hub-3")]);
        assert_eq!(decision.keys, BTreeMap::from([("hub-2".to_owned(), Some(KEY))]));
        assert_eq!(decision.pins, BTreeMap::from([("hub-2".to_owned(), Some("next".to_owned()))]));
        let fenced = |hub: &str, epoch| reply(hub, &THREE, |p| p.fenced = Some(epoch));
        assert_eq!(worker(3, &THREE, &[fenced("hub-1", 4), fenced("hub-3", 4)]).standing, Standing::Fenced(4));
        // The epoch of the previous owner.
        assert_eq!(worker(3, &THREE, &[fenced("hub-1", 2), fenced("hub-3", 2)]).standing, Standing::Owner);
        let leaving = |hub: &str| reply(hub, &THREE, |p| p.leaving = true);
        assert_eq!(worker(3, &THREE, &[leaving("hub-1"), leaving("hub-3")]).standing, Standing::Leaving);
        let one = worker(3, &THREE, &[leaving("hub-1"), reply("hub-3", &THREE, |_| {})]);
        assert!(one.standing == Standing::Owner && one.is_open);
    }

    #[test]
    fn reply_of_the_only_other_hub_is_enough() {
        let only = reply("hub-1", &["hub-1"], |p| p.fenced = Some(3));
        assert_eq!(worker(1, &["hub-1"], std::slice::from_ref(&only)).standing, Standing::Fenced(3));
        assert_eq!(worker(1, &["hub-1"], &[HubAnswer { tls_key: "another".into(), ..only }]).standing, Standing::Owner);
        // One of two hubs has left.
        let two = ["hub-1", "hub-2"];
        let gone = |hub: &str, other: &str| {
            reply(hub, &two, |p| {
                p.vacant.insert(other.into());
            })
        };
        let decision = worker(2, &two, &[gone("hub-1", "hub-2")]);
        assert_eq!(decision.pins, BTreeMap::from([("hub-2".to_owned(), None)]));
        // As long as the other hub replied a moment ago, the node waits: that hub may only be busy.
        let decision = worker_that_heard(&["hub-1", "hub-2"], 2, &two, &[gone("hub-1", "hub-2")]);
        assert!(decision.pins.is_empty() && decision.keys.is_empty() && decision.is_open);
        assert_eq!(decision.replied, BTreeSet::from(["hub-1".to_owned()]));
        // Two hubs that agree need not wait for the third.
        let decision = worker_that_heard(&THREE, 3, &THREE, &[gone("hub-1", "hub-2"), gone("hub-3", "hub-2")]);
        assert_eq!(decision.pins, BTreeMap::from([("hub-2".to_owned(), None)]));
        // A hub that replies has not left, whatever the other hub reports. Otherwise a compromised hub could exclude
        // the other one.
        for answers in
            [[gone("hub-1", "hub-2"), gone("hub-2", "hub-1")], [gone("hub-1", "hub-2"), reply("hub-2", &two, |_| {})]]
        {
            let decision = worker(2, &two, &answers);
            assert!(decision.pins.is_empty() && decision.keys.is_empty() && decision.is_open);
        }
    }

    #[test]
    fn evicted_hub_does_not_report_first_keys() {
        let plan = plan(2);
        let lie = reply("hub-2", &["hub-1", "hub-2"], |p| p.keys = BTreeMap::from([("hub-2".into(), KEY)]));
        let honest = reply("hub-1", &["hub-1"], |p| p.keys = BTreeMap::from([("app-1".into(), KEY)]));
        let first = |pinned: &[&str], answers: &[HubAnswer]| {
            let (pins, keys) = (pins(pinned), keys(&["hub-1"]));
            let known = Known {
                own: ("monitor-1", 1),
                plan: &plan,
                pins: &pins,
                keys: &keys,
                recent: &BTreeSet::new(),
                is_new: false,
            };
            first_keys(&known, answers).into_keys().collect::<Vec<_>>()
        };
        // The node has removed the evicted hub, or learns of the eviction in this round.
        assert_eq!(first(&["hub-1"], &[lie.clone(), honest.clone()]), ["app-1"]);
        let evicted = BTreeSet::from([("hub-2".to_owned(), "key of hub-2".to_owned())]);
        let order = HubAnswer { evicted, ..honest.clone() };
        assert_eq!(first(&["hub-1", "hub-2"], &[lie.clone(), order]), ["app-1"]);
        // Before the first pins, and from a current hub, one reply is enough.
        assert_eq!(first(&[], std::slice::from_ref(&lie)), ["hub-2"]);
        assert_eq!(first(&["hub-1", "hub-2"], &[lie, honest]), ["app-1", "hub-2"]);
    }

    #[test]
    fn operators_order_decides_between_two_hubs() {
        let two = ["hub-1", "hub-2"];
        let gone = |hub: &str, other: &str| {
            reply(hub, &two, |p| {
                p.vacant.insert(other.into());
            })
        };
        let proves = |key: &str| HubAnswer {
            evicted: BTreeSet::from([("hub-2".to_owned(), key.to_owned())]),
            ..gone("hub-1", "hub-2")
        };
        let lie = gone("hub-2", "hub-1");
        let decision = worker(2, &two, &[proves("key of hub-2"), lie.clone()]);
        assert_eq!(decision.pins, BTreeMap::from([("hub-2".to_owned(), None)]));
        assert_eq!(decision.keys, BTreeMap::from([("hub-2".to_owned(), None)]));
        assert_eq!((decision.standing, decision.heard), (Standing::Owner, Heard::Known));
        // An order against the previous owner does not apply to this one.
        let decision = worker(2, &two, &[proves("key of an owner before"), lie.clone()]);
        assert!(decision.pins.is_empty() && decision.keys.is_empty() && decision.is_open);
        // The next machine in the slot is a hub again, whatever the evicted one replies.
        let next = HubAnswer {
            evicted: BTreeSet::from([("hub-2".to_owned(), "key of hub-2".to_owned())]),
            ..reply("hub-1", &two, |p| {
                p.hubs.insert("hub-2".into(), "next".into());
                p.keys.insert("hub-2".into(), KEY);
            })
        };
        let decision = worker(2, &two, &[next, lie]);
        assert_eq!(decision.pins, BTreeMap::from([("hub-2".to_owned(), Some("next".to_owned()))]));
        assert_eq!(decision.keys, BTreeMap::from([("hub-2".to_owned(), Some(KEY))]));
    }

    #[test]
    fn first_pins_need_two_hubs_that_confirm_each_other() {
        let all = |hub: &str| reply(hub, &THREE, |_| {});
        assert!(worker(3, &[], &[all("hub-1")]).pins.is_empty());
        assert_eq!(worker(3, &[], &[all("hub-1"), all("hub-2")]).pins.len(), 3);
        // A hub of the previous version sends no pins.
        let old = reply("hub-1", &THREE, |p| p.hubs.clear());
        assert!(worker(3, &[], &[old, all("hub-2")]).pins.is_empty());
        // A hub that lies alone does not become the only hub.
        let lie = reply("hub-2", &THREE, |p| p.hubs = BTreeMap::from([("hub-2".into(), "key of hub-2".into())]));
        let decision = worker(3, &[], &[lie, all("hub-1"), all("hub-3")]);
        assert_eq!(decision.pins.keys().collect::<Vec<_>>(), ["hub-1", "hub-2", "hub-3"]);
    }

    #[test]
    fn node_with_outdated_pins_accepts_hubs_that_confirm_each_other() {
        let renewed = |hub: &str| {
            let mut answer =
                reply(hub, &THREE, |p| p.hubs = THREE.iter().map(|h| ((*h).into(), format!("next {h}"))).collect());
            answer.tls_key = format!("next {hub}");
            answer
        };
        let alone = worker(3, &THREE, &[renewed("hub-1")]);
        assert!(alone.pins.is_empty() && alone.heard == Heard::None);
        let decision = worker(3, &THREE, &[renewed("hub-1"), renewed("hub-3")]);
        assert_eq!(decision.heard, Heard::Confirmed);
        assert_eq!(decision.pins.get("hub-2"), Some(&Some("next hub-2".to_owned())));
    }
}
