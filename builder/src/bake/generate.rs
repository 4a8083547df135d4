//! Files that a program of the image itself makes when the image is built: what would take long on
//! a node, and is the same on every one. Each is made once, and kept in the store.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::bake::{Baked, GeneratedFile};
use crate::compose::{ImageTree, Layer};
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::project::ImageSpec;
use crate::sandbox::chroot::Commands;
use crate::sandbox::{self, Files, HostFile, Limits};
use crate::store::{Kind, Store};
use crate::util::digest::Key;
use crate::util::fs::write_atomic;

/// Name of the sandbox's task.
pub const TASK: &str = "generate";

/// What the sandbox is to make.
#[derive(Debug, Serialize, Deserialize)]
pub struct Job {
    tree: ImageTree,
    command: Vec<String>,
    /// Where it is in the tree then.
    file: String,
}

/// Makes every file that the image's overlays want made.
///
/// # Errors
/// A program fails: its words.
pub fn make(
    recipe: &ImageSpec,
    layer: &Layer,
    baked: &Baked,
    baked_tar: &Path,
    store: &Store,
    progress: &Progress,
) -> Result<Vec<GeneratedFile>> {
    let mut all = Vec::new();
    for wanted in &baked.makes {
        let mut key = Key::new(env!("CODE_GENERATE"));
        key.add("layer", &layer.key).add("file", &wanted.make.file);
        for word in &wanted.make.command {
            key.add("word", word);
        }
        baked.add_to(&mut key, &wanted.make.of);
        let key = key.finish();
        // Groups with the same packages wait for the first to make it.
        let _guard = store.lock(Kind::GeneratedFile, &key)?;
        let path = store.path(Kind::GeneratedFile, &key);
        if store.get(Kind::GeneratedFile, &key).is_none() {
            let step = progress.step("make", &format!("{}: {}", recipe.group, wanted.make.file));
            let work = store.scratch(Kind::GeneratedFile, &key);
            fs::create_dir_all(&work).map_err(Error::io("create", &work))?;
            let out = work.with_extension("file");
            let job = Job {
                tree: ImageTree::of(layer, baked_tar)?,
                command: wanted.make.command.clone(),
                file: wanted.make.file.clone(),
            };
            let mut files = job.tree.host_files();
            files.push(HostFile::Create(out.clone()));
            let made: Result<()> = sandbox::run(TASK, &job, &files, &work, &Limits::for_folder(&work));
            let _ = fs::remove_dir_all(&work);
            let bytes = made.and_then(|()| fs::read(&out).map_err(Error::io("read", &out)));
            let _ = fs::remove_file(&out);
            let words = |e| Error::Failed(format!("overlays/{}: /{}: {e}", wanted.overlay, wanted.make.file));
            let bytes = bytes.map_err(words)?;
            write_atomic(&path, &bytes)?;
            step.done(&format!("{}: {} ({:.1} MB)", recipe.group, wanted.make.file, bytes.len() as f64 / 1e6));
        }
        let bytes = fs::read(&path).map_err(Error::io("read", &path))?;
        all.push(GeneratedFile { overlay: wanted.overlay.clone(), path: wanted.make.file.clone(), bytes });
    }
    Ok(all)
}

/// The sandbox's part.
pub fn work(job: &Job, files: &Files) -> Result<(), String> {
    job.tree.with(files, |root, runner| {
        let commands = vec![job.command.clone()];
        runner.run(Commands { commands, stand_ins: Vec::new(), files: Vec::new(), own_network: true })?;
        let told = |e| format!("{}: {e}", job.file);
        // A link leads nowhere but into the tree: it is this thread's `/`.
        let made = root.join(&job.file);
        fs::symlink_metadata(&made).map_err(told)?;
        if !made.is_file() {
            return Err(format!("{} is no file of the image", job.file));
        }
        let mut out = files.next().map_err(told)?;
        io::copy(&mut File::open(made).map_err(told)?, &mut out).map(drop).map_err(told)
    })
}
