//! pip selects the wheels of Python packages for `bakehouse lock`, and downloads them for `fetch`. It has the host's
//! settings for its index: `PIP_INDEX_URL`, `pip.conf`, proxy and certificates.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use serde::Deserialize;

use crate::error::{Error, Result, fail};
use crate::packages::lock::{Lock, LockedImage, Wheel};
use crate::packages::odoo_code;
use crate::progress::Progress;
use crate::project::Project;
use crate::store::{Kind, Store};
use crate::util::digest::sha256;

/// Returns the newest wheels for the image's Python that meet requirements, without what the wheels require.
///
/// # Errors
/// If pip finds no wheel for one of the requirements.
pub(super) fn select(requirements: &[String], target: &Target) -> Result<Vec<Install>, String> {
    let failed = |e: Error| e.to_string();
    let dir = tempfile::tempdir().map_err(|e| format!("cannot create a temporary folder: {e}"))?;
    let report = dir.path().join("report.json");
    let mut command = pip("install");
    command.args(["--dry-run", "--ignore-installed", "--no-deps", "--only-binary=:all:", "--report"]).arg(&report);
    command.arg("--target").arg(dir.path().join("target"));
    command.args(target.arguments()).arg("--").args(requirements);
    run(command)?;
    let text = fs::read(&report).map_err(|e| failed(Error::io("read", &report)(e)))?;
    let report: Report = serde_json::from_slice(&text).map_err(|e| format!("cannot read pip's report: {e}"))?;
    Ok(report.install)
}

/// Downloads the wheels that the store does not have. Returns their number.
///
/// # Errors
/// If pip cannot download a wheel, or the index has another file of its name.
pub(crate) fn fetch(
    wheels: &[&Wheel],
    project: &Project,
    lock: &Lock,
    store: &Store,
    progress: &Progress,
) -> Result<usize> {
    let (mut fetched, code) = (0, odoo_code::named(project));
    for wheel in wheels {
        let _guard = store.lock(Kind::Wheel, &wheel.sha256)?;
        if store.get(Kind::Wheel, &wheel.sha256).is_some() {
            continue;
        }
        if let Some(code) = code.iter().find(|code| code.id() == wheel.id()) {
            odoo_code::fetch(code, wheel, project, store, progress)?;
            fetched += 1;
            continue;
        }
        let Some((name, image)) = lock.images.iter().find(|(_, image)| image.wheels.contains(&wheel.id())) else {
            continue;
        };
        let target = Target::of(name, image)?;
        let step = progress.step("fetch", &wheel.file);
        let scratch = store.scratch(Kind::Wheel, &wheel.sha256);
        fs::create_dir_all(&scratch).map_err(Error::io("create", &scratch))?;
        let result = download(wheel, &target, &scratch).and_then(|path| store.put(Kind::Wheel, &wheel.sha256, &path));
        let _ = fs::remove_dir_all(&scratch);
        let size = fs::metadata(result?).map_or(0, |m| m.len());
        step.done(&format!("{}, {:.1} MB", wheel.file, size as f64 / 1e6));
        fetched += 1;
    }
    Ok(fetched)
}

fn download(wheel: &Wheel, target: &Target, dir: &Path) -> Result<std::path::PathBuf> {
    let list = dir.join("requirements.txt");
    let line = format!("{} --hash=sha256:{}\n", wheel.id(), wheel.sha256);
    fs::write(&list, line).map_err(Error::io("write", &list))?;
    let mut command = pip("download");
    command.args(["--no-deps", "--only-binary=:all:", "--require-hashes"]).arg("--dest").arg(dir);
    command.args(target.arguments());
    command.arg("--requirement").arg(&list);
    let help = "the index no longer has this file: run `bakehouse lock --update`, or set another index (PIP_INDEX_URL)";
    run(command).map_err(|e| Error::Failed(format!("cannot download {}: {e}\n  help: {help}", wheel.file)))?;
    let path = dir.join(&wheel.file);
    let bytes = fs::read(&path).map_err(Error::io("read", &path))?;
    if sha256(&bytes) != wheel.sha256 {
        return fail(format!("{} has sha256 {}, but the lock has {}", wheel.file, sha256(&bytes), wheel.sha256));
    }
    Ok(path)
}

/// Returns a command that runs pip.
fn pip(verb: &str) -> Command {
    let mut command = Command::new("python3");
    command.args(["-m", "pip", verb, "--quiet", "--no-input", "--disable-pip-version-check"]);
    command
}

