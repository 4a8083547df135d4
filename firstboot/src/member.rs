//! What a node does for the mesh as long as it runs: follows who is where, and, as a hub, lets
//! others in.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use fleet::{Introduction, MeshKey, Node, PROTOCOL, Topology, encoding};

use crate::client::backoff::{Backoff, round};
use crate::client::etcd::Etcd;
use crate::error::{Error, Result};
use crate::host::console::say;
use crate::host::journal::Event;
use crate::hub::api::Hub;
use crate::hub::claims::SlotAllocator;
use crate::hub::etcd_access::{EtcdAccess, ROOT};
use crate::hub::fence::{self, Fence};
use crate::hub::listener::serve;
use crate::hub::orders::OrderLog;
use crate::hub::records::Owners;
use crate::hub::rollout;
use crate::mesh::Mesh;
use crate::node::hubs::Hubs;
use crate::node::identity::Identity;
use crate::node::image::Image;
use crate::node::neighbours::PeerTable;
use crate::node::state::StateDir;
use crate::node::trust::{Decision, Heard, Known, Standing, decide};
use crate::update::Updates;

/// How soon it asks again where the hubs do not agree yet.
const SOON: Duration = Duration::from_secs(3);
/// By then every node that is up has asked, and has been answered.
pub const ALL_HAVE_ASKED: Duration = Duration::from_secs(45);
/// What node_exporter reads of the rollout.
const METRICS: &str = "/run/bakehouse/metrics/rollout.prom";
/// How often a hub looks whether another machine has its slot, as far as it has heard.
const LOOK_FOR_SUCCESSOR: Duration = Duration::from_secs(1);
/// etcd's port for clients.
const ETCD: u16 = 2379;

/// A node of the fleet, from the moment it knows its slot.
pub struct Member {
    topology: Topology,
    node: Node,
    version: String,
    who: Identity,
    hubs: Hubs,
    /// Where it keeps what it knows.
    dir: PathBuf,
    built: u64,
}

impl Member {
    /// # Errors
    /// What the node keeps does not fit together.
    pub fn new(who: Identity, node: &Node, image: &Image, dir: &StateDir) -> Result<Self> {
        let patroni = if node.has_role("db") { who.state.secrets.etcd_patroni.as_str() } else { "" };
        let hubs =
            Hubs::of(&image.topology, &who.state.endpoints, &node.name, who.client()?).with_etcd_patroni(patroni);
        Ok(Self {
            topology: image.topology.clone(),
            node: node.clone(),
            version: image.info.version.clone(),
            hubs: hubs.known_by(who.neighbourhood.clone()).with_root(&who.state.root).over_mesh(),
            who,
            dir: dir.path().to_owned(),
            built: 0,
        })
    }

    /// When the image was built, in seconds since 1970.
    #[must_use]
    pub fn built_at(self, built: u64) -> Self {
        Self { built, ..self }
    }

    /// Brings the mesh up with what is known, without asking anybody.
    ///
    /// # Errors
    /// The kernel says no.
    pub async fn mesh(&self) -> Result<Mesh> {
        let state = &self.who.state;
        let mut mesh = Mesh::new(&self.topology, &self.node, &state.endpoints, &self.who.keys)?;
        mesh.apply(&self.who.neighbourhood).await?;
        Ok(mesh)
    }

    /// Runs this node's part until the process ends; `slow` is how much longer time-outs are on this machine.
    ///
    /// # Errors
    /// The kernel refuses the mesh, the port of the join API is in use, a hub's state has no issuer, or another
    /// node has this one's slot.
    pub async fn keep(self, mesh: Mesh, updates: &Updates<'_>, slow: u32) -> Result<()> {
        if self.node.hub == 0 {
            Box::pin(self.keep_node(mesh, updates)).await
        } else {
            Box::pin(self.keep_hub(mesh, updates, slow)).await
        }
    }

    /// The part of a node that is not a hub.
    async fn keep_node(&self, mesh: Mesh, updates: &Updates<'_>) -> Result<()> {
        let neighbourhood = &self.who.neighbourhood;
        let introduction = self.introduction()?;
        let kept = mesh.keep(neighbourhood.clone());
        let asked = follow_hubs(&self.hubs, neighbourhood, (&self.node.name, self.who.state.epoch));
        let introduced = async {
            if !self.topology.voters.contains(&self.node.name) {
                return std::future::pending().await;
            }
            introduce_voter(&self.hubs, neighbourhood, &self.node.name, introduction).await
        };
        let updated = updates.keep(async |report| self.hubs.turn(report).await);
        tokio::try_join!(kept, asked, introduced, updated).map(|((), (), (), ())| ())
    }

