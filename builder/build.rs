//! Embeds `profiles/` and `overlays/` in the binary, so that an installed `bakehouse` needs no source tree. Hashes the
//! code of each step, so that a build repeats a step whose code changed.

mod steps;

use std::fmt::Write;
use std::path::Path;
use std::process::Command;
use std::{env, fs};

use sha2::{Digest as _, Sha256};
use steps::{STEPS, Step};

fn main() {
    let root = Path::new(&env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it")).join("..");
    let mut table = String::from("pub(crate) static FILES: &[(&str, &[u8])] = &[\n");
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
    for Step { name, code, inputs } in &STEPS {
        assert!(inputs.iter().all(|input| STEPS.iter().any(|step| step.name == *input)), "{name} has an unknown input");
        println!("cargo::rustc-env=CODE_{name}={}", digest(code));
    }
    let version = env::var("CARGO_PKG_VERSION").expect("cargo sets it");
    let commit = commit(&root).map(|commit| format!(" ({commit})")).unwrap_or_default();
    println!("cargo::rustc-env=BAKEHOUSE_VERSION={version}{commit}");
    let out = Path::new(&env::var_os("OUT_DIR").expect("cargo sets it")).join("assets.rs");
    fs::write(out, table).expect("OUT_DIR is writable");
}

/// Returns the commit of the sources, for `bakehouse --version`: from BAKEHOUSE_COMMIT, else from git, as it was when the
/// sources of the crate last changed. No step of a build has it in its key, and no image has it.
fn commit(root: &Path) -> Option<String> {
    println!("cargo::rerun-if-env-changed=BAKEHOUSE_COMMIT");
    if let Some(given) = env::var("BAKEHOUSE_COMMIT").ok().filter(|commit| !commit.is_empty()) {
        return Some(given);
    }
    let git = |args: &[&str]| {
        let output = Command::new("git").arg("-C").arg(root).args(args).output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?.trim().to_owned();
        (output.status.success() && !text.is_empty()).then_some(text)
    };
    // Sources that were unpacked inside another repository are not of its commit.
    if Path::new(&git(&["rev-parse", "--show-toplevel"])?).canonicalize().ok()? != root.canonicalize().ok()? {
        return None;
    }
    // Not again for each commit, which would compile the crate and link all tests. A package sets BAKEHOUSE_COMMIT.
    git(&["rev-parse", "--short=12", "HEAD"])
}

/// Returns the digest of the files' names and contents.
fn digest(paths: &[&str]) -> String {
    let mut hash = Sha256::new();
    for path in paths {
        println!("cargo::rerun-if-changed={path}");
        for entry in walkdir::WalkDir::new(path).sort_by_file_name() {
            let entry = entry.expect("the source tree is readable");
            if entry.file_type().is_file() {
                let bytes = fs::read(entry.path()).expect("the source tree is readable");
                hash.update(entry.path().to_string_lossy().as_bytes());
                hash.update((bytes.len() as u64).to_le_bytes());
                hash.update(bytes);
            }
        }
    }
    hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
}
