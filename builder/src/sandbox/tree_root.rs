//! The tree that a sandbox's inner process works on.
//!
//! A package's symbolic link may point to any path. The thread that reads and writes the tree therefore has the tree as
//! its `/`. Another thread starts programs of the tree, because it still sees the host's loader (see
//! [`super::chroot`]).

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Sender, channel};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use serde::{Deserialize, Serialize};

use super::chroot::{self, Commands};
use crate::error::{Error, Result, fail};
use crate::util::memory;

/// Mount point of the tree's file system. Every host has this folder, and the sandbox's root can access it.
const MOUNT_POINT: &str = "/tmp";

/// Free memory that remains for the host, in bytes.
const MEMORY_RESERVE: u64 = 512 << 20;

/// Maximum number of files and folders of a tree in memory, ten times the number in the largest image.
const INODES: u32 = 1 << 20;

/// Location and maximum size of a tree.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Room {
    /// Whether the tree is in memory, not on disk.
    pub ram: bool,
    /// Bytes of memory for the tree and for the scripts' files in /tmp and /run.
    pub memory: u64,
}

impl Room {
    /// Returns the room for a tree of this many bytes. The tree is in memory if it fits, including its packages.
    pub fn for_tree(bytes: u64) -> Self {
        let available = memory::available();
        let ram = available > bytes + bytes / 2 + MEMORY_RESERVE;
        Self { ram, memory: available.saturating_sub(MEMORY_RESERVE).max(MEMORY_RESERVE) }
    }

    fn tree_bytes(self) -> u64 {
        self.memory / 4 * 3
    }

    /// Size of /tmp, and of /run, while a script runs, in bytes.
    fn scratch_bytes(self) -> u64 {
        self.memory / if self.ram { 8 } else { 4 }
    }
}

/// Creates an empty tree in this process's mount namespace. A tree on disk is below the current folder, which is the
/// job's folder.
fn mount_tree(room: Room) -> Result<PathBuf> {
    let none = None::<&Path>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .map_err(Error::cannot("make mounts private"))?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    if room.ram {
        let options = format!("mode=0755,size={},nr_inodes={INODES}", room.tree_bytes());
        mount(Some("tmpfs"), MOUNT_POINT, Some("tmpfs"), flags, Some(options.as_str()))
            .map_err(Error::cannot("mount a tmpfs"))?;
    } else {
        mount(Some("."), MOUNT_POINT, none, MsFlags::MS_BIND, none).map_err(Error::cannot("bind the job's folder"))?;
    }
    let root = Path::new(MOUNT_POINT).join("root");
    fs::create_dir(&root).map_err(Error::cannot("create the tree"))?;
    fs::set_permissions(&root, Permissions::from_mode(0o755)).map_err(Error::cannot("create the tree"))?;
    Ok(root)
}

/// Commands to run in the tree, and the channel for their result.
type Request = (Commands, Sender<Result<()>>);

/// Runs commands in the tree, for threads that cannot start programs.
#[derive(Clone, Debug)]
pub struct Runner(Sender<Request>);

impl Runner {
    /// Runs the commands one after the other, up to the first failure.
    ///
    /// # Errors
    /// If a command fails. The error is the command's output.
    pub fn run(&self, commands: Commands) -> Result<()> {
        let (reply, result) = channel();
        let gone =
            || Error::Failed("cannot run a command in the tree: the thread that starts them has ended".to_owned());
        self.0.send((commands, reply)).map_err(|_| gone())?;
        result.recv().map_err(|_| gone())?
    }
}

/// Creates an empty tree, and calls `work` with its root in a thread whose `/` is the tree.
///
/// # Errors
/// If the tree cannot be created or entered, or `work` fails.
pub(crate) fn with_tree<T: Send>(room: Room, work: impl FnOnce(&Path, &Runner) -> Result<T> + Send) -> Result<T> {
    let root = mount_tree(room)?;
    let (requests, inbox) = channel::<Request>();
    let done = std::thread::scope(|scope| {
        let entered = root.as_path();
        let worker = scope.spawn(move || {
            let runner = Runner(requests);
            change_root(entered).and_then(|()| work(Path::new("/"), &runner))
        });
        for (commands, reply) in inbox {
            let root = root.as_path();
            scope.spawn(move || {
                let _ = reply.send(chroot::start(root, commands, room.scratch_bytes()));
            });
        }
        worker.join().unwrap_or_else(|_| fail("the thread that works on the tree panicked"))
    });
    if !room.ram {
        // The files belong to mapped ids, so an ordinary user could not remove them outside the sandbox.
        let _ = fs::remove_dir_all(&root);
    }
    done
}

/// Makes `root` the `/` of this thread and of the threads that it starts.
fn change_root(root: &Path) -> Result<()> {
    let context = |e: std::io::Error| Error::cannot("enter the tree")(e);
    let tree = File::open(root).and_then(|f| f.metadata()).map_err(context)?;
    unshare(CloneFlags::CLONE_FS).map_err(|e| context(e.into()))?;
    nix::unistd::chroot(root).map_err(|e| context(e.into()))?;
    nix::unistd::chdir("/").map_err(|e| context(e.into()))?;
    // The thread removes and writes files below `/`, so `/` must be the tree.
    let now = fs::metadata("/").map_err(context)?;
    if (now.dev(), now.ino()) != (tree.dev(), tree.ino()) {
        return fail("cannot enter the tree: / is another folder");
    }
    Ok(())
}
