//! Clients of the join API.

use fleet::{ChannelBinding, OPERATOR_SUFFIX};
use tokio_rustls::rustls::pki_types::CertificateDer;
use webpki::EndEntityCert;

/// The client of a connection.
pub(super) struct Peer {
    /// The node that the client authenticated as; `None` without a client certificate.
    pub(super) member: Option<Member>,
    /// Identifies this TLS connection; the signature of a request must cover it.
    pub(super) binding: ChannelBinding,
}

/// A node that authenticated with a certificate of this fleet.
pub(super) struct Member {
    pub(super) slot: String,
    pub(super) tls_key: String,
}

impl Member {
    /// Returns the slot and the key of a certificate. The TLS handshake has verified that the fleet's root signed it.
    /// Returns `None` for an operator's certificate, which is no node's.
    pub(super) fn from_certificate(cert: &CertificateDer) -> Option<Self> {
        let cert = EndEntityCert::try_from(cert).ok()?;
        let slot = cert.valid_dns_names().next()?.to_owned();
        if slot.rsplit('.').next() == Some(OPERATOR_SUFFIX) {
            return None;
        }
        let tls_key = fleet_https::tls_key(&cert)?;
        Some(Self { slot, tls_key })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_slot_and_key_of_a_certificate() {
        use tokio_rustls::rustls::pki_types::pem::PemObject as _;
        let fleet = fleet::Fleet::parse("f", b"name = \"acme\"\n[groups]\nhub.count = 3\n").unwrap();
        let topology = fleet::Topology::from_fleet(&fleet);
        let key = fleet::PrivateKey::generate().unwrap();
        let issuer = fleet::Issuer::root("acme").unwrap().issuer("acme", "hub-1").unwrap();
        let pem = issuer.node(&topology, topology.node("hub-2").unwrap(), &key.public().unwrap()).unwrap();
        let member = Member::from_certificate(&CertificateDer::from_pem_slice(pem.as_bytes()).unwrap()).unwrap();
        assert_eq!(member.slot, "hub-2");
        assert_eq!(member.tls_key, fleet::encoding::encode(key.public().unwrap().as_bytes()));
    }

    #[test]
    fn operator_is_no_member() {
        use tokio_rustls::rustls::pki_types::pem::PemObject as _;
        let fleet = fleet::Fleet::parse("f", b"name = \"acme\"\n[groups]\nhub.count = 3\n").unwrap();
        let topology = fleet::Topology::from_fleet(&fleet);
        let key = fleet::PrivateKey::generate().unwrap().public().unwrap();
        let root = fleet::Issuer::root("acme").unwrap();
        for (name, is_member) in [("anna.admin.operator", false), ("operator", false), ("operator-1", true)] {
            let node = fleet::Node { name: name.to_owned(), ..topology.nodes[0].clone() };
            let pem = root.node(&topology, &node, &key).unwrap();
            let cert = CertificateDer::from_pem_slice(pem.as_bytes()).unwrap();
            assert_eq!(Member::from_certificate(&cert).is_some(), is_member, "{name}");
        }
    }
}
