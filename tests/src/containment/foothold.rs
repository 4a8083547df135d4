//! Where an attacker stands: a network namespace, and what root finds on the machine.

use std::collections::BTreeMap;
use std::fs::File;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use bytes::Bytes;
use fleet::{Issuer, Joiner, Node, PrivateKey, Right, Ticket};
use fleet_https::{Connection, request};
use futures_util::future::join_all;
use nix::sched::{CloneFlags, setns};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::members::Captured;
use super::{Arena, Place};

/// How long an attack waits for an answer. The fleet's own paths answer in milliseconds.
pub const PATIENCE: Duration = Duration::from_secs(4);
/// How long a connection to a filtered port is tried.
const CONNECT: Duration = Duration::from_millis(1500);

/// A certificate that the attacker can show, and whose key it has. PEM.
#[derive(Clone)]
pub struct Credential {
    pub name: String,
    pub cert: String,
    pub key: String,
}

/// A service that an attack is aimed at.
#[derive(Clone, Debug)]
pub struct Door {
    pub host: String,
    pub port: u16,
    /// Name of the node in its certificate.
    pub name: String,
}

/// Users of etcd and their tokens; `None` before the attacker has tried.
pub type Logins = Arc<Mutex<Option<Vec<(String, String)>>>>;

/// The attacker's position.
#[derive(Clone)]
pub struct Foothold {
    pub place: Place,
    /// The node whose root the attacker is; none for an outsider.
    pub node: Option<Node>,
    namespace: PathBuf,
    /// The fleet root's certificate.
    pub root: String,
    /// Its own certificate, and those that its issuer can make.
    pub credentials: Vec<Credential>,
    pub issuer: Option<Issuer>,
    pub passwords: BTreeMap<String, String>,
    /// Tickets that it has.
    pub tickets: Vec<Joiner>,
    /// Join requests of others that it has heard.
    pub captured: Vec<Captured>,
    /// Secrets of others that it got on its way here.
    pub loot: Vec<String>,
    /// Doors that were tried: what is filtered stays so, and costs a time-out.
    tried: Arc<Mutex<BTreeMap<(String, u16), bool>>>,
    /// Users of etcd that its passwords open, with a token of each; none before it tried.
    pub logins: Logins,
}

impl Foothold {
    /// Root on a node: takes everything that is there, and flushes the packet filter.
    ///
    /// # Panics
    /// The node does not run.
    #[must_use]
    pub fn on(arena: &Arena, place: Place, name: &str) -> Self {
        let machine = arena.machine(name);
        let node = arena.node(name).clone();
        let read = |path: &str| machine.ok(&format!("cat {path}")) + "\n";
        let root = read("/run/bakehouse/tls/ca.crt");
        let own = Credential {
            name: name.to_owned(),
            cert: read("/run/bakehouse/tls/node.crt"),
            key: read("/run/bakehouse/tls/node.key"),
        };
        let state: Value = serde_json::from_str(&read("/var/lib/bakehouse/state.json")).expect("JSON");
        let ticket = read("/run/host/credentials/bakehouse.ticket");
        let right = Ticket::parse(ticket.as_bytes()).expect("a ticket").right;
        let of_state = serde_json::from_value::<Issuer>(state["issuer"].clone()).ok();
        let (issuer, tickets) = match right {
            Right::Founder(founder) => (of_state.or(Some(founder.issuer)), Vec::new()),
            Right::Joiner(joiner) => (of_state, vec![joiner]),
        };
        let passwords: BTreeMap<String, String> =
            serde_json::from_value(state["secrets"].clone()).expect("passwords by name");
        let mut foothold = Self {
            place,
            namespace: Path::new("/proc").join(arena.pid(name)).join("ns/net"),
            root,
            credentials: vec![own],
            issuer,
            passwords: passwords.into_iter().filter(|(_, word)| !word.is_empty()).collect(),
            tickets,
            captured: Vec::new(),
            loot: Vec::new(),
            tried: Arc::default(),
            logins: Arc::default(),
            node: Some(node),
        };
        foothold.forge(arena);
        machine.ok("nft flush ruleset");
        foothold
    }

    /// A host on the internet.
    #[must_use]
    pub fn outside(arena: &Arena, place: Place) -> Self {
        // Anybody learns the root's certificate from a TLS handshake; a ticket has it, too.
        let root = arena.witness().ok("cat /run/bakehouse/tls/ca.crt") + "\n";
        // Signed by a root of the attacker's own, with the names of a hub.
        let other = Issuer::root(&arena.topology.name).expect("randomness");
        let own = signed(arena, &other, "hub-1");
        Self {
            place,
            node: None,
            namespace: arena.internet(),
            root,
            credentials: own.into_iter().collect(),
            issuer: None,
            passwords: BTreeMap::new(),
            tickets: Vec::new(),
            captured: Vec::new(),
            loot: Vec::new(),
            tried: Arc::default(),
            logins: Arc::default(),
        }
    }

