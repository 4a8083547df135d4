//! The node's configuration: a pure function of image and slot, written to /run at each boot.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

use fleet::NodeContext;
use walkdir::WalkDir;

use crate::error::{Error, Result};

/// Renders every template below `templates` to the same path below `root`, with the mode the
/// template has; returns how many.
///
/// # Errors
/// A template does not render (the build has rendered it: the image is damaged), or /run is full.
pub fn render_all(templates: &Path, root: &Path, context: &NodeContext) -> Result<usize> {
    let mut count = 0;
    for entry in WalkDir::new(templates).sort_by_file_name() {
        let entry = entry.map_err(|e| Error::Configuration(format!("the image's templates can't be read: {e}")))?;
        if !entry.file_type().is_file() {
            continue;
        }
        let name = entry.path().strip_prefix(templates).unwrap_or(entry.path());
        let text = fs::read_to_string(entry.path()).map_err(Error::io("read", entry.path()))?;
        let rendered = fleet::render(&name.display().to_string(), &text, context)
            .map_err(|e| Error::Configuration(format!("{e}; rebuild the image")))?;
        let target = root.join(name);
        if let Some(dir) = target.parent() {
            fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
            open_to_all(dir, root)?;
        }
        let wanted = entry.metadata().map_err(|e| Error::Configuration(e.to_string()))?.permissions().mode() & 0o777;
        let beside = target.with_extension("new");
        // A file of an agent that was cut off may be there, open to others.
        let _ = fs::remove_file(&beside);
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&beside)
            .map_err(Error::io("create", &beside))?;
        file.write_all(rendered.as_bytes()).map_err(Error::io("write", &beside))?;
        mode(&beside, wanted)?;
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
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(Error::io("set the mode of", path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet::{Fleet, MachineSize, Membership, Topology};

    #[test]
    fn every_boot_gives_the_same_files() {
        let dir = tempfile::tempdir().unwrap();
        let templates = dir.path().join("templates");
        fs::create_dir_all(templates.join("run/bakehouse")).unwrap();
        fs::write(templates.join("run/bakehouse/x.conf"), "{{ node.name }} of {{ fleet.name }}\n").unwrap();
        fs::write(templates.join("run/bakehouse/key"), "{{ tls.key }}").unwrap();
        fs::set_permissions(templates.join("run/bakehouse/key"), fs::Permissions::from_mode(0o600)).unwrap();
        let topology = Topology::of(&Fleet::parse("f", b"name = \"acme\"\ngroups.hub.count = 3\n").unwrap());
        let node = topology.node("hub-2").unwrap();
        let member = Membership::sample();
        let machine = MachineSize { memory: 1024, var: 1024, cpus: 2, patience: 1 };
        let context = NodeContext {
            fleet: &topology,
            node,
            epoch: 1,
            machine,
            tls: &member.tls,
            secrets: &member.secrets,
            web: "",
        };
        for _ in 0..2 {
            assert_eq!(render_all(&templates, dir.path(), &context).unwrap(), 2);
            let text = fs::read_to_string(dir.path().join("run/bakehouse/x.conf")).unwrap();
            assert_eq!(text, "hub-2 of acme\n");
            let mode = |name: &str| fs::metadata(dir.path().join(name)).unwrap().permissions().mode() & 0o777;
            assert_eq!((mode("run/bakehouse/x.conf"), mode("run/bakehouse/key")), (0o644, 0o600));
        }
    }
}
