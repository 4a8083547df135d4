//! HTTP over TLS between nodes. Clients and servers trust only the fleet's root. A certificate has the name of the
//! slot, and clients verify this name at every address of the node.

use std::error::Error as StdError;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use fleet::node_api::NodeApiError;
use fleet::{
    BOUND_SIGNATURE_HEADER, CertificateError, ChannelBinding, EXPORTER_LABEL, PublicKey, SIGNATURE_HEADER,
    bound_message, encoding, one_line,
};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
pub use tokio_rustls::rustls::ClientConfig;
use tokio_rustls::rustls::client::Resumption;
use tokio_rustls::rustls::crypto::{CryptoProvider, ring};
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use tokio_rustls::rustls::version::TLS13;
use tokio_rustls::rustls::{RootCertStore, ServerConfig};
use webpki::EndEntityCert;

pub mod backoff;
mod operator;
mod tunnel;
mod web;

use operator::ClientVerifier;
pub use operator::{OperatorCertificate, OperatorVerifier};
pub use tunnel::{ByteStream, CONNECTIONS_PER_HUB, LONGEST_LINE, Lines, NODE_API_HEADER, Obstacle, ThroughError};
pub use web::{WebValidity, web_certificate, web_file, web_key_digest, web_pair};

type Result<T, E = Error> = std::result::Result<T, E>;

/// Cause of an error: an error of another crate, or a text.
pub type Cause = Box<dyn StdError + Send + Sync>;

/// Error of a connection or a request.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A certificate or a key cannot be used. A later attempt also fails.
    #[error("cannot {action}")]
    Configuration {
        /// What failed, such as `read a certificate`.
        action: &'static str,
        /// Cause.
        source: Cause,
    },
    /// A request cannot be built.
    #[error("cannot build a request for {path}")]
    Request {
        /// Path of the request.
        path: String,
        /// Cause.
        source: hyper::http::Error,
    },
    /// A request over a connection without TLS cannot be signed.
    #[error("cannot sign a request to {to}: the connection has no TLS")]
    NoTls {
        /// Name and address of the peer.
        to: String,
    },
    /// A peer cannot be reached, has another certificate than expected, or sends an invalid reply.
    #[error("request to {to} failed")]
    Network {
        /// Name and address of the peer.
        to: String,
        /// Cause.
        source: PeerError,
    },
    /// A certificate or a signature cannot be made.
    #[error(transparent)]
    Certificate(#[from] CertificateError),
}

/// Cause of a failed request.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// The peer does not answer in time.
    #[error("no answer")]
    NoAnswer,
    /// The reply's status is not 2xx.
    #[error("{status} {text}")]
    Status {
        /// Status of the reply.
        status: StatusCode,
        /// The first 200 characters of the reply's body, without characters that control a terminal.
        text: String,
    },
    /// A node's API refuses the request. [`Connection::through`] makes connections with such replies.
    #[error(transparent)]
    Refused(NodeRefusal),
    /// The connection, TLS or the protocol failed.
    #[error(transparent)]
    Other(Cause),
}

/// Refusal of a node's API.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct NodeRefusal {
    /// Status of the reply.
    pub status: StatusCode,
    /// Reason and fix, without characters that control a terminal.
    pub error: NodeApiError,
}

impl Error {
    /// Returns the error of a request to the peer `to`. The cause is an error, or a text.
    pub fn network(to: impl Into<String>, cause: impl Into<Cause>) -> Self {
        Self::Network { to: to.into(), source: PeerError::Other(cause.into()) }
    }

    /// Returns the error of a request to the peer `to`, which does not answer in time.
    pub fn no_answer(to: impl Into<String>) -> Self {
        Self::Network { to: to.into(), source: PeerError::NoAnswer }
    }

    /// Returns a function that adds the failed action to a cause.
    fn configuration<E: Into<Cause>>(action: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::Configuration { action, source: source.into() }
    }
}

/// Time limit of a connection, and of a reply.
pub const TIMEOUT: Duration = Duration::from_secs(10);

/// A certificate with its intermediate certificates, and its key. PEM.
#[derive(Clone, Copy)]
pub struct Identity<'a> {
    /// The certificates, the node's first.
    pub cert: &'a str,
    /// The private key.
    pub key: &'a str,
}

/// Returns the configuration of a TLS client that trusts only `root`, and presents `identity` if there is one.
///
/// # Errors
/// If the PEM is invalid.
pub fn client(root: &str, identity: Option<Identity>) -> Result<Arc<ClientConfig>> {
    let config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(tls)?
        .with_root_certificates(roots(root)?);
    Ok(Arc::new(match identity {
        Some(own) => config.with_client_auth_cert(chain(own.cert)?, key(own.key)?).map_err(tls)?,
        None => config.with_no_client_auth(),
    }))
}

/// Returns a configuration that resumes no sessions, for connections to many peers. A client's cache has room for 32
/// peers: with more, it would lose the sessions with those to which it connects again and again.
#[must_use]
pub fn without_resumption(config: &ClientConfig) -> Arc<ClientConfig> {
    let mut config = config.clone();
    config.resumption = Resumption::disabled();
    Arc::new(config)
}

