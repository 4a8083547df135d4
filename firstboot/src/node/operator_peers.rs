//! Operators' machines as WireGuard peers of this hub. Each proves itself: the fleet's root signed the operator's
//! certificate, and the certificate's key signed the machine's WireGuard key. So neither etcd nor another hub can add one.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fleet::encoding::decode;
use fleet::{OperatorPeer, Topology, operator_peer_message};
use fleet_https::{OperatorCertificate, OperatorVerifier};
use ipnet::Ipv4Net;
use ring::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use serde::{Deserialize, Serialize};
use tokio::time::sleep;
use tracing::{error, info, warn};

use super::state::{read_json, write_json};
use crate::error::Result;
use crate::node::neighbours::PeerTable;
use crate::node::revocations::Revocations;

/// Time between two checks whether a certificate has expired.
const CHECK: Duration = Duration::from_secs(30);
const FILE: &str = "operator-peers.json";
const VERSION: u16 = 1;

/// The operators' machines that this hub knows.
pub struct OperatorPeers {
    fleet: String,
    /// Network of their addresses.
    range: Ipv4Net,
    verifier: OperatorVerifier,
    revocations: Arc<Revocations>,
    peers: Arc<PeerTable>,
    dir: PathBuf,
    rows: Mutex<Rows>,
}

/// The machines by address, each with the operator's certificate.
type Rows = BTreeMap<Ipv4Addr, (OperatorPeer, OperatorCertificate)>;

#[derive(Default, Deserialize, Serialize)]
struct PeerFile {
    version: u16,
    peers: BTreeMap<Ipv4Addr, OperatorPeer>,
}

impl OperatorPeers {
    /// Loads the machines from the folder of the node's state; `None` if the fleet has no addresses for them.
    ///
    /// # Errors
    /// If the root's certificate is invalid.
    pub fn load(
        dir: &Path,
        topology: &Topology,
        root: &str,
        revocations: Arc<Revocations>,
        peers: Arc<PeerTable>,
    ) -> Result<Option<Self>> {
        let Some(range) = topology.mesh.operators else { return Ok(None) };
        let own = Self {
            fleet: topology.name.clone(),
            range,
            verifier: OperatorVerifier::new(root)?,
            revocations,
            peers,
            dir: dir.to_owned(),
            rows: Mutex::default(),
        };
        // etcd has the machines, too.
        let stored = read_json::<PeerFile>(&dir.join(FILE), &(VERSION..=VERSION), None).unwrap_or_else(|e| {
            warn!("cannot load the operators' machines: {}", e.chain());
            None
        });
        *own.rows() = own.verified(&stored.unwrap_or_default().peers);
        own.apply();
        Ok(Some(own))
    }

    /// Returns the network of the addresses.
    #[must_use]
    pub fn range(&self) -> Ipv4Net {
        self.range
    }

