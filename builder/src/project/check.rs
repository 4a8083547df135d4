//! Checks of a fleet that need no build.

use std::fmt::Write as _;

use fleet::{Diagnostic, HaRow, Membership, Severity, ha_table};

use crate::error::Result;
use crate::project::Project;
use crate::project::secrets::secret;

/// Searches every used overlay for secrets, and renders the nodes' templates for every slot. Templates that the builder
/// renders need the packages' tree; the build checks them.
///
/// # Errors
/// If an overlay has a secret or does not exist, or a template does not render.
pub(crate) fn dry_bake(project: &Project) -> Result<()> {
    keyrings(project)?;
    let sample = Membership::sample();
    for group in project.groups(&[])? {
        let recipe = project.recipe(group);
        for name in &recipe.overlays {
            for (inner, bytes) in project.overlay(name)?.files {
                let origin = project.origin(name, inner);
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

/// Checks that the keyrings of `[[debian.sources]]` exist.
fn keyrings(project: &Project) -> Result<()> {
    let source = &project.fleet.source;
    for (number, extra) in project.fleet.debian.sources.iter().enumerate() {
        let Some(key) = extra.key.as_ref().filter(|key| !project.dir.join(key).is_file()) else { continue };
        let span = source.value(&["debian", "sources", &number.to_string(), "key"]);
        let message = format!("[debian] there is no file {}", project.dir.join(key).display());
        let help = "write the path of an OpenPGP keyring, relative to fleet.toml".to_owned();
        return Err(Box::new(Diagnostic::at(Severity::Error, source, span, message, Some(help))).into());
    }
    Ok(())
}

/// Columns of a terminal for the whole table.
const COLUMNS: usize = 60;

/// Formats the number of nodes of each role, beside the number that high availability needs, as a table. On a terminal
/// with fewer columns, the table has only what follows from these numbers.
#[must_use]
pub(crate) fn table(project: &Project, columns: Option<usize>) -> String {
    let narrow = columns.is_some_and(|columns| columns < COLUMNS);
    let mut text =
        if narrow { "role      nodes\n".to_owned() } else { "role      nodes  minimum  recommended\n".to_owned() };
    for row in ha_table(&project.topology) {
        let HaRow { role, have, minimum, recommended } = row;
        let wanted = if narrow { String::new() } else { format!("  {minimum:>7}  {recommended:>11}") };
        let _ = writeln!(text, "{role:<9} {have:>5}{wanted}  {}", row.verdict());
    }
    let _ = write!(text, "etcd votes: {}", project.topology.voters.join(", "));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn project(more: &str) -> Project {
        let dir = tempfile::tempdir().unwrap();
        let toml = format!("name = \"x\"\n[groups.hub]\ncount = 1\nendpoints = [\"hub.acme.com\"]\n{more}");
        std::fs::write(dir.path().join("fleet.toml"), toml).unwrap();
        Project::load(dir.path()).unwrap()
    }

    #[test]
    fn table_fits_the_terminal() {
        let project = project("");
        for columns in [48, 100] {
            let text = table(&project, Some(columns));
            assert!(text.lines().all(|line| line.chars().count() <= columns), "{text}");
            assert!(text.contains("one failure stops it"), "{text}");
        }
        assert!(table(&project, None).starts_with("role      nodes  minimum  recommended\n"));
    }

    #[test]
    fn missing_keyring_has_a_line() {
        let source = "[[debian.sources]]\nname = \"mine\"\nsuite = \"sid\"\nkey = \"mine.gpg\"\n";
        let e = dry_bake(&project(source)).unwrap_err().to_string();
        assert!(e.contains("fleet.toml:8: [debian] there is no file") && e.contains("mine.gpg"), "{e}");
    }
}
