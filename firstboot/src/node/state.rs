//! What a node remembers, in `/var/lib/bakehouse`: written whole or not at all.
//!
//! An image that went back reads what the newer one wrote: a field may be added, and is left
//! alone by who does not know it. Where that does not serve, the format's number rises, and
//! `bakehouse plan` says that there is no way back. `fixtures/` keeps what was ever written.
//! What is there stays as it is, for that reason also unsealed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::ops::RangeInclusive;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use fleet::{Issuer, MeshKey, STATE_VERSION, Secrets, SlotRecord, Topology};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::node::seal::{Sealer, not_here};

/// The folder of what a node remembers.
#[derive(Clone, Debug)]
pub struct StateDir {
    path: PathBuf,
    sealer: Option<Sealer>,
}

/// A file as it is on the disk.
#[derive(Serialize, Deserialize)]
struct Sealed {
    version: u16,
    sealed: String,
}

/// Who this node is: its grant, or what its founder's ticket said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    pub(crate) version: u16,
    pub fleet: String,
    pub slot: String,
    /// Counts the keys the slot has had.
    pub epoch: u64,
    /// The fleet root's certificate, PEM.
    pub root: String,
    /// Where hubs are, if not where `fleet.toml` says.
    pub endpoints: BTreeMap<String, String>,
    /// This node's certificate and its issuer's, PEM.
    pub cert: String,
    pub secrets: Secrets,
    /// What a hub signs other nodes with.
    pub issuer: Option<Issuer>,
}

/// Mesh keys of others, by slot: what brings the mesh back when nobody can be asked.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Neighbours {
    version: u16,
    pub keys: BTreeMap<String, MeshKey>,
    /// Slots whose keys are etcd's word, on a founder.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub granted: BTreeSet<String>,
    /// TLS keys of the current hubs, by slot: the only hubs that a node believes.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub hubs: BTreeMap<String, String>,
}

impl State {
    /// Format of what is in the file, and of a file that is not sealed; [`STATE_VERSION`] is the sealed file's.
    const OPEN: u16 = 2;
    const FILE: &str = "state.json";

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

    /// # Errors
    /// The file is there and is not a state: nothing is guessed.
    pub fn load(dir: &StateDir) -> Result<Option<Self>> {
        dir.read(Self::FILE, Self::OPEN..=STATE_VERSION)
    }

    /// # Errors
    /// The disk says no; what was there before still is.
    pub fn store(&self, dir: &StateDir) -> Result<()> {
        dir.write(Self::FILE, STATE_VERSION, self)
    }
}

impl Neighbours {
    const VERSION: u16 = 1;

    #[must_use]
    pub fn of(keys: BTreeMap<String, MeshKey>, granted: BTreeSet<String>, hubs: BTreeMap<String, String>) -> Self {
        Self { version: Self::VERSION, keys, granted, hubs }
    }

    /// Empty where there is nothing to read: they can be asked for again.
    #[must_use]
    pub fn load(dir: &Path) -> Self {
        match read_json(&dir.join("neighbours.json"), &(Self::VERSION..=Self::VERSION), None) {
            Ok(found) => found.unwrap_or_default(),
            Err(e) => {
                eprintln!("{e}");
                Self::default()
            }
        }
    }

    /// # Errors
    /// The disk says no; what was there before still is.
    pub fn store(&self, dir: &Path) -> Result<()> {
        write_json(&dir.join("neighbours.json"), self)
    }
}

/// Who has each slot, as a founder last heard it from etcd.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotRecords {
    version: u16,
    pub slots: BTreeMap<String, SlotRecord>,
}

impl SlotRecords {
    const VERSION: u16 = 1;
    const FILE: &str = "slots.json";

    #[must_use]
    pub fn of(slots: BTreeMap<String, SlotRecord>) -> Self {
        Self { version: Self::VERSION, slots }
    }

    /// Reads `slots.json` below `dir`; empty where there is nothing to read.
    #[must_use]
    pub fn load(dir: &Path) -> Self {
        match read_json(&dir.join(Self::FILE), &(Self::VERSION..=Self::VERSION), None) {
            Ok(found) => found.unwrap_or_default(),
            Err(e) => {
                eprintln!("{e}");
                Self::default()
            }
        }
    }

    /// Writes `slots.json` below `dir`.
    ///
    /// # Errors
    /// It can't be written; the file of before is still there.
    pub fn store(&self, dir: &Path) -> Result<()> {
        write_json(&dir.join(Self::FILE), self)
    }
}

/// A newer image that the boot loader passed over, as it does where the entry is damaged: it counts
/// no try then.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PassedOver {
    version: u16,
    pub image: String,
    pub boots: u32,
    /// The last of them.
    boot_id: String,
}

