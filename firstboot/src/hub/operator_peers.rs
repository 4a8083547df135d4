//! Operators' machines in etcd, as WireGuard peers of the hubs.
//!
//! ```text
//! /bakehouse/operators/wireguard/ADDRESS   OperatorPeer  the machine that has this address of `[mesh] operators`
//! /bakehouse/operators/wireguard-keys/KEY  ADDRESS       the machine that has this WireGuard key
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use fleet::etcd_keys::{OPERATOR_PEER_KEYS, OPERATOR_PEERS, OWNERS};
use fleet::{HubPeer, OperatorPeer, OperatorPeerRequest, OperatorPeering, PROTOCOL, Reason, Refusal, encoding};
use fleet_https::OperatorCertificate;
use tracing::info;

use super::api::Hub;
use super::claims::SlotAllocator;
use super::refusal::refuse;
use crate::client::etcd::{Compare, KeyValue, Op};
use crate::error::{Error, Result};
use crate::node::operator_peers::OperatorPeers;

/// How often a hub retries when another hub's transaction wins.
const ATTEMPTS: u32 = 8;

/// A machine in etcd.
struct Row {
    address: Ipv4Addr,
    revision: u64,
    /// The machine with its operator; `None` if its certificate is no longer valid, so that the address is free.
    valid: Option<(OperatorPeer, OperatorCertificate)>,
}

impl Row {
    fn parse(pair: &KeyValue, known: &OperatorPeers) -> Option<Self> {
        let address = pair.key.strip_prefix(OPERATOR_PEERS)?.parse().ok()?;
        let peer = serde_json::from_slice::<OperatorPeer>(&pair.value).ok();
        let valid = peer.and_then(|peer| known.verify(&peer).map(|certificate| (peer, certificate)));
        Some(Self { address, revision: pair.revision, valid })
    }

    fn is_of(&self, name: &str) -> bool {
        self.valid.as_ref().is_some_and(|(_, certificate)| certificate.operator.name == name)
    }
}

impl SlotAllocator {
    /// Gives an operator's machine an address, or keeps the one that the operator's machine has. Idempotent.
    async fn add_operator_peer(&self, known: &OperatorPeers, name: &str, peer: &OperatorPeer) -> Result<Ipv4Addr> {
        let value = serde_json::to_vec(peer).map_err(Error::json("an operator's machine"))?;
        let of_key = format!("{OPERATOR_PEER_KEYS}{}", peer.mesh_key);
        let of_node = format!("{OWNERS}{}", peer.mesh_key);
        for _ in 0..ATTEMPTS {
            // Two hubs may give the same key to machines with different addresses at the same time, and a node may join
            // with it. So the transaction compares the records of the key, as they were before the check.
            let found = self.etcd.get(&[&of_key, &of_node]).await?;
            let [of_key_revision, of_node_revision] = [0, 1].map(|i: usize| found.get(i).map_or(0, |f| f.revision));
            if of_node_revision > 0 {
                return Err(taken());
            }
            let (_, pairs) = self.etcd.list(OPERATOR_PEERS).await?;
            let rows: Vec<Row> = pairs.iter().filter_map(|pair| Row::parse(pair, known)).collect();
            let has_key = |row: &&Row| row.valid.as_ref().is_some_and(|(other, _)| other.mesh_key == peer.mesh_key);
            if rows.iter().filter(has_key).any(|row| !row.is_of(name)) || known.is_of_node(peer) {
                return Err(taken());
            }
            let own = rows.iter().find(|row| row.is_of(name));
            if let Some(own) = own.filter(|row| row.valid.as_ref().is_some_and(|(had, _)| had == peer)) {
                return Ok(own.address);
            }
            let taken: BTreeSet<Ipv4Addr> = rows.iter().filter(|r| r.valid.is_some()).map(|r| r.address).collect();
            let free = || known.range().hosts().find(|address| !taken.contains(address));
            let Some(address) = own.map(|row| row.address).or_else(free) else {
                let text = format!("each address of `[mesh] operators` ({}) has a machine", known.range());
                return Err(refuse(Reason::Full, &text).into());
            };
            let revision = rows.iter().find(|row| row.address == address).map_or(0, |row| row.revision);
            let key = format!("{OPERATOR_PEERS}{address}");
            let when = [
                Compare::Unchanged(&key, revision),
                Compare::Unchanged(&of_key, of_key_revision),
                Compare::Unchanged(&of_node, 0),
            ];
            let at = address.to_string();
            let mut then = vec![Op::Put(&key, &value), Op::Put(&of_key, at.as_bytes())];
            // The record of a key without a valid machine stays, because another machine may have the key by now.
            let former = own.and_then(|row| row.valid.as_ref()).map(|(former, _)| former.mesh_key);
            let former = former.filter(|former| *former != peer.mesh_key);
            let former = former.map(|former| format!("{OPERATOR_PEER_KEYS}{former}"));
            then.extend(former.as_deref().map(Op::Delete));
            if self.etcd.transact(&when, &then).await? {
                return Ok(address);
            }
        }
        Err(refuse(Reason::Busy, "many machines ask for an address at the same time; retry").into())
    }

