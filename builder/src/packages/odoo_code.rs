//! Code of Odoo and of add-ons from git repositories and archives. It becomes a wheel, so that locks, the store and images
//! treat it as every other Python package. The same commit gives the same bytes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use fleet::{CodeOrigin, Diagnostic, Repository, Severity};
use serde::Deserialize;

use super::code_archive;
use super::git;
use super::lock::{ODOO, Wheel};
use super::python;
use crate::error::{Error, Result, fail};
use crate::format::wheel_writer::write_wheel;
use crate::progress::Progress;
use crate::project::Project;
use crate::store::{Kind, Store};
use crate::util::digest::{Key, sha256};

/// Start of the names of wheels with add-ons.
const REPOSITORY: &str = "odoo-repository-";
/// Where a wheel has add-ons.
const ADDONS: &str = "odoo/addons/";
/// Series of Odoo that the images run, as Debian's package has it.
const SERIES: (u32, u32) = (19, 0);

/// A table of fleet.toml that names code.
#[derive(Clone, Copy)]
enum Table<'a> {
    Source,
    Repository(&'a Repository),
}

/// Code that fleet.toml names.
pub(super) struct Code<'a> {
    table: Table<'a>,
    origin: CodeOrigin<'a>,
    /// Name and version of its wheel.
    pub(super) name: String,
    pub(super) version: String,
    /// The table with its line, for errors.
    place: String,
}

/// A wheel that was made of code.
pub(super) struct Made {
    pub(super) wheel: Wheel,
    pub(super) bytes: Vec<u8>,
    /// Python packages that each add-on requires; Debian's package of Odoo has what its own require.
    pub(super) requires: BTreeMap<String, Vec<String>>,
}

/// What a manifest says.
#[derive(Debug, Deserialize)]
struct Manifest {
    version: String,
    python: Vec<String>,
}

/// Returns the code that fleet.toml names.
pub(super) fn named(project: &Project) -> Vec<Code<'_>> {
    let (odoo, source) = (project.fleet.odoo.get_ref(), &project.fleet.source);
    let line = |table: &[&str]| {
        let at = Diagnostic::at(Severity::Error, source, source.value(table), String::new(), None);
        format!(
            "{}:{}: {}",
            source.name,
            at.line,
            if table.len() == 2 { "[odoo.source]" } else { "[[odoo.repositories]]" }
        )
    };
    let of_odoo =
        odoo.source.iter().filter_map(|source| Some((Table::Source, source.origin()?, line(&["odoo", "source"]))));
    let repositories = odoo.repositories.iter().enumerate().filter_map(|(number, repository)| {
        let line = line(&["odoo", "repositories", &number.to_string()]);
        Some((Table::Repository(repository), repository.origin()?, line))
    });
    of_odoo.chain(repositories).map(|(table, origin, line)| Code::new(table, origin, line)).collect()
}

impl<'a> Code<'a> {
    fn new(table: Table<'a>, origin: CodeOrigin<'a>, place: String) -> Self {
        let (name, version) = match table {
            Table::Source => (ODOO.to_owned(), format!("{}.{}+{}", SERIES.0, SERIES.1, origin.revision())),
            Table::Repository(repository) => {
                let name = format!("{REPOSITORY}{}", fleet::wheel_name(origin.name()));
                (name, repository_version(repository, origin))
            }
        };
        Self { table, origin, name, version, place }
    }

    /// Returns `name==version`, as the lock has it.
    pub(super) fn id(&self) -> String {
        format!("{}=={}", self.name, self.version)
    }

    /// Reads the code and makes its wheel, as a step of `verb`. `dir` is the folder of fleet.toml.
    ///
    /// # Errors
    /// If the code cannot be read, is not the named one, or has no add-ons.
    pub(super) fn make_with_progress(&self, dir: &Path, verb: &str, progress: &Progress) -> Result<Made> {
        let step = progress.step(verb, &format!("reading {}", self.name));
        let scratch = tempfile::tempdir().map_err(Error::cannot("create a temporary folder"))?;
        let made = self.make(dir, scratch.path())?;
        let size = made.bytes.len() as f64 / 1e6;
        step.done(&format!("{}: {} add-ons, {size:.1} MB", self.name, made.wheel.addons.len()));
        Ok(made)
    }

