//! A fleet's folder: `fleet.toml`, profiles and overlays. The folder's files add to the built-in profiles and overlays;
//! a file with the same path replaces the built-in one.

mod addons;
pub(crate) mod alert_secrets;
pub(crate) mod check;
mod hook;
mod languages;
pub(crate) mod machine_id;
pub(crate) mod mail;
mod recipe;
#[cfg(test)]
mod schema_tests;
pub(crate) mod secrets;
pub(crate) mod web;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use fleet::{
    Diagnostic, Diagnostics, ExtraSource, Fleet, LanPlace, MachineSize, Membership, Node, NodeContext, OverlayManifest,
    Profile, Profiles, Severity, Topology, parse_size,
};

use crate::error::{Error, Result};

mod assets {
    include!(concat!(env!("OUT_DIR"), "/assets.rs"));
}

/// The user's input of a build, loaded and validated.
#[derive(Clone)]
pub struct Project {
    /// Folder of `fleet.toml`.
    pub dir: PathBuf,
    /// The parsed `fleet.toml`.
    pub fleet: Fleet,
    /// Slots, addresses and voters that follow from it.
    pub topology: Topology,
    /// The roles' profiles, built-in ones and the user's.
    pub profiles: Profiles,
    /// Warnings of the lint. An error of the lint is an error of [`Project::load`].
    pub warnings: Vec<Diagnostic>,
    /// Sample of where a hub holds the addresses of its local network.
    lan: Vec<LanPlace>,
    files: BTreeMap<String, Vec<u8>>,
    /// Where files are that the fleet's folder has elsewhere: path in the fleet's folder.
    origins: BTreeMap<String, String>,
}

/// An overlay: its manifest, and its files by path relative to the image's root.
pub struct Overlay<'a> {
    /// Name of the overlay.
    pub name: String,
    /// Its `overlay.toml`.
    pub manifest: OverlayManifest,
    /// Files by path: `usr/bin/tool`.
    pub files: Vec<(&'a str, &'a [u8])>,
}

/// Contents of a group's image: the merged profiles of its roles.
#[derive(Debug)]
pub struct ImageSpec {
    /// Name of the group.
    pub group: String,
    /// Roles of the group, in the order of `fleet.toml`.
    pub roles: Vec<String>,
    /// `base` first, then the roles in their order.
    pub profiles: Vec<Profile>,
    /// Packages of the profiles and of the group, without their dependencies.
    pub packages: Vec<String>,
    /// The part of `packages` that every image has.
    pub base_packages: Vec<String>,
    /// Python packages of the profiles and of the group, each as `name==version`, sorted.
    pub wheels: Vec<String>,
    /// Names of the overlays, in the order in which the builder copies them.
    pub overlays: Vec<String>,
}

impl Project {
    /// Returns a node by its name.
    ///
    /// # Errors
    /// If there is no such node. The error lists all nodes.
    pub fn node(&self, name: &str) -> Result<&Node> {
        self.topology.node(name).ok_or_else(|| {
            let known: Vec<&str> = self.topology.nodes.iter().map(|n| n.name.as_str()).collect();
            Error::Usage(format!("there is no node `{name}`; there are: {}", known.join(", ")))
        })
    }

    /// Name of the file with the public key that verifies updates, beside `fleet.toml`.
    pub const UPDATE_KEYRING: &str = "update-key.gpg";

    /// Returns the keyring with which nodes verify updates; `None` if `bakehouse init` has not created it.
    #[must_use]
    pub fn update_keyring(&self) -> Option<Vec<u8>> {
        fs::read(self.dir.join(Self::UPDATE_KEYRING)).ok()
    }

    /// Returns the folder of a `fleet.toml`, and whether the file exists. `path` is the file or its folder.
    #[must_use]
    pub fn folder(path: &Path) -> (PathBuf, bool) {
        let file = if path.is_dir() { path.join("fleet.toml") } else { path.to_owned() };
        let dir = file.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")).to_owned();
        (dir, file.exists())
    }

