//! A compromised hub: it has a hub's certificate and issuer, records every request, and returns forged replies.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use fleet::{Issuer, PrivateKey, Topology};
use fleet_https::Identity;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

/// A recorded request.
#[derive(Clone, Debug)]
pub struct Captured {
    /// Request line and headers.
    pub head: String,
    /// The body, as the client sent it.
    pub body: Vec<u8>,
}

impl Captured {
    /// Returns a header's value.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<String> {
        let of = |line: &str| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then(|| value.trim().to_owned())
        };
        self.head.lines().find_map(of)
    }

    /// Returns method and path.
    #[must_use]
    pub fn target(&self) -> (String, String) {
        let mut words = self.head.split(' ');
        (words.next().unwrap_or_default().to_owned(), words.next().unwrap_or_default().to_owned())
    }
}

/// The compromised hub. Dropping it ends its server.
pub struct RogueHub {
    /// All requests so far.
    pub requests: Arc<Mutex<Vec<Captured>>>,
    task: tokio::task::JoinHandle<()>,
}

impl RogueHub {
    /// Listens at `at` as `slot`, with a certificate for `key` from the slot's own issuer. `answer` returns the reply
    /// to each request.
    pub async fn start(
        topology: &Topology,
        root: &Issuer,
        (slot, key): (&str, &PrivateKey),
        at: SocketAddr,
        answer: impl Fn(&Captured) -> Vec<u8> + Send + Sync + 'static,
    ) -> Self {
        let issuer = root.issuer(&topology.name, slot).expect("a root");
        let node = topology.node(slot).expect("a node");
        let cert = issuer.node(topology, node, &key.public().expect("a key")).expect("an issuer");
        let tls =
            fleet_https::server(root.certificate(), Identity { cert: &cert, key: key.pem() }).expect("a certificate");
        let acceptor = TlsAcceptor::from(tls);
        let listener = TcpListener::bind(at).await.expect("the port is free");
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (kept, answer) = (requests.clone(), Arc::new(answer));
        let task = tokio::spawn(async move {
            loop {
                let Ok((tcp, _)) = listener.accept().await else { continue };
                let (acceptor, kept, answer) = (acceptor.clone(), kept.clone(), answer.clone());
                tokio::spawn(async move {
                    let Ok(mut stream) = acceptor.accept(tcp).await else { return };
                    let Some(request) = read(&mut stream).await else { return };
                    let body = answer(&request);
                    kept.lock().expect("not poisoned").push(request);
                    let head =
                        format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", body.len());
                    let _ = stream.write_all(&[head.as_bytes(), &body].concat()).await;
                    let _ = stream.shutdown().await;
                });
            }
        });
        Self { requests, task }
    }

    /// Returns the requests so far.
    #[must_use]
    pub fn captured(&self) -> Vec<Captured> {
        self.requests.lock().expect("not poisoned").clone()
    }
}

impl Drop for RogueHub {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn read(stream: &mut (impl tokio::io::AsyncRead + Unpin)) -> Option<Captured> {
    let mut bytes = Vec::new();
    loop {
        let mut part = [0; 4096];
        let count = stream.read(&mut part).await.ok().filter(|n| *n > 0)?;
        bytes.extend_from_slice(&part[..count]);
        let Some(end) = bytes.windows(4).position(|w| w == b"\r\n\r\n") else { continue };
        let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
        let captured = Captured { head, body: bytes[end + 4..].to_vec() };
        let length = captured.header("content-length").and_then(|n| n.parse().ok()).unwrap_or(0);
        if captured.body.len() >= length {
            return Some(captured);
        }
    }
}
