//! Composes the initrd from files of the image, as `profiles/initrd.toml` describes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use serde::Deserialize;

use crate::compose::Layer;
use crate::compose::tar_index::{Node, Tree};
use crate::error::{Error, Result, fail};
use crate::format::cpio::{File, cpio};
use crate::format::elf;
use crate::progress::Progress;
use crate::store::{Kind, Store};
use crate::toolchain::Tools;
use crate::util::digest::{Key, sha256};
use crate::util::fs::write_atomic;
use crate::util::process::run;

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct InitrdRecipe {
    programs: Vec<String>,
    links: Vec<String>,
    files: Vec<String>,
    not_opened: BTreeSet<String>,
    rules: Vec<String>,
    modules: Vec<String>,
    units: Vec<String>,
    wants: BTreeMap<String, Vec<String>>,
    write: BTreeMap<String, String>,
    symlinks: BTreeMap<String, String>,
}

/// Digest of this step's code.
const CODE: &str = env!("CODE_INITRD");

const LIBRARY_DIRS: [&str; 3] = ["usr/lib/x86_64-linux-gnu", "usr/lib", "usr/lib/x86_64-linux-gnu/systemd"];
const UNIT_DIR: &str = "usr/lib/systemd/system";

/// Contents of an initrd.
pub(crate) struct InitrdSpec<'a> {
    /// Recipes: path and content. A later recipe adds to the earlier ones.
    pub recipes: Vec<(&'static str, &'a [u8])>,
    /// Programs that are not part of the image: path and content.
    pub programs: Vec<(&'static str, Vec<u8>)>,
    /// Other files that are not part of the image: path and content.
    pub files: Vec<(&'static str, Vec<u8>)>,
}

/// The tree and the tools for an initrd.
pub(crate) struct Source<'a> {
    /// The packages' tree, from which files are copied.
    pub tree: &'a Tree,
    /// The layer of the tree.
    pub layer: &'a Layer,
    /// Version of the tree's kernel, as `uname -r` prints it.
    pub kernel: &'a str,
    /// Programs that build the initrd.
    pub tools: &'a Tools,
}

impl InitrdSpec<'_> {
    /// Returns the compressed initrd, from the store if the store has it.
    ///
    /// # Errors
    /// If a recipe is invalid or names a file that the image does not have, or zstd fails.
    pub(crate) fn build(&self, source: &Source, store: &Store, progress: &Progress, scratch: &Path) -> Result<Vec<u8>> {
        let mut key = Key::new(CODE);
        key.add("layer", &source.layer.key).add("tools", &source.tools.key);
        for (path, text) in &self.recipes {
            key.add(path, text);
        }
        for (path, program) in self.programs.iter().chain(&self.files) {
            key.add(path, sha256(program));
        }
        let key = key.finish();
        if let Some(path) = store.get(Kind::Initrd, &key) {
            return fs::read(&path).map_err(Error::io("read", &path));
        }
        let step = progress.step("initrd", "composing");
        let (cpio, compressed) = (scratch.join("initrd"), scratch.join("initrd.zst"));
        fs::write(&cpio, compose(source.tree, source.kernel, self)?).map_err(Error::io("write", &cpio))?;
        // zstd's output depends on the number of threads.
        let mut zstd = source.tools.command("usr/bin/zstd");
        zstd.args(["-q", "-9", "--single-thread", "-o"]).arg(&compressed).arg(&cpio);
        run(&mut zstd, "zstd")?;
        let bytes = fs::read(&compressed).map_err(Error::io("read", &compressed))?;
        write_atomic(&store.path(Kind::Initrd, &key), &bytes)?;
        step.done(&format!("{:.1} MB", bytes.len() as f64 / 1e6));
        Ok(bytes)
    }
}

