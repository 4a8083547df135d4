//! Rolling updates: one node at a time, least disruptive first. The first failure stops the rollout.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::signed::OrderScope;
use crate::topology::{Node, Topology};
use crate::version::compare_versions;

/// `POST /v1/turn`: version and state of a member. Every node sends it periodically. A node that stops reporting blocks
/// the rollout.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Report {
    /// Format of the message: [`crate::PROTOCOL`].
    pub version: u16,
    /// Version of the image that runs.
    pub image: String,
    /// State of the node.
    pub doing: UpdateState,
}

/// State of a node in a rollout.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum UpdateState {
    /// The node has not passed its health checks since this boot.
    Starting,
    /// The node is healthy, and the update server has no newer image.
    Serving,
    /// The update server has a newer image.
    #[serde(rename = "wants")]
    Available {
        /// Version of the newer image.
        image: String,
        /// The node holds the VIP or has the primary. Other nodes with its roles change first.
        leads: bool,
        /// The node has the primary, whose change disrupts clients most. Older agents leave the field out.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        primary: bool,
        /// The boot counts as good, but one of the node's roles has been down for a long time. Other nodes wait for
        /// this node, and this node waits for the newer image.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        unwell: bool,
    },
    /// A newer image did not come up, and the node returned to its older image.
    #[serde(rename = "went_back")]
    RolledBack {
        /// Version that did not come up.
        from: String,
    },
}

impl UpdateState {
    fn is_unwell(&self) -> bool {
        matches!(self, Self::Available { unwell: true, .. })
    }

    /// Whether the node serves, with whatever version.
    #[must_use]
    pub fn is_well(&self) -> bool {
        !self.is_unwell() && *self != Self::Starting
    }

    /// Returns how much the node's change disrupts clients. Of two nodes with the same roles, the one with the higher
    /// number changes later.
    fn disruption(&self) -> u8 {
        match self {
            Self::Available { primary: true, .. } => 2,
            Self::Available { leads: true, .. } => 1,
            _ => 0,
        }
    }
}

/// A hub's reply to a [`Report`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpdateDecision {
    /// Whether the node has the update lock, and may change to the newer image.
    #[serde(rename = "go")]
    pub granted: bool,
    /// What the node waits for, as a text; empty if the node has no newer image.
    pub why: String,
}

/// The update lock: the node that changes its image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct UpdateLock {
    /// Slot of the node.
    pub slot: String,
    /// Version that the node leaves.
    pub from: String,
    /// Version that the node installs.
    pub to: String,
}

/// `POST /v1/rollout`: an order of the operator, signed with the fleet key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RolloutRequest {
    /// Format of the message: [`crate::PROTOCOL`].
    pub version: u16,
    /// Name of the fleet.
    pub fleet: String,
    /// The order.
    pub order: RolloutOrder,
    /// Path, hub and time of the order. Hubs of this version require it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scope: Option<OrderScope>,
}

/// What the operator orders.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RolloutOrder {
    /// Return the state of the rollout, and change nothing.
    Tell,
    /// Pause: no node gets the update lock. A node that has it finishes its change.
    Pause {
        /// Reason, for the operators.
        why: String,
    },
    /// End a pause.
    Resume,
    /// Allow a version that was denied, or that only one node is offered.
    Allow {
        /// The version.
        version: String,
    },
    /// No node waits for this node, and it gets no update lock, until it reports that it is well.
    Skip {
        /// Slot of the node.
        node: String,
    },
}

/// Roles whose work moves to another node when a node restarts or is drained.
const SERVING: [&str; 3] = ["hub", "db", "app"];

/// State of a rollout, from etcd.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Rollout {
    /// The update lock, if a node has it.
    pub turn: Option<UpdateLock>,
    /// Whether the lease of the update lock has not expired.
    pub held: bool,
    /// Reason of the pause; `None` if the rollout is not paused.
    pub paused: Option<String>,
    /// Denied versions, with the reason.
    pub denied: BTreeMap<String, String>,
    /// Last report of each node. Old reports expire.
    pub nodes: BTreeMap<String, Report>,
    /// Slots that have an owner.
    pub members: BTreeSet<String>,
    /// Versions that the operator allowed, even if only one node is offered them.
    #[serde(default)]
    pub allowed: BTreeSet<String>,
    /// Slots that the operator skips, with the time of the order in seconds since 1970.
    #[serde(default)]
    pub skipped: BTreeMap<String, u64>,
    /// Drained slots, with the time since when the hubs know of the drain, in seconds since 1970.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub drained: BTreeMap<String, u64>,
    /// Epoch of each slot's record. Hubs of the previous version leave it out.
    #[serde(default)]
    pub epochs: BTreeMap<String, u64>,
    /// TLS key of each slot's owner, as in its record. Hubs of the previous version leave it out.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub tls_keys: BTreeMap<String, String>,
}

/// A hub's decision on a report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The node has to wait, for this reason.
    Wait(String),
    /// The node has the update lock already.
    Go,
    /// The update lock is free, and the node may take it.
    Take(UpdateLock),
    /// The node's change is complete, and the hub releases the update lock.
    Release,
    /// The hub denies this version to all nodes, and releases the update lock.
    Deny {
        /// The version.
        image: String,
        /// Reason, for the operators.
        why: String,
    },
}

