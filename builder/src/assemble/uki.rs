//! Builds a [unified kernel image](https://uapi-group.org/specifications/specs/unified_kernel_image/): systemd's EFI
//! stub with kernel, initrd and command line as sections of the PE file.

use crate::assemble::grub;
use crate::error::{Result, fail};
use crate::format::pe::append;

/// Text sections of a UKI.
pub struct Text<'a> {
    /// The kernel's command line.
    pub cmdline: &'a str,
    /// Content of the os-release file, which systemd-boot shows in its menu.
    pub os_release: &'a str,
    /// Version of the kernel, as `uname -r` prints it.
    pub uname: &'a str,
}

/// Builds a UKI. With `bios`, it has a script with which GRUB starts it on a legacy BIOS.
///
/// # Errors
/// If the stub is not a PE file with room for the sections.
pub fn build(stub: &[u8], kernel: &[u8], initrd: &[u8], text: &Text, bios: bool) -> Result<Vec<u8>> {
    // The script needs the positions of the other sections, so it is written last. The sections follow each other
    // without a gap.
    let room = if bios { grub::SCRIPT.end.saturating_sub(stub.len()) } else { 0 };
    let blank = vec![b'\n'; room];
    let sections: [(&[u8; 8], &[u8]); 6] = [
        (b".grub\0\0\0", &blank),
        (b".osrel\0\0", text.os_release.as_bytes()),
        (b".cmdline", text.cmdline.as_bytes()),
        (b".uname\0\0", text.uname.as_bytes()),
        (b".initrd\0", initrd),
        (b".linux\0\0", kernel),
    ];
    let Some((mut uki, places)) = append(stub, &sections[usize::from(!bios)..]) else {
        return fail("the locked systemd EFI stub is not a valid PE file; run `bakehouse lock --update`");
    };
    if let ([grub, .., initrd, kernel], true) = (&places[..], bios) {
        let script = grub::script(text.cmdline, kernel, initrd)?;
        if grub.start > grub::SCRIPT.start || grub.end != grub::SCRIPT.end || script.len() > grub::SCRIPT.len() {
            return fail("systemd's EFI stub and the kernel's command line leave no room for GRUB's script");
        }
        uki[grub::SCRIPT.start..][..script.len()].copy_from_slice(script.as_bytes());
    }
    Ok(uki)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rejects_invalid_stub() {
        let text = Text { cmdline: "", os_release: "", uname: "" };
        assert!(build(b"", b"", b"", &text, true).is_err());
        assert!(build(b"MZ nothing more", b"", b"", &text, false).is_err());
    }
}
