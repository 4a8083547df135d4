//! GRUB, which a legacy BIOS starts from the disk. GRUB loads kernel and initrd from the UKI that UEFI firmware starts.
//! It opens the UKI as a loopback disk and executes the script at [`SCRIPT`] in it, so that each image has its own
//! script. A legacy BIOS would bypass Secure Boot. Disks of a fleet with Secure Boot therefore have a boot sector that
//! only prints an error.

use std::fs;
use std::ops::Range;
use std::path::Path;

use fleet::grubenv::Block;

use crate::error::{Error, Result, fail};
use crate::toolchain::Tools;
use crate::util::process::run;

/// Size of the code in a master boot record, in bytes.
const RECORD: usize = 440;
const SECTOR: usize = 512;
/// The first free sector between the GPT and the partitions.
pub(crate) const CORE_SECTOR: u64 = 34;

/// Position of GRUB's script in a UKI, in bytes. It must never change, because updates replace the UKI but not the
/// disk's GRUB.
pub(crate) const SCRIPT: Range<usize> = 256 << 10..260 << 10;

/// Modules with which GRUB reads its configuration from the ESP, counts boot attempts, and loads Linux.
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

/// GRUB's configuration. `firstboot::update::grub` writes the environment block that it reads. The file name of a UKI
/// may have any count of boot attempts, so the configuration looks for all of them.
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

/// Boot sectors of a disk.
pub(crate) struct BootSector {
    /// Code of the master boot record.
    pub record: [u8; RECORD],
    /// GRUB's core, which the record loads from [`CORE_SECTOR`]. Empty if the record only prints an error.
    pub core: Vec<u8>,
}

/// Returns GRUB's boot record and core.
///
/// # Errors
/// If grub-mkimage fails, or its output has an unknown layout.
pub(crate) fn grub(tools: &Tools, scratch: &Path) -> Result<BootSector> {
    let modules = tools.file("usr/lib/grub/i386-pc");
    let path = scratch.join("core");
    let mut make = tools.command("usr/bin/grub-mkimage");
    make.args(["-O", "i386-pc", "-p", "(,gpt1)/grub", "-d"]).arg(&modules).arg("-o").arg(&path).args(MODULES);
    run(&mut make, "grub-mkimage")?;
    let mut core = fs::read(&path).map_err(Error::io("read", &path))?;
    let boot = modules.join("boot.img");
    let boot = fs::read(&boot).map_err(Error::io("read", &boot))?;
    core.resize(core.len().next_multiple_of(SECTOR), 0);
    match install(&boot, &mut core) {
        Some(record) => Ok(BootSector { record, core }),
        None => fail("the locked GRUB has an unknown layout; run `bakehouse lock --update`"),
    }
}

/// Writes the sector numbers into the boot record and the core, as grub-install does. The first sector of the core
/// loads the others.
fn install(boot: &[u8], core: &mut [u8]) -> Option<[u8; RECORD]> {
    /// Offset of the core's first sector in the record.
    const CORE: usize = 0x5c;
    /// Offset of a jump that skips the check of the BIOS's drive number. grub-install replaces it by two NOPs.
    const DRIVE_CHECK: usize = 0x66;
    /// Offset in the core's first sector of the next sector's number, and of the number of sectors.
    const REST: usize = SECTOR - 12;
    let mut record: [u8; RECORD] = boot.get(..RECORD)?.try_into().ok()?;
    record.get_mut(CORE..CORE + 8)?.copy_from_slice(&CORE_SECTOR.to_le_bytes());
    record.get_mut(DRIVE_CHECK..DRIVE_CHECK + 2)?.copy_from_slice(&[0x90, 0x90]);
    let rest = (core.len() / SECTOR).checked_sub(1)?;
    core.get_mut(REST..REST + 8)?.copy_from_slice(&(CORE_SECTOR + 1).to_le_bytes());
    core.get_mut(REST + 8..REST + 10)?.copy_from_slice(&u16::try_from(rest).ok()?.to_le_bytes());
    Some(record)
}

