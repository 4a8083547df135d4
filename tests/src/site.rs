//! A test cluster for the hubs' protocols: three hub APIs and three etcd members on loopback.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use firstboot::client::etcd::Etcd;
use firstboot::hub::api::Hub;
use firstboot::hub::claims::SlotAllocator;
use firstboot::hub::etcd_access::ROOT;
use firstboot::hub::listener::serve;
use firstboot::hub::orders::OrderLog;
use firstboot::member::take_in;
use firstboot::node::neighbours::PeerTable;
use firstboot::node::operator_peers::OperatorPeers;
use firstboot::node::revocations::Revocations;
use fleet::{
    Claims, Departure, Fleet, Grant, Issuer, JoinReply, JoinRequest, Joiner, MeshKey, OperatorRevocation, OrderScope,
    PROTOCOL, PrivateKey, Reason, Revocation, Rollout, RolloutOrder, RolloutRequest, Secrets, SignedOrder, Tokens,
    TokensRequest, Topology, encoding,
};
use fleet_https::{Connection, Identity, request};
use serde_json::{Value, json};

use crate::Cluster;

/// Port of the hubs' API.
pub const HUB_PORT: u16 = 21_000;
/// First port of the etcd members.
const ETCD_PORT: u16 = 21_100;

/// Returns the address of hub `number`, which counts from 1.
#[must_use]
pub fn hub_address(number: u8) -> SocketAddr {
    ([127, 0, 0, number], HUB_PORT).into()
}

/// Three hubs at 127.0.0.1 to 127.0.0.3, and three etcd members.
pub struct TestCluster {
    /// The three hubs, and the groups of the test.
    pub topology: Topology,
    /// The fleet's root.
    pub root: Issuer,
    /// The hubs' etcd.
    pub cluster: Cluster,
    dir: tempfile::TempDir,
    /// The servers of the hubs' API.
    pub hubs: Vec<tokio::task::JoinHandle<()>>,
    /// The hubs' TLS keys.
    pub keys: Vec<PrivateKey>,
}

/// A node that joins: its keys, and its ticket's token.
#[derive(Clone)]
pub struct TestJoiner {
    /// The ticket's token and its key.
    pub joiner: Joiner,
    /// The node's TLS key.
    pub tls: PrivateKey,
    /// The node's public key in the mesh.
    pub mesh_key: MeshKey,
    /// The group whose slot the node claims.
    pub group: String,
}

impl TestCluster {
    /// Starts the hubs' API and etcd. `groups` are TOML lines of the other groups.
    #[must_use]
    pub fn open(groups: &str) -> Self {
        Self::open_with(groups, |_| {})
    }