impl Rollout {
    /// Decides on the report of the node in `slot`.
    ///
    /// # Examples
    ///
    /// Both nodes are offered version 2. The application server changes before the database.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use fleet::{PROTOCOL, Report, Rollout, UpdateState, Verdict};
    ///
    /// let toml = b"name = \"acme\"\n[groups]\napp.count = 1\ndb.count = 1\n";
    /// let topology = fleet::Topology::from_fleet(&fleet::Fleet::parse("fleet.toml", toml)?);
    /// let offered = UpdateState::Available { image: "2".to_owned(), leads: false, primary: false, unwell: false };
    /// let report = Report { version: PROTOCOL, image: "1".to_owned(), doing: offered };
    /// let rollout = Rollout {
    ///     nodes: ["app-1", "db-1"].map(|slot| (slot.to_owned(), report.clone())).into(),
    ///     members: ["app-1", "db-1"].map(str::to_owned).into(),
    ///     ..Rollout::default()
    /// };
    /// let Verdict::Take(lock) = rollout.decide(&topology, "app-1", &report) else { panic!("app-1 waits") };
    /// assert_eq!((lock.from.as_str(), lock.to.as_str()), ("1", "2"));
    /// assert_eq!(rollout.decide(&topology, "db-1", &report), Verdict::Wait("app-1 goes first".to_owned()));
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn decide(&self, topology: &Topology, slot: &str, report: &Report) -> Verdict {
        if let Some(turn) = self.turn.as_ref().filter(|t| t.slot == slot) {
            return match &report.doing {
                // A node can only deny the version of its lock: otherwise a compromised node could deny any version to
                // the fleet.
                UpdateState::RolledBack { from } if *from == turn.to => {
                    let why = format!("it did not come up on {slot}, which went back to {}", report.image);
                    Verdict::Deny { image: from.clone(), why }
                }
                UpdateState::Available { image, .. } if *image == turn.to && self.held => Verdict::Go,
                // The version came up, so the node did not roll back, but a role of the node is down.
                UpdateState::Available { unwell: true, .. } if report.image == turn.to => {
                    Verdict::Deny { image: turn.to.clone(), why: format!("with it {slot} is not well") }
                }
                UpdateState::Starting if self.held => {
                    Verdict::Wait("the health checks of this boot are not complete".to_owned())
                }
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

    /// Returns the reason why a node has to wait; `None` if it may change.
    fn obstacle(&self, topology: &Topology, slot: &str, image: &str, doing: &UpdateState) -> Option<String> {
        if let Some(why) = &self.paused {
            return Some(format!("the rollout is paused: {why}"));
        }
        if let Some(why) = self.denied.get(image) {
            return Some(format!("version {image} is denied: {why}"));
        }
        if let Some(turn) = &self.turn {
            return Some(format!("{} changes to version {} now", turn.slot, turn.to));
        }
        if self.skipped.contains_key(slot) {
            return Some(format!("the operator skips {slot} until it is well"));
        }
        let others = || self.members.iter().filter(|m| *m != slot && !self.skipped.contains_key(*m));
        // While one node is missing, a second one must not restart.
        if let Some(silent) = others().find(|m| !self.nodes.contains_key(*m)) {
            return Some(format!("{silent} is silent"));
        }
        let reports = || others().filter_map(|m| Some((m, self.nodes.get(m)?)));
        if let Some((starting, _)) = reports().find(|(_, r)| r.doing == UpdateState::Starting) {
            return Some(format!("{starting} is starting"));
        }
        if let Some(why) = self.last_that_serves(topology, slot) {
            return Some(why);
        }
        if !self.is_offered(slot, image) {
            return Some(format!(
                "no other node is offered version {image}, or runs it; to allow it: `bakehouse rollout --allow {image}`"
            ));
        }
        // Two unwell nodes would wait for each other, so an unwell node does not wait for them.
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
    /// Returns the reason why a node must not restart because all other nodes with one of its roles are drained. A
    /// drained node itself may restart.
    fn last_that_serves(&self, topology: &Topology, slot: &str) -> Option<String> {
        let node = topology.node(slot).filter(|_| !self.drained.contains_key(slot))?;
        let members = || self.members.iter().filter(|member| *member != slot);
        SERVING.into_iter().filter(|role| node.has_role(role)).find_map(|role| {
            let has_role = |member: &&String| topology.node(member).is_some_and(|n| n.has_role(role));
            let mut others = members().filter(has_role).peekable();
            let first = (*others.peek()?).clone();
            let all_drained = others.all(|other| self.drained.contains_key(other));
            all_drained.then(|| {
                format!("{slot} is the last {role} node that is not drained; to continue: `bakehouse undrain {first}`")
            })
        })
    }

    /// Whether another member is offered this version, or runs it, or the operator allowed it. Otherwise one
    /// compromised node could ask for any version, and then deny it to the fleet.
    fn is_offered(&self, slot: &str, image: &str) -> bool {
        let wanted =
            |doing: &UpdateState| matches!(doing, UpdateState::Available { image: wanted, .. } if wanted == image);
        let others = || self.nodes.iter().filter(|(other, _)| *other != slot && self.members.contains(*other));
        self.allowed.contains(image)
            || self.members.iter().all(|member| member == slot)
            || others().any(|(_, report)| report.image == image || wanted(&report.doing))
    }

    /// Whether nodes wait for a newer version, no node changes, and the operator has not paused the rollout.
    #[must_use]
    pub fn is_blocked(&self) -> bool {
        let wants = |report: &Report| matches!(report.doing, UpdateState::Available { .. });
        self.turn.is_none() && self.paused.is_none() && self.nodes.values().any(wants)
    }
}

fn lost(turn: &UpdateLock) -> Verdict {
    Verdict::Deny { image: turn.to.clone(), why: format!("{} did not come back with it in time", turn.slot) }
}

/// Returns the position of a node's roles in a rollout. Nodes with a lower number disrupt clients less and change
/// first.
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
mod tests;
