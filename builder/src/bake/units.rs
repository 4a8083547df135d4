//! Starts and masks units by links.

use std::collections::BTreeMap;

use crate::bake::Baked;
use crate::compose::tar_index::Tree;
use crate::error::{Result, fail};
use crate::project::ImageSpec;

impl Baked {
    /// Adds the links that start and mask the units of the profiles.
    pub(super) fn units(&mut self, recipe: &ImageSpec, tree: &Tree) -> Result<()> {
        let dir = "usr/lib/systemd/system";
        let mut links: BTreeMap<String, String> = BTreeMap::new();
        for profile in &recipe.profiles {
            for (kind, map) in [("wants", &profile.units.wants), ("requires", &profile.units.requires)] {
                for (target, units) in map {
                    for unit in units {
                        let template = unit.split_once('@').map_or(unit.clone(), |(name, rest)| {
                            format!("{name}@.{}", rest.rsplit('.').next().unwrap_or("service"))
                        });
                        let real = format!("{dir}/{template}");
                        if tree.get(&real).is_none() && !self.entries.contains_key(&real) {
                            return fail(format!(
                                "the image has no unit {unit}, which a profile starts in {target}; check [units] in \
                                 the profiles of {}",
                                recipe.roles.join(", ")
                            ));
                        }
                        links.insert(format!("{dir}/{target}.{kind}/{unit}"), format!("../{template}"));
                    }
                }
            }
            for unit in &profile.units.mask {
                links.insert(format!("etc/systemd/system/{unit}"), "/dev/null".to_owned());
            }
        }
        for (path, target) in links {
            self.link(&path, &target, "profiles")?;
        }
        Ok(())
    }
}
