//! An index of a layer's tar. It gives access to any file of the tree without unpacking the tar.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use tar::EntryType;

use crate::error::{Error, Result, fail};

/// Type and content of an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Node {
    /// A folder.
    Dir,
    /// Position in the tar, in bytes.
    File {
        /// Position of the content in the tar, in bytes.
        offset: u64,
        /// Size of the content in bytes.
        size: u64,
    },
    /// Target of a symbolic link.
    Link(String),
}

/// An entry of the tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Permissions.
    pub mode: u32,
    /// Number of the owner.
    pub uid: u32,
    /// Number of the owner's group.
    pub gid: u32,
    /// Kind and content.
    pub node: Node,
}

/// A tree. Paths are relative to the root, without a leading `/`. The path of the root is empty.
pub(crate) struct Tree {
    file: File,
    entries: BTreeMap<String, Entry>,
}

impl Tree {
    /// Opens a tar, and reads its headers.
    ///
    /// # Errors
    /// If the tar cannot be read.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        let mut entries: BTreeMap<String, Entry> = BTreeMap::new();
        let mut archive = tar::Archive::new(&file);
        for entry in archive.entries_with_seek().map_err(Error::io("read", path))? {
            let entry = entry.map_err(Error::io("read", path))?;
            let name =
                String::from_utf8_lossy(&entry.path_bytes()).trim_start_matches("./").trim_end_matches('/').to_owned();
            let header = entry.header();
            let number =
                |n: std::io::Result<u64>| n.map(|n| u32::try_from(n).unwrap_or(0)).map_err(Error::io("read", path));
            let target =
                || entry.link_name_bytes().map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default();
            let node = match header.entry_type() {
                EntryType::Directory => Node::Dir,
                EntryType::Symlink => Node::Link(target()),
                EntryType::Link => match entries.get(target().trim_start_matches("./")) {
                    Some(first) => first.node.clone(),
                    None => {
                        return fail(format!("{}: the target of the hard link {name} does not exist", path.display()));
                    }
                },
                _ => Node::File { offset: entry.raw_file_position(), size: entry.size() },
            };
            let new = Entry {
                mode: header.mode().map_err(Error::io("read", path))?,
                uid: number(header.uid())?,
                gid: number(header.gid())?,
                node,
            };
            entries.insert(name, new);
        }
        Ok(Self { file, entries })
    }

    /// Returns the entry of a path.
    #[must_use]
    pub(crate) fn get(&self, path: &str) -> Option<&Entry> {
        self.entries.get(path)
    }

    /// Returns the entries below a folder, sorted by path.
    pub(crate) fn below<'a>(&'a self, dir: &'a str) -> impl Iterator<Item = (&'a str, &'a Entry)> {
        let prefix = format!("{dir}/");
        self.entries
            .range(prefix.clone()..)
            .take_while(move |(p, _)| p.starts_with(&prefix))
            .map(|(p, e)| (p.as_str(), e))
    }

    /// Returns the content of a file.
    ///
    /// # Errors
    /// If the path is not a file, or the tar cannot be read.
    pub(crate) fn read(&self, path: &str) -> Result<Vec<u8>> {
        let Some(Entry { node: Node::File { offset, size }, .. }) = self.entries.get(path) else {
            return fail(format!("the image has no file /{path}"));
        };
        let mut bytes = vec![0; usize::try_from(*size).unwrap_or(usize::MAX)];
        self.file.read_exact_at(&mut bytes, *offset).map_err(Error::io("read", path))?;
        Ok(bytes)
    }

    /// Returns the content of a text file.
    ///
    /// # Errors
    /// As [`Tree::read`], or if the content is not UTF-8.
    pub(crate) fn read_text(&self, path: &str) -> Result<String> {
        String::from_utf8(self.read(path)?).map_err(|_| Error::Failed(format!("/{path} is not UTF-8 text")))
    }

    /// Follows symbolic links, and calls `on_link` with each. Returns the canonical path.
    pub(crate) fn resolve(&self, path: &str, on_link: &mut dyn FnMut(&str, &str)) -> Option<String> {
        let mut todo: Vec<String> = path.split('/').rev().filter(|p| !p.is_empty()).map(str::to_owned).collect();
        let mut done: Vec<String> = Vec::new();
        let mut hops = 0;
        while let Some(part) = todo.pop() {
            match part.as_str() {
                "." => continue,
                ".." => {
                    done.pop();
                    continue;
                }
                _ => done.push(part),
            }
            let here = done.join("/");
            match &self.entries.get(&here)?.node {
                Node::Link(target) => {
                    hops += 1;
                    if hops > 40 {
                        return None;
                    }
                    on_link(&here, target);
                    done.pop();
                    if target.starts_with('/') {
                        done.clear();
                    }
                    todo.extend(target.split('/').rev().filter(|p| !p.is_empty()).map(str::to_owned));
                }
                Node::Dir | Node::File { .. } => {}
            }
        }
        Some(done.join("/"))
    }

    /// Returns the ids in `etc/passwd` or `etc/group`, by name.
    ///
    /// # Errors
    /// If the file does not exist or cannot be read.
    pub(crate) fn ids(&self, file: &str) -> Result<BTreeMap<String, u32>> {
        let text = self.read_text(file)?;
        Ok(text
            .lines()
            .filter_map(|l| {
                let mut fields = l.split(':');
                Some((fields.next()?.to_owned(), fields.nth(1)?.parse().ok()?))
            })
            .collect())
    }
}
