//! The fleet key: the root certificate's private key and the services' passwords. The operator keeps it in a file that
//! only the operator can read. It is never part of an image.

use std::fs;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use fleet::{Issuer, Membership, Node, PrivateKey, Secrets, Tls, Topology, etcd_client_anchor};
use ring::hkdf::{HKDF_SHA256, Salt};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result, fail};
use crate::keys::passphrase;
use crate::keys::update_key::UpdateKey;
use crate::project::Project;
use crate::util::fs::{write_new, write_private};
use crate::util::random::random;

/// The content of `fleet.key`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FleetKey {
    fleet: String,
    /// The fleet's root: its certificate and private key.
    pub root: Issuer,
    /// Passwords of the fleet's services.
    pub secrets: Secrets,
}

impl FleetKey {
    /// Name of the file, beside `fleet.toml`.
    pub const FILE: &str = "fleet.key";

    /// Generates a new fleet key.
    ///
    /// # Errors
    /// If the kernel's random numbers cannot be read.
    pub fn create(fleet: &str) -> Result<Self> {
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
            etcd_root: password()?,
            etcd_patroni: password()?,
            // Derived from the password of etcd's user `root`.
            alerts: String::new(),
            mail: String::new(),
        };
        Ok(Self { fleet: fleet.to_owned(), root: Issuer::root(fleet)?, secrets })
    }

    /// Reads the fleet key that `bakehouse init` has created.
    ///
    /// # Errors
    /// If the file does not exist, cannot be read, or belongs to another fleet.
    pub fn load(project: &Project) -> Result<Self> {
        let path = project.dir.join(Self::FILE);
        Self::read(&path, &project.topology.name)?.ok_or_else(|| {
            Error::Failed(format!(
                "{} does not exist; create it with `bakehouse init`, once for each fleet",
                path.display()
            ))
        })
    }

    /// Creates the fleet key, unless it exists. Returns whether it created it.
    ///
    /// # Errors
    /// If the file cannot be written, or no passphrase can be read.
    pub fn init(dir: &Path, fleet: &str, passphrase: bool) -> Result<bool> {
        let path = dir.join(Self::FILE);
        if path.exists() {
            return Ok(false);
        }
        let plain = Self::create(fleet)?.bytes()?;
        write_new(&path, &if passphrase { passphrase::seal(&path, &plain)? } else { plain })
    }

    /// Encrypts the fleet key with a passphrase, or changes the passphrase.
    ///
    /// # Errors
    /// If no passphrase can be read, or the file cannot be written.
    pub fn seal(&self, dir: &Path) -> Result<()> {
        let path = dir.join(Self::FILE);
        write_private(&path, &passphrase::seal(&path, &self.bytes()?)?)
    }

    /// Reads the fleet key of local machines: `fleet.key` if it exists, else a key below `build/vm`. The first call
    /// creates that key.
    ///
    /// # Errors
    /// If a file cannot be read or written, or belongs to another fleet.
    pub fn of_vms(project: &Project) -> Result<Self> {
        let fleet = &project.topology.name;
        if let Some(own) = Self::read(&project.dir.join(Self::FILE), fleet)? {
            return Ok(own);
        }
        let path = project.dir.join("build/vm").join(Self::FILE);
        if let Some(found) = Self::read(&path, fleet)? {
            return Ok(found);
        }
        let new = Self::create(fleet)?;
        // Two processes may start machines at the same time. Both use the key of the first one to write.
        if write_new(&path, &new.bytes()?)? { Ok(new) } else { Self::of_vms(project) }
    }

    /// Derives the key that signs updates.
    ///
    /// # Errors
    /// If the key cannot be derived; does not happen in practice.
    pub fn update_key(&self) -> Result<UpdateKey> {
        UpdateKey::derive(&self.fleet, self.root.key())
    }

    fn read(path: &Path, fleet: &str) -> Result<Option<Self>> {
        let bytes = match fs::read(path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::io("read", path)(e)),
        };
        let mut found: Self = serde_json::from_slice(&passphrase::open(path, bytes)?)
            .map_err(Error::damaged(path, "restore a copy of it"))?;
        if found.fleet != fleet {
            return fail(format!("{} belongs to the fleet `{}`, not to `{fleet}`", path.display(), found.fleet));
        }
        found.complete()?;
        Ok(Some(found))
    }

    /// Adds the passwords that a `fleet.key` of an earlier version does not have. They are derived from
    /// the root's private key, so that each read of the file gives the same passwords.
    fn complete(&mut self) -> Result<()> {
        let root = self.root.key();
        for (secret, label) in
            [(&mut self.secrets.etcd_root, "etcd root, v1"), (&mut self.secrets.etcd_patroni, "etcd patroni, v1")]
        {
            if secret.is_empty() {
                *secret = derived(root, label)?;
            }
        }
        Ok(())
    }

    fn bytes(&self) -> Result<Vec<u8>> {
        serde_json::to_vec(self).map_err(Error::Json)
    }

    /// Creates certificates and passwords for a node, to validate its configuration.
    ///
    /// # Errors
    /// If a certificate cannot be created; does not happen with a valid topology.
    pub fn membership(&self, topology: &Topology, node: &Node) -> Result<Membership> {
        let key = PrivateKey::generate()?;
        let cert = self.root.founder_issuer(topology, node)?.node(topology, node, &key.public()?)?;
        Ok(Membership {
            tls: Tls {
                ca: self.root.certificate().to_owned(),
                cert,
                key: key.pem().to_owned(),
                etcd_clients: etcd_client_anchor(self.root.certificate(), topology, node)?,
            },
            secrets: self.secrets.clone(),
        })
    }
}