    /// Loads a fleet. `path` is a `fleet.toml` or its folder.
    ///
    /// # Errors
    /// If a file cannot be read or parsed, or the lint reports an error.
    pub fn load(path: &Path) -> Result<Self> {
        let file = if path.is_dir() { path.join("fleet.toml") } else { path.to_owned() };
        let bytes = fs::read(&file).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => Error::Usage(format!(
                "cannot read {}: there is no fleet here\n  help: `bakehouse init DIR` creates one; `bakehouse -C DIR` \
                 uses one in another folder",
                file.display()
            )),
            _ => Error::io("read", &file)(e),
        })?;
        let (dir, _) = Self::folder(path);
        let name = file.display().to_string();
        let fleet = Fleet::parse(&name, &bytes)?;

        let mut files: BTreeMap<String, Vec<u8>> =
            assets::FILES.iter().map(|(name, bytes)| ((*name).to_owned(), bytes.to_vec())).collect();
        for top in ["profiles", "overlays"] {
            overlay_folder(&dir, top, &mut files)?;
        }
        let origins = addons::add(&fleet, &dir, &mut files)?;
        if let Some(ca) = fleet.backup.get_ref().s3.as_ref().and_then(|s3| s3.ca.as_ref()) {
            let path = dir.join(ca);
            let bytes = fs::read(&path).map_err(|e| {
                let span = fleet.source.value(&["backup", "s3", "ca"]);
                let message = format!("[backup.s3] cannot read {}: {e}", path.display());
                let help = "write the path relative to fleet.toml".to_owned();
                Box::new(Diagnostic::at(Severity::Error, &fleet.source, span, message, Some(help)))
            })?;
            files.insert("overlays/pgbackrest/usr/share/bakehouse/s3-ca.crt".to_owned(), bytes);
        }
        hook::add(&fleet, &dir, &mut files)?;
        mail::add_authority(&fleet, &dir, &mut files)?;
        let certificate = web::read_files(&dir, &fleet, &mut files)?;
        let mut profiles = Profiles::new();
        for (path, bytes) in &files {
            if let Some(role) = path.strip_prefix("profiles/roles/").and_then(|p| p.strip_suffix(".toml")) {
                profiles.insert(role.to_owned(), Profile::parse(path, bytes)?);
            }
        }
        let found = fleet::lint(&fleet, &profiles);
        let web_secrets = web::secrets(&dir)?;
        let found = found.into_iter().chain(web::check(&fleet, &web_secrets, certificate.as_deref()));
        let (mut errors, mut warnings): (Vec<_>, Vec<_>) = found.partition(|d| d.severity == Severity::Error);
        errors.extend(unknown_overlays(&fleet, &files));
        if !errors.is_empty() {
            return Err(Error::Config(Diagnostics(errors)));
        }
        let mut topology = Topology::from_fleet(&fleet);
        topology.reclaim(&profiles);
        topology.open_ports(&profiles);
        let stored = alert_secrets::read(&dir)?;
        warnings.extend(alert_secrets::missing(&fleet, &stored));
        topology.alert_secrets = stored.only(&topology.alerts.secrets());
        let stored = mail::read(&dir)?;
        warnings.extend(mail::missing(&fleet, &stored));
        topology.mail_secrets = stored.used_by(topology.odoo.mail.as_ref());
        warnings.extend(hook::missing(&fleet, &web_secrets));
        topology.web_secrets = web_secrets.only(&topology.hub_secret_names());
        topology.web_certificate = certificate;
        let place = |lan: &fleet::LanAddress| LanPlace { address: lan.address, interface: "lo".to_owned() };
        let lan = topology.lan.iter().map(place).collect();
        Ok(Self { dir, fleet, topology, profiles, warnings, lan, files, origins })
    }

    /// Returns a built-in file or a file of the user, by path (`profiles/initrd.toml`).
    pub fn file(&self, path: &str) -> Result<&[u8]> {
        match self.files.get(path) {
            Some(bytes) => Ok(bytes),
            None => crate::error::fail(format!("{path} is missing from this build of bakehouse")),
        }
    }

    /// Returns all files of profiles and overlays: path and content.
    pub fn files(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.files.iter().map(|(path, bytes)| (path.as_str(), bytes.as_slice()))
    }

    /// Returns the groups that the command line names; all groups if it names none.
    ///
    /// # Errors
    /// If a name is not a group.
    pub fn groups(&self, names: &[String]) -> Result<Vec<&str>> {
        let known = || self.fleet.groups.keys().map(String::as_str);
        if names.is_empty() {
            return Ok(known().collect());
        }
        names
            .iter()
            .map(|name| {
                known().find(|g| g == name).ok_or_else(|| {
                    let known = known().collect::<Vec<_>>().join(", ");
                    Error::Usage(format!("no group `{name}` in {}; there are: {known}", self.fleet.source.name))
                })
            })
            .collect()
    }

    /// Returns the additional apt sources: those of the user and of the used profiles. If two profiles take packages
    /// from one source, the source has the packages of both.
    #[must_use]
    pub fn sources(&self) -> Vec<ExtraSource> {
        let mut sources = self.fleet.debian.sources.clone();
        let own = sources.len();
        let used: BTreeSet<String> = self.fleet.groups.keys().flat_map(|g| self.recipe_roles(g)).collect();
        for source in used.iter().filter_map(|r| self.profiles.get(r)).flat_map(|p| &p.sources) {
            match sources.iter().position(|s| s.name.get_ref() == source.name.get_ref()) {
                None => sources.push(source.clone()),
                Some(i) if i >= own => {
                    let more = source.packages.iter().filter(|p| !sources[i].packages.contains(p)).cloned();
                    let more: Vec<String> = more.collect();
                    sources[i].packages.extend(more);
                }
                Some(_) => {}
            }
        }
        sources
    }

    /// Returns whether an overlay belongs to a node's own roles or group. The image has the overlays of all roles in the
    /// group.
    #[must_use]
    pub fn has_overlay(&self, node: &fleet::Node, overlay: &str) -> bool {
        let of_group = self.fleet.groups[&node.group].overlays.iter().any(|named| named.get_ref() == overlay);
        let mut roles = std::iter::once("base").chain(node.roles.iter().map(String::as_str));
        let floating = overlay == hook::OVERLAY && self.topology.hook && node.hub > 0;
        of_group || floating || roles.any(|role| self.profiles[role].overlays.iter().any(|o| o == overlay))
    }

    /// Returns the size of a group's virtual machine: the sums of the roles' memory and /var, and the largest number of
    /// CPUs of a role.
    #[must_use]
    pub fn machine(&self, group: &str) -> MachineSize {
        let recipe = self.recipe(group);
        let sizes = || recipe.profiles.iter().map(|p| &p.vm);
        let memory: u64 = sizes().filter_map(|vm| parse_size(vm.memory.as_deref()?)).sum();
        let var: u64 = recipe.profiles.iter().filter_map(|p| parse_size(p.disk.var.as_deref()?)).sum();
        let cpus = sizes().filter_map(|vm| vm.cpus).max().unwrap_or(2).into();
        MachineSize { memory: memory >> 20, var: var >> 20, cpus, timeout_scale: 1 }
    }

    /// Returns the variables of a node's templates, for a machine of the profiles' size.
    #[must_use]
    pub fn context<'a>(&'a self, node: &'a fleet::Node, member: &'a Membership) -> NodeContext<'a> {
        NodeContext {
            fleet: &self.topology,
            node,
            machine: self.machine(&node.group),
            epoch: 1,
            tls: &member.tls,
            secrets: &member.secrets,
            web: &member.tls.cert,
            lan: &self.lan,
        }
    }

    /// Returns an overlay.
    ///
    /// # Errors
    /// If there is no such overlay, or its manifest is invalid.
    pub fn overlay(&self, name: &str) -> Result<Overlay<'_>> {
        let prefix = format!("overlays/{name}/");
        let mut manifest = OverlayManifest::default();
        let mut files = Vec::new();
        let mut any = false;
        for (path, bytes) in self.files.range(prefix.clone()..).take_while(|(p, _)| p.starts_with(&prefix)) {
            any = true;
            match &path[prefix.len()..] {
                "overlay.toml" => manifest = OverlayManifest::parse(path, bytes)?,
                inner => files.push((inner, bytes.as_slice())),
            }
        }
        if !any {
            let known = overlay_names(&self.files);
            return Err(Error::Usage(format!(
                "there is no overlay `{name}`; there are: {}",
                known.into_iter().collect::<Vec<_>>().join(", ")
            )));
        }
        Ok(Overlay { name: name.to_owned(), manifest, files })
    }

    /// Returns where the user finds a file of an overlay: its path in the fleet's folder, or among the built-in files.
    #[must_use]
    pub fn origin(&self, overlay: &str, inner: &str) -> String {
        let path = format!("overlays/{overlay}/{inner}");
        self.origins.get(&path).cloned().unwrap_or(path)
    }

    /// Returns the folder of a group's image.
    #[must_use]
    pub fn out_dir(&self, group: &str) -> PathBuf {
        self.dir.join("build").join(group)
    }
}

