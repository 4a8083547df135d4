//! The node's configuration: a pure function of image and slot, written to /run at each boot.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use fleet::{Node, NodeContext, Topology};
use walkdir::WalkDir;

use crate::error::{Error, Result};

/// Renders every template below `templates` to the same path below `root`; returns how many.
///
/// # Errors
/// A template does not render (the build has rendered it: the image is damaged), or /run is full.
pub fn render_all(templates: &Path, root: &Path, fleet: &Topology, node: &Node) -> Result<usize> {
    let context = NodeContext { fleet, node };
    let mut count = 0;
    for entry in WalkDir::new(templates).sort_by_file_name() {
        let entry = entry.map_err(|e| Error::Configuration(format!("the image's templates can't be read: {e}")))?;
        if !entry.file_type().is_file() {
            continue;
        }
        let name = entry.path().strip_prefix(templates).unwrap_or(entry.path());
        let text = fs::read_to_string(entry.path()).map_err(Error::io("read", entry.path()))?;
        let rendered = fleet::render(&name.display().to_string(), &text, &context)
            .map_err(|e| Error::Configuration(format!("{e}; rebuild the image")))?;
        let target = root.join(name);
        if let Some(dir) = target.parent() {
            fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
            open_to_all(dir, root)?;
        }
        // Daemons that drop their rights read these; nothing in them is secret.
        let beside = target.with_extension("new");
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o644)
            .open(&beside)
            .map_err(Error::io("create", &beside))?;
        file.write_all(rendered.as_bytes()).map_err(Error::io("write", &beside))?;
        mode(&beside, 0o644)?;
        fs::rename(&beside, &target).map_err(Error::io("rename", &beside))?;
        count += 1;
    }
    Ok(count)
}

/// The agent's own umask is 077; these folders are for daemons of other users.
fn open_to_all(dir: &Path, root: &Path) -> Result<()> {
    for dir in dir.ancestors().take_while(|d| *d != root && *d != root.join("run")) {
        mode(dir, 0o755)?;
    }
    Ok(())
}

fn mode(path: &Path, mode: u32) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(Error::io("set the mode of", path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet::Fleet;

    #[test]
    fn every_boot_gives_the_same_files() {
        let dir = tempfile::tempdir().unwrap();
        let templates = dir.path().join("templates");
        fs::create_dir_all(templates.join("run/bakehouse")).unwrap();
        fs::write(templates.join("run/bakehouse/x.conf"), "{{ node.name }} of {{ fleet.name }}\n").unwrap();
        let topology = Topology::of(&Fleet::parse("f", b"name = \"acme\"\ngroups.hub.count = 3\n").unwrap());
        let node = topology.node("hub-2").unwrap();
        for _ in 0..2 {
            assert_eq!(render_all(&templates, dir.path(), &topology, node).unwrap(), 1);
            let text = fs::read_to_string(dir.path().join("run/bakehouse/x.conf")).unwrap();
            assert_eq!(text, "hub-2 of acme\n");
        }
    }
}
