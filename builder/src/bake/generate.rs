//! Generates files with the image's own programs during the build, because generating them on each node would take
//! long. They are the same on every node. The store keeps each file.

use std::fs::{self, File};
use std::io;

use serde::{Deserialize, Serialize};

use crate::bake::{BuildContext, GeneratedFile};
use crate::compose::ImageTree;
use crate::error::{Error, Result, fail};
use crate::sandbox::chroot::Commands;
use crate::sandbox::{self, Files, HostFile, Limits};
use crate::store::Kind;
use crate::util::digest::Key;
use crate::util::fs::write_atomic;

/// Name of the sandbox's task.
pub(crate) const TASK: &str = "generate";

/// The task's input.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Job {
    tree: ImageTree,
    command: Vec<String>,
    /// Path of the generated file in the tree.
    file: String,
}

/// Generates every file that a `[[make]]` table of the image's overlays describes.
///
/// # Errors
/// If a program fails. The error has its output.
pub(crate) fn generate(context: &BuildContext) -> Result<Vec<GeneratedFile>> {
    let BuildContext { spec, layer, baked, baked_tar, store, progress, .. } = *context;
    let mut all = Vec::new();
    for wanted in &baked.makes {
        let mut key = Key::new(env!("CODE_GENERATE"));
        key.add("layer", &layer.key).add("file", &wanted.make.file);
        for word in &wanted.make.command {
            key.add("word", word);
        }
        baked.add_to(&mut key, &wanted.make.of);
        let key = key.finish();
        // Groups with the same packages wait for the first one to generate the file.
        let _guard = store.lock(Kind::GeneratedFile, &key)?;
        let path = store.path(Kind::GeneratedFile, &key);
        if store.get(Kind::GeneratedFile, &key).is_none() {
            let step = progress.step("make", &format!("{}: {}", spec.group, wanted.make.file));
            let work = store.scratch(Kind::GeneratedFile, &key);
            fs::create_dir_all(&work).map_err(Error::io("create", &work))?;
            let out = work.with_extension("file");
            let job = Job {
                tree: ImageTree::new(layer, baked_tar)?,
                command: wanted.make.command.clone(),
                file: wanted.make.file.clone(),
            };
            let mut files = job.tree.host_files();
            files.push(HostFile::Create(out.clone()));
            let generated: Result<()> = sandbox::run(TASK, &job, &files, &work, &Limits::for_folder(&work));
            let _ = fs::remove_dir_all(&work);
            let bytes = generated.and_then(|()| fs::read(&out).map_err(Error::io("read", &out)));
            let _ = fs::remove_file(&out);
            let bytes = bytes.map_err(Error::at(format!("overlays/{}: /{}", wanted.overlay, wanted.make.file)))?;
            write_atomic(&path, &bytes)?;
            step.done(&format!("{}: {} ({:.1} MB)", spec.group, wanted.make.file, bytes.len() as f64 / 1e6));
        }
        let bytes = fs::read(&path).map_err(Error::io("read", &path))?;
        all.push(GeneratedFile { overlay: wanted.overlay.clone(), path: wanted.make.file.clone(), bytes });
    }
    Ok(all)
}

/// Runs in the sandbox: runs the command, and copies the file out.
pub(crate) fn work(job: &Job, files: &Files) -> Result<()> {
    job.tree.with(files, |root, runner| {
        let commands = vec![job.command.clone()];
        runner.run(Commands { commands, stand_ins: Vec::new(), files: Vec::new(), own_network: true })?;
        let context = |e: io::Error| Error::at(&job.file)(e);
        // A link cannot leave the tree, because the tree is this thread's `/`.
        let path = root.join(&job.file);
        fs::symlink_metadata(&path).map_err(context)?;
        if !path.is_file() {
            return fail(format!("{} is not a regular file", job.file));
        }
        let mut out = files.next().map_err(context)?;
        io::copy(&mut File::open(path).map_err(context)?, &mut out).map(drop).map_err(context)
    })
}
