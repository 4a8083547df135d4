//! Connections of operators to nodes. The hub copies bytes of the TLS session between the operator and the node, and
//! can neither read nor change them.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use fleet::Node;
use fleet::node_api::NODE_API_PORT;
use fleet_https::OperatorCertificate;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::upgrade::{Upgraded, on};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use rustix::net::sockopt;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};
use tokio_rustls::server::TlsStream;
use tracing::{debug, info};

use super::super::api::{Hub, plain};
use super::super::peer::Peer;
use super::admission::{AdmittedConnection, Kind};
use super::throttle::Throttles;
use super::{Served, closing};
use crate::server::copy::copy_both;
use crate::server::metered::Metered;

/// Time limit for the connection to a node: less than the 3 s for which an operator's client waits, so that the client
/// learns that the node is silent, and not the hub.
const CONNECT: Duration = Duration::from_millis(1500);
/// Longest time without a byte in either direction.
const IDLE: Duration = Duration::from_secs(600);
/// Time between two checks whether the operator's certificate has expired.
const CHECK: Duration = Duration::from_secs(60);
/// Longest time for which a machine does not acknowledge bytes, or does not accept any because it reads none. A laptop
/// that sleeps keeps its connection for so long.
const SILENCE: Duration = Duration::from_secs(60);
/// Time without a byte after which the kernel asks whether the other machine is still there, and between two questions.
const KEEPALIVE: Duration = Duration::from_secs(15);
/// Time between two log lines about the connections of one operator to one node.
const LOG: Duration = Duration::from_secs(600);
/// Number of operators and nodes whose last log line the hub remembers.
const MOST_LOGGED: usize = 16_384;
/// A connection that lasted for at least this time has a log line at its end.
const LONG: Duration = Duration::from_secs(60);

/// What the tunnels of a hub share.
pub(super) struct Tunnels {
    throttles: Throttles,
    /// Time of the last log line about each operator and node.
    logged: Mutex<BTreeMap<(String, String), Instant>>,
}

impl Tunnels {
    pub(super) fn new() -> Self {
        Self { throttles: Throttles::new(), logged: Mutex::default() }
    }

    /// Returns whether to log a connection of an operator to a node: once in ten minutes. A client that repeats
    /// `status` would otherwise fill the journal, and those of the monitors.
    fn logs(&self, operator: &str, node: &str, now: Instant) -> bool {
        let mut logged = self.logged.lock().unwrap_or_else(PoisonError::into_inner);
        let is_recent = |at: &Instant| now.saturating_duration_since(*at) < LOG;
        let key = (operator.to_owned(), node.to_owned());
        if logged.get(&key).is_some_and(is_recent) {
            return false;
        }
        if logged.len() >= MOST_LOGGED {
            logged.retain(|_, at| is_recent(at));
        }
        let has_room = logged.len() < MOST_LOGGED;
        if has_room {
            logged.insert(key, now);
        }
        has_room
    }
}

/// Replies to `CONNECT NODE:7443`. After the reply, a task of its own copies the bytes, and counts as the connection
/// that `place` admitted.
pub(super) async fn open(
    served: &Arc<Served>,
    peer: &Peer,
    place: Arc<AdmittedConnection>,
    request: Request<Incoming>,
) -> Response<Full<Bytes>> {
    let operator = match admitted(served, peer) {
        Ok(operator) => operator.clone(),
        Err(why) => return closing(StatusCode::FORBIDDEN, why),
    };
    match place.charge_operator(&operator.operator.name, Kind::Forwarded, Instant::now()) {
        Some(delay) => sleep(delay).await,
        None => return closing(StatusCode::TOO_MANY_REQUESTS, "this operator opens too many connections; retry later"),
    }
    let Some(node) = target(&served.hub, &request) else {
        let text = format!("the fleet has no such node; CONNECT accepts NODE:{NODE_API_PORT}");
        return closing(StatusCode::NOT_FOUND, &text);
    };
    let to = match connect(node).await {
        Ok(to) => to,
        Err((status, why)) => return closing(status, &why),
    };
    let (name, slot, now) = (operator.operator.dns_name(), node.name.clone(), Instant::now());
    let logs = served.tunnels.logs(&name, &slot, now);
    log(logs, &name, &slot, format_args!("forwarding a connection of {name} at {} to {slot}", place.from()));
    let (served, held) = (served.clone(), place.clone());
    let task = tokio::spawn(async move {
        let Ok(client) = on(request).await else { return };
        let why = forward(&served, &operator, client, to).await;
        let lasted = now.elapsed();
        let is_info = logs && (lasted >= LONG || why.is_some());
        let why = why.map(|why| format!(": {why}")).unwrap_or_default();
        let seconds = lasted.as_secs();
        log(is_info, &name, &slot, format_args!("the connection of {name} to {slot} has ended after {seconds} s{why}"));
        drop(held);
    });
    place.set_task(task.abort_handle());
    plain(StatusCode::OK, "")
}

/// Writes a log line of the level info, or of the level debug.
fn log(is_info: bool, operator: &str, node: &str, text: fmt::Arguments<'_>) {
    if is_info {
        info!(operator, node, "{text}");
    } else {
        debug!(operator, node, "{text}");
    }
}

