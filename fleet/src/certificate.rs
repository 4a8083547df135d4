//! Certificates of the fleet (X.509, RFC 5280). The root signs an issuer for each hub, and issuers sign nodes. All keys
//! are P-256, because users may import the root into browsers, which do not support Ed25519.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};

use rcgen::{
    BasicConstraints, CertificateParams, CidrSubnet, DistinguishedName, DnType, ExtendedKeyUsagePurpose,
    GeneralSubtree, IsCa, KeyPair, KeyUsagePurpose, NameConstraints, PKCS_ECDSA_P256_SHA256, PublicKeyData,
    SignatureAlgorithm, SigningKey as _,
};
use serde::{Deserialize, Serialize};

use crate::encoding;
use crate::operator::Operator;
use crate::topology::{Node, Topology};

/// Suffix of the DNS names in operators' certificates (`NAME.ROLE.operator`). No hub's issuer may sign such a name.
pub const OPERATOR_SUFFIX: &str = "operator";
/// Extended key usage of operators' certificates, instead of `clientAuth`. Programs that do not know it refuse such a
/// certificate: etcd, Patroni, and the hubs of versions that take every client with a certificate for a node. The arc
/// 2.25 of ITU-T X.667 needs no registration.
const OPERATOR_USAGE: [u64; 3] = [2, 25, 4_453_292_287_117_045_358];
/// Content of the DER of [`OPERATOR_USAGE`].
pub const OPERATOR_USAGE_DER: &[u8] = &[0x69, 0xbd, 0xe6, 0xd1, 0xb7, 0xd9, 0xb4, 0xe4, 0xdc, 0x6e];

/// A key that cannot be read, or names that a certificate cannot have.
#[derive(Debug, thiserror::Error)]
#[error("cannot make a certificate: {0}")]
pub struct CertificateError(#[from] rcgen::Error);

/// A certificate authority: the fleet's root, or an issuer that the root signed.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Issuer {
    /// Common name.
    name: String,
    /// PEM.
    cert: String,
    key: String,
    /// Intermediate certificates that a node presents in addition to its own; empty for the root.
    chain: String,
}

impl Issuer {
    /// Makes a fleet's root.
    ///
    /// # Errors
    /// If the kernel returns no random bytes.
    pub fn root(fleet: &str) -> Result<Self, CertificateError> {
        let key = KeyPair::generate()?;
        let name = root_name(fleet);
        let cert = authority(&name, 1).self_signed(&key)?.pem();
        Ok(Self { name, cert, key: key.serialize_pem(), chain: String::new() })
    }

    /// Makes an issuer without name constraints. Earlier versions put it into tickets; new tickets have a
    /// [`Self::founder_issuer`].
    ///
    /// # Errors
    /// If the root's key cannot be read.
    pub fn issuer(&self, fleet: &str, slot: &str) -> Result<Self, CertificateError> {
        self.intermediate(fleet, slot, None)
    }

    /// Makes an issuer for one founder. X.509 name constraints (RFC 5280 § 4.2.1.10) limit the certificates that
    /// verifiers accept from it. A hub's issuer signs no other hub of `topology` and no operator. The issuer of a voter
    /// that is not a hub signs only that node.
    ///
    /// # Errors
    /// If the root's key cannot be read.
    pub fn founder_issuer(&self, topology: &Topology, node: &Node) -> Result<Self, CertificateError> {
        let dns = |name: &str| GeneralSubtree::DnsName(name.to_owned());
        let ip = |address: Ipv4Addr| GeneralSubtree::IpAddress(CidrSubnet::from_addr_prefix(IpAddr::V4(address), 32));
        let constraints = if node.hub > 0 {
            let others: Vec<&Node> = topology.hubs.iter().filter(|hub| hub.name != node.name).collect();
            let names = others.iter().map(|hub| dns(&hub.name)).chain([dns(OPERATOR_SUFFIX)]);
            let excluded = names.chain(others.iter().map(|hub| ip(hub.address))).collect();
            NameConstraints { permitted_subtrees: Vec::new(), excluded_subtrees: excluded }
        } else {
            let own = vec![dns(&node.name), ip(node.address), ip(Ipv4Addr::LOCALHOST)];
            NameConstraints { permitted_subtrees: own, excluded_subtrees: Vec::new() }
        };
        self.intermediate(&topology.name, &node.name, Some(constraints))
    }

    fn intermediate(
        &self,
        fleet: &str,
        slot: &str,
        constraints: Option<NameConstraints>,
    ) -> Result<Self, CertificateError> {
        let key = KeyPair::generate()?;
        let name = format!("{fleet} issuer {slot}");
        let mut params = authority(&name, 0);
        params.name_constraints = constraints;
        let cert = self.sign_certificate(&params, &key)?;
        Ok(Self { name, chain: cert.clone(), cert, key: key.serialize_pem() })
    }

