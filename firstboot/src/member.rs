//! Tasks of a running node: it follows the peers of the mesh and, as a hub, serves the join API.

mod requests;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use fleet::{Introduction, MeshKey, Node, PROTOCOL, Topology, encoding};
use tracing::warn;

use crate::client::backoff::{Backoff, round};
use crate::client::etcd::Etcd;
use crate::error::{Error, Result};
use crate::host::console::log_event;
use crate::host::journal::Event;
use crate::host::screen;
use crate::hub::api::Hub;
use crate::hub::audit;
use crate::hub::claims::SlotAllocator;
use crate::hub::etcd_access::{EtcdAccess, ROOT};
use crate::hub::fence::{self, Fence};
use crate::hub::listener::serve;
use crate::hub::orders::OrderLog;
use crate::hub::records::Owners;
use crate::hub::rollout;
use crate::hub::web::{WebKeeper, WebPaths};
use crate::mesh::Mesh;
use crate::node::hubs::Hubs;
use crate::node::identity::Identity;
use crate::node::image::Image;
use crate::node::neighbours::PeerTable;
use crate::node::operator_peers::OperatorPeers;
use crate::node::state::StateDir;
use crate::node::trust::{Decision, Heard, Known, Standing, decide, first_keys};
use crate::update::Updates;

pub use requests::{drainer, locker, recorder};

/// Time to the next request while the hubs do not agree yet.
const SOON: Duration = Duration::from_secs(3);
/// How long a hub has to be silent before the only other hub is enough to report that it has left or has another key.
/// A hub that is busy while etcd elects a leader replies again within that time.
const SILENT: Duration = Duration::from_secs(35);
/// Time within which every running node reads the peers from the hubs.
pub const ALL_HAVE_ASKED: Duration = Duration::from_secs(45);
/// File with the rollout's metrics for node_exporter.
const METRICS: &str = "/run/bakehouse/metrics/rollout.prom";
/// Time between two checks whether another machine owns this hub's slot.
const SUCCESSOR_INTERVAL: Duration = Duration::from_secs(1);
/// etcd's port for clients.
const ETCD: u16 = 2379;

/// A node of the fleet with its slot.
pub struct Member {
    topology: Topology,
    node: Node,
    version: String,
    who: Identity,
    hubs: Hubs,
    state: StateDir,
    /// Folder of the node's state.
    dir: PathBuf,
    /// Unix time of the image's build.
    built: u64,
}

impl Member {
    /// Returns the node `node` with the identity `who`.
    ///
    /// # Errors
    /// If the node's certificate and key do not match.
    pub fn new(who: Identity, node: &Node, image: &Image, dir: &StateDir) -> Result<Self> {
        let patroni = if node.has_role("db") { who.state.secrets.etcd_patroni.as_str() } else { "" };
        let hubs =
            Hubs::new(&image.topology, &who.state.endpoints, &node.name, who.client()?).with_etcd_patroni(patroni);
        Ok(Self {
            topology: image.topology.clone(),
            node: node.clone(),
            version: image.info.version.clone(),
            hubs: hubs
                .known_by(who.neighbourhood.clone())
                .with_root(&who.state.root)
                .with_revocations(who.revocations.clone())
                .over_mesh(),
            who,
            state: dir.clone(),
            dir: dir.path().to_owned(),
            built: 0,
        })
    }

    /// Sets the Unix time of the image's build.
    #[must_use]
    pub fn built_at(self, built: u64) -> Self {
        Self { built, ..self }
    }

    /// Configures WireGuard with the peers on disk, without a request to a hub.
    ///
    /// # Errors
    /// If the kernel refuses the configuration.
    pub async fn mesh(&self) -> Result<Mesh> {
        let state = &self.who.state;
        let mut mesh = Mesh::new(&self.topology, &self.node, &state.endpoints, &self.who.keys)?;
        mesh.apply(&self.who.neighbourhood).await?;
        Ok(mesh)
    }

