//! The other end of a connection to the join API.

use fleet::ChannelBinding;
use tokio_rustls::rustls::pki_types::CertificateDer;
use webpki::EndEntityCert;

/// The other end of a connection.
pub(super) struct Peer {
    /// The node that it authenticated as; `None` without a client certificate.
    pub(super) member: Option<Member>,
    /// What identifies this TLS connection: a signed request has to be signed for it.
    pub(super) binding: ChannelBinding,
}

/// A node that authenticated with a certificate of this fleet.
pub(super) struct Member {
    pub(super) slot: String,
    pub(super) tls_key: String,
}

impl Member {
    /// The slot a certificate names, and the key it is for. That it is of this fleet was
    /// verified by the handshake.
    pub(super) fn of(cert: &CertificateDer) -> Option<Self> {
        let cert = EndEntityCert::try_from(cert).ok()?;
        let slot = cert.valid_dns_names().next()?.to_owned();
        let tls_key = fleet_https::tls_key(&cert)?;
        Some(Self { slot, tls_key })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        assert_eq!(member.tls_key, fleet::encoding::encode(key.public().unwrap().as_bytes()));
    }
}