    /// The part of a hub.
    async fn keep_hub(&self, mesh: Mesh, updates: &Updates<'_>, slow: u32) -> Result<()> {
        let Self { topology, node, version, who, dir, .. } = self;
        let (own_epoch, secrets, neighbourhood) = (who.state.epoch, &who.state.secrets, &who.neighbourhood);
        let introduction = self.introduction()?;
        let tls = who.client()?;
        let tls_key = encoding::encode(who.keys.tls.public()?.as_bytes());
        let etcd = || Etcd::new(members(topology, node), tls.clone()).with_user(ROOT, &secrets.etcd_root);
        let fencing = etcd().with_patience(fence::ANSWER * slow);
        let desk = SlotAllocator::new(etcd(), topology.clone(), &node.name).with_records(dir).built_at(self.built);
        neighbourhood.learn(&node.name, introduction.mesh_key);

        let kept = mesh.keep(neighbourhood.clone());
        // On connections of its own: they belong to the API's thread.
        let served = self.serve_api(desk.beside(etcd()));
        let introduced = self.introduce_hub(&desk, &introduction);
        let registered = register(&desk, &node.name, (introduction.mesh_key, &tls_key), version);
        let followed = self.follow_claims(&desk);
        let recorded = async {
            desk.keep_records(dir).await;
            Ok(())
        };
        let exported = self.export_rollout(&desk);
        // Apart from what follows etcd, which may wait for a member that hangs.
        let replaced = until_replaced(&desk, &node.name, (&tls_key, own_epoch));
        let access = EtcdAccess { desk: &desk, topology, secrets, slot: &node.name, tls_key: &tls_key };
        let access = access.keep();
        let fenced_off = async {
            let (etcd, neighbourhood) = (&fencing, neighbourhood.as_ref());
            Box::pin(Fence { etcd, topology, own: node, neighbourhood, slow }.keep()).await
        };
        let updated = updates.keep(async |report| rollout::report(desk.etcd(), topology, &node.name, report).await);
        tokio::try_join!(
            kept, served, introduced, registered, followed, recorded, exported, replaced, access, fenced_off, updated
        )
        .map(|((), (), (), (), (), (), (), (), (), (), ())| ())
    }

    /// What this node tells hubs of itself.
    fn introduction(&self) -> Result<Introduction> {
        let mesh_key = self.who.keys.mesh_public()?;
        Ok(Introduction { version: PROTOCOL, mesh_key, epoch: self.who.state.epoch })
    }

    /// Serves the join API.
    async fn serve_api(&self, desk: SlotAllocator) -> Result<()> {
        let state = &self.who.state;
        let issuer = state.issuer.clone().ok_or_else(|| {
            let text =
                format!("{}: state.json of a hub has no issuer; wipe /var and give it a new ticket", self.node.name);
            Error::Configuration(text)
        })?;
        let hub = Hub {
            topology: self.topology.clone(),
            root: state.root.clone(),
            issuer,
            secrets: state.secrets.clone(),
            epoch: state.epoch,
            desk: Arc::new(desk),
            neighbourhood: self.who.neighbourhood.clone(),
            orders: OrderLog::default(),
        };
        let own = fleet_https::Identity { cert: &state.cert, key: self.who.keys.tls.pem() };
        let at = SocketAddr::from((Ipv4Addr::UNSPECIFIED, self.topology.mesh.port));
        serve(Arc::new(hub), at, fleet_https::server(&state.root, own)?).await
    }

