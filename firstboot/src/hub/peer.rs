//! Clients of the join API.

use fleet::{ChannelBinding, OPERATOR_SUFFIX};
use fleet_https::{OperatorCertificate, OperatorVerifier};
use tokio_rustls::rustls::pki_types::CertificateDer;
use webpki::EndEntityCert;

/// The client of a connection.
pub(super) struct Peer {
    /// What the client authenticated as.
    pub(super) client: Client,
    /// Identifies this TLS connection; the signature of a request must cover it.
    pub(super) binding: ChannelBinding,
}

/// What a client authenticated as.
pub(super) enum Client {
    /// A node of the fleet.
    Member(Member),
    /// An operator, with a certificate that the fleet's root signed.
    Operator(OperatorCertificate),
    /// A client without a certificate, or with one that neither a node nor an operator has.
    Guest,
}

/// A node that authenticated with a certificate of this fleet.
pub(super) struct Member {
    pub(super) slot: String,
    pub(super) tls_key: String,
}

impl Client {
    /// Returns the client that presented these certificates. The TLS handshake has verified that the fleet's root
    /// signed them, directly or through an issuer.
    pub(super) fn from_chain(chain: &[CertificateDer<'_>], operators: &OperatorVerifier) -> Self {
        if let Some(operator) = operators.operator(chain) {
            return Self::Operator(operator);
        }
        chain.first().and_then(Member::from_certificate).map_or(Self::Guest, Self::Member)
    }
}

impl Peer {
    pub(super) fn member(&self) -> Option<&Member> {
        match &self.client {
            Client::Member(member) => Some(member),
            Client::Operator(_) | Client::Guest => None,
        }
    }

    pub(super) fn operator(&self) -> Option<&OperatorCertificate> {
        match &self.client {
            Client::Operator(operator) => Some(operator),
            Client::Member(_) | Client::Guest => None,
        }
    }
}

impl Member {
    /// Returns the slot and the key of a certificate; `None` if one of its names is an operator's, whatever the other
    /// names are.
    fn from_certificate(cert: &CertificateDer<'_>) -> Option<Self> {
        let cert = EndEntityCert::try_from(cert).ok()?;
        let is_operators = |name: &str| name.rsplit('.').next().is_some_and(|last| last == OPERATOR_SUFFIX);
        if cert.valid_dns_names().any(is_operators) {
            return None;
        }
        let slot = cert.valid_dns_names().next()?.to_owned();
        let tls_key = fleet_https::tls_key(&cert)?;
        Some(Self { slot, tls_key })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet::{Fleet, Issuer, Operator, OperatorRole, PrivateKey, Topology, encoding};
    use tokio_rustls::rustls::pki_types::pem::PemObject as _;

    #[test]
    fn distinguishes_members_operators_and_guests() {
        let fleet = Fleet::parse("f", b"name = \"acme\"\n[groups]\nhub.count = 3\n").unwrap();
        let topology = Topology::from_fleet(&fleet);
        let key = PrivateKey::generate().unwrap().public().unwrap();
        let root = Issuer::root("acme").unwrap();
        let issuer = root.issuer("acme", "hub-1").unwrap();
        let verifier = OperatorVerifier::new(root.certificate()).unwrap();
        let client = |pem: &str| {
            let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
            Client::from_chain(&chain.unwrap(), &verifier)
        };

        let node = issuer.node(&topology, topology.node("hub-2").unwrap(), &key).unwrap();
        let Client::Member(member) = client(&node) else { panic!("a node is no member") };
        assert_eq!((member.slot.as_str(), member.tls_key), ("hub-2", encoding::encode(key.as_bytes())));

        let anna = Operator::new("anna", OperatorRole::Viewer).unwrap();
        let times = (0, 4_000_000_000);
        let Client::Operator(read) = client(&root.operator(&anna, &key, times).unwrap()) else {
            panic!("an operator is none")
        };
        assert_eq!(read.operator, anna);
        // A hub's issuer of an earlier version can sign an operator's name.
        let forged = issuer.operator(&anna, &key, times).unwrap() + issuer.certificate();
        assert!(matches!(client(&forged), Client::Guest));
        let expired = root.operator(&anna, &key, (0, 1)).unwrap();
        assert!(matches!(client(&expired), Client::Guest));
        assert!(matches!(Client::from_chain(&[], &verifier), Client::Guest));
    }
}
