//! Where packages come from: the user's TOML, else the host's own apt configuration.

use std::collections::BTreeMap;
use std::process::Command;

use crate::error::{Error, Result, fail};
use crate::project::Project;

/// One apt source: a suite of an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AptSource {
    /// Name of the archive the paths in the lock are relative to.
    pub archive: String,
    pub suite: String,
    pub components: Vec<String>,
    pub keyring: String,
    /// Only these packages come from it.
    pub only: Vec<String>,
    pub check_valid_until: bool,
}

/// Archives by name, and what is taken from them.
#[derive(Clone, Debug, Default)]
pub struct Mirror {
    /// Archive → base address without a trailing `/`.
    pub archives: BTreeMap<String, String>,
    pub sources: Vec<AptSource>,
    /// The host's `Acquire::…` settings that say how its mirror is reached.
    pub acquire: Vec<String>,
}

const DEBIAN_KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

impl Mirror {
    /// `--mirror`, then `[debian]`, then the host's apt.
    ///
    /// # Errors
    /// None of them names a Debian archive.
    pub fn of(project: &Project, given: Option<&str>) -> Result<Self> {
        let debian = &project.fleet.debian;
        let host = HostApt::read();
        let pick = |given: Option<&str>, toml: &Option<String>, label: &str| -> Option<String> {
            given.map(str::to_owned).or_else(|| toml.clone()).or_else(|| host.archives.get(label).cloned())
        };
        let Some(main) = pick(given, &debian.mirror, "Debian") else {
            return fail(
                "no Debian mirror is known: this host's apt has none; set `[debian] mirror = \"…\"` in fleet.toml or pass --mirror",
            );
        };
        // Mirrors keep the security archive beside the main one, by the name `-security`.
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

    /// Full address of a package's file.
    ///
    /// # Errors
    /// The lock names an archive that nothing here does.
    pub fn url(&self, archive: &str, path: &str) -> Result<String> {
        match self.archives.get(archive) {
            Some(base) => Ok(format!("{base}/{path}")),
            None => fail(format!(
                "bakehouse.lock takes {path} from the archive `{archive}`, which fleet.toml does not name; add it or run `bakehouse lock`"
            )),
        }
    }

    /// The host's proxy for addresses like this one.
    #[must_use]
    pub fn proxy(&self, scheme: &str) -> Option<String> {
        let key = format!("Acquire::{scheme}::Proxy ");
        let line = self.acquire.iter().find(|l| l.starts_with(&key))?;
        let value = line[key.len()..].trim_matches(|c| c == '"' || c == ';');
        Some(value.to_owned()).filter(|v| !v.is_empty() && v != "DIRECT")
    }
}

/// How a mirror is reached and trusted belongs to the mirror; the rest of the host's apt
/// configuration stays out of the build.
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
    /// Archive's label in its Release file → base address.
    archives: BTreeMap<String, String>,
    acquire: Vec<String>,
}

impl HostApt {
    /// What apt itself says of its configuration; an absent or empty apt says nothing.
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
