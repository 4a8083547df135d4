//! Drained nodes in etcd: `/bakehouse/rollout/drained/SLOT` has the time since when the hubs know of the drain, in
//! seconds since 1970. Before a node drains itself, a hub checks that each of its roles keeps another node.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use fleet::etcd_keys::{ACTING, DRAINED};
use fleet::node_api::{DrainAnswer, DrainRequest};
use fleet::{Node, Reason, Rollout, Topology};
use futures_util::future::join_all;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tracing::{info, warn};

use super::refusal::refuse;
use super::rollout::{Read, now, read};
use crate::client::etcd::{Compare, Etcd, Op};
use crate::client::haproxy;
use crate::error::Result;

/// Time limit for HAProxy, and for another hub.
const ANSWER: Duration = Duration::from_secs(2);
/// How often a drain is checked again when another hub's transaction wins.
const ATTEMPTS: u32 = 4;
/// Time limit for the change of etcd's leader.
const ELECTION: Duration = Duration::from_secs(4);

/// Records in etcd whether the node `slot` is drained, if the request says so, and returns the drained nodes. `own`: this
/// hub, whose HAProxy checks the app nodes.
///
/// # Errors
/// If etcd does not answer.
pub(crate) async fn drain(
    etcd: &Etcd,
    topology: &Topology,
    own: &Node,
    slot: &str,
    request: DrainRequest,
) -> Result<DrainAnswer> {
    if request.drained == Some(true) && request.check {
        return checked(etcd, topology, own, slot).await;
    }
    let mut drained = read(etcd).await?.rollout.drained;
    let key = format!("{DRAINED}{slot}");
    match request.drained {
        Some(true) => {
            if !drained.contains_key(slot) {
                etcd.transact(&[], &[Op::Put(&key, now().to_string().as_bytes())]).await?;
                drained.insert(slot.to_owned(), now());
                info!(slot, "{slot} is drained");
            }
            if topology.voters.iter().any(|voter| voter == slot) {
                give_leadership(etcd, slot, &drained).await;
            }
        }
        Some(false) if drained.remove(slot).is_some() => {
            etcd.transact(&[], &[Op::Delete(&key)]).await?;
            info!(slot, "{slot} is not drained any more");
        }
        Some(false) | None => {}
    }
    Ok(DrainAnswer { granted: true, why: String::new(), drained })
}

/// Records that a node is drained, if each of its roles keeps another node. The transaction fails if another node was
/// drained since the check, or the node has lost the fleet's lock, under which the node has checked its database.
async fn checked(etcd: &Etcd, topology: &Topology, own: &Node, slot: &str) -> Result<DrainAnswer> {
    let key = format!("{DRAINED}{slot}");
    for _ in 0..ATTEMPTS {
        let Read { rollout: Rollout { mut drained, .. }, acting, revision, .. } = read(etcd).await?;
        let refused = |why: String, drained| Ok(DrainAnswer { granted: false, why, drained });
        let mut when = vec![Compare::NoneSince(DRAINED, revision)];
        if topology.node(slot).is_some_and(|node| needs_lock(topology, node)) {
            let Some((_, lock)) = acting.filter(|(holder, _)| holder == slot) else {
                return refused(format!("{slot} does not have the fleet's lock any more"), drained);
            };
            when.push(Compare::Unchanged(ACTING, lock));
        }
        if let Some(why) = obstacle(topology, own, slot, &drained).await {
            return refused(why, drained);
        }
        let since = drained.get(slot).copied().unwrap_or_else(now);
        if etcd.transact(&when, &[Op::Put(&key, since.to_string().as_bytes())]).await? {
            if drained.insert(slot.to_owned(), since).is_none() {
                info!(slot, "{slot} is drained");
            }
            return Ok(DrainAnswer { granted: true, why: String::new(), drained });
        }
    }
    Err(refuse(Reason::Busy, "other nodes are drained at the same time").into())
}

/// Whether a node takes the fleet's lock before it asks for its drain, because the fleet could lose a service if another
/// node stopped the same at the same time.
fn needs_lock(topology: &Topology, node: &Node) -> bool {
    ["db", "app"].iter().any(|role| node.has_role(role)) || node.hub > 0 || topology.voters.contains(&node.name)
}

/// Makes another voter etcd's leader, if the drained node `slot` is. The node keeps its vote.
async fn give_leadership(etcd: &Etcd, slot: &str, drained: &BTreeMap<String, u64>) {
    let avoided: Vec<String> = drained.keys().cloned().collect();
    match timeout(ELECTION, etcd.move_leader(slot, &avoided)).await {
        Ok(Ok(None)) => {}
        Ok(Ok(Some(to))) => info!(slot, "etcd: {to} is the leader instead of {slot}"),
        // etcd elects another leader when this one stops.
        Ok(Err(e)) => warn!(slot, "etcd: {slot} stays the leader: {}", e.chain()),
        Err(_) => warn!(slot, "etcd: {slot} stays the leader: no answer"),
    }
}

