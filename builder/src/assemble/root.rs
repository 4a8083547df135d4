//! Creates the root file system: the packages' erofs with the baked files appended. The builder creates the packages'
//! erofs once for each set of packages.

use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::compose::Layer;
use crate::error::{Error, Result};
use crate::format::verity;
use crate::progress::Progress;
use crate::store::{Kind, Store};
use crate::toolchain::Tools;
use crate::util::digest::Key;
use crate::util::process::run;

/// Inputs of a root file system.
pub(crate) struct Erofs<'a> {
    /// The unpacked and configured packages.
    pub layer: &'a Layer,
    /// Programs of the lock, among them mkfs.erofs.
    pub tools: &'a Tools,
    /// Modification time of every file, in seconds since 1970.
    pub epoch: u64,
    /// Keeps the packages' erofs.
    pub store: &'a Store,
    /// Prints the step.
    pub progress: &'a Progress,
}

/// A root file system and its dm-verity data.
pub(crate) struct Root {
    /// File with the file system.
    pub path: PathBuf,
    /// Size in bytes.
    pub size: u64,
    /// The hash tree.
    pub verity: Vec<u8>,
    /// The root hash, in hex.
    pub hash: String,
}

impl Erofs<'_> {
    /// Appends the baked files to a copy of the packages' erofs.
    ///
    /// # Errors
    /// If mkfs.erofs fails, or a file cannot be read or written.
    pub(crate) fn root(&self, baked_tar: &Path, scratch: &Path) -> Result<Root> {
        let base = self.packages()?;
        let path = scratch.join("root.erofs");
        fs::copy(base.join("root.erofs"), &path).map_err(Error::io("copy", &base))?;
        run(self.mkfs().arg("--incremental=data").arg(&path).arg(baked_tar), "mkfs.erofs")?;
        let known = fs::read(base.join("leaves")).map_err(Error::io("read", &base))?;
        let leaves = leaves_of(&path, &base.join("root.erofs"), &known).map_err(Error::io("read", &path))?;
        let (verity, hash) = verity::tree(&leaves);
        let size = (leaves.len() / 32 * verity::BLOCK) as u64;
        Ok(Root { path, size, verity, hash })
    }

    /// Returns the folder of the packages' erofs. Creates it if the store does not have it.
    ///
    /// # Errors
    /// If mkfs.erofs fails, or a file cannot be read or written.
    pub(crate) fn packages(&self) -> Result<PathBuf> {
        let key = Key::new(env!("CODE_EROFS"))
            .add("layer", &self.layer.key)
            .add("tools", &self.tools.key)
            .add("options", format!("{:?}", self.mkfs().get_args().skip(3).collect::<Vec<_>>()))
            .finish();
        let _guard = self.store.lock(Kind::Erofs, &key)?;
        if let Some(dir) = self.store.get(Kind::Erofs, &key) {
            return Ok(dir);
        }
        let step = self.progress.step("erofs", "compressing the packages");
        let dir = self.store.scratch(Kind::Erofs, &key);
        fs::create_dir_all(&dir).map_err(Error::io("create", &dir))?;
        let path = dir.join("root.erofs");
        run(self.mkfs().arg(&path).arg(self.layer.tar()), "mkfs.erofs")?;
        let data = fs::read(&path).map_err(Error::io("read", &path))?;
        fs::write(dir.join("leaves"), verity::leaves(&data)).map_err(Error::io("write", &dir))?;
        let put = self.store.put(Kind::Erofs, &key, &dir)?;
        step.done(&format!("{:.1} MB", data.len() as f64 / 1e6));
        Ok(put)
    }

    /// lz4 compresses and decompresses fastest. Appending needs the same options as creating.
    fn mkfs(&self) -> Command {
        let mut command = self.tools.command("usr/bin/mkfs.erofs");
        command.args([
            "--quiet",
            "-zlz4",
            "-C65536",
            "--all-time",
            "-Uba4e4005-e000-4000-8000-00000000e0f5",
            "--tar=f",
        ]);
        command.arg(format!("-T{}", self.epoch));
        command
    }
}

/// Returns the verity leaves of a file. Reuses the `known` leaves of blocks that are the same in `base`.
fn leaves_of(path: &Path, base: &Path, known: &[u8]) -> std::io::Result<Vec<u8>> {
    const CHUNK: usize = 4 << 20;
    let (mut file, mut base) = (File::open(path)?, File::open(base)?);
    let (mut data, mut old) = (Vec::new(), Vec::new());
    let mut leaves = Vec::new();
    loop {
        data.clear();
        old.clear();
        file.by_ref().take(CHUNK as u64).read_to_end(&mut data)?;
        base.by_ref().take(CHUNK as u64).read_to_end(&mut old)?;
        if data.is_empty() {
            return Ok(leaves);
        }
        let from = leaves.len().min(known.len());
        leaves.extend(verity::leaves_from(&data, &old, &known[from..]));
    }
}