    /// Reads the code and makes its wheel. `dir` is the folder of fleet.toml, and `scratch` an empty one.
    ///
    /// # Errors
    /// If the code cannot be read, is not the named one, or has no add-ons.
    fn make(&self, dir: &Path, scratch: &Path) -> Result<Made> {
        let at = || Error::at(self.place.clone());
        let folder = match self.table {
            Table::Source => "",
            Table::Repository(repository) => repository.folder.as_str(),
        };
        let files = match self.origin {
            CodeOrigin::Git { url, commit } => git::files(url, commit, folder, scratch),
            CodeOrigin::Archive { location, sha256 } => code_archive::files(location, sha256, folder, dir, scratch),
        };
        let files = files.map_err(at())?;
        let files = match self.table {
            Table::Source => odoo(files),
            Table::Repository(repository) => addons(files, &repository.addons),
        };
        let files = files.map_err(at())?;
        let manifests = manifests(&files).map_err(at())?;
        let addons = manifests
            .iter()
            .map(|(name, manifest)| (name.clone(), format!("{} {}", manifest.version, content(&files, name))));
        let bytes = write_wheel(&self.name, &self.version, &files)?;
        let wheel = Wheel {
            name: self.name.clone(),
            version: self.version.clone(),
            file: format!("{}-{}-py3-none-any.whl", self.name.replace('-', "_"), self.version),
            sha256: sha256(&bytes),
            addons: addons.collect(),
        };
        let is_odoo = matches!(self.table, Table::Source);
        let requires = manifests.into_iter().filter(|(_, m)| !is_odoo && !m.python.is_empty());
        Ok(Made { wheel, bytes, requires: requires.map(|(name, manifest)| (name, manifest.python)).collect() })
    }
}

/// Reads the manifests of all add-ons, by name.
fn manifests(files: &Files) -> Result<BTreeMap<String, Manifest>> {
    let name_of = |path: &str| Some(path.strip_prefix(ADDONS)?.strip_suffix("/__manifest__.py")?.to_owned());
    let texts = files.iter().filter_map(|(path, bytes)| Some((name_of(path)?, String::from_utf8_lossy(bytes))));
    let texts: BTreeMap<_, _> = texts.filter(|(name, _)| !name.contains('/')).collect();
    python::run(include_str!("manifests.py"), &texts, "read the manifests")
}

/// Returns the first digits of a hash of an add-on's files.
fn content(files: &Files, addon: &str) -> String {
    let prefix = format!("{ADDONS}{addon}/");
    let mut key = Key::new("addon");
    for (path, bytes) in files.range(prefix.clone()..).take_while(|(path, _)| path.starts_with(&prefix)) {
        key.add(path, sha256(bytes));
    }
    key.finish()[..8].to_owned()
}

/// Makes the wheel of code that the lock has, and puts it into the store.
///
/// # Errors
/// If the code cannot be read, or is not what the lock has.
pub(super) fn fetch(
    code: &Code<'_>,
    wheel: &Wheel,
    project: &Project,
    store: &Store,
    progress: &Progress,
) -> Result<()> {
    let made = code.make_with_progress(&project.dir, "fetch", progress)?;
    if made.wheel.sha256 != wheel.sha256 {
        let help = "run `bakehouse lock` with this version of bakehouse";
        return fail(format!("{}: bakehouse.lock has other content for this commit\n  help: {help}", code.place));
    }
    put(&made, store)
}

/// Puts a wheel into the store.
pub(super) fn put(made: &Made, store: &Store) -> Result<()> {
    if store.get(Kind::Wheel, &made.wheel.sha256).is_some() {
        return Ok(());
    }
    let scratch = store.scratch(Kind::Wheel, &made.wheel.sha256);
    fs::write(&scratch, &made.bytes).map_err(Error::io("write", &scratch))?;
    store.put(Kind::Wheel, &made.wheel.sha256, &scratch).map(drop)
}

/// Returns the version of a repository's wheel. It differs for other selections of the same commit.
fn repository_version(repository: &Repository, origin: CodeOrigin<'_>) -> String {
    let selection = format!("{}\n{}", repository.folder, repository.addons.join(" "));
    let all = if selection == "\n" { String::new() } else { format!(".{}", &sha256(selection.as_bytes())[..8]) };
    format!("0+{}{all}", origin.revision())
}

type Files = BTreeMap<String, Vec<u8>>;

/// Selects the add-ons of a repository. Returns their files below `dist-packages`.
fn addons(files: Files, wanted: &[String]) -> Result<Files> {
    let there: BTreeSet<String> =
        files.keys().filter_map(|path| path.strip_suffix("/__manifest__.py")).map(str::to_owned).collect();
    let there: BTreeSet<String> = there.into_iter().filter(|name| !name.contains('/')).collect();
    let selected: BTreeSet<String> = if wanted.is_empty() { there.clone() } else { wanted.iter().cloned().collect() };
    if let Some(missing) = selected.difference(&there).next() {
        let names: Vec<&str> = there.iter().map(String::as_str).collect();
        return fail(format!("it has no add-on {missing}; it has {}", names.join(", ")));
    }
    if selected.is_empty() {
        return fail("it has no add-ons: no folder there has a __manifest__.py\n  help: set `folder` to their folder");
    }
    let mut kept = Files::new();
    for (path, bytes) in files {
        let Some((name, inner)) = path.split_once('/') else { continue };
        // The build compiles the modules again, reproducibly.
        if !selected.contains(name) || inner.split('/').any(|part| part == "__pycache__") {
            continue;
        }
        kept.insert(format!("{ADDONS}{path}"), bytes);
    }
    Ok(kept)
}

