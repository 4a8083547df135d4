//! Machines that a legacy BIOS started. GRUB counts a new image's tries there, in a file of its own
//! on the EFI partition: it can't rename boot entries, as systemd-boot does under UEFI. Here the
//! entries' names follow what GRUB counted, and GRUB hears of new images and of good boots.

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::path::Path;

use fleet::grubenv::{BLOCK, Block, TRIES};

use crate::error::{Error, Result};
use crate::update::boot_entries::{Boots, ENTRIES, split};

fn read(path: &Path) -> Result<Block> {
    fs::read_to_string(path).map(|text| Block::parse(&text)).map_err(Error::io("read", path))
}

/// Over what is there: GRUB knows the file by its sectors.
fn write(block: &Block, path: &Path) -> Result<()> {
    let bytes = block.render()?;
    let mut file = OpenOptions::new().write(true).open(path).map_err(Error::io("open", path))?;
    file.write_all(&bytes).and_then(|()| file.sync_all()).map_err(Error::io("write", path))
}

/// Brings the entries' names and GRUB's block in step on the EFI partition `esp`; `good` says that
/// the running image has proven itself. Returns whether it still has to. Cut off anywhere, it is
/// done again at the next boot.
///
/// # Errors
/// The partition can't be read or written.
pub fn keep_in_step(esp: &Path, id: &str, running: &str, good: bool) -> Result<bool> {
    let (path, entries) = (esp.join(BLOCK), esp.join(ENTRIES));
    let name = |version: &str| format!("{id}_{version}");
    let before = read(&path)?;
    let mut block = before.clone();
    if good {
        // GRUB first: an entry without tries that GRUB doesn't start would look like one that failed.
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

/// Gives the entry of a version, while its tries are counted, another count.
fn rename(entries: &Path, id: &str, version: &str, tries: &str) -> Result<()> {
    let to = entries.join(format!("{id}_{version}{tries}.efi"));
    for entry in fs::read_dir(entries).map_err(Error::io("read", entries))? {
        let from = entry.map_err(Error::io("read", entries))?.path();
        let counted = from
            .file_name()
            .and_then(|n| split(n.to_str()?, id))
            .is_some_and(|(v, left)| v == version && left.is_some());
        if counted && from != to {
            // On the disk in this order, as the partition is mounted (`dirsync`).
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

        /// As GRUB does before it starts the next image.
        fn tried(&self) {
            let block = self.block();
            write(&Block { tries: block.tries - 1, ..block }, &self.0.path().join(BLOCK)).unwrap();
        }
    }

    fn block(good: &str, next: &str, tries: u32) -> Block {
        Block { good: good.to_owned(), next: next.to_owned(), tries }
    }

    #[test]
    fn the_first_image_proves_itself() {
        let esp = Esp::new(&["up-hub_1+3.efi"], &block("up-hub_1", "", 0));
        assert!(esp.step("1", false));
        assert_eq!(esp.names(), ["up-hub_1+3.efi"]);
        assert!(!esp.step("1", true));
        assert_eq!(esp.names(), ["up-hub_1.efi"]);
        assert_eq!(esp.block(), block("up-hub_1", "", 0));
    }

    #[test]
    fn a_newer_image_is_tried_and_stays() {
        let esp = Esp::new(&["up-hub_1.efi", "up-hub_2+3-0.efi"], &block("up-hub_1", "", 0));
        assert!(!esp.step("1", false));
        assert_eq!(esp.block(), block("up-hub_1", "up-hub_2", 3));
        // Asked again before GRUB was.
        esp.step("1", false);
        assert_eq!((esp.block().tries, esp.names()[1].as_str()), (3, "up-hub_2+3-0.efi"));
        esp.tried();
        assert!(esp.step("2", false));
        assert_eq!(esp.names(), ["up-hub_1.efi", "up-hub_2+2-1.efi"]);
        assert!(!esp.step("2", true));
        assert_eq!(
            (esp.names(), esp.block()),
            (vec!["up-hub_1.efi".into(), "up-hub_2.efi".into()], block("up-hub_2", "", 0))
        );
    }

    #[test]
    fn a_newer_image_that_fails_three_times_is_not_tried_again() {
        let esp = Esp::new(&["up-hub_1.efi", "up-hub_2+3-0.efi"], &block("up-hub_1", "", 0));
        esp.step("1", false);
        for _ in 0..3 {
            esp.tried();
        }
        // It never came so far as to write; the older one finds the count.
        esp.step("1", false);
        assert_eq!(esp.names(), ["up-hub_1.efi", "up-hub_2+0-3.efi"]);
        esp.step("1", false);
        assert_eq!(esp.block(), block("up-hub_1", "up-hub_2", 0));
        // The one that mends it.
        fs::rename(
            esp.0.path().join(ENTRIES).join("up-hub_2+0-3.efi"),
            esp.0.path().join(ENTRIES).join("up-hub_3+3-0.efi"),
        )
        .unwrap();
        esp.step("1", false);
        assert_eq!(esp.block(), block("up-hub_1", "up-hub_3", 3));
    }

    #[test]
    fn cut_off_between_its_two_steps_a_good_boot_stays_one() {
        let esp = Esp::new(&["up-hub_1.efi", "up-hub_2+0-3.efi"], &block("up-hub_2", "", 0));
        assert!(esp.step("2", false), "the name was not changed yet");
        assert!(!esp.step("2", true));
        assert_eq!(esp.names(), ["up-hub_1.efi", "up-hub_2.efi"]);
    }
}