/// Returns GRUB's files in the ESP, for a disk with this image (`ID_VERSION`).
///
/// # Errors
/// If the name is too long.
pub(crate) fn files(image: &str) -> Result<[(String, Vec<u8>); 2]> {
    let block = Block { good: image.to_owned(), ..Block::default() };
    let block = block.render().map_err(Error::cannot("make GRUB's environment block"))?;
    Ok([("grub/grub.cfg".to_owned(), CONFIG.into()), (fleet::grubenv::BLOCK.to_owned(), block)])
}

/// Returns the script of a UKI, which GRUB has opened as the disk `uki`. Kernel and initrd are at these bytes of the
/// UKI. The script passes the ticket in the path where systemd's EFI stub would put it.
///
/// # Errors
/// If GRUB would change an option of the kernel.
pub(crate) fn script(cmdline: &str, kernel: &Range<usize>, initrd: &Range<usize>) -> Result<String> {
    if let Some(word) = cmdline.split_whitespace().find(|word| word.contains(['\'', '"', '\\'])) {
        return fail(format!(
            "`cmdline` of a profile: {word}: GRUB, which starts the image on a legacy BIOS, cannot pass quotes and \
             backslashes; remove them"
        ));
    }
    let blocks = |range: &Range<usize>| format!("(uki){}+{}", range.start / SECTOR, range.len().div_ceil(SECTOR));
    let options: String = cmdline.split_whitespace().map(|word| format!(" '{word}'")).collect();
    Ok(format!(
        "set ticket=/loader/credentials/{name}.cred\n\
         if [ -f \"$ticket\" ]; then set ticket=\"newc:.extra/global_credentials/{name}.cred:$ticket\"; \
         else set ticket=; fi\n\
         linux {kernel}{options}\n\
         initrd {initrd} $ticket\n",
        name = fleet::Ticket::CREDENTIAL,
        kernel = blocks(kernel),
        initrd = blocks(initrd),
    ))
}

const TEXT: &str = "\r\nbakehouse: this disk needs UEFI firmware, but this machine started it by its\r\n\
                    legacy BIOS. Enable UEFI boot and disable CSM in the firmware settings.\r\n\0";
/// Address to which a BIOS loads the record.
const ORIGIN: u16 = 0x7c00;

/// Returns a boot record that prints an error and halts.
#[must_use]
pub(crate) fn refusal() -> BootSector {
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
        0xb4, 0x0e, // mov ah, 0eh: print a character
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
    fn script_reads_kernel_and_initrd_by_sector() {
        let script = script("roothash=12 console=tty0", &(0x4_1000..0x4_1201), &(0x8_0000..0x8_0400)).unwrap();
        assert!(script.contains("linux (uki)520+2 'roothash=12' 'console=tty0'\n"), "{script}");
        assert!(script.contains("initrd (uki)1024+2 $ticket\n"), "{script}");
    }

    #[test]
    fn rejects_options_that_grub_changes() {
        for word in ["dyndbg=\"file x +p\"", "a='b'", "a\\b"] {
            let e = script(&format!("roothash=12 {word}"), &(0..1), &(0..1)).unwrap_err().to_string();
            assert!(e.contains("`cmdline` of a profile"), "{e}");
        }
    }

    #[test]
    fn config_sources_the_script_of_an_image() {
        let place = format!("source (uki){}+{}\n", SCRIPT.start / SECTOR, SCRIPT.len() / SECTOR);
        assert!(CONFIG.contains(&place), "{place}");
        for left in 0..=fleet::grubenv::TRIES {
            assert!(CONFIG.contains(&format!(" +{left}-{}.efi", fleet::grubenv::TRIES - left)));
        }
    }

    #[test]
    fn rejects_invalid_grub() {
        assert!(install(&[0; 10], &mut [0; 1024]).is_none());
        assert!(install(&[0; 512], &mut []).is_none());
        let mut core = [0; 1024];
        let record = install(&[0; 512], &mut core).unwrap();
        assert_eq!((record[0x5c], core[500], core[508]), (34, 35, 1));
    }
}