/// Reads a secret of another service from the environment.
fn given(variable: &str) -> String {
    std::env::var(variable).unwrap_or_default()
}

/// Generates a password of 192 bits, in characters that no configuration language has to quote.
fn password() -> Result<String> {
    Ok(URL_SAFE_NO_PAD.encode(random::<24>()?))
}

/// Derives a password of 192 bits from the root's private key and a label.
fn derived(root: &str, label: &str) -> Result<String> {
    let mut bytes = [0; 32];
    let failed = |_| Error::Failed(format!("cannot derive the password `{label}` from the fleet's root key"));
    let secret = Salt::new(HKDF_SHA256, b"bakehouse").extract(root.as_bytes());
    secret.expand(&[label.as_bytes()], HKDF_SHA256).and_then(|k| k.fill(&mut bytes)).map_err(failed)?;
    Ok(URL_SAFE_NO_PAD.encode(&bytes[..24]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn nodes_have_different_keys_and_the_same_passwords() {
        let toml = b"name = \"acme\"\n[groups]\nhub.count = 3\n";
        let topology = Topology::from_fleet(&fleet::Fleet::parse("f", toml).unwrap());
        let authority = FleetKey::create("acme").unwrap();
        let of = |name: &str| authority.membership(&topology, topology.node(name).unwrap()).unwrap();
        let (one, two) = (of("hub-1"), of("hub-2"));
        assert_ne!(one.tls.key, two.tls.key);
        assert_eq!((one.tls.ca, one.secrets), (two.tls.ca, two.secrets));
    }

    #[test]
    fn file_of_an_earlier_version_gives_fixed_etcd_passwords() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FleetKey::FILE);
        let authority = FleetKey::create("acme").unwrap();
        let mut earlier = serde_json::to_value(&authority).unwrap();
        let secrets = earlier["secrets"].as_object_mut().unwrap();
        assert!(secrets.remove("etcd_root").is_some() && secrets.remove("etcd_patroni").is_some());
        fs::write(&path, earlier.to_string()).unwrap();
        let read = || FleetKey::read(&path, "acme").unwrap().unwrap().secrets;
        let (one, two) = (read(), read());
        assert!(one == two && one.etcd_root.len() == 32 && one.etcd_root != one.etcd_patroni);
        assert_ne!(one.etcd_root, authority.secrets.etcd_root);
        write_private(&path, &authority.bytes().unwrap()).unwrap();
        assert!(read() == authority.secrets, "passwords that are in the file stay");
    }

    #[test]
    fn init_creates_one_private_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FleetKey::FILE);
        let mode = || fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        assert!(FleetKey::init(dir.path(), "acme", false).unwrap());
        let first = fs::read(&path).unwrap();
        assert!(!FleetKey::init(dir.path(), "acme", false).unwrap(), "init replaced the file");
        assert_eq!((fs::read(&path).unwrap(), mode()), (first, 0o600));
        assert!(FleetKey::read(&path, "other").is_err());
        write_private(&path, b"three").unwrap();
        assert_eq!(mode(), 0o600);
    }
}
