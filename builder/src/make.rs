//! Files that a program of the image itself makes when the image is built: what would take long on
//! a node, and is the same on every one. Each is made once, and kept in the store.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::bake::Baked;
use crate::compose::{ImageTree, Layer, Work, in_root_with};
use crate::digest::Key;
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::project::Recipe;
use crate::sandbox;
use crate::store::{Kind, Store, write_atomic};

/// What the sandbox is to make.
#[derive(Debug, Serialize, Deserialize)]
pub struct Job {
    tree: ImageTree,
    command: Vec<String>,
    /// Where it is in the tree then, and where it is to go.
    file: String,
    out: PathBuf,
}

/// A file that was made.
pub struct Made {
    pub overlay: String,
    pub path: String,
    pub bytes: Vec<u8>,
}

/// Makes every file that the image's overlays want made.
///
/// # Errors
/// A program fails: its words.
pub fn make(
    recipe: &Recipe,
    layer: &Layer,
    baked: &Baked,
    baked_tar: &Path,
    store: &Store,
    progress: &Progress,
) -> Result<Vec<Made>> {
    let mut all = Vec::new();
    for wanted in &baked.makes {
        let mut key = Key::new("make-1");
        key.add("layer", &layer.key).add("file", &wanted.make.file);
        for word in &wanted.make.command {
            key.add("word", word);
        }
        baked.add_to(&mut key, &wanted.make.of);
        let key = key.finish();
        // Groups with the same packages wait for the first to make it.
        let _guard = store.lock(Kind::Made, &key)?;
        let path = store.path(Kind::Made, &key);
        if store.get(Kind::Made, &key).is_none() {
            let step = progress.step("make", &format!("{}: {}", recipe.group, wanted.make.file));
            let work = store.scratch(Kind::Made, &key);
            fs::create_dir_all(&work).map_err(Error::io("create", &work))?;
            let out = work.with_extension("file");
            let job = Job {
                tree: ImageTree::of(&work, layer, baked_tar)?,
                command: wanted.make.command.clone(),
                file: wanted.make.file.clone(),
                out: out.clone(),
            };
            let made: Result<()> = sandbox::run(&Work::Make(job));
            let _ = fs::remove_dir_all(&work);
            let bytes = made.and_then(|()| fs::read(&out).map_err(Error::io("read", &out)));
            let _ = fs::remove_file(&out);
            let words = |e| Error::Failed(format!("overlays/{}: /{}: {e}", wanted.overlay, wanted.make.file));
            let bytes = bytes.map_err(words)?;
            write_atomic(&path, &bytes)?;
            step.done(&format!("{}: {} ({:.1} MB)", recipe.group, wanted.make.file, bytes.len() as f64 / 1e6));
        }
        let bytes = fs::read(&path).map_err(Error::io("read", &path))?;
        all.push(Made { overlay: wanted.overlay.clone(), path: wanted.make.file.clone(), bytes });
    }
    Ok(all)
}

/// The sandbox's part.
pub fn work(job: &Job) -> Result<(), String> {
    job.tree.with(|root| {
        in_root_with(root, vec![job.command.clone()], Vec::new())?;
        // A link that leads out of the tree would bring a file of this machine into the image.
        let told = |e| format!("{}: {e}", job.file);
        let made = root.join(&job.file).canonicalize().map_err(told)?;
        if !made.starts_with(root.canonicalize().map_err(told)?) || !made.is_file() {
            return Err(format!("{} is no file of the image", job.file));
        }
        fs::copy(made, &job.out).map(drop).map_err(told)
    })?
}