    /// Introduces this hub to the others, again and again: founders find each other before there is an etcd.
    async fn introduce_hub(&self, desk: &SlotAllocator, introduction: &Introduction) -> Result<()> {
        let Self { topology, node, hubs, .. } = self;
        let neighbourhood = &self.who.neighbourhood;
        let plan: Vec<String> = topology.hubs.iter().map(|hub| hub.name.clone()).collect();
        let mut pause = Backoff::default();
        loop {
            let owners = desk.owners();
            // A key that etcd has is known for good; an introduction may be of an older one. What
            // was on the disk may be old itself.
            let mut answers = hubs.introduce(introduction, |slot| desk.has_heard() && owners.contains_key(slot)).await;
            // Where all are known, they are still asked: a founder that was cut off while another
            // machine took its place hears of it from nowhere else.
            if answers.is_empty() {
                answers = hubs.answers().await;
            }
            let (pins, keys) = (neighbourhood.pins(), neighbourhood.keys());
            // Before there are pins: it is to be stopped, and knows nothing.
            answers.retain(|a| {
                let key = a.peers.keys.get(&a.hub);
                !pins.is_empty() || !key.is_some_and(|key| neighbourhood.is_stranger(&a.hub, *key))
            });
            let own = (node.name.as_str(), introduction.epoch);
            let known = Known { own, plan: &plan, pins: &pins, keys: &keys, is_new: owners.is_empty() };
            let decision = decide(&known, &answers);
            if let Some(why) = sent_away(hubs, &node.name, &decision).await {
                return Err(why);
            }
            // A founder that was off while the others had new keys does not reach etcd without them.
            if decision.heard == Heard::Confirmed && !desk.has_heard() {
                neighbourhood.apply(&decision);
            }
            for (slot, key) in answers.iter().flat_map(|a| &a.peers.keys).filter(|(slot, _)| **slot != node.name) {
                if !owners.contains_key(slot) {
                    neighbourhood.learn(slot, *key);
                }
            }
            tokio::time::sleep(pause.next_delay().min(round())).await;
        }
    }

    /// Follows the owners of all slots in etcd.
    async fn follow_claims(&self, desk: &SlotAllocator) -> Result<()> {
        let mut pause = Backoff::default();
        loop {
            match desk.follow(|owners| take_in(&self.topology, &self.who.neighbourhood, owners)).await {
                // It ends each minute.
                Ok(()) => pause = Backoff::default(),
                Err(e) => println!("{e}"),
            }
            tokio::time::sleep(pause.next_delay()).await;
        }
    }

    /// Exports the rollout as metrics, on the hub that has this role.
    async fn export_rollout(&self, desk: &SlotAllocator) -> Result<()> {
        if self.node.hub > 0 && self.node.has_role(fleet::UPDATE) {
            rollout::export(desk.etcd(), Path::new(METRICS)).await;
        }
        Ok(())
    }
}

/// Enters a hub as its slot's owner, and gives it its vote.
async fn register(desk: &SlotAllocator, slot: &str, keys: (MeshKey, &str), version: &str) -> Result<()> {
    let mut pause = Backoff::default();
    loop {
        match desk.register(slot, keys.0, keys.1, version).await {
            Ok(Ok(_)) => match desk.vote(slot).await {
                Ok(()) => return Ok(()),
                Err(e) => println!("{e}"),
            },
            Ok(Err(no)) if !no.reason.passes() => return Err(Error::Configuration(no.text)),
            Ok(Err(no)) => println!("{}", no.text),
            Err(e) => println!("{e}"),
        }
        tokio::time::sleep(pause.next_delay()).await;
    }
}

/// Ends when another machine has this hub's slot, or the slot has no owner any more, as far as the hub has heard.
async fn until_replaced(desk: &SlotAllocator, slot: &str, own: (&str, u64)) -> Result<()> {
    loop {
        // By etcd's word, not by what was on the disk: that may be from before this node's new keys.
        let fenced_since = desk.fenced(slot, own.0).filter(|epoch| *epoch >= own.1);
        if let Some(epoch) = fenced_since.filter(|_| desk.has_heard()) {
            let left = desk.is_vacant(slot).then(|| Error::Left { slot: slot.to_owned() });
            return Err(left.unwrap_or_else(|| fenced(slot, epoch)));
        }
        tokio::time::sleep(LOOK_FOR_SUCCESSOR).await;
    }
}

/// etcd's members, this node's own first.
fn members(topology: &Topology, node: &Node) -> Vec<(String, u16)> {
    let mut members: Vec<(String, u16)> = Vec::new();
    if topology.voters.contains(&node.name) {
        members.push(("127.0.0.1".to_owned(), ETCD));
    }
    let others = topology.voters.iter().filter(|v| **v != node.name).filter_map(|v| topology.node(v));
    members.extend(others.map(|n| (n.address.to_string(), ETCD)));
    members
}

