//! The join API's connections: HTTPS on the hub's public endpoint, beside WireGuard's own port.
//!
//! A separate thread serves them, so that load from strangers does not delay the mesh, the watches and the fence of
//! the same process.

mod admission;
mod throttle;
mod tunnel;

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use fleet::EXPORTER_LABEL;
use fleet_https::{NODE_API_HEADER, OperatorVerifier};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::header::{CONNECTION, HeaderName, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use nix::sys::resource::{Resource, getrlimit};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tracing::warn;

use super::api::{Admitted, Hub, answer, plain};
use super::peer::{Client, Peer};
use crate::error::{Error, Result};
use crate::server::metered::Metered;
use crate::server::{listen, on_thread};
use admission::{Admission, AdmittedConnection, Kind, Limits};
use tunnel::Tunnels;

/// Open connections: guests may use three quarters, members one quarter.
const CONNECTIONS: usize = 1024;
/// Open connections of operators: four operators that read from as many nodes as they may. Each takes up to 100 kB of
/// memory, and two file descriptors.
const OPERATORS: usize = 256;
/// File descriptors reserved for the rest of the agent.
const DESCRIPTORS: usize = 256;
/// Connections that the kernel queues until the listener accepts them.
const BACKLOG: u32 = 4096;
/// Total time a connection may take, so that slow clients cannot exhaust the pool.
const LIFETIME: Duration = Duration::from_secs(20);
/// Time limits of a TLS handshake, of a request's header with the idle time before it, and of its body.
const HANDSHAKE: Duration = Duration::from_secs(5);
const HEADER: Duration = Duration::from_secs(5);
const BODY: Duration = Duration::from_secs(5);
/// Longest header of a request, bytes: the minimum that hyper accepts.
const LONGEST_HEADER: usize = 8 << 10;
/// Longest body, bytes: more than a token and two keys need.
const LONGEST: usize = 16 << 10;
/// Bytes that a client may send during the TLS handshake, on a guest's connection, and on a member's.
const HANDSHAKE_BYTES: usize = 12 << 10;
const GUEST_BYTES: usize = 64 << 10;
const MEMBER_BYTES: usize = 1 << 20;
/// Increment of the nice value of the API's thread, so that the rest of the agent has priority.
const NICE: i32 = 5;
/// Time between two log lines about refused connections.
const LOG: Duration = Duration::from_secs(60);

/// Serves the API on a separate thread until the process ends or the returned future is dropped.
///
/// # Errors
/// If the port is in use, or the thread cannot be started.
pub async fn serve(hub: Arc<Hub>, at: SocketAddr, tls: Arc<ServerConfig>) -> Result<()> {
    let operators = OperatorVerifier::new(&hub.root)?;
    let served = Arc::new(Served { hub, operators, tunnels: Tunnels::new() });
    on_thread("join-api", NICE, move || accept(served, at, TlsAcceptor::from(tls))).await
}

/// What each connection uses.
struct Served {
    hub: Arc<Hub>,
    operators: OperatorVerifier,
    tunnels: Tunnels,
}

async fn accept(served: Arc<Served>, at: SocketAddr, acceptor: TlsAcceptor) -> Result<()> {
    let listener = listen(at, BACKLOG).map_err(Error::io("listen at", at.to_string()))?;
    let (connections, operators) = connections();
    let admission = Admission::new(Limits::new(connections, operators));
    let mut logged = Instant::now();
    loop {
        let accepted = timeout(LOG, listener.accept()).await;
        let now = Instant::now();
        if now.duration_since(logged) >= LOG {
            logged = now;
            log(&admission);
        }
        let (tcp, from) = match accepted {
            Ok(Ok(accepted)) => accepted,
            // No file descriptor is free, or the client has disconnected: both are temporary.
            Ok(Err(_)) => {
                sleep(Duration::from_millis(50)).await;
                continue;
            }
            Err(_) => continue,
        };
        let from = from.ip().to_canonical();
        let Some((place, delay)) = admission.enter(from, is_of_mesh(&served.hub, from), now) else {
            // Zero linger closes with a reset, so that the kernel keeps no state of the connection.
            let _ = tcp.set_zero_linger();
            continue;
        };
        let id = place.id();
        let (served, acceptor) = (served.clone(), acceptor.clone());
        let task = tokio::spawn(async move {
            let _ = timeout(LIFETIME, connection(served, tcp, acceptor, Arc::new(place), delay)).await;
        });
        admission.set_task(id, task.abort_handle());
    }
}

/// Returns the numbers of connections that the limit of file descriptors allows: those of guests and members, and those
/// of operators.
fn connections() -> (usize, usize) {
    let limit =
        getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _)| usize::try_from(soft).unwrap_or(usize::MAX));
    let free = limit.saturating_sub(DESCRIPTORS);
    let operators = OPERATORS.min(free / 8).max(16);
    (CONNECTIONS.min(free.saturating_sub(2 * operators)).max(64), operators)
}

/// Returns whether a source address is in the mesh. WireGuard authenticates such packets, and other interfaces drop
/// them.
fn is_of_mesh(hub: &Hub, from: IpAddr) -> bool {
    let mesh = &hub.topology.mesh;
    matches!(from, IpAddr::V4(from) if mesh.subnet.contains(&from) || mesh.transport.contains(&from))
}

