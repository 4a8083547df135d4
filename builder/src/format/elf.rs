//! Reads the loader and libraries of a program from its [ELF](https://man7.org/linux/man-pages/man5/elf.5.html) file,
//! and the libraries that it opens with dlopen from its
//! [ELF dlopen metadata](https://uapi-group.org/specifications/specs/elf_dlopen_metadata/), which systemd's programs
//! have.

use object::read::elf::{Dyn as _, ElfFile64, FileHeader as _, ProgramHeader as _};
use object::{Endianness, elf};

/// Files that a program needs to run.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// Path of the loader (`PT_INTERP`).
    pub interpreter: Option<String>,
    /// Names of the libraries that the loader maps (`DT_NEEDED`).
    pub libraries: Vec<String>,
    /// Folders that the loader searches first, separated by `:` (`DT_RUNPATH`).
    pub runpath: Option<String>,
    /// Libraries that the program opens with dlopen. For each, the alternatives in the order of preference.
    pub opened: Vec<Vec<String>>,
}

/// Owner and type of a note with dlopen metadata.
const DLOPEN_OWNER: &[u8] = b"FDO";
const DLOPEN_TYPE: elf::NoteType = elf::NoteType(0x407c_0c0a);

/// Returns the needs of a program; `None` if the bytes are not a 64-bit ELF file.
#[must_use]
pub fn needs(bytes: &[u8]) -> Option<Needs> {
    let file = ElfFile64::<Endianness>::parse(bytes).ok()?;
    let (header, endian) = (file.elf_header(), file.endian());
    let mut needs = Needs::default();
    for segment in header.program_headers(endian, bytes).ok()? {
        if segment.p_type(endian) == elf::PT_INTERP {
            let path = segment.data(endian, bytes).ok()?;
            needs.interpreter = Some(String::from_utf8_lossy(path.split(|b| *b == 0).next()?).into_owned());
        }
        if let Ok(Some(mut notes)) = segment.notes(endian, bytes) {
            while let Ok(Some(note)) = notes.next() {
                if note.name() == DLOPEN_OWNER && note.n_type(endian) == DLOPEN_TYPE {
                    needs.opened.extend(dlopen_note(note.desc()));
                }
            }
        }
    }
    let sections = header.sections(endian, bytes).ok()?;
    if let Ok(Some((dynamic, link))) = sections.dynamic(endian, bytes) {
        let strings = sections.strings(endian, bytes, link).ok()?;
        let text = |d: &elf::Dyn64<Endianness>| {
            d.string(endian, strings).ok().map(|s| String::from_utf8_lossy(s).into_owned())
        };
        for entry in dynamic {
            match entry.d_tag(endian) {
                elf::DT_NEEDED => needs.libraries.extend(text(entry)),
                elf::DT_RUNPATH | elf::DT_RPATH => needs.runpath = text(entry),
                _ => {}
            }
        }
    }
    Some(needs)
}

fn dlopen_note(desc: &[u8]) -> Vec<Vec<String>> {
    #[derive(serde::Deserialize)]
    struct Feature {
        soname: Vec<String>,
    }
    let text = desc.split(|b| *b == 0).next().unwrap_or_default();
    serde_json::from_slice::<Vec<Feature>>(text).unwrap_or_default().into_iter().map(|f| f.soname).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_loader_and_libraries_of_ls() {
        let needs = needs(&std::fs::read("/bin/ls").unwrap()).unwrap();
        assert_eq!(needs.interpreter.as_deref(), Some("/lib64/ld-linux-x86-64.so.2"));
        assert!(needs.libraries.contains(&"libc.so.6".to_owned()), "{needs:?}");
    }

    #[test]
    fn rejects_text() {
        assert_eq!(needs(b"#!/bin/sh\n"), None);
    }

    proptest::proptest! {
        #[test]
        fn parse_never_panics(tail: Vec<u8>) {
            let _ = needs(&tail);
            let _ = needs(&[b"\x7fELF\x02\x01\x01".as_slice(), &tail].concat());
        }
    }
}
