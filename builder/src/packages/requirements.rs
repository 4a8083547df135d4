//! The Python packages of images, and what they require: `bakehouse lock` adds Debian's packages, and wheels for what Debian does not have.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::lock::{LockedImage, Wheel};
use super::odoo_code::{self, Made};
use super::python;
use super::wheels::{Target, select};
use crate::error::{Error, Result, fail};
use crate::project::Project;

/// Reads requirements with pip's own parser.
const READER: &str = include_str!("requirements.py");
/// Packages of Debian with another name than the Python package's.
const OTHER_NAMES: [(&str, &str); 8] = [
    ("beautifulsoup4", "python3-bs4"),
    ("odoo", "odoo-19"),
    ("pillow", "python3-pil"),
    ("psycopg2-binary", "python3-psycopg2"),
    ("pyjwt", "python3-jwt"),
    ("pyopenssl", "python3-openssl"),
    ("pyserial", "python3-serial"),
    ("pyyaml", "python3-yaml"),
];
/// Most rounds in which packages are added. Each round adds what the packages of the one before require.
const ROUNDS: usize = 30;

/// Returns the requested Python packages by image, each as `name==version`, sorted.
#[must_use]
pub(crate) fn wheel_requests(project: &Project) -> BTreeMap<String, Vec<String>> {
    let code: Vec<String> = odoo_code::named(project).iter().map(odoo_code::Code::id).collect();
    let of_group = |group: &String| {
        let mut wheels = project.recipe(group).wheels;
        if project.runs_odoo(group) {
            wheels.extend(code.iter().cloned());
            wheels.sort();
        }
        (group.clone(), wheels)
    };
    project.fleet.groups.keys().map(of_group).collect()
}

/// All wheels of an image, and the packages of Debian that they require beyond the image's.
pub(super) struct Closure {
    pub(super) wheels: Vec<Wheel>,
    pub(super) packages: Vec<String>,
}

/// A requirement that holds in the image.
#[derive(Debug, Deserialize)]
struct Requirement {
    /// The wheel that has the requirement.
    of: String,
    /// Name of the required package.
    name: String,
    /// Its name with the versions that the wheel accepts.
    text: String,
    /// Whether the image's version is one of these; `None` if the image lacks the package.
    accepts: Option<bool>,
}

/// Returns the wheels that an image requests, and all that they require. `made` are those that pip does not have, and `own`
/// the add-ons of the fleet's folders. `candidate` returns the version that Debian's archive has of a package.
///
/// # Errors
/// If neither Debian nor pip's index has a required package, or two packages require different versions of one.
pub(super) fn close(
    name: &str,
    image: &LockedImage,
    made: &[Made],
    own: &[&str],
    candidate: &dyn Fn(&str) -> Result<Option<String>>,
) -> Result<Closure> {
    let mut closure = Closure { wheels: made.iter().map(|m| m.wheel.clone()).collect(), packages: Vec::new() };
    if image.wheels.is_empty() {
        return Ok(closure);
    }
    let target = Target::of(name, image)?;
    let mut have = of_debian(image);
    have.extend(own.iter().map(|addon| (of_addon(addon), String::new())));
    let mut requires: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for Made { wheel, requires: of_addons, .. } in made {
        have.insert(wheel.name.clone(), wheel.version.clone());
        let version = |text: &String| text.split(' ').next().unwrap_or_default().to_owned();
        have.extend(wheel.addons.iter().map(|(addon, text)| (of_addon(addon), version(text))));
        requires.extend(of_addons.iter().map(|(addon, of)| (format!("the add-on {addon}"), of.clone())));
    }
    let made: BTreeSet<String> = made.iter().map(|m| m.wheel.id()).collect();
    let mut wanted: Vec<String> = image.wheels.iter().filter(|id| !made.contains(*id)).cloned().collect();
    for round in 0..ROUNDS {
        let selected = if wanted.is_empty() {
            Vec::new()
        } else {
            select(&wanted, &target).map_err(|e| not_found(name, &target, &wanted, round == 0, &e))?
        };
        for install in &selected {
            let wheel = install.wheel()?;
            have.insert(wheel.name.clone(), wheel.version.clone());
            requires.insert(format!("the wheel {}", wheel.name), install.metadata.requires_dist.clone());
            closure.wheels.push(wheel);
        }
        // Checks those of earlier rounds again, because the image has more packages now.
        let requirements = read(&target, &requires, &have)?;
        let mut missing: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        for requirement in &requirements {
            match requirement.accepts {
                Some(true) => {}
                Some(false) => return Err(conflict(name, requirement, &have)),
                None => {
                    missing.entry(&requirement.name).or_default().insert(&requirement.text[requirement.name.len()..]);
                }
            }
        }
        wanted = Vec::new();
        for (required, versions) in missing {
            if let Some((package, version)) = in_debian(required, candidate)? {
                have.insert(required.to_owned(), upstream(&version));
                closure.packages.push(package);
            } else {
                let versions: Vec<&str> = versions.into_iter().filter(|v| !v.is_empty()).collect();
                wanted.push(format!("{required}{}", versions.join(",")));
            }
        }
        if wanted.is_empty() {
            check_request(name, image, &closure.wheels)?;
            closure.wheels.sort_by(|a, b| a.name.cmp(&b.name));
            return Ok(closure);
        }
    }
    fail(format!("{name}: the Python packages require each other without end"))
}

