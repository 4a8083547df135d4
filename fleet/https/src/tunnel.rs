//! Connections of operators to nodes: through a hub, with a TLS session of their own inside, and replies that last.

use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use fleet::node_api::NODE_API_PORT;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::upgrade::Upgraded;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_rustls::rustls::{AlertDescription, ClientConfig, Error as TlsError};

use crate::{Connection, Error, Result, request};

/// Longest line of a reply, in bytes.
pub const LONGEST_LINE: usize = 128 << 10;
/// Longest error in a reply, in bytes.
const LONGEST_ERROR: usize = 16 << 10;

/// A stream of bytes to a service of a node.
pub type ByteStream = TokioIo<Upgraded>;

/// Header in every reply of a hub that forwards connections of operators, and its value. A hub of an earlier version
/// does not send it, so its 404 is not about the node.
pub const NODE_API_HEADER: (&str, &str) = ("bakehouse-node-api", "1");

/// Number of connections that a hub permits to one operator at the same time.
pub const CONNECTIONS_PER_HUB: usize = 64;

/// Part of the way to a node that has no connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Obstacle {
    /// The hub does not answer, or has another certificate than expected. Another hub may forward the connection.
    Hub,
    /// The hub's version does not know operators, or does not have the node. Hubs of other versions may.
    Version,
    /// The hub has reached a limit. It may forward the connection later.
    Busy,
    /// The hub does not reach the node, or the node has no TLS session with the client. The hub itself works.
    Node,
    /// The hub refuses the operator, and so do the other hubs.
    Refused,
}

/// Error of [`Connection::through_hub`].
#[derive(Debug)]
pub struct ThroughError {
    /// What failed.
    pub error: Error,
    /// Where it failed.
    pub obstacle: Obstacle,
}

impl fmt::Display for ThroughError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl StdError for ThroughError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.error.source()
    }
}

impl From<ThroughError> for Error {
    fn from(e: ThroughError) -> Self {
        e.error
    }
}

/// A failed `CONNECT`.
struct Refused {
    error: Error,
    /// Status of the reply, and whether it has [`NODE_API_HEADER`]; `None` without a reply.
    reply: Option<(StatusCode, bool)>,
}

impl Refused {
    fn obstacle(&self) -> Obstacle {
        match self.reply {
            None if is_refused_certificate(&self.error) => Obstacle::Version,
            None => Obstacle::Hub,
            Some((_, false)) => Obstacle::Version,
            Some((status, true)) => match status.as_u16() {
                401 | 403 => Obstacle::Refused,
                404 => Obstacle::Version,
                429 | 503 => Obstacle::Busy,
                502 | 504 => Obstacle::Node,
                _ => Obstacle::Hub,
            },
        }
    }
}

