//! Connections of the node API.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use fleet::OperatorRole;
use fleet::node_api::OPERATOR_CONNECTIONS;
use fleet_https::{OperatorCertificate, OperatorVerifier};
use hyper::header::{CONNECTION, HeaderValue};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tracing::warn;

use super::audit::Audit;
use super::reply::{Body, LineSender, Refusal};
use super::routes::answer;
use super::{NodeApi, RETRY};
use crate::error::{Error, Result};
use crate::server::listen;
use crate::server::metered::Metered;

/// Open connections, and those that viewers do not get.
const CONNECTIONS: usize = 32;
const RESERVED: usize = 4;
/// Connections that the kernel queues until the listener accepts them.
const BACKLOG: u32 = 64;
/// Time limit of a TLS handshake, and bytes that a client may send during it.
const HANDSHAKE: Duration = Duration::from_secs(5);
const HANDSHAKE_BYTES: usize = 12 << 10;
/// Time limit of a request's header with the idle time before it.
const HEADER: Duration = Duration::from_secs(60);
/// Longest header of a request, in bytes.
const LONGEST_HEADER: usize = 8 << 10;
/// Time between two checks whether an operator's certificate has expired.
const CHECK: Duration = Duration::from_secs(60);
/// Why an action ends.
const NOT_VALID: &str = "the operator's certificate is not valid any more";
/// Time between two log lines about a port that the kernel refuses.
const LOG: Duration = Duration::from_secs(60);

/// What all connections share.
pub(super) struct Shared {
    pub(super) api: Arc<NodeApi>,
    pub(super) operators: OperatorVerifier,
    connections: Arc<Semaphore>,
    /// Number of connections of each operator, by name: a person may have two certificates.
    of_operator: Mutex<BTreeMap<String, usize>>,
    pub(super) audit: Audit,
}

/// The client of a connection.
pub(super) struct Client {
    pub(super) certificate: OperatorCertificate,
    /// The hub that forwards the connection, or another address.
    pub(super) from: String,
    shared: Arc<Shared>,
}

impl Client {
    /// Waits until the operator's certificate is revoked or has expired.
    pub(super) async fn until_refused(&self) {
        let expired = async {
            while self.shared.operators.is_current(&self.certificate) {
                sleep(CHECK).await;
            }
        };
        tokio::select! {
            () = self.shared.api.revocations.until_revoked(&self.certificate.key) => {}
            () = expired => {}
        }
    }

    /// Waits until the operator may not, or does not, read this reply any more. Returns the reason.
    pub(super) async fn until_gone(&self, reply: &LineSender) -> Error {
        tokio::select! {
            () = self.until_refused() => {}
            () = reply.closed() => {}
        }
        // The connection of an operator whose certificate is not valid any more closes in the same moment.
        let reason = if self.is_refused() { NOT_VALID } else { "the operator has disconnected" };
        Error::Failed(reason.to_owned())
    }

    /// Returns whether the operator's certificate is revoked or has expired.
    fn is_refused(&self) -> bool {
        let is_revoked = self.shared.api.revocations.is_revoked(&self.certificate.key);
        is_revoked || !self.shared.operators.is_current(&self.certificate)
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Counts a connection of an operator; `None` if the operator has too many.
    fn new(shared: &Arc<Shared>, certificate: OperatorCertificate, from: SocketAddr) -> Option<Self> {
        let mut counts = shared.of_operator.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(certificate.operator.name.clone()).or_default();
        if *count >= OPERATOR_CONNECTIONS {
            return None;
        }
        *count += 1;
        let hub = shared.api.topology.nodes.iter().find(|node| from.ip() == node.address);
        let from = hub.map_or_else(|| from.ip().to_string(), |node| node.name.clone());
        Some(Self { certificate, from, shared: shared.clone() })
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let mut counts = self.shared.of_operator.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.certificate.operator.name) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.certificate.operator.name);
            }
        }
    }
}

