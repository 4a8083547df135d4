//! The attacker's position: a network namespace, and everything that root finds on the machine.

use std::collections::BTreeMap;
use std::fs::File;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use bytes::Bytes;
use fleet::{Credential, Issuer, Joiner, Node, PrivateKey, Ticket};
use fleet_https::{Connection, request};
use futures_util::future::join_all;
use nix::sched::{CloneFlags, setns};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::members::Captured;
use super::{Arena, Place};

/// How long an attack waits for a reply. The fleet's daemons reply within milliseconds.
pub(super) const TIMEOUT: Duration = Duration::from_secs(4);
/// How long an attack waits for a TCP connection.
const CONNECT: Duration = Duration::from_millis(1500);

/// A certificate of the attacker and its key, both PEM.
#[derive(Clone)]
pub struct NodeIdentity {
    /// Name in the certificate.
    pub name: String,
    /// The certificate, followed by its issuer.
    pub cert: String,
    /// The certificate's private key.
    pub key: String,
}

/// Address of an attacked service.
#[derive(Clone, Debug)]
pub struct Door {
    /// Address, without a port.
    pub host: String,
    /// TCP port.
    pub port: u16,
    /// Name in the service's certificate.
    pub name: String,
}

/// Users of etcd and their tokens. `None` before the first login attempt.
pub(super) type Logins = Arc<Mutex<Option<Vec<(String, String)>>>>;

/// The attacker's position.
#[derive(Clone)]
pub struct Foothold {
    /// The row of the table.
    pub place: Place,
    /// Node on which the attacker is root. `None` for a host outside the fleet.
    pub node: Option<Node>,
    namespace: PathBuf,
    /// Certificate of the fleet's root, PEM.
    pub root: String,
    /// The node's own certificate, then certificates that the attacker signed with the node's issuer.
    pub credentials: Vec<NodeIdentity>,
    /// Issuer of the node, if it is a founder.
    pub issuer: Option<Issuer>,
    /// Passwords on the node, by the name of their field in its state.
    pub passwords: BTreeMap<String, String>,
    /// Joiners' tickets.
    pub tickets: Vec<Joiner>,
    /// Recorded join requests of other machines.
    pub captured: Vec<Captured>,
    /// Descriptions of other nodes' secrets that the attacker has obtained.
    pub loot: Vec<String>,
    /// Cached reachability of host and port, because each filtered port costs a timeout.
    tried: Arc<Mutex<BTreeMap<(String, u16), bool>>>,
    /// Cached logins to etcd.
    pub logins: Logins,
}

