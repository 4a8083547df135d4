//! Profiles: definitions of roles (`profiles/roles/*.toml`).

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::diagnostic::{Diagnostic, parse};
#[cfg(feature = "schema")]
use crate::form;
use crate::schema::ExtraSource;
use crate::settings::Proto;

/// `profiles/roles/ROLE.toml`: what a role adds to an image. The profile `base` is in every image.
#[derive(Clone, Debug, Default, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct Profile {
    /// One line about the role. Example: `"Database: PostgreSQL under Patroni"`.
    pub description: String,
    /// Debian packages. Default: none.
    pub packages: Vec<String>,
    /// Python packages from the index of the host's pip, each with its version. Bakehouse takes their wheels, without
    /// dependencies: Debian's packages of these, or further wheels, have to be named too. Default: none.
    /// Example: `["plutoprint==0.23.0"]`.
    #[cfg_attr(feature = "schema", schemars(with = "Vec<form::Wheel>"))]
    pub wheels: Vec<String>,
    /// Fonts for each of `odoo.languages`: `[fonts.LANGUAGE]`. A language without a table has those of its base language
    /// (`zh` for `zh_CN`), or none.
    pub fonts: BTreeMap<String, Fonts>,
    /// Packages for one value of `image.hardware`, such as a kernel: `hardware.cloud`, `hardware.metal`.
    pub hardware: BTreeMap<String, Vec<String>>,
    /// Apt sources of the packages, as in `debian.sources` of `fleet.toml`. A source of `fleet.toml` with the same name
    /// replaces one of these.
    pub sources: Vec<ExtraSource>,
    /// Overlays, applied in this order. Two overlays with the same file are an error.
    pub overlays: Vec<String>,
    /// Roles that cannot be on the same node, each with the reason. Example: `conflicts.monitor = "reason"`.
    pub conflicts: BTreeMap<String, String>,
    /// Seconds without a report of a node after which a blank machine may take its slot. Default: only the operator can
    /// replace the node, because its disk may have the only copy of its data. It applies only if all
    /// roles of the node have it. Example: `600`.
    pub reclaim_after: Option<u32>,
    /// Ports on which the role listens: `[[ports]]`.
    pub ports: Vec<Port>,
    /// Units that systemd starts at boot, or never.
    pub units: Units,
    /// Units that must run for the image to be good.
    pub health: Health,
    /// Files of packages that the image leaves out.
    pub trim: Trim,
    /// Users and groups with fixed ids. An id must never change, because files in `/var` outlive the image. Example:
    /// `postgres = { id = 805, home = "/var/lib/postgresql" }`.
    pub users: BTreeMap<String, User>,
    /// Sizes of the partitions.
    pub disk: Disk,
    /// Size of the virtual machine of `bakehouse up`.
    pub vm: VmSize,
    /// Words for the kernel's command line.
    pub cmdline: Vec<String>,
}

/// An entry of `[[ports]]`: a port on which a role listens. Two roles of one node cannot share a port, unless the
/// service is the same.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Port {
    /// Port number.
    pub port: u16,
    /// `"tcp"` or `"udp"`.
    pub proto: Proto,
    /// Name of the service that listens. Example: `"postgresql"`.
    pub service: String,
    /// Roles whose nodes may reach the port, in addition to those of the built-in rules.
    /// `["every"]` stands for all nodes, `[]` for the node itself alone. Default: the roles of the built-in rules;
    /// without such a rule every node can reach the port, and `bakehouse check` prints a warning.
    #[serde(default)]
    pub from: Option<Vec<String>>,
}

/// `[units]`: units that systemd starts at boot, or never. Services of a role are not here, because the agent starts
/// them.
#[derive(Clone, Debug, Default, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct Units {
    /// Units that a target or unit wants (`Wants=`).
    pub wants: BTreeMap<String, Vec<String>>,
    /// Units that a target or unit requires (`Requires=`).
    pub requires: BTreeMap<String, Vec<String>>,
    /// Units that systemd never starts.
    pub mask: Vec<String>,
}

