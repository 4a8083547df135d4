//! The folders of Odoo add-ons that `[odoo] addons` names. Their files become part of the overlay `odoo`, beside its own
//! add-on.

use std::collections::BTreeMap;
use std::path::Path;

use fleet::{Diagnostic, Fleet, Severity};

use super::overlay_folder;
use crate::error::Result;

/// Where the overlay has the add-ons.
const ADDONS: &str = "overlays/odoo/usr/share/bakehouse/addons/";

/// Adds the files of all folders of add-ons. Returns their paths in the fleet's folder, by their paths among the files.
///
/// # Errors
/// If there is no such folder, or two add-ons have the same name. The error has the line of `fleet.toml`.
pub(super) fn add(
    fleet: &Fleet,
    dir: &Path,
    files: &mut BTreeMap<String, Vec<u8>>,
) -> Result<BTreeMap<String, String>> {
    let mut origins = BTreeMap::new();
    // The folder of each add-on.
    let mut folders: BTreeMap<String, &str> = BTreeMap::from([("bakehouse".to_owned(), "Bakehouse itself")]);
    for (number, folder) in fleet.odoo.get_ref().addons.iter().enumerate() {
        let at = |message: String, help: String| {
            let span = fleet.source.value(&["odoo", "addons", &number.to_string()]);
            Box::new(Diagnostic::at(Severity::Error, &fleet.source, span, message, Some(help)))
        };
        if !dir.join(folder).is_dir() {
            let message = format!("[odoo] there is no folder {}", dir.join(folder).display());
            return Err(at(message, "write its path relative to fleet.toml".to_owned()).into());
        }
        let mut found = BTreeMap::new();
        overlay_folder(dir, folder, &mut found)?;
        let prefix = format!("{}/", folder.trim_end_matches('/'));
        for (path, bytes) in found {
            // The build compiles the modules again, reproducibly.
            let Some(inner) = path.strip_prefix(&prefix).filter(|p| !p.contains("__pycache__")) else { continue };
            if let Some(name) = inner.strip_suffix("/__manifest__.py").filter(|name| !name.contains('/'))
                && let Some(other) = folders.insert(name.to_owned(), folder)
            {
                let message = format!("[odoo] {folder} and {other} both have an add-on {name}");
                return Err(at(message, format!("rename or remove {prefix}{name}")).into());
            }
            let inner = format!("{ADDONS}{inner}");
            files.insert(inner.clone(), bytes);
            origins.insert(inner, path);
        }
    }
    Ok(origins)
}

#[cfg(test)]
mod tests {
    use crate::project::Project;
    use std::fs;

    fn load(addons: &[&str]) -> crate::error::Result<Project> {
        let dir = tempfile::tempdir().unwrap();
        for manifest in addons {
            let addon = dir.path().join(manifest);
            fs::create_dir_all(&addon).unwrap();
            fs::write(addon.join("__manifest__.py"), "{}").unwrap();
        }
        let toml = "name = \"x\"\n[groups.hub]\ncount = 1\nendpoints = [\"hub.acme.com\"]\n\n\
                    [odoo]\naddons = [\"ours\", \"theirs/\"]\n";
        fs::write(dir.path().join("fleet.toml"), toml).unwrap();
        Project::load(dir.path())
    }

    #[test]
    fn an_addon_keeps_its_path_in_the_fleets_folder() {
        let project = load(&["ours/invoice", "theirs/stock_more"]).unwrap();
        let odoo = "usr/share/bakehouse/addons/stock_more/__manifest__.py";
        assert!(project.overlay("odoo").unwrap().files.iter().any(|(path, _)| *path == odoo));
        assert_eq!(project.origin("odoo", odoo), "theirs/stock_more/__manifest__.py");
        assert_eq!(project.origin("odoo", "usr/lib/x"), "overlays/odoo/usr/lib/x");
    }

    #[test]
    fn two_addons_of_one_name_have_the_line_of_the_second_folder() {
        for (addons, other) in
            [(["ours/invoice", "theirs/invoice"], "ours"), (["ours/invoice", "theirs/bakehouse"], "Bakehouse itself")]
        {
            let e = load(&addons).map(drop).unwrap_err().to_string();
            assert!(e.contains(&format!("fleet.toml:7: [odoo] theirs/ and {other} both have an add-on")), "{e}");
            assert!(e.contains(&format!("rename or remove {}", addons[1])), "{e}");
        }
    }
}