/// Returns the initrd as an uncompressed cpio.
///
/// # Errors
/// If a recipe is invalid or names a file that the image does not have.
fn compose(tree: &Tree, kernel: &str, spec: &InitrdSpec) -> Result<Vec<u8>> {
    let mut recipe = InitrdRecipe::default();
    for (path, text) in &spec.recipes {
        let text = String::from_utf8_lossy(text);
        let more: InitrdRecipe = toml::from_str(&text).map_err(Error::at(*path))?;
        recipe.add(more);
    }
    let mut initrd = Initrd { tree, not_opened: &recipe.not_opened, files: BTreeMap::new(), missing: Vec::new() };
    for path in recipe.programs.iter().chain(&recipe.links).chain(&recipe.files) {
        initrd.add(path)?;
    }
    for rule in &recipe.rules {
        initrd.add(&format!("usr/lib/udev/rules.d/{rule}"))?;
    }
    for unit in &recipe.units {
        initrd.add(&format!("{UNIT_DIR}/{unit}"))?;
        let drop_ins = format!("{UNIT_DIR}/{unit}.d");
        if tree.get(&drop_ins).is_some() {
            initrd.add(&drop_ins)?;
        }
    }
    for (target, units) in &recipe.wants {
        for unit in units {
            initrd.put(&format!("{UNIT_DIR}/{target}.wants/{unit}"), File::link(format!("../{unit}")));
        }
    }
    initrd.modules(kernel, &recipe.modules)?;
    for (path, text) in &recipe.write {
        initrd.put(path, File::regular(0o644, text.trim_start_matches('\n').as_bytes().to_vec()));
    }
    for (path, content) in &spec.programs {
        let needs = elf::needs(content);
        initrd.put(path, File::regular(0o755, content.clone()));
        if let Some(needs) = needs {
            initrd.libraries(path, &needs)?;
        }
    }
    for (path, content) in &spec.files {
        initrd.put(path, File::regular(0o644, content.clone()));
    }
    for (path, target) in &recipe.symlinks {
        initrd.put(path, File::link(target.clone()));
    }
    for dir in ["dev", "proc", "run", "sys", "sysroot", "tmp", "var/lib", "var/tmp", "root", "sysusr/usr"] {
        initrd.put(dir, File::dir());
    }
    // Every account is locked.
    initrd.put("etc/shadow", File::regular(0o600, b"root:!*:20000::::::\n".to_vec()));
    if !initrd.missing.is_empty() {
        let recipes: Vec<&str> = spec.recipes.iter().map(|(path, _)| *path).collect();
        return fail(format!("{}: the image does not have {}", recipes.join(" and "), initrd.missing.join(", ")));
    }
    Ok(cpio(&initrd.files))
}

impl InitrdRecipe {
    fn add(&mut self, more: Self) {
        self.programs.extend(more.programs);
        self.links.extend(more.links);
        self.files.extend(more.files);
        self.not_opened.extend(more.not_opened);
        self.rules.extend(more.rules);
        self.modules.extend(more.modules);
        self.units.extend(more.units);
        for (target, units) in more.wants {
            self.wants.entry(target).or_default().extend(units);
        }
        self.write.extend(more.write);
        self.symlinks.extend(more.symlinks);
    }
}

struct Initrd<'a> {
    tree: &'a Tree,
    not_opened: &'a BTreeSet<String>,
    files: BTreeMap<String, File>,
    missing: Vec<String>,
}

