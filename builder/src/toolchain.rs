//! Tools of the build, such as mkfs.erofs and openssl. The builder unpacks the locked packages into the store, and runs
//! the tools with their own loader and libraries. The host's versions do not matter, and nothing is installed.

use std::fs::{self, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::{Error, Result};
use crate::format::deb::{Deb, data_entries};
use crate::packages::lock::Lock;
use crate::packages::requests::TOOLS;
use crate::progress::Progress;
use crate::store::{Kind, Store};
use crate::util::digest::Key;

/// The unpacked tools.
pub(crate) struct Tools {
    /// Key in the store: a digest of the tools' packages and of the code.
    pub key: String,
    dir: PathBuf,
}

impl Tools {
    fn key_of(lock: &Lock) -> String {
        let mut key = Key::new(env!("CODE_TOOLS"));
        for package in lock.packages_of(TOOLS, false) {
            key.add("deb", &package.sha256);
        }
        key.finish()
    }

    /// Unpacks the tools, unless the store has them.
    ///
    /// # Errors
    /// If a package cannot be unpacked.
    pub(crate) fn prepare(lock: &Lock, store: &Store, progress: &Progress) -> Result<Self> {
        let key = Self::key_of(lock);
        let _guard = store.lock(Kind::Tools, &key)?;
        if let Some(dir) = store.get(Kind::Tools, &key) {
            return Ok(Self { key, dir });
        }
        let step = progress.step("tools", "unpacking");
        let scratch = store.scratch(Kind::Tools, &key);
        let _ = fs::remove_dir_all(&scratch);
        for package in lock.packages_of(TOOLS, false) {
            let deb = Deb::open(&store.path(Kind::Deb, &package.sha256), &package.sha256)?;
            unpack(&deb, &scratch).map_err(Error::at(&package.name))?;
        }
        let dir = store.put(Kind::Tools, &key, &scratch)?;
        step.done("unpacked");
        Ok(Self { key, dir })
    }

    /// Returns the path of a file of the tools.
    #[must_use]
    pub(crate) fn file(&self, path: &str) -> PathBuf {
        self.dir.join(path)
    }

    /// Returns a command that runs a program of the tools (`usr/bin/x`).
    #[must_use]
    pub(crate) fn command(&self, program: &str) -> Command {
        let libraries = self.dir.join("usr/lib/x86_64-linux-gnu");
        let mut command = Command::new(libraries.join("ld-linux-x86-64.so.2"));
        command
            .arg("--library-path")
            .arg(format!("{0}:{0}/systemd", libraries.display()))
            .arg(self.dir.join(program))
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("LC_ALL", "C.UTF-8")
            .env("TZ", "UTC")
            .env("GCONV_PATH", libraries.join("gconv"));
        command
    }
}

/// Unpacks programs, libraries and their data. Documentation and owners are left out.
fn unpack(deb: &Deb, root: &Path) -> Result<()> {
    data_entries(deb, |path, entry| {
        let path = path.strip_prefix("/lib64/").map_or_else(|| path.to_owned(), |rest| format!("/usr/lib64/{rest}"));
        let wanted = ["/usr/bin/", "/usr/sbin/", "/usr/lib/", "/usr/lib64/"];
        let kind = entry.header().entry_type();
        if kind.is_dir() || !wanted.iter().any(|w| path.starts_with(w)) {
            return Ok(());
        }
        let full = root.join(&path[1..]);
        let context = |e: io::Error| Error::at(&path)(e);
        if let Some(parent) = full.parent() {
            fs::create_dir_all(parent).map_err(context)?;
        }
        let target = entry.link_name().map_err(context)?.map(std::borrow::Cow::into_owned);
        match target {
            Some(target) if kind.is_symlink() => symlink(target, &full).map_err(context),
            Some(target) => {
                fs::hard_link(root.join(target.strip_prefix("./").unwrap_or(&target)), &full).map_err(context)
            }
            None => {
                let mode = entry.header().mode().map_err(context)?;
                let mut file =
                    OpenOptions::new().write(true).create_new(true).mode(0o600).open(&full).map_err(context)?;
                io::copy(entry, &mut file).map_err(context)?;
                file.set_permissions(Permissions::from_mode(mode & 0o755)).map_err(context)
            }
        }
    })
}
