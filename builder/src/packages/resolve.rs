//! `bakehouse lock`: runs apt's resolver for each image, with the fleet's sources and pins and without any installed
//! package. apt verifies the archives' signatures.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::thread;

use crate::error::{Error, Result, fail};
use crate::format::deb822::{field, paragraphs};
use crate::packages::lock::{Lock, LockedImage, Package, Wheel};
use crate::packages::mirror::Mirror;
use crate::packages::requests::{INITRD_PROVIDER, TOOLS, requests, wheel_requests};
use crate::packages::wheels;
use crate::progress::Progress;
use crate::project::Project;
use crate::store::{Kind, Store};
use crate::util::digest::Key;
use crate::util::time::rfc2822;

/// Resolves every image of the fleet.
///
/// # Errors
/// If the archive cannot be read or verified, a package does not exist, or apt cannot satisfy a pin.
pub(crate) fn resolve(project: &Project, mirror: &Mirror, store: &Store, progress: &Progress) -> Result<Lock> {
    let apt = Apt::prepare(mirror, store)?;
    let step = progress.step("lock", "reading the archive");
    apt.update()?;
    let requests = requests(project);
    let base_request = project.fleet.groups.keys().next().map(|g| project.recipe(g).base_packages).unwrap_or_default();
    let mut asked = vec![("?essential", &[][..]), ("base", &base_request[..])];
    asked.extend(requests.iter().map(|(image, request)| (image.as_str(), &request[..])));
    step.message("resolving");
    let mut solved = apt.solve_all(&asked).into_iter();
    let mut next = || solved.next().unwrap_or_else(|| fail("apt returned too few results"));
    let essential: BTreeSet<String> = next()?.into_iter().collect();
    let base: BTreeSet<String> = next()?.into_iter().collect();
    let mut images = BTreeMap::new();
    let mut wanted_wheels = wheel_requests(project);
    let mut wanted: BTreeSet<String> = BTreeSet::new();
    for (image, request) in &requests {
        let packages = next().map_err(|e| explain(project, image, request, e))?;
        wanted.extend(packages.iter().cloned());
        // An image can start from the shared base only if it has the same versions of all its packages.
        let have: BTreeSet<&String> = packages.iter().collect();
        let shared = image != TOOLS && base.iter().all(|b| have.contains(b));
        let base = if shared { base.iter().cloned().collect() } else { Vec::new() };
        let wheels = wanted_wheels.remove(image).unwrap_or_default();
        images.insert(image.clone(), LockedImage { request: request.clone(), packages, base, wheels });
    }
    step.message("reading package records");
    let (mut found, epoch) = apt.records(&wanted, mirror)?;
    for package in found.values_mut() {
        package.essential = essential.contains(&package.id());
    }
    if let Some(missing) = wanted.iter().find(|w| !found.contains_key(*w)) {
        return fail(format!("apt selected {missing}, which no index of the archive has; try again later"));
    }
    step.done(&format!("{} packages in {} images", found.len(), images.len()));
    let mut wheels: BTreeSet<Wheel> = BTreeSet::new();
    for (name, image) in &images {
        wheels.extend(wheels::resolve(name, image, progress)?);
    }
    let (packages, wheels) = (found.into_values().collect(), wheels.into_iter().collect());
    Ok(Lock { format: Lock::FORMAT, epoch, images, packages, wheels, digest: String::new() })
}

/// Adds the file that requests a package to apt's error about that package.
fn explain(project: &Project, image: &str, request: &[String], e: Error) -> Error {
    let Error::Apt { what, output } = e else { return e };
    let Some(package) = request
        .iter()
        .find(|p| output.split(|c: char| c.is_whitespace() || "'’\"".contains(c)).any(|w| w == p.as_str()))
    else {
        return Error::Apt { what, output };
    };
    let source = project
        .fleet
        .groups
        .get(image)
        .filter(|g| g.packages.contains(package))
        .map(|_| format!("[groups.{image}] in {}", project.fleet.source.name))
        .or_else(|| {
            let role = project
                .profiles
                .iter()
                .find(|(_, p)| p.packages.contains(package) || p.hardware.values().any(|v| v.contains(package)))?;
            Some(format!("profiles/roles/{}.toml", role.0))
        })
        .unwrap_or_else(|| "bakehouse itself".to_owned());
    let fix = format!("{source} requests `{package}`: check its name, or add the `[[debian.sources]]` that has it");
    Error::Apt { what, output: format!("{output}\n  help: {fix}") }
}

struct Apt {
    dir: PathBuf,
    _guard: crate::store::Guard,
}

