//! The sandbox's inner process: pid 1 of its own world.

use std::io::Write as _;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::unpack::{Trimmer, Unpacked, unpack};
use super::{Job, LayerInfo, Stage, archive, configure, dpkg_database, finish};
use crate::bake::{checks, generate};
use crate::sandbox::Files;
use crate::sandbox::tree_root::{Runner, with_tree};

/// Does the job on standard input, answers on standard output. Returns the exit code.
pub fn inner() -> u8 {
    let _ = nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL);
    // The tree's modes must not depend on who builds.
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    let done = Files::receive::<Work>().map_err(|e| format!("cannot read the job: {e}")).and_then(|(work, files)| {
        match work {
            Work::Compose(job) => compose(&job, &files).map(|info| serde_json::to_string(&info)),
            Work::Check(job) => checks::work(&job, &files).map(|said| serde_json::to_string(&said)),
            Work::Make(job) => generate::work(&job, &files).map(|()| serde_json::to_string(&())),
        }?
        .map_err(|e| e.to_string())
    });
    match done {
        Ok(answer) => u8::from(writeln!(std::io::stdout(), "{answer}").is_err()),
        Err(e) => {
            eprintln!("{e}");
            1
        }
    }
}

/// What the sandbox can do.
#[derive(Debug, Serialize, Deserialize)]
pub enum Work {
    Compose(Job),
    Check(checks::Job),
    Make(generate::Job),
}

fn compose(job: &Job, files: &Files) -> Result<LayerInfo, String> {
    with_tree(job.room, |root, runner| {
        if job.start {
            files
                .next()
                .and_then(|tar| archive::read(tar, root))
                .map_err(|e| format!("cannot lay out the base layer: {e}"))?;
        }
        let trim = Trimmer::new(&job.trim)?;
        let mut info = None;
        for stage in &job.stages {
            info = Some(self::stage(job, stage, files, root, runner, &trim)?);
        }
        info.ok_or_else(|| "the job has no stages".to_owned())
    })
}

fn stage(
    job: &Job,
    stage: &Stage,
    files: &Files,
    root: &Path,
    runner: &Runner,
    trim: &Trimmer,
) -> Result<LayerInfo, String> {
    let packages = unpack(&stage.debs, files, root, trim)?;
    dpkg_database::write(root, &packages).map_err(|e| format!("cannot write dpkg's database: {e}"))?;
    let names = |essential: bool| -> Vec<String> {
        packages.iter().filter(|p: &&Unpacked| !essential || p.essential).map(|p| p.deb.info_name()).collect()
    };
    configure::configure(root, runner, &names(false), &names(true), &job.users)?;
    drop(packages);
    let out = || files.next().map_err(|e| format!("cannot write the layer: {e}"));
    let kernel = if stage.finish { finish::finish(root, runner, &mut out()?)? } else { String::new() };
    let (bytes, files) = archive::write(root, out()?).map_err(|e| format!("cannot write the layer: {e}"))?;
    Ok(LayerInfo { kernel, bytes, files })
}
