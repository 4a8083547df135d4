//! Golden files of every configuration that a node renders, for each fleet that Bakehouse ships, and generated files of
//! the documentation.
//! `UPDATE_GOLDEN=1 cargo test --test fast golden::` writes them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use bakehouse_tests::root;
use builder::project::Project;
use fleet::Membership;
use pikchr::{Pikchr, PikchrFlags};

#[test]
fn rendered_configurations_match_golden_files() {
    let golden = root().join("tests/golden");
    let rendered = rendered();
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        let _ = fs::remove_dir_all(&golden);
        for (path, text) in &rendered {
            let path = golden.join(path);
            fs::create_dir_all(path.parent().expect("a folder")).expect("tests/golden");
            fs::write(path, text).expect("tests/golden");
        }
    }
    let reviewed: BTreeMap<PathBuf, String> = walkdir::WalkDir::new(&golden)
        .into_iter()
        .map(|entry| entry.expect("tests/golden"))
        .filter(|entry| entry.file_type().is_file())
        .map(|entry| {
            let path = entry.path().strip_prefix(&golden).expect("a path in tests/golden").to_owned();
            (path, fs::read_to_string(entry.path()).expect("text"))
        })
        .collect();
    let mut wrong = Vec::new();
    for path in rendered.keys().chain(reviewed.keys().filter(|p| !rendered.contains_key(*p))) {
        match (rendered.get(path), reviewed.get(path)) {
            (Some(new), Some(old)) if new == old => {}
            (Some(new), Some(old)) => {
                let line = new.lines().zip(old.lines()).position(|(n, o)| n != o).unwrap_or(0);
                let at = |text: &str| text.lines().nth(line).unwrap_or_default().to_owned();
                wrong.push(format!("{}:{}\n  - {}\n  + {}", path.display(), line + 1, at(old), at(new)));
            }
            (Some(_), None) => wrong.push(format!("{} has no golden file", path.display())),
            _ => wrong.push(format!("{} is no longer rendered", path.display())),
        }
    }
    assert!(wrong.is_empty(), "review the change, then run with UPDATE_GOLDEN=1:\n{}", wrong.join("\n"));
}

/// `docs/pictures/NAME.pikchr` is the source of `NAME.svg`.
#[test]
fn pictures_match_their_sources() {
    let folder = root().join("docs/pictures");
    let mut sources: Vec<PathBuf> = fs::read_dir(&folder)
        .expect("docs/pictures")
        .map(|entry| entry.expect("docs/pictures").path())
        .filter(|path| path.extension().is_some_and(|e| e == "pikchr"))
        .collect();
    sources.sort();
    assert!(!sources.is_empty());
    for source in sources {
        let drawn = draw(&fs::read_to_string(&source).expect("text"));
        let (picture, name) = (source.with_extension("svg"), source.display());
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            fs::write(&picture, &drawn).expect("docs/pictures");
        }
        let written = fs::read_to_string(&picture).unwrap_or_default();
        assert!(written == drawn, "the SVG differs from {name}: UPDATE_GOLDEN=1 writes it");
    }
}

/// The failover pictures have the numbers of the rehearsal page: seconds until a write, a page and an alert, and writes.
#[test]
fn failover_pictures_have_measured_numbers() {
    let read = |path: &str| fs::read_to_string(root().join(path)).expect("text");
    let page = read("docs/rehearsal-ha-containers.md");
    for (scenario, picture) in [("db", "failover-primary"), ("hub", "failover-hub")] {
        let mut rows = page.lines().map(|line| line.split('|').map(str::trim).collect::<Vec<_>>());
        let row = rows.find(|row| row.get(1) == Some(&scenario)).expect("a row of the scenario");
        let source = read(&format!("docs/pictures/{picture}.pikchr"));
        let lost = row[7].replace('/', " of ");
        let shown = [format!("{} s: first write", row[4]), format!("{} s: first page", row[5])];
        for text in shown.into_iter().chain([format!("{} s: alert", row[10]), format!("{lost} writes lost")]) {
            assert!(source.contains(&text), "docs/pictures/{picture}.pikchr does not show `{text}`");
        }
    }
}

/// Draws a picture in Pikchr's language (<https://pikchr.org>) on a white ground, so that it is readable on a dark page.
fn draw(source: &str) -> String {
    let svg = Pikchr::render(source, None, PikchrFlags::default()).unwrap_or_else(|e| panic!("{e}"));
    let (head, rest) = svg.split_once('>').expect("an svg element");
    let head = head.replace("font-size:initial;", "font-family:sans-serif;font-size:16px;");
    format!("{head}>\n<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>{rest}")
}

#[test]
fn ports_page_matches_port_table() {
    let page = root().join("docs/ports.md");
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::write(&page, fleet::ports::page()).expect("docs/");
    }
    let written = fs::read_to_string(&page).unwrap_or_default();
    assert!(written == fleet::ports::page(), "docs/ports.md differs from fleet/src/ports: UPDATE_GOLDEN=1 writes it");
}

#[test]
fn reference_pages_match_the_types() {
    for (name, text) in [("docs/fleet-toml.md", fleet::reference::page()), ("docs/cli.md", builder::cli::page())] {
        let page = root().join(name);
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            fs::write(&page, &text).expect("docs/");
        }
        let written = fs::read_to_string(&page).unwrap_or_default();
        assert!(written == text, "{name} differs from the types: UPDATE_GOLDEN=1 writes it");
    }
}

/// Renders the first node of each group, because others of a group differ only in their addresses. Of the fleets
/// `watched` and `receivers` only the monitor, which is the one node that alert receivers change. Of the fleet `mail` only
/// the files of Odoo.
fn rendered() -> BTreeMap<PathBuf, String> {
    let member = Membership::sample();
    let mut rendered = BTreeMap::new();
    for (dir, fleet, role, prefix) in [
        ("profiles/fleets", "ha", None, "run/"),
        ("profiles/fleets", "minimal-ha", None, "run/"),
        ("profiles/fleets", "quick-ha", None, "run/"),
        ("tests/fleets", "watched", Some("monitor"), "run/"),
        ("tests/fleets", "receivers", Some("monitor"), "run/"),
        ("tests/fleets", "mail", Some("app"), "run/bakehouse/odoo"),
    ] {
        let project = Project::load(&root().join(dir).join(format!("{fleet}.toml"))).expect("a valid fleet.toml");
        let shown = |n: &&fleet::Node| n.number == 1 && role.is_none_or(|role| n.has_role(role));
        for node in project.topology.nodes.iter().filter(shown) {
            let context = project.context(node, &member);
            for overlay in project.recipe(&node.group).overlays {
                for (inner, bytes) in project.overlay(&overlay).expect("the overlay exists").files {
                    let Some(path) = inner.strip_suffix(".j2").filter(|p| p.starts_with(prefix)) else { continue };
                    // Certificates and keys differ at every run.
                    if path.starts_with("run/bakehouse/tls/") {
                        continue;
                    }
                    let text = String::from_utf8_lossy(bytes);
                    let text = fleet::render(inner, &text, &context).unwrap_or_else(|e| panic!("{overlay}: {e}"));
                    rendered.insert(Path::new(fleet).join(&node.name).join(path), text);
                }
            }
        }
    }
    rendered
}