/// Takes etcd's word into what a founder knows of the others.
pub fn take_in(topology: &Topology, neighbourhood: &PeerTable, owners: &Owners) {
    let held = || owners.iter().filter(|(_, record)| !record.vacant);
    let keys = held().map(|(slot, record)| (slot.clone(), record.mesh_key)).collect();
    let is_hub = |slot: &str| topology.node(slot).is_some_and(|n| n.hub > 0);
    let hubs = held().filter(|(slot, _)| is_hub(slot)).map(|(slot, record)| (slot.clone(), record.tls_key.clone()));
    // Founders that etcd does not know yet have introduced themselves.
    let founder = |slot: &str| topology.node(slot).is_some_and(|n| topology.is_founder(n));
    neighbourhood.are_granted(&keys, hubs.collect(), |slot| founder(slot) && !owners.contains_key(slot));
}

/// Introduces a voter that is not a hub to the hubs, again and again: its etcd and theirs meet in the mesh, so they
/// have to know its key before there is a quorum that could tell them, and they enter it in etcd.
///
/// # Errors
/// Another machine has the node's slot, or it is to leave.
async fn introduce_voter(hubs: &Hubs, neighbourhood: &PeerTable, slot: &str, own: Introduction) -> Result<()> {
    let plan = hubs.slots();
    let mut pause = Backoff::default();
    loop {
        let answers = hubs.introduce(&own, |_| false).await;
        let (pins, keys) = (neighbourhood.pins(), neighbourhood.keys());
        let known = Known { own: (slot, own.epoch), plan: &plan, pins: &pins, keys: &keys, is_new: pins.is_empty() };
        let decision = decide(&known, &answers);
        if let Some(why) = sent_away(hubs, slot, &decision).await {
            return Err(why);
        }
        // One hub is enough for a first quorum of two; keys that are known change only as the hubs agree.
        for (hub, key) in answers.iter().flat_map(|a| &a.peers.keys).filter(|(hub, _)| *hub != slot) {
            if !keys.contains_key(hub) {
                neighbourhood.learn(hub, *key);
            }
        }
        tokio::time::sleep(pause.next_delay().min(round())).await;
    }
}

/// Keeps a worker in step with what the hubs agree on, until it is sent away.
///
/// # Errors
/// Another machine has the node's slot, or it is to leave.
pub async fn follow_hubs(hubs: &Hubs, neighbourhood: &PeerTable, own: (&str, u64)) -> Result<()> {
    // Answers that one hub alone gives are asked again soon, a few times.
    let mut open = 0;
    // This node is no hub: these are all of them.
    let plan = hubs.slots();
    loop {
        let decision = hubs.round(|answers| {
            let (pins, keys) = (neighbourhood.pins(), neighbourhood.keys());
            decide(&Known { own, plan: &plan, pins: &pins, keys: &keys, is_new: false }, answers)
        });
        let decision = decision.await;
        if let Some(why) = sent_away(hubs, own.0, &decision).await {
            return Err(why);
        }
        neighbourhood.apply(&decision);
        open = if decision.is_open { open + 1 } else { 0 };
        tokio::time::sleep(if (1..=3).contains(&open) { SOON } else { round() }).await;
    }
}

/// Why this node can't stay, if it is not the slot's owner any more, or is to leave and the fleet
/// can do without its vote: until then it is what it was.
async fn sent_away(hubs: &Hubs, slot: &str, decision: &Decision) -> Option<Error> {
    match decision.standing {
        Standing::Owner => None,
        Standing::Left => Some(Error::Left { slot: slot.to_owned() }),
        Standing::Fenced(epoch) => Some(fenced(slot, epoch)),
        Standing::Leaving => match hubs.leave().await {
            Ok(()) => Some(Error::Leaving),
            Err(e) => {
                println!("{e}");
                None
            }
        },
    }
}

fn fenced(slot: &str, epoch: u64) -> Error {
    say(Event::Fenced, &format!("another machine is {slot} now (epoch {epoch})"));
    Error::Fenced { slot: slot.to_owned(), epoch }
}
