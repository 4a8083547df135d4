//! A fleet's certificate authority and passwords, on the operator's disk: readable by nobody
//! else, never in an image.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use fleet::{Membership, Node, Secrets, Tls, Topology};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;

use crate::error::{Error, Result, fail};
use crate::project::Project;

/// What signs the nodes' certificates, and what their services share.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Authority {
    fleet: String,
    cert: String,
    key: String,
    secrets: Secrets,
}

impl Authority {
    /// A new one, of fresh randomness.
    ///
    /// # Errors
    /// The machine has no randomness.
    pub fn create(topology: &Topology) -> Result<Self> {
        let key = KeyPair::generate().map_err(refused)?;
        let cert = authority_params(&topology.name).self_signed(&key).map_err(refused)?;
        let secrets = Secrets {
            postgres: password()?,
            replication: password()?,
            rewind: password()?,
            odoo: password()?,
            odoo_master: password()?,
            odoo_admin: password()?,
            metrics: password()?,
            s3_key: given("BAKEHOUSE_S3_KEY"),
            s3_secret: given("BAKEHOUSE_S3_SECRET"),
        };
        Ok(Self { fleet: topology.name.clone(), cert: cert.pem(), key: key.serialize_pem(), secrets })
    }

    /// The one of the fleet's local machines, made when it is first asked for.
    ///
    /// # Errors
    /// It can't be read or written, or is another fleet's.
    pub fn of_vms(project: &Project) -> Result<Self> {
        let path = project.dir.join("build/vm/authority.json");
        match fs::read(&path) {
            Ok(bytes) => {
                let found: Self = serde_json::from_slice(&bytes).map_err(|e| {
                    Error::Failed(format!("{} is damaged ({e}); remove build/vm and start afresh", path.display()))
                })?;
                if found.fleet == project.topology.name {
                    Ok(found)
                } else {
                    fail(format!("{} is of the fleet `{}`; remove build/vm", path.display(), found.fleet))
                }
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                let made = Self::create(&project.topology)?;
                let bytes = serde_json::to_vec(&made).map_err(|e| Error::Failed(e.to_string()))?;
                // Two machines may be started at once: the first to write wins, for both.
                if write_new(&path, &bytes)? { Ok(made) } else { Self::of_vms(project) }
            }
            Err(e) => Err(Error::io("read", &path)(e)),
        }
    }

    /// What a node is given: a certificate with its name and addresses, and the passwords.
    ///
    /// # Errors
    /// Nothing that a fleet's names could bring about.
    pub fn membership(&self, topology: &Topology, node: &Node) -> Result<Membership> {
        let authority_key = KeyPair::from_pem(&self.key).map_err(refused)?;
        let authority = authority_params(&self.fleet);
        let issuer = Issuer::from_params(&authority, &authority_key);
        let mut names = vec![node.name.clone(), node.address.to_string(), "127.0.0.1".to_owned()];
        if node.hub > 0 {
            names.push(topology.vip.to_string());
        }
        let mut params = CertificateParams::new(names).map_err(refused)?;
        params.distinguished_name = named(&node.name);
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().map_err(refused)?;
        let cert = params.signed_by(&key, &issuer).map_err(refused)?;
        Ok(Membership {
            tls: Tls { ca: self.cert.clone(), cert: cert.pem(), key: key.serialize_pem() },
            secrets: self.secrets.clone(),
        })
    }
}

fn authority_params(fleet: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = named(&format!("{fleet} fleet authority"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn named(name: &str) -> DistinguishedName {
    let mut dn = DistinguishedName::new();
    dn.push(DnType::CommonName, name);
    dn
}

/// A secret that is not ours to make.
fn given(variable: &str) -> String {
    std::env::var(variable).unwrap_or_default()
}

/// 192 bits, in letters that no configuration language minds.
fn password() -> Result<String> {
    let mut bytes = [0; 24];
    let path = Path::new("/dev/urandom");
    File::open(path).and_then(|mut f| f.read_exact(&mut bytes)).map_err(Error::io("read", path))?;
    Ok(URL_SAFE_NO_PAD.encode(bytes))
}

/// Writes a file that nobody else can read, unless there is one; says whether it did.
fn write_new(path: &Path, bytes: &[u8]) -> Result<bool> {
    match private_beside(path, bytes)?.persist_noclobber(path) {
        Ok(_) => Ok(true),
        Err(e) if e.error.kind() == std::io::ErrorKind::AlreadyExists => Ok(false),
        Err(e) => Err(Error::io("write", path)(e.error)),
    }
}

/// Writes a file that nobody else can read, whole or not at all.
pub(crate) fn write_private(path: &Path, bytes: &[u8]) -> Result<()> {
    private_beside(path, bytes)?.persist(path).map_err(|e| Error::io("write", path)(e.error))?;
    Ok(())
}

/// The bytes on the disk beside `path`, in a file that has no name of its own yet.
fn private_beside(path: &Path, bytes: &[u8]) -> Result<NamedTempFile> {
    let dir = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
    let mut file = NamedTempFile::new_in(dir).map_err(Error::io("write in", dir))?;
    file.write_all(bytes).and_then(|()| file.as_file().sync_all()).map_err(Error::io("write in", dir))?;
    Ok(file)
}

#[allow(clippy::needless_pass_by_value, reason = "it is given to map_err")]
fn refused(e: rcgen::Error) -> Error {
    Error::Failed(format!("a certificate can't be made: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn each_node_has_a_key_of_its_own_and_the_fleets_passwords() {
        let toml = b"name = \"acme\"\n[groups]\nhub.count = 3\n";
        let topology = Topology::of(&fleet::Fleet::parse("f", toml).unwrap());
        let authority = Authority::create(&topology).unwrap();
        let of = |name: &str| authority.membership(&topology, topology.node(name).unwrap()).unwrap();
        let (one, two) = (of("hub-1"), of("hub-2"));
        assert_ne!(one.tls.key, two.tls.key);
        assert_eq!((one.tls.ca, one.secrets), (two.tls.ca, two.secrets));
    }

    #[test]
    fn the_file_is_nobody_elses() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/authority.json");
        let mode = || fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        assert!(write_new(&path, b"one").unwrap());
        assert!(!write_new(&path, b"two").unwrap(), "the second takes the first's place");
        assert_eq!((fs::read(&path).unwrap(), mode()), (b"one".to_vec(), 0o600));
        write_private(&path, b"three").unwrap();
        assert_eq!(mode(), 0o600);
    }
}
