//! Reads Python packages
//! ([binary distribution format](https://packaging.python.org/en/latest/specifications/binary-distribution-format/)):
//! a zip with the files, and a list of their digests.

use std::collections::BTreeMap;
use std::io::{Cursor, Read};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sha2::{Digest as _, Sha256};
use zip::ZipArchive;

use crate::error::{Error, Result, fail};
use crate::util::digest::sha256;

/// Number of files in a wheel.
const MAX_FILES: usize = 100_000;
/// Size of all files of a wheel in bytes.
const MAX_BYTES: u64 = 2 << 30;

/// A wheel in memory, whose names are checked.
pub(crate) struct Wheel {
    archive: ZipArchive<Cursor<Vec<u8>>>,
    /// Digest and size of each file, by its path in the archive.
    record: BTreeMap<String, (String, u64)>,
}

impl Wheel {
    /// Reads a wheel from an open file. Verifies its sha256, and that its list has each of its files.
    ///
    /// # Errors
    /// If the file cannot be read, has another sha256, or is not a wheel.
    pub(crate) fn read(mut file: impl Read, name: &str, digest: &str) -> Result<Self> {
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(Error::cannot(format!("read {name}")))?;
        if sha256(&bytes) != digest {
            return fail(format!("{name} does not have the sha256 {digest}"));
        }
        Self::parse(bytes).map_err(Error::at(format!("{name} is not a wheel that an image can have")))
    }

    fn parse(bytes: Vec<u8>) -> Result<Self> {
        let mut archive = ZipArchive::new(Cursor::new(bytes)).map_err(Error::cannot("read the zip"))?;
        if archive.len() > MAX_FILES {
            return fail(format!("it has {} files, more than {MAX_FILES}", archive.len()));
        }
        let mut names: Vec<String> = Vec::new();
        for index in 0..archive.len() {
            let entry = archive.by_index_raw(index).map_err(Error::cannot("read the zip"))?;
            let name = entry.name().map_err(Error::cannot("read the zip"))?.into_owned();
            if entry.unix_mode().is_some_and(|mode| !matches!(mode & 0o170_000, 0 | 0o100_000 | 0o040_000)) {
                return fail(format!("{name} is a link or a device"));
            }
            if !entry.is_dir() {
                plain(&name)?;
                names.push(name);
            }
        }
        let lists: Vec<&String> = names.iter().filter(|n| n.ends_with(".dist-info/RECORD")).collect();
        let [list] = lists[..] else { return fail(format!("it has {} files RECORD", lists.len())) };
        let list = list.clone();
        let text = String::from_utf8(content(&mut archive, &list, MAX_BYTES)?).map_err(Error::at(list.clone()))?;
        let record = record(&text, &list)?;
        let total: u64 = record.values().map(|(_, size)| size).fold(0, |sum, size| sum.saturating_add(*size));
        if total > MAX_BYTES {
            return fail(format!("its files have {total} bytes, more than {MAX_BYTES}"));
        }
        let unsigned = |name: &&String| name.starts_with(&list);
        if let Some(extra) = names.iter().filter(|n| !unsigned(n)).find(|n| !record.contains_key(*n)) {
            return fail(format!("RECORD does not list {extra}"));
        }
        if let Some(missing) = record.keys().find(|listed| !names.contains(listed)) {
            return fail(format!("RECORD lists {missing}, which is not there"));
        }
        Ok(Self { archive, record })
    }

    /// Calls `use_file` with the path below `dist-packages` and the content of each file, sorted by path.
    ///
    /// # Errors
    /// If a file has another size or digest than RECORD has, or does not belong below `dist-packages`.
    pub(crate) fn files(mut self, mut use_file: impl FnMut(&str, &[u8]) -> Result<()>) -> Result<()> {
        for (name, (digest, size)) in &self.record {
            let bytes = content(&mut self.archive, name, *size)?;
            if bytes.len() as u64 != *size || URL_SAFE_NO_PAD.encode(Sha256::digest(&bytes)) != *digest {
                return fail(format!("{name} differs from its digest in RECORD"));
            }
            use_file(&installed(name)?, &bytes)?;
        }
        Ok(())
    }
}

/// Returns the content of a file, and fails if the file has more than `size` bytes.
fn content(archive: &mut ZipArchive<Cursor<Vec<u8>>>, name: &str, size: u64) -> Result<Vec<u8>> {
    let entry = archive.by_name(name).map_err(Error::cannot(format!("read {name}")))?;
    let mut bytes = Vec::new();
    entry.take(size.saturating_add(1)).read_to_end(&mut bytes).map_err(Error::cannot(format!("unpack {name}")))?;
    if bytes.len() as u64 > size {
        return fail(format!("{name} has more than {size} bytes"));
    }
    Ok(bytes)
}

/// Fails if a path is absolute, has an empty component, `.` or `..`, or characters that no file of Python code needs.
fn plain(path: &str) -> Result<()> {
    let bad = path.split('/').any(|part| matches!(part, "" | "." | ".."))
        || path.chars().any(|c| c == '\\' || c.is_control());
    if bad { fail(format!("`{}` is not a path inside the package", path.escape_debug())) } else { Ok(()) }
}

