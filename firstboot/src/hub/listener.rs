//! The join API's connections: HTTPS on the hub's public endpoint, beside WireGuard's own port.
//!
//! A separate thread serves them, so that load from strangers does not delay the mesh, the watches and the fence of
//! the same process.

mod admission;
mod metered;

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;
use fleet::EXPORTER_LABEL;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::header::{CONNECTION, HeaderValue};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use nix::sys::resource::{Resource, getrlimit};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tracing::warn;

use super::api::{Admitted, Hub, answer, plain};
use super::peer::{Member, Peer};
use crate::error::{Error, Result};
use admission::{Admission, AdmittedConnection, Limits};
use metered::Metered;

/// Open connections: guests may use three quarters, members one quarter.
const CONNECTIONS: usize = 1024;
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
    let (stop, stopped) = oneshot::channel::<()>();
    let (done, ended) = oneshot::channel();
    let thread = std::thread::Builder::new().name("join-api".to_owned()).spawn(move || {
        // Without the lower priority the API still works.
        if let Err(e) = rustix::process::nice(NICE) {
            warn!("cannot lower the priority of the join API's thread: {e}");
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let served = match runtime.map_err(Error::io("start", "the join API's runtime")) {
            Ok(runtime) => runtime.block_on(async {
                tokio::select! {
                    served = accept(hub, at, TlsAcceptor::from(tls)) => served,
                    _ = stopped => Ok(()),
                }
            }),
            Err(e) => Err(e),
        };
        // There is no receiver if the process is ending.
        let _ = done.send(served);
    });
    let thread = thread.map_err(Error::io("start", "the join API's thread"))?;
    let _server = Server { stop: Some(stop), thread: Some(thread) };
    ended.await.unwrap_or_else(|_| Err(Error::Failed("the join API's thread has panicked".to_owned())))
}

/// The API's thread. Dropping it ends the thread and frees the port.
struct Server {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // The panic handler has printed a panic of the thread.
            let _ = thread.join();
        }
    }
}

async fn accept(hub: Arc<Hub>, at: SocketAddr, acceptor: TlsAcceptor) -> Result<()> {
    let listener = listen(at).map_err(Error::io("listen at", at.to_string()))?;
    let admission = Admission::new(Limits::for_connections(connections()));
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
        let Some((place, delay)) = admission.enter(from, is_of_mesh(&hub, from), now) else {
            // Zero linger closes with a reset, so that the kernel keeps no state of the connection.
            let _ = tcp.set_zero_linger();
            continue;
        };
        let id = place.id();
        let (hub, acceptor) = (hub.clone(), acceptor.clone());
        let task = tokio::spawn(async move {
            let _ = timeout(LIFETIME, connection(hub, tcp, acceptor, Arc::new(place), delay)).await;
        });
        admission.set_task(id, task.abort_handle());
    }
}

fn listen(at: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = if at.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // A hub that restarts can bind to its port while old connections are in TIME_WAIT.
    socket.set_reuseaddr(true)?;
    socket.bind(at)?;
    socket.listen(BACKLOG)
}

/// Returns the number of connections that the limit of file descriptors allows.
fn connections() -> usize {
    let limit =
        getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _)| usize::try_from(soft).unwrap_or(usize::MAX));
    CONNECTIONS.min(limit.saturating_sub(DESCRIPTORS)).max(64)
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
    hub: Arc<Hub>,
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
    let member = session.peer_certificates().and_then(<[_]>::first).and_then(Member::from_certificate);
    let Ok(binding) = session.export_keying_material([0; 32], EXPORTER_LABEL, None) else { return };
    let peer = Arc::new(Peer { member, binding });
    // An evicted node still has its certificate, so it counts as a guest.
    let member = peer.member.as_ref().filter(|m| hub.allocator.fenced(&m.slot, &m.tls_key).is_none());
    if member.is_some_and(|member| !place.is_member(&member.slot, Instant::now())) {
        return;
    }
    let guest = member.is_none();
    stream.get_mut().0.set_budget(if guest { GUEST_BYTES } else { MEMBER_BYTES });
    let requests = std::sync::atomic::AtomicUsize::new(0);
    let service = service_fn(|request| {
        let further = requests.fetch_add(1, std::sync::atomic::Ordering::Relaxed) > 0;
        let (hub, peer, place) = (hub.clone(), peer.clone(), place.clone());
        async move { Ok::<_, Infallible>(respond(&hub, &peer, &place, request, guest && further).await) }
    });
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEADER).max_headers(32).max_buf_size(LONGEST_HEADER);
    let _ = http.serve_connection(TokioIo::new(stream), service).await;
}

/// Reads one request and replies. A `charged` request counts towards the rate limit like a handshake.
async fn respond(
    hub: &Hub,
    peer: &Peer,
    place: &AdmittedConnection,
    request: Request<Incoming>,
    charged: bool,
) -> Response<Full<Bytes>> {
    if charged {
        match place.charge(Instant::now()) {
            Some(delay) => sleep(delay).await,
            None => {
                return closing(StatusCode::TOO_MANY_REQUESTS, "too many requests from this address; retry later");
            }
        }
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
