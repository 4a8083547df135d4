//! Runs in the sandbox: composes the tree.

use std::path::Path;

use super::job::{Job, Stage};
use super::layer::LayerInfo;
use super::unpack::{Trimmer, Unpacked, unpack};
use super::{archive, configure, dpkg_database, finish, wheels};
use crate::error::{Error, Result};
use crate::sandbox::tree_root::{Runner, with_tree};
use crate::sandbox::{Files, report};

/// Composes the tree and writes its layers.
///
/// # Errors
/// If a package cannot be unpacked or configured, or a layer cannot be written.
pub(crate) fn work(job: &Job, files: &Files) -> Result<LayerInfo> {
    with_tree(job.room, |root, runner| {
        if job.start {
            files.next().and_then(|tar| archive::read(tar, root)).map_err(Error::cannot("unpack the base layer"))?;
        }
        let trim = Trimmer::new(&job.trim)?;
        let total: usize = job.stages.iter().map(|stage| stage.debs.len()).sum();
        let mut info = None;
        let mut before = 0;
        for stage in &job.stages {
            let unpacked = |count: usize| report(&format!("unpacked {} of {total} packages", before + count));
            info = Some(self::stage(job, stage, files, root, runner, &trim, &unpacked)?);
            before += stage.debs.len();
        }
        info.ok_or_else(|| Error::Failed("the job has no stages".to_owned()))
    })
}

fn stage(
    job: &Job,
    stage: &Stage,
    files: &Files,
    root: &Path,
    runner: &Runner,
    trim: &Trimmer,
    unpacked: &(dyn Fn(usize) + Sync),
) -> Result<LayerInfo> {
    let packages = unpack(&stage.debs, files, root, trim, unpacked)?;
    report(&format!("configuring {} packages", packages.len()));
    dpkg_database::write(root, &packages).map_err(Error::cannot("write dpkg's database"))?;
    let names = |essential: bool| -> Vec<String> {
        packages.iter().filter(|p: &&Unpacked| !essential || p.essential).map(|p| p.deb.info_name()).collect()
    };
    configure::configure(root, runner, &names(false), &names(true), &job.users)?;
    drop(packages);
    wheels::unpack(&stage.wheels, files, root, trim)?;
    report("writing the files");
    let out = || files.next().map_err(Error::cannot("write the layer"));
    let kernel = if stage.finish { finish::finish(root, runner, &mut out()?)? } else { String::new() };
    let (bytes, files) = archive::write(root, out()?).map_err(Error::cannot("write the layer"))?;
    Ok(LayerInfo { kernel, bytes, files })
}
