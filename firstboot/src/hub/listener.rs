//! The join API's connections: HTTPS on the hub's public endpoint, beside WireGuard's own port.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use fleet::{PublicKey, encoding};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::pki_types::CertificateDer;
use webpki::EndEntityCert;

use super::api::{Hub, answer};
use crate::error::{Error, Result};

/// Open connections, in all and from one address (a whole site may be behind one).
const CONNECTIONS: usize = 1024;
const CONNECTIONS_OF_ONE: usize = 128;
/// Total time a connection may take, so that slow clients cannot exhaust the pool.
const PATIENCE: Duration = Duration::from_secs(20);

/// The other end of a connection.
pub(super) struct Peer {
    /// The node that it authenticated as; `None` without a client certificate.
    pub(super) member: Option<Member>,
}

/// A node that authenticated with a certificate of this fleet.
pub(super) struct Member {
    pub(super) slot: String,
    pub(super) tls_key: String,
}

/// Serves the API until the process ends.
///
/// # Errors
/// The port is in use.
pub async fn serve(hub: Arc<Hub>, at: SocketAddr, tls: Arc<ServerConfig>) -> Result<()> {
    let listener = TcpListener::bind(at).await.map_err(Error::io("listen at", at.to_string()))?;
    let acceptor = TlsAcceptor::from(tls);
    let (places, guests) = (Arc::new(Semaphore::new(CONNECTIONS)), Arc::new(Guests::default()));
    loop {
        let place = places.clone().acquire_owned().await.map_err(|e| Error::Failed(e.to_string()))?;
        // Out of file descriptors, or the guest has left already: that passes.
        let Ok((tcp, from)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let Some(guest) = Guests::enter(&guests, from.ip()) else { continue };
        let (hub, acceptor) = (hub.clone(), acceptor.clone());
        tokio::spawn(async move {
            let _ = timeout(PATIENCE, connection(hub, tcp, acceptor)).await;
            drop((place, guest));
        });
    }
}

async fn connection(hub: Arc<Hub>, tcp: TcpStream, acceptor: TlsAcceptor) {
    let _ = tcp.set_nodelay(true);
    // Scanners and broken clients: nothing to tell anybody.
    let Ok(stream) = acceptor.accept(tcp).await else { return };
    let certs = stream.get_ref().1.peer_certificates();
    let peer = Arc::new(Peer { member: certs.and_then(<[_]>::first).and_then(Member::of) });
    let service = service_fn(move |request| {
        let (hub, peer) = (hub.clone(), peer.clone());
        async move { Ok::<_, std::convert::Infallible>(answer(&hub, &peer, request).await) }
    });
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(PATIENCE).max_headers(32);
    let _ = http.serve_connection(TokioIo::new(stream), service).await;
}

impl Member {
    /// The slot a certificate names, and the key it is for. That it is of this fleet was
    /// verified by the handshake.
    fn of(cert: &CertificateDer) -> Option<Self> {
        let cert = EndEntityCert::try_from(cert).ok()?;
        let slot = cert.valid_dns_names().next()?.to_owned();
        let spki = cert.subject_public_key_info();
        // An uncompressed P-256 point is the end of it.
        let point = spki.as_ref().get(spki.as_ref().len().checked_sub(65)?..)?;
        Some(Self { slot, tls_key: encoding::encode(PublicKey::of(point)?.as_bytes()) })
    }
}

/// How many connections each address has.
#[derive(Default)]
struct Guests(Mutex<BTreeMap<IpAddr, usize>>);

struct Guest {
    guests: Arc<Guests>,
    from: IpAddr,
}

impl Guests {
    fn enter(guests: &Arc<Self>, from: IpAddr) -> Option<Guest> {
        let mut all = guests.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = all.entry(from).or_default();
        if *count >= CONNECTIONS_OF_ONE {
            return None;
        }
        *count += 1;
        Some(Guest { guests: guests.clone(), from })
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let mut all = self.guests.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = all.get_mut(&self.from) {
            *count -= 1;
            if *count == 0 {
                all.remove(&self.from);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_does_not_take_every_place() {
        let guests = Arc::new(Guests::default());
        let (one, two) = ("192.0.2.1".parse().unwrap(), "192.0.2.2".parse().unwrap());
        let inside: Vec<_> = std::iter::repeat_with(|| Guests::enter(&guests, one)).take(CONNECTIONS_OF_ONE).collect();
        assert!(inside.iter().all(Option::is_some));
        assert!(Guests::enter(&guests, one).is_none());
        assert!(Guests::enter(&guests, two).is_some());
        drop(inside);
        assert!(guests.0.lock().unwrap().is_empty());
    }

    #[test]
    fn a_member_is_who_its_certificate_names() {
        use tokio_rustls::rustls::pki_types::pem::PemObject as _;
        let fleet = fleet::Fleet::parse("f", b"name = \"acme\"\n[groups]\nhub.count = 3\n").unwrap();
        let topology = fleet::Topology::of(&fleet);
        let key = fleet::PrivateKey::generate().unwrap();
        let issuer = fleet::Issuer::root("acme").unwrap().issuer("acme", "hub-1").unwrap();
        let pem = issuer.node(&topology, topology.node("hub-2").unwrap(), &key.public().unwrap()).unwrap();
        let member = Member::of(&CertificateDer::from_pem_slice(pem.as_bytes()).unwrap()).unwrap();
        assert_eq!(member.slot, "hub-2");
        assert_eq!(member.tls_key, encoding::encode(key.public().unwrap().as_bytes()));
    }
}