/// Returns what the fleet would lose without the node; `None` if each of its roles keeps another node. The node's own
/// Patroni knows about databases.
async fn obstacle(topology: &Topology, own: &Node, slot: &str, drained: &BTreeMap<String, u64>) -> Option<String> {
    let node = topology.node(slot)?;
    let others = |role: &str| topology.nodes.iter().filter(|n| n.name != slot && n.has_role(role)).collect::<Vec<_>>();
    if node.has_role("app") {
        let found = timeout(ANSWER, haproxy::odoo(&own.address.to_string())).await;
        let servers = found.unwrap_or_else(|_| Ok(BTreeMap::new())).unwrap_or_else(|e| {
            warn!("HAProxy does not answer: {}", e.chain());
            BTreeMap::new()
        });
        let state = |node: &&Node| match servers.get(&node.name) {
            _ if drained.contains_key(&node.name) => Err("is drained".to_owned()),
            Some(status) if status.starts_with("UP") => Ok(()),
            Some(status) => Err(format!("is {status}")),
            None => Err(format!("is unknown to HAProxy of {}", own.name)),
        };
        if let Some(why) = missing(&others("app"), state) {
            return Some(format!("{slot} is the last node that serves Odoo{why}"));
        }
    }
    if node.hub > 0 {
        let hubs: Vec<&Node> = topology.hubs.iter().filter(|hub| hub.name != slot).collect();
        let addresses: Vec<SocketAddr> =
            hubs.iter().map(|hub| SocketAddr::from((hub.address, topology.mesh.port))).collect();
        let connects =
            addresses.iter().map(async |at| timeout(ANSWER, TcpStream::connect(at)).await.is_ok_and(|c| c.is_ok()));
        let answers: BTreeMap<&str, bool> =
            hubs.iter().map(|hub| hub.name.as_str()).zip(join_all(connects).await).collect();
        let state = |hub: &&Node| match answers.get(hub.name.as_str()) {
            _ if drained.contains_key(&hub.name) => Err("is drained".to_owned()),
            Some(true) => Ok(()),
            _ => Err("does not answer".to_owned()),
        };
        if let Some(why) = missing(&hubs, state) {
            return Some(format!("{slot} is the last hub that can hold the VIP{why}"));
        }
    }
    None
}

/// Returns the reason if no node is well: the state of each one.
fn missing<'a>(nodes: &[&'a Node], state: impl Fn(&&'a Node) -> Result<(), String>) -> Option<String> {
    let mut states = Vec::new();
    for node in nodes {
        match state(node) {
            Ok(()) => return None,
            Err(why) => states.push(format!("{} {why}", node.name)),
        }
    }
    Some(if states.is_empty() { String::new() } else { format!(": {}", states.join(", ")) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet::Fleet;

    fn topology(toml: &str) -> Topology {
        let toml = format!("name = \"acme\"\n[groups]\n{toml}");
        let mut topology = Topology::from_fleet(&Fleet::parse("f", toml.as_bytes()).unwrap());
        // Connections to this address are refused at once.
        for node in topology.nodes.iter_mut().chain(&mut topology.hubs) {
            node.address = [127, 0, 0, 1].into();
        }
        topology
    }

    #[tokio::test]
    async fn the_last_node_of_a_role_is_an_obstacle() {
        let mut topology = topology("hub.count = 2\napp.count = 2\nmonitor.count = 1\n");
        let own = topology.hubs[0].clone();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        topology.mesh.port = listener.local_addr().unwrap().port();
        let why = async |topology: &Topology, slot: &str, drained: &[&str]| {
            let drained = drained.iter().map(|slot| ((*slot).to_owned(), 1)).collect();
            obstacle(topology, &own, slot, &drained).await
        };
        assert_eq!(why(&topology, "hub-1", &[]).await, None);
        assert_eq!(why(&topology, "monitor-1", &["hub-1", "hub-2"]).await, None);
        let last = why(&topology, "hub-1", &["hub-2"]).await.unwrap();
        assert_eq!(last, "hub-1 is the last hub that can hold the VIP: hub-2 is drained");
        let last = why(&topology, "app-1", &["app-2"]).await.unwrap();
        assert_eq!(last, "app-1 is the last node that serves Odoo: app-2 is drained");
        // No HAProxy runs here.
        let last = why(&topology, "app-1", &[]).await.unwrap();
        assert!(last.ends_with(": app-2 is unknown to HAProxy of hub-1"), "{last}");
        drop(listener);
        let last = why(&topology, "hub-1", &[]).await.unwrap();
        assert!(last.ends_with(": hub-2 does not answer"), "{last}");
    }

    #[tokio::test]
    async fn the_only_node_of_a_role_is_an_obstacle() {
        let topology = topology("hub.count = 1\napp.count = 1\n");
        let why = obstacle(&topology, &topology.hubs[0], "app-1", &BTreeMap::new()).await;
        assert_eq!(why.unwrap(), "app-1 is the last node that serves Odoo");
    }
}
