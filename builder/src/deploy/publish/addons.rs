//! What an update changes in Odoo's database, from the lists of add-ons of two images.

use std::collections::BTreeMap;
use std::fmt;

use schemars::JsonSchema;
use serde::Serialize;
use serde_json::Value;

/// Add-ons that a line names; of the others it has the number.
const NAMED: usize = 8;
/// The add-on on which all others depend.
const BASE: &str = "base";

/// What the first app node of the new version changes in Odoo's database.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub(crate) struct AddonChanges {
    /// Add-ons that `[odoo] modules` newly names. Odoo installs them, with what they depend on.
    pub install: Vec<String>,
    /// Add-ons whose content changes. Odoo updates those that are installed, and what depends on them.
    pub update: Vec<String>,
    /// Add-ons that the new image does not have. If they are installed, Odoo cannot load them.
    pub removed: Vec<String>,
}

/// Hash of each add-on, by name.
type Hashes = BTreeMap<String, String>;

impl AddonChanges {
    /// Compares two images. An image of an earlier version of bakehouse has no hashes, so Odoo updates all add-ons.
    pub(super) fn new(old: (Option<&Hashes>, Option<&Value>), new: (Option<&Hashes>, Option<&Value>)) -> Self {
        let ((before, old_settings), (Some(after), new_settings)) = (old, new) else { return Self::default() };
        let before_named = named(old_settings);
        let install = named(new_settings).into_iter().filter(|module| !before_named.contains(module)).collect();
        let Some(before) = before else {
            return Self { install, update: vec![BASE.to_owned()], removed: Vec::new() };
        };
        let is_changed = |name: &&String| before.get(*name).is_some_and(|hash| *hash != after[*name]);
        Self {
            install,
            update: after.keys().filter(is_changed).cloned().collect(),
            removed: before.keys().filter(|name| !after.contains_key(*name)).cloned().collect(),
        }
    }

    /// Whether Odoo updates the database.
    pub(super) fn change_the_database(&self) -> bool {
        !self.install.is_empty() || !self.update.is_empty()
    }
}

/// Returns the modules that the settings name.
fn named(settings: Option<&Value>) -> Vec<String> {
    let modules = settings.and_then(|settings| settings["odoo"]["modules"].as_array()).into_iter().flatten();
    modules.filter_map(|module| module.as_str().map(str::to_owned)).collect()
}

impl fmt::Display for AddonChanges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.install.is_empty() {
            writeln!(f, "  install  {}", shortened(&self.install))?;
        }
        if self.update.iter().any(|name| name == BASE) {
            writeln!(f, "  update   every add-on that is installed")?;
        } else if !self.update.is_empty() {
            writeln!(f, "  update   {}, if installed, and what depends on them", shortened(&self.update))?;
        }
        if !self.removed.is_empty() {
            writeln!(f, "  missing  {}: uninstall what you remove, before", shortened(&self.removed))?;
        }
        Ok(())
    }
}

fn shortened(names: &[String]) -> String {
    let first = names.iter().take(NAMED).cloned().collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(NAMED) {
        0 => first,
        more => format!("{first} and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn hashes(list: &[(&str, &str)]) -> Hashes {
        list.iter().map(|(name, hash)| ((*name).to_owned(), (*hash).to_owned())).collect()
    }

    #[test]
    fn names_what_odoo_installs_and_updates() {
        let before = hashes(&[("base", "1"), ("gone", "1"), ("note", "1"), ("web", "1")]);
        let after = hashes(&[("base", "1"), ("note", "2"), ("tag", "1"), ("web", "1")]);
        let (was, is) = (json!({"odoo": {"modules": ["web"]}}), json!({"odoo": {"modules": ["web", "tag"]}}));
        let changes = AddonChanges::new((Some(&before), Some(&was)), (Some(&after), Some(&is)));
        assert_eq!((&changes.install[..], &changes.update[..]), (&["tag".to_owned()][..], &["note".to_owned()][..]));
        assert_eq!(changes.removed, ["gone"]);
        assert!(changes.change_the_database());
        assert_eq!(
            changes.to_string(),
            "  install  tag\n  update   note, if installed, and what depends on them\n  \
             missing  gone: uninstall what you remove, before\n"
        );
        let none = AddonChanges::new((Some(&after), Some(&is)), (Some(&after), Some(&is)));
        assert_eq!((none.to_string(), none.change_the_database()), (String::new(), false));
    }

    #[test]
    fn odoo_updates_every_addon_beside_an_image_without_hashes_and_after_a_change_of_base() {
        let after = hashes(&[("base", "2"), ("web", "1")]);
        let before = hashes(&[("base", "1"), ("web", "1")]);
        for old in [None, Some(&before)] {
            let changes = AddonChanges::new((old, None), (Some(&after), None));
            assert_eq!(changes.to_string(), "  update   every add-on that is installed\n");
        }
        assert_eq!(AddonChanges::new((None, None), (None, None)), AddonChanges::default(), "an image without Odoo");
    }
}
