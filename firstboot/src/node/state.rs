//! State of a node, in `/var/lib/bakehouse`. The agent writes each file atomically.
//!
//! After a rollback, an older image reads the state of a newer one. A newer version may add fields, because the older
//! one ignores unknown fields. Any other change needs a higher format number, and `bakehouse plan` then warns that
//! nodes cannot roll back. `fixtures/` has the files of all earlier versions. For the same reason the agent does not
//! seal existing files that are not sealed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::ops::RangeInclusive;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use fleet::{Issuer, MeshKey, RevokedOperator, STATE_VERSION, Secrets, SlotRecord, Topology};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::error::{Error, Result};
use crate::node::seal::{Sealer, elsewhere};

/// Folder of a node's state.
#[derive(Clone, Debug)]
pub struct StateDir {
    path: PathBuf,
    sealer: Option<Sealer>,
}

/// A sealed file.
#[derive(Serialize, Deserialize)]
struct Sealed {
    version: u16,
    sealed: String,
}

/// Identity of the node, from its grant or its founder's ticket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    pub(crate) version: u16,
    /// Name of the fleet.
    pub fleet: String,
    /// Name of the slot.
    pub slot: String,
    /// Epoch of the slot's record.
    pub epoch: u64,
    /// The fleet's root certificate, PEM.
    pub root: String,
    /// Endpoints of hubs, by slot, that replace those of `fleet.toml`.
    pub endpoints: BTreeMap<String, String>,
    /// Certificates of this node and of its issuer, PEM.
    pub cert: String,
    /// Passwords that the node's roles need.
    pub secrets: Secrets,
    /// Issuer with which a hub signs other nodes; `None` on nodes that are not hubs.
    pub issuer: Option<Issuer>,
}

/// Mesh keys of the other nodes, with which the mesh comes up when no hub answers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Neighbours {
    version: u16,
    /// Mesh keys, by slot.
    pub keys: BTreeMap<String, MeshKey>,
    /// On a founder: slots whose keys come from etcd.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub granted: BTreeSet<String>,
    /// TLS keys of the current hubs, by slot. The node trusts no other hubs.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub hubs: BTreeMap<String, String>,
}

impl State {
    /// Format of the content, and of a file that is not sealed. [`STATE_VERSION`] is the format of a sealed file.
    const OPEN: u16 = 2;
    pub(super) const FILE: &str = "state.json";

    /// Makes the state of a node without certificate and passwords.
    #[must_use]
    pub fn new(topology: &Topology, slot: &str, epoch: u64, root: &str) -> Self {
        Self {
            version: Self::OPEN,
            fleet: topology.name.clone(),
            slot: slot.to_owned(),
            epoch,
            root: root.to_owned(),
            endpoints: BTreeMap::new(),
            cert: String::new(),
            secrets: Secrets::default(),
            issuer: None,
        }
    }

    /// Loads the state; `None` if there is no file.
    ///
    /// # Errors
    /// If the file cannot be read or unsealed, has another format, or is damaged.
    pub fn load(dir: &StateDir) -> Result<Option<Self>> {
        dir.read(Self::FILE, Self::OPEN..=STATE_VERSION)
    }

    /// Stores the state.
    ///
    /// # Errors
    /// If the file cannot be sealed or written. The file of before is then unchanged.
    pub fn store(&self, dir: &StateDir) -> Result<()> {
        dir.write(Self::FILE, STATE_VERSION, self)
    }
}

impl Neighbours {
    const VERSION: u16 = 1;

    /// Makes the content of the file.
    #[must_use]
    pub fn new(keys: BTreeMap<String, MeshKey>, granted: BTreeSet<String>, hubs: BTreeMap<String, String>) -> Self {
        Self { version: Self::VERSION, keys, granted, hubs }
    }

    /// Loads the keys; empty if the file is missing or damaged, because the node can ask the hubs again.
    #[must_use]
    pub fn load(dir: &Path) -> Self {
        load_or_default(dir, "neighbours.json", Self::VERSION)
    }

    /// Stores the keys.
    ///
    /// # Errors
    /// If the file cannot be written. The file of before is then unchanged.
    pub fn store(&self, dir: &Path) -> Result<()> {
        write_json(&dir.join("neighbours.json"), self)
    }
}

/// Records of the slots' owners, as a founder last read them from etcd.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotRecords {
    version: u16,
    /// Records, by slot.
    pub slots: BTreeMap<String, SlotRecord>,
}

