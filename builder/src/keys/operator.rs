//! Operators' files. A file has an operator's certificate and key, and the addresses of the fleet's hubs, so that it is
//! all that a colleague needs beside `bakehouse`.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use fleet::{Operator, OperatorRole, PrivateKey, PublicKey, Topology, encoding};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result, fail};
use crate::format::age;
use crate::keys::authority::FleetKey;
use crate::keys::{operator_log, passphrase};
use crate::project::Project;
use crate::util::fs::write_private;
use crate::util::json::pretty_json;

/// Version of the file's format.
const VERSION: u16 = 1;
/// Validity of the certificate that `bakehouse up` makes, in days.
const LOCAL_DAYS: u32 = 30;
/// The same, if fleet.key signs it: the real fleet accepts the certificate, too.
const REAL_DAYS: u32 = 1;
/// The largest difference of clocks at which a new certificate is valid on every node, in seconds.
const CLOCK_SKEW: u64 = 600;
const DAY: u64 = 86_400;

/// Content of `NAME.operator`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct OperatorFile {
    version: u16,
    /// Name of the fleet.
    pub fleet: String,
    /// Name and role.
    #[serde(flatten)]
    pub operator: Operator,
    /// Expiry of the certificate, in seconds since 1970.
    pub expires: u64,
    /// The fleet's root certificate, PEM.
    pub root: String,
    /// The operator's certificate, PEM.
    pub certificate: String,
    /// Base64 of the certificate's public key; empty in a file of an earlier version.
    #[serde(default)]
    pub public_key: String,
    /// The operator's private key, PEM; `None` if it is in `NAME.key`, because the operator made a request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) key: Option<PrivateKey>,
    /// TCP port of the hubs' API.
    pub port: u16,
    /// Nodes of the fleet when the file was made.
    pub nodes: Vec<KnownNode>,
}

/// A node, as an operator's machine needs it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct KnownNode {
    /// Name of the slot.
    pub name: String,
    /// Name of the group.
    pub group: String,
    /// Roles of the node.
    pub roles: Vec<String>,
    /// Address in the mesh.
    pub address: String,
    /// Public host name or address of a hub.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
}

impl KnownNode {
    /// Returns the nodes of a fleet.
    pub(crate) fn all(topology: &Topology) -> Vec<Self> {
        let known = |node: &fleet::Node| Self {
            name: node.name.clone(),
            group: node.group.clone(),
            roles: node.roles.clone(),
            address: node.address.to_string(),
            endpoint: node.endpoint.clone(),
        };
        topology.nodes.iter().map(known).collect()
    }
}

impl OperatorFile {
    /// Suffix of the files' names.
    pub(crate) const SUFFIX: &str = "operator";

    /// Signs an operator's certificate, which is valid for `days` days.
    ///
    /// # Errors
    /// If the fleet's root key cannot sign.
    pub(crate) fn issue(
        authority: &FleetKey,
        topology: &Topology,
        operator: Operator,
        public: &PublicKey,
        days: u32,
    ) -> Result<Self> {
        let now = now();
        let expires = now + u64::from(days) * DAY;
        let certificate = authority.root.operator(&operator, public, (now.saturating_sub(CLOCK_SKEW), expires))?;
        Ok(Self {
            version: VERSION,
            fleet: topology.name.clone(),
            operator,
            expires,
            root: authority.root.certificate().to_owned(),
            certificate,
            public_key: encoding::encode(public.as_bytes()),
            key: None,
            port: topology.mesh.port,
            nodes: KnownNode::all(topology),
        })
    }

    /// Adds the private key.
    pub(crate) fn with_key(self, key: PrivateKey) -> Self {
        Self { key: Some(key), ..self }
    }

    /// Returns the private key, PEM.
    pub(crate) fn key(&self) -> &str {
        self.key.as_ref().map(PrivateKey::pem).unwrap_or_default()
    }

    /// Writes the file, which only its owner can read. With `sealed`, asks for a passphrase and encrypts it.
    ///
    /// # Errors
    /// If the file cannot be written, or no passphrase can be read.
    pub(crate) fn write(&self, path: &Path, sealed: bool) -> Result<()> {
        let plain = pretty_json(self)?;
        write_private(path, &if sealed { passphrase::seal(path, &plain)? } else { plain })
    }

