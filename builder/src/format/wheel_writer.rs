//! Makes wheels: a zip with the files and a list of their digests. The same files give the same bytes.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{Cursor, Write as _};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sha2::{Digest as _, Sha256};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, DateTime, ZipWriter};

use crate::error::{Error, Result};

/// Returns a wheel for every Python. `files` have paths below `dist-packages`. The zip is not compressed: what a compressor
/// writes depends on its version.
///
/// # Errors
/// If the files are too many or too large for a zip.
pub(crate) fn write_wheel(name: &str, version: &str, files: &BTreeMap<String, Vec<u8>>) -> Result<Vec<u8>> {
    let info = format!("{}-{version}.dist-info", name.replace('-', "_"));
    let metadata = format!("Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n");
    let wheel = "Wheel-Version: 1.0\nGenerator: bakehouse\nRoot-Is-Purelib: true\nTag: py3-none-any\n";
    let own = BTreeMap::from([
        (format!("{info}/METADATA"), metadata.into_bytes()),
        (format!("{info}/WHEEL"), wheel.as_bytes().to_vec()),
    ]);
    let options = SimpleFileOptions::default()
        .compression_method(CompressionMethod::Stored)
        .last_modified_time(DateTime::default())
        .unix_permissions(0o644);
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    let mut record = String::new();
    let what = format!("make the wheel of {name}");
    for (path, bytes) in files.iter().chain(&own) {
        zip.start_file(path.as_str(), options).map_err(Error::cannot(&what))?;
        zip.write_all(bytes).map_err(Error::cannot(&what))?;
        let digest = URL_SAFE_NO_PAD.encode(Sha256::digest(bytes));
        let _ = writeln!(record, "{},sha256={digest},{}", quoted(path), bytes.len());
    }
    let list = format!("{info}/RECORD");
    let _ = writeln!(record, "{list},,");
    zip.start_file(list.as_str(), options).map_err(Error::cannot(&what))?;
    zip.write_all(record.as_bytes()).map_err(Error::cannot(&what))?;
    Ok(zip.finish().map_err(Error::cannot(&what))?.into_inner())
}

/// Returns a field of a CSV.
fn quoted(path: &str) -> String {
    if path.contains([',', '"']) { format!("\"{}\"", path.replace('"', "\"\"")) } else { path.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::super::wheel::Wheel;
    use super::*;
    use crate::util::digest::sha256;

    #[test]
    fn a_written_wheel_can_be_read_and_never_changes() {
        let files = BTreeMap::from([
            ("odoo/addons/a/__manifest__.py".to_owned(), b"{}".to_vec()),
            ("odoo/addons/a/static/a,\"b.txt".to_owned(), b"x".repeat(70_000)),
        ]);
        let bytes = write_wheel("odoo-repository-x", "0+0123", &files).unwrap();
        let digest = sha256(&bytes);
        let mut found = BTreeMap::new();
        let wheel = Wheel::read(&bytes[..], "x", &digest).unwrap();
        wheel
            .files(|path, bytes| {
                found.insert(path.to_owned(), bytes.to_vec());
                Ok(())
            })
            .unwrap();
        assert_eq!(found.len(), 4);
        assert!(files.iter().all(|(path, bytes)| found[path] == *bytes));
        // Locks have this digest: a change of the format needs a new version of the lock.
        assert_eq!(digest, "9b6a3c67396052ae376a871a8ce291f34bd359af1ad37f38e7609fe1da9d45c2");
    }
}
