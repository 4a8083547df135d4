//! The node API: operators read the node's state, and steer the node. Every node serves it on its mesh address, and only
//! hubs reach the port. It runs on a thread of its own, so it answers while another task of the agent waits.

mod actions;
mod audit;
mod backup;
mod danger;
mod disk;
mod drain;
mod exec;
mod export;
mod gateway;
mod journal;
mod listener;
mod lock;
mod mail;
mod net;
mod odoo_shell;
mod open;
mod page;
mod pcap;
mod query;
mod reply;
mod restart;
mod routes;
mod sql;
mod sql_stream;
mod status;
mod system;
#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use fleet::node_api::{ActionStatus, NODE_API_PORT};
use fleet::{Node, Topology};
use tokio::sync::{Semaphore, watch};
use tokio_rustls::rustls::{ClientConfig, ServerConfig};
use tracing::warn;

pub use drain::{Drainer, restore as restore_drain};
pub use lock::Locker;

use crate::error::{Error, Result};
use crate::host::dbus::Phase;
use crate::node::drained::DrainState;
use crate::node::outbox::Outbox;
use crate::node::revocations::Revocations;
use crate::server::on_thread;

/// Socket of systemd-journal-gatewayd.
pub const JOURNAL_SOCKET: &str = "/run/bakehouse/journal.sock";
/// Socket of PostgreSQL.
pub const POSTGRES_SOCKET: &str = "/run/postgresql/.s.PGSQL.5432";
/// Time between two attempts to listen. networkd may not have added the node's mesh address yet.
const RETRY: Duration = Duration::from_secs(1);
/// Most readers of the journal at the same time. Each has up to two connections to the gateway, whose memory is limited.
const READERS: usize = 8;

/// What the node API needs of its node.
pub struct NodeApi {
    /// All nodes, and the settings of the fleet.
    pub topology: Topology,
    /// The node.
    pub node: Node,
    /// Version of the image that runs.
    pub image: String,
    /// Epoch of the node's slot.
    pub epoch: u64,
    /// The fleet root's certificate, PEM.
    pub root: String,
    /// TLS configuration with which the node connects to its services and to other nodes.
    pub tls: Arc<ClientConfig>,
    /// Revoked certificates of operators.
    pub revocations: Arc<Revocations>,
    /// Phase of the node.
    pub phase: watch::Receiver<Phase>,
    /// The system bus; `None` on a machine without one.
    pub bus: Option<String>,
    /// Socket of systemd-journal-gatewayd.
    pub journal: PathBuf,
    /// Socket of PostgreSQL, on a database node.
    pub postgres: PathBuf,
    /// Takes and frees the fleet's lock.
    pub locker: Locker,
    /// Actions of operators, on their way to etcd.
    pub outbox: Arc<Outbox>,
    /// Whether the node is drained.
    pub drained: Arc<DrainState>,
    /// Reports to the hubs that the node is drained, and reads which nodes are.
    pub drainer: Drainer,
    /// State of the API itself.
    pub tasks: Tasks,
}

/// State of the node API, and limits of its tasks.
pub struct Tasks {
    /// The last action.
    action: Mutex<Option<ActionStatus>>,
    /// Number of times that an action has taken the fleet's lock.
    lock_turn: AtomicU64,
    /// Reads the file systems. A read may hang with its disk.
    disks: Arc<Semaphore>,
    /// Readers of the journal.
    readers: Arc<Semaphore>,
    /// The connection to the bus that requests for states share.
    bus: Mutex<Option<zbus::Connection>>,
}

impl Default for Tasks {
    fn default() -> Self {
        Self {
            action: Mutex::default(),
            lock_turn: AtomicU64::new(0),
            disks: Arc::new(Semaphore::new(1)),
            readers: Arc::new(Semaphore::new(READERS)),
            bus: Mutex::default(),
        }
    }
}

/// Returns a new random identifier.
///
/// # Errors
/// If the kernel has no random bytes.
fn random_id() -> Result<String> {
    let mut random = [0; 8];
    getrandom::fill(&mut random).map_err(|e| Error::Failed(format!("no random bytes: {e}")))?;
    Ok(random.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Serves the node API until the process ends or the returned future is dropped. If the server fails, starts it again.
pub async fn keep(api: Arc<NodeApi>, tls: Arc<ServerConfig>) {
    loop {
        if let Err(e) = serve(api.clone(), tls.clone()).await {
            warn!("the node API does not run: {}", e.chain());
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Serves the node API on a thread of its own.
///
/// # Errors
/// If the thread cannot be started, or the root certificate is invalid.
async fn serve(api: Arc<NodeApi>, tls: Arc<ServerConfig>) -> Result<()> {
    let operators = fleet_https::OperatorVerifier::new(&api.root)?;
    let at = SocketAddr::from((api.node.address, NODE_API_PORT));
    on_thread("node-api", 0, move || async move {
        // The node may have taken the lock before it rebooted.
        tokio::spawn(lock::free_after_boot(api.clone()));
        let outbox = api.outbox.clone();
        tokio::spawn(async move { outbox.keep().await });
        let reported = api.clone();
        tokio::spawn(async move { drain::keep_reported(&reported).await });
        let listener = listener::open(at).await;
        listener::accept(api, operators, listener, tls.into()).await
    })
    .await
}
