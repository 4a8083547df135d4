//! Codes that the operator read on a machine's console and confirmed: without one, no hub and no voter gets its
//! ticket. In a file, so that `bakehouse netboot --approve` reaches the server that runs.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use fleet::netboot::read_code;

use super::record::now;
use crate::error::{Error, Result};
use crate::util::fs::write_private;
use crate::util::json::pretty_json;

/// Codes that wait for their machine, at most; the oldest go first.
const WAITING: usize = 64;

/// Confirmed codes that no machine has used yet.
pub struct Approvals {
    path: PathBuf,
}

impl Approvals {
    /// Those of the folder with the server's records.
    #[must_use]
    pub fn new(dir: &Path) -> Self {
        Self { path: dir.join("approved.json") }
    }

    /// Confirms what the operator typed; returns the code as the machine shows it.
    ///
    /// # Errors
    /// It is not a code; the file can't be written.
    pub fn add(&self, typed: &str) -> Result<String> {
        let code = read_code(typed).ok_or_else(|| {
            Error::Usage(format!(
                "`{}` is not a code: the machine's console shows four groups of four letters and digits",
                typed.trim().escape_debug()
            ))
        })?;
        let mut codes = self.read()?;
        codes.insert(code.clone(), now());
        while codes.len() > WAITING {
            let Some(oldest) = codes.iter().min_by_key(|(_, at)| **at).map(|(code, _)| code.clone()) else { break };
            codes.remove(&oldest);
        }
        self.write(&codes)?;
        Ok(code)
    }

    /// Whether the operator confirmed this code.
    ///
    /// # Errors
    /// The file is damaged.
    pub fn has(&self, code: &str) -> Result<bool> {
        Ok(self.read()?.contains_key(code))
    }

    /// Takes a code that a machine has used.
    ///
    /// # Errors
    /// The file can't be written.
    pub fn remove(&self, code: &str) -> Result<()> {
        let mut codes = self.read()?;
        codes.remove(code);
        self.write(&codes)
    }

    /// Codes, and when they were confirmed in seconds since 1970.
    fn read(&self) -> Result<BTreeMap<String, u64>> {
        match fs::read(&self.path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|e| {
                Error::Failed(format!("{} is damaged ({e}); remove it and confirm again", self.path.display()))
            }),
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
        // Another process reads it.
        let server = Approvals::new(dir.path());
        assert!(server.has(&code).unwrap() && !server.has("0000-0000-0000-0000").unwrap());
        server.remove(&code).unwrap();
        assert!(!approvals.has(&code).unwrap());
        assert!(approvals.add("../../x").unwrap_err().to_string().contains("is not a code"));
    }

    #[test]
    fn there_is_a_bound() {
        let dir = tempfile::tempdir().unwrap();
        let approvals = Approvals::new(dir.path());
        for i in 0..WAITING + 10 {
            approvals.add(&format!("{i:016}")).unwrap();
        }
        assert_eq!(approvals.read().unwrap().len(), WAITING);
    }
}