    /// Runs the node's tasks until the process ends. `slow`: factor for time-outs on this machine.
    ///
    /// # Errors
    /// If the kernel refuses the mesh, the port of the join API is in use, a hub's state has no issuer, the node is
    /// fenced, or the node is ordered to leave.
    pub async fn keep(self, mesh: Mesh, updates: &Updates<'_>, slow: u32) -> Result<()> {
        if self.node.hub == 0 {
            Box::pin(self.keep_node(mesh, updates)).await
        } else {
            Box::pin(self.keep_hub(mesh, updates, slow)).await
        }
    }

    /// Runs the tasks of a node that is not a hub.
    async fn keep_node(&self, mesh: Mesh, updates: &Updates<'_>) -> Result<()> {
        let neighbourhood = &self.who.neighbourhood;
        let introduction = self.introduction()?;
        let kept = mesh.keep(neighbourhood.clone());
        let followed = follow_hubs(&self.hubs, neighbourhood, (&self.node.name, self.who.state.epoch));
        let introduced = async {
            if !self.topology.voters.contains(&self.node.name) {
                return std::future::pending().await;
            }
            introduce_voter(&self.hubs, neighbourhood, &self.node.name, introduction).await
        };
        let updated = updates.keep(async |report| self.hubs.turn(report).await);
        tokio::try_join!(kept, followed, introduced, updated).map(|((), (), (), ())| ())
    }

    /// Runs the tasks of a hub.
    async fn keep_hub(&self, mesh: Mesh, updates: &Updates<'_>, slow: u32) -> Result<()> {
        let Self { topology, node, version, who, dir, .. } = self;
        let (own_epoch, secrets, neighbourhood) = (who.state.epoch, &who.state.secrets, &who.neighbourhood);
        let introduction = self.introduction()?;
        let tls = who.client()?;
        let tls_key = encoding::encode(who.keys.tls.public()?.as_bytes());
        let etcd = || Etcd::new(members(topology, node), tls.clone()).with_user(ROOT, &secrets.etcd_root);
        let fencing = etcd().with_timeout(fence::ANSWER * slow);
        let allocator = SlotAllocator::new(etcd(), topology.clone(), &node.name).with_records(dir).built_at(self.built);
        neighbourhood.learn(&node.name, introduction.mesh_key);

        let kept = mesh.keep(neighbourhood.clone());
        let (root, revocations) = (&who.state.root, who.revocations.clone());
        let operators = OperatorPeers::load(dir, topology, root, revocations, neighbourhood.clone())?.map(Arc::new);
        // On separate connections, because they belong to the API's thread.
        let served = self.serve_api(allocator.beside(etcd()), operators.clone());
        let admitted = follow_operators(&allocator, operators);
        let introduced = self.introduce_hub(&allocator, &introduction);
        let registered = register(&allocator, &node.name, (introduction.mesh_key, &tls_key), version);
        let followed = self.follow_claims(&allocator);
        let revoked = self.follow_revocations(&allocator);
        let recorded = async {
            allocator.keep_records(dir).await;
            Ok(())
        };
        let exported = self.export_rollout(&allocator);
        // A separate task, because `followed` may wait for an etcd member that hangs.
        let replaced = until_replaced(&allocator, &node.name, (&tls_key, own_epoch));
        let access = EtcdAccess { allocator: &allocator, topology, secrets, slot: &node.name, tls_key: &tls_key };
        let access = access.keep();
        let fenced_off = async {
            let (etcd, neighbourhood) = (&fencing, neighbourhood.as_ref());
            Box::pin(Fence { etcd, topology, own: node, neighbourhood, slow }.keep()).await
        };
        let updated =
            updates.keep(async |report| rollout::report(allocator.etcd(), topology, &node.name, report).await);
        let purged = audit::keep(&allocator);
        let certified = async {
            let paths = WebPaths::for_node(self.state.clone());
            match WebKeeper::new(etcd(), topology, &node.name, &secrets.etcd_root, paths) {
                Some(keeper) => Box::pin(keeper.keep()).await,
                None => std::future::pending().await,
            }
            Ok(())
        };
        tokio::try_join!(
            kept, served, introduced, registered, followed, revoked, admitted, recorded, exported, replaced, access,
            fenced_off, updated, purged, certified
        )
        .map(|((), (), (), (), (), (), (), (), (), (), (), (), (), (), ())| ())
    }

