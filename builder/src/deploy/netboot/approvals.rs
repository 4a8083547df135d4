//! Codes that the operator read on machines' consoles and confirmed. The server gives a hub or a voter its ticket only
//! after that. The codes are in a file, through which `bakehouse netboot --approve` reaches a running server.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use fleet::netboot::read_code;

use super::record::now;
use crate::error::{Error, Result};
use crate::util::fs::write_private;
use crate::util::json::pretty_json;

/// Maximum number of confirmed codes. The oldest ones are removed first.
const MAX_CODES: usize = 64;

/// Confirmed codes that no machine has used.
pub(super) struct Approvals {
    path: PathBuf,
}

impl Approvals {
    /// Returns the codes in the folder of the server's records.
    #[must_use]
    pub(super) fn new(dir: &Path) -> Self {
        Self { path: dir.join("approved.json") }
    }

    /// Confirms a code that the operator typed. Returns the code in the format of the machine's console.
    ///
    /// # Errors
    /// If `typed` is not a code, or the file cannot be written.
    pub(super) fn add(&self, typed: &str) -> Result<String> {
        let code = read_code(typed).ok_or_else(|| {
            Error::Usage(format!(
                "`{}` is not a code: the machine's console shows four groups of four letters and digits",
                typed.trim().escape_debug()
            ))
        })?;
        let mut codes = self.read()?;
        codes.insert(code.clone(), now());
        while codes.len() > MAX_CODES {
            let Some(oldest) = codes.iter().min_by_key(|(_, at)| **at).map(|(code, _)| code.clone()) else { break };
            codes.remove(&oldest);
        }
        self.write(&codes)?;
        Ok(code)
    }

    /// Returns whether the operator confirmed this code.
    ///
    /// # Errors
    /// If the file cannot be read or parsed.
    pub(super) fn has(&self, code: &str) -> Result<bool> {
        Ok(self.read()?.contains_key(code))
    }

    /// Removes a code that a machine has used.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub(super) fn remove(&self, code: &str) -> Result<()> {
        let mut codes = self.read()?;
        codes.remove(code);
        self.write(&codes)
    }

    /// Returns the codes, with the time of their confirmation in seconds since 1970.
    fn read(&self) -> Result<BTreeMap<String, u64>> {
        match fs::read(&self.path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(Error::damaged(&self.path, "remove the file and confirm the codes again")),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(BTreeMap::new()),
            Err(e) => Err(Error::io("read", &self.path)(e)),
        }
    }

    fn write(&self, codes: &BTreeMap<String, u64>) -> Result<()> {
        write_private(&self.path, &pretty_json(codes)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_is_kept_until_a_machine_uses_it() {
        let dir = tempfile::tempdir().unwrap();
        let approvals = Approvals::new(dir.path());
        let code = approvals.add("0123 4567-89ab-cdef").unwrap();
        assert_eq!(code, "0123-4567-89AB-CDEF");
        // Another process reads the same file.
        let server = Approvals::new(dir.path());
        assert!(server.has(&code).unwrap() && !server.has("0000-0000-0000-0000").unwrap());
        server.remove(&code).unwrap();
        assert!(!approvals.has(&code).unwrap());
        assert!(approvals.add("../../x").unwrap_err().to_string().contains("is not a code"));
    }

    #[test]
    fn keeps_at_most_max_codes() {
        let dir = tempfile::tempdir().unwrap();
        let approvals = Approvals::new(dir.path());
        for i in 0..MAX_CODES + 10 {
            approvals.add(&format!("{i:016}")).unwrap();
        }
        assert_eq!(approvals.read().unwrap().len(), MAX_CODES);
    }
}
