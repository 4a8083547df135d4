//! Where maintainer scripts run: a process of our own in fresh user, mount, pid, network,
//! IPC and UTS namespaces.
//!
//! The builder starts itself as a *worker*. The worker leaves the host's user namespace and
//! waits; the builder, from outside, maps ids 0..65535 into it (a range of their own when it is
//! root, with `newuidmap` when it is not); the worker then enters the other namespaces and starts
//! the *inner* process as their pid 1. All of it dies with the builder.
//!
//! Without user namespaces there is no sandbox: a build is refused, as root too. A sandbox whose
//! root is the host's own would hold by capabilities and read-only mounts alone, on the very hosts
//! where no other build tests it.

pub mod chroot;
mod files;
mod ids;
pub mod tree_root;

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::chown;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill};
use nix::sys::statvfs::statvfs;
use nix::unistd::{Gid, Pid, Uid};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities, set_keep_capabilities};
use serde::Serialize;
use serde::de::DeserializeOwned;

pub use chroot::{IN_ROOT, enter};
pub use files::{Files, HostFile};
use ids::IdMap;
pub use tree_root::Room;

use crate::error::{Error, Result, fail};

/// First argument that makes the binary a worker, or the worker's inner process.
pub const WORKER: &str = "__worker";
pub const INNER: &str = "__inner";

/// Processes and threads that one sandbox may have.
const PROCESSES: u64 = 4096;

/// What the sandbox's errors keep of standard error, in bytes.
const ERRORS: u64 = 1 << 20;

/// What a job may take of the host.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Time for the whole job.
    pub deadline: Duration,
    /// Bytes that stay free on the disk with the job's folder.
    pub disk_reserve: u64,
}

impl Limits {
    /// Limits for a job in this folder: an hour, and the disk keeps 1 GiB or a quarter of what is
    /// free now.
    #[must_use]
    pub fn for_folder(work: &Path) -> Self {
        let free = free_bytes(work).unwrap_or(u64::MAX);
        Self { deadline: Duration::from_secs(3600), disk_reserve: (1 << 30).min(free / 4) }
    }
}

/// Runs a task in a sandbox and returns its answer: `worker.rs` knows tasks by their names. `work` is an empty folder
/// for the job alone; the job gets `files` open, in their order.
///
/// # Errors
/// The kernel allows no user namespaces, a file cannot be opened, the job failed (what it wrote to
/// its standard error), or it exceeded a limit.
pub fn run<J: Serialize, A: DeserializeOwned>(
    task: &str,
    job: &J,
    files: &[HostFile],
    work: &Path,
    limits: &Limits,
) -> Result<A> {
    let text = serde_json::to_vec(&(task, job)).map_err(|e| Error::Failed(e.to_string()))?;
    let (child, socket) = start(work)?;
    let pid = Pid::from_raw(child.id().cast_signed());
    let (stop, stopped) = channel::<()>();
    std::thread::scope(|scope| {
        let sender = scope.spawn(move || files::send(&socket, &text, files));
        let watch = scope.spawn(move || watch(pid, &stopped, work, limits));
        let finished = finish(child, stop);
        // Its own errors come first: they are the cause.
        sender.join().unwrap_or_else(|_| fail("the sandbox's sender panicked"))?;
        if let Some(exceeded) = watch.join().ok().flatten() {
            return fail(exceeded);
        }
        let answer = finished?;
        serde_json::from_str(&answer).map_err(|e| Error::Failed(format!("cannot read the sandbox's answer: {e}")))
    })
}

/// Starts the worker and maps its ids; it then waits for its job.
fn start(work: &Path) -> Result<(Child, UnixStream)> {
    let ids = IdMap::choose()?;
    if let IdMap::Range { uid, gid } = ids {
        chown(work, Some(uid), Some(gid)).map_err(Error::io("change the owner of", work))?;
    }
    let (socket, theirs) = UnixStream::pair().map_err(Error::io("connect", "the sandbox"))?;
    let exe = std::env::current_exe().map_err(Error::io("find", "bakehouse's own program"))?;
    let mut child = Command::new(&exe)
        .arg(WORKER)
        .arg(ids.argument())
        .current_dir(work)
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(Error::io("start", &exe))?;
    let mut word = [0; 1];
    let ready = child.stdout.as_mut().is_some_and(|out| out.read_exact(&mut word).is_ok());
    if !ready || word[0] == b'N' {
        let _ = child.wait();
        return fail(
            "this kernel allows no user namespaces, and without them a package's scripts could reach the host; set \
             kernel.unprivileged_userns_clone=1 and user.max_user_namespaces above 0, also where bakehouse runs as root",
        );
    }
    let mapped = ids.write(child.id()).and_then(|()| {
        let mut socket = &socket;
        socket.write_all(b"m").map_err(Error::io("write to", "the sandbox"))
    });
    if let Err(e) = mapped {
        let _ = child.kill();
        let _ = child.wait();
        return Err(e);
    }
    Ok((child, socket))
}