/// Returns the name of the Python package that has an add-on.
fn of_addon(addon: &str) -> String {
    fleet::wheel_name(&format!("odoo-addon-{addon}"))
}

/// Returns the name of each package of Debian that may have a Python package.
fn names_in_debian(name: &str) -> Vec<String> {
    let other = OTHER_NAMES.iter().filter(|(python, _)| *python == name).map(|(_, debian)| (*debian).to_owned());
    let plain = name.strip_prefix("python-").unwrap_or(name);
    other.chain([format!("python3-{name}"), format!("python3-{plain}")]).collect()
}

/// Returns the versions of the Python packages that an image has from Debian, by name.
fn of_debian(image: &LockedImage) -> BTreeMap<String, String> {
    let packages = image.packages.iter().filter_map(|id| id.split_once('='));
    let mut have = BTreeMap::new();
    for (package, version) in packages {
        let other = OTHER_NAMES.iter().filter(|(_, debian)| *debian == package).map(|(python, _)| (*python).to_owned());
        let plain = package.strip_prefix("python3-").into_iter().flat_map(|n| [n.to_owned(), format!("python-{n}")]);
        have.extend(other.chain(plain).map(|name| (fleet::wheel_name(&name), upstream(version))));
    }
    have
}

/// Returns the part of Debian's version that the authors of the package gave it.
fn upstream(version: &str) -> String {
    let version = version.split_once(':').map_or(version, |(_, rest)| rest);
    let version = version.rsplit_once('-').map_or(version, |(version, _)| version);
    version.split(['+', '~']).next().unwrap_or_default().to_owned()
}

/// Returns Debian's package of a Python package, and its version.
fn in_debian(name: &str, candidate: &dyn Fn(&str) -> Result<Option<String>>) -> Result<Option<(String, String)>> {
    for package in names_in_debian(name) {
        if let Some(version) = candidate(&package)? {
            return Ok(Some((package, version)));
        }
    }
    Ok(None)
}

/// Returns the requirements that hold in the image.
fn read(
    target: &Target,
    requires: &BTreeMap<String, Vec<String>>,
    have: &BTreeMap<String, String>,
) -> Result<Vec<Requirement>> {
    #[derive(Serialize)]
    struct Question<'a> {
        python: &'a str,
        requires: &'a BTreeMap<String, Vec<String>>,
        have: &'a BTreeMap<String, String>,
    }
    python::run(READER, &Question { python: &target.python, requires, have }, "read what the wheels require")
}

/// Fails if the index writes a requested version differently: the lock has to match fleet.toml.
fn check_request(name: &str, image: &LockedImage, wheels: &[Wheel]) -> Result<()> {
    let ids: BTreeSet<String> = wheels.iter().map(Wheel::id).collect();
    match image.wheels.iter().find(|requested| !ids.contains(*requested)) {
        None => Ok(()),
        Some(requested) => {
            let package = requested.split("==").next().unwrap_or_default();
            let selected = wheels.iter().find(|w| w.name == package).map_or_else(String::new, Wheel::id);
            fail(format!("{name}: pip selected {selected} for {requested}; write the version as the index does"))
        }
    }
}

