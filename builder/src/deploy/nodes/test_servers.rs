//! Hubs and nodes for tests: real TLS servers on loopback, one inside the other, with the certificates of a fleet.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use fleet::{Operator, OperatorRole, PrivateKey, Topology};
use fleet_https::{CONNECTIONS_PER_HUB, Identity, NODE_API_HEADER, OperatorVerifier};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::AbortHandle;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::client::Client;
use super::route::Entry;
use super::test_node::{FakeNode, serve_node};
use crate::keys::authority::FleetKey;
use crate::keys::operator::{KnownNode, OperatorFile};

/// A fleet of servers.
pub(super) struct Fleet {
    shared: Arc<Shared>,
    operator: OperatorFile,
    entries: Vec<Entry>,
    port: u16,
    nodes: Vec<KnownNode>,
    tasks: Mutex<BTreeMap<String, Vec<AbortHandle>>>,
}

/// What the servers share.
pub(super) struct Shared {
    authority: FleetKey,
    operators: OperatorVerifier,
    topology: Topology,
    key: PrivateKey,
    /// The nodes by name.
    pub(super) nodes: BTreeMap<String, FakeNode>,
    /// Hubs that accept connections and do not answer.
    mute: Mutex<BTreeSet<String>>,
    /// Hubs of a version that does not know operators.
    old: Mutex<BTreeSet<String>>,
    /// Nodes that the hubs do not reach.
    unreachable: Mutex<BTreeSet<String>>,
    /// Open connections of each hub.
    here: Mutex<BTreeMap<String, usize>>,
    /// Requests for a connection that each hub has got.
    asked: Mutex<BTreeMap<String, usize>>,
    /// Connections that each hub has forwarded.
    forwarded: Mutex<BTreeMap<String, usize>>,
    /// TLS servers of nodes.
    acceptors: Mutex<BTreeMap<String, TlsAcceptor>>,
    open: AtomicUsize,
    most: AtomicUsize,
    handles: Mutex<Vec<(String, AbortHandle)>>,
}

impl Fleet {
    /// Starts hubs, and nodes behind them, for an admin. Names are `GROUP-NUMBER`.
    pub(super) async fn start(hubs: &[&str], nodes: &[&str]) -> Self {
        Self::start_for(OperatorRole::Admin, hubs, nodes).await
    }

    /// Starts hubs, and nodes behind them, for an operator with this role.
    pub(super) async fn start_for(role: OperatorRole, hubs: &[&str], nodes: &[&str]) -> Self {
        let mut groups: BTreeMap<&str, u32> = BTreeMap::new();
        for (group, number) in hubs.iter().chain(nodes).filter_map(|name| name.rsplit_once('-')) {
            let count = groups.entry(group).or_default();
            *count = (*count).max(number.parse().unwrap());
        }
        let mut toml = "name = \"acme\"\n[groups]\n".to_owned();
        for (group, count) in groups {
            let _ = writeln!(toml, "{group}.count = {count}");
        }
        let topology = Topology::from_fleet(&fleet::Fleet::parse("f", toml.as_bytes()).unwrap());
        let (authority, key) = (FleetKey::create("acme").unwrap(), PrivateKey::generate().unwrap());
        let anna = Operator::new("anna", role).unwrap();
        let operator = OperatorFile::issue(&authority, &topology, anna, &key.public().unwrap(), 1).unwrap();
        let is_listed = |node: &KnownNode| nodes.contains(&node.name.as_str());
        let listed = KnownNode::all(&topology).into_iter().filter(is_listed).collect();
        let shared = Arc::new(Shared {
            operators: OperatorVerifier::new(authority.root.certificate()).unwrap(),
            authority,
            topology,
            key: key.clone(),
            nodes: nodes.iter().map(|node| ((*node).to_owned(), FakeNode::default())).collect(),
            mute: Mutex::default(),
            old: Mutex::default(),
            unreachable: Mutex::default(),
            here: Mutex::default(),
            asked: Mutex::default(),
            forwarded: Mutex::default(),
            acceptors: Mutex::default(),
            open: AtomicUsize::new(0),
            most: AtomicUsize::new(0),
            handles: Mutex::default(),
        });
        let mut fleet = Self {
            shared,
            operator: operator.with_key(key),
            entries: Vec::new(),
            port: 0,
            nodes: listed,
            tasks: Mutex::default(),
        };
        for (number, hub) in hubs.iter().enumerate() {
            let host = format!("127.0.0.{}", number + 2);
            let listener = TcpListener::bind((host.as_str(), fleet.port)).await.unwrap();
            fleet.port = listener.local_addr().unwrap().port();
            fleet.entries.push(Entry { hub: (*hub).to_owned(), host });
            let task = tokio::spawn(accept(fleet.shared.clone(), (*hub).to_owned(), listener)).abort_handle();
            fleet.tasks.lock().unwrap().entry((*hub).to_owned()).or_default().push(task);
        }
        fleet
    }