impl SlotRecords {
    const VERSION: u16 = 1;
    const FILE: &str = "slots.json";

    /// Makes the content of the file.
    #[must_use]
    pub fn new(slots: BTreeMap<String, SlotRecord>) -> Self {
        Self { version: Self::VERSION, slots }
    }

    /// Loads `slots.json` below `dir`; empty if the file is missing or damaged.
    #[must_use]
    pub fn load(dir: &Path) -> Self {
        load_or_default(dir, Self::FILE, Self::VERSION)
    }

    /// Stores `slots.json` below `dir`.
    ///
    /// # Errors
    /// If the file cannot be written. The file of before is then unchanged.
    pub fn store(&self, dir: &Path) -> Result<()> {
        write_json(&dir.join(Self::FILE), self)
    }
}

/// Orders that revoked operators' certificates.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RevocationFile {
    version: u16,
    /// The orders.
    pub orders: Vec<RevokedOperator>,
}

impl RevocationFile {
    const VERSION: u16 = 1;
    const FILE: &str = "revoked-operators.json";

    /// Makes the content of the file.
    #[must_use]
    pub fn new(orders: Vec<RevokedOperator>) -> Self {
        Self { version: Self::VERSION, orders }
    }

    /// Loads `revoked-operators.json` below `dir`; empty if the file is missing.
    ///
    /// # Errors
    /// If the file cannot be read, or is damaged.
    pub fn load(dir: &Path) -> Result<Self> {
        let versions = Self::VERSION..=Self::VERSION;
        Ok(read_json(&dir.join(Self::FILE), &versions, None)?.unwrap_or_default())
    }

    /// Stores `revoked-operators.json` below `dir`.
    ///
    /// # Errors
    /// If the file cannot be written. The file of before is then unchanged.
    pub fn store(&self, dir: &Path) -> Result<()> {
        write_json(&dir.join(Self::FILE), self)
    }
}

/// A newer image that the boot loader skipped, for example because the boot entry is damaged. The boot loader does not
/// count a try then, so the agent counts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PassedOver {
    version: u16,
    /// Version of the image.
    pub image: String,
    /// Number of boots that skipped the image.
    pub boots: u32,
    /// Id of the last of these boots.
    boot_id: String,
}

impl PassedOver {
    const VERSION: u16 = 1;
    const FILE: &str = "passed-over.json";

    /// Counts this boot once, if `pending` had a boot entry when the boot began.
    ///
    /// # Errors
    /// If the file cannot be written or removed. The file of before is then unchanged.
    pub fn count(dir: &StateDir, pending: Option<&str>, boot_id: &str) -> Result<Self> {
        let path = dir.path.join(Self::FILE);
        // A damaged file counts as a missing one.
        let before: Option<Self> = read_json(&path, &(Self::VERSION..=Self::VERSION), None).unwrap_or_default();
        let Some(image) = pending else {
            if before.is_some() {
                dir.remove(Self::FILE)?;
            }
            return Ok(Self::default());
        };
        let before = before.filter(|b| b.image == image).unwrap_or_default();
        if before.boot_id == boot_id {
            return Ok(before);
        }
        let now = Self {
            version: Self::VERSION,
            image: image.to_owned(),
            boots: before.boots + 1,
            boot_id: boot_id.to_owned(),
        };
        write_json(&path, &now)?;
        Ok(now)
    }
}

impl StateDir {
    /// Opens a folder. With a sealer, [`Self::write`] seals secrets.
    #[must_use]
    pub fn new(path: &Path, sealer: Option<Sealer>) -> Self {
        Self { path: path.to_owned(), sealer }
    }

    /// Returns the folder's path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads a secret that [`Self::write`] wrote; `None` if there is no file.
    ///
    /// # Errors
    /// If the file cannot be read, has another format, was sealed on another machine, or is damaged.
    pub fn read<T: DeserializeOwned>(&self, file: &str, versions: RangeInclusive<u16>) -> Result<Option<T>> {
        read_json(&self.path.join(file), &versions, self.sealer.as_ref())
    }

    /// Writes a secret. `version` is the format of the sealed file.
    ///
    /// # Errors
    /// If the file cannot be sealed or written. The file of before is then unchanged.
    pub fn write(&self, file: &str, version: u16, value: &impl Serialize) -> Result<()> {
        let path = self.path.join(file);
        let Some(sealer) = &self.sealer else { return write_json(&path, value) };
        let open = serde_json::to_vec(value).map_err(Error::json("a secret"))?;
        write_json(&path, &Sealed { version, sealed: sealer.seal(file, &open)? })
    }

