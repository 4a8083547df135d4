//! Who may change its image now: one node of the fleet at a time, in an order that its users
//! don't notice, and nobody any more once one of them has come to harm.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::signed::OrderScope;
use crate::topology::{Node, Topology};
use crate::version::compare_versions;

/// `POST /v1/turn`: what a member runs, and what it would like to run. Every node says it again
/// and again; who falls silent holds everybody else up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    pub version: u16,
    /// Version of the image that runs.
    pub image: String,
    pub doing: UpdateState,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UpdateState {
    /// This boot has not proven itself yet.
    Starting,
    /// All is well, and nothing newer is offered.
    Serving,
    /// All is well, and this newer image is offered.
    #[serde(rename = "wants")]
    Available {
        image: String,
        /// It holds the VIP or has the primary: the others of its kind go first.
        leads: bool,
        /// It has the primary, whose change is noticed most. Older agents say nothing of it.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        primary: bool,
        /// Its boot was taken for a good one, and a role of it has not come up for a long time: others wait
        /// for it, and it for the newer image.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        unwell: bool,
    },
    /// This newer image was tried, and did not come up.
    #[serde(rename = "went_back")]
    RolledBack { from: String },
}

impl UpdateState {
    /// It may be what the newer image mends.
    fn is_unwell(&self) -> bool {
        matches!(self, Self::Available { unwell: true, .. })
    }

    /// The node serves, whatever it runs.
    #[must_use]
    pub fn is_well(&self) -> bool {
        !self.is_unwell() && *self != Self::Starting
    }

    /// Of two of a kind, the heavier goes later.
    fn disruption(&self) -> u8 {
        match self {
            Self::Available { primary: true, .. } => 2,
            Self::Available { leads: true, .. } => 1,
            _ => 0,
        }
    }
}

/// The answer to a report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpdateDecision {
    /// The turn is the node's: it may change to the image it wants.
    #[serde(rename = "go")]
    pub granted: bool,
    /// For people: what is waited for; empty where nothing is wanted.
    pub why: String,
}

/// Who changes its image now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpdateLock {
    pub slot: String,
    pub from: String,
    pub to: String,
}

/// `POST /v1/rollout`, signed by the fleet's root.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RolloutRequest {
    pub version: u16,
    pub fleet: String,
    pub order: RolloutOrder,
    /// Where and when it holds; hubs of this version require it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scope: Option<OrderScope>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RolloutOrder {
    /// Only tell.
    Tell,
    /// Nobody gets a turn; who has one ends it.
    Backoff {
        why: String,
    },
    Resume,
    /// A denied version may be tried again; a version that only one node is offered may be tried.
    Allow {
        version: String,
    },
    /// Nobody waits for this node, and it gets no turn, until it reports that it is well.
    Skip {
        node: String,
    },
}

/// How far the fleet is, as etcd has it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rollout {
    pub turn: Option<UpdateLock>,
    /// The turn's time is not over.
    pub held: bool,
    pub paused: Option<String>,
    /// Versions that nobody tries any more, and why.
    pub denied: BTreeMap<String, String>,
    /// What each node said last, if that was not long ago.
    pub nodes: BTreeMap<String, Report>,
    /// Slots that have an owner.
    pub members: BTreeSet<String>,
    /// Versions that the operator named: one node's offer of them is enough.
    #[serde(default)]
    pub allowed: BTreeSet<String>,
    /// Slots that the operator took out of the order, and since when, in seconds since 1970.
    #[serde(default)]
    pub skipped: BTreeMap<String, u64>,
    /// Epoch of each slot's record; hubs of the version before say none.
    #[serde(default)]
    pub epochs: BTreeMap<String, u64>,
    /// TLS key of each slot's owner, as in its record; hubs of the version before say none.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub tls_keys: BTreeMap<String, String>,
}

/// What follows from a report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing changes; what is waited for.
    Wait(String),
    /// The node has the turn already.
    Go,
    /// The turn is free: the node may take it.
    Take(UpdateLock),
    /// The node's turn is over.
    Release,
    /// Nobody is to try this version any more; with it ends the turn that led there.
    Deny { image: String, why: String },
}

