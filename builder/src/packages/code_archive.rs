//! Reads the files of a `.tar.gz`, such as the releases of Odoo.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use flate2::read::GzDecoder;
use tar::Archive;

use crate::error::{Error, Result, fail};
use crate::util::digest::sha256;

/// Size of all files in bytes.
const MAX_BYTES: u64 = 2 << 30;
/// Number of files.
const MAX_FILES: usize = 100_000;

/// Returns the files below `folder` of an archive, without the archive's one folder. `location` is an address, or a path
/// relative to `dir`.
///
/// # Errors
/// If the archive cannot be read, has another sha256, or lacks the folder.
pub(super) fn files(
    location: &str,
    digest: &str,
    folder: &str,
    dir: &Path,
    scratch: &Path,
) -> Result<BTreeMap<String, Vec<u8>>> {
    let is_address = location.starts_with("https://") || location.starts_with("http://");
    let path = if is_address { download(location, scratch)? } else { dir.join(location) };
    let bytes = fs::read(&path).map_err(Error::io("read", &path))?;
    if sha256(&bytes) != digest {
        return fail(format!(
            "{location} has the sha256 {}, and fleet.toml names {digest}\n  help: check where the file comes from",
            sha256(&bytes)
        ));
    }
    let mut archive = Archive::new(GzDecoder::new(&bytes[..]).take(MAX_BYTES));
    let failed = || Error::cannot(format!("read {location}"));
    let mut all = BTreeMap::new();
    for entry in archive.entries().map_err(failed())? {
        let mut entry = entry.map_err(failed())?;
        // Links are no part of add-ons.
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let path = entry.path().map_err(failed())?.to_string_lossy().into_owned();
        let mut content = Vec::new();
        entry.read_to_end(&mut content).map_err(failed())?;
        all.insert(path.trim_start_matches("./").to_owned(), content);
        if all.len() > MAX_FILES {
            return fail(format!("{location} has more than {MAX_FILES} files"));
        }
    }
    let all = without_top(all);
    if folder.is_empty() {
        return Ok(all);
    }
    let prefix = format!("{folder}/");
    let inner = all.into_iter().filter_map(|(path, bytes)| Some((path.strip_prefix(&prefix)?.to_owned(), bytes)));
    let inner: BTreeMap<_, _> = inner.collect();
    if inner.is_empty() {
        return fail(format!("{location} has no folder `{folder}`\n  help: check `folder`"));
    }
    Ok(inner)
}

/// Removes the folder that all files are in, such as `odoo-19.0`.
fn without_top(all: BTreeMap<String, Vec<u8>>) -> BTreeMap<String, Vec<u8>> {
    let first = all.keys().next().and_then(|path| path.split_once('/')).map(|(top, _)| format!("{top}/"));
    match first {
        // A folder with a manifest is an add-on.
        Some(top) if all.keys().all(|p| p.starts_with(&top)) && !all.contains_key(&format!("{top}__manifest__.py")) => {
            all.into_iter().map(|(path, bytes)| (path[top.len()..].to_owned(), bytes)).collect()
        }
        _ => all,
    }
}

/// Downloads a file with apt, which has the host's settings for proxies, certificates and passwords.
fn download(url: &str, scratch: &Path) -> Result<PathBuf> {
    let path = scratch.join("archive");
    let mut command = Command::new("/usr/lib/apt/apt-helper");
    let output = command.args(["-qq", "download-file", url]).arg(&path).output();
    let output = output.map_err(Error::cannot("run apt-helper\n  help: install apt"))?;
    if output.status.success() {
        return Ok(path);
    }
    let text = String::from_utf8_lossy(&output.stderr);
    fail(format!("cannot download {url}: {}", text.lines().next().unwrap_or_default().trim_start_matches("E: ")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::Compression;
    use flate2::write::GzEncoder;

    fn archive(files: &[(&str, &str)]) -> Vec<u8> {
        let mut tar = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
        for (path, text) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(text.len() as u64);
            header.set_mode(0o644);
            tar.append_data(&mut header, path, text.as_bytes()).unwrap();
        }
        tar.into_inner().unwrap().finish().unwrap()
    }

    #[test]
    fn reads_an_archive_with_one_folder() {
        let dir = tempfile::tempdir().unwrap();
        let bytes = archive(&[("odoo-19.0/odoo/release.py", "r"), ("odoo-19.0/addons/web/x.py", "w")]);
        fs::write(dir.path().join("odoo.tar.gz"), &bytes).unwrap();
        let read = |digest: &str, folder: &str| files("odoo.tar.gz", digest, folder, dir.path(), dir.path());
        let digest = sha256(&bytes);
        let all = read(&digest, "").unwrap();
        assert_eq!(all.keys().collect::<Vec<_>>(), ["addons/web/x.py", "odoo/release.py"]);
        assert_eq!(read(&digest, "addons").unwrap()["web/x.py"], b"w");
        assert!(read(&digest, "none").unwrap_err().to_string().contains("no folder `none`"));
        assert!(read(&"0".repeat(64), "").unwrap_err().to_string().contains("fleet.toml names 0000"));
    }

    #[test]
    fn an_archive_may_have_addons_at_its_top() {
        let dir = tempfile::tempdir().unwrap();
        let bytes = archive(&[("a/__manifest__.py", "{}"), ("b/__manifest__.py", "{}")]);
        fs::write(dir.path().join("x.tar.gz"), &bytes).unwrap();
        assert_eq!(files("x.tar.gz", &sha256(&bytes), "", dir.path(), dir.path()).unwrap().len(), 2);
        let bytes = archive(&[("a/__manifest__.py", "{}"), ("a/x.py", "")]);
        fs::write(dir.path().join("y.tar.gz"), &bytes).unwrap();
        assert!(files("y.tar.gz", &sha256(&bytes), "", dir.path(), dir.path()).unwrap().contains_key("a/x.py"));
    }
}