fn log(admission: &Admission) {
    let (refused, displaced) = admission.take_counts();
    if refused + displaced > 0 {
        warn!(
            "the join API refused {refused} connections and closed {displaced} for newer ones within {} s",
            LOG.as_secs()
        );
    }
}

async fn connection(
    served: Arc<Served>,
    tcp: TcpStream,
    acceptor: TlsAcceptor,
    place: Arc<AdmittedConnection>,
    delay: Duration,
) {
    let _ = tcp.set_nodelay(true);
    if !delay.is_zero() {
        sleep(delay).await;
    }
    // Scanners and broken clients get no answer.
    let handshake = timeout(HANDSHAKE, acceptor.accept(Metered::new(tcp, HANDSHAKE_BYTES)));
    let Ok(Ok(mut stream)) = handshake.await else { return };
    let session = stream.get_ref().1;
    let client = Client::from_chain(session.peer_certificates().unwrap_or_default(), &served.operators);
    let Ok(binding) = session.export_keying_material([0; 32], EXPORTER_LABEL, None) else { return };
    let peer = Arc::new(Peer { client, binding });
    let hub = &served.hub;
    // An evicted node and a revoked operator still have their certificates, so they count as guests.
    let member = hub.member(&peer).filter(|m| hub.allocator.fenced(&m.slot, &m.tls_key).is_none());
    if member.is_some_and(|member| !place.is_member(&member.slot, Instant::now())) {
        return;
    }
    let operator = hub.operator(&peer).map(|certificate| certificate.operator.clone());
    let crowded = operator.as_ref().is_some_and(|o| !place.is_operator(&o.name, o.role, Instant::now()));
    // A connection to a node gets another budget.
    let known = member.is_some() || operator.is_some() && !crowded;
    stream.get_mut().0.set_budget(if known { MEMBER_BYTES } else { GUEST_BYTES });
    let charge = Arc::new(match operator {
        Some(operator) => Charge::Operator(operator.name),
        None => match member {
            Some(member) => Charge::Member(member.slot.clone()),
            None => Charge::Guest(AtomicBool::new(true)),
        },
    });
    let service = service_fn(|request| {
        let (served, peer, place, charge) = (served.clone(), peer.clone(), place.clone(), charge.clone());
        async move {
            let mut response = if crowded {
                let text = "operators have too many connections to this hub, or you have; retry later";
                closing(StatusCode::TOO_MANY_REQUESTS, text)
            } else if request.method() == Method::CONNECT {
                tunnel::open(&served, &peer, place, request).await
            } else {
                respond(&served.hub, &peer, &place, request, &charge).await
            };
            let (name, value) = NODE_API_HEADER;
            response.headers_mut().insert(HeaderName::from_static(name), HeaderValue::from_static(value));
            Ok::<_, Infallible>(response)
        }
    });
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEADER).max_headers(32).max_buf_size(LONGEST_HEADER);
    let _ = http.serve_connection(TokioIo::new(stream), service).with_upgrades().await;
}

/// The rate limit towards which requests count.
enum Charge {
    /// That of the member in this slot, for requests that change a state.
    Member(String),
    /// That of handshakes, after the first request, for which the handshake has counted.
    Guest(AtomicBool),
    /// That of the operator with this name.
    Operator(String),
}

impl Charge {
    /// Counts a request. Returns the delay; `None` refuses the request.
    fn take(&self, place: &AdmittedConnection, method: &Method) -> Option<Duration> {
        match self {
            Self::Member(_) if method == Method::GET => Some(Duration::ZERO),
            Self::Member(slot) => place.charge_member(slot, Instant::now()),
            Self::Guest(first) if first.swap(false, Ordering::Relaxed) => Some(Duration::ZERO),
            Self::Guest(_) => place.charge(Instant::now()),
            Self::Operator(name) => place.charge_operator(name, Kind::Other, Instant::now()),
        }
    }
}

/// Reads one request and replies.
async fn respond(
    hub: &Hub,
    peer: &Peer,
    place: &AdmittedConnection,
    request: Request<Incoming>,
    charge: &Charge,
) -> Response<Full<Bytes>> {
    match charge.take(place, request.method()) {
        Some(delay) => sleep(delay).await,
        None => return closing(StatusCode::TOO_MANY_REQUESTS, "too many requests; retry later"),
    }
    let (head, body) = request.into_parts();
    let body = match timeout(BODY, Limited::new(body, LONGEST).collect()).await {
        Ok(Ok(body)) => body.to_bytes(),
        Ok(Err(_)) => return closing(StatusCode::PAYLOAD_TOO_LARGE, "the request's body is too long"),
        Err(_) => return closing(StatusCode::REQUEST_TIMEOUT, "the request's body did not arrive in time"),
    };
    // While the hub handles the request, newer connections do not displace this one.
    place.set_busy(true);
    let response = answer(hub, peer, Request::from_parts(head, body)).await;
    place.set_busy(false);
    if response.extensions().get::<Admitted>().is_some() {
        place.is_known(Instant::now());
    }
    response
}

fn closing(status: StatusCode, text: &str) -> Response<Full<Bytes>> {
    let mut response = plain(status, text);
    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    response
}
