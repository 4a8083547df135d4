//! What the image of each group contains.

use std::collections::BTreeSet;

use fleet::Profile;

use super::{ImageSpec, Project, addons, hook, languages};

/// The overlay of Odoo.
const ODOO: &str = "odoo";

impl Project {
    /// Returns the roles of a group's image: the group's roles, and roles that the topology gives one of its nodes.
    pub(super) fn recipe_roles(&self, group: &str) -> Vec<String> {
        let mut roles: Vec<String> = Vec::new();
        for role in self.topology.nodes.iter().filter(|n| n.group == group).flat_map(|n| &n.roles) {
            if !roles.contains(role) {
                roles.push(role.clone());
            }
        }
        roles
    }

    /// Returns the contents of a group's image.
    #[must_use]
    pub fn recipe(&self, group_name: &str) -> ImageSpec {
        let group = &self.fleet.groups[group_name];
        let roles = self.recipe_roles(group_name);
        let hardware = self.fleet.image.hardware.as_str();
        let mut profiles: Vec<Profile> =
            std::iter::once("base").chain(roles.iter().map(String::as_str)).map(|r| self.profiles[r].clone()).collect();
        for profile in &mut profiles {
            languages::add(profile, &self.topology.odoo.languages);
        }
        let packages_of = |profiles: &[Profile]| -> BTreeSet<String> {
            profiles
                .iter()
                .flat_map(|p| p.packages.iter().chain(p.hardware.get(hardware).into_iter().flatten()))
                .cloned()
                .collect()
        };
        let mut packages = packages_of(&profiles);
        packages.extend(group.packages.iter().cloned());
        let normal = |wheel: &String| {
            let (name, version) = wheel.split_once("==").unwrap_or((wheel, ""));
            format!("{}=={version}", fleet::wheel_name(name))
        };
        let mut overlays: Vec<String> = Vec::new();
        let named = group.overlays.iter().map(|overlay| overlay.get_ref().as_str());
        let floating = (self.topology.hook && roles.iter().any(|r| r == "hub")).then_some(hook::OVERLAY);
        for overlay in profiles.iter().flat_map(|p| &p.overlays).map(String::as_str).chain(floating).chain(named) {
            if !overlays.iter().any(|known| known == overlay) {
                overlays.push(overlay.to_owned());
            }
        }
        let of_odoo = overlays.iter().any(|overlay| overlay == ODOO).then_some(&self.fleet.odoo.get_ref().wheels);
        let wheels = profiles.iter().flat_map(|p| &p.wheels).chain(&group.wheels).chain(of_odoo.into_iter().flatten());
        let wheels: BTreeSet<String> = wheels.map(normal).collect();
        ImageSpec {
            group: group_name.to_owned(),
            roles,
            packages: packages.into_iter().collect(),
            base_packages: packages_of(&profiles[..1]).into_iter().collect(),
            profiles,
            wheels: wheels.into_iter().collect(),
            overlays,
        }
    }

    /// Returns whether the image of a group has Odoo.
    #[must_use]
    pub fn runs_odoo(&self, group: &str) -> bool {
        self.recipe(group).overlays.iter().any(|overlay| overlay == ODOO)
    }

    /// Returns the names of the add-ons in the fleet's folders.
    #[must_use]
    pub fn own_addons(&self) -> Vec<&str> {
        let paths = self.files.keys().filter_map(|path| path.strip_prefix(addons::ADDONS));
        paths.filter_map(|path| path.strip_suffix("/__manifest__.py")).filter(|name| !name.contains('/')).collect()
    }
}
