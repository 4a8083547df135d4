//! Operators' connections to nodes: real hubs, and real servers of the node API, on loopback.

mod audit;
mod limits;
mod page;
mod wireguard;

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bakehouse_tests::network::in_own_network;
use bakehouse_tests::site::{HUB_PORT, TestCluster, TestJoiner};
use firstboot::api::{self, NodeApi, Tasks};
use firstboot::host::dbus::Phase;
use firstboot::node::drained::DrainState;
use firstboot::node::hubs::Hubs;
use firstboot::node::outbox::Outbox;
use firstboot::node::revocations::Revocations;
use fleet::node_api::{
    DRAINED_PATH, EXEC_PATH, ExecRequest, JOURNAL_PATH, JournalLine, LOCK_PATH, NODE_API_PORT, NodeStatus, REBOOT_PATH,
    STATUS_PATH,
};
use fleet::{
    Grant, Issuer, Operator, OperatorRevocation, OperatorRole, PROTOCOL, PrivateKey, RevokedOperator, encoding,
};
use fleet_https::{ClientConfig, Connection, Error, Identity, request};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;

const LONGEST: usize = 1 << 20;

/// A node that serves the node API on its address in the mesh.
struct TestNode {
    name: String,
    address: Ipv4Addr,
    /// Presents the node's certificate.
    tls: Arc<ClientConfig>,
    revocations: Arc<Revocations>,
    server: JoinHandle<()>,
    dir: tempfile::TempDir,
}

impl TestNode {
    fn start(site: &TestCluster, (joiner, grant): &(TestJoiner, Grant)) -> Self {
        let node = site.topology.node(&grant.slot).expect("a node").clone();
        let added = Command::new("ip").args(["addr", "add", &format!("{}/32", node.address), "dev", "lo"]).status();
        assert!(added.expect("ip").success());
        let dir = tempfile::tempdir().expect("a folder");
        let own = Identity { cert: &grant.cert, key: joiner.tls.pem() };
        let root = site.root.certificate();
        let tls = fleet_https::client(root, Some(own)).expect("a certificate");
        let revocations = Arc::new(Revocations::load(dir.path(), "acme", root));
        // The sender is dropped, and the receiver keeps the last phase.
        let phase = watch::Sender::new(Phase::Ready).subscribe();
        let hubs = Arc::new(Hubs::new(&site.topology, &BTreeMap::new(), &node.name, tls.clone()));
        let recorder = hubs.clone();
        let drained = hubs.clone();
        let api = NodeApi {
            topology: site.topology.clone(),
            node: node.clone(),
            image: "7".to_owned(),
            epoch: grant.epoch,
            root: root.to_owned(),
            tls: tls.clone(),
            revocations: revocations.clone(),
            phase,
            // The test's machine may have a bus, and the test must not reach it.
            bus: Some("unix:path=/nonexistent".to_owned()),
            journal: journal_socket(dir.path()),
            postgres: dir.path().join("postgres.sock"),
            locker: Box::new(move |seconds| {
                let hubs = hubs.clone();
                Box::pin(async move { hubs.lock(seconds).await })
            }),
            outbox: Arc::new(Outbox::load(
                dir.path(),
                &grant.slot,
                Box::new(move |entries| {
                    let hubs = recorder.clone();
                    Box::pin(async move { hubs.audit(&entries).await })
                }),
            )),
            drained: Arc::new(DrainState::load(dir.path(), &dir.path().join("run"))),
            drainer: Box::new(move |request| {
                let hubs = drained.clone();
                Box::pin(async move { hubs.drained(request).await })
            }),
            tasks: Tasks::default(),
        };
        let server = fleet_https::mutual_server(root, own).expect("a certificate");
        let server = tokio::spawn(api::keep(Arc::new(api), server));
        // The runtime starts the server in the background.
        while std::net::TcpStream::connect((node.address, NODE_API_PORT)).is_err() {
            std::thread::sleep(Duration::from_millis(10));
        }
        Self { name: node.name, address: node.address, tls, revocations, server, dir }
    }

