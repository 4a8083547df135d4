//! Which answers of hubs a node acts on.
//!
//! Certificates have no end, so a machine that was a hub can answer long after its eviction. A node
//! therefore knows the current hubs by their TLS keys ("pins"), which come from etcd's records. What
//! stops a node or redirects it (it is fenced, or is to leave; a hub is gone, or has another key)
//! counts when two such hubs say it in one round, and never on the word of the hub it is about.
//! Where there is only one other hub, that one's word counts, unless the hub that it is about answers. The operator's
//! signed order to evict a hub counts from whichever hub hands it out.

use std::collections::{BTreeMap, BTreeSet};

use fleet::{MeshKey, Peers};
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use webpki::{EndEntityCert, ring::ECDSA_P256_SHA256};

/// One hub's answer, and the TLS key that it came with.
#[derive(Clone, Debug)]
pub struct HubAnswer {
    pub hub: String,
    /// Base64, as in [`fleet::SlotRecord`].
    pub tls_key: String,
    pub peers: Peers,
    /// Slots and TLS keys of hubs that the operator evicted, as the orders prove that it hands out.
    pub evicted: BTreeSet<(String, String)>,
}

/// What a node knows before it asks.
pub struct Known<'a> {
    /// Its own slot and epoch.
    pub own: (&'a str, u64),
    /// Hubs of the plan.
    pub plan: &'a [String],
    /// TLS keys of the current hubs, by slot; empty where no round has told them yet.
    pub pins: &'a BTreeMap<String, String>,
    /// Mesh keys of hubs and other founders.
    pub keys: &'a BTreeMap<String, MeshKey>,
    /// It has not been granted its slot, as far as it knows: it stops at one hub's word.
    pub is_new: bool,
}

/// What a node is to the fleet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Standing {
    /// The owner of its slot, as far as enough hubs say.
    #[default]
    Owner,
    /// It is to leave.
    Leaving,
    /// Another machine has its slot since this epoch.
    Fenced(u64),
    /// No machine has its slot.
    Left,
}

/// Whose answers were believed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Heard {
    #[default]
    None,
    /// Hubs with the keys that the node knows, or any where it knows none.
    Known,
    /// No such hub: hubs that confirm each other's keys.
    Confirmed,
}

/// What follows from one round.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decision {
    pub standing: Standing,
    /// Mesh keys that change; `None` where a slot has no owner.
    pub keys: BTreeMap<String, Option<MeshKey>>,
    /// Hubs' TLS keys that change; `None` where a hub's slot has no owner.
    pub pins: BTreeMap<String, Option<String>>,
    /// A hub says something new that too few others confirm: the node asks again soon.
    pub is_open: bool,
    pub heard: Heard,
}

