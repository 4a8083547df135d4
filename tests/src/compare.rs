//! Comparison of two builds that must be identical.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

/// Describes the first difference between two folders of artefacts, or returns `None`. For disk images the description
/// names the byte and its partition.
pub fn first_difference(a: &Path, b: &Path, names: &[String]) -> Option<String> {
    names.iter().find_map(|name| {
        let at = differing_byte(&a.join(name), &b.join(name))?;
        let path = Path::new(name);
        let place = if path.extension().is_some_and(|e| e == "raw") { partition_of(at) } else { "" };
        Some(format!("{name} differs at byte {at} {place}"))
    })
}

/// Returns the entries that differ between two tar files: path → kind of difference.
pub fn tar_differences(a: &Path, b: &Path) -> BTreeMap<String, &'static str> {
    let list = |path: &Path| -> BTreeMap<String, (String, Vec<u8>)> {
        let mut archive = tar::Archive::new(File::open(path).expect("the tar file exists"));
        let entries = archive.entries().expect("a tar file");
        entries
            .map(|entry| {
                let mut entry = entry.expect("a complete entry");
                let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
                let header = format!("{:?}", entry.header());
                let mut content = Vec::new();
                entry.read_to_end(&mut content).expect("a complete entry");
                (name, (header, content))
            })
            .collect()
    };
    let (a, b) = (list(a), list(b));
    let mut found = BTreeMap::new();
    for name in a.keys().chain(b.keys()) {
        match (a.get(name), b.get(name)) {
            (Some(x), Some(y)) if x.1 != y.1 => found.insert(name.clone(), "content"),
            (Some(x), Some(y)) if x.0 != y.0 => found.insert(name.clone(), "owner, mode or type"),
            (Some(_), Some(_)) => None,
            (Some(_), None) => found.insert(name.clone(), "only in the first"),
            _ => found.insert(name.clone(), "only in the second"),
        };
    }
    found
}

fn differing_byte(a: &Path, b: &Path) -> Option<u64> {
    let (mut fa, mut fb) = (File::open(a).ok()?, File::open(b).ok()?);
    let (la, lb) = (fs::metadata(a).ok()?.len(), fs::metadata(b).ok()?.len());
    let (mut ba, mut bb) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let mut at = 0;
    while at < la.min(lb) {
        let n = (la.min(lb) - at).min(1 << 20) as usize;
        fa.seek(SeekFrom::Start(at)).and_then(|_| fa.read_exact(&mut ba[..n])).ok()?;
        fb.seek(SeekFrom::Start(at)).and_then(|_| fb.read_exact(&mut bb[..n])).ok()?;
        if let Some(i) = (0..n).find(|i| ba[*i] != bb[*i]) {
            return Some(at + i as u64);
        }
        at += n as u64;
    }
    (la != lb).then_some(la.min(lb))
}

fn partition_of(at: u64) -> &'static str {
    match at >> 20 {
        0 => "(the GPT)",
        1..=256 => "(the EFI partition)",
        _ => "(root or its verity tree)",
    }
}