    /// Makes a node's certificate for its public key. Returns it with the intermediate certificates, PEM.
    ///
    /// # Errors
    /// If the issuer's key cannot be read.
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

    /// Makes an operator's certificate for their public key, PEM. Nodes accept it only if this is the fleet's root.
    /// `begins` and `expires` are seconds since 1970. The common name is the DNS name, so that no operator has the
    /// common name of a node or of a user of a service.
    ///
    /// # Errors
    /// If the issuer's key cannot be read, or a time is after the year 9999.
    pub fn operator(
        &self,
        operator: &Operator,
        key: &PublicKey,
        (begins, expires): (u64, u64),
    ) -> Result<String, CertificateError> {
        let time = |seconds: u64| {
            let seconds = i64::try_from(seconds).unwrap_or(i64::MAX);
            time::OffsetDateTime::from_unix_timestamp(seconds).map_err(|_| rcgen::Error::Time)
        };
        let mut params = CertificateParams::new([operator.dns_name()])?;
        params.distinguished_name = named(&operator.dns_name());
        (params.not_before, params.not_after) = (time(begins)?, time(expires)?);
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::Other(OPERATOR_USAGE.to_vec())];
        self.sign_certificate(&params, key)
    }

    /// Signs a message with the key: ECDSA P-256 with SHA-256, ASN.1.
    ///
    /// # Errors
    /// If the key cannot be read.
    pub fn sign(&self, message: &[u8]) -> Result<Vec<u8>, CertificateError> {
        Ok(KeyPair::from_pem(&self.key)?.sign(message)?)
    }

    /// Returns the private key, PEM. Callers derive other secrets of the owner from it.
    #[must_use]
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Returns the certificate, PEM.
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
    /// Accepts 65 bytes in the format of a point. Whether the point is on the curve is checked when the key is used.
    #[must_use]
    pub fn from_point(point: &[u8]) -> Option<Self> {
        (point.len() == 65 && point[0] == 4).then(|| Self(point.to_vec()))
    }

    /// Returns the point's 65 bytes.
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

/// A P-256 private key. It never leaves the machine that made it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrivateKey(String);

impl PrivateKey {
    /// Makes a new key.
    ///
    /// # Errors
    /// If the kernel returns no random bytes.
    pub fn generate() -> Result<Self, CertificateError> {
        Ok(Self(KeyPair::generate()?.serialize_pem()))
    }

    /// Reads a key, PEM.
    ///
    /// # Errors
    /// If the key cannot be read.
    pub fn from_pem(pem: String) -> Result<Self, CertificateError> {
        KeyPair::from_pem(&pem)?;
        Ok(Self(pem))
    }

    /// Returns the public key.
    ///
    /// # Errors
    /// If the key cannot be read.
    pub fn public(&self) -> Result<PublicKey, CertificateError> {
        Ok(PublicKey(KeyPair::from_pem(&self.0)?.public_key_raw().to_vec()))
    }

    /// Signs a message: ECDSA P-256 with SHA-256, ASN.1.
    ///
    /// # Errors
    /// If the key cannot be read.
    pub fn sign(&self, message: &[u8]) -> Result<Vec<u8>, CertificateError> {
        Ok(KeyPair::from_pem(&self.0)?.sign(message)?)
    }

    /// Makes a request (PKCS #10, DER) for a certificate with a DNS name and this key.
    ///
    /// # Errors
    /// If the key cannot be read, or the name is not one of DNS.
    pub fn request(&self, name: &str) -> Result<Vec<u8>, CertificateError> {
        let mut params = CertificateParams::new([name.to_owned()])?;
        // Authorities take the name from the extension.
        params.distinguished_name = DistinguishedName::new();
        Ok(params.serialize_request(&KeyPair::from_pem(&self.0)?)?.der().to_vec())
    }

