//! The node's configuration files, rendered to `/run` at each boot. They depend only on the image, the slot and the
//! machine.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

use fleet::NodeContext;
use fleet_https::Cause;
use walkdir::WalkDir;

use crate::error::{Error, Result};

/// Renders every template below `templates` to the same path below `root`, with the template's mode. Returns the number
/// of files.
///
/// # Errors
/// If a template cannot be rendered, or a file cannot be written. The build has rendered every template, so a template
/// that fails here is damaged.
pub fn render_all(templates: &Path, root: &Path, context: &NodeContext) -> Result<usize> {
    let mut count = 0;
    for entry in WalkDir::new(templates).sort_by_file_name() {
        let entry = entry.map_err(|e| unusable(templates, e))?;
        if !entry.file_type().is_file() {
            continue;
        }
        render(templates, root, entry.path().strip_prefix(templates).unwrap_or(entry.path()), context)?;
        count += 1;
    }
    Ok(count)
}

/// Renders the template `name` below `templates`, as [`render_all`] does.
///
/// # Errors
/// As for [`render_all`].
pub fn render(templates: &Path, root: &Path, name: &Path, context: &NodeContext) -> Result<()> {
    let path = &templates.join(name);
    let text = fs::read_to_string(path).map_err(Error::io("read", path))?;
    let rendered = fleet::render(&name.display().to_string(), &text, context).map_err(|e| unusable(path, e))?;
    let target = root.join(name);
    if let Some(dir) = target.parent() {
        fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
        open_to_all(dir, root)?;
    }
    let file_mode = fs::metadata(path).map_err(|e| unusable(path, e))?.permissions().mode() & 0o777;
    let beside = target.with_extension("new");
    // An interrupted agent may have left this file, with a mode that others can read.
    let _ = fs::remove_file(&beside);
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&beside)
        .map_err(Error::io("create", &beside))?;
    file.write_all(rendered.as_bytes()).map_err(Error::io("write", &beside))?;
    mode(&beside, file_mode)?;
    fs::rename(&beside, &target).map_err(Error::io("rename", &beside))
}

fn unusable(path: &Path, cause: impl Into<Cause>) -> Error {
    Error::Unusable { path: path.to_owned(), fix: "build the image again", source: cause.into() }
}

/// Makes a folder and its parents readable for daemons of other users, because the agent's umask is 077.
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
    fn every_boot_renders_the_same_files() {
        let dir = tempfile::tempdir().unwrap();
        let templates = dir.path().join("templates");
        fs::create_dir_all(templates.join("run/bakehouse")).unwrap();
        fs::write(templates.join("run/bakehouse/x.conf"), "{{ node.name }} of {{ fleet.name }}\n").unwrap();
        fs::write(templates.join("run/bakehouse/key"), "{{ tls.key }}").unwrap();
        fs::set_permissions(templates.join("run/bakehouse/key"), fs::Permissions::from_mode(0o600)).unwrap();
        let topology = Topology::from_fleet(&Fleet::parse("f", b"name = \"acme\"\ngroups.hub.count = 3\n").unwrap());
        let node = topology.node("hub-2").unwrap();
        let member = Membership::sample();
        let machine = MachineSize { memory: 1024, var: 1024, cpus: 2, timeout_scale: 1 };
        let context = NodeContext {
            fleet: &topology,
            node,
            epoch: 1,
            machine,
            tls: &member.tls,
            secrets: &member.secrets,
            web: "",
            lan: &[],
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