    /// Like [`Self::open`], and `change` edits the topology before the hubs start.
    #[must_use]
    pub fn open_with(groups: &str, change: impl FnOnce(&mut Topology)) -> Self {
        // The hubs run in this process. Their log is on standard error.
        firstboot::host::log::start(firstboot::host::log::Process::Short);
        let toml = format!(
            "name = \"acme\"\n[mesh]\nsubnet = \"10.10.0.0/16\"\ntransport = \"10.11.0.0/16\"\nport = {HUB_PORT}\n\
             [vip]\naddress = \"10.10.0.100\"\n\
             [groups]\n{groups}\n[groups.hub]\ncount = 3\nendpoints = [\"127.0.0.1\", \"127.0.0.2\", \"127.0.0.3\"]\n"
        );
        let mut topology = Topology::from_fleet(&Fleet::parse("fleet.toml", toml.as_bytes()).expect("a fleet"));
        // Hubs reach each other over loopback instead of the mesh.
        for node in topology.nodes.iter_mut().chain(&mut topology.hubs).filter(|n| n.hub > 0) {
            node.address = [127, 0, 0, node.hub as u8].into();
        }
        change(&mut topology);
        let root = Issuer::root("acme").expect("randomness");
        let cluster = Cluster::start(&topology, &root, ETCD_PORT);
        let dir = tempfile::tempdir().expect("a folder");
        let keys = (0..3).map(|_| PrivateKey::generate().expect("randomness")).collect();
        let mut site = Self { topology, root, cluster, dir, hubs: Vec::new(), keys };
        for i in 0..site.topology.hubs.len() {
            let hub = site.hub(i);
            site.hubs.push(hub);
        }
        // The runtime starts the hubs in the background.
        for i in 1..=site.topology.hubs.len() {
            while TcpStream::connect(hub_address(i as u8)).is_err() {
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        site
    }

    /// Returns the state folder of a hub.
    #[must_use]
    pub fn state(&self, i: usize) -> PathBuf {
        self.dir.path().join(&self.topology.hubs[i].name)
    }

    /// Registers the hubs in etcd, as a founder's agent does, and waits until each hub has read all three records.
    /// Tests of an empty cluster do not call it.
    pub async fn register_hubs(&self) {
        for (i, (node, key)) in self.topology.hubs.iter().zip(&self.keys).enumerate() {
            let allocator = SlotAllocator::new(self.etcd(i), self.topology.clone(), &node.name);
            let tls_key = encoding::encode(key.public().expect("a key").as_bytes());
            let mesh_key = MeshKey([i as u8 + 1; 32]);
            let mut left = 100;
            while allocator.register(&node.name, mesh_key, &tls_key, "1").await.is_err() {
                left -= 1;
                assert!(left > 0, "{} cannot register in etcd", node.name);
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
        let hubs = self.topology.hubs.len();
        for i in 0..hubs {
            let mut left = 100;
            while PeerTable::load(&self.state(i), BTreeMap::new()).pins().len() < hubs {
                left -= 1;
                assert!(left > 0, "hub-{} has not read the records of the others", i + 1);
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }

    /// Starts the API of one hub like a new process, with only the state on its disk.
    #[must_use]
    pub fn hub(&self, i: usize) -> tokio::task::JoinHandle<()> {
        let node = self.topology.hubs[i].clone();
        let issuer = self.root.issuer("acme", &node.name).expect("a root");
        let key = &self.keys[i];
        let cert = issuer.node(&self.topology, &node, &key.public().expect("a key")).expect("an issuer");
        let own = Identity { cert: &cert, key: key.pem() };
        let dir = self.state(i);
        std::fs::create_dir_all(&dir).expect("a folder");
        let etcd = || self.etcd_of(i, own).with_user(ROOT, &Secrets::sample().etcd_root);
        let allocator = Arc::new(SlotAllocator::new(etcd(), self.topology.clone(), &node.name).with_records(&dir));
        // Like the agent: the API uses etcd connections of its own thread.
        let served = Arc::new(allocator.beside(etcd()));
        let neighbourhood = Arc::new(PeerTable::load(&dir, BTreeMap::new()));
        let revocations = Arc::new(Revocations::load(&dir, "acme", self.root.certificate()));
        let operators = OperatorPeers::load(
            &dir,
            &self.topology,
            self.root.certificate(),
            revocations.clone(),
            neighbourhood.clone(),
        );
        let operators = operators.expect("a root").map(Arc::new);
        let hub = Arc::new(Hub {
            topology: self.topology.clone(),
            root: self.root.certificate().to_owned(),
            issuer,
            epoch: 1,
            secrets: Secrets::sample(),
            allocator: served,
            neighbourhood: neighbourhood.clone(),
            orders: OrderLog::default(),
            revocations: revocations.clone(),
            operator_peers: operators.clone(),
        });
        let at: SocketAddr = format!("127.0.0.{}:{}", i + 1, self.topology.mesh.port).parse().expect("an address");
        let tls = fleet_https::server(self.root.certificate(), own).expect("a certificate");
        let topology = self.topology.clone();
        tokio::spawn(async move {
            let followed = async {
                loop {
                    let _ = allocator.follow(|owners| take_in(&topology, &neighbourhood, owners)).await;
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            };
            let revoked = async {
                loop {
                    let _ = allocator.follow_revocations(&revocations).await;
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            };
            let admitted = async {
                let Some(known) = operators else { return std::future::pending().await };
                loop {
                    let _ = allocator.follow_operator_peers(&known).await;
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            };
            tokio::select! {
                served = serve(hub, at, tls) => served.expect("the port is free"),
                () = followed => {}
                () = revoked => {}
                () = admitted => {}
                () = allocator.keep_records(&dir) => {}
            }
        })
    }

    /// Returns an etcd client with a hub's certificate and without a password.
    #[must_use]
    pub fn etcd(&self, i: usize) -> Etcd {
        let node = &self.topology.hubs[i];
        let issuer = self.root.issuer("acme", &node.name).expect("a root");
        let key = PrivateKey::generate().expect("randomness");
        let cert = issuer.node(&self.topology, node, &key.public().expect("a key")).expect("an issuer");
        self.etcd_of(i, Identity { cert: &cert, key: key.pem() })
    }

    /// Calls etcd's gateway with a hub's certificate.
    pub async fn etcd_call(&self, path: &str, body: &Value) {
        self.etcd_ask(0, path, body).await.expect("etcd takes it");
    }

    async fn etcd_ask(&self, member: usize, path: &str, body: &Value) -> Result<bytes::Bytes, fleet_https::Error> {
        let node = &self.topology.hubs[0];
        let issuer = self.root.issuer("acme", &node.name).expect("a root");
        let cert = issuer.node(&self.topology, node, &self.keys[0].public().expect("a key")).expect("an issuer");
        let own = Identity { cert: &cert, key: self.keys[0].pem() };
        let tls = fleet_https::client(self.root.certificate(), Some(own)).expect("a certificate");
        let (host, port) = &self.cluster.clients()[member];
        let mut etcd = Connection::open(host, *port, host, &tls).await.expect("etcd");
        let body = serde_json::to_vec(body).expect("JSON");
        etcd.ask(request("POST", host, path, &[], body.into()).expect("HTTP"), 1 << 20).await
    }

    /// Makes a hub's etcd member the leader, with the peer address that the topology gives it.
    pub async fn lead_etcd(&self, hub: &str) {
        let members = self.etcd(0).members().await.expect("etcd has a leader");
        let member = members.iter().find(|m| m.name == hub).expect("a member");
        let address = self.topology.node(hub).expect("a hub").address;
        let urls: Vec<_> = member.peer_urls.iter().cloned().chain([format!("https://{address}:2380")]).collect();
        self.etcd_call("/v3/cluster/member/update", &json!({ "ID": member.id, "peerURLs": urls })).await;
        for i in 0..self.cluster.clients().len() {
            // Only the leader can do it.
            let ask = json!({ "targetID": member.id });
            let _ = self.etcd_ask(i, "/v3/maintenance/transfer-leadership", &ask).await;
        }
        let status = self.etcd_ask(0, "/v3/maintenance/status", &json!({})).await.expect("etcd answers");
        let status: Value = serde_json::from_slice(&status).expect("JSON");
        assert_eq!(status["leader"], member.id, "{hub} does not lead");
    }

    /// Returns an etcd client with this certificate, which tries member `i` first.
    #[must_use]
    pub fn etcd_of(&self, i: usize, own: Identity) -> Etcd {
        let mut members = self.cluster.clients();
        let first = i % members.len();
        members.rotate_left(first);
        Etcd::new(members, fleet_https::client(self.root.certificate(), Some(own)).expect("a certificate"))
    }

    /// Mints a token for one node, without expiry. `change` edits its claims.
    pub fn token(&self, group: &str, change: impl FnOnce(&mut Claims)) -> Joiner {
        let mut claims = Claims {
            fleet: "acme".to_owned(),
            id: encoding::encode(PrivateKey::generate().expect("randomness").public().expect("a key").as_bytes()),
            group: group.to_owned(),
            slot: None,
            replace: false,
            uses: 1,
            expires: u64::MAX,
            key: String::new(),
        };
        change(&mut claims);
        Joiner::mint(&self.root, claims).expect("a root")
    }

    /// Joins `count` nodes of a group, through one hub after the other.
    pub async fn members(&self, group: &str, count: usize) -> Vec<(TestJoiner, Grant)> {
        let token = self.token(group, |c| c.uses = count as u32);
        let mut members = Vec::new();
        for i in 0..count {
            let asker = Self::asker(&token, group);
            let grant = granted(self.insist(&asker, i).await);
            members.push((asker, grant));
        }
        members
    }

    /// Sends a member's request to a hub and returns the reply.
    ///
    /// # Errors
    /// If the connection fails or the hub refuses the request.
    pub async fn member(
        &self,
        hub: usize,
        (who, grant): (&TestJoiner, &Grant),
        (method, path): (&str, &str),
        body: Vec<u8>,
    ) -> Result<bytes::Bytes, String> {
        let own = Identity { cert: &grant.cert, key: who.tls.pem() };
        let tls = fleet_https::client(self.root.certificate(), Some(own)).expect("a certificate");
        let (host, name) = (format!("127.0.0.{}", hub + 1), self.topology.hubs[hub].name.clone());
        let asked = async {
            let mut connection = Connection::open(&host, self.topology.mesh.port, &name, &tls).await?;
            connection.ask(request(method, "hub", path, &[], body.into())?, 1 << 20).await
        };
        asked.await.map_err(|e| fleet::ErrorChain::new(&e).to_string())
    }

    /// Sends an order signed with this root to hub-2 and returns the reply.
    async fn signed<T: SignedOrder>(&self, order: T, root: &Issuer) -> Result<bytes::Bytes, String> {
        self.order(1, T::PATH, &order.with_scope(scope(T::PATH, "hub-2")), root).await
    }

    /// Posts an order without changes to `path` of a hub and returns the reply.
    ///
    /// # Errors
    /// If the connection fails or the hub refuses the order.
    pub async fn order<T: SignedOrder>(
        &self,
        hub: usize,
        path: &str,
        order: &T,
        root: &Issuer,
    ) -> Result<bytes::Bytes, String> {
        let body = serde_json::to_vec(order).expect("JSON");
        let tls = fleet_https::client(self.root.certificate(), None).expect("a certificate");
        let asked = async {
            let (host, name) = (format!("127.0.0.{}", hub + 1), format!("hub-{}", hub + 1));
            let mut hub = Connection::open(&host, self.topology.mesh.port, &name, &tls).await?;
            hub.post_signed(path, &body, |message| root.sign(message), 1 << 20).await
        };
        asked.await.map_err(|e| fleet::ErrorChain::new(&e).to_string())
    }

    /// # Errors
    /// If the hub refuses the order.
    pub async fn rollout(&self, order: RolloutOrder, root: &Issuer) -> Result<Rollout, String> {
        let order = RolloutRequest { version: PROTOCOL, fleet: self.topology.name.clone(), order, scope: None };
        let answer = self.signed(order, root).await?;
        serde_json::from_slice(&answer).map_err(|e| e.to_string())
    }

    /// # Errors
    /// If the hub refuses the order.
    pub async fn tokens(&self, root: &Issuer) -> Result<Tokens, String> {
        let order = TokensRequest { version: PROTOCOL, fleet: self.topology.name.clone(), scope: None };
        serde_json::from_slice(&self.signed(order, root).await?).map_err(|e| e.to_string())
    }

    /// Revokes a token.
    ///
    /// # Errors
    /// If the hub refuses the order.
    pub async fn revoke(&self, token: &str, root: &Issuer) -> Result<(), String> {
        let order = Revocation { version: PROTOCOL, fleet: "acme".to_owned(), token: token.to_owned(), scope: None };
        self.signed(order, root).await.map(drop)
    }

    /// Revokes the certificate of an operator.
    ///
    /// # Errors
    /// If the hub refuses the order.
    pub async fn revoke_operator(&self, order: &OperatorRevocation, root: &Issuer) -> Result<(), String> {
        self.signed(order.clone(), root).await.map(drop)
    }

    /// Orders a node to leave.
    ///
    /// # Errors
    /// If the hub refuses the order.
    pub async fn leave(&self, slot: &str, now: bool, root: &Issuer) -> Result<(), String> {
        self.signed(departure(slot, now, None), root).await.map(drop)
    }

    /// Creates a node with new keys.
    #[must_use]
    pub fn asker(joiner: &Joiner, group: &str) -> TestJoiner {
        let tls = PrivateKey::generate().expect("randomness");
        let mesh_key = MeshKey(tls.public().expect("a key").as_bytes()[1..33].try_into().expect("32 bytes"));
        TestJoiner { joiner: joiner.clone(), tls, mesh_key, group: group.to_owned() }
    }

    /// Claims a slot until a hub replies with something else than `Busy`.
    pub async fn insist(&self, asker: &TestJoiner, first: usize) -> JoinReply {
        insist(self.root.certificate().to_owned(), self.topology.mesh.port, asker.clone(), first).await
    }
}

/// Returns the scope of an order: this path, this hub, now.
#[must_use]
pub fn scope(path: &str, hub: &str) -> OrderScope {
    OrderScope {
        path: path.to_owned(),
        hub: hub.to_owned(),
        issued_at: SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs(),
        nonce: encoding::encode(PrivateKey::generate().expect("randomness").public().expect("a key").as_bytes()),
    }
}

/// Returns the order that a node of the test fleet leaves. `epoch` limits the order to that owner of the slot.
#[must_use]
pub fn departure(slot: &str, now: bool, epoch: Option<u64>) -> Departure {
    Departure {
        version: PROTOCOL,
        fleet: "acme".to_owned(),
        slot: slot.to_owned(),
        now,
        epoch,
        tls_key: None,
        scope: None,
    }
}

/// Sends one claim to one hub.
///
/// # Errors
/// If the hub does not reply.
pub async fn ask(root: String, port: u16, asker: TestJoiner, hub: usize) -> firstboot::error::Result<JoinReply> {
    let asked = JoinRequest {
        version: PROTOCOL,
        token: asker.joiner.token.clone(),
        group: asker.group.clone(),
        image: "1".to_owned(),
        mesh_key: asker.mesh_key,
        tls_key: encoding::encode(asker.tls.public().expect("a key").as_bytes()),
    };
    let body = serde_json::to_vec(&asked).expect("JSON");
    let host = format!("127.0.0.{}", hub + 1);
    let tls = fleet_https::client(&root, None).expect("a certificate");
    let mut connection = Connection::open(&host, port, &format!("hub-{}", hub + 1), &tls).await?;
    let sign = |message: &[u8]| asker.joiner.key.sign(message);
    let answer = connection.post_signed("/v1/join", &body, sign, fleet::LONGEST).await?;
    Ok(serde_json::from_slice(&answer).expect("a reply"))
}

/// Claims a slot from one hub after the other until one replies with something else than `Busy`.
pub async fn insist(root: String, port: u16, asker: TestJoiner, first: usize) -> JoinReply {
    for attempt in 0..400 {
        match ask(root.clone(), port, asker.clone(), (first + attempt) % 3).await {
            Ok(JoinReply::Refused(no)) if no.reason == Reason::Busy => {}
            Ok(reply) => return reply,
            Err(_) => {}
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("no hub decides the claim of {}", asker.mesh_key);
}

/// Returns the grant, and panics if the hub refused the claim.
pub fn granted(reply: JoinReply) -> Grant {
    match reply {
        JoinReply::Granted(grant) => grant,
        JoinReply::Refused(no) => panic!("refused: {no:?}"),
    }
}

/// Returns the reason of a refusal, and panics if the hub granted the claim.
pub fn refused(reply: JoinReply) -> Reason {
    match reply {
        JoinReply::Granted(grant) => panic!("granted {}", grant.slot),
        JoinReply::Refused(no) => no.reason,
    }
}
