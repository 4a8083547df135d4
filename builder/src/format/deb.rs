//! Reads Debian packages ([deb(5)](https://manpages.debian.org/deb.5)): an ar archive of two tars.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use crate::error::{Error, Result, fail};
use crate::util::digest::sha256;

/// A package in memory, with its control member parsed.
pub struct Deb {
    /// Name of the package.
    pub name: String,
    /// The file `control`.
    pub control: String,
    /// Other files of the control member: mode and content by name.
    pub scripts: BTreeMap<String, (u32, Vec<u8>)>,
    /// Paths of the configuration files, each with a leading `/`.
    pub conffiles: Vec<String>,
    bytes: Vec<u8>,
    data: (String, std::ops::Range<usize>),
}

impl Deb {
    /// Reads a package, and verifies its sha256. Removes a file with another sha256.
    ///
    /// # Errors
    /// If the file cannot be read, has another sha256, or is not a package.
    pub fn open(path: &Path, digest: &str) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
        if sha256(&bytes) != digest {
            let _ = std::fs::remove_file(path);
            return fail(format!(
                "{} in the store was damaged and has been removed; run the build again",
                path.display()
            ));
        }
        Self::parse(bytes).map_err(Error::at(format!("{} is not a Debian package", path.display())))
    }

    /// Reads a package from an open file, and verifies its sha256.
    ///
    /// # Errors
    /// If the file cannot be read, has another sha256, or is not a package.
    pub fn read(mut file: impl Read, name: &str, digest: &str) -> Result<Self> {
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(Error::cannot(format!("read {name}")))?;
        if sha256(&bytes) != digest {
            return fail(format!("{name} does not have the sha256 {digest}"));
        }
        Self::parse(bytes).map_err(Error::at(format!("{name} is not a Debian package")))
    }

    /// Parses a package.
    ///
    /// # Errors
    /// If the bytes are not a package.
    pub fn parse(bytes: Vec<u8>) -> Result<Self> {
        let members = members(&bytes)?;
        let find = |prefix: &str| {
            members
                .iter()
                .find(|(n, _)| n.starts_with(prefix))
                .cloned()
                .ok_or_else(|| Error::Failed(format!("it has no {prefix}")))
        };
        let (control_name, control_range) = find("control.tar")?;
        let data = find("data.tar")?;
        let mut scripts = BTreeMap::new();
        let mut archive = tar::Archive::new(decoder(&control_name, &bytes[control_range.clone()])?);
        for entry in archive.entries().map_err(invalid)? {
            let mut entry = entry.map_err(invalid)?;
            if !entry.header().entry_type().is_file() {
                continue;
            }
            let name = String::from_utf8_lossy(&entry.path_bytes()).trim_start_matches("./").to_owned();
            let mode = entry.header().mode().map_err(invalid)?;
            let mut content = Vec::new();
            entry.read_to_end(&mut content).map_err(invalid)?;
            scripts.insert(name, (mode & 0o777, content));
        }
        drop(archive);
        let (_, control) =
            scripts.remove("control").ok_or_else(|| Error::Failed("it has no control file".to_owned()))?;
        let control = String::from_utf8(control).map_err(Error::at("its control file is not UTF-8"))?;
        let name = crate::format::deb822::field(&control, "Package")
            .ok_or_else(|| Error::Failed("its control file has no field `Package`".to_owned()))?
            .to_owned();
        // A line with a flag (`remove-on-upgrade`) does not start with `/`. dpkg removes these files on upgrades only.
        let conffiles = scripts
            .get("conffiles")
            .map(|(_, text)| {
                String::from_utf8_lossy(text)
                    .lines()
                    .filter(|l| l.starts_with('/'))
                    .map(|l| l.trim_end().to_owned())
                    .collect()
            })
            .unwrap_or_default();
        Ok(Self { name, control, scripts, conffiles, bytes, data })
    }

    /// Returns the package's files as a tar stream.
    ///
    /// # Errors
    /// If the compression is not supported.
    pub fn data(&self) -> Result<Box<dyn Read + '_>> {
        decoder(&self.data.0, &self.bytes[self.data.1.clone()])
    }

    /// Returns the name of the package's files in dpkg's database.
    #[must_use]
    pub fn info_name(&self) -> String {
        let get = |key| crate::format::deb822::field(&self.control, key).unwrap_or_default();
        if get("Multi-Arch") == "same" { format!("{}:{}", self.name, get("Architecture")) } else { self.name.clone() }
    }
}

