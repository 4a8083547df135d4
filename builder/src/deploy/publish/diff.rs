//! Differences between two versions of a group's image, from their manifests.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use fleet::compare_versions;

use super::addons::AddonChanges;
use crate::error::{Error, Result};
use crate::format::verity;

/// The part of a manifest that a comparison reads.
#[derive(Debug, Deserialize)]
pub(super) struct Contents {
    /// Name of the image.
    pub id: String,
    /// Version of the image.
    pub version: String,
    /// Group whose nodes run the image.
    pub group: String,
    /// Root hash, in hex.
    pub roothash: String,
    kernel: String,
    /// Sizes of the partitions and files.
    pub sizes: ContentSizes,
    packages: Vec<Package>,
    /// Baked files: path → sha256.
    files: BTreeMap<String, String>,
    /// Mesh addresses by slot.
    nodes: BTreeMap<String, String>,
    /// Names of the fleet's hubs; `None` in manifests of earlier versions of bakehouse.
    hubs: Option<Vec<String>>,
    /// Names of the nodes with an etcd vote; `None` in manifests of earlier versions of bakehouse.
    voters: Option<Vec<String>>,
    /// Version of the format of the agent's state.
    state: u16,
    mesh: String,
    #[serde(default)]
    migrations: Vec<String>,
    /// Hashes of Odoo's add-ons; missing in images without Odoo, and of earlier versions of bakehouse.
    #[serde(default)]
    addons: Option<BTreeMap<String, String>>,
    #[serde(default)]
    restore: Option<String>,
    /// Settings of the fleet; missing in manifests of earlier versions of bakehouse.
    #[serde(default)]
    settings: Option<Value>,
}

#[derive(Debug, Deserialize)]
pub(super) struct ContentSizes {
    /// Size of a root partition in bytes.
    pub root_slot: u64,
    /// Size of the root file system in bytes.
    pub root: u64,
    uki: u64,
}

#[derive(Debug, Deserialize)]
struct Package {
    name: String,
    version: String,
}

/// Differences between an image and the published image of its group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub(crate) struct Comparison {
    /// Name of the group.
    pub group: String,
    /// Published version; `None` before the first publication.
    pub from: Option<String>,
    /// Version of the image.
    pub to: String,
    /// Bytes that a node downloads. The size of the whole image, if the published files do not list their blocks.
    pub load: u64,
    /// New packages: `name version`.
    pub added: Vec<String>,
    /// Removed packages: `name version`.
    pub removed: Vec<String>,
    /// Packages with another version: `name old → new`.
    pub changed: Vec<String>,
    /// Baked files that differ, with the prefix `+`, `-` or `~`.
    pub files: Vec<String>,
    /// Settings of `fleet.toml` that differ: `section.key old → new`.
    pub settings: Vec<String>,
    /// Add-ons that Odoo installs and updates in its database.
    pub addons: AddonChanges,
    /// Reasons why nodes of the old version cannot change to the new one.
    pub obstacles: Vec<String>,
    /// Changes that a rollback does not undo.
    pub one_way: Vec<String>,
}

impl Contents {
    /// Reads a manifest. `fix` names the command that writes it again.
    pub(super) fn read(path: &Path, fix: &str) -> Result<Self> {
        let bytes = fs::read(path).map_err(Error::io("read", path))?;
        let place = format!("{} is not a manifest of this version of bakehouse\n  help: {fix}", path.display());
        serde_json::from_slice(&bytes).map_err(Error::at(place))
    }

    fn postgres(&self) -> BTreeSet<u32> {
        self.packages.iter().filter_map(|p| p.name.strip_prefix("postgresql-")?.parse().ok()).collect()
    }
}