impl PassedOver {
    const VERSION: u16 = 1;
    const FILE: &str = "passed-over.json";

    /// Counts this boot, once, where `pending` was there when it began.
    ///
    /// # Errors
    /// The disk says no; what was there before still is.
    pub fn count(dir: &StateDir, pending: Option<&str>, boot_id: &str) -> Result<Self> {
        let path = dir.path.join(Self::FILE);
        // What can't be read is of no more use than nothing.
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
    /// A folder; what is secret is sealed from now on, if there is something to seal it with.
    #[must_use]
    pub fn new(path: &Path, sealer: Option<Sealer>) -> Self {
        Self { path: path.to_owned(), sealer }
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads a secret that [`Self::write`] wrote; none if it is not there.
    ///
    /// # Errors
    /// It can't be read, is of another version, was sealed elsewhere, or is damaged.
    pub fn read<T: DeserializeOwned>(&self, file: &str, versions: RangeInclusive<u16>) -> Result<Option<T>> {
        read_json(&self.path.join(file), &versions, self.sealer.as_ref())
    }

    /// Writes a secret; `version` is the format of the sealed file.
    ///
    /// # Errors
    /// It can't be sealed, or the disk says no; what was there before still is.
    pub fn write(&self, file: &str, version: u16, value: &impl Serialize) -> Result<()> {
        let path = self.path.join(file);
        let Some(sealer) = &self.sealer else { return write_json(&path, value) };
        let open = serde_json::to_vec(value).map_err(|e| Error::Failed(e.to_string()))?;
        write_json(&path, &Sealed { version, sealed: sealer.seal(file, &open)? })
    }

    /// Forgets what [`Self::write`] wrote.
    ///
    /// # Errors
    /// The disk says no.
    pub fn remove(&self, file: &str) -> Result<()> {
        let path = self.path.join(file);
        fs::remove_file(&path).map_err(Error::io("remove", &path))?;
        sync(&self.path)
    }
}

fn sync(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(Error::io("sync", dir))
}

fn read_json<T: DeserializeOwned>(
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
    let damaged = |e: serde_json::Error| {
        Error::Configuration(format!("{} is damaged ({e}); wipe /var to make this a new node", path.display()))
    };
    let found: Outside = serde_json::from_slice(&bytes).map_err(damaged)?;
    if !versions.contains(&found.version) {
        return Err(Error::Configuration(format!(
            "{} has format {}, this agent reads {}; boot the version of the image that wrote it",
            path.display(),
            found.version,
            versions.end()
        )));
    }
    let open = match found.sealed {
        None => bytes,
        Some(sealed) => {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let sealer = sealer.ok_or_else(|| not_here(&name, "this machine has none"))?;
            sealer.open(&name, &sealed)?
        }
    };
    serde_json::from_slice(&open).map(Some).map_err(damaged)
}

/// Writes beside, fsyncs, renames, fsyncs the folder: a power cut leaves the old or the new.
///
/// # Errors
/// The disk says no.
fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let mut bytes = serde_json::to_vec_pretty(value).map_err(|e| Error::Failed(e.to_string()))?;
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
        State::new(&Topology::of(&fleet), "hub-1", 1, "root")
    }

    #[test]
    fn state_is_kept_and_private() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(State::load(&StateDir::new(dir.path(), None)).unwrap(), None);
        state().store(&StateDir::new(dir.path(), None)).unwrap();
        assert_eq!(State::load(&StateDir::new(dir.path(), None)).unwrap(), Some(state()));
        let mode = fs::metadata(dir.path().join("state.json")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn a_boot_that_passed_an_image_over_counts_once() {
        let dir = tempfile::tempdir().unwrap();
        let states = StateDir::new(dir.path(), None);
        let boots = |pending, boot_id| PassedOver::count(&states, pending, boot_id).unwrap().boots;
        assert_eq!(boots(None, "a"), 0);
        // The agent may start twice in a boot.
        assert_eq!([boots(Some("2"), "b"), boots(Some("2"), "b"), boots(Some("2"), "c")], [1, 1, 2]);
        assert_eq!(boots(Some("3"), "d"), 1, "another image");
        assert_eq!([boots(None, "e"), boots(Some("3"), "f")], [0, 1]);
        fs::write(dir.path().join(PassedOver::FILE), "{").unwrap();
        assert_eq!(boots(Some("3"), "g"), 1, "a damaged file");
    }

    #[test]
    fn what_is_secret_is_sealed_and_what_was_there_before_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let sealer = crate::node::seal::tests::machine(dir.path(), 1);
        let states = StateDir::new(dir.path(), Some(sealer));
        state().store(&StateDir::new(dir.path(), None)).unwrap();
        assert_eq!(State::load(&states).unwrap(), Some(state()));
        state().store(&states).unwrap();
        let text = fs::read_to_string(dir.path().join("state.json")).unwrap();
        assert!(!text.contains("hub-1"), "{text}");
        assert_eq!(State::load(&states).unwrap(), Some(state()));
        // An agent of before says whose it is, and starts no new node.
        let older = read_json::<State>(&dir.path().join("state.json"), &(2..=2), None).unwrap_err();
        assert!(older.to_string().contains("has format 3") && older.exit_code() == 78, "{older}");
        // And so does a machine without a TPM.
        let elsewhere = State::load(&StateDir::new(dir.path(), None)).unwrap_err();
        assert!(elsewhere.to_string().contains("(this machine has none)"), "{elsewhere}");
        // The file of one thing is not another's.
        fs::rename(dir.path().join("state.json"), dir.path().join("keys.json")).unwrap();
        assert!(states.read::<State>("keys.json", 2..=3).is_err());
    }

