//! Test of the order of this crate's modules.
//!
//! ```text
//! agent -> member, dns, lan -> api, hub, update, render -> mesh -> node -> client, host, server -> error
//! install -> client, host -> error
//! ```
//!
//! A module imports only modules to its right. Modules in the same place do not import each other, and only the program
//! `firstboot-install` uses `install`. The test ignores `super::` paths, because they stay within a folder.

use std::fs;
use std::path::Path;

const ORDER: [&[&str]; 7] = [
    &["agent"],
    &["member", "dns", "lan"],
    &["api", "hub", "update", "render"],
    &["mesh"],
    &["node"],
    &["client", "host", "server"],
    &["error"],
];
const INSTALL: &str = "install";
const UNDER_INSTALL: [&str; 3] = ["client", "host", "error"];

/// Files of the crate that belong to no module of the order.
const OUTSIDE: [&str; 4] = ["lib.rs", "main.rs", "bin", "layers.rs"];

fn place(module: &str) -> Option<usize> {
    ORDER.iter().position(|names| names.contains(&module))
}

fn may_import(from: &str, to: &str) -> bool {
    match (place(from), place(to)) {
        _ if from == to => true,
        (Some(from), Some(to)) => from < to,
        (None, Some(_)) => from == INSTALL && UNDER_INSTALL.contains(&to),
        _ => false,
    }
}

/// Returns the imports of a module's source that violate the order.
fn violations(from: &str, source: &str) -> Vec<String> {
    let code = source.lines().map(|line| line.split("//").next().unwrap_or_default());
    let name = |path: &str| path.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let imports = code.flat_map(|line| line.split("crate::").skip(1).map(name));
    imports.filter(|to| !may_import(from, to)).map(|to| format!("`{from}` imports `crate::{to}`")).collect()
}

#[test]
fn modules_import_only_modules_to_their_right() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    for entry in walkdir::WalkDir::new(&src) {
        let entry = entry.unwrap();
        let path = entry.path().strip_prefix(&src).unwrap();
        let top = path.iter().next().and_then(|name| name.to_str()).unwrap_or_default();
        if entry.file_type().is_dir() || OUTSIDE.contains(&top) {
            continue;
        }
        let module = top.trim_end_matches(".rs");
        assert!(place(module).is_some() || module == INSTALL, "`{module}` has no place in ORDER");
        let source = fs::read_to_string(entry.path()).unwrap();
        found.extend(violations(module, &source).into_iter().map(|text| format!("{}: {text}", path.display())));
    }
    assert!(found.is_empty(), "imports violate the order in layers.rs:\n{}", found.join("\n"));
}

#[test]
fn rejects_imports_against_the_order() {
    assert_eq!(violations("hub", "use crate::node::keys::Keys;\nuse crate::hub::rate::Rate; // crate::agent"), [""; 0]);
    for (from, to) in [
        ("node", "hub"),
        ("hub", "update"),
        ("client", "host"),
        ("error", "host"),
        ("install", "node"),
        ("hub", "install"),
        ("member", "agent"),
    ] {
        let inline = format!("    let x = crate::{to}::y();");
        assert_eq!(violations(from, &inline), [format!("`{from}` imports `crate::{to}`")]);
    }
    assert_eq!(
        violations("node", "use crate::{error, hub};").len(),
        1,
        "a group of modules passes: write one `use` line for each module"
    );
}
