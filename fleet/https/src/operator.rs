//! Certificates of operators. The fleet's root signs them itself.

use std::sync::Arc;

use fleet::{OPERATOR_USAGE_DER, Operator};
use tokio_rustls::rustls::client::danger::HandshakeSignatureValid;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, TrustAnchor, UnixTime};
use tokio_rustls::rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use tokio_rustls::rustls::{DigitallySignedStruct, DistinguishedName, Error as TlsError, SignatureScheme};
use webpki::{EndEntityCert, KeyUsage, anchor_from_trusted_cert};

use crate::{Error, Result, tls_key};

/// Name, role and key of an operator whose certificate was verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OperatorCertificate {
    /// Name and role.
    pub operator: Operator,
    /// Base64 of the public key, as in [`fleet::OperatorRevocation`].
    pub key: String,
    der: CertificateDer<'static>,
}

impl OperatorCertificate {
    /// Returns the certificate, DER.
    #[must_use]
    pub fn der(&self) -> &[u8] {
        &self.der
    }
}

/// Verifies certificates of operators against the fleet's root.
#[derive(Clone, Debug)]
pub struct OperatorVerifier {
    root: TrustAnchor<'static>,
    der: CertificateDer<'static>,
}

impl OperatorVerifier {
    /// Makes a verifier from the fleet's root certificate, PEM.
    ///
    /// # Errors
    /// If the PEM is invalid.
    pub fn new(root: &str) -> Result<Self> {
        let failed = "use the fleet's root certificate";
        let der = CertificateDer::from_pem_slice(root.as_bytes()).map_err(Error::configuration(failed))?;
        let anchor = anchor_from_trusted_cert(&der).map_err(Error::configuration(failed))?;
        Ok(Self { root: anchor.to_owned(), der })
    }

