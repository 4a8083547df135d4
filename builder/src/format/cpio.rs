//! Writes cpio archives in the `newc` format, as the kernel
//! [reads them](https://docs.kernel.org/driver-api/early-userspace/buffer-format.html).

use std::collections::BTreeMap;
use std::io::Write as _;

/// A file, folder or symbolic link of an archive.
pub(crate) struct File {
    /// Type and permissions, as in `st_mode`.
    mode: u32,
    /// Content of the file, or target of the link.
    content: Vec<u8>,
}

impl File {
    /// Returns a regular file.
    pub(crate) fn regular(mode: u32, content: Vec<u8>) -> Self {
        Self { mode: 0o100_000 | mode, content }
    }

    /// Returns a folder with the permissions 0755.
    pub(crate) fn dir() -> Self {
        Self { mode: 0o40_755, content: Vec::new() }
    }

    /// Returns a symbolic link.
    pub(crate) fn link(target: String) -> Self {
        Self { mode: 0o120_777, content: target.into_bytes() }
    }
}

/// Returns the archive. Times are zero and inodes are numbered in order, so that the same files give the same bytes.
pub(crate) fn cpio(files: &BTreeMap<String, File>) -> Vec<u8> {
    let mut out = Vec::new();
    let mut record = |inode: usize, name: &str, mode: u32, device: (u32, u32), content: &[u8]| {
        let _ = write!(
            out,
            "070701{inode:08X}{mode:08X}{:08X}{:08X}{:08X}{:08X}{:08X}{:08X}{:08X}{:08X}{:08X}{:08X}{:08X}{name}\0",
            0,
            0,
            1,
            0,
            content.len(),
            0,
            0,
            device.0,
            device.1,
            name.len() + 1,
            0
        );
        out.resize(out.len().next_multiple_of(4), 0);
        out.extend_from_slice(content);
        out.resize(out.len().next_multiple_of(4), 0);
    };
    for (i, (path, file)) in files.iter().enumerate() {
        record(i + 1, path, file.mode, (0, 0), &file.content);
    }
    record(files.len() + 1, "dev/console", 0o20_600, (5, 1), b"");
    record(0, "TRAILER!!!", 0, (0, 0), b"");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn archive_has_header_contents_and_trailer() {
        let files = BTreeMap::from([
            ("a".to_owned(), File::dir()),
            ("a/b".to_owned(), File::regular(0o640, b"hello".to_vec())),
            ("c".to_owned(), File::link("a/b".to_owned())),
        ]);
        let bytes = cpio(&files);
        assert_eq!(bytes.len() % 4, 0);
        assert_eq!(&bytes[..6], b"070701");
        assert!(bytes.windows(5).any(|w| w == b"hello"));
        assert!(bytes.windows(10).any(|w| w == b"TRAILER!!!"));
    }
}