/// Returns the configuration of a TLS server. Client certificates are optional, and verified against `root`.
///
/// # Errors
/// If the PEM is invalid.
pub fn server(root: &str, own: Identity) -> Result<Arc<ServerConfig>> {
    Ok(Arc::new(server_config(root, own, false)?))
}

/// Returns the configuration of a TLS server that accepts only clients with a certificate that `root` verifies. Each
/// connection verifies it again, because a resumed session does not.
///
/// # Errors
/// If the PEM is invalid.
pub fn mutual_server(root: &str, own: Identity) -> Result<Arc<ServerConfig>> {
    let mut config = server_config(root, own, true)?;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

fn server_config(root: &str, own: Identity, mutual: bool) -> Result<ServerConfig> {
    let operators = OperatorVerifier::new(root)?;
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots(root)?), provider());
    let verifier = if mutual { verifier } else { verifier.allow_unauthenticated() };
    let nodes = verifier.build().map_err(Error::configuration("use the fleet's root certificate"))?;
    ServerConfig::builder_with_provider(provider())
        // In TLS 1.2 the exporter identifies a connection only with the extension of RFC 7627.
        .with_protocol_versions(&[&TLS13])
        .map_err(tls)?
        .with_client_cert_verifier(Arc::new(ClientVerifier { operators, nodes }))
        .with_single_cert(chain(own.cert)?, key(own.key)?)
        .map_err(tls)
}

/// A connection to a peer. It carries one request at a time.
pub struct Connection {
    to: String,
    sender: SendRequest<Full<Bytes>>,
    binding: Option<ChannelBinding>,
    peer_key: Option<String>,
    /// The peer is a node's API, whose refusals are JSON.
    is_node: bool,
    /// Time limit of a reply, and of its body.
    limit: Duration,
}

impl Connection {
    /// Connects to `host:port` with TLS. The peer's certificate must have `name`, a slot or an address.
    ///
    /// # Errors
    /// If the peer does not answer within 10 s, or its certificate has another name or issuer.
    pub async fn open(host: &str, port: u16, name: &str, config: &Arc<ClientConfig>) -> Result<Self> {
        let to = format!("{name} ({host}:{port})");
        let connected = timeout(TIMEOUT, async {
            let tcp = TcpStream::connect((host, port)).await?;
            tcp.set_nodelay(true)?;
            Ok::<_, std::io::Error>(tcp)
        });
        let tcp = connected.await.map_err(|_| Error::no_answer(&to))?.map_err(|e| Error::network(&to, e))?;
        Self::over_tls(tcp, to, name, config).await
    }

