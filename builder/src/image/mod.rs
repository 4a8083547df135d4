//! `bakehouse build`: builds the bootable disk image of each group from the lock.
//!
//! A root is the packages' erofs with the baked files appended. The builder creates the packages' erofs once for each
//! set of packages. The order never changes, so that a build with an empty store and one with a full store give the
//! same bytes.

mod build_record;
mod disk_space;
mod installer;
mod node_programs;
mod output;
mod parts;

use std::fs;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::Serialize;

use node_programs::{node_program, node_programs};
use output::Output;

use crate::assemble::layout::{self, image_id};
use crate::error::{Error, Result, fail};
use crate::packages::lock::Lock;
use crate::progress::Progress;
use crate::project::{ImageSpec, Project};
use crate::store::{Kind, Store};
use crate::util::digest::sha256;
use crate::util::fs::shown;

/// Inputs that the builds of all groups share.
pub(crate) struct Build<'a> {
    /// The fleet's description.
    pub project: &'a Project,
    /// The package versions.
    pub lock: &'a Lock,
    /// Keeps the results of the steps.
    pub store: &'a Store,
    /// Prints the steps.
    pub progress: &'a Progress,
    /// Revision of the user's sources, for the manifest.
    pub revision: Option<&'a str>,
}

/// A built image.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub(crate) struct BuiltImage {
    /// Group whose nodes run the image.
    pub group: String,
    /// Path of the raw disk image.
    pub disk: PathBuf,
    /// Path of the UKI.
    pub uki: PathBuf,
    /// Path of the manifest.
    pub manifest: PathBuf,
    /// The image existed with the same inputs, so nothing was built.
    pub unchanged: bool,
}

impl Build<'_> {
    /// Builds a group's image.
    ///
    /// # Errors
    /// If any step fails. Incomplete files never have the final names.
    pub(crate) fn image(&self, group: &str) -> Result<BuiltImage> {
        let spec = self.project.recipe(group);
        let sizes = layout::slots(self.project, &spec)?;
        let programs = node_programs(self.project, &spec)?;
        let inputs = self.inputs(&spec, &programs)?;
        let out = self.project.out_dir(group);
        let name = format!("{}_{}", image_id(self.project, group), self.project.topology.version);
        fs::create_dir_all(&out).map_err(Error::io("create", &out))?;
        let _guard = self.store.lock(Kind::Erofs, &sha256(out.as_os_str().as_encoded_bytes()))?;
        let why = Self::stale(&out, &name, &inputs);
        let mut image = BuiltImage::at(group, &out, &name);
        let Some(why) = why else {
            self.progress.say("build", &format!("{group}: unchanged"));
            return Ok(image);
        };
        self.progress.verbose("why", &format!("{group}: {why}"));
        image.unchanged = false;
        self.room(&spec, sizes, &out)?;

        let scratch =
            tempfile::Builder::new().prefix(".build-").tempdir_in(&out).map_err(Error::io("write in", &out))?;
        let parts = self.parts(&spec, &programs, scratch.path())?;
        if parts.root.size > sizes.root {
            return fail(format!(
                "{group}: the root needs {:.1} MB, but its partition has {:.1} MB; raise `[image] root_size`, and \
                 reinstall running nodes",
                parts.root.size as f64 / 1e6,
                sizes.root as f64 / 1e6
            ));
        }
        let step = self.progress.step("assemble", group);
        let assembled = self.assemble(&spec, sizes, &parts, &name, scratch.path())?;
        let uki = assembled.uki.len() as f64 / 1e6;
        let output = Output { dir: &out, name: &name, spec: &spec, sizes, inputs };
        self.write(output, &parts, &assembled)?;
        step.done(&format!(
            "{group}: {} ({:.1} MB root, {uki:.1} MB UKI, {:.0} MB disk)",
            shown(&image.disk),
            parts.root.size as f64 / 1e6,
            sizes.disk() as f64 / 1e6
        ));
        Ok(image)
    }
}

impl BuiltImage {
    /// Names the files of a group's image. `name`: the prefix of all names in the folder `out`.
    fn at(group: &str, out: &Path, name: &str) -> Self {
        let path = |suffix: &str| out.join(format!("{name}{suffix}"));
        Self {
            group: group.to_owned(),
            disk: path(".raw"),
            uki: path(".efi"),
            manifest: path(".manifest.json"),
            unchanged: true,
        }
    }
}

/// Returns the kernel options of the profiles.
fn cmdline(recipe: &ImageSpec) -> String {
    recipe.profiles.iter().flat_map(|p| &p.cmdline).map(String::as_str).collect::<Vec<_>>().join(" ")
}
