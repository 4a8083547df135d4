//! What a legacy BIOS runs from the disk: GRUB, which takes kernel and initrd out of the same UKI that
//! firmware with UEFI runs. It loads the UKI as a disk, and executes the lines at [`SCRIPT`] in it, so
//! that a newer image brings its own. Where the fleet has Secure Boot, a BIOS would boot around it: there
//! a line says that it can't.

use std::fs;
use std::ops::Range;
use std::path::Path;

use fleet::grubenv::Block;

use crate::error::{Error, Result, fail};
use crate::toolchain::Tools;
use crate::util::process::run;

/// Room for a program in the master boot record.
const RECORD: usize = 440;
const SECTOR: usize = 512;
/// The first sector that is free in front of the partitions, behind a GPT.
pub const CORE_SECTOR: u64 = 34;

/// Where a UKI has its lines for GRUB, and how many bytes they may take. For ever the same: a disk's
/// GRUB is as old as the disk, and its images aren't.
pub const SCRIPT: Range<usize> = 256 << 10..260 << 10;

/// What GRUB needs to read its configuration from the EFI partition, to count, and to load Linux.
const MODULES: [&str; 12] = [
    "biosdisk",
    "configfile",
    "echo",
    "fat",
    "linux",
    "loadenv",
    "loopback",
    "normal",
    "part_gpt",
    "reboot",
    "sleep",
    "test",
];

/// `firstboot::update::grub` writes what is read here, and follows the count. An entry's file has whatever count
/// it had when it was last seen.
pub(crate) const CONFIG: &str = r#"load_env good next tries

function start {
    for end in .efi +3.efi +3-0.efi +2-1.efi +1-2.efi +0-3.efi; do
        set uki="/EFI/Linux/$1$end"
        if [ -n "$1" -a -f "$uki" ]; then
            loopback uki "$uki"
            source (uki)512+8
            boot
            loopback -d uki
        fi
    done
}

if [ "$tries" -gt 0 ]; then
    if [ "$tries" -ge 3 ]; then set tries=2; elif [ "$tries" = 2 ]; then set tries=1; else set tries=0; fi
    if save_env tries; then start "$next"; fi
fi
start "$good"
start "$next"
echo "bakehouse: no image on this disk can be started; trying again in 30 s"
sleep 30
reboot
"#;

/// A disk's start.
pub struct BootSector {
    /// The master boot record's program.
    pub record: [u8; RECORD],
    /// What it loads from [`CORE_SECTOR`]; none where it only says something.
    pub core: Vec<u8>,
}

/// GRUB's first and second part.
///
/// # Errors
/// GRUB is not what it should be.
pub fn grub(tools: &Tools, scratch: &Path) -> Result<BootSector> {
    let modules = tools.file("usr/lib/grub/i386-pc");
    let path = scratch.join("core");
    let mut make = tools.command("usr/bin/grub-mkimage");
    make.args(["-O", "i386-pc", "-p", "(,gpt1)/grub", "-d"]).arg(&modules).arg("-o").arg(&path).args(MODULES);
    run(&mut make, "grub-mkimage")?;
    let mut core = fs::read(&path).map_err(Error::io("read", &path))?;
    let boot = modules.join("boot.img");
    let boot = fs::read(&boot).map_err(Error::io("read", &boot))?;
    core.resize(core.len().next_multiple_of(SECTOR), 0);
    match placed(&boot, &mut core) {
        Some(record) => Ok(BootSector { record, core }),
        None => fail("GRUB is not what it should be; run `bakehouse lock --update`"),
    }
}

/// Says where the parts are, as grub-install would; the first sector of the core loads the others.
fn placed(boot: &[u8], core: &mut [u8]) -> Option<[u8; RECORD]> {
    /// Where the record has the core's first sector.
    const CORE: usize = 0x5c;
    /// A jump over what mistrusts a BIOS that gives another drive's number than a hard disk's.
    const DRIVE_CHECK: usize = 0x66;
    /// Where the core's first sector has the next one, and how many there are.
    const REST: usize = SECTOR - 12;
    let mut record: [u8; RECORD] = boot.get(..RECORD)?.try_into().ok()?;
    record.get_mut(CORE..CORE + 8)?.copy_from_slice(&CORE_SECTOR.to_le_bytes());
    record.get_mut(DRIVE_CHECK..DRIVE_CHECK + 2)?.copy_from_slice(&[0x90, 0x90]);
    let rest = (core.len() / SECTOR).checked_sub(1)?;
    core.get_mut(REST..REST + 8)?.copy_from_slice(&(CORE_SECTOR + 1).to_le_bytes());
    core.get_mut(REST + 8..REST + 10)?.copy_from_slice(&u16::try_from(rest).ok()?.to_le_bytes());
    Some(record)
}

