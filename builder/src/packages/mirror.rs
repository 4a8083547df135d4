//! The source of packages: `[debian]` in `fleet.toml`, else the host's apt configuration.

use std::collections::BTreeMap;
use std::process::Command;

use crate::error::{Error, Result, fail};
use crate::project::Project;

/// An apt source: a suite of an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AptSource {
    /// Name of the archive that paths in the lock are relative to.
    pub archive: String,
    /// Suite, such as `trixie`.
    pub suite: String,
    /// Components, such as `main`.
    pub components: Vec<String>,
    /// Path of the keyring that verifies the Release file.
    pub keyring: String,
    /// If not empty, apt takes only these packages from the source.
    pub only: Vec<String>,
    /// Whether the Release file must not have expired.
    pub check_valid_until: bool,
}

/// Archives and their sources.
#[derive(Clone, Debug, Default)]
pub struct Mirror {
    /// Archive → base URI without a trailing `/`.
    pub archives: BTreeMap<String, String>,
    /// The sources, in the order of `sources.list`.
    pub sources: Vec<AptSource>,
    /// The host's `Acquire::…` settings for its mirror.
    pub acquire: Vec<String>,
}

const DEBIAN_KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

impl Mirror {
    /// Selects the mirror: `--mirror`, then `[debian]`, then the host's apt.
    ///
    /// # Errors
    /// If none of them has a Debian archive, or a source's key cannot be read.
    pub fn for_project(project: &Project, given: Option<&str>) -> Result<Self> {
        let debian = &project.fleet.debian;
        let host = HostApt::read();
        let pick = |given: Option<&str>, toml: &Option<String>, label: &str| -> Option<String> {
            given.map(str::to_owned).or_else(|| toml.clone()).or_else(|| host.archives.get(label).cloned())
        };
        let Some(main) = pick(given, &debian.mirror, "Debian") else {
            return fail(
                "there is no Debian mirror, and the host's apt has none; set `[debian] mirror = \"…\"` in fleet.toml \
                 or pass --mirror",
            );
        };
        // Mirrors have the security archive beside the main one, with the suffix `-security`.
        let security = pick(None, &debian.security_mirror, "Debian-Security")
            .filter(|_| given.is_none() && debian.mirror.is_none() || debian.security_mirror.is_some())
            .unwrap_or_else(|| format!("{}-security", main.trim_end_matches('/')));
        let mut mirror = Self {
            archives: BTreeMap::from([
                ("debian".to_owned(), main.trim_end_matches('/').to_owned()),
                ("security".to_owned(), security.trim_end_matches('/').to_owned()),
            ]),
            sources: Vec::new(),
            acquire: host.acquire,
        };
        let suite = &debian.suite;
        for (archive, suite) in [
            ("debian", suite.clone()),
            ("debian", format!("{suite}-updates")),
            ("security", format!("{suite}-security")),
        ] {
            mirror.sources.push(AptSource {
                archive: archive.to_owned(),
                suite,
                components: vec!["main".to_owned()],
                keyring: DEBIAN_KEYRING.to_owned(),
                only: Vec::new(),
                check_valid_until: true,
            });
        }
        for extra in &project.sources() {
            let name = extra.name.get_ref();
            let archive = match &extra.uri {
                Some(uri) => {
                    mirror.archives.insert(name.clone(), uri.trim_end_matches('/').to_owned());
                    name.clone()
                }
                None => "debian".to_owned(),
            };
            let keyring = match &extra.key {
                Some(key) => {
                    let path = project.dir.join(key);
                    path.canonicalize().map_err(Error::io("read the key", &path))?.display().to_string()
                }
                None => DEBIAN_KEYRING.to_owned(),
            };
            mirror.sources.push(AptSource {
                archive,
                suite: extra.suite.clone(),
                components: extra.components.clone(),
                keyring,
                only: extra.packages.clone(),
                check_valid_until: extra.check_valid_until,
            });
        }
        Ok(mirror)
    }

    /// Returns the full URI of a package's file.
    ///
    /// # Errors
    /// If neither the fleet nor the host has the archive.
    pub fn url(&self, archive: &str, path: &str) -> Result<String> {
        match self.archives.get(archive) {
            Some(base) => Ok(format!("{base}/{path}")),
            None => fail(format!(
                "bakehouse.lock takes {path} from the archive `{archive}`, which fleet.toml does not have; add it, or \
                 run `bakehouse lock`"
            )),
        }
    }

    /// Returns the host's proxy for URIs of this scheme.
    #[must_use]
    pub fn proxy(&self, scheme: &str) -> Option<String> {
        let key = format!("Acquire::{scheme}::Proxy ");
        let line = self.acquire.iter().find(|l| l.starts_with(&key))?;
        let value = line[key.len()..].trim_matches(|c| c == '"' || c == ';');
        Some(value.to_owned()).filter(|v| !v.is_empty() && v != "DIRECT")
    }
}

/// The host's settings that a build uses: those for reaching the mirror. Other settings would change the result.
const KEPT: [&str; 6] = [
    "Acquire::http::",
    "Acquire::https::",
    "Acquire::Check-Valid-Until ",
    "Acquire::Check-Date ",
    "Acquire::Retries ",
    "Acquire::ForceIPv",
];

#[derive(Default)]
struct HostApt {
    /// Label in the archive's Release file → base URI.
    archives: BTreeMap<String, String>,
    acquire: Vec<String>,
}

impl HostApt {
    /// Reads apt's configuration. Without apt, or without sources, the result is empty.
    fn read() -> Self {
        let run = |program: &str, args: &[&str]| {
            let output = Command::new(program).args(args).env("LC_ALL", "C.UTF-8").output().ok();
            output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default()
        };
        let mut host = Self::default();
        let targets = run(
            "apt-get",
            &["indextargets", "--format", "$(LABEL)\t$(REPO_URI)", "Created-By: Packages", "Origin: Debian"],
        );
        for (label, uri) in targets.lines().filter_map(|l| l.split_once('\t')) {
            host.archives.entry(label.to_owned()).or_insert_with(|| uri.to_owned());
        }
        host.acquire = run("apt-config", &["dump"])
            .lines()
            .filter(|l| KEPT.iter().any(|k| l.starts_with(k)) && !l.ends_with("\"\";"))
            .map(str::to_owned)
            .collect();
        host
    }
}
