//! Profiles: what a role is (`profiles/roles/*.toml`).

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::diagnostic::{Diagnostic, parse};
use crate::schema::ExtraSource;
use crate::settings::Proto;

/// What a role brings to an image. `base` is one too; every image has it.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Profile {
    pub description: String,
    /// Debian packages.
    pub packages: Vec<String>,
    /// Packages by `[image] hardware`: the kernels.
    pub hardware: BTreeMap<String, Vec<String>>,
    /// Apt sources its packages need, as `[[debian.sources]]` in `fleet.toml`. One of the same
    /// name there takes its place.
    pub sources: Vec<ExtraSource>,
    /// Overlays, laid in this order; two overlays with the same file are an error.
    pub overlays: Vec<String>,
    /// Roles that can't be on the same node, with the reason.
    pub conflicts: BTreeMap<String, String>,
    /// Seconds after which a blank machine may take the place of one that says nothing. Without it
    /// an operator has to say so: what the silent one has may be the only copy.
    pub reclaim_after: Option<u32>,
    pub ports: Vec<Port>,
    pub units: Units,
    pub health: Health,
    pub trim: Trim,
    /// Users and groups with ids that are the same in every image, for ever: /var outlives them.
    pub users: BTreeMap<String, User>,
    pub disk: Disk,
    pub vm: VmSize,
    /// Kernel command line.
    pub cmdline: Vec<String>,
}

/// A listening port: two roles on one node can't share one.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Port {
    pub port: u16,
    pub proto: Proto,
    /// What listens.
    pub service: String,
    /// Roles whose nodes may reach it, beside those of [`crate::ports::rows`]; `every` stands for all nodes.
    /// Without it, and without a built-in rule, every node may.
    #[serde(default)]
    pub from: Option<Vec<String>>,
}

/// Which units an image starts by itself. Role services are not here: the agent starts those.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Units {
    /// Target or unit → units it wants.
    pub wants: BTreeMap<String, Vec<String>>,
    /// Target or unit → units it requires.
    pub requires: BTreeMap<String, Vec<String>>,
    /// Units that never start.
    pub mask: Vec<String>,
}

/// What has to run on the node itself for an image to be a good one. A unit that needs another
/// node waits for it in its start: an unplugged cable is no reason to go back to the older image.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Health {
    pub units: Vec<String>,
}

/// Package files that never reach the tree, in dpkg's path-exclude/path-include language.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Trim {
    pub exclude: Vec<String>,
    pub include: Vec<String>,
    /// Includes for each of the fleet's languages, which takes the place of `LANGUAGE`.
    pub languages: Vec<String>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct User {
    /// Same number for user and group.
    pub id: u32,
    #[serde(default = "nologin_home")]
    pub home: String,
    /// A group only.
    #[serde(default)]
    pub group_only: bool,
}

/// Sizes such as `"512M"`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Disk {
    /// One root slot.
    pub root: Option<String>,
    /// Least room for /var.
    pub var: Option<String>,
    /// What is in /var may be lost with the power: a machine without disks can have this role.
    pub volatile: bool,
}

/// What `bakehouse up` gives a node of this role.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VmSize {
    pub memory: Option<String>,
    pub cpus: Option<u16>,
}

impl Profile {
    /// Reads a profile.
    ///
    /// # Errors
    /// A [`Diagnostic`] with file, line and fix.
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
        Ok(profile)
    }
}

/// Profiles by role name, `base` among them.
pub type Profiles = BTreeMap<String, Profile>;

/// `"512M"` in bytes; K, M, G and T are powers of 1024.
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
    fn sizes() {
        assert_eq!(parse_size("512M"), Some(512 << 20));
        assert_eq!(parse_size("2G"), Some(2 << 30));
        assert_eq!(parse_size("7"), Some(7));
        assert_eq!(parse_size("M"), None);
        assert_eq!(parse_size("5 M"), None);
        assert_eq!(parse_size("99999999999999T"), None);
    }

    #[test]
    fn a_bad_size_names_its_line() {
        let e = Profile::parse("db.toml", b"[disk]\nvar = \"lots\"\n").unwrap_err();
        assert_eq!(e.line, 2);
        assert!(e.to_string().contains("`lots` is not a size"), "{e}");
    }
}
