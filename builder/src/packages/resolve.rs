//! `bakehouse lock`: asks apt's own resolver, against an empty machine with our sources and
//! pins, what each image needs. apt verifies the archives' signatures.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::thread;

use crate::error::{Error, Result, fail};
use crate::format::deb822::{field, paragraphs};
use crate::packages::lock::{Lock, LockedImage, Package};
use crate::packages::mirror::Mirror;
use crate::packages::requests::{INITRD_PROVIDER, TOOLS, requests};
use crate::progress::Progress;
use crate::project::Project;
use crate::store::{Kind, Store};
use crate::util::digest::Key;

/// Resolves every image of the fleet.
///
/// # Errors
/// The archive can't be read or trusted, a package does not exist, a pin can't be met.
pub fn resolve(project: &Project, mirror: &Mirror, store: &Store, progress: &Progress) -> Result<Lock> {
    let apt = Apt::prepare(mirror, store)?;
    let step = progress.step("lock", "reading the archive");
    apt.update()?;
    let requests = requests(project);
    let base_request = project.fleet.groups.keys().next().map(|g| project.recipe(g).base_packages).unwrap_or_default();
    let mut asked = vec![("?essential", &[][..]), ("base", &base_request[..])];
    asked.extend(requests.iter().map(|(image, request)| (image.as_str(), &request[..])));
    step.message("resolving");
    let mut solved = apt.solve_all(&asked).into_iter();
    let mut next = || solved.next().unwrap_or_else(|| fail("apt was not asked"));
    let essential: BTreeSet<String> = next()?.into_iter().collect();
    let base: BTreeSet<String> = next()?.into_iter().collect();
    let mut images = BTreeMap::new();
    let mut wanted: BTreeSet<String> = BTreeSet::new();
    for (image, request) in &requests {
        let packages = next().map_err(|e| explain(project, image, request, e))?;
        wanted.extend(packages.iter().cloned());
        // The shared part is usable only where the image agrees with it in every version.
        let have: BTreeSet<&String> = packages.iter().collect();
        let shared = image != TOOLS && base.iter().all(|b| have.contains(b));
        let base = if shared { base.iter().cloned().collect() } else { Vec::new() };
        images.insert(image.clone(), LockedImage { request: request.clone(), packages, base });
    }
    step.message("reading package records");
    let (mut found, epoch) = apt.records(&wanted, mirror)?;
    for package in found.values_mut() {
        package.essential = essential.contains(&package.id());
    }
    if let Some(missing) = wanted.iter().find(|w| !found.contains_key(*w)) {
        return fail(format!("apt chose {missing}, which no index of the archive holds; try again later"));
    }
    step.done(&format!("{} packages in {} images", found.len(), images.len()));
    Ok(Lock { format: Lock::FORMAT, epoch, images, packages: found.into_values().collect(), digest: String::new() })
}

