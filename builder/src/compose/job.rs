//! The input of the sandbox's task `compose`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::sandbox::Room;

/// The task's input. Its files have this order: the tree to start from, then for each stage the stage's packages and
/// Python packages, the kernel if the stage is the last one, and the tree's tar.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Job {
    pub(super) room: Room,
    /// Whether there is a tree to start from.
    pub(super) start: bool,
    pub(super) stages: Vec<Stage>,
    pub(super) trim: Vec<Rule>,
    pub(super) users: BTreeMap<String, (u32, String, bool)>,
}

/// Packages to add.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Stage {
    pub(super) debs: Vec<DebFile>,
    /// Python packages, added when the others are configured.
    pub(super) wheels: Vec<WheelFile>,
    /// Removes the files that belong to the build. No package can be installed afterwards.
    pub(super) finish: bool,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct DebFile {
    pub(super) name: String,
    pub(super) sha256: String,
    pub(super) essential: bool,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct WheelFile {
    pub(super) name: String,
    pub(super) sha256: String,
}

/// A path pattern in [dpkg's syntax](https://manpages.debian.org/dpkg.1) (`--path-exclude`). The last match decides.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Rule {
    /// Pattern of the path, with dpkg's wildcards.
    pub pattern: String,
    /// Whether files with such a path stay in the tree.
    pub keep: bool,
}