/// Reads the answer, up to the end of the worker.
fn finish(mut child: Child, stop: std::sync::mpsc::Sender<()>) -> Result<String> {
    let errors = child.stderr.take();
    let reader = std::thread::spawn(move || {
        let mut text = Vec::new();
        if let Some(mut pipe) = errors {
            let _ = pipe.by_ref().take(ERRORS).read_to_end(&mut text);
            let _ = std::io::copy(&mut pipe, &mut std::io::sink());
        }
        String::from_utf8_lossy(&text).into_owned()
    });
    let mut answer = String::new();
    if let Some(out) = child.stdout.take() {
        for line in BufReader::new(out).lines().map_while(Result::ok) {
            answer = line;
        }
    }
    // The worker is not waited for yet: its pid cannot be another process's while it is watched.
    drop(stop);
    let status = child.wait().map_err(Error::io("wait for", "the sandbox"))?;
    let errors = reader.join().unwrap_or_default();
    if !status.success() {
        let how = status.signal().map(|s| format!(" (killed by signal {s})")).unwrap_or_default();
        return fail(format!("{}{how}", errors.trim_end()));
    }
    Ok(answer)
}

/// Ends the worker, and with it the sandbox, when it exceeds a limit. Returns which.
fn watch(worker: Pid, stopped: &Receiver<()>, work: &Path, limits: &Limits) -> Option<String> {
    let start = Instant::now();
    loop {
        match stopped.recv_timeout(Duration::from_millis(100)) {
            Err(RecvTimeoutError::Timeout) => {}
            _ => return None,
        }
        let exceeded = if start.elapsed() > limits.deadline {
            format!(
                "the sandbox was ended after {} s: a package's script, or a program of the image, does not end",
                limits.deadline.as_secs()
            )
        } else if free_bytes(work).is_some_and(|free| free < limits.disk_reserve) {
            format!(
                "the sandbox was ended because less than {} MB are free at {}: free some space, or find the package \
                 whose script fills the disk",
                limits.disk_reserve / 1_000_000,
                work.display()
            )
        } else {
            continue;
        };
        let _ = kill(worker, Signal::SIGKILL);
        return Some(exceeded);
    }
}

fn free_bytes(path: &Path) -> Option<u64> {
    statvfs(path).ok().map(|fs| fs.blocks_available() * fs.fragment_size())
}

/// The worker's life, up to the inner process's end. Returns its exit code.
pub fn worker(ids: Option<&OsStr>) -> u8 {
    let _ = set_pdeathsig(Signal::SIGKILL);
    match work(ids.and_then(OsStr::to_str).and_then(IdMap::from_argument)) {
        Ok(code) => code,
        Err(e) => {
            eprintln!("{e}");
            1
        }
    }
}