    /// Reads a file, and the key beside it if the file has none.
    ///
    /// # Errors
    /// If a file cannot be read, is damaged, or has another version.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let found = Self::read_without_key(path)?;
        if found.key.is_some() {
            return Ok(found);
        }
        let beside = key_path(path, &found.operator.name);
        let pem = fs::read(&beside).map_err(Error::io("read", &beside))?;
        let pem = String::from_utf8(passphrase::open(&beside, pem)?)
            .map_err(Error::damaged(&beside, "restore a copy of it"))?;
        let key = PrivateKey::from_pem(pem).map_err(Error::damaged(&beside, "restore a copy of it"))?;
        Ok(found.with_key(key))
    }

    /// Reads a file. The key may be in another one.
    ///
    /// # Errors
    /// If the file cannot be read, is damaged, or has another version.
    pub(crate) fn read_without_key(path: &Path) -> Result<Self> {
        let bytes = fs::read(path).map_err(Error::io("read", path))?;
        let fix = "ask for a new file (`bakehouse operator add`)";
        let found: Self = serde_json::from_slice(&passphrase::open(path, bytes)?).map_err(Error::damaged(path, fix))?;
        if found.version != VERSION {
            return fail(format!(
                "{} has version {} of the format\n  help: use the version of bakehouse that made it",
                path.display(),
                found.version
            ));
        }
        Ok(found)
    }

    /// Returns the base64 of the certificate's public key.
    ///
    /// # Errors
    /// If the file is of an earlier version, and has no private key.
    pub(crate) fn public(&self) -> Result<String> {
        match &self.key {
            _ if !self.public_key.is_empty() => Ok(self.public_key.clone()),
            Some(key) => Ok(encoding::encode(key.public()?.as_bytes())),
            None => {
                fail("the file has no public key\n  help: name the key with `--key`, from `bakehouse operator list`")
            }
        }
    }

    /// Returns whether [`Self::write`] may replace the file at `path` with one for this operator: it does not exist, has
    /// no private key, has expired, or is this operator's (`own`).
    pub(crate) fn may_replace(path: &Path, own: Option<&str>) -> bool {
        if !path.exists() {
            return true;
        }
        let plain = fs::read(path).ok().and_then(|bytes| serde_json::from_slice::<Self>(&bytes).ok());
        plain.is_some_and(|old| old.key.is_none() || old.expires <= now() || own == Some(old.operator.name.as_str()))
    }

    /// Makes an administrator's file for this user and the local machines of a fleet, unless a valid one exists. Renews
    /// it when a third of its time is left. If it signs with fleet.key, the certificate is valid for a day only. It does
    /// not sign with an encrypted fleet.key.
    ///
    /// # Errors
    /// If the fleet key cannot be read, or a file cannot be written.
    pub(crate) fn for_local_machines(project: &Project) -> Result<LocalFile> {
        let user = std::env::var("USER").ok().and_then(|user| Operator::new(&user, OperatorRole::Admin));
        let local = || Operator { name: "local".to_owned(), role: OperatorRole::Admin };
        let operator = user.unwrap_or_else(local);
        let path = local_dir(project).join(format!("{}.{}", operator.name, Self::SUFFIX));
        let authority = FleetKey::of_vms(project)?;
        let real = fs::read(project.dir.join(FleetKey::FILE)).ok();
        let days = if real.is_some() { REAL_DAYS } else { LOCAL_DAYS };
        let left = now() + u64::from(days) * DAY / 3;
        let nodes = KnownNode::all(&project.topology);
        if Self::read(&path)
            .is_ok_and(|old| old.expires > left && old.root == authority.root.certificate() && old.nodes == nodes)
        {
            return Ok(LocalFile::Kept);
        }
        if real.as_ref().is_some_and(|bytes| age::is_sealed(bytes)) {
            // An expired file would hide the user's own one.
            if Self::read(&path).is_ok_and(|old| old.expires <= now()) {
                fs::remove_file(&path).map_err(Error::io("remove", &path))?;
            }
            return Ok(LocalFile::Sealed);
        }
        let key = PrivateKey::generate()?;
        let public = key.public()?;
        let file = Self::issue(&authority, &project.topology, operator, &public, days)?;
        let expires = file.expires;
        if real.is_some() {
            // The real fleet accepts this certificate, too.
            operator_log::note(&project.dir, &file.operator, &public, expires)?;
        }
        file.with_key(key).write(&path, false)?;
        Ok(if real.is_some() { LocalFile::Real { path, expires } } else { LocalFile::Local })
    }
}

/// Operator's file for local machines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum LocalFile {
    /// A valid file exists.
    Kept,
    /// A new file. Only local machines accept its certificate.
    Local,
    /// A new file. The real fleet accepts its certificate, too.
    Real {
        /// The file.
        path: PathBuf,
        /// Expiry of the certificate, in seconds since 1970.
        expires: u64,
    },
    /// There is no valid file, because fleet.key is encrypted.
    Sealed,
}

/// Folder of the files for the local machines of a fleet.
pub(super) fn local_dir(project: &Project) -> PathBuf {
    project.dir.join("build/vm")
}

/// Returns the path of the key beside an operator's file.
pub(super) fn key_path(beside: &Path, name: &str) -> PathBuf {
    beside.with_file_name(format!("{name}.key"))
}

