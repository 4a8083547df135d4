//! Packs a tree into a tar, and unpacks it. The same tree gives the same bytes: entries are sorted, times are zero,
//! owners are numbers.

use std::collections::BTreeMap;
use std::fs::{self, File, Permissions};
use std::io::{self, BufReader, BufWriter, Read, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, lchown, symlink};
use std::path::{Path, PathBuf};

use tar::{Builder, EntryType, Header};
use walkdir::WalkDir;

/// Extended attribute of file capabilities. Debian's packages use no other attribute.
const CAPABILITY: &str = "security.capability";
const PAX_CAPABILITY: &str = "SCHILY.xattr.security.capability";

/// Writes the tree. Returns the size in bytes and the number of its regular files.
pub(super) fn write(root: &Path, out: File) -> io::Result<(u64, u64)> {
    let mut tar = Builder::new(BufWriter::with_capacity(1 << 20, out));
    let mut links: BTreeMap<(u64, u64), PathBuf> = BTreeMap::new();
    let (mut bytes, mut files) = (0, 0);
    for entry in WalkDir::new(root).sort_by_file_name() {
        let entry = entry?;
        let path = entry.path().strip_prefix(root).map_err(io::Error::other)?;
        let meta = entry.path().symlink_metadata()?;
        let mut header = Header::new_gnu();
        header.set_mode(meta.mode() & 0o7777);
        header.set_uid(meta.uid().into());
        header.set_gid(meta.gid().into());
        header.set_mtime(0);
        header.set_size(0);
        let kind = meta.file_type();
        if kind.is_dir() {
            header.set_entry_type(EntryType::Directory);
            let name = if path.as_os_str().is_empty() { Path::new("./") } else { path };
            tar.append_data(&mut header, name, io::empty())?;
        } else if kind.is_symlink() {
            header.set_entry_type(EntryType::Symlink);
            let target = fs::read_link(entry.path())?;
            append_link(&mut tar, &mut header, path, &target)?;
        } else if kind.is_file() {
            if meta.nlink() > 1 {
                if let Some(first) = links.get(&(meta.dev(), meta.ino())) {
                    header.set_entry_type(EntryType::Link);
                    append_link(&mut tar, &mut header, path, first)?;
                    continue;
                }
                links.insert((meta.dev(), meta.ino()), path.to_owned());
            }
            if let Some(capability) = xattr::get(entry.path(), CAPABILITY).unwrap_or(None) {
                tar.append_pax_extensions([(PAX_CAPABILITY, capability.as_slice())])?;
            }
            header.set_entry_type(EntryType::Regular);
            header.set_size(meta.len());
            bytes += meta.len();
            files += 1;
            tar.append_data(&mut header, path, File::open(entry.path())?)?;
        }
        // Sockets and pipes are left out: maintainer scripts left them behind, and no image needs them.
    }
    tar.into_inner()?.into_inner().map_err(io::IntoInnerError::into_error)?.flush()?;
    Ok((bytes, files))
}

/// Keeps the target byte for byte; the `tar` crate would normalise `a//b` and `./a`.
fn append_link(tar: &mut Builder<impl io::Write>, header: &mut Header, path: &Path, target: &Path) -> io::Result<()> {
    if target.as_os_str().len() <= 100 && path.as_os_str().len() <= 100 {
        header.set_path(path)?;
        header.set_link_name_literal(target.as_os_str().as_bytes())?;
        header.set_cksum();
        tar.append(header, io::empty())
    } else {
        tar.append_link(header, path, target)
    }
}

/// Unpacks a tar that [`write`] has written into an empty `root`.
pub(super) fn read(tar: File, root: &Path) -> io::Result<()> {
    unpack(tar, root, false)
}

/// Unpacks a tar over a tree. Its files replace existing ones.
pub(super) fn read_onto(tar: File, root: &Path) -> io::Result<()> {
    unpack(tar, root, true)
}

