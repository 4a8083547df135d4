//! What the builder tells the sandbox to compose.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::sandbox::Room;

/// What the sandbox is to do. Its files come in this order: the tree to start from; then for each
/// stage its packages, the kernel if it is the last, and the tree's tar.
#[derive(Debug, Serialize, Deserialize)]
pub struct Job {
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
    /// Take out what belongs to the build; nothing can be installed after.
    pub(super) finish: bool,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct DebFile {
    pub(super) name: String,
    pub(super) sha256: String,
    pub(super) essential: bool,
}

/// A path pattern in dpkg's language; the last that matches decides.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Rule {
    pub pattern: String,
    pub keep: bool,
}
