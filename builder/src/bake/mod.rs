//! Renders the files that depend on the fleet: overlays, the agent's `fleet.json` and `image.json`, links of units,
//! os-release. Files that differ between nodes remain templates, which the agent renders.

pub(crate) mod checks;
mod context;
pub(crate) mod generate;
mod migrations;
mod tar;
mod units;

use std::collections::{BTreeMap, BTreeSet};

use fleet::{Check, Diagnostic, MIGRATIONS, Make, Membership, Migration, Severity, is_of};
use serde::Serialize;

pub(crate) use context::BuildContext;

use crate::assemble::layout::{image_id, slots, var_size};
use crate::compose::tar_index::Tree;
use crate::error::{Error, Result, fail};
use crate::project::secrets::secret;
use crate::project::{ImageSpec, Project};
use crate::util::digest::{Key, sha256};
use crate::util::json::pretty_json;

/// All files that the builder adds to the packages' tree.
pub(crate) struct Baked {
    /// By path relative to the root.
    pub entries: BTreeMap<String, Entry>,
    /// Templates that the agent renders on the node, by path relative to the root: `run/…`.
    pub templates: BTreeMap<String, Template>,
    /// Commands that validate the files, of the image's overlays.
    pub checks: Vec<OverlayCheck>,
    /// Commands that generate files, of the image's overlays.
    pub makes: Vec<OverlayMake>,
    /// In the order in which a node runs the migrations.
    pub migrations: Vec<Migration>,
    /// Content of the image's os-release file.
    pub os_release: String,
}

/// A file or a link that the builder adds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Permissions.
    pub mode: u32,
    /// Number of the owner.
    pub uid: u32,
    /// Number of the owner's group.
    pub gid: u32,
    /// Bytes or target.
    pub content: Content,
    /// Source of the entry: an overlay's file, or `bakehouse`.
    pub origin: String,
}

impl Entry {
    /// Returns the sha256 of the content, or of a link's target.
    #[must_use]
    pub(crate) fn sum(&self) -> String {
        match &self.content {
            Content::File(bytes) => sha256(bytes),
            Content::Link(target) => sha256(target.as_bytes()),
        }
    }
}

/// Content of an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// A regular file with these bytes.
    File(Vec<u8>),
    /// A symbolic link to this path.
    Link(String),
}

/// A template that the agent renders. The rendered file has the same mode.
pub(crate) struct Template {
    /// The overlay's file, for messages.
    pub origin: String,
    /// The template.
    pub text: String,
    /// Permissions of the rendered file.
    pub mode: u32,
}

/// A `[[check]]` table.
pub(crate) struct OverlayCheck {
    /// Overlay with the table.
    pub overlay: String,
    /// The table.
    pub check: Check,
}

/// A `[[make]]` table.
pub(crate) struct OverlayMake {
    /// Overlay with the table.
    pub overlay: String,
    /// The table.
    pub make: Make,
}

/// A file that a program of the image has generated.
pub(crate) struct GeneratedFile {
    /// Overlay that describes the file.
    pub overlay: String,
    /// Path in the image, without a leading `/`.
    pub path: String,
    /// Content.
    pub bytes: Vec<u8>,
}

/// Variables of templates that the builder renders.
#[derive(Serialize)]
struct Context<'a> {
    fleet: &'a fleet::Topology,
    group: GroupVars<'a>,
    image: ImageVars,
}

/// The variable `group` of templates.
#[derive(Serialize)]
pub(crate) struct GroupVars<'a> {
    /// Name of the group.
    pub name: &'a str,
    /// Roles of the group.
    pub roles: &'a [String],
}

#[derive(Serialize)]
struct ImageVars {
    id: String,
    version: String,
    /// Size of a root partition in bytes.
    root_size: u64,
    verity_size: u64,
    var_size: u64,
}

