//! HTTP over TLS between nodes. Everybody believes the fleet's root and nobody else, and
//! everybody is called by his slot's name, wherever he is reached. Updates come from elsewhere.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use fleet::{
    BOUND_SIGNATURE_HEADER, CertificateError, ChannelBinding, EXPORTER_LABEL, PublicKey, SIGNATURE_HEADER,
    bound_message, encoding,
};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
pub use tokio_rustls::rustls::ClientConfig;
use tokio_rustls::rustls::crypto::{CryptoProvider, ring};
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::version::TLS13;
use tokio_rustls::rustls::{RootCertStore, ServerConfig};
use webpki::EndEntityCert;

pub mod backoff;

type Result<T, E = Error> = std::result::Result<T, E>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A certificate or a key cannot be used. A later attempt fails, too.
    #[error("{0}")]
    Configuration(String),
    /// A request cannot be made.
    #[error("{0}")]
    Failed(String),
    /// A peer cannot be reached, is not the one that was expected, or does not answer as it should.
    #[error("{to}: {why}")]
    Network { to: String, why: String },
    #[error(transparent)]
    Certificate(#[from] CertificateError),
}

/// How long a connection, or an answer, may take.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// A certificate with its issuers, and its key. PEM.
#[derive(Clone, Copy)]
pub struct Identity<'a> {
    pub cert: &'a str,
    pub key: &'a str,
}

/// # Errors
/// PEM that is none.
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

/// Whoever has a certificate of the fleet shows it; who has none may still ask.
///
/// # Errors
/// PEM that is none.
pub fn server(root: &str, own: Identity) -> Result<Arc<ServerConfig>> {
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots(root)?), provider())
        .allow_unauthenticated()
        .build()
        .map_err(|e| Error::Configuration(format!("the fleet root's certificate: {e}")))?;
    let config = ServerConfig::builder_with_provider(provider())
        // TLS 1.2's exporter identifies a connection only with an extension.
        .with_protocol_versions(&[&TLS13])
        .map_err(tls)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain(own.cert)?, key(own.key)?)
        .map_err(tls)?;
    Ok(Arc::new(config))
}

/// One connection; requests go over it one after the other.
pub struct Connection {
    to: String,
    sender: SendRequest<Full<Bytes>>,
    binding: Option<ChannelBinding>,
    peer_key: Option<String>,
}

impl Connection {
    /// Connects to `host:port`, where whoever answers has to be `name` (a slot, or an address).
    ///
    /// # Errors
    /// Nobody answers, or somebody else.
    pub async fn open(host: &str, port: u16, name: &str, config: &Arc<ClientConfig>) -> Result<Self> {
        let to = format!("{name} ({host}:{port})");
        let failed = |e: String| Error::Network { to: to.clone(), why: e };
        let expected = ServerName::try_from(name.to_owned()).map_err(|e| failed(e.to_string()))?;
        let connected = timeout(PATIENCE, async {
            let tcp = TcpStream::connect((host, port)).await?;
            tcp.set_nodelay(true)?;
            TlsConnector::from(config.clone()).connect(expected, tcp).await
        });
        let stream = connected.await.map_err(|_| failed("no answer".to_owned()))?.map_err(|e| failed(e.to_string()))?;
        let session = stream.get_ref().1;
        let binding =
            session.export_keying_material([0; 32], EXPORTER_LABEL, None).map_err(|e| failed(e.to_string()))?;
        let cert = session.peer_certificates().and_then(<[_]>::first).and_then(|c| EndEntityCert::try_from(c).ok());
        let peer_key = cert.as_ref().and_then(tls_key);
        let connection = Self::over(stream, to).await?;
        Ok(Self { binding: Some(binding), peer_key, ..connection })
    }

    /// What identifies this TLS connection to both of its ends; `None` without TLS.
    #[must_use]
    pub fn binding(&self) -> Option<&ChannelBinding> {
        self.binding.as_ref()
    }

    /// Base64 of the public key in the other end's certificate, as in [`fleet::SlotRecord`].
    #[must_use]
    pub fn peer_key(&self) -> Option<&str> {
        self.peer_key.as_deref()
    }