/// Returns the seconds since 1970.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn topology() -> Topology {
        let toml = b"name = \"acme\"\n[groups]\nhub.count = 1\nhub.endpoints = [\"hub.example.net\"]\ndb.count = 2\n";
        Topology::from_fleet(&fleet::Fleet::parse("f", toml).unwrap())
    }

    pub(crate) fn file(name: &str) -> (OperatorFile, PrivateKey) {
        let operator = Operator::new(name, OperatorRole::Viewer).unwrap();
        let (key, authority) = (PrivateKey::generate().unwrap(), FleetKey::create("acme").unwrap());
        (OperatorFile::issue(&authority, &topology(), operator, &key.public().unwrap(), 30).unwrap(), key)
    }

    #[test]
    fn file_has_all_that_a_colleague_needs() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("anna.operator");
        let (file, key) = file("anna");
        file.clone().with_key(key.clone()).write(&path, false).unwrap();
        let read = OperatorFile::read(&path).unwrap();
        assert_eq!((read.key(), read.operator.role, read.port), (key.pem(), OperatorRole::Viewer, 51820));
        assert_eq!(read.nodes[2].endpoint.as_deref(), Some("hub.example.net"));
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        // The certificate and the key belong together, and the root has signed the certificate.
        let own = fleet_https::Identity { cert: &read.certificate, key: read.key() };
        fleet_https::client(&read.root, Some(own)).unwrap();
        let newer = fs::read_to_string(&path).unwrap().replacen("\"version\": 1", "\"version\": 2", 1);
        fs::write(&path, newer).unwrap();
        assert!(OperatorFile::read(&path).map(drop).unwrap_err().to_string().contains("version 2"));
    }

    #[test]
    fn only_a_file_without_a_valid_key_of_another_operator_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("anna.operator");
        assert!(OperatorFile::may_replace(&path, None));
        let (anna, key) = file("anna");
        // A colleague has the key.
        anna.write(&path, false).unwrap();
        assert!(OperatorFile::may_replace(&path, None));
        let with_key = anna.with_key(key);
        with_key.write(&path, false).unwrap();
        assert!(!OperatorFile::may_replace(&path, None) && !OperatorFile::may_replace(&path, Some("ben")));
        assert!(OperatorFile::may_replace(&path, Some("anna")));
        OperatorFile { expires: now() - 1, ..with_key }.write(&path, false).unwrap();
        assert!(OperatorFile::may_replace(&path, None));
        fs::write(&path, "encrypted, or another file").unwrap();
        assert!(!OperatorFile::may_replace(&path, Some("anna")));
    }

    fn project(dir: &Path) -> Project {
        let toml = "name = \"acme\"\n[groups]\nhub.count = 1\nhub.endpoints = [\"hub.example.net\"]\n";
        fs::write(dir.join("fleet.toml"), toml).unwrap();
        Project::load(dir).unwrap()
    }

    /// Makes the file for the local machines, and reads it.
    fn local(project: &Project) -> (LocalFile, PathBuf, OperatorFile) {
        let made = OperatorFile::for_local_machines(project).unwrap();
        let mut found: Vec<PathBuf> = fs::read_dir(local_dir(project)).unwrap().map(|e| e.unwrap().path()).collect();
        found.retain(|path| path.extension().is_some_and(|suffix| suffix == OperatorFile::SUFFIX));
        let path = found.pop().unwrap();
        let read = OperatorFile::read(&path).unwrap();
        (made, path, read)
    }

    #[test]
    fn up_makes_one_file_and_renews_it() {
        let dir = tempfile::tempdir().unwrap();
        let project = project(dir.path());
        let (made, path, first) = local(&project);
        assert_eq!((made, first.operator.role), (LocalFile::Local, OperatorRole::Admin));
        let (kept, _, second) = local(&project);
        assert!(kept == LocalFile::Kept && second == first, "a valid file stays");
        OperatorFile { expires: now() + 9 * DAY, ..first }.write(&path, false).unwrap();
        let (made, _, renewed) = local(&project);
        assert!(made == LocalFile::Local && renewed.expires > now() + 29 * DAY);
        assert_eq!(operator_log::rows(dir.path()).unwrap(), [], "the real fleet does not accept it");
    }

    #[test]
    fn up_makes_a_file_for_one_day_if_the_real_fleet_accepts_it() {
        let dir = tempfile::tempdir().unwrap();
        let project = project(dir.path());
        FleetKey::init(dir.path(), "acme", false).unwrap();
        let (made, path, file) = local(&project);
        assert!(file.expires <= now() + DAY && file.expires > now() + DAY - 100);
        assert_eq!(made, LocalFile::Real { path, expires: file.expires });
        let rows = operator_log::rows(dir.path()).unwrap();
        assert_eq!((rows.len(), rows[0].expires, rows[0].key.as_str()), (1, file.expires, file.public_key.as_str()));
        assert_eq!(local(&project).0, LocalFile::Kept);
    }
}