impl Apt {
    fn prepare(mirror: &Mirror, store: &Store) -> Result<Self> {
        let mut key = Key::new("apt-1");
        for (name, uri) in &mirror.archives {
            key.add(name, uri);
        }
        for source in &mirror.sources {
            key.add("source", format!("{source:?}"));
        }
        let key = key.finish();
        let guard = store.lock(Kind::Apt, &key)?;
        let dir = store.path(Kind::Apt, &key);
        let write = |name: &str, text: &str| -> Result<()> {
            let path = dir.join(name);
            let folder = path.parent().unwrap_or(&dir);
            fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
            fs::write(&path, text).map_err(Error::io("write", &path))
        };
        let mut sources = String::new();
        let mut preferences = String::new();
        for s in &mirror.sources {
            let uri = &mirror.archives[&s.archive];
            let check = if s.check_valid_until { "" } else { "Check-Valid-Until: no\n" };
            let _ = write!(
                sources,
                "Types: deb\nURIs: {uri}\nSuites: {}\nComponents: {}\nSigned-By: {}\n{check}\n",
                s.suite,
                s.components.join(" "),
                s.keyring
            );
            if !s.only.is_empty() {
                let _ = write!(
                    preferences,
                    "Package: {}\nPin: release n={suite}\nPin-Priority: 500\n\n\
                     Package: *\nPin: release n={suite}\nPin-Priority: -1\n\n",
                    s.only.join(" "),
                    suite = s.suite
                );
            }
        }
        write("etc/sources.list.d/bakehouse.sources", &sources)?;
        write("etc/preferences", &preferences)?;
        write("status", INITRD_PROVIDER)?;
        for folder in ["state/lists/partial", "cache/archives/partial", "etc/apt.conf.d", "etc/preferences.d"] {
            let path = dir.join(folder);
            fs::create_dir_all(&path).map_err(Error::io("create", &path))?;
        }
        let d = dir.display();
        let mut conf = format!(
            "Dir \"{d}\";\nDir::State \"{d}/state\";\nDir::State::status \"{d}/status\";\n\
             Dir::Cache \"{d}/cache\";\nDir::Etc \"{d}/etc\";\nDir::Etc::parts \"{d}/etc/apt.conf.d\";\n\
             Dir::Etc::main \"{d}/none\";\nDir::Etc::sourcelist \"{d}/none\";\nDir::Log \"{d}/log\";\n\
             APT::Architecture \"amd64\";\nAPT::Architectures {{ \"amd64\"; }};\nAPT::Install-Recommends \"false\";\n\
             APT::Get::AllowUnauthenticated \"false\";\nAPT::Sandbox::User \"root\";\nAcquire::Languages \"none\";\n\
             Acquire::ForceHash \"SHA256\";\nAcquire::GzipIndexes \"false\";\nAcquire::Retries \"3\";\n\
             // Otherwise apt itself counts as essential.\npkgCacheGen::ForceEssential \",\";\n"
        );
        for line in &mirror.acquire {
            conf.push_str(line);
            conf.push('\n');
        }
        write("apt.conf", &conf)?;
        Ok(Self { dir, _guard: guard })
    }

    fn run(&self, program: &str, args: &[&str]) -> Result<Output> {
        Command::new(program)
            .args(args)
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("LC_ALL", "C.UTF-8")
            .env("APT_CONFIG", self.dir.join("apt.conf"))
            .output()
            .map_err(Error::cannot(format!("run {program}\n  help: install apt (`make deps`)")))
    }

    fn update(&self) -> Result<()> {
        let output = self.run("apt-get", &["update", "-q", "-o", "APT::Update::Error-Mode=any"])?;
        if output.status.success() {
            return Ok(());
        }
        fail(format!(
            "cannot read the archive:\n{}check the mirror (`[debian] mirror` or --mirror) and its signing key",
            errors(&output)
        ))
    }

    /// Resolves each request, as many in parallel as there are processors.
    fn solve_all(&self, requests: &[(&str, &[String])]) -> Vec<Result<Vec<String>>> {
        let parallel = thread::available_parallelism().map_or(2, usize::from);
        let solve = |part: &[(&str, &[String])]| {
            thread::scope(|scope| {
                let running: Vec<_> = part.iter().map(|(what, r)| scope.spawn(|| self.solve(what, r))).collect();
                running.into_iter().map(|t| t.join().unwrap_or_else(|_| fail("a thread panicked"))).collect::<Vec<_>>()
            })
        };
        requests.chunks(parallel).flat_map(solve).collect()
    }