    /// Connects to the node without a hub, as only a hub can.
    async fn direct(&self, tls: &Arc<ClientConfig>) -> Result<Connection, Error> {
        Connection::open(&self.address.to_string(), NODE_API_PORT, &self.name, tls).await
    }
}

impl Drop for TestNode {
    fn drop(&mut self) {
        self.server.abort();
    }
}

fn journal_socket(dir: &Path) -> PathBuf {
    dir.join("journal.sock")
}

fn page_socket(dir: &Path) -> PathBuf {
    dir.join("page.sock")
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs()
}

/// An operator with a certificate that `issuer` signed.
struct TestOperator {
    tls: Arc<ClientConfig>,
    key: String,
    name: String,
    role: OperatorRole,
    /// The certificate and the private key, PEM.
    pem: [String; 2],
}

impl TestOperator {
    fn new(site: &TestCluster, name: &str, role: OperatorRole) -> Self {
        Self::with(site, name, role, (now() - 60, now() + 3600), &site.root, "")
    }

    fn with(
        site: &TestCluster,
        name: &str,
        role: OperatorRole,
        valid: (u64, u64),
        issuer: &Issuer,
        intermediate: &str,
    ) -> Self {
        let key = PrivateKey::generate().expect("randomness");
        let public = key.public().expect("a key");
        let operator = Operator::new(name, role).expect("a name");
        let cert = issuer.operator(&operator, &public, valid).expect("an issuer") + intermediate;
        let own = Identity { cert: &cert, key: key.pem() };
        let tls = fleet_https::client(site.root.certificate(), Some(own)).expect("a certificate");
        let pem = [cert, key.pem().to_owned()];
        Self { tls, key: encoding::encode(public.as_bytes()), name: name.to_owned(), role, pem }
    }

    fn revocation(&self) -> OperatorRevocation {
        OperatorRevocation {
            version: PROTOCOL,
            fleet: "acme".to_owned(),
            name: self.name.clone(),
            key: self.key.clone(),
            expires: now() + 3600,
            scope: None,
        }
    }
}

/// Makes the client of a machine with a certificate of hub-1's issuer for any name.
fn signed_by_hub(site: &TestCluster, name: &str) -> Arc<ClientConfig> {
    let issuer = site.root.issuer("acme", "hub-1").expect("a root");
    let key = PrivateKey::generate().expect("randomness");
    let node = fleet::Node { name: name.to_owned(), ..site.topology.node("db-1").expect("a node").clone() };
    let cert = issuer.node(&site.topology, &node, &key.public().expect("a key")).expect("an issuer");
    fleet_https::client(site.root.certificate(), Some(Identity { cert: &cert, key: key.pem() })).expect("a certificate")
}

async fn through(tls: &Arc<ClientConfig>, hub: u8, node: &str) -> Result<Connection, Error> {
    let (host, name) = (format!("127.0.0.{hub}"), format!("hub-{hub}"));
    Connection::through((&host, HUB_PORT), &name, tls, node).await
}

async fn ask(connection: &mut Connection, method: &str, path: &str, body: &str) -> Result<bytes::Bytes, Error> {
    connection.ask(request(method, "node", path, &[], body.to_owned().into())?, LONGEST).await
}

async fn status(connection: &mut Connection) -> Result<NodeStatus, Error> {
    let body = ask(connection, "GET", STATUS_PATH, "").await?;
    Ok(serde_json::from_slice(&body).expect("JSON"))
}

/// Returns the text of an error, and panics if there is none.
fn refused<T>(result: Result<T, Error>, what: &str) -> String {
    match result {
        Ok(_) => panic!("{what} was accepted"),
        Err(e) => fleet::ErrorChain::new(&e).to_string(),
    }
}

/// Asks a node for its state through a hub.
async fn status_through(tls: &Arc<ClientConfig>, hub: u8, node: &str) -> Result<NodeStatus, Error> {
    status(&mut through(tls, hub, node).await?).await
}