    /// Posts a body that `sign` signs for this connection and this path, and, for hubs of the version
    /// before, by itself; reads the whole answer, if it is no longer than `longest` bytes.
    ///
    /// # Errors
    /// The connection has no TLS, the key can't be read; as [`Self::ask`].
    pub async fn post_signed(
        &mut self,
        path: &str,
        body: &[u8],
        sign: impl Fn(&[u8]) -> Result<Vec<u8>, CertificateError>,
        longest: usize,
    ) -> Result<Bytes> {
        let unbound = || Error::Failed(format!("cannot sign a request to {}: the connection has no TLS", self.to));
        let message = bound_message(self.binding.as_ref().ok_or_else(unbound)?, "POST", path, body);
        let (bound, plain) = (encoding::encode(&sign(&message)?), encoding::encode(&sign(body)?));
        let headers = [(BOUND_SIGNATURE_HEADER, bound.as_str()), (SIGNATURE_HEADER, plain.as_str())];
        self.ask(request("POST", "hub", path, &headers, body.to_vec().into())?, longest).await
    }

    /// Connects to whoever answers at `host:port`, without TLS.
    ///
    /// # Errors
    /// Nobody answers.
    pub async fn plain(host: &str, port: u16) -> Result<Self> {
        let to = format!("{host}:{port}");
        let failed = |e: String| Error::Network { to: to.clone(), why: e };
        let connected = timeout(PATIENCE, TcpStream::connect((host, port))).await;
        let stream = connected.map_err(|_| failed("no answer".to_owned()))?.map_err(|e| failed(e.to_string()))?;
        Self::over(stream, to).await
    }

    async fn over(stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static, to: String) -> Result<Self> {
        let (sender, connection) = match handshake(TokioIo::new(stream)).await {
            Ok(made) => made,
            Err(e) => return Err(Error::Network { to, why: e.to_string() }),
        };
        // Its end is seen by whoever asks next.
        tokio::spawn(async move {
            let _ = connection.await;
        });
        Ok(Self { to, sender, binding: None, peer_key: None })
    }

    /// Sends one request; the answer's body is still to come.
    ///
    /// # Errors
    /// The connection ends, or nothing comes in time.
    pub async fn send(&mut self, request: Request<Full<Bytes>>) -> Result<Response<Incoming>> {
        let failed = |why: String| Error::Network { to: self.to.clone(), why };
        let answer = timeout(PATIENCE, async {
            self.sender.ready().await?;
            self.sender.send_request(request).await
        });
        answer.await.map_err(|_| failed("no answer".to_owned()))?.map_err(|e| failed(e.to_string()))
    }

    /// Sends a request and reads the whole answer, if it is no longer than `longest`.
    ///
    /// # Errors
    /// As above; a status other than 200, with the body's beginning.
    pub async fn ask(&mut self, request: Request<Full<Bytes>>, longest: usize) -> Result<Bytes> {
        let response = self.send(request).await?;
        let status = response.status();
        let failed = |why: String| Error::Network { to: self.to.clone(), why };
        let body = timeout(PATIENCE, Limited::new(response.into_body(), longest).collect());
        let body = body.await.map_err(|_| failed("no answer".to_owned()))?.map_err(|e| failed(e.to_string()))?;
        let body = body.to_bytes();
        if status.is_success() {
            return Ok(body);
        }
        let words: String = String::from_utf8_lossy(&body).chars().take(200).collect();
        Err(failed(format!("{status} {words}")))
    }
}

/// A request of ours. Every one of them is well formed by construction.
///
/// # Errors
/// A header that HTTP can't carry.
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
    request.body(Full::new(body)).map_err(|e| Error::Failed(format!("a request can't be made: {e}")))
}

/// Base64 of a certificate's P-256 public key; `None` for a key of another kind.
#[must_use]
pub fn tls_key(cert: &EndEntityCert) -> Option<String> {
    let spki = cert.subject_public_key_info();
    // An uncompressed P-256 point is the end of it.
    let point = spki.as_ref().get(spki.as_ref().len().checked_sub(65)?..)?;
    Some(encoding::encode(PublicKey::of(point)?.as_bytes()))
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
    let certs = certs.map_err(|e| Error::Configuration(format!("a certificate can't be read: {e}")))?;
    if certs.is_empty() {
        return Err(Error::Configuration("a certificate is missing from the ticket or the state".to_owned()));
    }
    Ok(certs)
}

fn key(pem: &str) -> Result<PrivateKeyDer<'static>> {
    PrivateKeyDer::from_pem_slice(pem.as_bytes())
        .map_err(|e| Error::Configuration(format!("this node's key can't be read: {e}")))
}

#[allow(clippy::needless_pass_by_value, reason = "it is given to map_err")]
fn tls(e: tokio_rustls::rustls::Error) -> Error {
    Error::Configuration(format!("a certificate or key is not to be used: {e}"))
}
