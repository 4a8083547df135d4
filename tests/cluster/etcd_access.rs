//! Authentication and permissions of etcd, with the etcd and the configuration of the images, on loopback.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use bakehouse_tests::network::in_own_network;
use bakehouse_tests::site::{HUB_PORT, TestCluster};
use firstboot::client::etcd::{Etcd, Op};
use firstboot::hub::claims::SlotAllocator;
use firstboot::hub::departures::Identified;
use firstboot::hub::etcd_access::{Access, EtcdAccess, ROOT};
use firstboot::member::take_in;
use firstboot::node::etcd_user::{PATRONI, USER_HEADER};
use firstboot::node::hubs::Hubs;
use firstboot::node::identity::identity;
use firstboot::node::image::{Image, ImageInfo};
use firstboot::node::neighbours::PeerTable;
use firstboot::node::renewal::{renew, take_missing_passwords};
use firstboot::node::state::{State, StateDir};
use fleet::{
    Credential, Fleet, Founder, Introduction, Issuer, MeshKey, Node, PROTOCOL, PrivateKey, PublicKey, Secrets, Ticket,
    Topology, encoding,
};
use fleet_https::{Connection, Identity, request};

/// A node's certificate (PEM) and key.
struct Shown {
    cert: String,
    key: PrivateKey,
}

impl Shown {
    /// Signs a certificate with this issuer, even if its name constraints exclude the node.
    fn new(issuer: &Issuer, topology: &Topology, node: &Node) -> Self {
        let key = PrivateKey::generate().expect("randomness");
        let public: PublicKey = key.public().expect("a key");
        Self { cert: issuer.node(topology, node, &public).expect("an issuer"), key }
    }

    fn node(site: &TestCluster, name: &str) -> Self {
        let hub = &site.topology.hubs[0];
        let issuer = site.root.issuer("acme", &hub.name).expect("a root");
        Self::new(&issuer, &site.topology, site.topology.node(name).expect("a node"))
    }

    fn identity(&self) -> Identity<'_> {
        Identity { cert: &self.cert, key: self.key.pem() }
    }

    fn tls_key(&self) -> String {
        encoding::encode(self.key.public().expect("a key").as_bytes())
    }
}

fn told<T>(answer: firstboot::error::Result<T>) -> String {
    answer.map_or_else(|e| e.chain(), |_| "done".to_owned())
}

