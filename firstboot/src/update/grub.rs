//! Boot counting on machines with a legacy BIOS. GRUB cannot rename boot entries as systemd-boot does under UEFI, so it
//! counts the tries of a new image in its environment block on the EFI partition. This module copies GRUB's count to
//! the entries' names, and writes new images and good boots to GRUB's block.

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::path::Path;

use fleet::grubenv::{BLOCK, Block, TRIES};

use crate::error::{Error, Result};
use crate::update::boot_entries::{Boots, ENTRIES, split};

fn read(path: &Path) -> Result<Block> {
    fs::read_to_string(path).map(|text| Block::parse(&text)).map_err(Error::io("read", path))
}

/// Overwrites the file in place, because GRUB addresses the file by its sectors.
fn write(block: &Block, path: &Path) -> Result<()> {
    let bytes = block.render()?;
    let mut file = OpenOptions::new().write(true).open(path).map_err(Error::io("open", path))?;
    file.write_all(&bytes).and_then(|()| file.sync_all()).map_err(Error::io("write", path))
}

/// Synchronizes the entries' names and GRUB's block on the EFI partition `esp`. `good`: the running image has passed
/// its health check. Returns whether the running image is not blessed yet. After a power cut, the next boot repeats the
/// synchronization.
///
/// # Errors
/// If the partition cannot be read or written.
pub fn keep_in_step(esp: &Path, id: &str, running: &str, good: bool) -> Result<bool> {
    let (path, entries) = (esp.join(BLOCK), esp.join(ENTRIES));
    let name = |version: &str| format!("{id}_{version}");
    let before = read(&path)?;
    let mut block = before.clone();
    if good {
        // Write GRUB's block first: a blessed entry that GRUB does not start would look like a failed one.
        block = Block { good: name(running), ..Block::default() };
        if block != before {
            write(&block, &path)?;
        }
        rename(&entries, id, running, "")?;
    } else if let Some(version) = block.next.strip_prefix(id).and_then(|v| v.strip_prefix('_')) {
        let left = block.tries.min(TRIES);
        rename(&entries, id, version, &format!("+{left}-{}", TRIES - left))?;
    }
    let boots = Boots::read(&entries, id)?;
    if let Some(version) = boots.pending(running).filter(|v| block.next != name(v)) {
        let block = Block { good: name(running), next: name(version), tries: TRIES };
        write(&block, &path)?;
    }
    Ok(!boots.is_blessed(running))
}

/// Renames the entry of a version to another count, if the entry still has a count.
fn rename(entries: &Path, id: &str, version: &str, tries: &str) -> Result<()> {
    let to = entries.join(format!("{id}_{version}{tries}.efi"));
    for entry in fs::read_dir(entries).map_err(Error::io("read", entries))? {
        let from = entry.map_err(Error::io("read", entries))?.path();
        let counted = from
            .file_name()
            .and_then(|n| split(n.to_str()?, id))
            .is_some_and(|(v, left)| v == version && left.is_some());
        if counted && from != to {
            // The partition is mounted with `dirsync`, so renames reach the disk in this order.
            return fs::rename(&from, &to).map_err(Error::io("rename", &from));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Esp(tempfile::TempDir);

    impl Esp {
        fn new(names: &[&str], block: &Block) -> Self {
            let dir = tempfile::tempdir().unwrap();
            fs::create_dir_all(dir.path().join(ENTRIES)).unwrap();
            fs::create_dir_all(dir.path().join("grub")).unwrap();
            for name in names {
                fs::write(dir.path().join(ENTRIES).join(name), b"").unwrap();
            }
            fs::write(dir.path().join(BLOCK), block.render().unwrap()).unwrap();
            Self(dir)
        }

        fn step(&self, running: &str, good: bool) -> bool {
            keep_in_step(self.0.path(), "up-hub", running, good).unwrap()
        }

        fn names(&self) -> Vec<String> {
            let entries = fs::read_dir(self.0.path().join(ENTRIES)).unwrap();
            let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        }

        fn block(&self) -> Block {
            read(&self.0.path().join(BLOCK)).unwrap()
        }

        /// Counts a try, as GRUB does before it starts the next image.
        fn count_a_try(&self) {
            let block = self.block();
            write(&Block { tries: block.tries - 1, ..block }, &self.0.path().join(BLOCK)).unwrap();
        }
    }

    fn block(good: &str, next: &str, tries: u32) -> Block {
        Block { good: good.to_owned(), next: next.to_owned(), tries }
    }

    #[test]
    fn blesses_the_first_image() {
        let esp = Esp::new(&["up-hub_1+3.efi"], &block("up-hub_1", "", 0));
        assert!(esp.step("1", false));
        assert_eq!(esp.names(), ["up-hub_1+3.efi"]);
        assert!(!esp.step("1", true));
        assert_eq!(esp.names(), ["up-hub_1.efi"]);
        assert_eq!(esp.block(), block("up-hub_1", "", 0));
    }

    #[test]
    fn blesses_a_newer_image() {
        let esp = Esp::new(&["up-hub_1.efi", "up-hub_2+3-0.efi"], &block("up-hub_1", "", 0));
        assert!(!esp.step("1", false));
        assert_eq!(esp.block(), block("up-hub_1", "up-hub_2", 3));
        // A second run before the reboot changes nothing.
        esp.step("1", false);
        assert_eq!((esp.block().tries, esp.names()[1].as_str()), (3, "up-hub_2+3-0.efi"));
        esp.count_a_try();
        assert!(esp.step("2", false));
        assert_eq!(esp.names(), ["up-hub_1.efi", "up-hub_2+2-1.efi"]);
        assert!(!esp.step("2", true));
        assert_eq!(
            (esp.names(), esp.block()),
            (vec!["up-hub_1.efi".into(), "up-hub_2.efi".into()], block("up-hub_2", "", 0))
        );
    }

    #[test]
    fn gives_up_a_newer_image_after_three_tries() {
        let esp = Esp::new(&["up-hub_1.efi", "up-hub_2+3-0.efi"], &block("up-hub_1", "", 0));
        esp.step("1", false);
        for _ in 0..3 {
            esp.count_a_try();
        }
        // The newer image never ran this code, so the older image reads the count.
        esp.step("1", false);
        assert_eq!(esp.names(), ["up-hub_1.efi", "up-hub_2+0-3.efi"]);
        esp.step("1", false);
        assert_eq!(esp.block(), block("up-hub_1", "up-hub_2", 0));
        // A fixed version replaces the failed one.
        fs::rename(
            esp.0.path().join(ENTRIES).join("up-hub_2+0-3.efi"),
            esp.0.path().join(ENTRIES).join("up-hub_3+3-0.efi"),
        )
        .unwrap();
        esp.step("1", false);
        assert_eq!(esp.block(), block("up-hub_1", "up-hub_3", 3));
    }

    #[test]
    fn completes_a_blessing_after_a_power_cut() {
        let esp = Esp::new(&["up-hub_1.efi", "up-hub_2+0-3.efi"], &block("up-hub_2", "", 0));
        assert!(esp.step("2", false), "the entry is blessed before the second run");
        assert!(!esp.step("2", true));
        assert_eq!(esp.names(), ["up-hub_1.efi", "up-hub_2.efi"]);
    }
}
