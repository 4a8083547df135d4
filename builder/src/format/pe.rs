//! Adds sections to [PE](https://learn.microsoft.com/windows/win32/debug/pe-format) files.

use std::ops::Range;

const SECTION: usize = 40;
/// Flags of a section: initialised data, readable.
const FLAGS: u32 = 0x4000_0040;
/// The specification's limit.
const MAX_FILE_ALIGNMENT: u32 = 64 << 10;

/// Adds sections to a PE file. Returns the new file, and the range of each section's content in it. Returns `None` if
/// `stub` is not a PE file with room for the sections.
pub(crate) fn append(stub: &[u8], sections: &[(&[u8; 8], &[u8])]) -> Option<(Vec<u8>, Vec<Range<usize>>)> {
    let u16_at = |at: usize| Some(u16::from_le_bytes(stub.get(at..at + 2)?.try_into().ok()?));
    let u32_at = |at: usize| Some(u32::from_le_bytes(stub.get(at..at + 4)?.try_into().ok()?));
    let pe = u32_at(0x3c)? as usize;
    if stub.get(..2)? != b"MZ" || stub.get(pe..pe + 4)? != b"PE\0\0" {
        return None;
    }
    let count = usize::from(u16_at(pe + 6)?);
    let optional = pe + 24;
    let table = optional + usize::from(u16_at(pe + 20)?);
    let (section_align, file_align) = (u32_at(optional + 32)?, u32_at(optional + 36)?);
    let headers = u32_at(optional + 60)? as usize;
    if table + (count + sections.len()) * SECTION > headers
        || !section_align.is_power_of_two()
        || !file_align.is_power_of_two()
        || file_align > MAX_FILE_ALIGNMENT
    {
        return None;
    }
    let last = table + (count.checked_sub(1)?) * SECTION;
    let mut address = u32_at(last + 12)?.checked_add(u32_at(last + 8)?)?.checked_next_multiple_of(section_align)?;
    let mut out = stub.to_vec();
    let mut ranges = Vec::new();
    for (i, (name, content)) in sections.iter().enumerate() {
        let size = u32::try_from(content.len()).ok()?;
        out.resize(out.len().next_multiple_of(file_align as usize), 0);
        let offset = u32::try_from(out.len()).ok()?;
        ranges.push(out.len()..out.len() + content.len());
        out.extend_from_slice(content);
        out.resize(out.len().next_multiple_of(file_align as usize), 0);
        let raw = u32::try_from(out.len()).ok()? - offset;
        let mut header = name.to_vec();
        for field in [size, address, raw, offset, 0, 0, 0, FLAGS] {
            header.extend_from_slice(&field.to_le_bytes());
        }
        let at = table + (count + i) * SECTION;
        out.get_mut(at..at + SECTION)?.copy_from_slice(&header);
        address = address.checked_add(size)?.checked_next_multiple_of(section_align)?;
    }
    let count = u16::try_from(count + sections.len()).ok()?;
    out.get_mut(pe + 6..pe + 8)?.copy_from_slice(&count.to_le_bytes());
    out.get_mut(optional + 56..optional + 60)?.copy_from_slice(&address.to_le_bytes());
    Some((out, ranges))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns a PE file with one section and these alignments.
    fn stub(section_align: u32, file_align: u32) -> Vec<u8> {
        let mut bytes = vec![0; 1024];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, b"MZ");
        put(0x3c, &0x40_u32.to_le_bytes());
        put(0x40, b"PE\0\0");
        put(0x46, &1_u16.to_le_bytes());
        put(0x54, &112_u16.to_le_bytes());
        put(0x58 + 32, &section_align.to_le_bytes());
        put(0x58 + 36, &file_align.to_le_bytes());
        put(0x58 + 60, &1024_u32.to_le_bytes());
        put(0x58 + 112 + 8, &1_u32.to_le_bytes());
        put(0x58 + 112 + 12, &4096_u32.to_le_bytes());
        bytes
    }

    #[test]
    fn rejects_alignment_that_overflows_an_address() {
        let sections: [(&[u8; 8], &[u8]); 2] = [(b".initrd\0", b"x"), (b".linux\0\0", b"y")];
        let (out, ranges) = append(&stub(4096, 512), &sections).unwrap();
        assert_eq!(ranges, [1024..1025, 1536..1537]);
        assert_eq!(out.len(), 2048);
        assert!(append(&stub(1 << 31, 512), &sections).is_none());
        assert!(append(&stub(4096, 1 << 31), &sections).is_none());
    }

    proptest::proptest! {
        #[test]
        fn parse_never_panics(mut stub in proptest::collection::vec(proptest::num::u8::ANY, 0..600), pe in 0u32..700) {
            if stub.len() > 0x40 {
                stub[..2].copy_from_slice(b"MZ");
                stub[0x3c..0x40].copy_from_slice(&pe.to_le_bytes());
            }
            let _ = append(&stub, &[(b".linux\0\0", b"x")]);
        }
    }
}
