//! The API of an evicted hub that keeps its certificate, its key and its address, and returns false replies.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use fleet::{MeshKey, Peers};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

use super::members::Captured;
use super::{Arena, Finding, Foothold};

/// A key that no machine has.
pub(super) const FALSE_KEY: MeshKey = MeshKey([0x42; 32]);

/// The evicted hub's server. Dropping it ends the server.
pub struct RogueHub {
    stop: Arc<AtomicBool>,
    captured: Arc<Mutex<Vec<Captured>>>,
    asked: Arc<Mutex<Vec<String>>>,
    thread: Option<JoinHandle<()>>,
}

impl RogueHub {
    /// Serves on all addresses of the machine, with its old certificate. The replies claim that another machine has the
    /// client's slot, and that the other hubs have other keys. The server records join requests.
    ///
    /// # Panics
    /// If the port is in use.
    #[must_use]
    pub fn serve(arena: &Arena, from: &Arc<Foothold>) -> Self {
        let mut rogue = Self { stop: Arc::default(), captured: Arc::default(), asked: Arc::default(), thread: None };
        let keys = ["hub-1", "hub-2", "monitor-1"].map(|slot| (slot.to_owned(), FALSE_KEY)).into();
        let hubs = [("hub-1".to_owned(), FALSE_KEY.to_string())].into();
        let lie = Peers {
            keys,
            hubs,
            epoch: 99,
            fenced: Some(99_999),
            leaving: false,
            vacant: ["hub-1".to_owned()].into(),
            evicted: Vec::new(),
            revoked_operators: Vec::new(),
        };
        let lie = serde_json::to_string(&lie).expect("JSON");
        let own = from.own();
        let identity = fleet_https::Identity { cert: &own.cert, key: &own.key };
        let tls = TlsAcceptor::from(fleet_https::server(&from.root, identity).expect("a certificate"));
        let (stop, captured, asked) = (rogue.stop.clone(), rogue.captured.clone(), rogue.asked.clone());
        let (port, from) = (arena.topology.mesh.port, from.clone());
        let serve = move || {
            from.enter();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async {
                let listener = TcpListener::bind(("0.0.0.0", port)).await.expect("the agent's port is free");
                while !stop.load(Ordering::Relaxed) {
                    let Ok(Ok((tcp, _))) = timeout(Duration::from_millis(200), listener.accept()).await else {
                        continue;
                    };
                    let (tls, captured, asked, lie) = (tls.clone(), captured.clone(), asked.clone(), lie.clone());
                    // A failed connection is a failed attack.
                    tokio::spawn(async move { answer(tcp, tls, &captured, &asked, &lie).await });
                }
            });
        };
        rogue.thread = Some(thread::spawn(serve));
        rogue
    }

    /// Returns the join requests so far.
    #[must_use]
    pub fn captured(&self) -> Vec<Captured> {
        self.captured.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns paths and source addresses of the requests so far.
    #[must_use]
    pub fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for RogueHub {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Returns the nodes that stopped or stored the false key, or `None` if the false replies had no effect.
#[must_use]
pub fn rogue_effect(arena: &Arena, from: &Foothold) -> Option<Finding> {
    let others = arena.machines.iter().filter(|(name, _)| from.node.as_ref().is_none_or(|n| n.name != **name));
    let harm = others.filter_map(|(name, machine)| {
        let agent = machine.exec("systemctl is-active firstboot").output;
        if agent.trim() != "active" {
            return Some(format!("{name} stopped ({})", agent.trim()));
        }
        let key = machine.exec(&format!("grep -qF '{FALSE_KEY}' /var/lib/bakehouse/neighbours.json"));
        (key.status == 0).then(|| format!("{name} stored the false key"))
    });
    let harm: Vec<String> = harm.collect();
    (!harm.is_empty()).then(|| Finding::yes(format!("false replies on its old endpoint: {}", harm.join(", "))))
}

async fn answer(
    tcp: TcpStream,
    tls: TlsAcceptor,
    captured: &Mutex<Vec<Captured>>,
    asked: &Mutex<Vec<String>>,
    lie: &str,
) -> std::io::Result<()> {
    let peer = tcp.peer_addr()?.ip();
    let mut stream = BufReader::new(tls.accept(tcp).await?);
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line).await? == 0 {
            return Ok(());
        }
        let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
        asked.lock().unwrap_or_else(PoisonError::into_inner).push(format!("{path} from {peer}"));
        let mut headers = Vec::new();
        loop {
            line.clear();
            stream.read_line(&mut line).await?;
            let Some((name, value)) = line.trim().split_once(": ") else { break };
            headers.push((name.to_lowercase(), value.to_owned()));
        }
        let length = headers.iter().find(|(name, _)| name == "content-length").and_then(|(_, v)| v.parse().ok());
        let mut body = vec![0; length.unwrap_or(0)];
        stream.read_exact(&mut body).await?;
        headers.retain(|(name, _)| name.starts_with("bakehouse-"));
        if path == "/v1/join" {
            captured.lock().unwrap_or_else(PoisonError::into_inner).push(Captured { headers, body });
        }
        let (status, text) = match path.as_str() {
            "/v1/peers" | "/v1/introduce" => ("200 OK", lie),
            _ => ("503 Service Unavailable", "later"),
        };
        let head =
            format!("HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n", text.len());
        stream.write_all(format!("{head}{text}").as_bytes()).await?;
        stream.flush().await?;
    }
}
