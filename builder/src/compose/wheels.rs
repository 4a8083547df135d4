//! Unpacks Python packages into the tree, after Debian's packages are configured.

use std::fs::{self, OpenOptions, Permissions};
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use super::job::WheelFile;
use super::unpack::Trimmer;
use crate::error::{Error, Result};
use crate::format::wheel::Wheel;
use crate::sandbox::Files;

/// Where Debian's Python looks for packages that are not part of Python.
const DIST_PACKAGES: &str = "usr/lib/python3/dist-packages";

/// Unpacks the wheels below `root`, each from the next of `files`.
pub(super) fn unpack(wheels: &[WheelFile], files: &Files, root: &Path, trim: &Trimmer) -> Result<()> {
    for wheel in wheels {
        let file = files.next().map_err(Error::cannot("open a wheel"))?;
        Wheel::read(file, &wheel.name, &wheel.sha256)?
            .files(|path, bytes| write(root, path, bytes, trim))
            .map_err(Error::at(wheel.name.clone()))?;
    }
    Ok(())
}

fn write(root: &Path, path: &str, bytes: &[u8], trim: &Trimmer) -> Result<()> {
    if trim.drops(&format!("/{DIST_PACKAGES}/{path}")) {
        return Ok(());
    }
    let full = root.join(DIST_PACKAGES).join(path);
    // Modes do not depend on the umask of the build.
    for folder in Path::new(path).ancestors().skip(1).collect::<Vec<_>>().into_iter().rev() {
        let folder = root.join(DIST_PACKAGES).join(folder);
        if !folder.exists() {
            fs::create_dir(&folder).map_err(Error::io("create", &folder))?;
            fs::set_permissions(&folder, Permissions::from_mode(0o755)).map_err(Error::io("change", &folder))?;
        }
    }
    // A file of another package stays: two packages with the same module are an error.
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(&full)
        .map_err(Error::cannot(format!("create /{DIST_PACKAGES}/{path}, which another package may have")))?;
    file.set_permissions(Permissions::from_mode(0o644)).map_err(Error::io("change", &full))?;
    file.write_all(bytes).map_err(Error::io("write", &full))
}
