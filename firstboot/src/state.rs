//! What a node keeps of itself, in `/var/lib/bakehouse/state.json`: written whole or not at
//! all, readable by root only.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use fleet::{Membership, Ticket};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::image::Image;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// Format of the file.
    pub version: u16,
    pub fleet: String,
    /// The slot this node holds.
    pub slot: String,
    pub epoch: u64,
    pub membership: Membership,
}

/// Where the state lives.
pub struct StateFile(PathBuf);

impl StateFile {
    #[must_use]
    pub fn in_dir(dir: &Path) -> Self {
        Self(dir.join("state.json"))
    }

    /// # Errors
    /// It is there and can't be read: never mistaken for a new node.
    pub fn load(&self) -> Result<Option<State>> {
        let bytes = match fs::read(&self.0) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::io("read", &self.0)(e)),
        };
        let state: State = serde_json::from_slice(&bytes).map_err(|e| {
            Error::Configuration(format!(
                "{} is damaged: {e}; restore it, or wipe /var and give the node a new ticket",
                self.0.display()
            ))
        })?;
        if state.version != State::VERSION {
            return Err(Error::Configuration(format!(
                "{} has format {}, this agent reads {}; boot the image that wrote it",
                self.0.display(),
                state.version,
                State::VERSION
            )));
        }
        Ok(Some(state))
    }

    /// # Errors
    /// The disk says no; what was there before still is.
    pub fn store(&self, state: &State) -> Result<()> {
        let mut bytes = serde_json::to_vec_pretty(state).unwrap_or_default();
        bytes.push(b'\n');
        write_atomic(&self.0, &bytes)
    }
}

impl State {
    pub const VERSION: u16 = 1;

    /// Takes a ticket, if it is for this fleet and this image.
    ///
    /// # Errors
    /// It is not, with what it is for.
    pub fn from_ticket(ticket: &Ticket, image: &Image) -> Result<Self> {
        let wrong =
            |why: String| Error::Configuration(format!("the ticket is {why}; mint one with `bakehouse ticket`"));
        if ticket.fleet != image.topology.name {
            return Err(wrong(format!("of the fleet `{}`, this image is of `{}`", ticket.fleet, image.topology.name)));
        }
        let Some(node) = image.topology.node(&ticket.slot) else {
            return Err(wrong(format!("for the slot `{}`, which this fleet does not have", ticket.slot)));
        };
        if node.group != image.info.group {
            return Err(wrong(format!(
                "for the slot `{}`, this image is for the group `{}`",
                ticket.slot, image.info.group
            )));
        }
        Ok(Self {
            version: Self::VERSION,
            fleet: ticket.fleet.clone(),
            slot: ticket.slot.clone(),
            epoch: ticket.epoch,
            membership: ticket.membership.clone(),
        })
    }
}

/// Write beside, fsync, rename, fsync the folder: a power cut leaves the old or the new.
///
/// # Errors
/// The disk says no.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let dir = path.parent().unwrap_or(Path::new("/"));
    let beside = path.with_extension("new");
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&beside)
        .map_err(Error::io("create", &beside))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(Error::io("write", &beside))?;
    fs::rename(&beside, path).map_err(Error::io("rename", &beside))?;
    File::open(dir).and_then(|d| d.sync_all()).map_err(Error::io("sync", dir))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::ImageInfo;
    use fleet::{Fleet, Topology};
    use std::os::unix::fs::PermissionsExt;

    fn image() -> Image {
        let toml = b"name = \"acme\"\n[groups]\nhub.count = 3\ndb.count = 2\n";
        let topology = Topology::of(&Fleet::parse("f", toml).unwrap());
        let info =
            ImageInfo { id: "acme-hub".into(), version: "1".into(), group: "hub".into(), roles: vec!["hub".into()] };
        Image { info, topology }
    }

    #[test]
    fn a_ticket_must_fit_fleet_slot_and_image() {
        let take =
            |fleet: &str, slot: &str| State::from_ticket(&Ticket::founder(fleet, slot, Membership::sample()), &image());
        assert_eq!(take("acme", "hub-2").unwrap().slot, "hub-2");
        for (fleet, slot, words) in [
            ("other", "hub-1", "of the fleet `other`"),
            ("acme", "hub-9", "does not have"),
            ("acme", "db-1", "for the group `hub`"),
        ] {
            let e = take(fleet, slot).unwrap_err();
            assert_eq!(e.exit_code(), 78);
            assert!(e.to_string().contains(words), "{e}");
        }
    }

    #[test]
    fn state_is_kept_and_private() {
        let dir = tempfile::tempdir().unwrap();
        let file = StateFile::in_dir(dir.path());
        assert_eq!(file.load().unwrap(), None);
        let state = State::from_ticket(&Ticket::founder("acme", "hub-1", Membership::sample()), &image()).unwrap();
        file.store(&state).unwrap();
        assert_eq!(file.load().unwrap(), Some(state));
        let mode = fs::metadata(dir.path().join("state.json")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn half_a_write_beside_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let file = StateFile::in_dir(dir.path());
        let state = State::from_ticket(&Ticket::founder("acme", "hub-1", Membership::sample()), &image()).unwrap();
        file.store(&state).unwrap();
        fs::write(dir.path().join("state.new"), b"{\"ver").unwrap();
        assert_eq!(file.load().unwrap(), Some(state.clone()));
        file.store(&state).unwrap();
        assert_eq!(file.load().unwrap(), Some(state));
    }

    #[test]
    fn damaged_or_newer_state_is_not_a_new_node() {
        let dir = tempfile::tempdir().unwrap();
        for text in ["", "{", "{\"version\":2,\"fleet\":\"a\",\"slot\":\"b-1\",\"epoch\":1}"] {
            fs::write(dir.path().join("state.json"), text).unwrap();
            assert_eq!(StateFile::in_dir(dir.path()).load().unwrap_err().exit_code(), 78);
        }
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_panic(bytes: Vec<u8>) {
            let dir = tempfile::tempdir().unwrap();
            fs::write(dir.path().join("state.json"), bytes).unwrap();
            let _ = StateFile::in_dir(dir.path()).load();
        }
    }
}
