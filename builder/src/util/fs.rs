//! Files that are written whole or not at all, and files and folders that their owner alone reads.

use std::fs::{self, DirBuilder, Permissions};
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::Path;

use tempfile::NamedTempFile;

use crate::error::{Error, Result};

/// Writes a file whole or not at all: beside it, fsync, rename.
///
/// # Errors
/// The disk says no.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = tempfile::Builder::new()
        .permissions(Permissions::from_mode(0o644))
        .tempfile_in(folder)
        .map_err(Error::io("write in", folder))?;
    file.write_all(bytes).and_then(|()| file.as_file().sync_all()).map_err(Error::io("write", path))?;
    file.persist(path).map_err(|e| Error::io("write", path)(e.error))?;
    Ok(())
}

/// Writes a file that nobody else can read, unless there is one; says whether it did.
pub(crate) fn write_new(path: &Path, bytes: &[u8]) -> Result<bool> {
    match private_beside(path, bytes)?.persist_noclobber(path) {
        Ok(_) => Ok(true),
        Err(e) if e.error.kind() == std::io::ErrorKind::AlreadyExists => Ok(false),
        Err(e) => Err(Error::io("write", path)(e.error)),
    }
}

/// Writes a file that nobody else can read, whole or not at all.
pub(crate) fn write_private(path: &Path, bytes: &[u8]) -> Result<()> {
    private_beside(path, bytes)?.persist(path).map_err(|e| Error::io("write", path)(e.error))?;
    Ok(())
}

/// Makes a folder that its owner alone enters, or makes it so, whatever the umask.
///
/// # Errors
/// The folder can't be made, or belongs to another user.
pub(crate) fn private_dir(dir: &Path) -> Result<()> {
    if let Some(parent) = dir.parent() {
        fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
    }
    DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(Error::io("create", dir))?;
    fs::set_permissions(dir, Permissions::from_mode(0o700)).map_err(Error::io("make private", dir))
}

/// The bytes on the disk beside `path`, in a file that has no name of its own yet.
fn private_beside(path: &Path, bytes: &[u8]) -> Result<NamedTempFile> {
    let dir = path.parent().filter(|d| !d.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
    let mut file = NamedTempFile::new_in(dir).map_err(Error::io("write in", dir))?;
    file.write_all(bytes).and_then(|()| file.as_file().sync_all()).map_err(Error::io("write in", dir))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_private_folder_is_private_also_where_it_was_not() {
        let dir = tempfile::tempdir().unwrap();
        let (vm, new) = (dir.path().join("build/vm"), dir.path().join("build/vm/hub-1"));
        fs::create_dir_all(&vm).unwrap();
        fs::set_permissions(&vm, Permissions::from_mode(0o755)).unwrap();
        for path in [&vm, &new, &new] {
            private_dir(path).unwrap();
            assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o700, "{}", path.display());
        }
    }
}