impl Comparison {
    pub(super) fn new(old: Option<&Contents>, new: &Contents) -> Self {
        let mut found = Self {
            group: new.group.clone(),
            from: old.map(|o| o.version.clone()),
            to: new.version.clone(),
            load: new.sizes.root + verity::tree_size(new.sizes.root) + new.sizes.uki,
            added: Vec::new(),
            removed: Vec::new(),
            changed: Vec::new(),
            files: Vec::new(),
            settings: Vec::new(),
            addons: AddonChanges::default(),
            obstacles: Vec::new(),
            one_way: Vec::new(),
        };
        let Some(old) = old else { return found };
        found.compare_packages(old, new);
        for path in old.files.keys().chain(new.files.keys()).collect::<BTreeSet<_>>() {
            let sign = match (old.files.get(path), new.files.get(path)) {
                (None, _) => '+',
                (_, None) => '-',
                (was, is) if was != is => '~',
                _ => continue,
            };
            found.files.push(format!("{sign} /{path}"));
        }
        if let (Some(was), Some(is)) = (&old.settings, &new.settings) {
            changed_settings("", was, is, &mut found.settings);
        }
        if old.kernel != new.kernel {
            found.changed.push(format!("kernel {} → {}", old.kernel, new.kernel));
        }
        if old.roothash != new.roothash && compare_versions(&new.version, &old.version).is_le() {
            found.obstacles.push(format!(
                "version {} is published already, and nodes take only newer ones; raise `version` in fleet.toml",
                old.version
            ));
        }
        for (what, old, new) in [("hubs", &old.hubs, &new.hubs), ("etcd voters", &old.voters, &new.voters)] {
            if let (Some(old), Some(new)) = (old, new)
                && old != new
            {
                found.obstacles.push(format!(
                    "the {what} would change from {} to {}: a rollout cannot add or remove them in a running fleet; \
                     keep the counts of these groups",
                    old.join(", "),
                    new.join(", ")
                ));
            }
        }
        let list = |set: &BTreeSet<u32>| set.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        let (from, to) = (old.postgres(), new.postgres());
        if !from.is_empty() && !from.is_subset(&to) {
            let to = if to.is_empty() { "none".to_owned() } else { list(&to) };
            let migration = format!("postgresql-{}-to-{to}", list(&from));
            if !new.migrations.contains(&migration) {
                found.obstacles.push(format!(
                    "PostgreSQL {} to {to} needs a migration of the data; write the migration `{migration}` \
                     (docs/updates.md)",
                    list(&from)
                ));
            }
        }
        for name in new.migrations.iter().filter(|name| !old.migrations.contains(name)) {
            found.one_way.push(format!("the migration `{name}` converts the nodes' data"));
        }
        if old.sizes.root_slot != new.sizes.root_slot {
            found.obstacles.push(format!(
                "the root partitions would change from {:.1} to {:.1} MB, but a node creates them only at its first boot; \
                 set `[image] root_size = \"{}M\"`",
                old.sizes.root_slot as f64 / 1e6,
                new.sizes.root_slot as f64 / 1e6,
                old.sizes.root_slot >> 20
            ));
        }
        if old.mesh != new.mesh {
            found.obstacles.push(format!(
                "the mesh would change from {} to {}: during the rollout, nodes could not reach each other",
                old.mesh, new.mesh
            ));
        }
        if old.restore != new.restore {
            // A rollout changes one node after the other, so some nodes would use the old database and some the new.
            found.obstacles.push(
                "[backup] restore creates a new database beside the running one; switch all database nodes off, and \
                 start them from blank disks"
                    .to_owned(),
            );
        }
        for (slot, address) in &old.nodes {
            if let Some(now) = new.nodes.get(slot).filter(|now| *now != address) {
                found.obstacles.push(format!("{slot} would change from {address} to {now}; keep its address"));
            }
        }
        if old.state > new.state {
            found.obstacles.push(format!("the agent of the new version cannot read state of format {}", old.state));
        }
        if old.state < new.state {
            found.one_way.push(format!("the agent converts its state from format {} to {}", old.state, new.state));
        }
        found.addons = AddonChanges::new(
            (old.addons.as_ref(), old.settings.as_ref()),
            (new.addons.as_ref(), new.settings.as_ref()),
        );
        if found.addons.change_the_database() {
            found.one_way.push(
                "the first app node updates Odoo's database: tables are locked meanwhile, and users wait or see a \
                 page about the update; the older version does not undo it"
                    .to_owned(),
            );
        }
        found
    }

    /// Adds the packages that differ.
    fn compare_packages(&mut self, old: &Contents, new: &Contents) {
        let versions = |c: &'_ Contents| -> BTreeMap<String, String> {
            c.packages.iter().map(|p| (p.name.clone(), p.version.clone())).collect()
        };
        let (before, after) = (versions(old), versions(new));
        for (name, version) in &after {
            match before.get(name) {
                None => self.added.push(format!("{name} {version}")),
                Some(was) if was != version => self.changed.push(format!("{name} {was} → {version}")),
                Some(_) => {}
            }
        }
        let removed = before.iter().filter(|(name, _)| !after.contains_key(*name));
        self.removed.extend(removed.map(|(name, version)| format!("{name} {version}")));
    }

    /// Returns whether the images are the same for nodes.
    #[must_use]
    pub(crate) fn is_empty(&self) -> bool {
        self.from.is_some()
            && [&self.added, &self.removed, &self.changed, &self.files, &self.obstacles].iter().all(|v| v.is_empty())
    }
}