/// GRUB's files on the EFI partition, for a disk with this image (`ID_VERSION`).
///
/// # Errors
/// The name is too long.
pub fn files(image: &str) -> Result<[(String, Vec<u8>); 2]> {
    let block = Block { good: image.to_owned(), ..Block::default() };
    let block = block.render().map_err(|e| Error::Failed(e.to_string()))?;
    Ok([("grub/grub.cfg".to_owned(), CONFIG.into()), (fleet::grubenv::BLOCK.to_owned(), block)])
}

/// What GRUB executes in a UKI, which is its disk `uki`: kernel and initrd are at these bytes of it.
/// The ticket goes where systemd's EFI stub would put it.
///
/// # Errors
/// A word for the kernel that GRUB would hand on as another one.
pub fn script(cmdline: &str, kernel: &Range<usize>, initrd: &Range<usize>) -> Result<String> {
    if let Some(word) = cmdline.split_whitespace().find(|word| word.contains(['\'', '"', '\\'])) {
        return fail(format!(
            "`cmdline` of a profile: {word}: GRUB, by which a legacy BIOS starts the image, can't hand on quotes and \
             backslashes; leave them out"
        ));
    }
    let blocks = |range: &Range<usize>| format!("(uki){}+{}", range.start / SECTOR, range.len().div_ceil(SECTOR));
    let words: String = cmdline.split_whitespace().map(|word| format!(" '{word}'")).collect();
    Ok(format!(
        "set ticket=/loader/credentials/{name}.cred\n\
         if [ -f \"$ticket\" ]; then set ticket=\"newc:.extra/global_credentials/{name}.cred:$ticket\"; else set ticket=; fi\n\
         linux {kernel}{words}\n\
         initrd {initrd} $ticket\n",
        name = fleet::Ticket::CREDENTIAL,
        kernel = blocks(kernel),
        initrd = blocks(initrd),
    ))
}

const TEXT: &str = "\r\nbakehouse: this disk needs UEFI firmware. This machine started it by its legacy BIOS: switch its \
                    settings to UEFI (often called CSM or legacy boot, off).\r\n\0";
/// Where a BIOS loads the record.
const ORIGIN: u16 = 0x7c00;

/// Prints the text, letter by letter, and waits for ever.
#[must_use]
pub fn refusal() -> BootSector {
    const LENGTH: usize = 25;
    let [low, high] = (ORIGIN + LENGTH as u16).to_le_bytes();
    let code: [u8; LENGTH] = [
        0x31, 0xc0, // xor ax, ax
        0x8e, 0xd8, // mov ds, ax
        0xfc, // cld
        0xbe, low, high, // mov si, TEXT
        0xac, // next: lodsb
        0x08, 0xc0, // or al, al
        0x74, 0x09, // jz stop
        0xb4, 0x0e, // mov ah, 0eh: write a letter
        0xbb, 0x07, 0x00, // mov bx, 7: page, colour
        0xcd, 0x10, // int 10h
        0xeb, 0xf2, // jmp next
        0xf4, // stop: hlt
        0xeb, 0xfd, // jmp stop
    ];
    let mut record = [0; RECORD];
    record[..LENGTH].copy_from_slice(&code);
    record[LENGTH..LENGTH + TEXT.len()].copy_from_slice(TEXT.as_bytes());
    BootSector { record, core: Vec::new() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lines_name_whole_sectors() {
        let script = script("roothash=12 console=tty0", &(0x4_1000..0x4_1201), &(0x8_0000..0x8_0400)).unwrap();
        assert!(script.contains("linux (uki)520+2 'roothash=12' 'console=tty0'\n"), "{script}");
        assert!(script.contains("initrd (uki)1024+2 $ticket\n"), "{script}");
    }

    #[test]
    fn what_grub_would_change_is_refused() {
        for word in ["dyndbg=\"file x +p\"", "a='b'", "a\\b"] {
            let e = script(&format!("roothash=12 {word}"), &(0..1), &(0..1)).unwrap_err().to_string();
            assert!(e.contains("`cmdline` of a profile"), "{e}");
        }
    }

    #[test]
    fn grub_executes_what_an_image_brings() {
        let place = format!("source (uki){}+{}\n", SCRIPT.start / SECTOR, SCRIPT.len() / SECTOR);
        assert!(CONFIG.contains(&place), "{place}");
        for left in 0..=fleet::grubenv::TRIES {
            assert!(CONFIG.contains(&format!(" +{left}-{}.efi", fleet::grubenv::TRIES - left)));
        }
    }

    #[test]
    fn what_is_not_grub_is_refused() {
        assert!(placed(&[0; 10], &mut [0; 1024]).is_none());
        assert!(placed(&[0; 512], &mut []).is_none());
        let mut core = [0; 1024];
        let record = placed(&[0; 512], &mut core).unwrap();
        assert_eq!((record[0x5c], core[500], core[508]), (34, 35, 1));
    }
}
