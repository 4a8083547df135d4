//! Writes the baked files as a tar.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::Path;

use tar::{Builder, EntryType, Header};

use crate::bake::{Baked, Content};
use crate::compose::tar_index::{Node, Tree};
use crate::error::{Error, Result, fail};

impl Baked {
    /// Writes the tar that is unpacked over the packages' tree. The tar has each folder with the owner and mode that
    /// the folder has in the tree; otherwise mkfs.erofs would give it defaults.
    ///
    /// # Errors
    /// If a parent of a path is not a folder, or the tar cannot be written.
    pub(crate) fn write_tar(&self, tree: &Tree, out: &Path) -> Result<()> {
        let mut dirs: BTreeMap<String, (u32, u32, u32)> = BTreeMap::new();
        for (path, entry) in &self.entries {
            let mut dir = path.as_str();
            while !dir.is_empty() {
                dir = dir.rsplit_once('/').map_or("", |(parent, _)| parent);
                let meta = match tree.get(dir) {
                    Some(e) if e.node == Node::Dir => (e.mode, e.uid, e.gid),
                    None if !self.entries.contains_key(dir) => (0o755, 0, 0),
                    _ => return fail(format!("{}: /{dir} is not a folder in the image", entry.origin)),
                };
                dirs.insert(dir.to_owned(), meta);
            }
        }
        let io = |e| Error::io("write", out)(e);
        let mut tar = Builder::new(BufWriter::new(File::create(out).map_err(io)?));
        let header = |kind: EntryType, mode: u32, uid: u32, gid: u32, size: u64| {
            let mut h = Header::new_gnu();
            h.set_entry_type(kind);
            h.set_mode(mode);
            h.set_uid(uid.into());
            h.set_gid(gid.into());
            h.set_mtime(0);
            h.set_size(size);
            h
        };
        for (dir, (mode, uid, gid)) in &dirs {
            let name = if dir.is_empty() { "./" } else { dir };
            let mut h = header(EntryType::Directory, *mode, *uid, *gid, 0);
            tar.append_data(&mut h, name, std::io::empty()).map_err(io)?;
        }
        for (path, e) in &self.entries {
            match &e.content {
                Content::File(bytes) => {
                    let mut h = header(EntryType::Regular, e.mode, e.uid, e.gid, bytes.len() as u64);
                    tar.append_data(&mut h, path, bytes.as_slice()).map_err(io)?;
                }
                Content::Link(target) => {
                    let mut h = header(EntryType::Symlink, 0o777, 0, 0, 0);
                    tar.append_link(&mut h, path, target).map_err(io)?;
                }
            }
        }
        let mut inner = tar.into_inner().map_err(io)?;
        inner.flush().map_err(io)
    }
}