    #[test]
    fn half_a_write_beside_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        state().store(&StateDir::new(dir.path(), None)).unwrap();
        fs::write(dir.path().join("state.new"), b"{\"ver").unwrap();
        assert_eq!(State::load(&StateDir::new(dir.path(), None)).unwrap(), Some(state()));
        state().store(&StateDir::new(dir.path(), None)).unwrap();
        assert_eq!(State::load(&StateDir::new(dir.path(), None)).unwrap(), Some(state()));
    }

    #[test]
    fn damaged_or_newer_state_is_not_a_new_node() {
        let dir = tempfile::tempdir().unwrap();
        for text in ["", "{", "{\"version\":9}", "{\"version\":2,\"fleet\":\"a\"}"] {
            fs::write(dir.path().join("state.json"), text).unwrap();
            assert_eq!(State::load(&StateDir::new(dir.path(), None)).unwrap_err().exit_code(), 78);
        }
    }

    /// Reads what a version of bakehouse wrote, and the same with a field that a later one added.
    fn read<T: DeserializeOwned + Serialize>(path: &Path) -> serde_json::Value {
        let text = fs::read_to_string(path).unwrap();
        let mut later: serde_json::Value = serde_json::from_str(&text).unwrap();
        let earlier = serde_json::to_value(serde_json::from_str::<T>(&text).unwrap()).unwrap();
        assert_eq!(earlier, later, "{} was not kept whole", path.display());
        later["a later field"] = 1.into();
        serde_json::from_value::<T>(later).unwrap();
        earlier
    }

    #[test]
    fn what_earlier_versions_wrote_is_read() {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
        for version in fs::read_dir(fixtures).unwrap() {
            let dir = version.unwrap().path();
            // On the node, by the functions that the agent reads it with.
            let states = StateDir::new(&dir, None);
            let state = State::load(&states).unwrap().unwrap();
            assert_eq!((state.slot.as_str(), state.secrets.odoo.as_str()), ("hub-1", "password of odoo"));
            assert_eq!(Neighbours::load(&dir).keys.len(), 2);
            let keys = crate::node::keys::Keys::load_or_make(&states).unwrap();
            assert_eq!(keys.mesh_public().unwrap().to_string(), "B07PggAHt1Z+blnesUGIXbtvHiydXHGEoaAWxICOiHk=");
            read::<State>(&dir.join("state.json"));
            // In etcd.
            read::<fleet::SlotRecord>(&dir.join("slot.json"));
            read::<fleet::Report>(&dir.join("report.json"));
            read::<fleet::UpdateLock>(&dir.join("turn.json"));
        }
    }

    #[test]
    fn damaged_neighbours_are_asked_for_again() {
        let dir = tempfile::tempdir().unwrap();
        let keys = BTreeMap::from([("hub-1".to_owned(), MeshKey([7; 32]))]);
        Neighbours::of(keys.clone(), BTreeSet::new(), BTreeMap::new()).store(dir.path()).unwrap();
        assert_eq!(Neighbours::load(dir.path()).keys, keys);
        fs::write(dir.path().join("neighbours.json"), "{").unwrap();
        assert_eq!(Neighbours::load(dir.path()).keys, BTreeMap::new());
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_panic(bytes: Vec<u8>) {
            let dir = tempfile::tempdir().unwrap();
            fs::write(dir.path().join("state.json"), bytes).unwrap();
            let _ = State::load(&StateDir::new(dir.path(), None));
        }
    }
}