    /// Returns this node's introduction to hubs.
    fn introduction(&self) -> Result<Introduction> {
        let mesh_key = self.who.keys.mesh_public()?;
        Ok(Introduction { version: PROTOCOL, mesh_key, epoch: self.who.state.epoch })
    }

    /// Serves the join API.
    async fn serve_api(&self, allocator: SlotAllocator, operator_peers: Option<Arc<OperatorPeers>>) -> Result<()> {
        let state = &self.who.state;
        let issuer = state.issuer.clone().ok_or_else(|| {
            let text = format!(
                "{}: the hub's state.json has no issuer; wipe /var and give the hub a new ticket",
                self.node.name
            );
            Error::Configuration(text)
        })?;
        let hub = Hub {
            topology: self.topology.clone(),
            root: state.root.clone(),
            issuer,
            secrets: state.secrets.clone(),
            epoch: state.epoch,
            allocator: Arc::new(allocator),
            neighbourhood: self.who.neighbourhood.clone(),
            orders: OrderLog::default(),
            revocations: self.who.revocations.clone(),
            operator_peers,
        };
        let own = fleet_https::Identity { cert: &state.cert, key: self.who.keys.tls.pem() };
        let at = SocketAddr::from((Ipv4Addr::UNSPECIFIED, self.topology.mesh.port));
        serve(Arc::new(hub), at, fleet_https::server(&state.root, own)?).await
    }

    /// Introduces this hub to the others periodically, so that founders find each other before etcd runs.
    async fn introduce_hub(&self, allocator: &SlotAllocator, introduction: &Introduction) -> Result<()> {
        let Self { topology, node, hubs, .. } = self;
        let neighbourhood = &self.who.neighbourhood;
        let plan: Vec<String> = topology.hubs.iter().map(|hub| hub.name.clone()).collect();
        let mut pause = Backoff::default();
        loop {
            let owners = allocator.owners();
            // A key in etcd is current, but an introduction, or a record on disk, may have an older key.
            let mut answers =
                hubs.introduce(introduction, |slot| allocator.has_heard() && owners.contains_key(slot)).await;
            // If all keys are known, the hub still reads the others' answers. Only they report to a founder that
            // another machine took its slot while the founder was disconnected.
            if answers.is_empty() {
                answers = hubs.answers().await;
            }
            let others = hubs.slots();
            let is_alone = answers.is_empty() && !others.is_empty();
            screen::waits(is_alone.then(|| format!("no other hub replies: {}", others.join(", "))));
            let (pins, keys) = (neighbourhood.pins(), neighbourhood.keys());
            // Without pins, ignore a machine whose mesh key differs from etcd's record: it does not own its slot.
            answers.retain(|a| {
                let key = a.peers.keys.get(&a.hub);
                !pins.is_empty() || !key.is_some_and(|key| neighbourhood.is_stranger(&a.hub, *key))
            });
            let own = (node.name.as_str(), introduction.epoch);
            let known = Known {
                own,
                plan: &plan,
                pins: &pins,
                keys: &keys,
                recent: &BTreeSet::new(),
                is_new: owners.is_empty(),
            };
            let decision = decide(&known, &answers);
            if let Some(why) = reason_to_stop(hubs, &node.name, &decision).await {
                return Err(why);
            }
            // A founder that was off while the others renewed their keys needs the new keys to reach etcd.
            if decision.heard == Heard::Confirmed && !allocator.has_heard() {
                neighbourhood.apply(&decision);
            }
            let everyone = Known { keys: &BTreeMap::new(), ..known };
            for (slot, key) in first_keys(&everyone, &answers) {
                if !owners.contains_key(&slot) {
                    neighbourhood.learn(&slot, key);
                }
            }
            tokio::time::sleep(pause.next_delay().min(round())).await;
        }
    }

    /// Follows the owners of all slots in etcd.
    async fn follow_claims(&self, allocator: &SlotAllocator) -> Result<()> {
        let mut pause = Backoff::default();
        loop {
            match allocator.follow(|owners| take_in(&self.topology, &self.who.neighbourhood, owners)).await {
                // The watch ends each minute.
                Ok(()) => pause = Backoff::default(),
                Err(e) => warn!("cannot follow the owners of slots in etcd: {}", e.chain()),
            }
            tokio::time::sleep(pause.next_delay()).await;
        }
    }

