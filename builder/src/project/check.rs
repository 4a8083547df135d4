//! Checks of a fleet that need no build.

use std::fmt::Write as _;

use fleet::{HaRow, Membership, ha_table};

use crate::error::Result;
use crate::project::Project;
use crate::project::secrets::secret;

/// Searches every used overlay for secrets, and renders the nodes' templates for every slot. Templates that the builder
/// renders need the packages' tree; the build checks them.
///
/// # Errors
/// If an overlay has a secret or does not exist, or a template does not render.
pub fn dry_bake(project: &Project) -> Result<()> {
    let sample = Membership::sample();
    for group in project.groups(&[])? {
        let recipe = project.recipe(group);
        for name in &recipe.overlays {
            for (inner, bytes) in project.overlay(name)?.files {
                let origin = format!("overlays/{name}/{inner}");
                secret(&origin, bytes)?;
                if !inner.starts_with("run/") {
                    continue;
                }
                let text = String::from_utf8_lossy(bytes);
                for node in project.topology.nodes.iter().filter(|n| n.group == group) {
                    fleet::render(&origin, &text, &project.context(node, &sample))?;
                }
            }
        }
    }
    Ok(())
}

/// Formats the number of nodes of each role, beside the number that high availability needs, as a table.
#[must_use]
pub fn table(project: &Project) -> String {
    let mut text = String::from("role      nodes  minimum  recommended\n");
    for row in ha_table(&project.topology) {
        let HaRow { role, have, minimum, recommended } = row;
        let _ = writeln!(text, "{role:<9} {have:>5}  {minimum:>7}  {recommended:>11}  {}", row.verdict());
    }
    let _ = write!(text, "etcd votes: {}", project.topology.voters.join(", "));
    text
}
