//! Writes dpkg's database as `dpkg --unpack` of all packages would.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::unpack::Unpacked;
use crate::packages::requests::INITRD_PROVIDER;

/// Adds the packages to the database of a tree.
pub(super) fn write(root: &Path, packages: &[Unpacked]) -> io::Result<()> {
    let db = root.join("var/lib/dpkg");
    for dir in ["info", "updates", "parts", "alternatives", "triggers"] {
        fs::create_dir_all(db.join(dir))?;
    }
    for file in ["available", "diversions", "statoverride", "lock"] {
        if !db.join(file).exists() {
            fs::write(db.join(file), "")?;
        }
    }
    fs::write(db.join("info/format"), "1\n")?;
    let mut status = match fs::read_to_string(db.join("status")) {
        Ok(text) => text,
        Err(_) => format!("{INITRD_PROVIDER}\n"),
    };
    let mut triggers = Triggers::default();
    for package in packages {
        let name = package.deb.info_name();
        let mut list = package.paths.join("\n");
        list.push('\n');
        fs::write(db.join(format!("info/{name}.list")), list)?;
        for (file, (mode, content)) in &package.deb.scripts {
            let path = db.join(format!("info/{name}.{file}"));
            fs::write(&path, content)?;
            fs::set_permissions(&path, Permissions::from_mode(*mode))?;
        }
        if let Some((_, text)) = package.deb.scripts.get("triggers") {
            triggers.read(&name, &String::from_utf8_lossy(text));
        }
        status.push_str(&stanza(package));
    }
    fs::write(db.join("status"), status)?;
    triggers.write(&db.join("triggers"))
}

fn stanza(package: &Unpacked) -> String {
    let mut text = String::new();
    for (i, line) in package.deb.control.trim_end().lines().enumerate() {
        text.push_str(line);
        text.push('\n');
        if i == 0 {
            text.push_str("Status: install ok unpacked\n");
        }
    }
    if !package.deb.conffiles.is_empty() {
        text.push_str("Conffiles:\n");
        for path in &package.deb.conffiles {
            // `newconffile` if the file was trimmed, so that dpkg does not compare it.
            let digest = package.conffiles.iter().find(|(p, _)| p == path).map_or("newconffile", |(_, d)| d);
            let _ = writeln!(text, " {path} {digest}");
        }
    }
    text.push('\n');
    text
}

#[derive(Default)]
struct Triggers {
    files: Vec<(String, String)>,
    named: BTreeMap<String, BTreeSet<String>>,
}

impl Triggers {
    fn read(&mut self, package: &str, text: &str) {
        for line in text.lines() {
            let words: Vec<&str> = line.split('#').next().unwrap_or_default().split_whitespace().collect();
            let [kind, what] = words[..] else { continue };
            if !kind.starts_with("interest") {
                continue;
            }
            let interested = if kind.ends_with("noawait") { format!("{package}/noawait") } else { package.to_owned() };
            if what.starts_with('/') {
                self.files.push((what.to_owned(), interested));
            } else {
                self.named.entry(what.to_owned()).or_default().insert(interested);
            }
        }
    }

    fn write(self, dir: &Path) -> io::Result<()> {
        let append = |path: &Path, lines: &mut dyn Iterator<Item = String>| {
            let mut text = fs::read_to_string(path).unwrap_or_default();
            lines.for_each(|l| text.push_str(&l));
            fs::write(path, text)
        };
        append(&dir.join("File"), &mut self.files.iter().map(|(path, package)| format!("{path} {package}\n")))?;
        for (name, packages) in self.named {
            append(&dir.join(name), &mut packages.iter().map(|p| format!("{p}\n")))?;
        }
        Ok(())
    }
}
