//! Code of Odoo and of add-ons from elsewhere: `[odoo.source]` and `[[odoo.repositories]]`.

use serde::{Deserialize, Serialize};

#[cfg(feature = "schema")]
use crate::form;

/// `[odoo.source]`: Odoo's code instead of the code in Debian's package. What Debian's package depends on remains in the
/// image. Set `url` and `commit`, or `archive` and `sha256`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct OdooSource {
    /// Address of a git repository: https, ssh, git or file. Example: `"https://github.com/odoo/odoo"`. Default: none.
    #[cfg_attr(feature = "schema", schemars(with = "Option<form::Repository>"))]
    pub url: Option<String>,
    /// Commit of the repository, as git prints it in full. Default: none.
    #[cfg_attr(feature = "schema", schemars(with = "Option<form::Commit>"))]
    pub commit: Option<String>,
    /// Address of a `.tar.gz`, or its path relative to `fleet.toml`. Default: none.
    pub archive: Option<String>,
    /// sha256 of the archive, in hex. Default: none.
    #[cfg_attr(feature = "schema", schemars(with = "Option<form::Sha256>"))]
    pub sha256: Option<String>,
}

/// `[[odoo.repositories]]`: add-ons from a git repository or an archive. Set `url` and `commit`, or `archive` and
/// `sha256`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct Repository {
    /// Address of a git repository: https, ssh, git or file. Example: `"https://github.com/OCA/partner-contact"`.
    /// Default: none.
    #[cfg_attr(feature = "schema", schemars(with = "Option<form::Repository>"))]
    pub url: Option<String>,
    /// Commit of the repository, as git prints it in full. Default: none.
    #[cfg_attr(feature = "schema", schemars(with = "Option<form::Commit>"))]
    pub commit: Option<String>,
    /// Address of a `.tar.gz`, or its path relative to `fleet.toml`. Default: none.
    pub archive: Option<String>,
    /// sha256 of the archive, in hex. Default: none.
    #[cfg_attr(feature = "schema", schemars(with = "Option<form::Sha256>"))]
    pub sha256: Option<String>,
    /// Folder of the repository whose sub-folders are the add-ons. Default: its top.
    pub folder: String,
    /// Add-ons to take. Default: all in the folder.
    #[cfg_attr(feature = "schema", schemars(with = "Vec<form::Identifier>"))]
    pub addons: Vec<String>,
}

/// Where code comes from, and what its exact content is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CodeOrigin<'a> {
    /// A commit of a git repository.
    Git {
        /// Address of the repository.
        url: &'a str,
        /// The commit in hex.
        commit: &'a str,
    },
    /// A `.tar.gz`.
    Archive {
        /// Its address, or its path relative to `fleet.toml`.
        location: &'a str,
        /// Its sha256 in hex.
        sha256: &'a str,
    },
}

impl<'a> CodeOrigin<'a> {
    /// Returns the origin, or `None` if the keys are not those of exactly one origin.
    fn of(keys: [&'a Option<String>; 4]) -> Option<Self> {
        match keys.map(Option::as_deref) {
            [Some(url), Some(commit), None, None] => Some(Self::Git { url, commit }),
            [None, None, Some(location), Some(sha256)] => Some(Self::Archive { location, sha256 }),
            _ => None,
        }
    }

    /// Returns the commit or the sha256, in hex.
    #[must_use]
    pub fn revision(&self) -> &'a str {
        match self {
            Self::Git { commit, .. } => commit,
            Self::Archive { sha256, .. } => sha256,
        }
    }

    /// Returns the last part of the address, without its ending.
    #[must_use]
    pub fn name(&self) -> &'a str {
        let (Self::Git { url: address, .. } | Self::Archive { location: address, .. }) = self;
        let last = address.trim_end_matches('/').rsplit(['/', ':']).next().unwrap_or_default();
        last.strip_suffix(".git").or_else(|| last.strip_suffix(".tar.gz")).unwrap_or(last)
    }
}

impl OdooSource {
    /// Returns where the code comes from; `None` if the keys are not valid together.
    #[must_use]
    pub fn origin(&self) -> Option<CodeOrigin<'_>> {
        CodeOrigin::of([&self.url, &self.commit, &self.archive, &self.sha256])
    }
}

impl Repository {
    /// Returns where the add-ons come from; `None` if the keys are not valid together.
    #[must_use]
    pub fn origin(&self) -> Option<CodeOrigin<'_>> {
        CodeOrigin::of([&self.url, &self.commit, &self.archive, &self.sha256])
    }
}