/// Returns whether the peer's TLS does not accept the kind of the client's certificate, as hubs that do not know
/// operators.
fn is_refused_certificate(e: &Error) -> bool {
    let mut cause: Option<&(dyn StdError + 'static)> = Some(e);
    while let Some(e) = cause {
        let inner = e.downcast_ref::<std::io::Error>().and_then(|e| e.get_ref());
        let tls = inner.and_then(|e| e.downcast_ref::<TlsError>()).or_else(|| e.downcast_ref::<TlsError>());
        if matches!(tls, Some(TlsError::AlertReceived(AlertDescription::UnsupportedCertificate))) {
            return true;
        }
        cause = e.source();
    }
    false
}

impl Connection {
    /// Connects to the node `node` through the hub `hub` at `host:port`. The inner TLS session is with the node itself,
    /// so the hub can neither read nor change its content. `config` presents the operator's certificate to both.
    ///
    /// # Errors
    /// If the hub or the node does not answer within 10 s, the hub refuses the operator or does not reach the node, or
    /// a certificate has another name or issuer.
    pub async fn through(address: (&str, u16), hub: &str, config: &Arc<ClientConfig>, node: &str) -> Result<Self> {
        Ok(Self::through_hub(address, hub, config, node, crate::TIMEOUT).await?)
    }

    /// As [`Self::through`], within `limit`. The error says whether the hub or the node is the obstacle. A hub reports
    /// within 1.5 s that a node does not answer.
    ///
    /// # Errors
    /// As [`Self::through`].
    pub async fn through_hub(
        (host, port): (&str, u16),
        hub: &str,
        config: &Arc<ClientConfig>,
        node: &str,
        limit: Duration,
    ) -> Result<Self, ThroughError> {
        let ends = Instant::now() + limit;
        let outer = timeout_at(ends, Self::open(host, port, hub, config)).await;
        let outer = outer.unwrap_or_else(|_| Err(Error::no_answer(format!("{hub} ({host}:{port})"))));
        let outer = outer.map_err(|error| ThroughError { error, obstacle: Obstacle::Hub })?;
        outer.on_to_node(hub, node, config, ends.saturating_duration_since(Instant::now())).await
    }

    /// Continues from the hub `hub`, to which [`Self::open`] has connected, to the node `node`, as
    /// [`Self::through_hub`] does.
    ///
    /// # Errors
    /// As [`Self::through`].
    pub async fn on_to_node(
        self,
        hub: &str,
        node: &str,
        config: &Arc<ClientConfig>,
        limit: Duration,
    ) -> Result<Self, ThroughError> {
        let ends = Instant::now() + limit;
        let (hub_at, node_at) = (self.to.clone(), format!("{node} (through {hub})"));
        let replied = timeout_at(ends, self.connect(&format!("{node}:{NODE_API_PORT}"))).await;
        let late = |_| Err(Refused { error: Error::no_answer(&hub_at), reply: None });
        let stream = replied.unwrap_or_else(late).map_err(|refused| {
            let obstacle = refused.obstacle();
            let is_old = obstacle == Obstacle::Version && !matches!(refused.reply, Some((_, true)));
            let old = || Error::network(&hub_at, "the hub runs a version that forwards no connections of operators");
            ThroughError { error: if is_old { old() } else { refused.error }, obstacle }
        })?;
        let inner = timeout_at(ends, Self::over_tls(stream, node_at.clone(), node, config)).await;
        let inner = inner.unwrap_or_else(|_| Err(Error::no_answer(node_at)));
        let inner = inner.map_err(|error| ThroughError { error, obstacle: Obstacle::Node })?;
        Ok(Self { is_node: true, ..inner })
    }

    /// Returns whether this hub forwards connections of operators. A hub that does not know operators refuses their
    /// certificates, so the connection should present none.
    ///
    /// # Errors
    /// If [`Self::send`] fails.
    pub async fn forwards_operators(&mut self) -> Result<bool> {
        let reply = self.send(request("GET", "hub", "/v1/operators/revoked", &[], Bytes::new())?).await?;
        Ok(reply.headers().contains_key(NODE_API_HEADER.0))
    }

    /// Opens a stream of bytes to a path of a node's API, such as `/v1/open/prometheus`.
    ///
    /// # Errors
    /// If the node refuses, or its service does not answer.
    pub async fn stream(self, path: &str) -> Result<ByteStream> {
        self.connect(path).await.map_err(|refused| refused.error)
    }

    async fn connect(mut self, target: &str) -> Result<ByteStream, Refused> {
        let failed = |error| Refused { error, reply: None };
        let request = request("CONNECT", target, target, &[], Bytes::new()).map_err(failed)?;
        let answer = self.send(request).await.map_err(failed)?;
        let status = answer.status();
        if !status.is_success() {
            let reply = Some((status, answer.headers().contains_key(NODE_API_HEADER.0)));
            return Err(Refused { error: self.error(answer).await, reply });
        }
        let upgraded = timeout(crate::TIMEOUT, hyper::upgrade::on(answer)).await;
        let upgraded = upgraded.map_err(|_| failed(Error::no_answer(&self.to)))?;
        Ok(TokioIo::new(upgraded.map_err(|e| failed(Error::network(&self.to, e)))?))
    }

    /// Sends a request whose reply is a sequence of lines, which may last. `idle`: the longest time between two lines.
    /// Nodes send an empty line at least every 20 s, which [`Lines::next`] does not return.
    ///
    /// # Errors
    /// If [`Self::send`] fails, or the status is not 2xx.
    pub async fn lines(&mut self, request: Request<Full<Bytes>>, idle: Duration) -> Result<Lines> {
        let answer = self.send(request).await?;
        if !answer.status().is_success() {
            return Err(self.error(answer).await);
        }
        Ok(Lines { to: self.to.clone(), body: answer.into_body(), idle, buffer: BytesMut::new(), searched: 0 })
    }

    async fn error(&self, answer: Response<Incoming>) -> Error {
        let failed = Error::network(&self.to, format!("unexpected reply {}", answer.status()));
        self.body(answer, LONGEST_ERROR).await.err().unwrap_or(failed)
    }
}

/// Lines of a reply. Dropping it closes the connection.
pub struct Lines {
    to: String,
    body: Incoming,
    idle: Duration,
    buffer: BytesMut,
    /// Bytes at the beginning of `buffer` without a line break.
    searched: usize,
}

impl Lines {
    /// Returns the next line without its line break; `None` after the last one.
    ///
    /// # Errors
    /// If the connection ends, no line arrives in time, or a line has more than [`LONGEST_LINE`] bytes.
    pub async fn next(&mut self) -> Result<Option<Bytes>> {
        loop {
            if let Some(length) = self.buffer[self.searched..].iter().position(|b| *b == b'\n') {
                let line = self.buffer.split_to(self.searched + length + 1).freeze();
                self.searched = 0;
                if line.len() > 1 {
                    return Ok(Some(line.slice(..line.len() - 1)));
                }
                continue;
            }
            self.searched = self.buffer.len();
            if self.searched > LONGEST_LINE {
                return Err(Error::network(&self.to, format!("a line has more than {LONGEST_LINE} bytes")));
            }
            let frame = timeout(self.idle, self.body.frame()).await.map_err(|_| Error::no_answer(&self.to))?;
            match frame {
                Some(frame) => {
                    let frame = frame.map_err(|e| Error::network(&self.to, e))?;
                    if let Ok(data) = frame.into_data() {
                        self.buffer.extend_from_slice(&data);
                    }
                }
                None if self.buffer.is_empty() => return Ok(None),
                None => {
                    self.searched = 0;
                    return Ok(Some(self.buffer.split().freeze()));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Identity, WebPkiClientVerifier, provider, roots};
    use fleet::{Fleet, Issuer, Operator, OperatorRole, PrivateKey, Topology};
    use tokio::net::TcpListener;
    use tokio_rustls::TlsAcceptor;
    use tokio_rustls::rustls::ServerConfig;

    #[test]
    fn only_replies_of_hubs_that_know_operators_are_about_the_node() {
        let of = |status: u16, knows| {
            let reply = Some((StatusCode::from_u16(status).unwrap(), knows));
            Refused { error: Error::no_answer("hub-1"), reply }.obstacle()
        };
        for (status, expected) in [
            (403, Obstacle::Refused),
            (404, Obstacle::Version),
            (429, Obstacle::Busy),
            (502, Obstacle::Node),
            (504, Obstacle::Node),
            (500, Obstacle::Hub),
        ] {
            assert_eq!((of(status, true), of(status, false)), (expected, Obstacle::Version), "{status}");
        }
        let silent = Refused { error: Error::no_answer("hub-1"), reply: None };
        assert_eq!(silent.obstacle(), Obstacle::Hub);
    }

    /// A hub of the previous version verifies operators as it verifies nodes.
    #[test]
    fn an_older_hub_is_an_obstacle_of_its_version() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let fleet = Fleet::parse("f", b"name = \"acme\"\n[groups]\nhub.count = 3\n").unwrap();
            let (topology, root) = (Topology::from_fleet(&fleet), Issuer::root("acme").unwrap());
            let key = PrivateKey::generate().unwrap();
            let public = key.public().unwrap();
            let own = root.node(&topology, topology.node("hub-1").unwrap(), &public).unwrap();
            let verifier =
                WebPkiClientVerifier::builder_with_provider(roots(root.certificate()).unwrap().into(), provider());
            let tls = ServerConfig::builder_with_provider(provider())
                .with_safe_default_protocol_versions()
                .unwrap()
                .with_client_cert_verifier(verifier.allow_unauthenticated().build().unwrap())
                .with_single_cert(crate::chain(&own).unwrap(), crate::key(key.pem()).unwrap())
                .unwrap();
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let port = listener.local_addr().unwrap().port();
            let hub = tokio::spawn(async move {
                let (tcp, _) = listener.accept().await.unwrap();
                TlsAcceptor::from(Arc::new(tls)).accept(tcp).await.map(drop).unwrap_err()
            });
            let anna = Operator::new("anna", OperatorRole::Viewer).unwrap();
            let cert = root.operator(&anna, &public, (0, 4_000_000_000)).unwrap();
            let config = crate::client(root.certificate(), Some(Identity { cert: &cert, key: key.pem() })).unwrap();
            let limit = Duration::from_secs(30);
            let connected = Connection::through_hub(("127.0.0.1", port), "hub-1", &config, "hub-2", limit).await;
            let failed = connected.map(drop).unwrap_err();
            let text = fleet::ErrorChain::new(&failed).to_string();
            assert_eq!(failed.obstacle, Obstacle::Version, "{text}");
            assert!(text.contains("hub-1") && text.contains("forwards no connections of operators"), "{text}");
            hub.await.unwrap();
        });
    }
}
