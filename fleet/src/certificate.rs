//! The fleet's X.509: its root signs an issuer for each hub, issuers sign nodes. P-256
//! throughout, because browsers, which may be told to trust the root, know no Ed25519.

use std::fmt;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SignatureAlgorithm, SigningKey as _,
};
use serde::{Deserialize, Serialize};

use crate::topology::{Node, Topology};

/// A key that can't be read, or names that no certificate can hold.
#[derive(Debug, thiserror::Error)]
#[error("a certificate can't be made: {0}")]
pub struct CertificateError(#[from] rcgen::Error);

/// Something that signs certificates: the fleet's root, or an issuer that the root has signed.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Issuer {
    /// Common name.
    name: String,
    /// PEM.
    cert: String,
    key: String,
    /// Certificates that a node has to show beside its own: none for the root.
    chain: String,
}

impl Issuer {
    /// A fleet's new root.
    ///
    /// # Errors
    /// No randomness.
    pub fn root(fleet: &str) -> Result<Self, CertificateError> {
        let key = KeyPair::generate()?;
        let name = format!("{fleet} fleet root");
        let cert = authority(&name, 1).self_signed(&key)?.pem();
        Ok(Self { name, cert, key: key.serialize_pem(), chain: String::new() })
    }

    /// An issuer for one hub, signed by this root.
    ///
    /// # Errors
    /// This root's key can't be read.
    pub fn issuer(&self, fleet: &str, slot: &str) -> Result<Self, CertificateError> {
        let key = KeyPair::generate()?;
        let name = format!("{fleet} issuer {slot}");
        let cert = self.sign_certificate(&authority(&name, 0), &key)?;
        Ok(Self { name, chain: cert.clone(), cert, key: key.serialize_pem() })
    }

    /// A node's certificate for its own key, and what it has to show with it. PEM.
    ///
    /// # Errors
    /// This issuer's key can't be read.
    pub fn node(&self, topology: &Topology, node: &Node, key: &PublicKey) -> Result<String, CertificateError> {
        let mut names = vec![node.name.clone(), node.address.to_string(), "127.0.0.1".to_owned()];
        if node.hub > 0 {
            names.push(topology.vip.to_string());
        }
        let mut params = CertificateParams::new(names)?;
        params.distinguished_name = named(&node.name);
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        Ok(self.sign_certificate(&params, key)? + &self.chain)
    }

    /// Signs anything with this key: ECDSA P-256 with SHA-256, ASN.1.
    ///
    /// # Errors
    /// This issuer's key can't be read.
    pub fn sign(&self, message: &[u8]) -> Result<Vec<u8>, CertificateError> {
        Ok(KeyPair::from_pem(&self.key)?.sign(message)?)
    }

    /// Its private key, PEM: what other secrets of its owner are derived from.
    #[must_use]
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Its own certificate, PEM.
    #[must_use]
    pub fn certificate(&self) -> &str {
        &self.cert
    }

    fn sign_certificate(
        &self,
        params: &CertificateParams,
        key: &impl PublicKeyData,
    ) -> Result<String, CertificateError> {
        let own = authority(&self.name, 0);
        let issuer = rcgen::Issuer::from_params(&own, KeyPair::from_pem(&self.key)?);
        Ok(params.signed_by(key, &issuer)?.pem())
    }
}

impl fmt::Debug for Issuer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Issuer({})", self.name)
    }
}

/// A P-256 public key, as an uncompressed point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublicKey(Vec<u8>);

impl PublicKey {
    /// Takes 65 bytes that look like a point; whether it is on the curve is seen when it is used.
    #[must_use]
    pub fn of(point: &[u8]) -> Option<Self> {
        (point.len() == 65 && point[0] == 4).then(|| Self(point.to_vec()))
    }

    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl PublicKeyData for PublicKey {
    fn der_bytes(&self) -> &[u8] {
        &self.0
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &PKCS_ECDSA_P256_SHA256
    }
}

/// A private key that never leaves the machine that made it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrivateKey(String);

impl PrivateKey {
    /// # Errors
    /// No randomness.
    pub fn generate() -> Result<Self, CertificateError> {
        Ok(Self(KeyPair::generate()?.serialize_pem()))
    }

    /// # Errors
    /// The key can't be read.
    pub fn public(&self) -> Result<PublicKey, CertificateError> {
        Ok(PublicKey(KeyPair::from_pem(&self.0)?.public_key_raw().to_vec()))
    }

    /// ECDSA P-256 with SHA-256, ASN.1.
    ///
    /// # Errors
    /// The key can't be read.
    pub fn sign(&self, message: &[u8]) -> Result<Vec<u8>, CertificateError> {
        Ok(KeyPair::from_pem(&self.0)?.sign(message)?)
    }

    #[must_use]
    pub fn pem(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateKey(…)")
    }
}

fn authority(name: &str, below: u8) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = named(name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(below));
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
    params
}

fn named(name: &str) -> DistinguishedName {
    let mut dn = DistinguishedName::new();
    dn.push(DnType::CommonName, name);
    dn
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_shows_nothing_of_itself() {
        let root = Issuer::root("acme").unwrap();
        let key = PrivateKey::generate().unwrap();
        assert_eq!(format!("{root:?} {key:?}"), "Issuer(acme fleet root) PrivateKey(…)");
    }

    #[test]
    fn a_node_shows_its_issuer_and_not_the_root() {
        let fleet = crate::Fleet::parse("f", b"name = \"acme\"\n[groups]\nhub.count = 3\n").unwrap();
        let topology = Topology::of(&fleet);
        let root = Issuer::root("acme").unwrap();
        let issuer = root.issuer("acme", "hub-1").unwrap();
        let public = PrivateKey::generate().unwrap().public().unwrap();
        let chain = issuer.node(&topology, topology.node("hub-1").unwrap(), &public).unwrap();
        assert_eq!(chain.matches("BEGIN CERTIFICATE").count(), 2);
        assert!(chain.ends_with(issuer.certificate()));
        assert!(!chain.contains(root.certificate()));
    }

    #[test]
    fn points_have_a_form() {
        let public = PrivateKey::generate().unwrap().public().unwrap();
        assert_eq!(PublicKey::of(public.as_bytes()), Some(public));
        assert_eq!(PublicKey::of(&[4; 64]), None);
        assert_eq!(PublicKey::of(&[2; 65]), None);
    }
}