    /// Returns the operator of a machine, if its proof is valid, and the certificate neither revoked nor expired.
    #[must_use]
    pub fn verify(&self, peer: &OperatorPeer) -> Option<OperatorCertificate> {
        let certificate = self.verifier.certificate(&decode(&peer.certificate)?)?;
        let message = operator_peer_message(&self.fleet, &peer.mesh_key);
        let key = UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, decode(&certificate.key)?);
        key.verify(&message, &decode(&peer.signature)?).ok()?;
        self.is_valid(&certificate).then_some(certificate)
    }

    /// Returns whether a node has this WireGuard key. An operator's machine with it would take that node's place.
    #[must_use]
    pub fn is_of_node(&self, peer: &OperatorPeer) -> bool {
        self.peers.keys().values().any(|key| *key == peer.mesh_key)
    }

    /// Replaces the machines by those of etcd. Leaves out addresses outside the network, and invalid proofs.
    pub fn replace(&self, peers: &BTreeMap<Ipv4Addr, OperatorPeer>) {
        let new = self.verified(peers);
        let proofs = |rows: &Rows| rows.iter().map(|(at, (peer, _))| (*at, peer.clone())).collect::<BTreeMap<_, _>>();
        let (before, after) = (proofs(&self.rows()), proofs(&new));
        for (address, peer) in after.iter().filter(|(address, peer)| before.get(*address) != Some(*peer)) {
            let operator = new[address].1.operator.dns_name();
            info!(operator, "{address} is a machine of {operator} with the WireGuard key {}", peer.mesh_key);
        }
        *self.rows() = new;
        self.apply();
        if before != after {
            let (path, file) = (self.dir.join(FILE), PeerFile { version: VERSION, peers: after });
            // A slow disk must not delay the mesh.
            tokio::task::spawn_blocking(move || {
                if let Err(e) = write_json(&path, &file) {
                    error!("cannot store the operators' machines: {}", e.chain());
                }
            });
        }
    }

    /// Removes peers whose certificate has expired or is revoked, until the process ends.
    pub async fn keep(&self) {
        loop {
            tokio::select! {
                () = self.revocations.changed() => {}
                () = sleep(CHECK) => {}
            }
            self.apply();
        }
    }

    fn apply(&self) {
        let rows = self.rows();
        let valid = rows.iter().filter(|(_, (_, certificate))| self.is_valid(certificate));
        self.peers.set_operators(valid.map(|(address, (peer, _))| (*address, peer.mesh_key)).collect());
    }

    fn verified(&self, peers: &BTreeMap<Ipv4Addr, OperatorPeer>) -> Rows {
        let inside = peers.iter().filter(|(address, _)| self.range.contains(*address));
        inside.filter_map(|(address, peer)| Some((*address, (peer.clone(), self.verify(peer)?)))).collect()
    }

    fn is_valid(&self, certificate: &OperatorCertificate) -> bool {
        self.verifier.is_current(certificate) && !self.revocations.is_revoked(&certificate.key)
    }

    fn rows(&self) -> MutexGuard<'_, Rows> {
        self.rows.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet::{
        Fleet, Issuer, MeshKey, Operator, OperatorRevocation, OperatorRole, OrderScope, PROTOCOL, PrivateKey,
        RevokedOperator, SignedOrder as _, encoding,
    };
    use std::time::{SystemTime, UNIX_EPOCH};
    use tokio_rustls::rustls::pki_types::CertificateDer;
    use tokio_rustls::rustls::pki_types::pem::PemObject as _;

    struct TestHub {
        dir: tempfile::TempDir,
        topology: Topology,
        root: Issuer,
        revocations: Arc<Revocations>,
        peers: Arc<PeerTable>,
    }

    impl TestHub {
        fn new() -> Self {
            let text = b"name = \"acme\"\n[mesh]\noperators = \"10.10.0.192/26\"\n[groups]\nhub.count = 3\n";
            let dir = tempfile::tempdir().unwrap();
            let root = Issuer::root("acme").unwrap();
            Self {
                topology: Topology::from_fleet(&Fleet::parse("f", text).unwrap()),
                revocations: Arc::new(Revocations::load(dir.path(), "acme", root.certificate())),
                peers: Arc::new(PeerTable::load(dir.path(), BTreeMap::new())),
                root,
                dir,
            }
        }

        fn load(&self) -> OperatorPeers {
            let (revocations, peers) = (self.revocations.clone(), self.peers.clone());
            let root = self.root.certificate();
            OperatorPeers::load(self.dir.path(), &self.topology, root, revocations, peers).unwrap().unwrap()
        }

        fn known(&self) -> Vec<String> {
            self.peers.operators().keys().map(ToString::to_string).collect()
        }
    }

    fn peer(root: &Issuer, key: &PrivateKey, seconds: u64, mesh_key: MeshKey) -> OperatorPeer {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let anna = Operator::new("anna", OperatorRole::Viewer).unwrap();
        let pem = root.operator(&anna, &key.public().unwrap(), (now - 60, now + seconds)).unwrap();
        let der = CertificateDer::from_pem_slice(pem.as_bytes()).unwrap();
        let signature = key.sign(&operator_peer_message("acme", &mesh_key)).unwrap();
        OperatorPeer { certificate: encoding::encode(&der), mesh_key, signature: encoding::encode(&signature) }
    }

    fn rows<const N: usize>(rows: [(&str, &OperatorPeer); N]) -> BTreeMap<Ipv4Addr, OperatorPeer> {
        rows.map(|(address, peer)| (address.parse().unwrap(), peer.clone())).into()
    }

    #[tokio::test]
    async fn only_machines_with_a_proof_are_peers() {
        let hub = TestHub::new();
        let (known, key) = (hub.load(), PrivateKey::generate().unwrap());
        let good = peer(&hub.root, &key, 3600, MeshKey([1; 32]));
        let foreign = peer(&Issuer::root("acme").unwrap(), &key, 3600, MeshKey([2; 32]));
        let other_key = OperatorPeer { mesh_key: MeshKey([3; 32]), ..good.clone() };
        let hub_issuer = hub.root.issuer("acme", "hub-1").unwrap();
        let of_hub = peer(&hub_issuer, &key, 3600, MeshKey([4; 32]));
        known.replace(&rows([
            ("10.10.0.193", &good),
            ("10.10.0.194", &foreign),
            ("10.10.0.195", &other_key),
            ("10.10.0.196", &of_hub),
            ("10.10.0.2", &good),
        ]));
        assert_eq!(hub.known(), ["10.10.0.193"]);
        // The key of a node, and a key of two machines.
        hub.peers.learn("db-1", MeshKey([1; 32]));
        assert!(known.is_of_node(&good) && !known.is_of_node(&other_key));
        assert!(hub.known().is_empty(), "an operator's machine takes the place of a node");
        let next = peer(&hub.root, &key, 3600, MeshKey([5; 32]));
        known.replace(&rows([("10.10.0.193", &next), ("10.10.0.194", &next)]));
        assert_eq!(hub.known(), ["10.10.0.193"]);
    }

    #[tokio::test]
    async fn revoked_and_expired_machines_leave_and_a_boot_needs_no_etcd() {
        let hub = TestHub::new();
        let (known, key) = (hub.load(), PrivateKey::generate().unwrap());
        let short = peer(&hub.root, &PrivateKey::generate().unwrap(), 1, MeshKey([2; 32]));
        let all = rows([("10.10.0.193", &peer(&hub.root, &key, 3600, MeshKey([1; 32]))), ("10.10.0.194", &short)]);
        known.replace(&all);
        assert_eq!(hub.known().len(), 2);
        for _ in 0..500 {
            if hub.dir.path().join(FILE).exists() {
                break;
            }
            sleep(Duration::from_millis(10)).await;
        }
        // A certificate is valid until the end of its last second.
        sleep(Duration::from_millis(2200)).await;
        known.apply();
        assert_eq!(hub.known(), ["10.10.0.193"]);
        hub.peers.set_operators(BTreeMap::new());
        let known = hub.load();
        assert_eq!(hub.known(), ["10.10.0.193"], "a boot without etcd");
        let scope = OrderScope {
            path: OperatorRevocation::PATH.to_owned(),
            hub: "hub-1".to_owned(),
            issued_at: 1,
            nonce: "n".to_owned(),
        };
        let order = OperatorRevocation {
            version: PROTOCOL,
            fleet: "acme".to_owned(),
            name: "anna".to_owned(),
            key: encoding::encode(key.public().unwrap().as_bytes()),
            expires: u64::MAX,
            scope: Some(scope),
        };
        let order = serde_json::to_string(&order).unwrap();
        let signature = encoding::encode(&hub.root.sign(order.as_bytes()).unwrap());
        let revoked = async {
            sleep(Duration::from_millis(50)).await;
            hub.revocations.learn(&RevokedOperator { order, signature });
            let until = tokio::time::Instant::now() + Duration::from_secs(5);
            while !hub.known().is_empty() && tokio::time::Instant::now() < until {
                sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::select! {
            () = known.keep() => unreachable!(),
            () = revoked => {}
        }
        assert!(hub.known().is_empty());
        known.replace(&all);
        assert!(hub.known().is_empty(), "etcd has a revoked machine");
    }
}
