//! Requests of the node API to etcd: a hub sends them to etcd, and another node to any hub.

use std::sync::Arc;
use std::time::Duration;

use fleet::{Node, Topology};

use super::members;
use crate::api::{Drainer, Locker};
use crate::client::etcd::Etcd;
use crate::error::Result;
use crate::hub::etcd_access::ROOT;
use crate::hub::{audit, drains, lock};
use crate::node::hubs::Hubs;
use crate::node::identity::Identity;
use crate::node::outbox::Recorder;

/// Time limit of one member of etcd.
const TIMEOUT: Duration = Duration::from_secs(1);

/// Returns how the node takes and frees the fleet's lock.
///
/// # Errors
/// If the node's certificate and key do not match.
pub fn locker(who: &Identity, node: &Node, topology: &Topology) -> Result<Locker> {
    if node.hub > 0 {
        let (etcd, slot) = (etcd(who, node, topology)?, node.name.clone());
        return Ok(Box::new(move |seconds| {
            let (etcd, slot) = (etcd.clone(), slot.clone());
            Box::pin(async move { lock::lock(&etcd, &slot, seconds).await })
        }));
    }
    let hubs = hubs(who, node, topology)?;
    Ok(Box::new(move |seconds| {
        let hubs = hubs.clone();
        Box::pin(async move { hubs.lock(seconds).await })
    }))
}

/// Returns how the node stores its entries of the audit log.
///
/// # Errors
/// If the node's certificate and key do not match.
pub fn recorder(who: &Identity, node: &Node, topology: &Topology) -> Result<Recorder> {
    if node.hub > 0 {
        let (etcd, slot) = (etcd(who, node, topology)?, node.name.clone());
        return Ok(Box::new(move |entries| {
            let (etcd, slot) = (etcd.clone(), slot.clone());
            Box::pin(async move { audit::store(&etcd, &slot, entries).await })
        }));
    }
    let hubs = hubs(who, node, topology)?;
    Ok(Box::new(move |entries| {
        let hubs = hubs.clone();
        Box::pin(async move { hubs.audit(&entries).await })
    }))
}

/// Returns how the node reports that it is drained, and reads which nodes are.
///
/// # Errors
/// If the node's certificate and key do not match.
pub fn drainer(who: &Identity, node: &Node, topology: &Topology) -> Result<Drainer> {
    if node.hub > 0 {
        let shared = Arc::new((etcd(who, node, topology)?, topology.clone(), node.clone()));
        return Ok(Box::new(move |request| {
            let shared = shared.clone();
            Box::pin(async move {
                let (etcd, topology, node) = shared.as_ref();
                drains::drain(etcd, topology, node, &node.name, request).await
            })
        }));
    }
    let hubs = hubs(who, node, topology)?;
    Ok(Box::new(move |request| {
        let hubs = hubs.clone();
        Box::pin(async move { hubs.drained(request).await })
    }))
}

fn etcd(who: &Identity, node: &Node, topology: &Topology) -> Result<Arc<Etcd>> {
    let etcd = Etcd::new(members(topology, node), who.client()?).with_user(ROOT, &who.state.secrets.etcd_root);
    Ok(Arc::new(etcd.with_timeout(TIMEOUT)))
}

fn hubs(who: &Identity, node: &Node, topology: &Topology) -> Result<Arc<Hubs>> {
    let hubs = Hubs::new(topology, &who.state.endpoints, &node.name, who.client()?);
    Ok(Arc::new(hubs.known_by(who.neighbourhood.clone()).over_mesh()))
}