/// Puts a key, and retries until etcd accepts it, because the cluster may have just started.
async fn put(etcd: &Etcd, key: &str, value: &str) {
    while etcd.transact(&[], &[Op::Put(key, value.as_bytes())]).await.is_err() {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[test]
fn etcd_accepts_hubs_and_databases_as_clients_and_voters_as_peers() {
    in_own_network(async {
        let site = TestCluster::open("db.count = 1\napp.count = 1\nmonitor.count = 1\n");
        put(&site.etcd(0), "/bakehouse/test", "x").await;
        for (name, is_client, is_peer) in
            [("hub-2", true, true), ("db-1", true, false), ("app-1", false, false), ("monitor-1", false, false)]
        {
            let shown = Shown::node(&site, name);
            let tls = fleet_https::client(site.root.certificate(), Some(shown.identity())).expect("a certificate");
            for (what, (host, port), method, path, may) in [
                ("client", site.cluster.clients()[0].clone(), "POST", "/v3/kv/range", is_client),
                ("peer", site.cluster.peer(0), "GET", "/members", is_peer),
            ] {
                let asked = async {
                    let mut connection = Connection::open(&host, port, &host, &tls).await?;
                    let body = if method == "POST" { r#"{"key":"AA==","range_end":"AA=="}"# } else { "" };
                    connection.ask(request(method, &host, path, &[], body.into())?, 1 << 20).await
                };
                let answer = asked.await.map(|b| String::from_utf8_lossy(&b).into_owned());
                assert_eq!(answer.is_ok(), may, "{name} as a {what}: {answer:?}");
            }
        }
    });
}

#[test]
fn etcd_users_limit_patroni_to_its_own_keys() {
    in_own_network(async {
        let site = TestCluster::open("db.count = 1\napp.count = 1\n");
        let secrets = Secrets::sample();
        let hubs: Vec<Shown> = (1..=3).map(|i| Shown::node(&site, &format!("hub-{i}"))).collect();
        let allocator = |i: usize| {
            let etcd = site.etcd_of(i, hubs[i].identity()).with_user(ROOT, &secrets.etcd_root);
            SlotAllocator::new(etcd, site.topology.clone(), &site.topology.hubs[i].name)
        };
        let allocators = [allocator(0), allocator(1), allocator(2)];
        let keys: Vec<String> = hubs.iter().map(Shown::tls_key).collect();
        let access = |i: usize| EtcdAccess {
            allocator: &allocators[i],
            topology: &site.topology,
            secrets: &secrets,
            slot: &site.topology.hubs[i].name,
            tls_key: &keys[i],
        };
        let connected = site.etcd(1).with_user(ROOT, &secrets.etcd_root);
        put(&connected, "/bakehouse/test", "x").await;
        for (i, key) in keys.iter().enumerate() {
            let mesh_key = MeshKey([i as u8 + 1; 32]);
            allocators[i].register(&site.topology.hubs[i].name, mesh_key, key, "1").await.expect("a free slot");
        }
        let (db, grant) = site.members("db", 1).await.remove(0);

        // Each hub records its own readiness, the database node announces it in a header, and hubs wait for a rollout.
        let waits = |names: &[&str]| Access::WaitsFor(names.iter().map(|n| (*n).to_owned()).collect());
        assert_eq!(access(0).step().await.expect("etcd"), waits(&["db-1", "hub-2", "hub-3"]));
        assert_eq!(access(1).step().await.expect("etcd"), waits(&["db-1", "hub-3"]));
        put(&connected, "/bakehouse/rollout/turn", "{}").await;
        assert_eq!(access(2).step().await.expect("etcd"), Access::WaitsForRollout);
        connected.transact(&[], &[Op::Delete("/bakehouse/rollout/turn")]).await.expect("etcd");
        assert_eq!(access(2).step().await.expect("etcd"), waits(&["db-1"]));
        let tls = fleet_https::client(site.root.certificate(), Some(Identity { cert: &grant.cert, key: db.tls.pem() }))
            .expect("a certificate");
        let mut hub = Connection::open("127.0.0.1", HUB_PORT, "hub-1", &tls).await.expect("the hub answers");
        let asked =
            request("GET", "hub", "/v1/peers", &[(USER_HEADER, PATRONI)], bytes::Bytes::new()).expect("a request");
        hub.ask(asked, 1 << 20).await.expect("the hub answers");
        while connected.get(&["/bakehouse/etcd-ready/db-1"]).await.expect("etcd")[0].revision == 0 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        // Two hubs take the step at the same time. One of them may find the other's change and must try again.
        let (one, two) = (access(0), access(1));
        let (one, two) = tokio::join!(one.step(), two.step());
        assert!(one.is_ok() || two.is_ok(), "{one:?} {two:?}");
        for i in 0..3 {
            assert_eq!(access(i).step().await.expect("etcd"), Access::Enabled);
        }

        // A client with a password stays connected. Without a password, no certificate gives access.
        assert_eq!(connected.get(&["/bakehouse/test"]).await.expect("etcd")[0].value, b"x");
        for anonymous in [site.etcd(0), site.etcd_of(0, Identity { cert: &grant.cert, key: db.tls.pem() })] {
            assert!(told(anonymous.list("/bakehouse/").await).contains("user name is empty"));
            let put = [Op::Put("/bakehouse/slots/hub-1", b"")];
            assert!(told(anonymous.transact(&[], &put).await).contains("user name is empty"));
        }

        // Patroni's user has access only to Patroni's keys, also to those of a restored database.
        let identity = Identity { cert: &grant.cert, key: db.tls.pem() };
        let patroni = site.etcd_of(0, identity).with_user(PATRONI, &grant.secrets.etcd_patroni);
        for key in ["/bakehouse/acme/leader", "/bakehouse/acme@latest/leader"] {
            assert_eq!(told(patroni.transact(&[], &[Op::Put(key, b"db-1")]).await), "done", "{key}");
            assert_eq!(patroni.get(&[key]).await.expect("etcd")[0].value, b"db-1");
        }
        patroni.list("/bakehouse/acme/").await.expect("a permission");
        let lease = patroni.lease(60).await.expect("a permission");
        let then = [Op::PutFor("/bakehouse/acme/leader", b"db-1", &lease)];
        assert_eq!(told(patroni.transact(&[], &then).await), "done");
        for key in ["/bakehouse/slots/hub-1", "/bakehouse/acmeb/leader", "/bakehouse/rollout/paused", "/x"] {
            for then in [Op::Put(key, b"x"), Op::Delete(key)] {
                let answer = told(patroni.transact(&[], &[then]).await);
                assert!(answer.contains("permission denied"), "{then:?}: {answer}");
            }
            assert!(told(patroni.get(&[key]).await).contains("permission denied"));
        }
        assert!(told(patroni.list("/bakehouse/").await).contains("permission denied"));
        let members = connected.members().await.expect("etcd");
        for answer in [
            told(patroni.remove(&members[2]).await),
            told(patroni.add_learner("https://127.0.0.1:1").await),
            told(patroni.put_user(ROOT, "mine").await),
            told(patroni.grant_role(PATRONI, ROOT).await),
        ] {
            assert!(answer.contains("permission denied"), "{answer}");
        }
        let mut watch = patroni.watch("/bakehouse/slots/", 1).await.expect("etcd answers");
        assert_eq!(patroni.next(&mut watch).await.expect("a reply"), None, "the watch is not cancelled");
        assert_eq!(
            (grant.secrets.etcd_root.as_str(), grant.secrets.etcd_patroni.as_str()),
            ("", "sample-etcd-patroni")
        );
    });
}

#[test]
fn client_logs_in_again_after_members_restart() {
    in_own_network(async {
        let mut site = TestCluster::open("app.count = 1\n");
        let secrets = Secrets::sample();
        let root = site.etcd(0).with_user(ROOT, &secrets.etcd_root);
        put(&root, "/bakehouse/test", "x").await;
        root.put_user(ROOT, &secrets.etcd_root).await.expect("etcd");
        root.grant_role(ROOT, ROOT).await.expect("etcd");
        root.enable_auth().await.expect("etcd");
        root.list("/bakehouse/").await.expect("a login");
        for i in 0..3 {
            site.cluster.kill(i);
        }
        for i in 0..3 {
            site.cluster.start_member(&site.topology, i);
        }
        put(&root, "/bakehouse/test", "y").await;
        let (revision, pairs) = root.list("/bakehouse/").await.expect("a second login");
        assert_eq!(pairs.iter().find(|p| p.key == "/bakehouse/test").expect("the key").value, b"y");
        // A watch also uses the new token.
        let mut watch = root.watch("/bakehouse/", revision).await.expect("etcd");
        put(&root, "/bakehouse/test", "z").await;
        let changes = root.next(&mut watch).await.expect("etcd").expect("a change");
        assert_eq!(changes[0].value.as_deref(), Some(&b"z"[..]));
    });
}

/// The etcd member that a hub watches freezes and keeps its connections, while another hub evicts a node.
#[test]
fn hub_sees_an_eviction_within_a_minute_although_its_watch_hangs() {
    in_own_network(async {
        let site = TestCluster::open("db.count = 1\n");
        let (_, grant) = site.members("db", 1).await.remove(0);
        assert_eq!(grant.slot, "db-1");
        let allocator = SlotAllocator::new(site.etcd(0), site.topology.clone(), "hub-1");
        let dir = tempfile::tempdir().expect("a folder");
        let neighbourhood = PeerTable::load(dir.path(), BTreeMap::new());
        let followed = async {
            loop {
                let _ = allocator.follow(|owners| take_in(&site.topology, &neighbourhood, owners)).await;
                tokio::time::sleep(Duration::from_millis(250)).await;
            }
        };
        let evicted = async {
            while !neighbourhood.keys().contains_key("db-1") {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            // The hub has opened its watch by then.
            tokio::time::sleep(Duration::from_secs(1)).await;
            site.cluster.freeze(0);
            let other = SlotAllocator::new(site.etcd(1), site.topology.clone(), "hub-2");
            while other.leave("db-1", true, Identified::Epoch(None), None).await.is_err() {
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            let evicted = Instant::now();
            while neighbourhood.keys().contains_key("db-1") {
                assert!(evicted.elapsed() < Duration::from_secs(60), "the hub still has the evicted node's key");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            println!("the hub removed the key {:.1} s after the eviction", evicted.elapsed().as_secs_f64());
            site.cluster.thaw(0);
        };
        tokio::select! {
            () = followed => {}
            () = evicted => {}
        }
    });
}

fn plan() -> Topology {
    let text = b"name = \"acme\"\n[groups]\nhub.count = 2\ndb.count = 1\nmonitor.count = 1\n";
    Topology::from_fleet(&Fleet::parse("fleet.toml", text).expect("a fleet"))
}

/// The verifiers of the agent and of OpenSSL reject certificates outside of an issuer's name constraints.
#[tokio::test]
async fn verifiers_enforce_name_constraints_of_issuers() {
    let (topology, root) = (plan(), Issuer::root("acme").expect("randomness"));
    let node = |name: &str| topology.node(name).expect("it is a node");
    let operator = Node { name: "eve.operator".to_owned(), hub: 0, ..node("db-1").clone() };
    let issuer = |name: &str| root.founder_issuer(&topology, node(name)).expect("a root");
    let (hub, monitor) = (issuer("hub-1"), issuer("monitor-1"));
    let dir = tempfile::tempdir().expect("a folder");
    fs::write(dir.path().join("root.pem"), root.certificate()).expect("a folder");
    for (by, issuer, whose, may) in [
        ("hub-1", &hub, node("hub-1"), true),
        ("hub-1", &hub, node("db-1"), true),
        ("hub-1", &hub, node("monitor-1"), true),
        ("hub-1", &hub, node("hub-2"), false),
        ("hub-1", &hub, &operator, false),
        ("monitor-1", &monitor, node("monitor-1"), true),
        ("monitor-1", &monitor, node("hub-1"), false),
        ("monitor-1", &monitor, node("db-1"), false),
        ("monitor-1", &monitor, &operator, false),
    ] {
        let shown = Shown::new(issuer, &topology, whose);
        let what = format!("{by} signs {}", whose.name);
        assert_eq!(handshake(&root, &shown, &whose.name).await, may, "{what}, by the agent's verifier");
        fs::write(dir.path().join("leaf.pem"), &shown.cert).expect("a folder");
        fs::write(dir.path().join("issuer.pem"), issuer.certificate()).expect("a folder");
        let verified = Command::new("openssl")
            .current_dir(dir.path())
            .args(["verify", "-CAfile", "root.pem", "-untrusted", "issuer.pem", "leaf.pem"])
            .output()
            .expect("openssl is installed");
        assert_eq!(verified.status.success(), may, "{what}, by OpenSSL: {verified:?}");
    }
}

/// Returns whether a client of the fleet accepts the certificate for `name`, and a server accepts it from a client.
async fn handshake(root: &Issuer, shown: &Shown, name: &str) -> bool {
    let server = fleet_https::server(root.certificate(), shown.identity()).expect("a certificate");
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("loopback");
    let port = listener.local_addr().expect("loopback").port();
    let client = fleet_https::client(root.certificate(), Some(shown.identity())).expect("a certificate");
    let served = tokio::spawn(async move {
        let (tcp, _) = listener.accept().await.expect("loopback");
        tokio_rustls::TlsAcceptor::from(server).accept(tcp).await.is_ok()
    });
    let believed = Connection::open("127.0.0.1", port, name, &client).await.is_ok();
    believed && served.await.expect("a task")
}

/// Go's verifier in etcd enforces the name constraints, too. A voter that is not a hub introduces itself, and the hubs
/// register it.
#[test]
fn hubs_register_a_non_hub_voter_and_etcd_rejects_its_issuer() {
    in_own_network(async {
        let site = TestCluster::open_with("db.count = 1\n", |topology| {
            // Two hubs and a third voter.
            topology.hubs.truncate(2);
            for node in topology.nodes.iter_mut().filter(|n| n.name == "hub-3") {
                node.hub = 0;
                node.roles.retain(|role| role != "hub");
            }
        });
        put(&site.etcd(0), "/bakehouse/test", "x").await;
        let node = |name: &str| site.topology.node(name).expect("it is a node");
        let issuer = site.root.founder_issuer(&site.topology, node("hub-3")).expect("a root");
        let own = Shown::new(&issuer, &site.topology, node("hub-3"));
        for (member, shown, may) in [
            (2, &own, true),
            (0, &own, false),
            (0, &Shown::new(&issuer, &site.topology, node("hub-1")), false),
            (0, &Shown::new(&issuer, &site.topology, node("db-1")), false),
        ] {
            let tls = fleet_https::client(site.root.certificate(), Some(shown.identity())).expect("a certificate");
            let one = vec![site.cluster.clients()[member].clone()];
            assert_eq!(Etcd::new(one, tls).get(&["/bakehouse/test"]).await.is_ok(), may, "member {member}");
        }

        let tls = fleet_https::client(site.root.certificate(), Some(own.identity())).expect("a certificate");
        let hubs = Hubs::new(&site.topology, &BTreeMap::new(), "hub-3", tls);
        let introduction = Introduction { version: PROTOCOL, mesh_key: MeshKey([7; 32]), epoch: 1 };
        let answers = hubs.introduce(&introduction, |_| false).await;
        assert_eq!(answers.len(), 2);
        let record = loop {
            let found = site.etcd(1).get(&["/bakehouse/slots/hub-3"]).await.expect("etcd");
            if found[0].revision != 0 {
                break serde_json::from_slice::<fleet::SlotRecord>(&found[0].value).expect("a record");
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        };
        assert_eq!((record.epoch, record.mesh_key, &record.tls_key), (1, MeshKey([7; 32]), &own.tls_key()));
        // Its introduction also marks its etcd as ready for authentication, so the hubs do not wait for it.
        while site.etcd(1).get(&["/bakehouse/etcd-ready/hub-3"]).await.expect("etcd")[0].value
            != record.tls_key.as_bytes()
        {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        // The hubs fence another machine with the same founder's ticket, and the slot's record stays unchanged.
        let other = Shown::new(&issuer, &site.topology, node("hub-3"));
        let tls = fleet_https::client(site.root.certificate(), Some(other.identity())).expect("a certificate");
        let hubs = Hubs::new(&site.topology, &BTreeMap::new(), "hub-3", tls);
        let introduction = Introduction { version: PROTOCOL, mesh_key: MeshKey([8; 32]), epoch: 1 };
        let begun = Instant::now();
        while !hubs.introduce(&introduction, |_| false).await.iter().all(|answer| answer.peers.fenced.is_some()) {
            assert!(begun.elapsed() < Duration::from_secs(20), "the hubs have not fenced the slot's second machine");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        let found = site.etcd(1).get(&["/bakehouse/slots/hub-3"]).await.expect("etcd");
        let record: fleet::SlotRecord = serde_json::from_slice(&found[0].value).expect("a record");
        assert_eq!(record.mesh_key, MeshKey([7; 32]));
    });
}

/// Creates folders, a ticket and an image for a node's first boot.
fn first_boot(site: &TestCluster, group: &str, right: Credential) -> (tempfile::TempDir, StateDir, PathBuf, Image) {
    let dir = tempfile::tempdir().expect("a folder");
    let (state, credentials) = (dir.path().join("state"), dir.path().join("credentials"));
    for folder in [&state, &credentials] {
        fs::create_dir(folder).expect("a folder");
    }
    let root = site.root.certificate().to_owned();
    let ticket = Ticket { version: Ticket::VERSION, fleet: "acme".to_owned(), root, endpoints: BTreeMap::new(), right };
    fs::write(credentials.join(Ticket::CREDENTIAL), serde_json::to_vec(&ticket).expect("JSON")).expect("a folder");
    let info = ImageInfo {
        id: format!("acme-{group}"),
        version: "1".to_owned(),
        group: group.to_owned(),
        roles: vec![group.to_owned()],
        health: Vec::new(),
    };
    (dir, StateDir::new(&state, None), credentials, Image { info, topology: site.topology.clone() })
}

#[test]
fn updated_node_fetches_its_missing_etcd_password_at_start() {
    in_own_network(async {
        let site = TestCluster::open("db.count = 1\napp.count = 1\n");
        for (group, password) in [("db", "sample-etcd-patroni"), ("app", "")] {
            let (_dir, states, credentials, image) =
                first_boot(&site, group, Credential::Joiner(site.token(group, |_| {})));
            let mut who = identity(&states, Some(&credentials), &image).await.expect("a node");
            assert_eq!(who.state.secrets.etcd_patroni, password);
            who.state.secrets.etcd_patroni.clear();
            who.state.store(&states).expect("a disk");
            let who = identity(&states, Some(&credentials), &image).await.expect("a node");
            let (keys, epoch) = (who.keys.clone(), who.state.epoch);
            let who = take_missing_passwords(&states, who, &image).await.expect("a disk");
            assert_eq!((who.state.secrets.etcd_patroni.as_str(), who.state.secrets.etcd_root.as_str()), (password, ""));
            assert!(who.keys == keys && who.state.epoch == epoch, "the node's identity changed");
            let kept = State::load(&states).expect("a disk").expect("a state");
            assert_eq!(kept, who.state);
        }
    });
}

#[test]
fn hub_signs_its_own_renewed_certificate() {
    in_own_network(async {
        let site = TestCluster::open("");
        let hub = &site.topology.hubs[0];
        let issuer = site.root.founder_issuer(&site.topology, hub).expect("a root");
        let founder =
            Founder { slot: hub.name.clone(), issuer: issuer.clone(), secrets: Secrets::sample(), replaces: None };
        let (dir, states, credentials, image) = first_boot(&site, "hub", Credential::Founder(founder));
        let who = identity(&states, Some(&credentials), &image).await.expect("a node");
        let allocator = SlotAllocator::new(site.etcd(0), site.topology.clone(), "hub-1");
        put(&site.etcd(0), "/bakehouse/test", "x").await;
        let tls_key = encoding::encode(who.keys.tls.public().expect("a key").as_bytes());
        let mesh_key = who.keys.mesh_public().expect("a key");
        allocator.register("hub-1", mesh_key, &tls_key, "1").await.expect("a free slot");
        let file = dir.path().join("state/keys.json");
        let text = fs::read_to_string(&file).expect("a file");
        let keys: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        fs::write(&file, text.replace(&keys["made"].to_string(), "1")).expect("a folder");

        let who = identity(&states, Some(&credentials), &image).await.expect("a node");
        let (who, renewed) = renew(&states, who, &image).await.expect("a disk");
        assert!(renewed && who.state.epoch == 2);
        assert!(who.state.cert.ends_with(issuer.certificate()), "another hub signed the certificate");
        let shown = Shown { cert: who.state.cert.clone(), key: who.keys.tls.clone() };
        assert!(handshake(&site.root, &shown, "hub-1").await);
    });
}