/// Returns the operator of a client, or the text of the refusal.
fn admitted<'a>(served: &Served, peer: &'a Peer) -> Result<&'a OperatorCertificate, &'static str> {
    let Some(operator) = peer.operator() else {
        return Err("CONNECT requires a valid certificate of an operator; `bakehouse operator` makes one");
    };
    if served.hub.operator(peer).is_none() {
        return Err("the operator's certificate is revoked");
    }
    if !served.operators.is_current(operator) {
        return Err("the operator's certificate has expired");
    }
    Ok(operator)
}

/// Returns the node whose API a request names.
fn target<'a>(hub: &'a Hub, request: &Request<Incoming>) -> Option<&'a Node> {
    let authority = request.uri().authority()?;
    hub.topology.node(authority.host()).filter(|_| authority.port_u16() == Some(NODE_API_PORT))
}

/// Connects to a node's API. The error is the status and the text of the reply.
async fn connect(node: &Node) -> Result<TcpStream, (StatusCode, String)> {
    let (slot, at) = (&node.name, SocketAddr::from((node.address, NODE_API_PORT)));
    let why = "the node starts, is off, or runs a version without the node API";
    match timeout(CONNECT, TcpStream::connect(at)).await {
        Ok(Ok(tcp)) => Ok(tcp),
        Ok(Err(e)) => Err((StatusCode::BAD_GATEWAY, format!("{slot} does not accept the connection ({e}): {why}"))),
        Err(_) => {
            let text = format!("{slot} does not answer within {} s: {why}", CONNECT.as_secs_f32());
            Err((StatusCode::GATEWAY_TIMEOUT, text))
        }
    }
}

/// Copies bytes between an operator and a node until the connection ends, or the operator's certificate is no longer
/// valid. Returns why it ended, if neither side ended it.
async fn forward(served: &Served, operator: &OperatorCertificate, client: Upgraded, node: TcpStream) -> Option<String> {
    let expired = async {
        while served.operators.is_current(operator) {
            sleep(CHECK).await;
        }
    };
    tokio::select! {
        // Clients often close a connection without an end of its TLS session.
        copied = copy(&served.tunnels.throttles, &operator.operator.name, client, node) => {
            let idle = copied.is_err_and(|e| e.kind() == ErrorKind::TimedOut);
            idle.then(|| "a machine has not answered".to_owned())
        }
        () = served.hub.revocations.until_revoked(&operator.key) => {
            Some("the operator's certificate is revoked".to_owned())
        }
        () = expired => Some("the operator's certificate has expired".to_owned()),
    }
}

async fn copy(throttles: &Throttles, name: &str, client: Upgraded, mut node: TcpStream) -> io::Result<()> {
    // The listener has made the connection of these types.
    let client = client.downcast::<TokioIo<TlsStream<Metered<TcpStream>>>>();
    let client = client.map_err(|_| io::Error::other("the connection has another type"))?;
    let (mut stream, begun) = (client.io.into_inner(), client.read_buf);
    let metered = stream.get_mut().0;
    // The operator may send any number of bytes to the node.
    metered.set_budget(usize::MAX);
    detect_silence(metered.get_ref())?;
    detect_silence(&node)?;
    node.set_nodelay(true)?;
    if !begun.is_empty() {
        node.write_all(&begun).await?;
    }
    copy_both(throttles.limit(name, stream), throttles.limit(name, node), IDLE).await
}

/// Ends a connection whose other machine is silent. Without it the kernel sends for 15 minutes, and the connection keeps
/// its place.
fn detect_silence(tcp: &TcpStream) -> io::Result<()> {
    sockopt::set_socket_keepalive(tcp, true)?;
    sockopt::set_tcp_keepidle(tcp, KEEPALIVE)?;
    sockopt::set_tcp_keepintvl(tcp, KEEPALIVE)?;
    sockopt::set_tcp_user_timeout(tcp, SILENCE.as_millis() as u32)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    #[test]
    fn repeated_connections_are_logged_once_in_ten_minutes() {
        let (tunnels, now) = (Tunnels::new(), Instant::now());
        let round = |at: Duration| (0..8).filter(|n| tunnels.logs("anna", &format!("db-{n}"), now + at)).count();
        assert_eq!(round(Duration::ZERO), 8);
        assert_eq!((1..300).map(|n| round(Duration::from_secs(2 * n))).sum::<usize>(), 0);
        assert_eq!(round(LOG), 8);
        assert!(tunnels.logs("ben", "db-1", now) && !tunnels.logs("ben", "db-1", now));
        let lines = (0..MOST_LOGGED + 10).filter(|n| tunnels.logs("carl", &n.to_string(), now)).count();
        assert!(lines < MOST_LOGGED, "{lines}");
        assert_eq!(tunnels.logged.lock().unwrap().len(), MOST_LOGGED);
    }

    #[tokio::test]
    async fn both_sockets_detect_a_silent_machine() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let tcp = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        detect_silence(&tcp).unwrap();
        assert!(sockopt::socket_keepalive(&tcp).unwrap());
        assert_eq!(sockopt::tcp_user_timeout(&tcp).unwrap(), 60_000);
    }
}
