//! Attacks on the join API from many addresses, by clients without a ticket or certificate of the fleet.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use fleet::{JoinRequest, PROTOCOL, SIGNATURE_HEADER, encoding};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::ClientConfig;
use tokio_rustls::rustls::pki_types::ServerName;

use crate::site::TestJoiner;

/// The hub under attack, and a counter of the attackers' connections or requests.
#[derive(Clone)]
pub struct Target {
    /// Address of the join API.
    pub at: SocketAddr,
    /// Slot of the hub.
    pub name: String,
    /// TLS settings that trust the fleet.
    pub tls: Arc<ClientConfig>,
    /// Connections or requests so far.
    pub made: Arc<AtomicU64>,
}

/// Returns the address of attacker `i`, in one of sixteen networks.
#[must_use]
pub fn source(i: usize) -> IpAddr {
    Ipv4Addr::new(127, 0, 1 + (i % 16) as u8, 1).into()
}

impl Target {
    /// # Panics
    /// If `root` is not a certificate.
    #[must_use]
    pub fn new(root: &str, at: SocketAddr, name: &str) -> Self {
        let tls = fleet_https::client(root, None).expect("a certificate");
        Self { at, name: name.to_owned(), tls, made: Arc::default() }
    }

    /// Opens a TCP connection from an address.
    ///
    /// # Errors
    /// If the hub does not accept the connection within 5 s.
    pub async fn connect(&self, from: IpAddr) -> std::io::Result<TcpStream> {
        let socket = TcpSocket::new_v4()?;
        // Several connections can then share a local port, because one address has too few of them.
        socket.set_reuseaddr(true)?;
        socket.bind(SocketAddr::new(from, 0))?;
        let stream = timeout(Duration::from_secs(5), socket.connect(self.at)).await??;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    /// Opens a TLS connection from an address.
    ///
    /// # Errors
    /// If the hub closes the connection, or the handshake takes more than 5 s.
    pub async fn handshake(&self, from: IpAddr) -> std::io::Result<TlsStream<TcpStream>> {
        let name = ServerName::try_from(self.name.clone()).expect("a slot is a DNS name");
        let tcp = self.connect(from).await?;
        timeout(Duration::from_secs(5), TlsConnector::from(self.tls.clone()).connect(name, tcp)).await?
    }

    fn count(&self) {
        self.made.fetch_add(1, Ordering::Relaxed);
    }

    /// Holds an idle connection, and opens the next one when the hub closes it.
    pub async fn idle(self, from: IpAddr) {
        loop {
            if let Ok(mut stream) = self.connect(from).await {
                self.count();
                let _ = stream.read(&mut [0; 16]).await;
            }
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// Sends a request's header at one byte a second, and starts again when the hub closes the connection.
    pub async fn slow_header(self, from: IpAddr) {
        loop {
            if let Ok(mut stream) = self.handshake(from).await {
                self.count();
                let _ = stream.write_all(b"GET /v1/peers HTTP/1.1\r\nhost: hub\r\nx: ").await;
                while stream.write_all(b"x").await.is_ok() && stream.flush().await.is_ok() {
                    sleep(Duration::from_secs(1)).await;
                }
            }
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// Sends an unfinished header of `bytes` bytes and holds the connection. Starts again when the hub closes it.
    pub async fn endless_header(self, from: IpAddr, bytes: usize) {
        loop {
            if let Ok(stream) = self.handshake(from).await {
                self.count();
                let _ = endless(stream, bytes).await;
            }
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// Begins one TLS handshake after the other. The hub computes keys and a signature for each, the attacker always
    /// sends the same bytes.
    pub async fn half_handshakes(self, from: IpAddr, hello: Arc<Vec<u8>>) {
        loop {
            match self.connect(from).await {
                Ok(mut stream) => {
                    self.count();
                    let begun = async {
                        stream.write_all(&hello).await?;
                        stream.read(&mut [0; 4096]).await
                    };
                    let _ = timeout(Duration::from_secs(5), begun).await;
                    let _ = stream.set_zero_linger();
                }
                Err(_) => sleep(Duration::from_millis(5)).await,
            }
        }
    }

    /// Returns the bytes of a TLS `ClientHello`.
    ///
    /// # Panics
    /// If TLS cannot create the message.
    #[must_use]
    pub fn hello(&self) -> Vec<u8> {
        let name = ServerName::try_from(self.name.clone()).expect("a slot is a DNS name");
        let mut client = tokio_rustls::rustls::ClientConnection::new(self.tls.clone(), name).expect("TLS");
        let mut hello = Vec::new();
        client.write_tls(&mut hello).expect("memory");
        hello
    }

    /// Sends a join request every `pause`, over connections that stay open until the hub closes them.
    pub async fn joins(self, from: IpAddr, join: Arc<Vec<u8>>, pause: Duration) {
        let mut due = Instant::now();
        loop {
            let Ok(mut stream) = self.handshake(from).await else {
                sleep(pause).await;
                continue;
            };
            loop {
                due = (due + pause).max(Instant::now().checked_sub(Duration::from_secs(1)).unwrap_or(due));
                sleep(due.saturating_duration_since(Instant::now())).await;
                self.count();
                let asked = async {
                    stream.write_all(&join).await?;
                    stream.flush().await?;
                    response(&mut stream).await
                };
                if !matches!(timeout(Duration::from_secs(5), asked).await, Ok(Ok(true))) {
                    break;
                }
            }
        }
    }
}

/// Sends an unfinished header of `bytes` bytes, and waits until the hub closes the connection. Returns the hub's reply.
///
/// # Errors
/// If the connection is reset.
pub async fn endless(mut stream: TlsStream<TcpStream>, bytes: usize) -> std::io::Result<Vec<u8>> {
    stream.write_all(b"GET /v1/peers HTTP/1.1\r\nhost: hub\r\nx: ").await?;
    for _ in 0..bytes / 4096 {
        stream.write_all(&[b'x'; 4096]).await?;
    }
    stream.flush().await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    Ok(answer)
}

/// Reads one response with a `Content-Length`. Returns whether the connection stays open.
async fn response(stream: &mut TlsStream<TcpStream>) -> std::io::Result<bool> {
    let mut answer = Vec::new();
    loop {
        if stream.read_buf(&mut answer).await? == 0 {
            return Ok(false);
        }
        let text = String::from_utf8_lossy(&answer).to_ascii_lowercase();
        let Some(end) = text.find("\r\n\r\n") else { continue };
        let length = text.split("content-length: ").nth(1).and_then(|t| t.split("\r\n").next()?.parse().ok());
        if answer.len() >= end + 4 + length.unwrap_or(0) {
            return Ok(!text.contains("connection: close"));
        }
    }
}

/// Returns the HTTP bytes of a join request with this token.
///
/// # Panics
/// If the joiner's keys cannot sign.
#[must_use]
pub fn join_request(asker: &TestJoiner) -> Vec<u8> {
    let asked = JoinRequest {
        version: PROTOCOL,
        token: asker.joiner.token.clone(),
        group: asker.group.clone(),
        image: "1".to_owned(),
        mesh_key: asker.mesh_key,
        tls_key: encoding::encode(asker.tls.public().expect("a key").as_bytes()),
    };
    let body = serde_json::to_string(&asked).expect("JSON");
    let signature = encoding::encode(&asker.joiner.key.sign(body.as_bytes()).expect("a key"));
    format!(
        "POST /v1/join HTTP/1.1\r\nhost: hub\r\n{SIGNATURE_HEADER}: {signature}\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

/// Requests the peers over a new connection from an address, with the client certificate of `target`.
///
/// # Errors
/// If the hub does not return the peers within 10 s.
pub async fn peers(target: &Target, from: IpAddr) -> std::io::Result<()> {
    let asked = async {
        let mut stream = target.handshake(from).await?;
        stream.write_all(b"GET /v1/peers HTTP/1.1\r\nhost: hub\r\nconnection: close\r\n\r\n").await?;
        stream.flush().await?;
        let mut answer = Vec::new();
        // The response counts also if the hub closes the connection without TLS's `close_notify`.
        let _ = stream.read_to_end(&mut answer).await;
        if answer.starts_with(b"HTTP/1.1 200 ") {
            return Ok(());
        }
        Err(std::io::Error::other(String::from_utf8_lossy(&answer).into_owned()))
    };
    timeout(Duration::from_secs(10), asked).await?
}