/// Adds a line for each value that differs. `path` names the value: `section.key`.
fn changed_settings(path: &str, was: &Value, is: &Value, lines: &mut Vec<String>) {
    let shown = |value: &Value| match value {
        Value::Null => "none".to_owned(),
        Value::String(text) => text.clone(),
        value => value.to_string(),
    };
    match (was, is) {
        (Value::Object(before), Value::Object(after)) => {
            for key in before.keys().chain(after.keys()).collect::<BTreeSet<_>>() {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                let (was, is) = (before.get(key).unwrap_or(&Value::Null), after.get(key).unwrap_or(&Value::Null));
                changed_settings(&path, was, is, lines);
            }
        }
        (was, is) if was != is => lines.push(format!("{path} {} → {}", shown(was), shown(is))),
        _ => {}
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(from) = &self.from else {
            return writeln!(f, "{}: version {}, the first one", self.group, self.to);
        };
        if self.is_empty() {
            return writeln!(f, "{}: version {from}, no changes", self.group);
        }
        writeln!(f, "{}: version {from} → {}; each node restarts once", self.group, self.to)?;
        let lists = [("added", &self.added), ("removed", &self.removed), ("changed", &self.changed)];
        for (title, list) in lists {
            for line in list {
                writeln!(f, "  {title:<8} {line}")?;
            }
        }
        for line in &self.settings {
            writeln!(f, "  setting  {line}")?;
        }
        for line in &self.files {
            writeln!(f, "  file     {line}")?;
        }
        write!(f, "{}", self.addons)?;
        for line in &self.one_way {
            writeln!(f, "  one way  {line}")?;
        }
        for line in &self.obstacles {
            writeln!(f, "  REFUSED  {line}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::assemble::manifest::settings;
    use serde_json::json;

    #[test]
    fn names_the_settings_that_differ() {
        let topology = |more: &str| {
            let toml = format!("name = \"x\"\n[groups.hub]\ncount = 1\nendpoints = [\"a.acme.com\"]\n{more}");
            settings(&fleet::Topology::from_fleet(&fleet::Fleet::parse("f", toml.as_bytes()).unwrap()))
        };
        let changes = |more: &str| {
            let mut lines = Vec::new();
            changed_settings("", &topology(""), &topology(more), &mut lines);
            lines
        };
        assert_eq!(changes(""), Vec::<String>::new());
        assert_eq!(changes("[vip]\naddress = \"10.10.0.200\"\n"), ["vip.address 10.10.0.100 → 10.10.0.200"]);
        assert_eq!(
            changes("[odoo]\nlanguages = [\"de\"]\n[update]\nurl = \"http://u.acme.com/\"\n[database]\nttl = 30\n"),
            ["database.ttl 20 → 30", "odoo.languages [] → [\"de\"]", "update.url none → http://u.acme.com"]
        );
    }

    #[test]
    fn a_plan_lists_settings_also_beside_a_manifest_of_an_earlier_version() {
        let contents = |settings: Option<Value>| {
            let mut manifest = json!({
                "id": "x-db", "version": "1", "group": "db", "kernel": "6.12", "roothash": "0".repeat(64),
                "sizes": { "root_slot": 1 << 20, "root": 8192, "uki": 4096 },
                "packages": [], "files": {}, "nodes": {}, "state": 2, "mesh": "10.10.0.0/24",
            });
            if let Some(settings) = settings {
                manifest["settings"] = settings;
            }
            serde_json::from_value::<Contents>(manifest).unwrap()
        };
        let new = contents(Some(json!({ "vip": { "address": "10.10.0.200" } })));
        assert!(Comparison::new(Some(&contents(None)), &new).settings.is_empty());
        let old = contents(Some(json!({ "vip": { "address": "10.10.0.100" } })));
        let mut comparison = Comparison::new(Some(&old), &new);
        comparison.files.push("~ /usr/lib/bakehouse/fleet.json".to_owned());
        let text = comparison.to_string();
        assert!(text.contains("  setting  vip.address 10.10.0.100 → 10.10.0.200\n  file     ~ /usr/lib"), "{text}");
    }
}
