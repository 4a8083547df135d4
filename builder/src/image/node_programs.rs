//! Finds the programs for nodes that the package installs together with `bakehouse`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::project::{ImageSpec, Project};

/// Name of the agent's program.
pub(super) const AGENT: &str = "firstboot";

/// Reads the programs of an image, by name: the agent, and those of the overlays.
///
/// # Errors
/// If a program is not installed, or cannot be read.
pub(super) fn node_programs(project: &Project, spec: &ImageSpec) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut names = vec![AGENT.to_owned()];
    for overlay in &spec.overlays {
        names.extend(project.overlay(overlay)?.manifest.programs);
    }
    let read = |name: String| {
        let path = node_program(&name)?;
        let program = fs::read(&path).map_err(Error::io("read", &path))?;
        Ok((name, program))
    };
    names.into_iter().map(read).collect()
}

/// Returns the path of a program for nodes.
///
/// # Errors
/// If the program is not installed.
pub(super) fn node_program(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe().map_err(Error::io("find", "bakehouse's own program"))?;
    find(&own, name)
}

/// Finds a program for nodes from the path of `bakehouse`. Cargo writes all programs to one folder. The Debian package
/// installs programs for nodes in `/usr/lib/bakehouse`, because users do not run them on the host.
fn find(own: &Path, name: &str) -> Result<PathBuf> {
    let beside = own.with_file_name(name);
    let in_lib = own.parent().and_then(Path::parent).map(|prefix| prefix.join("lib/bakehouse").join(name));
    if let Some(path) = [Some(&beside), in_lib.as_ref()].into_iter().flatten().find(|path| path.is_file()) {
        return Ok(path.clone());
    }
    let other = in_lib.map(|path| format!(" or {}", path.display())).unwrap_or_default();
    Err(Error::Failed(format!(
        "cannot find the program `{name}` for nodes: no file {}{other}\n  help: install the package bakehouse again, or \
         run `make build` in the sources",
        beside.display()
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// Creates empty files in a new folder.
    fn tree(files: &[&str]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for file in files {
            let path = root.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        root
    }

    #[test]
    fn finds_programs_beside_bakehouse_in_the_target_folder() {
        let root = tree(&["target/release/firstboot"]);
        let found = find(&root.path().join("target/release/bakehouse"), "firstboot").unwrap();
        assert_eq!(found, root.path().join("target/release/firstboot"));
    }

    #[test]
    fn finds_programs_of_the_package_in_usr_lib() {
        let root = tree(&["usr/lib/bakehouse/firstboot"]);
        let found = find(&root.path().join("usr/bin/bakehouse"), "firstboot").unwrap();
        assert_eq!(found, root.path().join("usr/lib/bakehouse/firstboot"));
    }

    #[test]
    fn prefers_the_program_beside_bakehouse() {
        let root = tree(&["usr/local/bin/firstboot", "usr/local/lib/bakehouse/firstboot"]);
        let found = find(&root.path().join("usr/local/bin/bakehouse"), "firstboot").unwrap();
        assert_eq!(found, root.path().join("usr/local/bin/firstboot"));
    }

    #[test]
    fn a_missing_program_names_both_places() {
        let root = tree(&["usr/lib/bakehouse/firstboot"]);
        let error = find(&root.path().join("usr/bin/bakehouse"), "firstboot-install").unwrap_err().to_string();
        for place in ["usr/bin/firstboot-install", "usr/lib/bakehouse/firstboot-install"] {
            assert!(error.contains(&root.path().join(place).display().to_string()), "{error}");
        }
    }
}