    /// Follows the operators' machines in etcd for up to a minute, and adds them to `known`.
    ///
    /// # Errors
    /// If etcd does not answer.
    pub async fn follow_operator_peers(&self, known: &OperatorPeers) -> Result<()> {
        let (revision, pairs) = self.etcd.list(OPERATOR_PEERS).await?;
        known.replace(&parsed(&pairs));
        let mut watch = self.etcd.watch(OPERATOR_PEERS, revision).await?;
        while self.etcd.next(&mut watch).await?.is_some() {
            known.replace(&parsed(&self.etcd.list(OPERATOR_PEERS).await?.1));
        }
        Ok(())
    }
}

fn taken() -> Error {
    refuse(Reason::Taken, "another machine has this WireGuard key; make a new one").into()
}

fn parsed(pairs: &[KeyValue]) -> BTreeMap<Ipv4Addr, OperatorPeer> {
    let row = |pair: &KeyValue| {
        let address = pair.key.strip_prefix(OPERATOR_PEERS)?.parse().ok()?;
        Some((address, serde_json::from_slice(&pair.value).ok()?))
    };
    pairs.iter().filter_map(row).collect()
}

impl Hub {
    /// Makes an operator's machine a WireGuard peer of every hub. Returns what the machine needs.
    pub(super) async fn add_operator_peer(
        &self,
        operator: &OperatorCertificate,
        body: &[u8],
    ) -> Result<OperatorPeering, Refusal> {
        let Some(known) = &self.operator_peers else {
            let text = "this fleet has no addresses for operators' machines; set `[mesh] operators` in fleet.toml, and \
                        roll the new version out";
            return Err(refuse(Reason::Malformed, text));
        };
        let request: OperatorPeerRequest = serde_json::from_slice(body)
            .map_err(|e| refuse(Reason::Malformed, &format!("cannot parse the request: {e}")))?;
        if request.version != PROTOCOL {
            let text = format!("the request has an unknown format; this hub reads format {PROTOCOL}");
            return Err(refuse(Reason::Malformed, &text));
        }
        let OperatorPeerRequest { mesh_key, signature, .. } = request;
        let peer = OperatorPeer { certificate: encoding::encode(operator.der()), mesh_key, signature };
        if known.verify(&peer).is_none() {
            return Err(refuse(Reason::Forged, "the certificate's key did not sign the WireGuard key"));
        }
        let name = &operator.operator.name;
        let address = self.allocator.add_operator_peer(known, name, &peer).await.map_err(super::api::refused)?;
        info!(operator = name, "{} registers a machine at {address}", operator.operator.dns_name());
        let keys = self.neighbourhood.keys();
        let hub = |node: &fleet::Node| {
            Some((node.name.clone(), HubPeer { mesh_key: *keys.get(&node.name)?, address: node.address }))
        };
        let mesh = &self.topology.mesh;
        Ok(OperatorPeering {
            address,
            subnet: mesh.subnet,
            mtu: mesh.mtu,
            port: mesh.port,
            hubs: self.topology.hubs.iter().filter_map(hub).collect(),
        })
    }
}
