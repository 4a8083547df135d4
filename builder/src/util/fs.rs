//! Writes files atomically, and files and folders that only their owner can read.

use std::fs::{self, DirBuilder, OpenOptions, Permissions};
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;

use tempfile::NamedTempFile;

use crate::error::{Error, Result};

/// Returns a path for messages: relative to the current directory if it is below, and without a leading `./`.
pub(crate) fn shown(path: &Path) -> String {
    let here = std::env::current_dir().ok();
    let relative = here.as_deref().and_then(|here| path.strip_prefix(here).ok()).unwrap_or(path);
    let plain = relative.strip_prefix(".").unwrap_or(relative);
    if plain.as_os_str().is_empty() { ".".to_owned() } else { plain.display().to_string() }
}

/// Writes a file atomically: writes a temporary file, syncs it, and renames it.
///
/// # Errors
/// If the file cannot be written.
pub(crate) fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = tempfile::Builder::new()
        .permissions(Permissions::from_mode(0o644))
        .tempfile_in(folder)
        .map_err(Error::io("write in", folder))?;
    file.write_all(bytes).and_then(|()| file.as_file().sync_all()).map_err(Error::io("write", path))?;
    file.persist(path).map_err(|e| Error::io("write", path)(e.error))?;
    Ok(())
}

/// Writes a file that only its owner can read, unless it exists. Returns whether it wrote the file.
pub(crate) fn write_new(path: &Path, bytes: &[u8]) -> Result<bool> {
    match private_beside(path, bytes)?.persist_noclobber(path) {
        Ok(_) => Ok(true),
        Err(e) if e.error.kind() == std::io::ErrorKind::AlreadyExists => Ok(false),
        Err(e) => Err(Error::io("write", path)(e.error)),
    }
}

/// Writes a file that only its owner can read, atomically.
pub(crate) fn write_private(path: &Path, bytes: &[u8]) -> Result<()> {
    private_beside(path, bytes)?.persist(path).map_err(|e| Error::io("write", path)(e.error))?;
    Ok(())
}

/// Appends a line to a file that only its owner can read, and syncs it.
pub(crate) fn append_line(path: &Path, line: &[u8]) -> Result<()> {
    let append = || {
        let mut file = OpenOptions::new().create(true).read(true).append(true).mode(0o600).open(path)?;
        let size = file.metadata()?.len();
        let mut last = [b'\n'];
        if size > 0 {
            file.read_exact_at(&mut last, size - 1)?;
        }
        // A power cut may have left an incomplete line. The new line must not become part of it.
        let before: &[u8] = if last == [b'\n'] { b"" } else { b"\n" };
        file.write_all(&[before, line, b"\n"].concat())?;
        file.sync_all()
    };
    append().map_err(Error::io("write", path))
}

/// Creates a folder that only its owner can enter, whatever the umask. Changes the mode of an existing folder.
///
/// # Errors
/// If the folder cannot be created, or belongs to another user.
pub(crate) fn private_dir(dir: &Path) -> Result<()> {
    if let Some(parent) = dir.parent() {
        fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
    }
    DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(Error::io("create", dir))?;
    fs::set_permissions(dir, Permissions::from_mode(0o700)).map_err(Error::io("make private", dir))
}

/// Writes a temporary file beside `path`, and syncs it. Only its owner can read it.
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
    fn paths_are_shown_relative_to_the_current_directory() {
        let here = std::env::current_dir().unwrap();
        for (path, text) in [
            (here.join("build/hub/x.raw"), "build/hub/x.raw"),
            (Path::new("./build/x.raw").to_owned(), "build/x.raw"),
            (Path::new("../acme/x").to_owned(), "../acme/x"),
            (Path::new("/dev/sdb").to_owned(), "/dev/sdb"),
            (here, "."),
        ] {
            assert_eq!(shown(&path), text);
        }
    }

    #[test]
    fn private_dir_changes_the_mode_of_an_existing_folder() {
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
