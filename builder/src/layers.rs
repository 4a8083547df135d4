//! Tests of the source tree: which folder may import which, and which code a step's key covers.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

#[path = "../steps.rs"]
mod steps;

use steps::{STEPS, Step};

/// Folders and files of `src/`. Each imports only itself and those after it.
const ORDER: [&str; 18] = [
    "cli",
    "rehearse",
    "deploy",
    "vm",
    "image",
    "worker",
    "bake",
    "assemble",
    "toolchain",
    "compose",
    "packages",
    "keys",
    "project",
    "format",
    "store",
    "sandbox",
    "util",
    "progress",
];
/// The last layer. It imports no other module of the crate.
const LAST: &str = "error";
/// Folders that do not depend on a fleet, with everything that they may import.
const PURE: [(&str, &[&str]); 2] = [("format", &["util", LAST]), ("util", &[LAST])];

/// Modules whose code is not part of any step's key. The values that `lock` and `project` pass to a step are part of
/// the key. The other modules only report errors and progress, and locate files.
const NOT_KEYED: [&str; 5] =
    ["src/error.rs", "src/packages/lock.rs", "src/progress.rs", "src/project/mod.rs", "src/store.rs"];

/// Returns the sources below a file or folder of `builder/`: path → text.
fn sources(path: &str) -> BTreeMap<String, String> {
    let full = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    if full.is_file() {
        let text = fs::read_to_string(full).unwrap();
        return if path.ends_with(".rs") { BTreeMap::from([(path.to_owned(), text)]) } else { BTreeMap::new() };
    }
    let entries = fs::read_dir(full).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    entries.flat_map(|name| sources(&format!("{path}/{name}"))).collect()
}

/// Returns the paths that a source imports, from the crate's root: `util::fs::write_atomic`.
fn imports(file: &str, text: &str) -> BTreeSet<String> {
    let module = file.trim_start_matches("src/").trim_end_matches(".rs").trim_end_matches("/mod");
    let parent = module.rsplit_once('/').map_or("", |(parent, _)| parent).replace('/', "::");
    let mut found = Vec::new();
    for (word, prefix) in [("crate::", ""), ("super::", parent.as_str())] {
        for (at, _) in text.match_indices(word) {
            let part_of_name = |c: char| c.is_alphanumeric() || matches!(c, '_' | '$' | ':');
            if !text[..at].ends_with(part_of_name) {
                names(&text[at + word.len()..], prefix, &mut found);
            }
        }
    }
    found.into_iter().filter(|path| !path.is_empty()).collect()
}

/// Adds the paths of a tree of imports, `a::{b, c::d}`. Returns the text after the tree.
fn names<'a>(mut text: &'a str, prefix: &str, found: &mut Vec<String>) -> &'a str {
    let mut path = prefix.to_owned();
    loop {
        if let Some(inner) = text.strip_prefix('{') {
            text = inner.trim_start();
            while !text.is_empty() && !text.starts_with('}') {
                text = names(text, &path, found).trim_start_matches(|c: char| c == ',' || c.is_whitespace());
            }
            return text.strip_prefix('}').unwrap_or(text);
        }
        let end = text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
        if end > 0 {
            path = if path.is_empty() { text[..end].to_owned() } else { format!("{path}::{}", &text[..end]) };
        }
        text = &text[end..];
        if let Some(rest) = text.strip_prefix("::") {
            text = rest;
            continue;
        }
        found.push(path);
        // A `*` ends a path, too.
        return if end == 0 { text.get(1..).unwrap_or_default() } else { text };
    }
}

/// Returns the file of the module that a path names.
fn file_of(path: &str) -> Option<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let segments: Vec<&str> = path.split("::").collect();
    (1..=segments.len()).rev().find_map(|n| {
        let module = format!("src/{}", segments[..n].join("/"));
        [format!("{module}.rs"), format!("{module}/mod.rs")].into_iter().find(|file| root.join(file).is_file())
    })
}

fn layer(path: &str) -> &str {
    path.split([':', '/', '.']).next().unwrap_or_default()
}

fn may_import(from: &str, to: &str) -> bool {
    let position = |name: &str| ORDER.iter().chain([&LAST]).position(|layer| *layer == name);
    let pure = PURE.iter().find(|(folder, _)| *folder == from);
    from == to || position(from) < position(to) && pure.is_none_or(|(_, allowed)| allowed.contains(&to))
}

#[test]
fn imports_follow_the_order_of_layers() {
    let mut violations = Vec::new();
    for (file, text) in sources("src") {
        let from = layer(file.trim_start_matches("src/"));
        if ["lib", "main", "layers"].contains(&from) {
            continue;
        }
        assert!(ORDER.contains(&from) || from == LAST, "{file}: `{from}` is not in ORDER");
        for path in imports(&file, &text) {
            if !may_import(from, layer(&path)) {
                violations.push(format!("{file} imports {path}: {from} must not import {}", layer(&path)));
            }
        }
    }
    assert!(violations.is_empty(), "{}", violations.join("\n"));
}

#[test]
fn steps_list_existing_files() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for step in &STEPS {
        for path in step.code {
            assert!(root.join(path).exists(), "{}: {path} does not exist", step.name);
        }
    }
}

#[test]
fn step_keys_cover_imported_code() {
    fn covers(step: &Step, file: &str) -> bool {
        let own = step.code.iter().any(|code| file == *code || file.starts_with(&format!("{code}/")));
        let input = |name: &&str| STEPS.iter().any(|other| other.name == *name && covers(other, file));
        own || step.inputs.iter().any(input)
    }
    let mut missing = BTreeSet::new();
    for step in &STEPS {
        for (file, text) in step.code.iter().filter(|code| code.starts_with("src")).flat_map(|code| sources(code)) {
            let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
            for imported in imports(&file, code).iter().filter_map(|path| file_of(path)) {
                if !NOT_KEYED.contains(&imported.as_str()) && !covers(step, &imported) {
                    missing.insert(format!("{}: {file} imports {imported}, which is not in its code", step.name));
                }
            }
        }
    }
    assert!(missing.is_empty(), "builder/steps.rs:\n{}", missing.into_iter().collect::<Vec<_>>().join("\n"));
}

#[test]
fn compose_key_covers_initrd_provider() {
    let defines = |(file, text): &(String, String)| file != "src/layers.rs" && text.contains("const INITRD_PROVIDER:");
    let (file, _) = sources("src").into_iter().find(defines).expect("a file defines INITRD_PROVIDER");
    let compose = STEPS.iter().find(|step| step.name == "COMPOSE").expect("a step composes");
    assert!(compose.code.iter().any(|code| file.starts_with(code)), "{file} is not in the code of COMPOSE");
}

#[test]
fn finds_imports_in_every_form() {
    let text = "use crate::a::{self, b, c::{D, E as F}};\nuse super::g;\nfn f() { crate::h::i(); }\nuse crate::j::*;\n";
    let found = imports("src/k/l.rs", text);
    for path in ["a::self", "a::b", "a::c::D", "a::c::E", "k::g", "h::i", "j"] {
        assert!(found.contains(path), "{path}: {found:?}");
    }
    assert!(may_import("cli", "error") && !may_import("util", "progress") && !may_import("store", "packages"));
}