    /// Returns the operator of a TLS client that presented the certificates `chain`; `None` if it is no operator.
    ///
    /// An operator's certificate has one DNS name and the key usage of operators, and the root itself signed it. The
    /// client presented no other certificate than the root's, which OpenSSL adds if it trusts the root. A hub of an
    /// earlier version has an issuer without name constraints, so a certificate with an intermediate never counts.
    #[must_use]
    pub fn operator(&self, chain: &[CertificateDer<'_>]) -> Option<OperatorCertificate> {
        let (der, further) = chain.split_first()?;
        if !self.are_root(further) {
            return None;
        }
        let cert = EndEntityCert::try_from(der).ok()?;
        let mut names = cert.valid_dns_names();
        let operator = Operator::from_dns_name(names.next()?)?;
        if names.next().is_some() || !self.is_valid(&cert) {
            return None;
        }
        Some(OperatorCertificate { operator, key: tls_key(&cert)?, der: der.clone().into_owned() })
    }

    /// Returns the operator of a certificate, DER; `None` if it is no operator's.
    #[must_use]
    pub fn certificate(&self, der: &[u8]) -> Option<OperatorCertificate> {
        self.operator(&[CertificateDer::from_slice(der)])
    }

    /// Returns whether the certificate has not expired since it was verified.
    #[must_use]
    pub fn is_current(&self, certificate: &OperatorCertificate) -> bool {
        EndEntityCert::try_from(&certificate.der).is_ok_and(|cert| self.is_valid(&cert))
    }

    /// Returns whether each of these certificates is the root's.
    fn are_root(&self, certificates: &[CertificateDer<'_>]) -> bool {
        certificates.iter().all(|der| der.as_ref() == self.der.as_ref())
    }

    fn is_valid(&self, cert: &EndEntityCert<'_>) -> bool {
        let algorithms = ring::default_provider().signature_verification_algorithms.all;
        let roots = std::slice::from_ref(&self.root);
        let usage = KeyUsage::required(OPERATOR_USAGE_DER);
        cert.verify_for_usage(algorithms, roots, &[], UnixTime::now(), usage, None, None).is_ok()
    }
}

/// Verifies the certificates of TLS clients: operators, whose certificates are valid for nothing else, and nodes.
#[derive(Debug)]
pub(crate) struct ClientVerifier {
    pub(crate) operators: OperatorVerifier,
    pub(crate) nodes: Arc<dyn ClientCertVerifier>,
}

impl ClientCertVerifier for ClientVerifier {
    fn client_auth_mandatory(&self) -> bool {
        self.nodes.client_auth_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.nodes.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        cert: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, TlsError> {
        if self.operators.are_root(intermediates) && self.operators.operator(std::slice::from_ref(cert)).is_some() {
            return Ok(ClientCertVerified::assertion());
        }
        self.nodes.verify_client_cert(cert, intermediates, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        self.nodes.verify_tls12_signature(message, cert, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        self.nodes.verify_tls13_signature(message, cert, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.nodes.supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet::{Fleet, Issuer, OperatorRole, PrivateKey, Topology, encoding};
    use std::time::{SystemTime, UNIX_EPOCH};
    use tokio_rustls::rustls::CertificateError;

    fn chain(pem: &str) -> Vec<CertificateDer<'static>> {
        CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<_, _>>().unwrap()
    }

    /// The verifier of a hub that does not know operators, and of every other service that verifies TLS clients.
    #[test]
    fn certificate_of_an_operator_is_not_one_of_a_tls_client() {
        let root = Issuer::root("acme").unwrap();
        let key = PrivateKey::generate().unwrap();
        let operator = Operator::new("anna", OperatorRole::Admin).unwrap();
        let pem = root.operator(&operator, &key.public().unwrap(), (0, 4_000_000_000)).unwrap();
        let roots = Arc::new(crate::roots(root.certificate()).unwrap());
        let nodes = crate::WebPkiClientVerifier::builder_with_provider(roots, crate::provider()).build().unwrap();
        let cert = &chain(&pem)[0];
        let e = nodes.verify_client_cert(cert, &[], UnixTime::now()).unwrap_err();
        assert!(matches!(e, TlsError::InvalidCertificate(CertificateError::InvalidPurposeContext { .. })), "{e:?}");
        let operators = OperatorVerifier::new(root.certificate()).unwrap();
        let both = ClientVerifier { operators, nodes };
        both.verify_client_cert(cert, &[], UnixTime::now()).unwrap();
        let further = CertificateDer::from(cert.to_vec());
        assert!(both.verify_client_cert(cert, &[further], UnixTime::now()).is_err(), "with an intermediate");
        both.verify_client_cert(cert, &chain(root.certificate()), UnixTime::now()).unwrap();
    }

    #[test]
    fn only_the_root_itself_makes_operators() {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let root = Issuer::root("acme").unwrap();
        let verifier = OperatorVerifier::new(root.certificate()).unwrap();
        let anna = Operator::new("anna", OperatorRole::Admin).unwrap();
        let key = PrivateKey::generate().unwrap().public().unwrap();
        let valid = (now - 60, now + 60);

        let pem = root.operator(&anna, &key, valid).unwrap();
        let read = verifier.operator(&chain(&pem)).unwrap();
        assert_eq!((&read.operator, read.key.as_str()), (&anna, encoding::encode(key.as_bytes()).as_str()));
        assert!(verifier.is_current(&read));
        // As curl with `--cacert`.
        let with_root = pem.clone() + root.certificate();
        assert_eq!(verifier.operator(&chain(&with_root)), Some(read));

        let expired = root.operator(&anna, &key, (now - 120, now - 60)).unwrap();
        let other_fleet = Issuer::root("acme").unwrap().operator(&anna, &key, valid).unwrap();
        // A hub's issuer of an earlier version has no name constraints.
        let issuer = root.issuer("acme", "hub-1").unwrap();
        let from_hub = issuer.operator(&anna, &key, valid).unwrap();
        let fleet = Fleet::parse("f", b"name = \"acme\"\n[groups]\nhub.count = 3\n").unwrap();
        let topology = Topology::from_fleet(&fleet);
        let node = issuer.node(&topology, &topology.nodes[0], &key).unwrap();
        let with_issuer = from_hub.clone() + issuer.certificate();
        let with_other_root = pem.clone() + Issuer::root("acme").unwrap().certificate();
        for (what, pem) in [
            ("an expired certificate", expired),
            ("another fleet's", other_fleet),
            ("a hub's issuer, without its certificate", from_hub),
            ("a hub's issuer", with_issuer),
            ("a second certificate", with_other_root),
            ("a node", node),
        ] {
            assert_eq!(verifier.operator(&chain(&pem)), None, "{what}");
        }
        assert_eq!(verifier.operator(&[]), None);
    }
}
