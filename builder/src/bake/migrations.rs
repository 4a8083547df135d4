//! Orders migrations, and the services that wait for them.

use crate::bake::Baked;
use crate::compose::tar_index::Tree;
use crate::error::{Result, fail};

impl Baked {
    /// Writes drop-ins that start each service after its migration, and each migration after the previous one.
    pub(super) fn migrations(&mut self, tree: &Tree) -> Result<()> {
        let dir = "usr/lib/systemd/system";
        let mut before = None;
        for migration in self.migrations.clone() {
            let waiting = format!("{dir}/{}", migration.before);
            if tree.get(&waiting).is_none() && !self.entries.contains_key(&waiting) {
                return fail(format!(
                    "the image has no unit {}, which the migration `{}` names in `before`",
                    migration.before, migration.name
                ));
            }
            let own = format!("firstboot-migrate@{}.service", migration.name);
            let waits = format!("[Unit]\nRequires={own}\nAfter={own}\n");
            self.file(&format!("{dir}/{}.d/{}.conf", migration.before, migration.name), 0o644, waits.into_bytes())?;
            if let Some(before) = before.replace(own.clone()) {
                self.file(
                    &format!("{dir}/{own}.d/order.conf"),
                    0o644,
                    format!("[Unit]\nAfter={before}\n").into_bytes(),
                )?;
            }
        }
        Ok(())
    }
}
