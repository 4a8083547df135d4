//! Python packages: `bakehouse lock` selects their wheels with pip, and `fetch` downloads them with pip. pip has the
//! host's settings for its index: `PIP_INDEX_URL`, `pip.conf`, proxy and certificates.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde::Deserialize;

use crate::error::{Error, Result, fail};
use crate::packages::lock::{Lock, LockedImage, Wheel};
use crate::progress::Progress;
use crate::store::{Kind, Store};
use crate::util::digest::sha256;

/// Returns the wheels of an image. pip takes no dependencies: an image has Debian's packages of them, or names them.
///
/// # Errors
/// If pip finds no wheel for the image's Python, or the image lacks what a wheel requires.
pub(crate) fn resolve(name: &str, image: &LockedImage, progress: &Progress) -> Result<Vec<Wheel>> {
    if image.wheels.is_empty() {
        return Ok(Vec::new());
    }
    let step = progress.step("lock", &format!("{name}: {} Python packages", image.wheels.len()));
    let target = Target::of(name, image)?;
    let dir = tempfile::tempdir().map_err(Error::cannot("create a temporary folder"))?;
    let report = dir.path().join("report.json");
    let mut command = pip("install");
    command.args(["--dry-run", "--ignore-installed", "--no-deps", "--only-binary=:all:", "--report"]).arg(&report);
    command.arg("--target").arg(dir.path().join("target"));
    command.args(target.arguments()).arg("--").args(&image.wheels);
    run(command).map_err(|e| {
        let fix = "check name and version of `wheels`; the index has to have a wheel for this Python (`pip index versions NAME`)";
        Error::Failed(format!("{name}: pip finds no wheel for Python {}: {e}\n  help: {fix}", target.python))
    })?;
    let text = fs::read(&report).map_err(Error::io("read", &report))?;
    let report: Report = serde_json::from_slice(&text).map_err(Error::cannot("read pip's report"))?;
    let mut wheels = report.install.iter().map(Install::wheel).collect::<Result<Vec<_>>>()?;
    wheels.sort_by(|a, b| a.name.cmp(&b.name));
    for install in &report.install {
        install.check_requirements(name, image)?;
    }
    let mut selected: Vec<String> = wheels.iter().map(Wheel::id).collect();
    selected.sort();
    if selected != image.wheels {
        let (selected, requested) = (selected.join(", "), image.wheels.join(", "));
        return fail(format!("{name}: pip selected {selected} for {requested}; write the versions as the index does"));
    }
    step.done(&format!("{name}: {} Python packages", wheels.len()));
    Ok(wheels)
}

/// Downloads the wheels that the store does not have. Returns their number.
///
/// # Errors
/// If pip cannot download a wheel, or the index has another file of its name.
pub(crate) fn fetch(wheels: &[&Wheel], lock: &Lock, store: &Store, progress: &Progress) -> Result<usize> {
    let mut fetched = 0;
    for wheel in wheels {
        let _guard = store.lock(Kind::Wheel, &wheel.sha256)?;
        if store.get(Kind::Wheel, &wheel.sha256).is_some() {
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
struct Target {
    /// Such as `3.13`.
    python: String,
    /// Minor version of glibc.
    glibc: u32,
}

impl Target {
    fn of(name: &str, image: &LockedImage) -> Result<Self> {
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

#[derive(Deserialize)]
struct Install {
    download_info: DownloadInfo,
    metadata: Metadata,
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
struct Metadata {
    name: String,
    version: String,
    #[serde(default)]
    requires_dist: Vec<String>,
}

impl Install {
    /// Returns the wheel without the address of the index.
    fn wheel(&self) -> Result<Wheel> {
        let file = self.download_info.url.rsplit('/').next().unwrap_or_default();
        let file = file.split(['#', '?']).next().unwrap_or_default().replace("%2B", "+");
        match self.download_info.archive_info.hash.strip_prefix("sha256=") {
            Some(hash) if file.ends_with(".whl") => Ok(Wheel {
                name: fleet::wheel_name(&self.metadata.name),
                version: self.metadata.version.clone(),
                file,
                sha256: hash.to_owned(),
            }),
            _ => fail(format!("the index has no sha256 for {file}")),
        }
    }

    /// Fails if the image lacks a package that the wheel always requires.
    fn check_requirements(&self, name: &str, image: &LockedImage) -> Result<()> {
        let always = self.metadata.requires_dist.iter().filter(|r| !r.contains(';'));
        for requirement in always {
            let end = requirement.find(|c: char| !(c.is_ascii_alphanumeric() || "._-".contains(c)));
            let needed = fleet::wheel_name(&requirement[..end.unwrap_or(requirement.len())]);
            let is_wheel = image.wheels.iter().any(|w| w.split("==").next() == Some(&needed));
            // Debian names the package of a module after it; Odoo's package has the version in its name.
            let is_package = image.packages.iter().filter_map(|p| p.split('=').next()).any(|p| {
                p == needed
                    || p.strip_prefix("python3-").is_some_and(|p| p == needed || p == needed.replace("python-", ""))
                    || p.strip_prefix(&needed)
                        .and_then(|v| v.strip_prefix('-'))
                        .is_some_and(|v| v.parse::<u32>().is_ok())
            });
            if !is_wheel && !is_package {
                return fail(format!(
                    "{name}: the wheel {} requires `{requirement}`, which the image lacks\n  help: add the package \
                     `python3-{needed}` to `packages`, or `{needed}==VERSION` to `wheels`",
                    self.metadata.name
                ));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(wheels: &[&str]) -> LockedImage {
        let packages = ["libc6=2.41-12", "odoo-19=19.0.0", "python3=3.13.5-1", "python3-lxml=5.4.0-1"];
        LockedImage {
            request: Vec::new(),
            packages: packages.map(str::to_owned).to_vec(),
            base: Vec::new(),
            wheels: wheels.iter().map(|w| (*w).to_owned()).collect(),
        }
    }

    fn install(requires: &[&str]) -> Install {
        let json = serde_json::json!({
            "download_info": {
                "url": "https://files.example/packages/ab/Plutoprint-0.23.0-py3-none-any.whl",
                "archive_info": { "hash": format!("sha256={}", "a".repeat(64)) },
            },
            "metadata": { "name": "Pluto_Print", "version": "0.23.0", "requires_dist": requires },
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
        let wheel = install(&[]).wheel().unwrap();
        assert_eq!((wheel.name.as_str(), wheel.file.as_str()), ("pluto-print", "Plutoprint-0.23.0-py3-none-any.whl"));
    }

    #[test]
    fn names_what_a_wheel_requires() {
        let image = image(&["a==1"]);
        for met in ["lxml>=5", "a", "odoo==19.0.*", "pytest; extra == \"test\""] {
            install(&[met]).check_requirements("app", &image).unwrap();
        }
        let error = install(&["phonenumbers (>=8)"]).check_requirements("app", &image).unwrap_err().to_string();
        assert!(error.contains("add the package `python3-phonenumbers`"), "{error}");
    }
}