/// Decides what a node acts on after one round.
#[must_use]
pub fn decide(known: &Known<'_>, answers: &[HubAnswer]) -> Decision {
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

/// As [`decide`], by the answers of hubs that were not evicted.
fn decide_among(known: &Known<'_>, answers: &[HubAnswer]) -> Decision {
    let votes = believed(known, answers);
    let is_known = |vote: &&HubAnswer| known.pins.is_empty() || known.pins.get(&vote.hub) == Some(&vote.tls_key);
    let heard = match votes.first() {
        None => Heard::None,
        Some(vote) if is_known(vote) => Heard::Known,
        Some(_) => Heard::Confirmed,
    };
    let mut decision = Decision { heard, ..Decision::default() };
    let (own, own_epoch) = known.own;

    let count = |says: &dyn Fn(&Peers) -> bool| votes.iter().filter(|v| says(&v.peers)).count();
    let needed = if known.is_new { 1 } else { needed(known, None) };
    // A hub that has not heard of this node's grant yet still names the owner before.
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

/// Answers that count. Of a hub whose key is not the pinned one, none does, unless no pinned hub
/// answers at all, as after months without power: then those of hubs that confirm each other's keys.
fn believed<'a>(known: &Known<'_>, answers: &'a [HubAnswer]) -> Vec<&'a HubAnswer> {
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

/// How many hubs have to say something about `subject`.
fn needed(known: &Known<'_>, subject: Option<&str>) -> usize {
    let is_elector = |slot: &&String| **slot != known.own.0 && Some(slot.as_str()) != subject;
    let electors = if known.pins.is_empty() {
        known.plan.iter().filter(is_elector).count()
    } else {
        known.pins.keys().filter(is_elector).count()
    };
    electors.clamp(1, 2)
}

/// What the votes say of one thing.
enum Agreed<T> {
    On(T),
    /// Too few say each of these, or several say each of several.
    Open(Vec<T>),
    No,
}

/// What enough hubs say of `subject`. Its own word counts only for the first pins, where its
/// connection proves that it has the key.
fn agreed<T: Clone + PartialEq>(
    known: &Known<'_>,
    votes: &[&HubAnswer],
    subject: &str,
    first: bool,
    says: impl Fn(&Peers) -> Option<T>,
) -> Agreed<T> {
    let needed = needed(known, (!first).then_some(subject));
    let mut values: Vec<(T, usize)> = Vec::new();
    for vote in votes {
        let proves = first && vote.peers.hubs.get(subject) == Some(&vote.tls_key);
        if vote.hub == subject && !proves {
            continue;
        }
        let Some(value) = says(&vote.peers) else { continue };
        match values.iter_mut().find(|(there, _)| *there == value) {
            Some((_, count)) => *count += 1,
            None => values.push((value, 1)),
        }
    }
    let mut enough = values.iter().filter(|(_, count)| *count >= needed);
    match (enough.next(), enough.next()) {
        // One hub alone says it, and the one that it is about answers with the key that the node knows: which of them
        // lies can't be known here. The operator's order decides.
        (Some((value, 1)), None) if !first && votes.iter().any(|vote| vote.hub == subject) => {
            Agreed::Open(vec![value.clone()])
        }
        (Some((value, _)), None) => Agreed::On(value.clone()),
        _ if values.is_empty() => Agreed::No,
        _ => Agreed::Open(values.into_iter().map(|(value, _)| value).collect()),
    }
}

/// Whether the fleet root's key made this signature.
pub(crate) fn signed_by_root(root: &str, message: &[u8], signature: &[u8]) -> bool {
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

    /// A hub's honest answer where `hubs` are the current ones.
    fn says(hub: &str, hubs: &[&str], change: impl FnOnce(&mut Peers)) -> HubAnswer {
        let mut peers = Peers {
            keys: keys(hubs),
            hubs: pins(hubs),
            epoch: 1,
            fenced: None,
            leaving: false,
            vacant: BTreeSet::new(),
            evicted: Vec::new(),
        };
        change(&mut peers);
        HubAnswer { hub: hub.to_owned(), tls_key: format!("key of {hub}"), peers, evicted: BTreeSet::new() }
    }

    fn worker(hubs: usize, pinned: &[&str], answers: &[HubAnswer]) -> Decision {
        let (plan, pins, keys) =
            (plan(hubs), pins(pinned), keys(&plan(hubs).iter().map(String::as_str).collect::<Vec<_>>()));
        let known = Known { own: ("db-1", 3), plan: &plan, pins: &pins, keys: &keys, is_new: false };
        decide(&known, answers)
    }

    const THREE: [&str; 3] = ["hub-1", "hub-2", "hub-3"];

    #[test]
    fn one_hub_alone_stops_and_redirects_no_node() {
        let lies = |hub: &str| {
            says(hub, &THREE, |p| {
                p.fenced = Some(99_999);
                p.leaving = true;
                p.keys.insert("hub-1".into(), KEY);
                p.hubs.insert("hub-1".into(), "key of the attacker".into());
                p.vacant.insert("hub-3".into());
            })
        };
        for answers in [
            vec![lies("hub-2")],
            vec![lies("hub-2"), says("hub-1", &THREE, |_| {}), says("hub-3", &THREE, |_| {})],
            // The attacker shows certificates of its own issuer for the others.
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
    fn what_two_hubs_say_counts() {
        let gone = |hub: &str| {
            says(hub, &["hub-1", "hub-3"], |p| {
                p.vacant.insert("hub-2".into());
            })
        };
        let lie = says("hub-2", &THREE, |p| p.fenced = Some(99));
        let decision = worker(3, &THREE, &[gone("hub-1"), lie, gone("hub-3")]);
        assert_eq!(decision.keys, BTreeMap::from([("hub-2".to_owned(), None)]));
        assert_eq!(decision.pins, BTreeMap::from([("hub-2".to_owned(), None)]));
        assert_eq!(decision.standing, Standing::Owner);
        // New keys of a hub; the node itself is fenced, or is to leave.
        let renewed = |hub: &str| {
            says(hub, &THREE, |p| {
                p.keys.insert("hub-2".into(), KEY);
                p.hubs.insert("hub-2".into(), "next".into());
            })
        };
        let decision = worker(3, &THREE, &[renewed("hub-1"), renewed("hub-3")]);
        assert_eq!(decision.keys, BTreeMap::from([("hub-2".to_owned(), Some(KEY))]));
        assert_eq!(decision.pins, BTreeMap::from([("hub-2".to_owned(), Some("next".to_owned()))]));
        let fenced = |hub: &str, epoch| says(hub, &THREE, |p| p.fenced = Some(epoch));
        assert_eq!(worker(3, &THREE, &[fenced("hub-1", 4), fenced("hub-3", 4)]).standing, Standing::Fenced(4));
        // Of the owner before this node.
        assert_eq!(worker(3, &THREE, &[fenced("hub-1", 2), fenced("hub-3", 2)]).standing, Standing::Owner);
        let leaving = |hub: &str| says(hub, &THREE, |p| p.leaving = true);
        assert_eq!(worker(3, &THREE, &[leaving("hub-1"), leaving("hub-3")]).standing, Standing::Leaving);
        let one = worker(3, &THREE, &[leaving("hub-1"), says("hub-3", &THREE, |_| {})]);
        assert!(one.standing == Standing::Owner && one.is_open);
    }

    #[test]
    fn the_only_other_hub_is_believed() {
        let only = says("hub-1", &["hub-1"], |p| p.fenced = Some(3));
        assert_eq!(worker(1, &["hub-1"], std::slice::from_ref(&only)).standing, Standing::Fenced(3));
        assert_eq!(worker(1, &["hub-1"], &[HubAnswer { tls_key: "another".into(), ..only }]).standing, Standing::Owner);
        // Of two, one is gone; but not where each says it of the other.
        let two = ["hub-1", "hub-2"];
        let gone = |hub: &str, other: &str| {
            says(hub, &two, |p| {
                p.vacant.insert(other.into());
            })
        };
        let decision = worker(2, &two, &[gone("hub-1", "hub-2")]);
        assert_eq!(decision.pins, BTreeMap::from([("hub-2".to_owned(), None)]));
        // A hub that answers is not gone because the other one says so: one of two that was taken over must not
        // take the other's place.
        for answers in
            [[gone("hub-1", "hub-2"), gone("hub-2", "hub-1")], [gone("hub-1", "hub-2"), says("hub-2", &two, |_| {})]]
        {
            let decision = worker(2, &two, &answers);
            assert!(decision.pins.is_empty() && decision.keys.is_empty() && decision.is_open);
        }
    }

    #[test]
    fn the_operators_order_decides_between_two_hubs() {
        let two = ["hub-1", "hub-2"];
        let gone = |hub: &str, other: &str| {
            says(hub, &two, |p| {
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
        // An order against an owner before is none against this one.
        let decision = worker(2, &two, &[proves("key of an owner before"), lie.clone()]);
        assert!(decision.pins.is_empty() && decision.keys.is_empty() && decision.is_open);
        // The machine that has the slot afterwards is a hub again, whatever the evicted one says.
        let next = HubAnswer {
            evicted: BTreeSet::from([("hub-2".to_owned(), "key of hub-2".to_owned())]),
            ..says("hub-1", &two, |p| {
                p.hubs.insert("hub-2".into(), "next".into());
                p.keys.insert("hub-2".into(), KEY);
            })
        };
        let decision = worker(2, &two, &[next, lie]);
        assert_eq!(decision.pins, BTreeMap::from([("hub-2".to_owned(), Some("next".to_owned()))]));
        assert_eq!(decision.keys, BTreeMap::from([("hub-2".to_owned(), Some(KEY))]));
    }

    #[test]
    fn the_first_pins_are_what_two_hubs_say_of_each_other() {
        let all = |hub: &str| says(hub, &THREE, |_| {});
        assert!(worker(3, &[], &[all("hub-1")]).pins.is_empty());
        assert_eq!(worker(3, &[], &[all("hub-1"), all("hub-2")]).pins.len(), 3);
        // One of the version before says none; nor does a hub that lies alone become the only one.
        let old = says("hub-1", &THREE, |p| p.hubs.clear());
        assert!(worker(3, &[], &[old, all("hub-2")]).pins.is_empty());
        let lie = says("hub-2", &THREE, |p| p.hubs = BTreeMap::from([("hub-2".into(), "key of hub-2".into())]));
        let decision = worker(3, &[], &[lie, all("hub-1"), all("hub-3")]);
        assert_eq!(decision.pins.keys().collect::<Vec<_>>(), ["hub-1", "hub-2", "hub-3"]);
    }

    #[test]
    fn a_node_that_was_off_for_long_finds_hubs_that_confirm_each_other() {
        let renewed = |hub: &str| {
            let mut answer =
                says(hub, &THREE, |p| p.hubs = THREE.iter().map(|h| ((*h).into(), format!("next {h}"))).collect());
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