    pub(super) fn client(&self) -> Client {
        Client::new(&self.operator, self.entries.clone(), self.port).unwrap()
    }

    pub(super) fn nodes(&self) -> Vec<KnownNode> {
        self.nodes.clone()
    }

    /// Makes the nodes' certificates, so that connections do not wait for it.
    pub(super) fn prepare(&self) {
        for node in &self.nodes {
            self.shared.acceptor(&node.name);
        }
    }

    /// Returns a node.
    pub(super) fn node(&self, name: &str) -> &FakeNode {
        &self.shared.nodes[name]
    }

    /// Adds messages with these times to a node's journal.
    pub(super) fn write(&self, node: &str, times: &[u64]) {
        self.node(node).write("test.service", times);
    }

    /// Ends a hub's listener and its connections.
    pub(super) fn stop_hub(&self, hub: &str) {
        self.tasks.lock().unwrap().remove(hub).into_iter().flatten().for_each(|task| task.abort());
        let mut handles = self.shared.handles.lock().unwrap();
        handles.iter().filter(|(of, _)| of == hub).for_each(|(_, task)| task.abort());
        handles.retain(|(of, _)| of != hub);
    }

    /// Makes a hub accept connections without an answer.
    pub(super) fn mute_hub(&self, hub: &str) {
        self.shared.mute.lock().unwrap().insert(hub.to_owned());
    }

    /// Makes a hub one of a version that does not know operators.
    pub(super) fn make_old(&self, hub: &str) {
        self.shared.old.lock().unwrap().insert(hub.to_owned());
    }

    /// Makes the hubs report that a node does not answer.
    pub(super) fn make_unreachable(&self, node: &str) {
        self.shared.unreachable.lock().unwrap().insert(node.to_owned());
    }

    /// Returns how many requests for a connection a hub has got.
    pub(super) fn requests(&self, hub: &str) -> usize {
        self.shared.asked.lock().unwrap().get(hub).copied().unwrap_or(0)
    }

    /// Returns how many connections a hub has forwarded.
    pub(super) fn connections(&self, hub: &str) -> usize {
        self.shared.forwarded.lock().unwrap().get(hub).copied().unwrap_or(0)
    }

    /// Returns the largest number of connections to nodes at the same time.
    pub(super) fn most_parallel(&self) -> usize {
        self.shared.most.load(Ordering::SeqCst)
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        let hubs: Vec<String> = self.entries.iter().map(|entry| entry.hub.clone()).collect();
        for hub in &hubs {
            self.stop_hub(hub);
        }
    }
}

async fn accept(shared: Arc<Shared>, hub: String, listener: TcpListener) {
    let tls = shared.acceptor(&hub);
    while let Ok((stream, _)) = listener.accept().await {
        let (tls, shared, name) = (tls.clone(), shared.clone(), hub.clone());
        let handles = shared.clone();
        let task = tokio::spawn(async move { serve_hub(&shared, &name, &tls, stream).await });
        handles.handles.lock().unwrap().push((hub.clone(), task.abort_handle()));
    }
}