/// Renders all files. `programs`: bytes of the programs of Bakehouse, by name. The layer's tree gives the ids of users,
/// and the units that profiles may start.
///
/// # Errors
/// If a template does not render, two overlays have the same file, a user is unknown, or a file has a secret.
pub(crate) fn bake(
    project: &Project,
    recipe: &ImageSpec,
    tree: &Tree,
    programs: &BTreeMap<String, Vec<u8>>,
) -> Result<Baked> {
    let slots = slots(project, recipe)?;
    let group = &recipe.group;
    let image = ImageVars {
        id: image_id(project, group),
        version: project.topology.version.clone(),
        root_size: slots.root,
        verity_size: slots.verity,
        var_size: var_size(recipe),
    };
    let context = Context { fleet: &project.topology, group: GroupVars { name: group, roles: &recipe.roles }, image };
    let ids = Ids { users: tree.ids("etc/passwd")?, groups: tree.ids("etc/group")? };
    let mut baked = Baked {
        entries: BTreeMap::new(),
        templates: BTreeMap::new(),
        checks: Vec::new(),
        makes: Vec::new(),
        migrations: Vec::new(),
        os_release: os_release(tree, &context.image)?,
    };
    for name in &recipe.overlays {
        baked.overlay(project, name, &context, &ids)?;
    }
    baked.own(project, recipe, &context, programs)?;
    baked.units(recipe, tree)?;
    baked.migrations(tree)?;
    let member = Membership::sample();
    for template in baked.templates.values() {
        for node in project.topology.nodes.iter().filter(|n| &n.group == group) {
            fleet::render(&template.origin, &template.text, &project.context(node, &member))?;
        }
    }
    Ok(baked)
}

struct Ids {
    users: BTreeMap<String, u32>,
    groups: BTreeMap<String, u32>,
}

impl Baked {
    fn overlay(&mut self, project: &Project, name: &str, context: &Context, ids: &Ids) -> Result<()> {
        let overlay = project.overlay(name)?;
        let mut described: BTreeSet<&str> = overlay.manifest.files.keys().map(String::as_str).collect();
        for (inner, bytes) in &overlay.files {
            let origin = project.origin(name, inner);
            secret(&origin, bytes)?;
            let path = inner.strip_suffix(".j2").unwrap_or(inner);
            described.remove(path);
            let meta = overlay.manifest.files.get(path).cloned().unwrap_or_default();
            let mode = u32::from_str_radix(&meta.mode, 8).unwrap_or(0o644);
            if path.starts_with("run/") {
                let text = utf8(&origin, bytes)?.to_owned();
                let template = Template { origin: origin.clone(), text, mode };
                if let Some(other) = self.templates.insert(path.to_owned(), template) {
                    return collision(path, &other.origin, &origin);
                }
                continue;
            }
            let content = if path == *inner {
                bytes.to_vec()
            } else {
                fleet::render(&origin, utf8(&origin, bytes)?, context)?.into_bytes()
            };
            let id = |map: &BTreeMap<String, u32>, who: &str, what: &str| {
                map.get(who).copied().ok_or_else(|| {
                    Error::Failed(format!(
                        "overlays/{name}/overlay.toml: {path} belongs to the {what} `{who}`, which the image does not \
                         have"
                    ))
                })
            };
            let entry = Entry {
                mode,
                uid: id(&ids.users, &meta.user, "user")?,
                gid: id(&ids.groups, &meta.group, "group")?,
                content: Content::File(content),
                origin,
            };
            self.put(path, entry)?;
        }
        if let Some(path) = described.first() {
            return fail(format!("overlays/{name}/overlay.toml describes {path}, which the overlay does not have"));
        }
        for (path, target) in &overlay.manifest.links {
            self.link(path, target, &format!("overlays/{name}/overlay.toml"))?;
        }
        let checks = overlay.manifest.check.into_iter();
        self.checks.extend(checks.map(|check| OverlayCheck { overlay: name.to_owned(), check }));
        let makes = overlay.manifest.make.into_iter();
        self.makes.extend(makes.map(|make| OverlayMake { overlay: name.to_owned(), make }));
        for migration in overlay.manifest.migration {
            let program = format!("{MIGRATIONS}/{}", migration.name);
            if self.entries.get(&program).is_none_or(|entry| entry.mode & 0o111 == 0) {
                return fail(format!(
                    "overlays/{name}/overlay.toml: the migration `{}` needs the program overlays/{name}/{program}, \
                     with `mode = \"0755\"` in [files.\"{program}\"]",
                    migration.name
                ));
            }
            self.migrations.push(migration);
        }
        Ok(())
    }

    /// Adds the files that match `of` to the key of a result in the store.
    pub(crate) fn add_to(&self, key: &mut Key, of: &[String]) {
        for (path, entry) in self.entries.iter().filter(|(p, _)| is_of(of, p)) {
            match &entry.content {
                Content::File(bytes) => key.add(path, bytes),
                Content::Link(target) => key.add(path, target),
            };
        }
    }

