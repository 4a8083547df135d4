//! Places of operators' files.

use std::fs;
use std::path::{Path, PathBuf};

use super::operator::{OperatorFile, key_path, local_dir};
use super::operator_log;
use crate::error::{Error, Result};
use crate::format::age;
use crate::project::Project;

/// Places where an operator's file may be.
pub(crate) struct Places<'a> {
    /// Option `--operator`.
    pub given: Option<&'a Path>,
    /// Folder of `fleet.toml`, or where it would be.
    pub folder: &'a Path,
    /// Folder of the user's configuration.
    pub config: Option<PathBuf>,
    /// Name of the fleet, if it is known.
    pub fleet: Option<&'a str>,
    /// The fleet, if its local machines are the target.
    pub local: Option<&'a Project>,
}

impl Places<'_> {
    /// Environment variable with the path of an operator's file.
    pub(crate) const VARIABLE: &'static str = "BAKEHOUSE_OPERATOR";

    /// Returns the path of the operator's file: that of the option, of the environment variable, of local machines, in
    /// the user's configuration, or in the fleet's folder. `None` if there is no file. A file that was made in the
    /// fleet's folder is for another person or machine, so the option has to name it.
    ///
    /// # Errors
    /// If one place has several files. The message lists them.
    pub(crate) fn find(&self) -> Result<Option<PathBuf>> {
        let variable = std::env::var_os(Self::VARIABLE).filter(|path| !path.is_empty()).map(PathBuf::from);
        if let Some(path) = self.given.map(Path::to_owned).or(variable) {
            return Ok(Some(path));
        }
        let configured = match (&self.config, self.fleet) {
            (Some(dir), Some(fleet)) => {
                Some(configured(dir, fleet)).into_iter().filter(|path| path.is_file()).collect()
            }
            (Some(dir), None) => files_in(dir),
            (None, _) => Vec::new(),
        };
        let local = self.local.map(|project| files_in(&local_dir(project))).unwrap_or_default();
        let (_, in_folder) = self.in_folder()?;
        for found in [local, configured, in_folder] {
            match &found[..] {
                [] => {}
                [one] => return Ok(Some(one.clone())),
                several => {
                    let list: Vec<String> = several.iter().map(|path| path.display().to_string()).collect();
                    return Err(Error::Usage(format!(
                        "there are {} operators' files: {}\n  help: select one with `--operator FILE` or with the \
                         environment variable {}",
                        several.len(),
                        list.join(", "),
                        Self::VARIABLE
                    )));
                }
            }
        }
        Ok(None)
    }

    /// Returns the files in the fleet's folder: those that were made there for others, and the other ones.
    ///
    /// # Errors
    /// If the log of the operators' certificates cannot be read.
    pub(crate) fn in_folder(&self) -> Result<(Vec<PathBuf>, Vec<PathBuf>)> {
        let made = operator_log::rows(self.folder)?;
        let is_made_here = |path: &PathBuf| {
            let read = fs::read(path).ok().and_then(|bytes| serde_json::from_slice::<OperatorFile>(&bytes).ok());
            let stem = path.file_stem().and_then(|stem| stem.to_str());
            made.iter().any(|row| match &read {
                Some(file) => (row.name.as_str(), row.expires) == (&file.operator.name, file.expires),
                // The file is encrypted.
                None => stem == Some(&row.name),
            })
        };
        Ok(files_in(self.folder).into_iter().partition(is_made_here))
    }
}

/// Returns the path of the operator's file for a fleet in the folder of the user's configuration.
pub(crate) fn configured(config: &Path, fleet: &str) -> PathBuf {
    config.join(format!("{fleet}.{}", OperatorFile::SUFFIX))
}

/// Returns the folder of the user's configuration, as the XDG specification defines it.
pub(crate) fn config_dir() -> Option<PathBuf> {
    let of = |variable: &str| std::env::var_os(variable).map(PathBuf::from).filter(|path| path.is_absolute());
    Some(of("XDG_CONFIG_HOME").or_else(|| of("HOME").map(|home| home.join(".config")))?.join("bakehouse"))
}

/// Returns the operators' files in a folder whose keys are there, too. A file without its key is for another person.
fn files_in(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let named = entries.filter(|path| path.extension().is_some_and(|suffix| suffix == OperatorFile::SUFFIX));
    let mut found: Vec<PathBuf> = named.filter(|path| has_key(path)).collect();
    found.sort();
    found
}

fn has_key(path: &Path) -> bool {
    let Ok(bytes) = fs::read(path) else { return false };
    let Ok(file) = serde_json::from_slice::<OperatorFile>(&bytes) else { return age::is_sealed(&bytes) };
    file.key.is_some() || key_path(path, &file.operator.name).is_file()
}

#[cfg(test)]
mod tests {
    use super::super::operator::tests::file;
    use super::*;

    fn places(folder: &Path) -> Places<'_> {
        Places { given: None, folder, config: None, fleet: Some("acme"), local: None }
    }

    #[test]
    fn finds_the_only_file_with_a_key_and_lists_several() {
        let dir = tempfile::tempdir().unwrap();
        let place = places(dir.path());
        let path = |name: &str| dir.path().join(name);
        assert_eq!(place.find().unwrap(), None);
        let (of_anna, key) = file("anna");
        // A file for a colleague who made a request. The key is on the colleague's machine.
        of_anna.write(&path("anna.operator"), false).unwrap();
        assert_eq!(place.find().unwrap(), None);
        fs::write(path("anna.key"), key.pem()).unwrap();
        assert_eq!(place.find().unwrap(), Some(path("anna.operator")));
        assert_eq!(OperatorFile::read(&path("anna.operator")).unwrap().key(), key.pem());
        let (of_ben, key) = file("ben");
        of_ben.with_key(key).write(&path("ben.operator"), false).unwrap();
        let several = place.find().unwrap_err().to_string();
        for part in ["2 operators' files", "anna.operator", "ben.operator", "--operator FILE"] {
            assert!(several.contains(part), "{several}");
        }
        let config = tempfile::tempdir().unwrap();
        fs::copy(path("ben.operator"), config.path().join("acme.operator")).unwrap();
        // The user's own file comes before those in a folder.
        let configured = Places { config: Some(config.path().to_owned()), ..places(dir.path()) };
        assert_eq!(configured.find().unwrap(), Some(config.path().join("acme.operator")));
        let empty = config.path().join("empty");
        let configured = Places { folder: &empty, ..configured };
        assert_eq!(Places { fleet: Some("other"), ..configured }.find().unwrap(), None);
        let given = Places { given: Some(Path::new("x")), ..place };
        assert_eq!(given.find().unwrap(), Some("x".into()));
    }
    #[test]
    fn a_file_that_was_made_for_another_person_is_not_used() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let (of_anna, key) = file("anna");
        operator_log::note(dir.path(), &of_anna.operator, &key.public().unwrap(), of_anna.expires).unwrap();
        of_anna.with_key(key).write(&path("anna.operator"), false).unwrap();
        let place = places(dir.path());
        assert_eq!(place.find().unwrap(), None);
        assert_eq!(place.in_folder().unwrap().0, [path("anna.operator")]);
        // A file with the same name from another person.
        let (mut other, key) = file("anna");
        other.expires += 1;
        other.with_key(key).write(&path("other.operator"), false).unwrap();
        assert_eq!(place.find().unwrap(), Some(path("other.operator")));
    }
}
