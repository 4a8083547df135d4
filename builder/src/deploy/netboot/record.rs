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

/// Maximum number of boots per machine from which the server accepts reports. The oldest ones are removed first.
const MAX_REPORTERS: usize = 8;
/// Maximum number of lines per machine in the audit log, per run of the server.
const MAX_LINES: u32 = 1000;

/// A machine that has a ticket.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Record {
    /// Node or group.
    pub to: String,
    /// The machine's ticket. `None` after the installation, until the operator requests another one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ticket: Option<Ticket>,
    /// Time of the minting, in seconds since 1970.
    pub minted: u64,
    /// Time of the installation on the disk, in seconds since 1970.
    pub installed: Option<u64>,
    /// Whether the machine was this node before, with keys that it has lost.
    pub heir: bool,
    /// MAC addresses of the machine's network cards.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub macs: BTreeSet<Mac>,
    /// Key that the operator confirmed, in base64. The server seals a founder's ticket only for this key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub confirmed: Option<String>,
    /// Boots from which the server accepts reports.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reporters: Vec<Reporter>,
    /// Whether the machine reported that it runs from memory with this ticket.
    #[serde(default)]
    pub started: bool,
}

/// A boot of a machine for which the server sealed the ticket.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Reporter {
    /// The machine's public key in base64.
    pub key: String,
    /// Key that verifies the machine's reports.
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

    /// Accepts reports from a boot for which the server sealed the ticket.
    pub(super) fn trust_reports(&mut self, key: &str, proof: ReportKey) {
        self.reporters.retain(|r| r.key != key);
        self.reporters.push(Reporter { key: key.to_owned(), proof });
        let surplus = self.reporters.len().saturating_sub(MAX_REPORTERS);
        self.reporters.drain(..surplus);
    }
}

/// Records of machines. The name of a record is the MAC address or serial number in `[netboot.machines]`, or the first
/// MAC address of a machine that only `others` matches.
pub(super) struct Records {
    path: PathBuf,
    audit_log: PathBuf,
    pub all: BTreeMap<String, Record>,
    /// Number of lines in the audit log, by record.
    lines: BTreeMap<String, u32>,
}

impl Records {
    /// Reads the records of a folder. Creates the folder if it does not exist.
    ///
    /// # Errors
    /// If the file cannot be read or parsed, or the folder cannot be created.
    pub(super) fn open(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
        let path = dir.join("machines.json");
        let all = match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(Error::damaged(&path, "remove the file to install all machines again"))?,
            Err(e) if e.kind() == ErrorKind::NotFound => BTreeMap::new(),
            Err(e) => return Err(Error::io("read", &path)(e)),
        };
        Ok(Self { path, audit_log: dir.join("audit.jsonl"), all, lines: BTreeMap::new() })
    }

    /// Writes all records to a private file, because they contain tickets.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub(super) fn store(&self) -> Result<()> {
        write_private(&self.path, &pretty_json(&self.all)?)
    }

    /// Adds a line to the audit log, unless this machine has reached its limit.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub(super) fn audit(&mut self, name: &str, what: &str) -> Result<()> {
        let lines = self.lines.entry(name.to_owned()).or_default();
        if *lines >= MAX_LINES {
            return Ok(());
        }
        *lines += 1;
        let line = serde_json::json!({ "at": now(), "machine": name, "what": what });
        let file = OpenOptions::new().create(true).append(true).mode(0o600).open(&self.audit_log);
        file.and_then(|mut f| writeln!(f, "{line}")).map_err(Error::io("write", &self.audit_log))
    }
}

/// Returns the seconds since 1970.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
