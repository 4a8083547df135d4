//! The server's records of machines, kept in a file so that a restarted server continues with them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, OpenOptions};
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use fleet::Ticket;
use fleet::netboot::Mac;
use fleet::netboot::ReportKey;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::util::fs::write_private;
use crate::util::json::pretty_json;

/// Boots of one machine whose news are believed; the oldest go first.
const REPORTERS: usize = 8;
/// Lines in the audit log that one machine may cause, in a run of the server.
const LINES: u32 = 1000;

/// A machine that has a ticket.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Record {
    /// Node or group.
    pub to: String,
    /// It has none after it was installed, until it is to be installed again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ticket: Option<Ticket>,
    /// When the ticket was minted, in seconds since 1970.
    pub minted: u64,
    /// When the machine had the node on its disk, in seconds since 1970.
    pub installed: Option<u64>,
    /// It was this node before, with keys that are gone.
    pub heir: bool,
    /// The machine's network cards.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub macs: BTreeSet<Mac>,
    /// The key that the operator confirmed, base64: a founder's ticket is sealed for no other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub confirmed: Option<String>,
    /// Whose news are believed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reporters: Vec<Reporter>,
    /// The machine entered its memory with this ticket.
    #[serde(default)]
    pub started: bool,
}

/// A boot of a machine that was given its ticket.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Reporter {
    /// The machine's key, base64.
    pub key: String,
    pub proof: ReportKey,
}

impl Record {
    pub(super) fn new(to: &str) -> Self {
        Self {
            to: to.to_owned(),
            ticket: None,
            minted: 0,
            installed: None,
            heir: false,
            macs: BTreeSet::new(),
            confirmed: None,
            reporters: Vec::new(),
            started: false,
        }
    }

    /// Believes news of the machine that a ticket was sealed for.
    pub(super) fn believe(&mut self, key: &str, proof: ReportKey) {
        self.reporters.retain(|r| r.key != key);
        self.reporters.push(Reporter { key: key.to_owned(), proof });
        let surplus = self.reporters.len().saturating_sub(REPORTERS);
        self.reporters.drain(..surplus);
    }
}

/// Records by the MAC address or serial number that `[netboot.machines]` has; those of `others` by their first MAC
/// address.
pub(super) struct Records {
    path: PathBuf,
    audit: PathBuf,
    pub all: BTreeMap<String, Record>,
    /// Lines that each caused.
    lines: BTreeMap<String, u32>,
}

impl Records {
    /// Reads those of a folder, which is made if it is missing.
    ///
    /// # Errors
    /// The file is damaged; the folder can't be made.
    pub(super) fn open(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
        let path = dir.join("machines.json");
        let all = match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|e| {
                Error::Failed(format!("{} is damaged ({e}); remove it to install all machines anew", path.display()))
            })?,
            Err(e) if e.kind() == ErrorKind::NotFound => BTreeMap::new(),
            Err(e) => return Err(Error::io("read", &path)(e)),
        };
        Ok(Self { path, audit: dir.join("audit.jsonl"), all, lines: BTreeMap::new() })
    }

    /// Writes all. There are tickets in it.
    ///
    /// # Errors
    /// The file can't be written.
    pub(super) fn store(&self) -> Result<()> {
        write_private(&self.path, &pretty_json(&self.all)?)
    }

    /// Adds a line to the audit log, unless this machine has caused too many.
    ///
    /// # Errors
    /// The file can't be written.
    pub(super) fn note(&mut self, name: &str, what: &str) -> Result<()> {
        let lines = self.lines.entry(name.to_owned()).or_default();
        if *lines >= LINES {
            return Ok(());
        }
        *lines += 1;
        let line = serde_json::json!({ "at": now(), "machine": name, "what": what });
        let file = OpenOptions::new().create(true).append(true).mode(0o600).open(&self.audit);
        file.and_then(|mut f| writeln!(f, "{line}")).map_err(Error::io("write", &self.audit))
    }
}

/// Seconds since 1970.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