/// `[health]`: units that must run for an image to be good. If one fails, the node returns to its older image. A unit
/// that needs another node has to wait for it while it starts, because a disconnected network is no reason to return:
/// it stays `activating`, has no time limit of its own, and fails only if the image is at fault.
#[derive(Clone, Debug, Default, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct Health {
    /// Names of units. Example: `["patroni.service"]`.
    pub units: Vec<String>,
}

/// `[trim]`: files of packages that the image leaves out, as in dpkg's `path-exclude` and `path-include`.
#[derive(Clone, Debug, Default, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct Trim {
    /// Patterns of paths that the image leaves out. Example: `["/usr/share/i18n/*"]`.
    pub exclude: Vec<String>,
    /// Patterns of paths that the image keeps although `exclude` matches them.
    pub include: Vec<String>,
    /// Patterns to keep for each of `odoo.languages`. Bakehouse replaces `LANGUAGE` by the language.
    pub languages: Vec<String>,
}

/// `[fonts.LANGUAGE]`: fonts that an image has if the language is one of `odoo.languages`.
#[derive(Clone, Debug, Default, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct Fonts {
    /// Debian packages. Example: `["fonts-noto-cjk"]`.
    pub packages: Vec<String>,
    /// Patterns of the packages' files that the image keeps although `trim.exclude` matches them. Example:
    /// `["/usr/share/fonts/opentype/noto/NotoSansCJK-Regular.ttc"]`.
    pub files: Vec<String>,
}

/// An entry of `[users]`: a user and its group.
#[derive(Clone, Debug, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct User {
    /// Id of both the user and the group.
    pub id: u32,
    /// Home directory. Default: `"/nonexistent"`.
    #[serde(default = "nologin_home")]
    pub home: String,
    /// Whether there is only a group, and no user. Default: `false`.
    #[serde(default)]
    pub group_only: bool,
}

/// `[disk]`: sizes of the partitions, such as `"512M"`.
#[derive(Clone, Debug, Default, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct Disk {
    /// Size of a root partition. The image has the largest of its roles'.
    #[cfg_attr(feature = "schema", schemars(with = "Option<form::Size>"))]
    pub root: Option<String>,
    /// Least size of the `/var` partition.
    #[cfg_attr(feature = "schema", schemars(with = "Option<form::Size>"))]
    pub var: Option<String>,
    /// Whether the role can lose its `/var` at each restart. A machine without a disk can then have the role. Default:
    /// `false`.
    pub volatile: bool,
}

/// `[vm]`: size of the virtual machine of `bakehouse up` for a node with this role.
#[derive(Clone, Debug, Default, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct VmSize {
    /// Memory. Example: `"768M"`.
    #[cfg_attr(feature = "schema", schemars(with = "Option<form::Size>"))]
    pub memory: Option<String>,
    /// Number of CPUs.
    pub cpus: Option<u16>,
}

impl Profile {
    /// Reads a profile.
    ///
    /// # Errors
    /// If the bytes are not a profile, or a size is invalid. The [`Diagnostic`] has file, line and fix.
    pub fn parse(name: &str, bytes: &[u8]) -> Result<Self, Box<Diagnostic>> {
        let (profile, source) = parse::<Self>(name, bytes)?;
        let sizes = [&profile.disk.root, &profile.disk.var, &profile.vm.memory];
        for size in sizes.into_iter().flatten() {
            if parse_size(size).is_none() {
                let at = source.text.find(size.as_str()).unwrap_or(0);
                return Err(Box::new(Diagnostic::at(
                    crate::Severity::Error,
                    &source,
                    at..at + size.len(),
                    format!("`{size}` is not a size"),
                    Some("write a whole number with K, M or G, such as \"512M\"".to_owned()),
                )));
            }
        }
        if let Some(wheel) = profile.wheels.iter().find(|wheel| !is_wheel(wheel)) {
            let at = source.text.find(wheel.as_str()).unwrap_or(0);
            return Err(Box::new(Diagnostic::at(
                crate::Severity::Error,
                &source,
                at..at + wheel.len(),
                format!("`{}` is not a Python package with its version", wheel.escape_debug()),
                Some(WHEEL_HELP.to_owned()),
            )));
        }
        Ok(profile)
    }
}