    /// Makes certificates of other nodes, where an issuer's key is at hand.
    fn forge(&mut self, arena: &Arena) {
        let Some(issuer) = &self.issuer else { return };
        let own = self.node.as_ref().map_or("", |n| n.name.as_str());
        let others = ["hub-1", "hub-2", "db-1", "vault-1"].into_iter().filter(|name| *name != own);
        let forged: Vec<Credential> = others.filter_map(|name| signed(arena, issuer, name)).collect();
        self.credentials.extend(forged);
    }

    /// The credential of the attacker's own node.
    #[must_use]
    pub fn own(&self) -> &Credential {
        &self.credentials[0]
    }

    /// What to show: nothing, the own certificate, forged ones.
    pub fn shown(&self) -> impl Iterator<Item = Option<&Credential>> {
        self.credentials.iter().map(Some).chain([None])
    }

    /// Runs an attack in the place's network namespace, on a thread of its own.
    ///
    /// # Panics
    /// The attack does; the namespace is gone.
    pub fn run<T: Send, F: Future<Output = T>>(&self, attack: impl FnOnce() -> F + Send) -> T {
        let entered = || {
            self.enter();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(attack())
        };
        thread::scope(|scope| scope.spawn(entered).join()).expect("the attack runs")
    }

    /// Moves this thread into the place's network namespace.
    ///
    /// # Panics
    /// It is gone.
    pub fn enter(&self) {
        let file = File::open(&self.namespace).unwrap_or_else(|e| panic!("{}: {e}", self.namespace.display()));
        setns(file, CloneFlags::CLONE_NEWNET).expect("the network namespace of a machine, as root");
    }

    /// Path of the place's network namespace.
    #[must_use]
    pub fn namespace(&self) -> &Path {
        &self.namespace
    }

    /// Those of the doors where something accepts a TCP connection.
    pub async fn reachable(&self, doors: Vec<Door>) -> Vec<Door> {
        let tried = doors.into_iter().map(|door| async {
            let at = (door.host.clone(), door.port);
            let known = self.tried.lock().unwrap_or_else(PoisonError::into_inner).get(&at).copied();
            let open = if let Some(open) = known {
                open
            } else {
                let connected = timeout(CONNECT, TcpStream::connect((door.host.as_str(), door.port))).await;
                matches!(connected, Ok(Ok(_)))
            };
            self.tried.lock().unwrap_or_else(PoisonError::into_inner).insert(at, open);
            open.then_some(door)
        });
        join_all(tried).await.into_iter().flatten().collect()
    }

    /// Sends one request over TLS.
    ///
    /// # Errors
    /// What refused it: the network, TLS, or a status that is no success.
    pub async fn ask(
        &self,
        door: &Door,
        shown: Option<&Credential>,
        (method, path): (&str, &str),
        headers: &[(&str, &str)],
        body: Vec<u8>,
    ) -> Result<Bytes, String> {
        let identity = shown.map(|own| fleet_https::Identity { cert: &own.cert, key: &own.key });
        let tls = fleet_https::client(&self.root, identity).map_err(|e| e.to_string())?;
        let asked = async {
            let mut connection = Connection::open(&door.host, door.port, &door.name, &tls).await?;
            connection.ask(request(method, &door.host, path, headers, body.into())?, 16 << 20).await
        };
        timeout(PATIENCE, asked).await.map_err(|_| format!("{}: no answer", door.host))?.map_err(|e| e.to_string())
    }
}

/// A certificate with a node's names, signed by this issuer.
fn signed(arena: &Arena, issuer: &Issuer, name: &str) -> Option<Credential> {
    let key = PrivateKey::generate().expect("randomness");
    let cert = issuer.node(&arena.topology, arena.node(name), &key.public().expect("a key")).ok()?;
    Some(Credential { name: name.to_owned(), cert, key: key.pem().to_owned() })
}

/// Doors of a port on some nodes, by every address.
pub fn doors<'a>(arena: &Arena, nodes: impl Iterator<Item = &'a Node>, port: u16) -> Vec<Door> {
    let of = |node: &Node| arena.addresses(node).map(|host| Door { host, port, name: node.name.clone() });
    nodes.flat_map(of).collect()
}