async fn serve_hub(shared: &Shared, hub: &str, tls: &TlsAcceptor, stream: TcpStream) -> Option<()> {
    if shared.mute.lock().unwrap().contains(hub) {
        tokio::time::sleep(Duration::from_secs(60)).await;
        return None;
    }
    let mut stream = tls.accept(stream).await.ok()?;
    let (method, target, _) = read_request(&mut stream).await?;
    *shared.asked.lock().unwrap().entry(hub.to_owned()).or_default() += 1;
    if shared.old.lock().unwrap().contains(hub) {
        return reply(&mut stream, "404 Not Found", "unknown path or method").await;
    }
    let node = target.strip_suffix(":7443").filter(|node| method == "CONNECT" && shared.nodes.contains_key(*node));
    let Some(node) = node else {
        return hub_reply(&mut stream, "404 Not Found", "the fleet has no such node").await;
    };
    if shared.role(&stream).is_none() {
        return hub_reply(&mut stream, "403 Forbidden", "CONNECT requires a certificate of an operator").await;
    }
    if shared.unreachable.lock().unwrap().contains(node) {
        let text = format!("\u{1b}[2J{node} does not answer within 1.5 s");
        return hub_reply(&mut stream, "504 Gateway Timeout", &text).await;
    }
    let open_here = shared.here.lock().unwrap().get(hub).copied().unwrap_or(0);
    if open_here >= CONNECTIONS_PER_HUB {
        return hub_reply(&mut stream, "429 Too Many Requests", "the limit of connections is reached").await;
    }
    *shared.here.lock().unwrap().entry(hub.to_owned()).or_default() += 1;
    *shared.forwarded.lock().unwrap().entry(hub.to_owned()).or_default() += 1;
    let open = shared.open.fetch_add(1, Ordering::SeqCst) + 1;
    shared.most.fetch_max(open, Ordering::SeqCst);
    let place = OpenConnection { shared, hub };
    let (name, value) = NODE_API_HEADER;
    stream.write_all(format!("HTTP/1.1 200 OK\r\n{name}: {value}\r\n\r\n").as_bytes()).await.ok()?;
    let mut stream = shared.acceptor(node).accept(stream).await.ok()?;
    let role = shared.role(&stream);
    let served = serve_node(&shared.nodes[node], node, role, &mut stream).await;
    drop(place);
    served
}

/// A forwarded connection. Its task may be aborted.
struct OpenConnection<'a> {
    shared: &'a Shared,
    hub: &'a str,
}

impl Drop for OpenConnection<'_> {
    fn drop(&mut self) {
        self.shared.open.fetch_sub(1, Ordering::SeqCst);
        *self.shared.here.lock().unwrap().entry(self.hub.to_owned()).or_default() -= 1;
    }
}

/// Returns method, target and body of a request.
pub(super) async fn read_request(stream: &mut (impl AsyncRead + Unpin)) -> Option<(String, String, Vec<u8>)> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.ok()?);
    }
    let head = String::from_utf8(head).ok()?;
    let mut words = head.split(' ');
    let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
    let length = head.to_lowercase();
    let length = length.lines().find_map(|line| line.strip_prefix("content-length: ")?.trim().parse().ok());
    let mut body = vec![0; length.unwrap_or(0)];
    stream.read_exact(&mut body).await.ok()?;
    Some((method, target, body))
}

/// Sends a reply of a node, or of a hub that does not know operators.
pub(super) async fn reply(stream: &mut (impl AsyncWrite + Unpin), status: &str, body: &str) -> Option<()> {
    let length = body.len();
    stream.write_all(format!("HTTP/1.1 {status}\r\ncontent-length: {length}\r\n\r\n{body}").as_bytes()).await.ok()?;
    stream.flush().await.ok()
}

async fn hub_reply(stream: &mut (impl AsyncWrite + Unpin), status: &str, body: &str) -> Option<()> {
    let (name, value) = NODE_API_HEADER;
    reply(stream, &format!("{status}\r\n{name}: {value}"), body).await
}

impl Shared {
    /// Returns the role of a client; `None` if it is no operator.
    fn role<S>(&self, stream: &TlsStream<S>) -> Option<OperatorRole> {
        let chain = stream.get_ref().1.peer_certificates()?;
        Some(self.operators.operator(chain)?.operator.role)
    }

    /// Returns a TLS server with the certificate of a node.
    fn acceptor(&self, name: &str) -> TlsAcceptor {
        if let Some(known) = self.acceptors.lock().unwrap().get(name) {
            return known.clone();
        }
        let (root, node) = (&self.authority.root, self.topology.node(name).unwrap());
        let cert = root.node(&self.topology, node, &self.key.public().unwrap()).unwrap();
        let own = Identity { cert: &cert, key: self.key.pem() };
        let made = TlsAcceptor::from(fleet_https::server(root.certificate(), own).unwrap());
        self.acceptors.lock().unwrap().insert(name.to_owned(), made.clone());
        made
    }
}