/// Returns the names of the overlays among the files.
fn overlay_names(files: &BTreeMap<String, Vec<u8>>) -> BTreeSet<&str> {
    files.keys().filter_map(|path| path.strip_prefix("overlays/")?.split('/').next()).collect()
}

/// Returns an error for each overlay that a group names and that does not exist.
fn unknown_overlays(fleet: &Fleet, files: &BTreeMap<String, Vec<u8>>) -> Vec<Diagnostic> {
    let known = overlay_names(files);
    let named = fleet.groups.values().flat_map(|group| &group.overlays);
    let unknown = named.filter(|overlay| !known.contains(overlay.get_ref().as_str()));
    let error = |overlay: &toml::Spanned<String>| {
        let message = format!("there is no overlay `{}`", overlay.get_ref());
        let names: Vec<&str> = known.iter().copied().collect();
        let help = format!("make the folder overlays/{}, or name one of {}", overlay.get_ref(), names.join(", "));
        Diagnostic::at(Severity::Error, &fleet.source, overlay.span(), message, Some(help))
    };
    unknown.map(error).collect()
}

fn overlay_folder(dir: &Path, top: &str, files: &mut BTreeMap<String, Vec<u8>>) -> Result<()> {
    if !dir.join(top).is_dir() {
        return Ok(());
    }
    for entry in walkdir::WalkDir::new(dir.join(top)).sort_by_file_name() {
        let entry = entry.map_err(Error::cannot(format!("read {top}/")))?;
        if !entry.file_type().is_file() {
            continue;
        }
        let Ok(name) = entry.path().strip_prefix(dir) else { continue };
        let Some(name) = name.to_str() else {
            return crate::error::fail(format!("{} is not a UTF-8 file name; rename it", entry.path().display()));
        };
        files.insert(name.to_owned(), fs::read(entry.path()).map_err(Error::io("read", entry.path()))?);
    }
    Ok(())
}