#[test]
fn viewer_reads_through_a_hub_and_acts_on_nothing() {
    in_own_network(async {
        let site = TestCluster::open("db.count = 2\n");
        let members = site.members("db", 1).await;
        let node = TestNode::start(&site, &members[0]);
        let viewer = TestOperator::new(&site, "anna", OperatorRole::Viewer);
        for hub in 1..=3 {
            let status = status_through(&viewer.tls, hub, "db-1").await.expect("a reply");
            assert_eq!((status.node.as_str(), status.image.as_str(), status.epoch), ("db-1", "7", 1));
            assert_eq!(status.phase, "ready");
            assert!(status.memory.total > 0 && status.disks.contains_key("/") && status.uptime > 0);
            // Neither systemd nor Patroni runs here. The other parts of the reply do not depend on them.
            assert!(status.database.is_none() && status.failed.is_empty() && !status.clock_synchronized);
        }
        let mut connection = through(&viewer.tls, 1, "db-1").await.expect("a connection");
        let text = refused(ask(&mut connection, "POST", REBOOT_PATH, "{}").await, "a viewer's reboot");
        assert!(text.contains("anna has the role viewer, and this request needs the role operator"), "{text}");
        let exec = ExecRequest { command: vec!["true".to_owned()], seconds: 1 };
        let exec = serde_json::to_string(&exec).expect("JSON");
        let text = refused(ask(&mut connection, "POST", EXEC_PATH, &exec).await, "a viewer's command");
        assert!(text.contains("needs the role admin"), "{text}");
        let text = refused(ask(&mut connection, "GET", "/v1/peers", "").await, "an unknown path");
        assert!(text.contains("unknown path"), "{text}");
        // The connection still works. An admin runs commands only if fleet.toml permits it.
        status(&mut connection).await.expect("a reply");
        let admin = TestOperator::new(&site, "ben", OperatorRole::Admin);
        let mut connection = through(&admin.tls, 2, "db-1").await.expect("a connection");
        let text = refused(ask(&mut connection, "POST", EXEC_PATH, &exec).await, "a command");
        assert!(text.contains("permits no commands") && text.contains("[access]"), "{text}");
        let text =
            refused(ask(&mut connection, "POST", REBOOT_PATH, r#"{"force":"db-2"}"#).await, "another node's name");
        assert!(text.contains("names another node"), "{text}");
        drop(node);
    });
}

#[test]
fn hubs_forward_only_operators_and_only_to_the_node_api() {
    in_own_network(async {
        let site = TestCluster::open("db.count = 2\n");
        let members = site.members("db", 1).await;
        let node = TestNode::start(&site, &members[0]);
        let viewer = TestOperator::new(&site, "anna", OperatorRole::Viewer);
        status_through(&viewer.tls, 1, "db-1").await.expect("a reply");

        // Clients that are no operators.
        let stranger = fleet_https::client(site.root.certificate(), None).expect("a certificate");
        for (tls, what) in [(&stranger, "a stranger"), (&node.tls, "a member")] {
            let text = refused(through(tls, 1, "db-1").await, what);
            assert!(text.contains("403") && text.contains("certificate of an operator"), "{what}: {text}");
        }
        let other_fleet = Issuer::root("acme").expect("randomness");
        let hub_issuer = site.root.issuer("acme", "hub-1").expect("a root");
        let (valid, admin) = ((now() - 60, now() + 3600), OperatorRole::Admin);
        let expired = (now() - 120, now() - 60);
        for (operator, what) in [
            (TestOperator::with(&site, "eve", admin, valid, &other_fleet, ""), "another fleet's certificate"),
            (TestOperator::with(&site, "eve", admin, expired, &site.root, ""), "an expired certificate"),
            (
                TestOperator::with(&site, "eve", admin, valid, &hub_issuer, hub_issuer.certificate()),
                "a hub's certificate",
            ),
        ] {
            refused(through(&operator.tls, 1, "db-1").await, what);
            // The node verifies it, too.
            let direct = async { status(&mut node.direct(&operator.tls).await?).await };
            refused(direct.await, what);
        }
        // A node's certificate, and a node's certificate with an operator's name: hub and node reply why.
        let eve = signed_by_hub(&site, "eve.admin.operator");
        for (tls, what) in [(&node.tls, "a member"), (&eve, "a hub's certificate with an operator's name")] {
            let direct = async { status(&mut node.direct(tls).await?).await };
            let text = refused(direct.await, what);
            assert!(text.contains("403") && text.contains("valid certificate of an operator"), "{what}: {text}");
            let text = refused(through(tls, 1, "db-1").await, what);
            assert!(text.contains("403") && text.contains("certificate of an operator"), "{what}: {text}");
        }
        refused(async { status(&mut node.direct(&stranger).await?).await }.await, "a stranger");

        // Other targets.
        for (target, status) in
            [("db-9:7443", "404"), ("db-1:22", "404"), ("127.0.0.1:7443", "404"), ("db-1", "404"), ("db-2:7443", "502")]
        {
            let mut hub = Connection::open("127.0.0.1", HUB_PORT, "hub-1", &viewer.tls).await.expect("a hub");
            let text = refused(ask(&mut hub, "CONNECT", target, "").await, target);
            assert!(text.contains(status), "{target}: {text}");
        }
        // Neither an operator nor a certificate for a slot that the fleet does not have is a member.
        for (tls, what) in [(&viewer.tls, "an operator"), (&signed_by_hub(&site, "db-9"), "an unknown slot")] {
            for (method, path) in [
                ("GET", "/v1/peers"),
                ("POST", "/v1/renew"),
                ("POST", "/v1/left"),
                ("POST", "/v1/introduce"),
                ("POST", "/v1/turn"),
                ("POST", LOCK_PATH),
                ("POST", DRAINED_PATH),
                ("POST", "/v1/leave"),
            ] {
                let mut hub = Connection::open("127.0.0.1", HUB_PORT, "hub-1", tls).await.expect("a hub");
                let text = refused(ask(&mut hub, method, path, "{}").await, path);
                assert!(text.contains("401") || text.contains("403"), "{what}: {path}: {text}");
            }
        }
        let mut hub =
            Connection::open("127.0.0.1", HUB_PORT, "hub-1", &signed_by_hub(&site, "db-9")).await.expect("a hub");
        let text = refused(ask(&mut hub, "GET", "/v1/operators/revoked", "").await, "an unknown slot");
        assert!(text.contains("401"), "{text}");
        let mut hub = Connection::open("127.0.0.1", HUB_PORT, "hub-1", &viewer.tls).await.expect("a hub");
        assert!(hub.forwards_operators().await.expect("a reply"));
    });
}

#[test]
fn revocation_reaches_every_node_and_closes_connections() {
    in_own_network(async {
        let site = TestCluster::open("db.count = 2\n");
        let members = site.members("db", 1).await;
        let node = TestNode::start(&site, &members[0]);
        let viewer = TestOperator::new(&site, "anna", OperatorRole::Viewer);
        let other = TestOperator::new(&site, "ben", OperatorRole::Viewer);
        let mut open = through(&viewer.tls, 3, "db-1").await.expect("a connection");
        let mut direct = node.direct(&viewer.tls).await.expect("a connection");
        status(&mut open).await.expect("a reply");
        status(&mut direct).await.expect("a reply");

        // The certificate before the current one had the same key, and expires earlier.
        let mut former = viewer.revocation();
        former.expires -= 3000;
        let foreign = Issuer::root("acme").expect("randomness");
        let e = site.revoke_operator(&viewer.revocation(), &foreign).await.expect_err("a foreign root");
        assert!(e.contains("did not sign"), "{e}");
        for order in [&former, &viewer.revocation(), &former] {
            site.revoke_operator(order, &site.root).await.expect("a hub takes the order");
        }

        // hub-2 took the order. The others read it in etcd, and close the operator's connections.
        let text = refused(through(&viewer.tls, 2, "db-1").await, "a revoked operator");
        assert!(text.contains("403") && text.contains("revoked"), "{text}");
        let until = tokio::time::Instant::now() + Duration::from_secs(10);
        while status(&mut open).await.is_ok() {
            assert!(tokio::time::Instant::now() < until, "hub-3 keeps the connection");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let text = refused(through(&viewer.tls, 3, "db-1").await, "a revoked operator");
        assert!(text.contains("revoked"), "{text}");

        // The node learns it from the hubs' replies, and keeps it across a boot.
        status(&mut direct).await.expect("the node has not asked a hub yet");
        let endpoints = BTreeMap::new();
        let hubs = Hubs::new(&site.topology, &endpoints, "db-1", node.tls.clone());
        let hubs = hubs.with_revocations(node.revocations.clone());
        assert_eq!(hubs.answers().await.len(), 3);
        assert!(node.revocations.is_revoked(&viewer.key) && !node.revocations.is_revoked(&other.key));
        let until = tokio::time::Instant::now() + Duration::from_secs(5);
        while status(&mut direct).await.is_ok() {
            assert!(tokio::time::Instant::now() < until, "the node keeps the connection");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let text = refused(async { status(&mut node.direct(&viewer.tls).await?).await }.await, "a revoked operator");
        assert!(text.contains("revoked"), "{text}");
        status(&mut node.direct(&other.tls).await.expect("a connection")).await.expect("a reply");
        let deadline = tokio::time::Instant::now() + Duration::from_secs(5);
        while !Revocations::load(node.dir.path(), "acme", site.root.certificate()).is_revoked(&viewer.key) {
            assert!(tokio::time::Instant::now() < deadline, "the node has not stored the order");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }

        // Operators and members read the list.
        let path = "/v1/operators/revoked";
        for tls in [&other.tls, &node.tls] {
            let mut hub = Connection::open("127.0.0.3", HUB_PORT, "hub-3", tls).await.expect("a hub");
            let list: Vec<RevokedOperator> =
                serde_json::from_slice(&ask(&mut hub, "GET", path, "").await.expect("a reply")).expect("JSON");
            let orders: Vec<OperatorRevocation> = list.iter().filter_map(|r| r.order("acme")).collect();
            assert_eq!((orders.len(), orders[0].name.as_str()), (1, "anna"));
            assert!(orders[0].expires > former.expires, "the order for the earlier expiry applies");
        }
        let stranger = fleet_https::client(site.root.certificate(), None).expect("a certificate");
        let mut hub = Connection::open("127.0.0.3", HUB_PORT, "hub-3", &stranger).await.expect("a hub");
        assert!(refused(ask(&mut hub, "GET", path, "").await, "a stranger").contains("401"));
    });
}

/// Replies to each request like systemd-journal-gatewayd, with bytes of version 257. The journal has one entry of a unit.
/// Reports each request, and the end of each connection that follows the journal.
async fn serve_journal(socket: PathBuf, reports: tokio::sync::mpsc::UnboundedSender<String>) {
    let listener = UnixListener::bind(socket).expect("a socket");
    loop {
        let (mut stream, _) = listener.accept().await.expect("a connection");
        let reports = reports.clone();
        tokio::spawn(async move {
            let mut request = vec![0; 4096];
            let length = stream.read(&mut request).await.expect("a request");
            let text = String::from_utf8_lossy(&request[..length]).to_lowercase();
            let follows = text.lines().next().is_some_and(|line| line.contains("follow"));
            let message = b"two\nlines";
            let entry = [
                &b"__CURSOR=s=d8;i=4;b=ab\n__REALTIME_TIMESTAMP=1732900003000000\nPRIORITY=3\n_SYSTEMD_UNIT=a.service\nMESSAGE\n"[..],
                &(message.len() as u64).to_le_bytes(),
                message,
                b"\n\n",
            ]
            .concat();
            let head =
                "HTTP/1.1 200 OK\r\nContent-Type: application/vnd.fdo.journal\r\nTransfer-Encoding: chunked\r\n\r\n";
            stream.write_all(head.as_bytes()).await.expect("a client");
            if !follows && text.contains("_systemd_unit=") {
                let chunk = [format!("{:x}\r\n", entry.len()).as_bytes(), &entry, b"\r\n"].concat();
                stream.write_all(&chunk).await.expect("a client");
            }
            if !follows {
                stream.write_all(b"0\r\n\r\n").await.expect("a client");
            }
            let _ = reports.send(text);
            // A client that follows the journal has closed the connection when this read ends.
            let _ = stream.read(&mut request).await;
            if follows {
                let _ = reports.send("closed".to_owned());
            }
        });
    }
}

#[test]
fn journal_and_pages_reach_the_operator_through_a_hub() {
    in_own_network(async {
        let site = TestCluster::open("db.count = 1\nmonitor.count = 1\n");
        let members = site.members("monitor", 1).await;
        let node = TestNode::start(&site, &members[0]);
        let viewer = TestOperator::new(&site, "anna", OperatorRole::Viewer);
        let (sender, mut reports) = tokio::sync::mpsc::unbounded_channel();
        let journal = tokio::spawn(serve_journal(journal_socket(node.dir.path()), sender));

        let mut connection = through(&viewer.tls, 1, "monitor-1").await.expect("a connection");
        let path = format!("{JOURNAL_PATH}?follow=true&lines=5&unit=a.service");
        let asked = request("GET", "node", &path, &[], "".into()).expect("HTTP");
        let mut lines = connection.lines(asked, Duration::from_secs(60)).await.expect("a reply");
        let line = timeout(Duration::from_secs(10), lines.next()).await.expect("a line in time").expect("a line");
        let line: JournalLine = serde_json::from_slice(&line.expect("a line")).expect("JSON");
        assert_eq!((line.unit.as_str(), line.message.as_str(), line.priority), ("a.service", "two\nlines", 3));
        assert_eq!((line.cursor.as_str(), line.at), ("s=d8;i=4;b=ab", 1_732_900_003_000_000));
        // The gateway has the unit's own entries, and systemd's about the unit. It then follows both.
        let mut report = async |expected: &'static str| {
            let found = async {
                loop {
                    let text = reports.recv().await.expect("a report");
                    if text.contains(expected) {
                        return text;
                    }
                }
            };
            timeout(Duration::from_secs(10), found).await.unwrap_or_else(|_| panic!("no request has `{expected}`"))
        };
        let first = report("_systemd_unit=a%2eservice").await;
        assert!(first.starts_with("get /entries?") && first.contains("range: entries="), "{first}");
        report("follow").await;
        // If the operator disconnects, the node closes its connections to the gateway.
        drop((lines, connection));
        report("closed").await;
        journal.abort();

        // Bytes to a page of the monitor.
        let page = TcpListener::bind((node.address, 9090)).await.expect("a port");
        let echo = tokio::spawn(async move {
            let (mut stream, _) = page.accept().await.expect("a connection");
            let mut bytes = [0; 4];
            stream.read_exact(&mut bytes).await.expect("bytes");
            stream.write_all(&bytes).await.expect("bytes");
        });
        let connection = through(&viewer.tls, 2, "monitor-1").await.expect("a connection");
        let mut stream = connection.stream("/v1/open/prometheus").await.expect("a stream");
        stream.write_all(b"ping").await.expect("bytes");
        let mut bytes = Vec::new();
        timeout(Duration::from_secs(10), stream.read_to_end(&mut bytes)).await.expect("an end in time").expect("bytes");
        assert_eq!(bytes, b"ping");
        echo.await.expect("the page");
        for (path, expected) in [
            ("/v1/open/alertmanager", "needs the role operator"),
            ("/v1/open/haproxy", "does not run this service"),
            ("/v1/open/patroni", "unknown path"),
            ("/v1/open/prometheus", "does not answer"),
        ] {
            let connection = through(&viewer.tls, 3, "monitor-1").await.expect("a connection");
            let text = refused(connection.stream(path).await, path);
            assert!(text.contains(expected), "{path}: {text}");
        }
    });
}