    /// Makes a TLS session over a stream to the peer `to`, whose certificate must have `name`.
    async fn over_tls<S>(stream: S, to: String, name: &str, config: &Arc<ClientConfig>) -> Result<Self>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let expected = ServerName::try_from(name.to_owned()).map_err(|e| Error::network(&to, e))?;
        let secured = timeout(TIMEOUT, TlsConnector::from(config.clone()).connect(expected, stream));
        let stream = secured.await.map_err(|_| Error::no_answer(&to))?.map_err(|e| Error::network(&to, e))?;
        let session = stream.get_ref().1;
        let binding =
            session.export_keying_material([0; 32], EXPORTER_LABEL, None).map_err(|e| Error::network(&to, e))?;
        let cert = session.peer_certificates().and_then(<[_]>::first).and_then(|c| EndEntityCert::try_from(c).ok());
        let peer_key = cert.as_ref().and_then(tls_key);
        let connection = Self::over(stream, to).await?;
        Ok(Self { binding: Some(binding), peer_key, ..connection })
    }

    /// Returns the identifier of this TLS connection; `None` without TLS.
    #[must_use]
    pub fn binding(&self) -> Option<&ChannelBinding> {
        self.binding.as_ref()
    }

    /// Returns the base64 of the public key in the peer's certificate, as in [`fleet::SlotRecord`].
    #[must_use]
    pub fn peer_key(&self) -> Option<&str> {
        self.peer_key.as_deref()
    }

    /// Posts a body with two signatures of `sign`: one for this connection and this path, and one over the body alone
    /// for hubs of the previous version. Returns the body of the reply, which may have up to `longest` bytes.
    ///
    /// # Errors
    /// If the connection has no TLS, the key cannot be read, or [`Self::ask`] fails.
    pub async fn post_signed(
        &mut self,
        path: &str,
        body: &[u8],
        sign: impl Fn(&[u8]) -> Result<Vec<u8>, CertificateError>,
        longest: usize,
    ) -> Result<Bytes> {
        let unbound = || Error::NoTls { to: self.to.clone() };
        let message = bound_message(self.binding.as_ref().ok_or_else(unbound)?, "POST", path, body);
        let (bound, plain) = (encoding::encode(&sign(&message)?), encoding::encode(&sign(body)?));
        let headers = [(BOUND_SIGNATURE_HEADER, bound.as_str()), (SIGNATURE_HEADER, plain.as_str())];
        self.ask(request("POST", "hub", path, &headers, body.to_vec().into())?, longest).await
    }

    /// Connects to `host:port` without TLS.
    ///
    /// # Errors
    /// If the peer does not answer within 10 s.
    pub async fn plain(host: &str, port: u16) -> Result<Self> {
        let to = format!("{host}:{port}");
        let connected = timeout(TIMEOUT, TcpStream::connect((host, port))).await;
        let stream = connected.map_err(|_| Error::no_answer(&to))?.map_err(|e| Error::network(&to, e))?;
        Self::over(stream, to).await
    }

    async fn over(stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static, to: String) -> Result<Self> {
        let (sender, connection) = match handshake(TokioIo::new(stream)).await {
            Ok(parts) => parts,
            Err(e) => return Err(Error::network(to, e)),
        };
        // The next request reports the end of the connection.
        tokio::spawn(async move {
            let _ = connection.with_upgrades().await;
        });
        Ok(Self { to, sender, binding: None, peer_key: None, is_node: false, limit: TIMEOUT })
    }

    /// Waits for each reply for up to `limit` instead of 10 s.
    #[must_use]
    pub fn with_limit(self, limit: Duration) -> Self {
        Self { limit, ..self }
    }

    /// Sends a request. Returns the reply before its body.
    ///
    /// # Errors
    /// If the connection ends, or no reply arrives within the connection's limit, which is 10 s without
    /// [`Self::with_limit`].
    pub async fn send(&mut self, request: Request<Full<Bytes>>) -> Result<Response<Incoming>> {
        let answer = timeout(self.limit, async {
            self.sender.ready().await?;
            self.sender.send_request(request).await
        });
        answer.await.map_err(|_| Error::no_answer(&self.to))?.map_err(|e| Error::network(&self.to, e))
    }

    /// Sends a request. Returns the body of the reply, which may have up to `longest` bytes.
    ///
    /// # Errors
    /// If [`Self::send`] fails, the body is too long, or the status is not 2xx. The error has the first 200 characters
    /// of the body.
    pub async fn ask(&mut self, request: Request<Full<Bytes>>, longest: usize) -> Result<Bytes> {
        let response = self.send(request).await?;
        self.body(response, longest).await
    }

    /// Reads the body of a reply, or the error in the body.
    async fn body(&self, response: Response<Incoming>, longest: usize) -> Result<Bytes> {
        let status = response.status();
        let body = timeout(self.limit, Limited::new(response.into_body(), longest).collect());
        let body = body.await.map_err(|_| Error::no_answer(&self.to))?.map_err(|e| Error::network(&self.to, e))?;
        let body = body.to_bytes();
        if status.is_success() {
            return Ok(body);
        }
        let failed = |source| Err(Error::Network { to: self.to.clone(), source });
        // A reply without a message comes from another server.
        let refusal =
            serde_json::from_slice::<NodeApiError>(&body).ok().filter(|e| self.is_node && !e.message.is_empty());
        if let Some(NodeApiError { message, help }) = refusal {
            let error = NodeApiError { message: one_line(&message), help: help.map(|help| one_line(&help)) };
            return failed(PeerError::Refused(NodeRefusal { status, error }));
        }
        let text: String = String::from_utf8_lossy(&body).chars().take(200).collect();
        failed(PeerError::Status { status, text: one_line(&text) })
    }
}

/// Builds a request.
///
/// # Errors
/// If a header or the path is not valid in HTTP.
pub fn request(
    method: &str,
    host: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: Bytes,
) -> Result<Request<Full<Bytes>>> {
    let mut request = Request::builder().method(method).uri(path).header("host", host);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(Full::new(body)).map_err(|source| Error::Request { path: path.to_owned(), source })
}

/// Returns the base64 of a certificate's P-256 public key; `None` for a key of another kind.
#[must_use]
pub fn tls_key(cert: &EndEntityCert) -> Option<String> {
    let spki = cert.subject_public_key_info();
    // The structure ends with the uncompressed P-256 point.
    let point = spki.as_ref().get(spki.as_ref().len().checked_sub(65)?..)?;
    Some(encoding::encode(PublicKey::from_point(point)?.as_bytes()))
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn roots(pem: &str) -> Result<RootCertStore> {
    let mut store = RootCertStore::empty();
    for cert in chain(pem)? {
        store.add(cert).map_err(tls)?;
    }
    Ok(store)
}

fn chain(pem: &str) -> Result<Vec<CertificateDer<'static>>> {
    let certs: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    let certs = certs.map_err(Error::configuration("read a certificate"))?;
    if certs.is_empty() {
        return Err(Error::configuration("read a certificate")("the ticket or the state has none"));
    }
    Ok(certs)
}

fn key(pem: &str) -> Result<PrivateKeyDer<'static>> {
    PrivateKeyDer::from_pem_slice(pem.as_bytes()).map_err(Error::configuration("read this node's key"))
}

fn tls(e: tokio_rustls::rustls::Error) -> Error {
    Error::configuration("use a certificate or a key")(e)
}