/// Accepts connections without end.
pub(super) async fn accept(
    api: Arc<NodeApi>,
    operators: OperatorVerifier,
    listener: TcpListener,
    acceptor: TlsAcceptor,
) -> Result<()> {
    let shared = Arc::new(Shared {
        api,
        operators,
        connections: Arc::new(Semaphore::new(CONNECTIONS)),
        of_operator: Mutex::default(),
        audit: Audit::default(),
    });
    loop {
        let Ok((tcp, from)) = listener.accept().await else {
            // No file descriptor is free, or the client has disconnected: both are temporary.
            sleep(Duration::from_millis(50)).await;
            continue;
        };
        let Ok(place) = shared.connections.clone().try_acquire_owned() else {
            // Zero linger closes with a reset, so that the kernel keeps no state of the connection.
            let _ = tcp.set_zero_linger();
            continue;
        };
        let (shared, acceptor) = (shared.clone(), acceptor.clone());
        tokio::spawn(async move {
            connection(&shared, tcp, from, acceptor).await;
            drop(place);
        });
    }
}

/// Opens the port, as soon as the node has its mesh address.
pub(super) async fn open(at: SocketAddr) -> TcpListener {
    let mut logged: Option<Instant> = None;
    loop {
        match listen(at, BACKLOG) {
            Ok(listener) => return listener,
            Err(e) if logged.is_none_or(|at| at.elapsed() >= LOG) => {
                // The first attempts may be before networkd adds the address.
                if logged.is_some() {
                    warn!("the node API cannot listen at {at}: {e}");
                }
                logged = Some(Instant::now());
            }
            Err(_) => {}
        }
        sleep(RETRY).await;
    }
}

async fn connection(shared: &Arc<Shared>, tcp: TcpStream, from: SocketAddr, acceptor: TlsAcceptor) {
    let _ = tcp.set_nodelay(true);
    let handshake = timeout(HANDSHAKE, acceptor.accept(Metered::new(tcp, HANDSHAKE_BYTES)));
    let Ok(Ok(mut stream)) = handshake.await else { return };
    let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
    let client = admitted(shared, chain, from);
    // Only operators have a certificate of this kind. The limits of requests apply to each request.
    stream.get_mut().0.set_budget(if client.is_ok() { usize::MAX } else { HANDSHAKE_BYTES });
    let client = client.map(Arc::new);
    let service = service_fn(|request: Request<hyper::body::Incoming>| {
        let client = client.clone();
        async move {
            Ok::<_, Infallible>(match client {
                Ok(client) => answer(&client, request).await,
                Err(refusal) => closing(&refusal),
            })
        }
    });
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEADER).max_headers(32).max_buf_size(LONGEST_HEADER);
    let served = http.serve_connection(TokioIo::new(stream), service).with_upgrades();
    match &client {
        Ok(client) => tokio::select! {
            _ = served => {}
            () = client.until_refused() => {}
        },
        Err(_) => drop(timeout(HANDSHAKE, served).await),
    }
}

/// Returns the operator that presented these certificates.
fn admitted(
    shared: &Arc<Shared>,
    chain: &[tokio_rustls::rustls::pki_types::CertificateDer<'_>],
    from: SocketAddr,
) -> Result<Client, Refusal> {
    let forbidden = |text: &str| Refusal::new(StatusCode::FORBIDDEN, text);
    let certificate = shared.operators.operator(chain);
    let certificate =
        certificate.ok_or_else(|| forbidden("the node API requires a valid certificate of an operator"))?;
    if shared.api.revocations.is_revoked(&certificate.key) {
        return Err(forbidden("the operator's certificate is revoked"));
    }
    let is_viewer = certificate.operator.role == OperatorRole::Viewer;
    if is_viewer && shared.connections.available_permits() < RESERVED {
        let text = "this node has too many connections; its last ones are for operators and admins";
        return Err(Refusal::new(StatusCode::SERVICE_UNAVAILABLE, text).help("retry later"));
    }
    let crowded = format!("this operator has {OPERATOR_CONNECTIONS} connections to this node; close one of them");
    Client::new(shared, certificate, from).ok_or_else(|| Refusal::new(StatusCode::TOO_MANY_REQUESTS, crowded))
}

fn closing(refusal: &Refusal) -> Response<Body> {
    let mut response = refusal.response();
    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    response
}
