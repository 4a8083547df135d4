//! Embeds `profiles/` and `overlays/` in the binary: an installed `bakehouse` needs no
//! source tree beside it.

use std::fmt::Write;
use std::path::Path;
use std::{env, fs};

fn main() {
    let root = Path::new(&env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it")).join("..");
    let mut table = String::from("pub static FILES: &[(&str, &[u8])] = &[\n");
    for top in ["profiles", "overlays"] {
        println!("cargo::rerun-if-changed={}", root.join(top).display());
        for entry in walkdir::WalkDir::new(root.join(top)).sort_by_file_name() {
            let entry = entry.expect("the source tree is readable");
            if entry.file_type().is_dir() {
                println!("cargo::rerun-if-changed={}", entry.path().display());
                continue;
            }
            let name = entry.path().strip_prefix(&root).expect("it is below the root");
            let absolute = entry.path().canonicalize().expect("it exists");
            writeln!(table, "    ({:?}, include_bytes!({absolute:?})),", name.display().to_string())
                .expect("writing to a string");
        }
    }
    table.push_str("];\n");
    let out = Path::new(&env::var_os("OUT_DIR").expect("cargo sets it")).join("assets.rs");
    fs::write(out, table).expect("OUT_DIR is writable");
}