/// apt's words are about a package; the user wants to know which file asked for it.
fn explain(project: &Project, image: &str, request: &[String], e: Error) -> Error {
    let Error::Failed(words) = e else { return e };
    let Some(package) = request
        .iter()
        .find(|p| words.split(|c: char| c.is_whitespace() || "'’\"".contains(c)).any(|w| w == p.as_str()))
    else {
        return Error::Failed(words);
    };
    let asked = project
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
    Error::Failed(format!(
        "{words}\n`{package}` is asked for by {asked}: check its name, or add the `[[debian.sources]]` that has it"
    ))
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
                    "Package: {}\nPin: release n={suite}\nPin-Priority: 500\n\nPackage: *\nPin: release n={suite}\nPin-Priority: -1\n\n",
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
            "Dir \"{d}\";\nDir::State \"{d}/state\";\nDir::State::status \"{d}/status\";\nDir::Cache \"{d}/cache\";\nDir::Etc \"{d}/etc\";\n\
             Dir::Etc::parts \"{d}/etc/apt.conf.d\";\nDir::Etc::main \"{d}/none\";\nDir::Etc::sourcelist \"{d}/none\";\nDir::Log \"{d}/log\";\n\
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
            .map_err(|e| Error::Failed(format!("cannot run {program}: {e}; install apt (`make deps`)")))
    }

    fn update(&self) -> Result<()> {
        let output = self.run("apt-get", &["update", "-q", "-o", "APT::Update::Error-Mode=any"])?;
        if output.status.success() {
            return Ok(());
        }
        fail(format!(
            "the archive could not be read:\n{}check the mirror (`[debian] mirror` or --mirror) and its signing key",
            complaints(&output)
        ))
    }

    /// Answers for each request, as many at a time as there are processors.
    fn solve_all(&self, asked: &[(&str, &[String])]) -> Vec<Result<Vec<String>>> {
        let at_once = thread::available_parallelism().map_or(2, usize::from);
        let solve = |part: &[(&str, &[String])]| {
            thread::scope(|scope| {
                let running: Vec<_> = part.iter().map(|(what, r)| scope.spawn(|| self.solve(what, r))).collect();
                running.into_iter().map(|t| t.join().unwrap_or_else(|_| fail("a thread ended"))).collect::<Vec<_>>()
            })
        };
        asked.chunks(at_once).flat_map(solve).collect()
    }

    /// `name=version` of everything that has to be installed for `request`.
    fn solve(&self, what: &str, request: &[String]) -> Result<Vec<String>> {
        // What would be downloaded: a simulation (-s) asks for the same three times over.
        let mut args = vec!["install", "--print-uris", "-qq", "?essential"];
        args.extend(request.iter().map(String::as_str));
        let output = self.run("apt-get", &args)?;
        if !output.status.success() {
            return fail(format!("{what} can't be resolved:\n{}", complaints(&output)));
        }
        let text = String::from_utf8_lossy(&output.stdout);
        let read = |line| download(line).ok_or_else(|| Error::Failed(format!("apt said what is no package: {line}")));
        let mut all = text.lines().map(read).collect::<Result<Vec<String>>>()?;
        all.sort();
        Ok(all)
    }

    /// Records of the wanted packages from the indexes that apt has verified, by `name=version`;
    /// and the time of the newest Release file.
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

/// `'URI' name_version_arch.deb size hash` → `name=version`; a colon is written as `%3a`.
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
        if let Some(seconds) = field(&text, "Date").and_then(rfc2822_utc) {
            newest = newest.max(seconds);
        }
    }
    Ok(newest)
}

/// `Sat, 15 Nov 2025 10:15:00 UTC` in seconds since 1970.
fn rfc2822_utc(text: &str) -> Option<u64> {
    const MONTHS: &str = "JanFebMarAprMayJunJulAugSepOctNovDec";
    let mut words = text.split_once(", ")?.1.split(' ');
    let day: u64 = words.next()?.parse().ok()?;
    let month = MONTHS.find(words.next()?)? as u64 / 3 + 1;
    let year: u64 = words.next()?.parse().ok()?;
    let mut clock = words.next()?.split(':').map(|n| n.parse::<u64>().ok());
    let (h, m, s) = (clock.next()??, clock.next()??, clock.next()??);
    // Days since 1970 in the Gregorian calendar, with years that begin in March.
    let (y, m_from_march) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = 365 * y + y / 4 - y / 100 + y / 400 + (153 * m_from_march + 2) / 5 + day - 1;
    Some((days.checked_sub(719_468)?) * 86_400 + h * 3600 + m * 60 + s)
}

fn complaints(output: &Output) -> String {
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
    fn downloads() {
        let line = "'http://mirror/debian/pool/main/s/shadow/passwd_1%3a4.17.4-2_amd64.deb' passwd_1%3a4.17.4-2_amd64.deb 1 SHA256:0";
        assert_eq!(download(line).as_deref(), Some("passwd=1:4.17.4-2"));
        assert_eq!(download("Reading package lists..."), None);
    }

    #[test]
    fn release_dates() {
        assert_eq!(rfc2822_utc("Thu, 01 Jan 1970 00:00:00 UTC"), Some(0));
        assert_eq!(rfc2822_utc("Sat, 06 Sep 2025 10:15:02 UTC"), Some(1_757_153_702));
        assert_eq!(rfc2822_utc("Thu, 29 Feb 2024 23:59:59 UTC"), Some(1_709_251_199));
        assert_eq!(rfc2822_utc("nonsense"), None);
    }
}