impl Foothold {
    /// Becomes root on a node: reads its certificates, state and ticket, and flushes its packet filter.
    ///
    /// # Panics
    /// If the node does not run.
    #[must_use]
    pub fn on(arena: &Arena, place: Place, name: &str) -> Self {
        let machine = arena.machine(name);
        let node = arena.node(name).clone();
        let read = |path: &str| machine.ok(&format!("cat {path}")) + "\n";
        let root = read("/run/bakehouse/tls/ca.crt");
        let own = NodeIdentity {
            name: name.to_owned(),
            cert: read("/run/bakehouse/tls/node.crt"),
            key: read("/run/bakehouse/tls/node.key"),
        };
        let state: Value = serde_json::from_str(&read("/var/lib/bakehouse/state.json")).expect("JSON");
        let ticket = read("/run/host/credentials/bakehouse.ticket");
        let right = Ticket::parse(ticket.as_bytes()).expect("a ticket").right;
        let of_state = serde_json::from_value::<Issuer>(state["issuer"].clone()).ok();
        let (issuer, tickets) = match right {
            Credential::Founder(founder) => (of_state.or(Some(founder.issuer)), Vec::new()),
            Credential::Joiner(joiner) => (of_state, vec![joiner]),
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

    /// Creates an attacker on an internet host.
    #[must_use]
    pub fn outside(arena: &Arena, place: Place) -> Self {
        // The root's certificate is public: a TLS handshake shows it, and each ticket contains it.
        let root = arena.witness().ok("cat /run/bakehouse/tls/ca.crt") + "\n";
        // A hub's certificate, signed by the attacker's own root.
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

    /// Signs certificates of other nodes if the node has an issuer.
    fn forge(&mut self, arena: &Arena) {
        let Some(issuer) = &self.issuer else { return };
        let own = self.node.as_ref().map_or("", |n| n.name.as_str());
        let others = ["hub-1", "hub-2", "db-1", "vault-1"].into_iter().filter(|name| *name != own);
        let forged: Vec<NodeIdentity> = others.filter_map(|name| signed(arena, issuer, name)).collect();
        self.credentials.extend(forged);
    }

    /// Returns the credential of the attacker's own node.
    #[must_use]
    pub fn own(&self) -> &NodeIdentity {
        &self.credentials[0]
    }

    /// Returns the client certificates to try: the node's own, the forged ones, and none.
    pub fn shown(&self) -> impl Iterator<Item = Option<&NodeIdentity>> {
        self.credentials.iter().map(Some).chain([None])
    }

    /// Runs an attack on a new thread in the attacker's network namespace.
    ///
    /// # Panics
    /// If the attack panics, or the namespace does not exist.
    pub fn run<T: Send, F: Future<Output = T>>(&self, attack: impl FnOnce() -> F + Send) -> T {
        let entered = || {
            self.enter();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(attack())
        };
        thread::scope(|scope| scope.spawn(entered).join()).expect("no panic in the attack")
    }

    /// Moves this thread into the attacker's network namespace.
    ///
    /// # Panics
    /// If the namespace does not exist.
    pub fn enter(&self) {
        let file = File::open(&self.namespace).unwrap_or_else(|e| panic!("{}: {e}", self.namespace.display()));
        setns(file, CloneFlags::CLONE_NEWNET).expect("the network namespace of a machine, as root");
    }

    /// Returns the path of the attacker's network namespace.
    #[must_use]
    pub fn namespace(&self) -> &Path {
        &self.namespace
    }

    /// Returns the addresses that accept a TCP connection.
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

    /// Sends a request over TLS and returns the response's body.
    ///
    /// # Errors
    /// If the connection or TLS fails, the response's status is not a success, or the reply takes longer than
    /// [`TIMEOUT`].
    pub async fn ask(
        &self,
        door: &Door,
        shown: Option<&NodeIdentity>,
        (method, path): (&str, &str),
        headers: &[(&str, &str)],
        body: Vec<u8>,
    ) -> Result<Bytes, String> {
        let identity = shown.map(|own| fleet_https::Identity { cert: &own.cert, key: &own.key });
        let tls = fleet_https::client(&self.root, identity).map_err(|e| fleet::ErrorChain::new(&e).to_string())?;
        let asked = async {
            let mut connection = Connection::open(&door.host, door.port, &door.name, &tls).await?;
            connection.ask(request(method, &door.host, path, headers, body.into())?, 16 << 20).await
        };
        timeout(TIMEOUT, asked)
            .await
            .map_err(|_| format!("{}: no reply", door.host))?
            .map_err(|e| fleet::ErrorChain::new(&e).to_string())
    }
}

/// Signs a certificate of a node with this issuer. `None` if the issuer cannot sign it.
fn signed(arena: &Arena, issuer: &Issuer, name: &str) -> Option<NodeIdentity> {
    let key = PrivateKey::generate().expect("randomness");
    let cert = issuer.node(&arena.topology, arena.node(name), &key.public().expect("a key")).ok()?;
    Some(NodeIdentity { name: name.to_owned(), cert, key: key.pem().to_owned() })
}

/// Returns a port's addresses on these nodes, in the mesh and on the internet.
pub(super) fn doors<'a>(arena: &Arena, nodes: impl Iterator<Item = &'a Node>, port: u16) -> Vec<Door> {
    let of = |node: &Node| arena.addresses(node).map(|host| Door { host, port, name: node.name.clone() });
    nodes.flat_map(of).collect()
}