/// Parses RECORD: lines `path,sha256=digest,size`. The list itself has no digest.
fn record(text: &str, list: &str) -> Result<BTreeMap<String, (String, u64)>> {
    let mut all = BTreeMap::new();
    for line in text.lines().filter(|line| !line.is_empty()) {
        let invalid = || Error::Failed(format!("{list} has an invalid line: {}", line.escape_debug()));
        let mut fields = line.rsplitn(3, ',');
        let (size, digest, path) = (fields.next(), fields.next(), fields.next());
        let (Some(size), Some(digest), Some(path)) = (size, digest, path) else { return Err(invalid()) };
        // A path with a comma is quoted, and a quote in it doubled.
        let path = match path.strip_prefix('"').and_then(|p| p.strip_suffix('"')) {
            Some(quoted) => quoted.replace("\"\"", "\""),
            None => path.to_owned(),
        };
        if path.starts_with(list) {
            continue;
        }
        plain(&path)?;
        let digest = digest.strip_prefix("sha256=").ok_or_else(invalid)?.to_owned();
        let size = size.parse().map_err(|_| invalid())?;
        if all.insert(path.clone(), (digest, size)).is_some() {
            return fail(format!("{list} has {path} twice"));
        }
    }
    Ok(all)
}

/// Returns the path below `dist-packages`. A folder `NAME.data` holds files for several places.
fn installed(name: &str) -> Result<String> {
    let Some((top, rest)) = name.split_once('/') else { return Ok(name.to_owned()) };
    if !top.ends_with(".data") {
        return Ok(name.to_owned());
    }
    match rest.split_once('/') {
        Some(("purelib" | "platlib", path)) => Ok(path.to_owned()),
        _ => fail(format!("{name} does not belong to a Python module; images have no scripts and data of wheels")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use zip::ZipWriter;
    use zip::write::SimpleFileOptions;

    /// Returns a wheel with these files, and with RECORD unless `record` replaces it.
    pub(crate) fn wheel(files: &[(&str, &str)], record: Option<&str>) -> Vec<u8> {
        let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
        let mut list = String::new();
        for (name, text) in files {
            zip.start_file(*name, SimpleFileOptions::default()).unwrap();
            zip.write_all(text.as_bytes()).unwrap();
            let digest = URL_SAFE_NO_PAD.encode(Sha256::digest(text));
            list += &format!("{name},sha256={digest},{}\n", text.len());
        }
        list += "x-1.dist-info/RECORD,,\n";
        zip.start_file("x-1.dist-info/RECORD", SimpleFileOptions::default()).unwrap();
        zip.write_all(record.unwrap_or(&list).as_bytes()).unwrap();
        zip.finish().unwrap().into_inner()
    }

    fn read(bytes: &[u8]) -> Result<Vec<(String, Vec<u8>)>> {
        let mut all = Vec::new();
        Wheel::read(bytes, "x.whl", &sha256(bytes))?.files(|path, bytes| {
            all.push((path.to_owned(), bytes.to_vec()));
            Ok(())
        })?;
        Ok(all)
    }

    #[test]
    fn unpacks_sorted_files_and_merges_data() {
        let bytes = wheel(&[("x/b.py", "2"), ("x/a.py", "1"), ("x-1.data/purelib/x/c.py", "3")], None);
        let files = read(&bytes).unwrap();
        let paths: Vec<&str> = files.iter().map(|(path, _)| path.as_str()).collect();
        assert_eq!(paths, ["x/c.py", "x/a.py", "x/b.py"]);
        assert_eq!(files[1].1, b"1");
    }

    #[test]
    fn rejects_paths_that_escape() {
        for path in ["../x.py", "/etc/x", "x/../../y", "x//y", "a\\b", "x-1.data/scripts/x", "x-1.data/data/etc/y"] {
            let error = read(&wheel(&[(path, "1")], None)).unwrap_err().chain();
            assert!(error.contains("is not a path") || error.contains("does not belong"), "{path}: {error}");
        }
    }

    #[test]
    fn rejects_files_that_differ_from_the_record() {
        let one = [("x/a.py", "1")];
        let digest = URL_SAFE_NO_PAD.encode(Sha256::digest("1"));
        let cases = [
            ("x/a.py,sha256=AAAA,1\n".to_owned(), "differs from its digest"),
            (format!("x/a.py,sha256={digest},0\n"), "more than 0 bytes"),
            (format!("x/a.py,sha256={digest},1\nx/b.py,sha256={digest},1\n"), "which is not there"),
            (String::new(), "does not list x/a.py"),
            ("x/a.py\n".to_owned(), "invalid line"),
            (format!("x/a.py,sha256={digest},1\nx/a.py,sha256={digest},1\n"), "twice"),
        ];
        for (record, expected) in cases {
            let error = read(&wheel(&one, Some(&record))).unwrap_err().chain();
            assert!(error.contains(expected), "{record}: {error}");
        }
        let bytes = wheel(&one, None);
        assert!(Wheel::read(&bytes[..], "x.whl", &"0".repeat(64)).is_err());
    }
}
