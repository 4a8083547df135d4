//! The sandbox's inner process: pid 1 of its own world.

use std::fs::{self, Permissions};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use serde::{Deserialize, Serialize};

use super::unpack::{Trimmer, Unpacked, unpack};
use super::{Job, LayerInfo, Stage, archive, configure, dpkgdb, finish};
use crate::{checks, make};

/// Does the job on standard input, answers on standard output. Returns the exit code.
pub fn inner() -> u8 {
    let _ = nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL);
    // The tree's modes must not depend on who builds.
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    let mut text = Vec::new();
    let done = std::io::stdin()
        .read_to_end(&mut text)
        .map_err(|e| e.to_string())
        .and_then(|_| serde_json::from_slice::<Work>(&text).map_err(|e| e.to_string()))
        .and_then(|work| {
            match work {
                Work::Compose(job) => compose(&job).map(|info| serde_json::to_string(&info)),
                Work::Check(job) => checks::work(&job).map(|said| serde_json::to_string(&said)),
                Work::Make(job) => make::work(&job).map(|()| serde_json::to_string(&())),
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
    Make(make::Job),
}

/// A bare folder for a tree, in memory if so wished.
pub(super) fn fresh_root(work: &Path, ram: bool) -> Result<PathBuf, String> {
    let none = None::<&Path>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .map_err(|e| format!("cannot make mounts private: {e}"))?;
    if ram {
        mount(Some("tmpfs"), work, Some("tmpfs"), MsFlags::empty(), Some("mode=0755,size=90%"))
            .map_err(|e| format!("cannot mount a tmpfs: {e}"))?;
    }
    let root = work.join("root");
    fs::create_dir(&root).map_err(|e| format!("{}: {e}", root.display()))?;
    fs::set_permissions(&root, Permissions::from_mode(0o755)).map_err(|e| e.to_string())?;
    Ok(root)
}

fn compose(job: &Job) -> Result<LayerInfo, String> {
    let root = fresh_root(&job.work, job.ram)?;
    if let Some(start) = &job.start {
        archive::read(start, &root).map_err(|e| format!("{}: {e}", start.display()))?;
    }
    let trim = Trimmer::new(&job.trim)?;
    let mut info = None;
    for stage in &job.stages {
        info = Some(self::stage(job, stage, &root, &trim)?);
    }
    if !job.ram {
        // The files belong to mapped ids: from outside they could not be removed.
        let _ = fs::remove_dir_all(&root);
    }
    info.ok_or_else(|| "the job has no stages".to_owned())
}

fn stage(job: &Job, stage: &Stage, root: &Path, trim: &Trimmer) -> Result<LayerInfo, String> {
    let packages = unpack(&stage.debs, root, trim)?;
    dpkgdb::write(root, &packages).map_err(|e| format!("cannot write dpkg's database: {e}"))?;
    let names = |essential: bool| -> Vec<String> {
        packages.iter().filter(|p: &&Unpacked| !essential || p.essential).map(|p| p.deb.info_name()).collect()
    };
    configure::configure(root, &names(false), &names(true), &job.users)?;
    drop(packages);
    let kernel = if stage.finish { finish::finish(root, &stage.out)? } else { String::new() };
    let (bytes, files) =
        archive::write(root, &stage.out.join("root.tar")).map_err(|e| format!("cannot write the layer: {e}"))?;
    Ok(LayerInfo { kernel, bytes, files })
}
