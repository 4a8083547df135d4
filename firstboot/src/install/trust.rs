//! Trust of the installer: a file of its initrd.

use std::fs;
use std::path::Path;

use fleet::netboot::InstallerTrust;

use crate::error::{Error, Result};

/// Reads the file.
///
/// # Errors
/// If the file is missing or damaged.
pub(super) fn load(root: &Path) -> Result<InstallerTrust> {
    let path = root.join(InstallerTrust::PATH);
    let bytes = fs::read(&path).map_err(Error::io("read", &path))?;
    let fix = "start `bakehouse netboot` again";
    serde_json::from_slice(&bytes).map_err(|e| Error::Unusable { path, fix, source: e.into() })
}