    /// Follows the revoked operators in etcd.
    async fn follow_revocations(&self, allocator: &SlotAllocator) -> Result<()> {
        let mut pause = Backoff::default();
        loop {
            match allocator.follow_revocations(&self.who.revocations).await {
                Ok(()) => pause = Backoff::default(),
                Err(e) => warn!("cannot follow the revoked operators in etcd: {}", e.chain()),
            }
            tokio::time::sleep(pause.next_delay()).await;
        }
    }

    /// Exports the rollout's metrics, on hubs with the role `update`.
    async fn export_rollout(&self, allocator: &SlotAllocator) -> Result<()> {
        if self.node.hub > 0 && self.node.has_role(fleet::UPDATE) {
            rollout::export(allocator.etcd(), Path::new(METRICS)).await;
        }
        Ok(())
    }
}

/// Follows the operators' machines in etcd, and removes those whose certificates are no longer valid.
async fn follow_operators(allocator: &SlotAllocator, known: Option<Arc<OperatorPeers>>) -> Result<()> {
    let Some(known) = known else { return Ok(()) };
    let followed = async {
        let mut pause = Backoff::default();
        loop {
            match allocator.follow_operator_peers(&known).await {
                Ok(()) => pause = Backoff::default(),
                Err(e) => warn!("cannot follow the operators' machines in etcd: {}", e.chain()),
            }
            tokio::time::sleep(pause.next_delay()).await;
        }
    };
    tokio::select! {
        () = known.keep() => Ok(()),
        () = followed => Ok(()),
    }
}

/// Registers a hub as the owner of its slot, and promotes its etcd member.
async fn register(allocator: &SlotAllocator, slot: &str, keys: (MeshKey, &str), version: &str) -> Result<()> {
    let mut pause = Backoff::default();
    loop {
        match allocator.register(slot, keys.0, keys.1, version).await {
            Ok(_) => match allocator.vote(slot).await {
                Ok(()) => return Ok(()),
                Err(e) => warn!(slot, "cannot promote the etcd member of {slot}: {}", e.chain()),
            },
            Err(Error::Refused(refusal)) if !refusal.reason.passes() => return Err(Error::Configuration(refusal.text)),
            Err(e) => warn!(slot, "cannot register {slot}: {}", e.chain()),
        }
        tokio::time::sleep(pause.next_delay()).await;
    }
}

/// Waits until etcd's records have another owner of this hub's slot, or no owner. Returns that error.
async fn until_replaced(allocator: &SlotAllocator, slot: &str, own: (&str, u64)) -> Result<()> {
    loop {
        // Only records read from etcd count, because records on disk may be older than this node's new keys.
        let fenced_since = allocator.fenced(slot, own.0).filter(|epoch| *epoch >= own.1);
        if let Some(epoch) = fenced_since.filter(|_| allocator.has_heard()) {
            let left = allocator.is_vacant(slot).then(|| Error::Left { slot: slot.to_owned() });
            return Err(left.unwrap_or_else(|| fenced(slot, epoch)));
        }
        tokio::time::sleep(SUCCESSOR_INTERVAL).await;
    }
}

/// Returns the addresses of etcd's members, this node's own member first.
fn members(topology: &Topology, node: &Node) -> Vec<(String, u16)> {
    let mut members: Vec<(String, u16)> = Vec::new();
    if topology.voters.contains(&node.name) {
        members.push(("127.0.0.1".to_owned(), ETCD));
    }
    let others = topology.voters.iter().filter(|v| **v != node.name).filter_map(|v| topology.node(v));
    members.extend(others.map(|n| (n.address.to_string(), ETCD)));
    members
}

/// Applies etcd's records of owners to a founder's peer table.
pub fn take_in(topology: &Topology, neighbourhood: &PeerTable, owners: &Owners) {
    let held = || owners.iter().filter(|(_, record)| !record.vacant);
    let keys = held().map(|(slot, record)| (slot.clone(), record.mesh_key)).collect();
    let is_hub = |slot: &str| topology.node(slot).is_some_and(|n| n.hub > 0);
    let hubs = held().filter(|(slot, _)| is_hub(slot)).map(|(slot, record)| (slot.clone(), record.tls_key.clone()));
    // The keys of founders without a record in etcd come from their introductions.
    let founder = |slot: &str| topology.node(slot).is_some_and(|n| topology.is_founder(n));
    neighbourhood.are_granted(&keys, hubs.collect(), |slot| founder(slot) && !owners.contains_key(slot));
}