/// Selects Odoo's own code, and returns its files below `dist-packages`.
fn odoo(files: Files) -> Result<Files> {
    let release = files.get("odoo/release.py").map(|bytes| String::from_utf8_lossy(bytes).into_owned());
    let Some(release) = release else {
        return fail("it is not Odoo's code: it has no file odoo/release.py");
    };
    let found = series(&release);
    if found != Some(SERIES) {
        let found = found.map_or_else(|| "another version".to_owned(), |(a, b)| format!("Odoo {a}.{b}"));
        return fail(format!("it has {found}, and the images run Odoo {}.{}", SERIES.0, SERIES.1));
    }
    let path_of = |path: &str| match path.split_once('/') {
        Some(("odoo", _)) => Some(path.to_owned()),
        Some(("addons", rest)) => Some(format!("{ADDONS}{rest}")),
        _ => None,
    };
    let kept = files.into_iter().filter(|(path, _)| !path.contains("/__pycache__/"));
    Ok(kept.filter_map(|(path, bytes)| Some((path_of(&path)?, bytes))).collect())
}

/// Reads `version_info = (19, 0, …` of Odoo's release.py.
fn series(release: &str) -> Option<(u32, u32)> {
    let line = release.lines().find_map(|line| line.strip_prefix("version_info"))?;
    let mut parts = line.split_once('(')?.1.split(',').map(str::trim);
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(paths: &[(&str, &str)]) -> Files {
        paths.iter().map(|(path, text)| ((*path).to_owned(), text.as_bytes().to_vec())).collect()
    }

    #[test]
    fn takes_the_named_addons_and_nothing_else() {
        let repository = || {
            files(&[
                ("README.md", ""),
                ("a/__manifest__.py", "{}"),
                ("a/models/x.py", ""),
                ("a/__pycache__/x.pyc", ""),
                ("b/__manifest__.py", "{}"),
                ("setup/a/setup.py", ""),
            ])
        };
        let kept = addons(repository(), &["a".to_owned()]).unwrap();
        let paths: Vec<&String> = kept.keys().collect();
        assert_eq!(paths, ["odoo/addons/a/__manifest__.py", "odoo/addons/a/models/x.py"]);
        assert_eq!(addons(repository(), &[]).unwrap().len(), 3);
        let e = addons(repository(), &["c".to_owned()]).unwrap_err().to_string();
        assert!(e.contains("no add-on c; it has a, b"), "{e}");
        let e = addons(files(&[("addons/a/__manifest__.py", "{}")]), &[]).unwrap_err().to_string();
        assert!(e.contains("set `folder`"), "{e}");
    }

    #[test]
    fn odoo_has_the_series_of_debians_package() {
        let release = "RELEASE_LEVELS = []\nversion_info = (19, 0, 0, FINAL, 0, '')\n";
        let kept = odoo(files(&[("odoo/release.py", release), ("addons/web/x.py", ""), ("setup.py", "")])).unwrap();
        let paths: Vec<&String> = kept.keys().collect();
        assert_eq!(paths, ["odoo/addons/web/x.py", "odoo/release.py"]);
        let e = odoo(files(&[("odoo/release.py", &release.replace("19", "18"))])).unwrap_err().to_string();
        assert!(e.contains("it has Odoo 18.0, and the images run Odoo 19.0"), "{e}");
        assert!(odoo(files(&[("x.py", "")])).is_err());
    }

    #[test]
    fn manifests_have_versions_and_requirements() {
        let manifest = "# A comment\n{'version': '19.0.1.0.0', 'external_dependencies': {'python': ['xlsxwriter']}}";
        let all = files(&[("odoo/addons/a/__manifest__.py", manifest), ("odoo/addons/a/x.py", "")]);
        let found = manifests(&all).unwrap();
        assert_eq!(
            (found["a"].version.as_str(), &found["a"].python[..]),
            ("19.0.1.0.0", &["xlsxwriter".to_owned()][..])
        );
        let mut other = all.clone();
        other.insert("odoo/addons/a/x.py".to_owned(), b"1".to_vec());
        assert_ne!(content(&all, "a"), content(&other, "a"));
        let e = manifests(&files(&[("odoo/addons/a/__manifest__.py", "{'a': f()}")])).unwrap_err().to_string();
        assert!(e.contains("a/__manifest__.py cannot be read"), "{e}");
    }

    #[test]
    fn another_selection_is_another_version() {
        let commit = "0123456789abcdef0123456789abcdef01234567".to_owned();
        let mut repository =
            Repository { url: Some("https://a/OCA/x_y.git".to_owned()), commit: Some(commit), ..Repository::default() };
        let id = |r: &Repository| Code::new(Table::Repository(r), r.origin().unwrap(), String::new()).id();
        let all = id(&repository);
        assert_eq!(all, "odoo-repository-x-y==0+0123456789abcdef0123456789abcdef01234567");
        repository.addons = vec!["a".to_owned()];
        assert!(id(&repository).starts_with(&format!("{all}.")));
    }
}