    /// Removes a file that [`Self::write`] wrote.
    ///
    /// # Errors
    /// If the file cannot be removed.
    pub fn remove(&self, file: &str) -> Result<()> {
        let path = self.path.join(file);
        fs::remove_file(&path).map_err(Error::io("remove", &path))?;
        sync(&self.path)
    }
}

/// Fix of a damaged file.
const NEW_NODE: &str = "wipe /var to make this a new node";

pub(super) fn sync(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(Error::io("sync", dir))
}

/// Reads a file that the node can do without: empty if the file is missing or damaged.
pub(super) fn load_or_default<T: DeserializeOwned + Default>(dir: &Path, file: &str, version: u16) -> T {
    match read_json(&dir.join(file), &(version..=version), None) {
        Ok(found) => found.unwrap_or_default(),
        Err(e) => {
            warn!("cannot load {file}: {}", e.chain());
            T::default()
        }
    }
}

pub(super) fn read_json<T: DeserializeOwned>(
    path: &Path,
    versions: &RangeInclusive<u16>,
    sealer: Option<&Sealer>,
) -> Result<Option<T>> {
    #[derive(Deserialize)]
    struct Outside {
        version: u16,
        sealed: Option<String>,
    }
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io("read", path)(e)),
    };
    let damaged = |e: serde_json::Error| Error::Unusable { path: path.to_owned(), fix: NEW_NODE, source: e.into() };
    let found: Outside = serde_json::from_slice(&bytes).map_err(damaged)?;
    if !versions.contains(&found.version) {
        return Err(Error::Configuration(format!(
            "{} has format {}, and this agent reads format {}; boot the version of the image that wrote it",
            path.display(),
            found.version,
            versions.end()
        )));
    }
    let open = match found.sealed {
        None => bytes,
        Some(sealed) => {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let sealer = sealer.ok_or_else(|| elsewhere(&name, "this machine has none"))?;
            sealer.open(&name, &sealed)?
        }
    };
    serde_json::from_slice(&open).map(Some).map_err(damaged)
}