    /// Adds a generated file.
    ///
    /// # Errors
    /// If an overlay has the same file, or the file has a secret.
    pub(crate) fn add(&mut self, file: GeneratedFile) -> Result<()> {
        secret(&file.path, &file.bytes)?;
        let origin = format!("overlays/{}/overlay.toml", file.overlay);
        self.put(&file.path, Entry { mode: 0o644, uid: 0, gid: 0, content: Content::File(file.bytes), origin })
    }

    fn put(&mut self, path: &str, entry: Entry) -> Result<()> {
        let origin = entry.origin.clone();
        match self.entries.insert(path.to_owned(), entry) {
            Some(other) => collision(path, &other.origin, &origin),
            None => Ok(()),
        }
    }

    fn link(&mut self, path: &str, target: &str, origin: &str) -> Result<()> {
        let content = Content::Link(target.to_owned());
        self.put(path, Entry { mode: 0o777, uid: 0, gid: 0, content, origin: origin.to_owned() })
    }

    fn file(&mut self, path: &str, mode: u32, bytes: Vec<u8>) -> Result<()> {
        let content = Content::File(bytes);
        self.put(path, Entry { mode, uid: 0, gid: 0, content, origin: "bakehouse".to_owned() })
    }

    /// Adds the agent and the other programs, the files that the agent reads, and os-release.
    fn own(
        &mut self,
        project: &Project,
        recipe: &ImageSpec,
        context: &Context,
        programs: &BTreeMap<String, Vec<u8>>,
    ) -> Result<()> {
        #[derive(Serialize)]
        struct ImageFile<'a> {
            id: &'a str,
            version: &'a str,
            group: &'a str,
            roles: &'a [String],
            health: BTreeSet<&'a str>,
        }
        let image = ImageFile {
            id: &context.image.id,
            version: &context.image.version,
            group: &recipe.group,
            roles: &recipe.roles,
            health: recipe.profiles.iter().flat_map(|p| &p.health.units).map(String::as_str).collect(),
        };
        if recipe.roles.iter().any(|r| r == fleet::UPDATE) {
            let keyring = project.update_keyring().ok_or_else(|| {
                Error::Failed(format!(
                    "[update] is set, but {} is missing; create it with `bakehouse init`",
                    project.dir.join(Project::UPDATE_KEYRING).display()
                ))
            })?;
            self.file("usr/lib/systemd/import-pubring.gpg", 0o644, keyring)?;
        }
        let dir = fleet::IMAGE_DIR;
        self.file(&format!("{dir}/fleet.json"), 0o644, pretty_json(&project.topology)?)?;
        self.file(&format!("{dir}/image.json"), 0o644, pretty_json(&image)?)?;
        for (name, program) in programs {
            self.file(&format!("{dir}/{name}"), 0o755, program.clone())?;
        }
        let templates: Vec<_> =
            self.templates.iter().map(|(p, t)| (p.clone(), t.mode, t.text.clone().into_bytes())).collect();
        for (path, mode, text) in templates {
            self.file(&format!("{dir}/templates/{path}"), mode, text)?;
        }
        let os_release = self.os_release.clone().into_bytes();
        self.file("usr/lib/os-release", 0o644, os_release)
    }
}

fn os_release(tree: &Tree, image: &ImageVars) -> Result<String> {
    let debian = tree.read_text("usr/lib/os-release")?;
    let kept = debian.lines().filter(|l| !l.starts_with("IMAGE_"));
    let mut text: String = kept.map(|l| format!("{l}\n")).collect();
    text.push_str(&format!("IMAGE_ID=\"{}\"\nIMAGE_VERSION=\"{}\"\n", image.id, image.version));
    Ok(text)
}

fn collision<T>(path: &str, one: &str, other: &str) -> Result<T> {
    let message = format!("{one} and {other} both install /{path}");
    let help = "remove the file from one of the overlays".to_owned();
    Err(Error::Config(Diagnostic::whole_file(Severity::Error, other, message, Some(help)).into()))
}

fn utf8<'a>(origin: &str, bytes: &'a [u8]) -> Result<&'a str> {
    std::str::from_utf8(bytes).map_err(|_| Error::Failed(format!("{origin} is a template, but not UTF-8 text")))
}
