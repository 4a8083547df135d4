//! What the installer trusts: a file of its own initrd.

use std::fs;
use std::path::Path;

use fleet::netboot::InstallerTrust;

use crate::error::{Error, Result};

/// Reads the file.
///
/// # Errors
/// There is no such file, or it is damaged.
pub(super) fn load(root: &Path) -> Result<InstallerTrust> {
    let path = root.join(InstallerTrust::PATH);
    let bytes = fs::read(&path).map_err(Error::io("read", &path))?;
    serde_json::from_slice(&bytes)
        .map_err(|e| Error::Configuration(format!("{}: {e}; start `bakehouse netboot` anew", path.display())))
}