/// Introduces a voter that is not a hub to the hubs periodically. etcd's members connect over the mesh, so the hubs
/// need the voter's key before etcd has a quorum, and the hubs register the voter in etcd.
///
/// # Errors
/// If the node is fenced, has left, or is ordered to leave.
async fn introduce_voter(hubs: &Hubs, neighbourhood: &PeerTable, slot: &str, own: Introduction) -> Result<()> {
    let plan = hubs.slots();
    let mut pause = Backoff::default();
    loop {
        let answers = hubs.introduce(&own, |_| false).await;
        // In this order: a hub whose key has left the table in between has no pin, either.
        let keys = neighbourhood.keys();
        let pins = neighbourhood.pins();
        let known = Known {
            own: (slot, own.epoch),
            plan: &plan,
            pins: &pins,
            keys: &keys,
            recent: &BTreeSet::new(),
            is_new: pins.is_empty(),
        };
        let decision = decide(&known, &answers);
        if let Some(why) = reason_to_stop(hubs, slot, &decision).await {
            return Err(why);
        }
        // A known key changes only if the hubs agree.
        for (slot, key) in first_keys(&known, &answers) {
            neighbourhood.learn(&slot, key);
        }
        tokio::time::sleep(pause.next_delay().min(round())).await;
    }
}

/// Applies to a node's peer table what the hubs agree on. Returns only on failure.
///
/// # Errors
/// If the node is fenced, has left, or is ordered to leave.
pub async fn follow_hubs(hubs: &Hubs, neighbourhood: &PeerTable, own: (&str, u64)) -> Result<()> {
    // If only one hub reports a change, the node asks again soon, up to this number of times.
    const RETRIES: u32 = 12;
    let mut open = 0;
    // This node is not a hub, so `hubs` has all hubs.
    let plan = hubs.slots();
    let started = Instant::now();
    let mut replies: BTreeMap<String, Instant> = BTreeMap::new();
    loop {
        // After its start, a node does not know how long a hub has been silent.
        let is_recent = |hub: &String| replies.get(hub).unwrap_or(&started).elapsed() < SILENT;
        let recent: BTreeSet<String> = neighbourhood.pins().into_keys().filter(is_recent).collect();
        let decision = hubs.round(|answers| {
            let (pins, keys) = (neighbourhood.pins(), neighbourhood.keys());
            decide(&Known { own, plan: &plan, pins: &pins, keys: &keys, recent: &recent, is_new: false }, answers)
        });
        let decision = decision.await;
        if let Some(why) = reason_to_stop(hubs, own.0, &decision).await {
            return Err(why);
        }
        neighbourhood.apply(&decision);
        replies.extend(decision.replied.iter().map(|hub| (hub.clone(), Instant::now())));
        open = if decision.is_open { open + 1 } else { 0 };
        tokio::time::sleep(if (1..=RETRIES).contains(&open) { SOON } else { round() }).await;
    }
}

/// Returns why this node must stop: it is fenced, has left, or is ordered to leave and a hub accepts. While etcd needs
/// the node's vote, no hub accepts, and the node keeps running.
async fn reason_to_stop(hubs: &Hubs, slot: &str, decision: &Decision) -> Option<Error> {
    match decision.standing {
        Standing::Owner => None,
        Standing::Left => Some(Error::Left { slot: slot.to_owned() }),
        Standing::Fenced(epoch) => Some(fenced(slot, epoch)),
        Standing::Leaving => match hubs.leave().await {
            Ok(()) => Some(Error::Leaving),
            Err(e) => {
                warn!("cannot leave the fleet yet: {}", e.chain());
                None
            }
        },
    }
}

fn fenced(slot: &str, epoch: u64) -> Error {
    log_event(Event::Fenced, &format!("another machine owns {slot} now (epoch {epoch})"));
    Error::Fenced { slot: slot.to_owned(), epoch }
}