    /// Returns the key, PEM.
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

/// Makes the trust anchor for clients of etcd, PEM: subject and public key of the fleet's root, with name constraints
/// that permit the hubs, the database nodes and `own`, a member whose gateway connects to itself. Go applies the
/// constraints of a trust anchor, and does not verify the anchor's signature.
///
/// etcd's option `allowed-hostname` cannot be used instead, because it makes a member refuse its own JSON gateway.
///
/// # Errors
/// If `root` is not the root certificate of this fleet, or the kernel returns no random bytes.
pub fn etcd_client_anchor(root: &str, topology: &Topology, own: &Node) -> Result<String, CertificateError> {
    let name = root_name(&topology.name);
    let key = root_key(root, &name).ok_or(rcgen::Error::CouldNotParseCertificate)?;
    let clients = topology.nodes.iter().filter(|n| n.hub > 0 || n.has_role("db") || n.name == own.name);
    let permitted = clients.map(|n| GeneralSubtree::DnsName(n.name.clone())).collect();
    let mut params = authority(&name, 1);
    params.name_constraints = Some(NameConstraints { permitted_subtrees: permitted, excluded_subtrees: Vec::new() });
    params.use_authority_key_identifier_extension = false;
    let signer = rcgen::Issuer::from_params(&params, KeyPair::generate()?);
    Ok(params.signed_by(&key, &signer)?.pem())
}

/// Returns the public key of a root certificate, if its subject is `name` and the key is P-256.
fn root_key(pem: &str, name: &str) -> Option<PublicKey> {
    /// DER prefix of every P-256 public key in a certificate.
    const P256: [u8; 26] = [
        0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86, 0x48,
        0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
    ];
    let text: String = pem.lines().filter(|line| !line.starts_with("-----")).map(str::trim).collect();
    let der = encoding::decode(&text)?;
    der.windows(name.len()).position(|window| window == name.as_bytes())?;
    let begins = der.windows(P256.len()).position(|window| window == P256)? + P256.len();
    PublicKey::from_point(der.get(begins..begins + 65)?)
}

fn root_name(fleet: &str) -> String {
    format!("{fleet} fleet root")
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
    fn debug_shows_no_key() {
        let root = Issuer::root("acme").unwrap();
        let key = PrivateKey::generate().unwrap();
        assert_eq!(format!("{root:?} {key:?}"), "Issuer(acme fleet root) PrivateKey(…)");
    }

    #[test]
    fn chain_has_the_issuer_and_not_the_root() {
        let fleet = crate::Fleet::parse("f", b"name = \"acme\"\n[groups]\nhub.count = 3\n").unwrap();
        let topology = Topology::from_fleet(&fleet);
        let root = Issuer::root("acme").unwrap();
        let issuer = root.issuer("acme", "hub-1").unwrap();
        let public = PrivateKey::generate().unwrap().public().unwrap();
        let chain = issuer.node(&topology, topology.node("hub-1").unwrap(), &public).unwrap();
        assert_eq!(chain.matches("BEGIN CERTIFICATE").count(), 2);
        assert!(chain.ends_with(issuer.certificate()));
        assert!(!chain.contains(root.certificate()));
    }

    #[test]
    fn certificate_of_an_operator_has_its_own_usage_and_common_name() {
        let root = Issuer::root("acme").unwrap();
        let operator = Operator::new("hub-1", crate::OperatorRole::Viewer).unwrap();
        let public = PrivateKey::generate().unwrap().public().unwrap();
        let pem = root.operator(&operator, &public, (0, 4_000_000_000)).unwrap();
        let text: String = pem.lines().filter(|line| !line.starts_with("-----")).collect();
        let der = encoding::decode(&text).unwrap();
        let count = |part: &[u8]| der.windows(part.len()).filter(|window| *window == part).count();
        // id-kp-clientAuth, RFC 5280 § 4.2.1.12.
        assert_eq!(count(&[0x2b, 6, 1, 5, 5, 7, 3, 2]), 0);
        assert_eq!(count(&[&[0x06, OPERATOR_USAGE_DER.len() as u8], OPERATOR_USAGE_DER].concat()), 1);
        assert_eq!((count(b"hub-1.viewer.operator"), count(b"hub-1")), (2, 2), "subject and DNS name");
    }

    #[test]
    fn etcd_anchor_has_the_roots_key() {
        let fleet = crate::Fleet::parse("f", b"name = \"acme\"\n[groups]\nhub.count = 3\n").unwrap();
        let topology = Topology::from_fleet(&fleet);
        let root = Issuer::root("acme").unwrap();
        let anchor = etcd_client_anchor(root.certificate(), &topology, &topology.nodes[0]).unwrap();
        let key = KeyPair::from_pem(root.key()).unwrap();
        assert_eq!(root_key(&anchor, "acme fleet root").unwrap().as_bytes(), key.public_key_raw());
        let other = Issuer::root("other").unwrap();
        assert!(etcd_client_anchor(other.certificate(), &topology, &topology.nodes[0]).is_err());
    }

    #[test]
    fn public_key_rejects_other_formats() {
        let public = PrivateKey::generate().unwrap().public().unwrap();
        assert_eq!(PublicKey::from_point(public.as_bytes()), Some(public));
        assert_eq!(PublicKey::from_point(&[4; 64]), None);
        assert_eq!(PublicKey::from_point(&[2; 65]), None);
    }
}