fn work(ids: Option<IdMap>) -> Result<u8, String> {
    let ids = ids.ok_or("the sandbox got no ids")?;
    let step = |what: &str, e: std::io::Error| format!("the sandbox cannot {what}: {e}");
    // If memory runs out, the kernel ends the sandbox before the host's own processes.
    let _ = fs::write("/proc/self/oom_score_adj", "1000");
    limit_processes(ids).map_err(|e| step("limit its processes", e))?;
    if let IdMap::Range { uid, gid } = ids {
        take_ids(uid, gid).map_err(|e| step("take its ids", e))?;
    }
    let say = |word: &[u8]| {
        let mut out = std::io::stdout();
        let _ = out.write_all(word).and_then(|()| out.flush());
    };
    if unshare(CloneFlags::CLONE_NEWUSER).is_err() {
        say(b"N");
        return Ok(1);
    }
    say(b"Y");
    // One byte says that the ids are mapped; what follows is the inner process's.
    let mut socket =
        UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned().map_err(|e| step("reach the builder", e))?);
    socket.read_exact(&mut [0; 1]).map_err(|e| step("reach the builder", e))?;
    nix::unistd::setgroups(&[])
        .and_then(|()| nix::unistd::setgid(Gid::from_raw(0)))
        .and_then(|()| nix::unistd::setuid(Uid::from_raw(0)))
        .map_err(|e| step("become its root", e.into()))?;
    // Changing ids forgets the wish to die with the parent.
    let _ = set_pdeathsig(Signal::SIGKILL);
    let flags = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS;
    unshare(flags)
        .and_then(|()| nix::unistd::sethostname("localhost"))
        .map_err(|e| format!("the kernel allows no namespaces: {e}"))?;
    // This namespace's own setting: a script gets no user namespace in which it has the capabilities
    // again that it lost. Scripts without them cannot do harm by it, so an old kernel may refuse.
    let _ = fs::write("/proc/sys/user/max_user_namespaces", "0");
    let mut inner = Command::new("/proc/self/exe").arg(INNER).spawn().map_err(|e| {
        format!("the sandbox cannot start: {e}; everybody must be able to execute bakehouse (chmod 755)")
    })?;
    let status = inner.wait().map_err(|e| step("wait for its inner process", e))?;
    if let Some(signal) = status.signal() {
        return Err(format!("the sandbox was killed by signal {signal}"));
    }
    Ok(u8::from(!status.success()))
}

/// Limits processes and threads. The kernel counts by user, and takes the limit that a process has
/// when it makes a user namespace for that namespace's total.
fn limit_processes(ids: IdMap) -> std::io::Result<()> {
    let already = match ids {
        IdMap::Own => tasks_of(Uid::current()),
        IdMap::Range { .. } => 0,
    };
    let hard = getrlimit(Resource::Nproc).maximum.unwrap_or(u64::MAX);
    let limit = Some((PROCESSES + already).min(hard));
    Ok(setrlimit(Resource::Nproc, Rlimit { current: limit, maximum: limit })?)
}

/// Threads of all processes of a user.
fn tasks_of(user: Uid) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    let Ok(processes) = fs::read_dir("/proc") else { return 0 };
    processes
        .flatten()
        .filter(|p| p.file_name().to_string_lossy().bytes().all(|b| b.is_ascii_digit()))
        .filter(|p| p.metadata().is_ok_and(|m| m.uid() == user.as_raw()))
        .filter_map(|p| fs::read_to_string(p.path().join("status")).ok())
        .filter_map(|status| status.lines().find_map(|l| l.strip_prefix("Threads:")?.trim().parse::<u64>().ok()))
        .sum()
}

/// Changes to the first user of the subordinate range before the user namespace is created: that user then owns
/// the namespace, and its processes count against that user's limit. `CAP_SYS_ADMIN` stays until `unshare`, for
/// kernels that let ordinary users create no namespaces.
fn take_ids(uid: u32, gid: u32) -> std::io::Result<()> {
    if uid == 0 {
        // The ids of a container, whose 0 is not the host's.
        return Ok(());
    }
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    set_keep_capabilities(true)?;
    nix::unistd::setgroups(&[])?;
    nix::unistd::setresgid(gid, gid, gid)?;
    nix::unistd::setresuid(uid, uid, uid)?;
    let kept = CapabilitySet::SYS_ADMIN;
    set_capabilities(None, CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() })?;
    let _ = set_pdeathsig(Signal::SIGKILL);
    Ok(())
}

/// The sandbox's inner process, pid 1 of its namespace: reads a task's name, its job and its files from standard input,
/// and writes what `work` returns to standard output. Returns the exit code.
pub fn inner(work: impl FnOnce(&str, serde_json::Value, &Files) -> Result<String, String>) -> u8 {
    let _ = set_pdeathsig(Signal::SIGKILL);
    // The tree's modes must not depend on who builds.
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    let done = Files::receive::<(String, serde_json::Value)>()
        .map_err(|e| format!("cannot read the job: {e}"))
        .and_then(|((task, job), files)| work(&task, job, &files));
    match done {
        Ok(answer) => u8::from(writeln!(std::io::stdout(), "{answer}").is_err()),
        Err(e) => {
            eprintln!("{e}");
            1
        }
    }
}