impl Rollout {
    /// What follows from a node's report.
    #[must_use]
    pub fn decide(&self, topology: &Topology, slot: &str, report: &Report) -> Verdict {
        if let Some(turn) = self.turn.as_ref().filter(|t| t.slot == slot) {
            return match &report.doing {
                // Of a version that it had no turn for, a node is not believed: one that was taken
                // over could keep any version from the fleet.
                UpdateState::RolledBack { from } if *from == turn.to => {
                    let why = format!("it did not come up on {slot}, which went back to {}", report.image);
                    Verdict::Deny { image: from.clone(), why }
                }
                UpdateState::Available { image, .. } if *image == turn.to && self.held => Verdict::Go,
                // It came up, and so was not tried again; but it does not do what it is for.
                UpdateState::Available { unwell: true, .. } if report.image == turn.to => {
                    Verdict::Deny { image: turn.to.clone(), why: format!("with it {slot} is not well") }
                }
                UpdateState::Starting if self.held => Verdict::Wait("this boot has to prove itself".to_owned()),
                UpdateState::Starting => lost(turn),
                _ => Verdict::Release,
            };
        }
        if let Some(turn) = self.turn.as_ref().filter(|_| !self.held) {
            return lost(turn);
        }
        let UpdateState::Available { image, .. } = &report.doing else { return Verdict::Wait(String::new()) };
        match self.obstacle(topology, slot, image, &report.doing) {
            Some(why) => Verdict::Wait(why),
            None => Verdict::Take(UpdateLock { slot: slot.to_owned(), from: report.image.clone(), to: image.clone() }),
        }
    }

    /// Why a node has to wait, if it has to.
    fn obstacle(&self, topology: &Topology, slot: &str, image: &str, doing: &UpdateState) -> Option<String> {
        if let Some(why) = &self.paused {
            return Some(format!("the rollout is paused: {why}"));
        }
        if let Some(why) = self.denied.get(image) {
            return Some(format!("nobody takes version {image}: {why}"));
        }
        if let Some(turn) = &self.turn {
            return Some(format!("{} changes to version {} now", turn.slot, turn.to));
        }
        if self.skipped.contains_key(slot) {
            return Some(format!("the operator skips {slot} until it is well"));
        }
        let others = || self.members.iter().filter(|m| *m != slot && !self.skipped.contains_key(*m));
        // While one is missing, another must not go.
        if let Some(silent) = others().find(|m| !self.nodes.contains_key(*m)) {
            return Some(format!("{silent} is silent"));
        }
        let reports = || others().filter_map(|m| Some((m, self.nodes.get(m)?)));
        if let Some((starting, _)) = reports().find(|(_, r)| r.doing == UpdateState::Starting) {
            return Some(format!("{starting} is starting"));
        }
        if !self.is_offered(slot, image) {
            return Some(format!(
                "no other node is offered version {image}, or runs it; if that is right: `bakehouse rollout --allow {image}`"
            ));
        }
        // There may be several, and each would wait for the others.
        if doing.is_unwell() {
            return None;
        }
        if let Some((unwell, _)) = reports().find(|(_, r)| r.doing.is_unwell()) {
            return Some(format!("{unwell} is not well"));
        }
        let own = topology.node(slot).map_or(0, disruption_order);
        let first = reports().find(|(other, report)| {
            let disruption_order = topology.node(other).map_or(0, disruption_order);
            let older = compare_versions(&report.image, image).is_lt();
            older
                && (disruption_order < own || disruption_order == own && report.doing.disruption() < doing.disruption())
        });
        first.map(|(other, _)| format!("{other} goes first"))
    }
}

impl Rollout {
    /// Whether another member is offered this version, or runs it, or the operator named it. One node
    /// alone could ask for any version, and then deny it to the fleet.
    fn is_offered(&self, slot: &str, image: &str) -> bool {
        let wanted =
            |doing: &UpdateState| matches!(doing, UpdateState::Available { image: wanted, .. } if wanted == image);
        let others = || self.nodes.iter().filter(|(other, _)| *other != slot && self.members.contains(*other));
        self.allowed.contains(image)
            || self.members.iter().all(|member| member == slot)
            || others().any(|(_, report)| report.image == image || wanted(&report.doing))
    }

    /// Whether nodes wait for a newer version and none of them changes, though the operator has not
    /// paused the rollout.
    #[must_use]
    pub fn is_blocked(&self) -> bool {
        let wants = |report: &Report| matches!(report.doing, UpdateState::Available { .. });
        self.turn.is_none() && self.paused.is_none() && self.nodes.values().any(wants)
    }
}

fn lost(turn: &UpdateLock) -> Verdict {
    Verdict::Deny { image: turn.to.clone(), why: format!("{} did not come back with it in time", turn.slot) }
}