fn not_found(name: &str, target: &Target, wanted: &[String], is_named: bool, e: &str) -> Error {
    let python = &target.python;
    if is_named {
        let fix = "check name and version of `wheels`; the index has to have a wheel for this Python (`pip index versions NAME`)";
        return Error::Failed(format!("{name}: pip finds no wheel for Python {python}: {e}\n  help: {fix}"));
    }
    let fix = "add the Debian package that has it to `packages` of the group, or take another version of the wheel";
    Error::Failed(format!(
        "{name}: the Python packages and add-ons require {}, and neither Debian nor pip's index has all of them for Python {python}: {e}\n  \
         help: {fix}",
        wanted.join(", ")
    ))
}

fn conflict(name: &str, requirement: &Requirement, have: &BTreeMap<String, String>) -> Error {
    let version = have.get(&requirement.name).map_or("", String::as_str);
    let Requirement { of, text, name: required, .. } = requirement;
    Error::Failed(format!(
        "{name}: {of} requires `{text}`, but the image has version {version} of {required}\n  help: name \
         another version of {of} or {required} in `wheels`"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target() -> Target {
        Target { python: "3.13".to_owned(), glibc: 41 }
    }

    fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect()
    }

    #[test]
    fn versions_of_debian_are_those_of_the_authors() {
        for (debian, authors) in [
            ("5.4.0-1", "5.4.0"),
            ("1:2.0.1~beta-1+b2", "2.0.1"),
            ("19.0.0+20250918.dfsg-1", "19.0.0"),
            ("2.31", "2.31"),
        ] {
            assert_eq!(upstream(debian), authors);
        }
    }

    #[test]
    fn debian_has_packages_under_their_pythons_names() {
        let packages = ["odoo-19=19.0.0+x-1", "python3-dateutil=2.9.0-3", "python3-pil=11.1.0-5", "libc6=2.41-1"];
        let image = LockedImage { packages: packages.map(str::to_owned).to_vec(), ..LockedImage::default() };
        let have = of_debian(&image);
        for (name, version) in [("odoo", "19.0.0"), ("python-dateutil", "2.9.0"), ("pillow", "11.1.0")] {
            assert_eq!(have[name], version);
        }
        let archive = |name: &str| Ok((name == "python3-stdnum").then(|| "1.20-1".to_owned()));
        let found = in_debian("python-stdnum", &archive).unwrap();
        assert_eq!(found, Some(("python3-stdnum".to_owned(), "1.20-1".to_owned())));
        assert_eq!(in_debian("xlsxwriter", &archive).unwrap(), None);
    }

    #[test]
    fn requirements_hold_or_not_as_pip_reads_them() {
        let requires = BTreeMap::from([(
            "a".to_owned(),
            ["lxml>=5", "Python_Dateutil", "old>=2; python_version < '3.12'", "test; extra == 'test'", "odoo==19.0.*"]
                .map(str::to_owned)
                .to_vec(),
        )]);
        let have = map(&[("lxml", "4.9"), ("odoo", "19.0.0")]);
        let found = read(&target(), &requires, &have).unwrap();
        let found: Vec<_> = found.iter().map(|r| (r.name.as_str(), r.accepts)).collect();
        assert_eq!(found, [("lxml", Some(false)), ("python-dateutil", None), ("odoo", Some(true))]);
    }

    #[test]
    fn conflicts_have_both_packages_and_the_fix() {
        let text = "lxml>=5".to_owned();
        let requirement =
            Requirement { of: "the wheel a".to_owned(), name: "lxml".to_owned(), text, accepts: Some(false) };
        let e = conflict("app", &requirement, &map(&[("lxml", "4.9")])).to_string();
        assert!(e.contains("the wheel a requires `lxml>=5`, but the image has version 4.9 of lxml"), "{e}");
    }
}
