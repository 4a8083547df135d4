//! Input of the steps that run programs of an image: validation and generated files.

use std::path::Path;

use crate::bake::Baked;
use crate::compose::Layer;
use crate::progress::Progress;
use crate::project::{ImageSpec, Project};
use crate::store::Store;

/// One image after baking, with what the later steps need to work on it.
#[derive(Clone, Copy)]
pub(crate) struct BuildContext<'a> {
    /// The fleet that the image belongs to.
    pub project: &'a Project,
    /// What the group's profiles ask for.
    pub spec: &'a ImageSpec,
    /// The group's unpacked and configured packages.
    pub layer: &'a Layer,
    /// The files that the builder adds to `layer`.
    pub baked: &'a Baked,
    /// The same files as a tar.
    pub baked_tar: &'a Path,
    /// Keeps the results of the steps.
    pub store: &'a Store,
    /// Prints the steps.
    pub progress: &'a Progress,
}