fn unpack(tar: File, root: &Path, replace: bool) -> io::Result<()> {
    let mut archive = tar::Archive::new(BufReader::with_capacity(1 << 20, tar));
    for entry in archive.entries()? {
        let mut entry = entry?;
        let path = entry.path()?.into_owned();
        let full = root.join(&path);
        let header = entry.header();
        let (mode, uid, gid) = (header.mode()?, id(header.uid()?)?, id(header.gid()?)?);
        if replace && !header.entry_type().is_dir() && full.symlink_metadata().is_ok() {
            fs::remove_file(&full)?;
        }
        match header.entry_type() {
            EntryType::Directory => {
                if full != root.join("./") && !(replace && full.is_dir()) {
                    fs::create_dir(&full)?;
                }
                chown(&full, Some(uid), Some(gid))?;
                fs::set_permissions(&full, Permissions::from_mode(mode))?;
            }
            EntryType::Symlink => {
                symlink(link_target(&entry)?, &full)?;
                lchown(&full, Some(uid), Some(gid))?;
            }
            EntryType::Link => fs::hard_link(root.join(link_target(&entry)?), &full)?,
            _ => {
                let capability = capability(&mut entry)?;
                let mut file = File::create_new(&full)?;
                io::copy(&mut entry, &mut file)?;
                if (uid, gid) != (0, 0) {
                    std::os::unix::fs::fchown(&file, Some(uid), Some(gid))?;
                }
                file.set_permissions(Permissions::from_mode(mode))?;
                if let Some(value) = capability {
                    xattr::set(&full, CAPABILITY, &value)?;
                }
            }
        }
    }
    Ok(())
}

fn capability<R: Read>(entry: &mut tar::Entry<'_, R>) -> io::Result<Option<Vec<u8>>> {
    let Some(extensions) = entry.pax_extensions()? else { return Ok(None) };
    for extension in extensions {
        let extension = extension?;
        if extension.key() == Ok(PAX_CAPABILITY) {
            return Ok(Some(extension.value_bytes().to_vec()));
        }
    }
    Ok(None)
}

fn link_target<R: Read>(entry: &tar::Entry<'_, R>) -> io::Result<PathBuf> {
    let bytes = entry.link_name_bytes().ok_or_else(|| io::Error::other("a link without a target"))?;
    Ok(PathBuf::from(std::ffi::OsStr::from_bytes(&bytes)))
}

fn id(n: u64) -> io::Result<u32> {
    u32::try_from(n).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packing_an_unpacked_tree_gives_the_same_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        let long = "d".repeat(90);
        fs::create_dir_all(a.join(&long).join("e".repeat(90))).unwrap();
        fs::create_dir(&b).unwrap();
        for tree in [&a, &b] {
            fs::set_permissions(tree, Permissions::from_mode(0o755)).unwrap();
        }
        let deep = a.join(&long).join("e".repeat(90)).join("file");
        fs::write(&deep, "text").unwrap();
        fs::set_permissions(&deep, Permissions::from_mode(0o4711)).unwrap();
        fs::hard_link(&deep, a.join("hard")).unwrap();
        symlink("./x//y", a.join("soft")).unwrap();
        symlink("t".repeat(150), a.join("far")).unwrap();
        let (one, two) = (dir.path().join("1.tar"), dir.path().join("2.tar"));
        write(&a, File::create(&one).unwrap()).unwrap();
        read(File::open(&one).unwrap(), &b).unwrap();
        write(&b, File::create(&two).unwrap()).unwrap();
        assert_eq!(fs::read(&one).unwrap(), fs::read(&two).unwrap());
        assert_eq!(fs::read_link(b.join("soft")).unwrap(), Path::new("./x//y"));
        assert_eq!(fs::metadata(b.join("hard")).unwrap().mode() & 0o7777, 0o4711);
        assert_eq!(fs::metadata(b.join("hard")).unwrap().nlink(), 2);
    }
}
