//! The tree that a sandbox's inner process works on, and how the host is kept out of reach of it.
//!
//! What lies in a tree is a package's: a symbolic link of one may lead anywhere. So the thread
//! that reads and writes the tree has the tree as its `/`. Programs of the tree are started by
//! another thread, which still sees the host's loader (see [`super::chroot`]).

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Sender, channel};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use serde::{Deserialize, Serialize};

use super::chroot::{self, Commands};
use crate::util::memory;

/// Where the tree's file system is mounted: a folder that every host has and the sandbox's root
/// can reach.
const MOUNT_POINT: &str = "/tmp";

/// What the host keeps of its free memory, in bytes.
const MEMORY_RESERVE: u64 = 512 << 20;

/// Files and folders of a tree in memory; the largest image has a tenth of them.
const INODES: u32 = 1 << 20;

/// Where a tree is, and how large it may become.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Room {
    /// In memory, not on disk.
    pub ram: bool,
    /// Bytes of memory for the tree and for what scripts have in /tmp and /run.
    pub memory: u64,
}

impl Room {
    /// For a tree of this many bytes: in memory, if it and the compressed files beside it fit.
    pub fn for_tree(bytes: u64) -> Self {
        let available = memory::available();
        let ram = available > bytes + bytes / 2 + MEMORY_RESERVE;
        Self { ram, memory: available.saturating_sub(MEMORY_RESERVE).max(MEMORY_RESERVE) }
    }

    fn tree_bytes(self) -> u64 {
        self.memory / 4 * 3
    }

    /// Bytes of /tmp, and of /run, while a script runs.
    fn scratch_bytes(self) -> u64 {
        self.memory / if self.ram { 8 } else { 4 }
    }
}

/// Makes an empty tree, in this process's mounts only. The current folder is the job's own, for a
/// tree on disk.
fn mount_tree(room: Room) -> Result<PathBuf, String> {
    let none = None::<&Path>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .map_err(|e| format!("cannot make mounts private: {e}"))?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    if room.ram {
        let options = format!("mode=0755,size={},nr_inodes={INODES}", room.tree_bytes());
        mount(Some("tmpfs"), MOUNT_POINT, Some("tmpfs"), flags, Some(options.as_str()))
            .map_err(|e| format!("cannot mount a tmpfs: {e}"))?;
    } else {
        mount(Some("."), MOUNT_POINT, none, MsFlags::MS_BIND, none)
            .map_err(|e| format!("cannot bind the job's folder: {e}"))?;
    }
    let root = Path::new(MOUNT_POINT).join("root");
    fs::create_dir(&root).map_err(|e| format!("cannot create the tree: {e}"))?;
    fs::set_permissions(&root, Permissions::from_mode(0o755)).map_err(|e| format!("cannot create the tree: {e}"))?;
    Ok(root)
}

/// A command to run in the tree, and where its result goes.
type Request = (Commands, Sender<Result<(), String>>);

/// Runs commands in the tree, for threads that cannot start programs themselves.
#[derive(Clone, Debug)]
pub struct Runner(Sender<Request>);

impl Runner {
    /// Runs the commands one after the other, up to the first that fails.
    ///
    /// # Errors
    /// What the command that failed wrote.
    pub fn run(&self, commands: Commands) -> Result<(), String> {
        let (reply, result) = channel();
        let gone = || "cannot run a command in the tree: the thread that starts them has ended".to_owned();
        self.0.send((commands, reply)).map_err(|_| gone())?;
        result.recv().map_err(|_| gone())?
    }
}

/// Makes an empty tree and calls `work` with its root, in a thread whose `/` is the tree.
///
/// # Errors
/// The tree cannot be made or entered, or `work`'s own.
pub fn with_tree<T: Send>(
    room: Room,
    work: impl FnOnce(&Path, &Runner) -> Result<T, String> + Send,
) -> Result<T, String> {
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
        worker.join().unwrap_or_else(|_| Err("the thread that works on the tree panicked".to_owned()))
    });
    if !room.ram {
        // The files belong to mapped ids: from outside an ordinary user could not remove them.
        let _ = fs::remove_dir_all(&root);
    }
    done
}

/// Makes `root` the `/` of this thread and of those that it starts.
fn change_root(root: &Path) -> Result<(), String> {
    let told = |e: std::io::Error| format!("cannot enter the tree: {e}");
    let tree = File::open(root).and_then(|f| f.metadata()).map_err(told)?;
    unshare(CloneFlags::CLONE_FS).map_err(|e| told(e.into()))?;
    nix::unistd::chroot(root).map_err(|e| told(e.into()))?;
    nix::unistd::chdir("/").map_err(|e| told(e.into()))?;
    // Everything after this removes and writes below `/`: it has to be the tree.
    let now = fs::metadata("/").map_err(told)?;
    if (now.dev(), now.ino()) != (tree.dev(), tree.ino()) {
        return Err("cannot enter the tree: / is another folder".to_owned());
    }
    Ok(())
}