/// Returns a file of the built-in profiles and overlays.
///
/// # Errors
/// If there is no such file.
pub fn built_in_file(path: &str) -> Result<&'static [u8]> {
    match assets::FILES.iter().find(|(name, _)| *name == path) {
        Some((_, bytes)) => Ok(bytes),
        None => crate::error::fail(format!("{path} is missing from this build of bakehouse")),
    }
}

/// Returns the TOML of a built-in fleet.
///
/// # Errors
/// If there is no such fleet. The error lists all built-in fleets.
pub fn built_in_fleet(name: &str) -> Result<String> {
    let fleets = assets::FILES
        .iter()
        .filter_map(|(path, bytes)| Some((path.strip_prefix("profiles/fleets/")?.strip_suffix(".toml")?, *bytes)));
    let mut known = Vec::new();
    for (fleet, bytes) in fleets {
        if fleet == name {
            return Ok(String::from_utf8_lossy(bytes).into_owned());
        }
        known.push(fleet);
    }
    Err(Error::Usage(format!("there is no built-in fleet `{name}`; there are: {}", known.join(", "))))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HUBS: &str = "name = \"x\"\n[groups.hub]\ncount = 1\nendpoints = [\"hub.acme.com\"]\n";

    fn error(more: &str) -> String {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("fleet.toml"), format!("{HUBS}{more}")).unwrap();
        Project::load(dir.path()).map(drop).expect_err(more).to_string()
    }

    #[test]
    fn missing_files_have_the_line_that_names_them() {
        for (more, line, message) in [
            ("overlays = [\"mine\"]\n", 5, "there is no overlay `mine`"),
            ("[odoo]\naddons = [\"no-such\"]\n", 6, "[odoo] there is no folder"),
            (
                "[backup.s3]\nbucket = \"b\"\nendpoint = \"s3.acme.com\"\nregion = \"r\"\nca = \"no-such.pem\"\n",
                9,
                "[backup.s3] cannot read",
            ),
        ] {
            let text = error(more);
            assert!(text.contains(&format!("fleet.toml:{line}: {message}")), "{text}");
        }
    }

    /// Two hubs and two monitors: one monitor has a vote, and both have the same image.
    #[test]
    fn only_voters_have_the_overlay_of_etcd() {
        let text =
            built_in_fleet("minimal-ha").unwrap().replace("[groups.monitor]\ncount = 1", "[groups.monitor]\ncount = 2");
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("fleet.toml"), text).unwrap();
        let project = Project::load(dir.path()).unwrap();
        let monitors: Vec<_> = project.topology.nodes.iter().filter(|n| n.group == "monitor").collect();
        let have = |overlay: &str| monitors.iter().map(|n| project.has_overlay(n, overlay)).collect::<Vec<_>>();
        assert_eq!([have("etcd"), have("monitor"), have("base")], [[true, false], [true, true], [true, true]]);
    }

    /// Removes the `#` of each setting that a built-in fleet has as a comment.
    #[test]
    fn commented_settings_of_built_in_fleets_are_valid() {
        for name in ["ha", "minimal-ha", "quick-ha"] {
            let text = built_in_fleet(name).unwrap();
            let setting = |line: &str| {
                line.strip_prefix('#')
                    .filter(|rest| rest.starts_with(|c: char| c == '[' || c.is_ascii_lowercase()))
                    .map_or_else(|| line.to_owned(), str::to_owned)
            };
            let uncommented: String = text.lines().map(|line| setting(line) + "\n").collect();
            for section in ["[image]", "[update]", "[alerts]", "[odoo]", "[backup]"] {
                assert!(uncommented.lines().any(|line| line == section), "{name} lacks {section}");
            }
            let dir = tempfile::tempdir().unwrap();
            fs::write(dir.path().join("fleet.toml"), &uncommented).unwrap();
            let project = Project::load(dir.path()).unwrap_or_else(|e| panic!("{name}: {e}\n{uncommented}"));
            assert_eq!(project.fleet.image.hardware, fleet::Hardware::Metal);
            let warnings: Vec<&str> = project.warnings.iter().map(|w| w.message.as_str()).collect();
            assert!(!warnings.iter().any(|w| w.contains("[update]") || w.contains("[alerts]")), "{warnings:?}");
            assert!(warnings.iter().any(|w| w.contains("reserved for examples")), "{warnings:?}");
        }
    }
}