/// The fix of an invalid name in `wheels`.
pub(crate) const WHEEL_HELP: &str = "write it as pip does, with one version, such as \"plutoprint==0.23.0\"";

/// Returns whether a text is a Python package with one version: `name==version`.
pub(crate) fn is_wheel(text: &str) -> bool {
    let word = |text: &str, more: &str| {
        let outer = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
        outer(text.chars().next())
            && outer(text.chars().next_back())
            && text.chars().all(|c| c.is_ascii_alphanumeric() || more.contains(c))
    };
    text.split_once("==").is_some_and(|(name, version)| word(name, "._-") && word(version, ".!+_-"))
}

/// Returns the [normal form](https://packaging.python.org/en/latest/specifications/name-normalization/) of a Python
/// package's name.
///
/// # Examples
///
/// ```
/// assert_eq!(fleet::wheel_name("Odoo_Addon.-partner"), "odoo-addon-partner");
/// ```
#[must_use]
pub fn wheel_name(name: &str) -> String {
    let parts = name.split(['-', '_', '.']).filter(|part| !part.is_empty());
    parts.collect::<Vec<_>>().join("-").to_ascii_lowercase()
}

/// Profiles by name of the role, with `base`.
pub type Profiles = BTreeMap<String, Profile>;

/// Returns a size such as `"512M"` in bytes. K, M, G and T are powers of 1024.
///
/// # Examples
///
/// ```
/// assert_eq!(fleet::parse_size("640M"), Some(640 * 1024 * 1024));
/// assert_eq!(fleet::parse_size("640 MB"), None);
/// ```
#[must_use]
pub fn parse_size(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "" => 1,
        "K" => 1 << 10,
        "M" => 1 << 20,
        "G" => 1 << 30,
        "T" => 1_u64 << 40,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(unit)
}

fn nologin_home() -> String {
    "/nonexistent".to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_size_accepts_units_and_rejects_overflow() {
        assert_eq!(parse_size("512M"), Some(512 << 20));
        assert_eq!(parse_size("2G"), Some(2 << 30));
        assert_eq!(parse_size("7"), Some(7));
        assert_eq!(parse_size("M"), None);
        assert_eq!(parse_size("5 M"), None);
        assert_eq!(parse_size("99999999999999T"), None);
    }

    #[test]
    fn wheel_has_a_name_and_one_version() {
        assert!(is_wheel("plutoprint==0.23.0") && is_wheel("odoo-addon-x==19.0.1.0.0") && is_wheel("A.b_c==1!2.0+d"));
        for wrong in
            ["plutoprint", "plutoprint>=1", "a==", "==1", "a ==1", "a==1 --index-url=x", "-r==1", "a==1.*", "a[x]==1"]
        {
            assert!(!is_wheel(wrong), "{wrong}");
        }
        let e = Profile::parse("app.toml", b"packages = []\nwheels = [\"plutoprint\"]\n").unwrap_err();
        assert_eq!(e.line, 2);
        assert!(e.to_string().contains("`plutoprint` is not a Python package"), "{e}");
    }

    #[test]
    fn invalid_size_has_a_line() {
        let e = Profile::parse("db.toml", b"[disk]\nvar = \"lots\"\n").unwrap_err();
        assert_eq!(e.line, 2);
        assert!(e.to_string().contains("`lots` is not a size"), "{e}");
    }
}