impl Initrd<'_> {
    fn put(&mut self, path: &str, file: File) {
        let mut dir = path;
        while let Some((parent, _)) = dir.rsplit_once('/') {
            self.files.entry(parent.to_owned()).or_insert_with(File::dir);
            dir = parent;
        }
        self.files.insert(path.to_owned(), file);
    }

    /// Adds a file with its libraries, a folder with all files below it, or a link with its target.
    fn add(&mut self, path: &str) -> Result<()> {
        let mut links = Vec::new();
        let real = self.tree.resolve(path, &mut |link, target| links.push((link.to_owned(), target.to_owned())));
        for (link, target) in links {
            self.put(&link, File::link(target));
        }
        let Some(real) = real else {
            self.missing.push(path.to_owned());
            return Ok(());
        };
        let Some(entry) = self.tree.get(&real) else { return Ok(()) };
        match &entry.node {
            Node::Dir => {
                self.files.entry(real.clone()).or_insert_with(File::dir);
                // A link to a folder (`bin`) adds only the link. The folder itself adds its files.
                if real == path {
                    let below: Vec<String> = self.tree.below(&real).map(|(p, _)| p.to_owned()).collect();
                    for path in below.iter().filter(|p| !matches!(self.tree.get(p).map(|e| &e.node), Some(Node::Dir))) {
                        self.add(path)?;
                    }
                }
            }
            Node::File { .. } if !self.files.contains_key(&real) => {
                let content = self.tree.read(&real)?;
                let needs = elf::needs(&content);
                self.put(&real, File::regular(entry.mode, content));
                if let Some(needs) = needs {
                    self.libraries(&real, &needs)?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn libraries(&mut self, program: &str, needs: &elf::Needs) -> Result<()> {
        if let Some(interpreter) = &needs.interpreter {
            self.add(interpreter.trim_start_matches('/'))?;
        }
        for library in &needs.libraries {
            match self.find(library, needs) {
                Some(path) => self.add(&path)?,
                None => self.missing.push(format!("{library} (for {program})")),
            }
        }
        for alternatives in &needs.opened {
            let mut wanted = alternatives.iter().filter(|l| !self.not_opened.contains(*l));
            if let Some(path) = wanted.find_map(|l| self.find(l, needs)) {
                self.add(&path)?;
            }
        }
        Ok(())
    }

    fn find(&self, library: &str, needs: &elf::Needs) -> Option<String> {
        let runpath = needs.runpath.as_deref().map(|p| p.trim_start_matches('/'));
        runpath
            .into_iter()
            .chain(LIBRARY_DIRS)
            .map(|dir| format!("{dir}/{library}"))
            .find(|path| self.tree.get(path).is_some())
    }

    /// Adds modules, their dependencies, and the indexes.
    fn modules(&mut self, kernel: &str, wanted: &[String]) -> Result<()> {
        let dir = format!("usr/lib/modules/{kernel}");
        let name = |path: &str| {
            let file = path.rsplit('/').next().unwrap_or(path);
            file.split(".ko").next().unwrap_or(file).replace('-', "_")
        };
        let text = self.tree.read_text(&format!("{dir}/modules.dep"))?;
        let mut depends: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (path, rest) in text.lines().filter_map(|l| l.split_once(':')) {
            let all = std::iter::once(path).chain(rest.split_whitespace()).map(str::to_owned).collect();
            depends.insert(name(path), all);
        }
        let text = self.tree.read_text(&format!("{dir}/modules.softdep"))?;
        let mut soft: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for line in text.lines().filter_map(|l| l.strip_prefix("softdep ")) {
            let mut words = line.split_whitespace();
            let Some(module) = words.next() else { continue };
            soft.entry(module.replace('-', "_"))
                .or_default()
                .extend(words.filter(|w| !w.ends_with(':')).map(|w| w.replace('-', "_")));
        }
        let mut todo: Vec<String> = wanted.iter().map(|m| m.replace('-', "_")).collect();
        let mut seen = BTreeSet::new();
        while let Some(module) = todo.pop() {
            if !seen.insert(module.clone()) {
                continue;
            }
            // A module without an entry is built into the kernel, or this kernel does not have it.
            for path in depends.get(&module).into_iter().flatten() {
                todo.push(name(path));
                self.add(&format!("{dir}/{path}"))?;
            }
            todo.extend(soft.get(&module).into_iter().flatten().cloned());
        }
        let indexes: Vec<String> = self
            .tree
            .below(&dir)
            .map(|(p, _)| p.to_owned())
            .filter(|p| {
                let file = &p[dir.len() + 1..];
                file.starts_with("modules.")
                    && (file.ends_with(".bin")
                        || [
                            "modules.builtin",
                            "modules.devname",
                            "modules.order",
                            "modules.softdep",
                            "modules.builtin.modinfo",
                        ]
                        .contains(&file))
            })
            .collect();
        for index in indexes {
            self.add(&index)?;
        }
        Ok(())
    }
}