    /// Returns `name=version` of all packages that `request` needs.
    fn solve(&self, what: &str, request: &[String]) -> Result<Vec<String>> {
        // `--print-uris` takes a third of the time of a simulation (`-s`).
        let mut args = vec!["install", "--print-uris", "-qq", "?essential"];
        args.extend(request.iter().map(String::as_str));
        let output = self.run("apt-get", &args)?;
        if !output.status.success() {
            return Err(Error::Apt { what: what.to_owned(), output: errors(&output) });
        }
        let text = String::from_utf8_lossy(&output.stdout);
        let read =
            |line| download(line).ok_or_else(|| Error::Failed(format!("unexpected line in apt's output: {line}")));
        let mut all = text.lines().map(read).collect::<Result<Vec<String>>>()?;
        all.sort();
        Ok(all)
    }

    /// Returns the records of the wanted packages, by `name=version`, from the indexes that apt has verified. Also
    /// returns the date of the newest Release file in seconds since 1970.
    fn records(&self, wanted: &BTreeSet<String>, mirror: &Mirror) -> Result<(BTreeMap<String, Package>, u64)> {
        let names: BTreeSet<&str> = wanted.iter().filter_map(|w| w.split('=').next()).collect();
        let output = self.run(
            "apt-get",
            &["indextargets", "--format", "$(FILENAME)\t$(RELEASE)\t$(REPO_URI)", "Created-By: Packages"],
        )?;
        let targets = String::from_utf8_lossy(&output.stdout).into_owned();
        let mut found = BTreeMap::new();
        for line in targets.lines() {
            let [file, suite, uri] = line.split('\t').collect::<Vec<_>>()[..] else { continue };
            let Some((archive, _)) = mirror.archives.iter().find(|(_, base)| *base == uri.trim_end_matches('/')) else {
                continue;
            };
            let text = fs::read_to_string(file).map_err(Error::io("read", file))?;
            for p in paragraphs(&text) {
                let Some(name) = p.strip_prefix("Package: ").and_then(|r| r.lines().next()) else { continue };
                if !names.contains(name) {
                    continue;
                }
                let Some(package) = record(p, name, suite, archive) else { continue };
                let id = package.id();
                if wanted.contains(&id) {
                    found.entry(id).or_insert(package);
                }
            }
        }
        Ok((found, newest_release(&self.dir.join("state/lists"))?))
    }
}

/// Parses `'URI' name_version_arch.deb size hash`. Returns `name=version`. apt writes a colon as `%3a`.
fn download(line: &str) -> Option<String> {
    let mut parts = line.split("' ").nth(1)?.split(' ').next()?.splitn(3, '_');
    let (name, version) = (parts.next()?, parts.next()?);
    Some(format!("{name}={}", version.replace("%3a", ":")))
}

fn record(paragraph: &str, name: &str, suite: &str, archive: &str) -> Option<Package> {
    Some(Package {
        name: name.to_owned(),
        version: field(paragraph, "Version")?.to_owned(),
        arch: field(paragraph, "Architecture")?.to_owned(),
        suite: suite.to_owned(),
        archive: archive.to_owned(),
        path: field(paragraph, "Filename")?.to_owned(),
        sha256: field(paragraph, "SHA256")?.to_owned(),
        size: field(paragraph, "Size")?.parse().ok()?,
        installed_size: field(paragraph, "Installed-Size").and_then(|s| s.parse().ok()).unwrap_or(0),
        essential: false,
    })
}

fn newest_release(lists: &Path) -> Result<u64> {
    let mut newest = 0;
    for entry in fs::read_dir(lists).map_err(Error::io("list", lists))? {
        let path = entry.map_err(Error::io("list", lists))?.path();
        if !path.to_string_lossy().ends_with("Release") {
            continue;
        }
        let text = fs::read_to_string(&path).map_err(Error::io("read", &path))?;
        if let Some(seconds) = field(&text, "Date").and_then(rfc2822) {
            newest = newest.max(seconds);
        }
    }
    Ok(newest)
}

/// Returns the errors and warnings in apt's output.
fn errors(output: &Output) -> String {
    let both = [&output.stdout[..], &output.stderr[..]].concat();
    let text = String::from_utf8_lossy(&both).into_owned();
    let mut lines: Vec<&str> = text
        .lines()
        .filter(|l| l.starts_with("E:") || l.starts_with("W:") || l.starts_with(' ') || l.starts_with("Err"))
        .take(20)
        .collect();
    lines.dedup();
    lines.iter().fold(String::new(), |all, l| all + "  " + l.trim_end() + "\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_uri_lines() {
        let line = "'http://mirror/debian/pool/main/s/shadow/passwd_1%3a4.17.4-2_amd64.deb' \
                    passwd_1%3a4.17.4-2_amd64.deb 1 SHA256:0";
        assert_eq!(download(line).as_deref(), Some("passwd=1:4.17.4-2"));
        assert_eq!(download("Reading package lists..."), None);
    }
}