/// Whose loss its users notice less goes earlier.
#[must_use]
pub fn disruption_order(node: &Node) -> u8 {
    let of = |role: &String| match role.as_str() {
        "hub" => 3,
        "db" => 2,
        "app" => 1,
        _ => 0,
    };
    node.roles.iter().map(of).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Hubs and nodes of other versions read these words.
    #[test]
    fn wire_format_keeps_its_words() {
        let json = |state: &UpdateState| serde_json::to_string(state).unwrap();
        let available = UpdateState::Available { image: "2".into(), leads: false, primary: false, unwell: false };
        assert!(json(&available).starts_with(r#"{"wants":{"image":"2","#));
        assert_eq!(json(&UpdateState::RolledBack { from: "3".into() }), r#"{"went_back":{"from":"3"}}"#);
        assert_eq!(json(&UpdateState::Serving), r#""serving""#);
        let decision = UpdateDecision { granted: true, why: String::new() };
        assert_eq!(serde_json::to_string(&decision).unwrap(), r#"{"go":true,"why":""}"#);
    }
    use crate::join::PROTOCOL;
    use crate::schema::Fleet;

    fn topology() -> Topology {
        let toml = b"name=\"x\"\n[groups]\nhub.count=3\ndb.count=2\napp.count=2\nmonitor.count=1\n";
        Topology::of(&Fleet::parse("f", toml).unwrap())
    }

    fn says(image: &str, doing: UpdateState) -> Report {
        Report { version: PROTOCOL, image: image.to_owned(), doing }
    }

    fn wants(leads: bool) -> Report {
        says("1", UpdateState::Available { image: "2".to_owned(), leads, primary: false, unwell: false })
    }

    /// Everybody is up on version 1 and is offered version 2.
    fn all_want(topology: &Topology) -> Rollout {
        let members: BTreeSet<String> = topology.nodes.iter().map(|n| n.name.clone()).collect();
        let leads = |name: &str| name == "hub-2" || name == "db-1";
        let nodes = members.iter().map(|m| (m.clone(), wants(leads(m)))).collect();
        Rollout { nodes, members, ..Rollout::default() }
    }

    #[test]
    fn one_after_the_other_and_whoever_leads_last() {
        let topology = topology();
        let mut fleet = all_want(&topology);
        let mut order = Vec::new();
        while order.len() < 8 {
            let may: Vec<String> = (fleet.nodes.iter())
                .filter(|(slot, report)| matches!(fleet.decide(&topology, slot, report), Verdict::Take(_)))
                .map(|(slot, _)| slot.clone())
                .collect();
            let slot = may.first().unwrap_or_else(|| panic!("nobody may go after {order:?}")).clone();
            let turn = UpdateLock { slot: slot.clone(), from: "1".to_owned(), to: "2".to_owned() };
            fleet.turn = Some(turn);
            fleet.held = true;
            // Everybody else waits for it; it itself may ask again.
            for (other, report) in &fleet.nodes {
                let verdict = fleet.decide(&topology, other, report);
                assert_eq!(matches!(verdict, Verdict::Go), *other == slot, "{other}: {verdict:?}");
                assert!(!matches!(verdict, Verdict::Take(_)), "{other}");
            }
            let starting = says("2", UpdateState::Starting);
            assert!(matches!(fleet.decide(&topology, &slot, &starting), Verdict::Wait(_)));
            let done = says("2", UpdateState::Serving);
            assert_eq!(fleet.decide(&topology, &slot, &done), Verdict::Release);
            fleet.turn = None;
            fleet.nodes.insert(slot.clone(), done);
            order.push(slot);
        }
        assert_eq!(order, ["monitor-1", "app-1", "app-2", "db-2", "db-1", "hub-1", "hub-3", "hub-2"]);
    }

    /// In quick-ha one machine may hold the VIP and another have the primary.
    #[test]
    fn the_primary_changes_hands_once() {
        let toml = b"name=\"x\"\n[groups]\nhub.count=3\nhub.roles=[\"hub\",\"db\"]\n";
        let topology = Topology::of(&Fleet::parse("f", toml).unwrap());
        let mut fleet = all_want(&topology);
        let primary =
            says("1", UpdateState::Available { image: "2".into(), leads: true, primary: true, unwell: false });
        fleet.nodes.insert("hub-1".into(), primary.clone());
        let holder = wants(true);
        assert_eq!(fleet.decide(&topology, "hub-1", &primary), Verdict::Wait("hub-2 goes first".into()));
        assert_eq!(fleet.decide(&topology, "hub-2", &holder), Verdict::Wait("hub-3 goes first".into()));
        fleet.nodes.insert("hub-3".into(), says("2", UpdateState::Serving));
        assert!(matches!(fleet.decide(&topology, "hub-2", &holder), Verdict::Take(_)));
        fleet.nodes.insert("hub-2".into(), says("2", UpdateState::Serving));
        assert!(matches!(fleet.decide(&topology, "hub-1", &primary), Verdict::Take(_)));
        // Of an agent before it, it is known that it leads.
        let older: UpdateState = serde_json::from_str(r#"{"wants":{"image":"2","leads":true}}"#).unwrap();
        assert_eq!(older, holder.doing);
    }

    #[test]
    fn the_first_failure_stops_everybody() {
        let topology = topology();
        let mut fleet = all_want(&topology);
        fleet.turn = Some(UpdateLock { slot: "app-1".into(), from: "1".into(), to: "2".into() });
        fleet.held = true;
        let back = says("1", UpdateState::RolledBack { from: "2".into() });
        // Only who has the turn says so, and of the version it has it for.
        assert_eq!(fleet.decide(&topology, "app-2", &back), Verdict::Wait(String::new()));
        let other = says("1", UpdateState::RolledBack { from: "3".into() });
        assert_eq!(fleet.decide(&topology, "app-1", &other), Verdict::Release);
        let Verdict::Deny { image, why } = fleet.decide(&topology, "app-1", &back) else { panic!() };
        assert_eq!(image, "2");
        fleet.denied.insert(image, why);
        fleet.turn = None;
        assert_eq!(fleet.decide(&topology, "app-1", &back), Verdict::Wait(String::new()));
        fleet.nodes.insert("app-1".into(), back);
        for (slot, report) in &fleet.nodes {
            assert!(matches!(fleet.decide(&topology, slot, report), Verdict::Wait(_)), "{slot}");
        }
        // A version after it is another matter.
        let next = says("1", UpdateState::Available { image: "3".into(), leads: false, primary: false, unwell: false });
        fleet.nodes.insert("app-2".into(), next.clone());
        assert!(matches!(fleet.decide(&topology, "monitor-1", &next), Verdict::Take(_)));
    }

    /// A node that was taken over asks for a version that was never published, to deny it.
    #[test]
    fn one_node_alone_has_no_turn_for_a_version() {
        let topology = topology();
        let mut fleet = all_want(&topology);
        for unwell in [false, true] {
            let made_up =
                says("1", UpdateState::Available { image: "999".into(), leads: false, primary: false, unwell });
            let verdict = fleet.decide(&topology, "monitor-1", &made_up);
            assert!(matches!(&verdict, Verdict::Wait(why) if why.contains("--allow 999")), "{verdict:?}");
        }
        let made_up =
            says("1", UpdateState::Available { image: "999".into(), leads: false, primary: false, unwell: false });
        // One that is no member says it, too.
        fleet.nodes.insert("stranger-1".into(), made_up.clone());
        assert!(matches!(fleet.decide(&topology, "monitor-1", &made_up), Verdict::Wait(_)));
        fleet.allowed.insert("999".into());
        assert!(matches!(fleet.decide(&topology, "monitor-1", &made_up), Verdict::Take(_)));
        // A fleet of one node has no other.
        let alone = Rollout { members: ["hub-1".to_owned()].into(), ..Rollout::default() };
        assert!(matches!(alone.decide(&topology, "hub-1", &made_up), Verdict::Take(_)));
    }

    #[test]
    fn a_skipped_node_holds_nobody_up_and_has_no_turn() {
        let topology = topology();
        for doing in [None, Some(UpdateState::Starting)] {
            let mut fleet = all_want(&topology);
            let unwell = UpdateState::Available { image: "2".into(), leads: false, primary: false, unwell: true };
            for doing in [doing.clone(), Some(unwell)] {
                match &doing {
                    Some(doing) => drop(fleet.nodes.insert("db-2".into(), says("1", doing.clone()))),
                    None => drop(fleet.nodes.remove("db-2")),
                }
                fleet.skipped.clear();
                assert!(matches!(fleet.decide(&topology, "monitor-1", &wants(false)), Verdict::Wait(_)), "{doing:?}");
                fleet.skipped.insert("db-2".into(), 1);
                assert!(matches!(fleet.decide(&topology, "monitor-1", &wants(false)), Verdict::Take(_)), "{doing:?}");
            }
            assert!(
                matches!(fleet.decide(&topology, "db-2", &wants(false)), Verdict::Wait(why) if why.contains("skips"))
            );
        }
    }

    #[test]
    fn a_rollout_is_blocked_where_nodes_wait_and_none_changes() {
        let topology = topology();
        let mut fleet = all_want(&topology);
        assert!(fleet.is_blocked());
        fleet.paused = Some("month's end".into());
        assert!(!fleet.is_blocked());
        fleet.paused = None;
        fleet.turn = Some(UpdateLock { slot: "app-1".into(), from: "1".into(), to: "2".into() });
        assert!(!fleet.is_blocked() && !Rollout::default().is_blocked());
        // Hubs of the version before say nothing of what is new.
        let old = r#"{"turn":null,"held":false,"paused":null,"denied":{},"nodes":{},"members":["hub-1"]}"#;
        assert!(serde_json::from_str::<Rollout>(old).unwrap().skipped.is_empty());
    }

    #[test]
    fn who_does_not_come_back_is_a_failure_too() {
        let topology = topology();
        let mut fleet = all_want(&topology);
        fleet.turn = Some(UpdateLock { slot: "app-1".into(), from: "1".into(), to: "2".into() });
        fleet.nodes.remove("app-1");
        let verdict = fleet.decide(&topology, "hub-1", &says("1", UpdateState::Serving));
        assert!(matches!(verdict, Verdict::Deny { ref image, .. } if image == "2"), "{verdict:?}");
        // If it has come back after all, it is none.
        assert_eq!(fleet.decide(&topology, "app-1", &says("2", UpdateState::Serving)), Verdict::Release);
    }

    /// Version 2 came up on app-1 and was taken for a good one, without doing its work; 3 mends that.
    #[test]
    fn who_is_not_well_takes_what_may_mend_it_and_goes_first() {
        let topology = topology();
        let mut fleet = all_want(&topology);
        fleet.turn = Some(UpdateLock { slot: "app-1".into(), from: "1".into(), to: "2".into() });
        fleet.held = true;
        let unwell =
            |image: &str| UpdateState::Available { image: image.into(), leads: false, primary: false, unwell: true };
        let report = says("2", unwell("3"));
        fleet.nodes.insert("app-1".into(), report.clone());
        let Verdict::Deny { image, why } = fleet.decide(&topology, "app-1", &report) else { panic!() };
        assert_eq!((image.as_str(), why.as_str()), ("2", "with it app-1 is not well"));
        fleet.denied.insert(image, why);
        fleet.turn = None;
        let of_three = UpdateState::Available { image: "3".into(), leads: false, primary: false, unwell: false };
        let monitor = says("1", of_three);
        assert_eq!(fleet.decide(&topology, "monitor-1", &monitor), Verdict::Wait("app-1 is not well".into()));
        // Another one like it is nothing to wait for; one that starts is.
        fleet.nodes.insert("hub-1".into(), says("1", unwell("3")));
        assert!(matches!(fleet.decide(&topology, "app-1", &report), Verdict::Take(turn) if turn.to == "3"));
        fleet.nodes.insert("db-1".into(), says("1", UpdateState::Starting));
        assert_eq!(fleet.decide(&topology, "app-1", &report), Verdict::Wait("db-1 is starting".into()));
        // To an older hub it is one that wants.
        let said = serde_json::to_string(&unwell("3")).unwrap();
        assert_eq!(said, r#"{"wants":{"image":"3","leads":false,"unwell":true}}"#);
    }

    #[test]
    fn nobody_goes_while_another_is_missing_or_the_operator_says_no() {
        let topology = topology();
        let mut fleet = all_want(&topology);
        let monitor = |fleet: &Rollout| fleet.decide(&topology, "monitor-1", &wants(false));
        assert!(matches!(monitor(&fleet), Verdict::Take(_)));
        fleet.nodes.insert("db-2".into(), says("1", UpdateState::Starting));
        assert_eq!(monitor(&fleet), Verdict::Wait("db-2 is starting".into()));
        fleet.nodes.remove("db-2");
        assert_eq!(monitor(&fleet), Verdict::Wait("db-2 is silent".into()));
        // A slot that nobody has taken yet is not missed.
        fleet.members.remove("db-2");
        assert!(matches!(monitor(&fleet), Verdict::Take(_)));
        fleet.paused = Some("month's end".into());
        assert!(matches!(monitor(&fleet), Verdict::Wait(why) if why.contains("month's end")));
    }
}