/// Runs pip, and returns its last error.
fn run(mut command: Command) -> Result<(), String> {
    let fix = "install python3-pip (`make deps`)";
    let output = command.output().map_err(|e| format!("cannot run python3: {e}; {fix}"))?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    if text.contains("No module named pip") {
        return Err(format!("python3 has no pip; {fix}"));
    }
    let errors: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("ERROR: ")).collect();
    Err(errors.last().map_or_else(|| text.trim().to_owned(), |last| (*last).to_owned()))
}

/// The Python of an image, for which pip selects wheels.
pub(super) struct Target {
    /// Such as `3.13`.
    pub(super) python: String,
    /// Minor version of glibc.
    pub(super) glibc: u32,
}

impl Target {
    pub(super) fn of(name: &str, image: &LockedImage) -> Result<Self> {
        let numbers = |package: &str| -> Option<(u32, u32)> {
            let id = image.packages.iter().find_map(|id| id.strip_prefix(package)?.strip_prefix('='))?;
            let mut parts = id.split(|c: char| !c.is_ascii_digit());
            Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
        };
        let (Some(python), Some(glibc)) = (numbers("python3"), numbers("libc6")) else {
            return fail(format!("{name} has `wheels`, but no Python; add the package `python3`"));
        };
        Ok(Self { python: format!("{}.{}", python.0, python.1), glibc: glibc.1 })
    }

    /// pip does not know that a newer glibc runs the wheels of an older one, if it selects for another machine.
    fn arguments(&self) -> Vec<String> {
        let platforms = (5..=self.glibc).rev().map(|minor| format!("manylinux_2_{minor}_x86_64"));
        let older = ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"];
        let platforms = platforms.chain(older.map(str::to_owned)).flat_map(|p| ["--platform".to_owned(), p]);
        platforms.chain(["--python-version".to_owned(), self.python.clone()]).collect()
    }
}

#[derive(Deserialize)]
struct Report {
    install: Vec<Install>,
}

/// A wheel that pip selected.
#[derive(Deserialize)]
pub(super) struct Install {
    download_info: DownloadInfo,
    pub(super) metadata: Metadata,
}

#[derive(Deserialize)]
struct DownloadInfo {
    url: String,
    archive_info: ArchiveInfo,
}

#[derive(Deserialize)]
struct ArchiveInfo {
    /// `sha256=…`. Every pip with reports writes it.
    hash: String,
}

#[derive(Deserialize)]
pub(super) struct Metadata {
    name: String,
    version: String,
    #[serde(default)]
    pub(super) requires_dist: Vec<String>,
}

impl Install {
    /// Returns the wheel without the address of the index.
    pub(super) fn wheel(&self) -> Result<Wheel> {
        let file = self.download_info.url.rsplit('/').next().unwrap_or_default();
        let file = file.split(['#', '?']).next().unwrap_or_default().replace("%2B", "+");
        match self.download_info.archive_info.hash.strip_prefix("sha256=") {
            Some(hash) if file.ends_with(".whl") => Ok(Wheel {
                name: fleet::wheel_name(&self.metadata.name),
                version: self.metadata.version.clone(),
                file,
                sha256: hash.to_owned(),
                addons: BTreeMap::new(),
            }),
            _ => fail(format!("the index has no sha256 for {file}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(wheels: &[&str]) -> LockedImage {
        let packages = ["libc6=2.41-12", "odoo-19=19.0.0", "python3=3.13.5-1", "python3-lxml=5.4.0-1"];
        LockedImage {
            packages: packages.map(str::to_owned).to_vec(),
            wheels: wheels.iter().map(|w| (*w).to_owned()).collect(),
            ..LockedImage::default()
        }
    }

    fn install() -> Install {
        let json = serde_json::json!({
            "download_info": {
                "url": "https://files.example/packages/ab/Plutoprint-0.23.0-py3-none-any.whl",
                "archive_info": { "hash": format!("sha256={}", "a".repeat(64)) },
            },
            "metadata": { "name": "Pluto_Print", "version": "0.23.0" },
        });
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn selects_for_the_image_not_for_the_host() {
        let target = Target::of("app", &image(&["x==1"])).unwrap();
        let arguments = target.arguments();
        assert_eq!(arguments[1], "manylinux_2_41_x86_64");
        assert_eq!(arguments[arguments.len() - 2..], ["--python-version", "3.13"]);
        let mut other = image(&["x==1"]);
        other.packages.retain(|p| !p.starts_with("python3="));
        assert!(Target::of("app", &other).err().unwrap().to_string().contains("add the package `python3`"));
    }

    #[test]
    fn lock_has_no_address() {
        let wheel = install().wheel().unwrap();
        assert_eq!((wheel.name.as_str(), wheel.file.as_str()), ("pluto-print", "Plutoprint-0.23.0-py3-none-any.whl"));
    }
}