/// Calls `each` for every entry of the data member, with the path as `/usr/bin/x`.
///
/// # Errors
/// If the tar is damaged, a path is invalid, or `each` fails.
pub fn data_entries(
    deb: &Deb,
    mut each: impl FnMut(&str, &mut tar::Entry<'_, Box<dyn Read + '_>>) -> Result<()>,
) -> Result<()> {
    let mut archive = tar::Archive::new(deb.data()?);
    for entry in archive.entries().map_err(invalid)? {
        let mut entry = entry.map_err(invalid)?;
        let raw = entry.path_bytes().into_owned();
        let raw = String::from_utf8(raw).map_err(Error::at("a file's name is not UTF-8"))?;
        let path = raw.trim_start_matches('.').trim_end_matches('/');
        if path.split('/').any(|part| part == "..") {
            return fail(format!("it has the invalid path {raw}"));
        }
        let path = if path.is_empty() { "/." } else { path };
        each(path, &mut entry)?;
    }
    Ok(())
}

/// Returns the error for a tar that cannot be read.
fn invalid(e: std::io::Error) -> Error {
    Error::cannot("read its tar")(e)
}

fn members(bytes: &[u8]) -> Result<Vec<(String, std::ops::Range<usize>)>> {
    let mut all = Vec::new();
    if !bytes.starts_with(b"!<arch>\n") {
        return fail("it is not an ar archive");
    }
    let mut at = 8;
    while let Some(header) = bytes.get(at..at + 60) {
        let text = |range: std::ops::Range<usize>| std::str::from_utf8(&header[range]).unwrap_or_default().trim();
        let name = text(0..16).trim_end_matches('/').to_owned();
        let size: usize = text(48..58).parse().map_err(Error::at("a member has no size"))?;
        let end = (at + 60)
            .checked_add(size)
            .filter(|e| *e <= bytes.len())
            .ok_or_else(|| Error::Failed("it is truncated".to_owned()))?;
        all.push((name, at + 60..end));
        at = end + (size & 1);
    }
    Ok(all)
}

fn decoder<'a>(name: &str, bytes: &'a [u8]) -> Result<Box<dyn Read + 'a>> {
    match name.rsplit('.').next() {
        Some("xz") => Ok(Box::new(liblzma::read::XzDecoder::new(bytes))),
        Some("zst") => Ok(Box::new(
            ruzstd::decoding::StreamingDecoder::new(bytes).map_err(Error::cannot(format!("unpack {name}")))?,
        )),
        Some("gz") => Ok(Box::new(flate2::read::GzDecoder::new(bytes))),
        Some("tar") => Ok(Box::new(bytes)),
        _ => fail(format!("the compression of {name} is not supported")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #[test]
        fn parse_never_panics(tail: Vec<u8>) {
            let _ = Deb::parse(tail.clone());
            let _ = Deb::parse([b"!<arch>\n".as_slice(), &tail].concat());
        }

        #[test]
        fn no_truncated_member_panics(size in 0u64..9_999_999_999, body: Vec<u8>) {
            let header = format!("{:<16}{:<12}{:<6}{:<6}{:<8}{size:<10}`\n", "control.tar", 0, 0, 0, 100_644);
            let _ = Deb::parse([b"!<arch>\n".as_slice(), header.as_bytes(), &body].concat());
        }
    }
}
