//! What changes from one version of a group's image to the next, as their manifests say.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::format::verity;

/// The part of a manifest that two versions are compared by.
#[derive(Debug, Deserialize)]
pub(super) struct Contents {
    pub id: String,
    pub version: String,
    pub group: String,
    pub roothash: String,
    kernel: String,
    pub sizes: ContentSizes,
    packages: Vec<Package>,
    /// Baked files: path → sha256.
    files: BTreeMap<String, String>,
    /// Addresses by slot.
    nodes: BTreeMap<String, String>,
    /// Format of what the agent keeps.
    state: u16,
    mesh: String,
    #[serde(default)]
    migrations: Vec<String>,
    #[serde(default)]
    restore: Option<String>,
}

#[derive(Debug, Deserialize)]
pub(super) struct ContentSizes {
    pub root_slot: u64,
    pub root: u64,
    uki: u64,
}

#[derive(Debug, Deserialize)]
struct Package {
    name: String,
    version: String,
}

/// How an image differs from the one that is published.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Comparison {
    pub group: String,
    /// None where nothing was published yet.
    pub from: Option<String>,
    pub to: String,
    /// Bytes that a node loads; all of it, where what is published does not tell what nodes have.
    pub load: u64,
    /// `name version`, `name old → new`.
    pub added: Vec<String>,
    pub removed: Vec<String>,
    pub changed: Vec<String>,
    /// Baked files that differ, with `+`, `-` or `~` before.
    pub files: Vec<String>,
    /// Why nodes of the old version can't take the new one.
    pub obstacles: Vec<String>,
    /// What going back would not undo.
    pub one_way: Vec<String>,
}

impl Contents {
    pub(super) fn read(path: &Path) -> Result<Self> {
        let bytes = fs::read(path).map_err(Error::io("read", path))?;
        serde_json::from_slice(&bytes).map_err(|e| {
            Error::Failed(format!("{} is not a manifest of this bakehouse ({e}); build it again", path.display()))
        })
    }

    fn postgres(&self) -> BTreeSet<u32> {
        self.packages.iter().filter_map(|p| p.name.strip_prefix("postgresql-")?.parse().ok()).collect()
    }
}

impl Comparison {
    pub(super) fn of(old: Option<&Contents>, new: &Contents) -> Self {
        let mut found = Self {
            group: new.group.clone(),
            from: old.map(|o| o.version.clone()),
            to: new.version.clone(),
            load: new.sizes.root + verity::tree_size(new.sizes.root) + new.sizes.uki,
            added: Vec::new(),
            removed: Vec::new(),
            changed: Vec::new(),
            files: Vec::new(),
            obstacles: Vec::new(),
            one_way: Vec::new(),
        };
        let Some(old) = old else { return found };
        let versions = |c: &'_ Contents| -> BTreeMap<String, String> {
            c.packages.iter().map(|p| (p.name.clone(), p.version.clone())).collect()
        };
        let (before, after) = (versions(old), versions(new));
        for (name, version) in &after {
            match before.get(name) {
                None => found.added.push(format!("{name} {version}")),
                Some(was) if was != version => found.changed.push(format!("{name} {was} → {version}")),
                Some(_) => {}
            }
        }
        let gone = before.iter().filter(|(name, _)| !after.contains_key(*name));
        found.removed.extend(gone.map(|(name, version)| format!("{name} {version}")));
        for path in old.files.keys().chain(new.files.keys()).collect::<BTreeSet<_>>() {
            let sign = match (old.files.get(path), new.files.get(path)) {
                (None, _) => '+',
                (_, None) => '-',
                (was, is) if was != is => '~',
                _ => continue,
            };
            found.files.push(format!("{sign} /{path}"));
        }
        if old.kernel != new.kernel {
            found.changed.push(format!("kernel {} → {}", old.kernel, new.kernel));
        }
        let list = |set: &BTreeSet<u32>| set.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        let (from, to) = (old.postgres(), new.postgres());
        if !from.is_empty() && !from.is_subset(&to) {
            let to = if to.is_empty() { "none".to_owned() } else { list(&to) };
            let migration = format!("postgresql-{}-to-{to}", list(&from));
            if !new.migrations.contains(&migration) {
                found.obstacles.push(format!(
                    "PostgreSQL {} to {to}: the data has to be converted; write the migration `{migration}` (docs/updates.md)",
                    list(&from)
                ));
            }
        }
        for name in new.migrations.iter().filter(|name| !old.migrations.contains(name)) {
            found.one_way.push(format!("the migration `{name}` converts what nodes keep"));
        }
        if old.sizes.root_slot != new.sizes.root_slot {
            found.obstacles.push(format!(
                "the root slot would change from {} to {} MiB, and is cut when a node first boots; set `[image] root_size = \"{}M\"`",
                old.sizes.root_slot >> 20,
                new.sizes.root_slot >> 20,
                old.sizes.root_slot >> 20
            ));
        }
        if old.mesh != new.mesh {
            found.obstacles.push(format!(
                "the mesh would move from {} to {}: half a fleet can't talk to the other",
                old.mesh, new.mesh
            ));
        }
        if old.restore != new.restore {
            // One node after the other would change: some would write into the one, some into the other.
            found.obstacles.push(
                "[backup] restore makes another database than the one that runs: switch all database nodes off, and \
                 start them from blank disks"
                    .to_owned(),
            );
        }
        for (slot, address) in &old.nodes {
            if let Some(now) = new.nodes.get(slot).filter(|now| *now != address) {
                found.obstacles.push(format!("{slot} would move from {address} to {now}; keep its address"));
            }
        }
        if old.state > new.state {
            found.obstacles.push(format!("the agent would not read state of format {}", old.state));
        }
        if old.state < new.state {
            found.one_way.push(format!("the agent's state is converted from format {} to {}", old.state, new.state));
        }
        let odoo = |versions: &BTreeMap<String, String>| versions.get("odoo-19").cloned();
        if odoo(&before) != odoo(&after) {
            found.one_way.push("Odoo may bring its database up to date".to_owned());
        }
        found
    }

    /// Whether there is anything to do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.from.is_some()
            && [&self.added, &self.removed, &self.changed, &self.files, &self.obstacles].iter().all(|v| v.is_empty())
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(from) = &self.from else {
            return writeln!(f, "{}: version {}, the first to be published", self.group, self.to);
        };
        if self.is_empty() {
            return writeln!(f, "{}: version {from}, nothing changes", self.group);
        }
        writeln!(f, "{}: version {from} → {}; each node restarts once", self.group, self.to)?;
        let lists = [("added", &self.added), ("removed", &self.removed), ("changed", &self.changed)];
        for (word, list) in lists {
            for line in list {
                writeln!(f, "  {word:<8} {line}")?;
            }
        }
        for line in &self.files {
            writeln!(f, "  file     {line}")?;
        }
        for line in &self.one_way {
            writeln!(f, "  one way  {line}")?;
        }
        for line in &self.obstacles {
            writeln!(f, "  REFUSED  {line}")?;
        }
        Ok(())
    }
}
