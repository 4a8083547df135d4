//! Debian packages with entries that `dpkg-deb` refuses to build.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use builder::compose::PackageFile;
use sha2::{Digest as _, Sha256};
use tar::{Builder, EntryType, Header};

use crate::libraries;

/// A Debian package. [`Deb::build`] writes it.
pub(crate) struct Deb {
    path: PathBuf,
    name: String,
    data: Builder<Vec<u8>>,
    postinst: Option<String>,
    sha256: String,
}

impl Deb {
    pub(crate) fn new(path: &Path, name: &str) -> Self {
        let data = Builder::new(Vec::new());
        Self { path: path.to_owned(), name: name.to_owned(), data, postinst: None, sha256: String::new() }
    }

    fn entry(mut self, kind: EntryType, mode: u32, path: &str, target: &str, content: &[u8]) -> Self {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(content.len() as u64);
        let path = format!("./{path}");
        if target.len() > 100 || path.len() > 100 {
            if target.is_empty() {
                self.data.append_data(&mut header, &path, content).expect("a tar");
            } else {
                self.data.append_link(&mut header, &path, target).expect("a tar");
            }
            return self;
        }
        // The tar crate refuses `..`, so this writes the header's fields itself.
        let gnu = header.as_gnu_mut().expect("a GNU header");
        gnu.name[..path.len()].copy_from_slice(path.as_bytes());
        gnu.linkname[..target.len()].copy_from_slice(target.as_bytes());
        if kind == EntryType::Block {
            header.set_device_major(8).expect("a number");
            header.set_device_minor(0).expect("a number");
        }
        header.set_cksum();
        self.data.append(&header, content).expect("a tar");
        self
    }

    pub(crate) fn file(self, path: &str, content: &str) -> Self {
        self.entry(EntryType::Regular, 0o644, path, "", content.as_bytes())
    }

    fn program(self, path: &str, content: &[u8]) -> Self {
        self.entry(EntryType::Regular, 0o755, path, "", content)
    }

    pub(crate) fn link(self, path: &str, target: &str) -> Self {
        self.entry(EntryType::Symlink, 0o777, path, target, b"")
    }

    pub(crate) fn hard_link(self, path: &str, target: &str) -> Self {
        self.entry(EntryType::Link, 0o644, path, target, b"")
    }

    pub(crate) fn device(self, path: &str) -> Self {
        self.entry(EntryType::Block, 0o666, path, "", b"")
    }

    pub(crate) fn postinst(mut self, lines: &str) -> Self {
        self.postinst = Some(format!("#!/bin/sh\nset -e\n{lines}\n"));
        self
    }

    pub(crate) fn build(mut self) -> Self {
        let mut control = Builder::new(Vec::new());
        let text = format!(
            "Package: {}\nVersion: 1\nArchitecture: amd64\nMaintainer: Test <test@example.org>\nDescription: a test\n",
            self.name
        );
        let scripts = self.postinst.iter().map(|text| ("./postinst", 0o755, text.as_str()));
        for (name, mode, content) in scripts.chain([("./control", 0o644, text.as_str())]) {
            let mut header = Header::new_gnu();
            header.set_mode(mode);
            header.set_size(content.len() as u64);
            control.append_data(&mut header, name, content.as_bytes()).expect("a tar");
        }
        let data = std::mem::replace(&mut self.data, Builder::new(Vec::new())).into_inner().expect("a tar");
        let members = [
            ("debian-binary", b"2.0\n".to_vec()),
            ("control.tar", control.into_inner().expect("a tar")),
            ("data.tar", data),
        ];
        let mut bytes = b"!<arch>\n".to_vec();
        for (name, content) in members {
            writeln!(bytes, "{name:<16}{:<12}{:<6}{:<6}{:<8}{:<10}`", 0, 0, 0, 100_644, content.len()).expect("memory");
            bytes.extend(&content);
            if content.len() % 2 == 1 {
                bytes.push(b'\n');
            }
        }
        self.sha256 = Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect();
        fs::write(&self.path, bytes).expect("a package");
        self
    }

    pub(crate) fn package(&self) -> PackageFile {
        PackageFile { path: self.path.clone(), sha256: self.sha256.clone(), essential: false }
    }
}

/// Returns the path on a system with merged /usr.
pub(crate) fn merged(path: &str) -> String {
    let path = path.trim_start_matches('/');
    if path.starts_with("usr/") { path.to_owned() } else { format!("usr/{path}") }
}

/// Builds a package with this host's programs that dpkg needs to configure packages, and with this test's binary as
/// `/usr/bin/attack`.
pub(crate) fn tools(path: &Path) -> Deb {
    let mut deb = Deb::new(path, "aaa-tools");
    let mut libraries_of_all = std::collections::BTreeMap::new();
    let own = std::env::current_exe().expect("this program");
    let programs = ["sh", "ln", "rm", "tar", "diff", "dpkg", "dpkg-deb", "dpkg-split", "ldconfig", "start-stop-daemon"];
    let found = programs.map(|name| {
        let folders = ["/usr/bin", "/usr/sbin", "/bin", "/sbin"];
        let path = folders.iter().map(|dir| Path::new(dir).join(name)).find(|p| p.exists());
        (format!("usr/bin/{name}"), path.unwrap_or_else(|| panic!("install {name}")))
    });
    for (inside, outside) in found.into_iter().chain([("usr/bin/attack".to_owned(), own)]) {
        libraries_of_all.extend(libraries(&outside));
        deb = deb.program(&inside, &fs::read(&outside).expect("a program"));
    }
    for (inside, outside) in libraries_of_all {
        deb = deb.program(&inside, &fs::read(&outside).expect("a library"));
    }
    deb.file("usr/share/tools", "").build()
}