/// Writes a temporary file, syncs it, renames it, and syncs the folder. After a power loss, the disk has either the old
/// or the new file.
///
/// # Errors
/// If the file cannot be written.
pub(super) fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let mut bytes = serde_json::to_vec_pretty(value).map_err(Error::json("the state"))?;
    bytes.push(b'\n');
    let dir = path.parent().unwrap_or(Path::new("/"));
    let beside: PathBuf = path.with_extension("new");
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&beside)
        .map_err(Error::io("create", &beside))?;
    file.write_all(&bytes).and_then(|()| file.sync_all()).map_err(Error::io("write", &beside))?;
    fs::rename(&beside, path).map_err(Error::io("rename", &beside))?;
    sync(dir)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn state() -> State {
        let fleet = fleet::Fleet::parse("f", b"name = \"acme\"\n[groups]\nhub.count = 3\n").unwrap();
        State::new(&Topology::from_fleet(&fleet), "hub-1", 1, "root")
    }

    #[test]
    fn stored_state_is_private() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(State::load(&StateDir::new(dir.path(), None)).unwrap(), None);
        state().store(&StateDir::new(dir.path(), None)).unwrap();
        assert_eq!(State::load(&StateDir::new(dir.path(), None)).unwrap(), Some(state()));
        let mode = fs::metadata(dir.path().join("state.json")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn skipped_image_counts_once_a_boot() {
        let dir = tempfile::tempdir().unwrap();
        let states = StateDir::new(dir.path(), None);
        let boots = |pending, boot_id| PassedOver::count(&states, pending, boot_id).unwrap().boots;
        assert_eq!(boots(None, "a"), 0);
        // The agent can start twice in a boot.
        assert_eq!([boots(Some("2"), "b"), boots(Some("2"), "b"), boots(Some("2"), "c")], [1, 1, 2]);
        assert_eq!(boots(Some("3"), "d"), 1, "another image");
        assert_eq!([boots(None, "e"), boots(Some("3"), "f")], [0, 1]);
        fs::write(dir.path().join(PassedOver::FILE), "{").unwrap();
        assert_eq!(boots(Some("3"), "g"), 1, "a damaged file");
    }

    #[test]
    fn seals_state_and_reads_unsealed_state() {
        let dir = tempfile::tempdir().unwrap();
        let sealer = crate::node::seal::tests::machine(dir.path(), 1);
        let states = StateDir::new(dir.path(), Some(sealer));
        state().store(&StateDir::new(dir.path(), None)).unwrap();
        assert_eq!(State::load(&states).unwrap(), Some(state()));
        state().store(&states).unwrap();
        let text = fs::read_to_string(dir.path().join("state.json")).unwrap();
        assert!(!text.contains("hub-1"), "{text}");
        assert_eq!(State::load(&states).unwrap(), Some(state()));
        // An older agent refuses the format, and does not make a new node.
        let older = read_json::<State>(&dir.path().join("state.json"), &(2..=2), None).unwrap_err();
        assert!(older.chain().contains("has format 3") && older.exit_code() == 78, "{older}");
        // A machine without a TPM refuses the file, too.
        let elsewhere = State::load(&StateDir::new(dir.path(), None)).unwrap_err();
        assert!(elsewhere.chain().contains("this machine has none"), "{elsewhere}");
        // A sealed file does not open under another name.
        fs::rename(dir.path().join("state.json"), dir.path().join("keys.json")).unwrap();
        assert!(states.read::<State>("keys.json", 2..=3).is_err());
    }

    #[test]
    fn incomplete_temporary_file_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        state().store(&StateDir::new(dir.path(), None)).unwrap();
        fs::write(dir.path().join("state.new"), b"{\"ver").unwrap();
        assert_eq!(State::load(&StateDir::new(dir.path(), None)).unwrap(), Some(state()));
        state().store(&StateDir::new(dir.path(), None)).unwrap();
        assert_eq!(State::load(&StateDir::new(dir.path(), None)).unwrap(), Some(state()));
    }

    #[test]
    fn damaged_or_newer_state_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        for text in ["", "{", "{\"version\":9}", "{\"version\":2,\"fleet\":\"a\"}"] {
            fs::write(dir.path().join("state.json"), text).unwrap();
            assert_eq!(State::load(&StateDir::new(dir.path(), None)).unwrap_err().exit_code(), 78);
        }
    }

    /// Reads a file of an earlier version, also with a field that a later version added.
    fn read<T: DeserializeOwned + Serialize>(path: &Path) -> serde_json::Value {
        let text = fs::read_to_string(path).unwrap();
        let mut later: serde_json::Value = serde_json::from_str(&text).unwrap();
        let earlier = serde_json::to_value(serde_json::from_str::<T>(&text).unwrap()).unwrap();
        assert_eq!(earlier, later, "a field of {} was lost", path.display());
        later["a later field"] = 1.into();
        serde_json::from_value::<T>(later).unwrap();
        earlier
    }

    #[test]
    fn reads_state_of_earlier_versions() {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
        for version in fs::read_dir(fixtures).unwrap() {
            let dir = version.unwrap().path();
            // Files on the node.
            let states = StateDir::new(&dir, None);
            let state = State::load(&states).unwrap().unwrap();
            assert_eq!((state.slot.as_str(), state.secrets.odoo.as_str()), ("hub-1", "password of odoo"));
            assert_eq!(Neighbours::load(&dir).keys.len(), 2);
            let keys = crate::node::keys::Keys::load_or_make(&states).unwrap();
            assert_eq!(keys.mesh_public().unwrap().to_string(), "B07PggAHt1Z+blnesUGIXbtvHiydXHGEoaAWxICOiHk=");
            read::<State>(&dir.join("state.json"));
            // Values in etcd.
            read::<fleet::SlotRecord>(&dir.join("slot.json"));
            read::<fleet::Report>(&dir.join("report.json"));
            read::<fleet::UpdateLock>(&dir.join("turn.json"));
        }
    }

    #[test]
    fn damaged_neighbours_are_empty() {
        let dir = tempfile::tempdir().unwrap();
        let keys = BTreeMap::from([("hub-1".to_owned(), MeshKey([7; 32]))]);
        Neighbours::new(keys.clone(), BTreeSet::new(), BTreeMap::new()).store(dir.path()).unwrap();
        assert_eq!(Neighbours::load(dir.path()).keys, keys);
        fs::write(dir.path().join("neighbours.json"), "{").unwrap();
        assert_eq!(Neighbours::load(dir.path()).keys, BTreeMap::new());
    }

    proptest::proptest! {
        #[test]
        fn load_never_panics(bytes: Vec<u8>) {
            let dir = tempfile::tempdir().unwrap();
            fs::write(dir.path().join("state.json"), bytes).unwrap();
            let _ = State::load(&StateDir::new(dir.path(), None));
        }
    }
}
