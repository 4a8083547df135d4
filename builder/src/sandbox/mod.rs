//! Runs maintainer scripts in new user, mount, pid, network, IPC and UTS namespaces.
//!
//! The builder starts its own binary as a *worker*. The worker creates a user namespace and waits. The builder maps the
//! ids 0..65535 of that namespace: as root to a separate range, otherwise with `newuidmap`. The worker then creates the
//! other namespaces and starts the *inner* process as their pid 1. The kernel kills these processes with the builder.
//!
//! Without user namespaces, the builder refuses to build, also as root. A sandbox with the host's root would depend on
//! capabilities and read-only mounts alone.

pub(crate) mod chroot;
mod files;
mod ids;
pub(crate) mod tree_root;

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

/// First argument of the worker.
pub const WORKER: &str = "__worker";
/// First argument of the worker's inner process.
pub const INNER: &str = "__inner";

/// Start of a line on the worker's standard output that reports progress. The last other line is the result.
const PROGRESS: &str = "progress ";

/// Maximum number of processes and threads of a sandbox.
const PROCESSES: u64 = 4096;

/// Maximum size of an error from the sandbox's standard error, in bytes.
const ERRORS: u64 = 1 << 20;

/// Resource limits of a job.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Maximum duration of the job.
    pub deadline: Duration,
    /// Bytes that remain free on the disk with the job's folder.
    pub disk_reserve: u64,
}

impl Limits {
    /// Returns the limits of a job in this folder: 1 h, and 1 GiB of free disk space, or a quarter of the space that is
    /// free now if that is less.
    #[must_use]
    pub fn for_folder(work: &Path) -> Self {
        let free = free_bytes(work).unwrap_or(u64::MAX);
        Self { deadline: Duration::from_secs(3600), disk_reserve: (1 << 30).min(free / 4) }
    }
}

/// Checks that this user can have the ids of a sandbox.
///
/// # Errors
/// If /etc/subuid or /etc/subgid has no range for the user, or `newuidmap` is missing. The error has the fix.
pub fn check_ids() -> Result<()> {
    IdMap::choose()?.check()
}

/// Runs a task in a sandbox, and returns its result. `worker.rs` lists the tasks by name. `work` is an empty folder for
/// the job alone. The job receives `files` as open files, in this order.
///
/// # Errors
/// If the kernel allows no user namespaces, a file cannot be opened, the job fails (the error is its standard error),
/// or the job exceeds a limit.
pub fn run<J: Serialize, A: DeserializeOwned>(
    task: &str,
    job: &J,
    files: &[HostFile],
    work: &Path,
    limits: &Limits,
) -> Result<A> {
    run_with_progress(task, job, files, work, limits, &mut |_| {})
}

/// Runs a task as [`run`] does, and calls `progress` with each text that the task passes to [`report`].
///
/// # Errors
/// As [`run`].
pub fn run_with_progress<J: Serialize, A: DeserializeOwned>(
    task: &str,
    job: &J,
    files: &[HostFile],
    work: &Path,
    limits: &Limits,
    progress: &mut dyn FnMut(&str),
) -> Result<A> {
    let text = serde_json::to_vec(&(task, job)).map_err(Error::Json)?;
    let (child, socket) = start(work)?;
    let pid = Pid::from_raw(child.id().cast_signed());
    let (stop, stopped) = channel::<()>();
    std::thread::scope(|scope| {
        let sender = scope.spawn(move || files::send(&socket, &text, files));
        let watch = scope.spawn(move || watch(pid, &stopped, work, limits));
        let finished = finish(child, stop, progress);
        // An error of the sender is the cause of the job's error.
        sender.join().unwrap_or_else(|_| fail("the sandbox's sender panicked"))?;
        if let Some(exceeded) = watch.join().ok().flatten() {
            return Err(Error::Sandbox(exceeded));
        }
        let result = finished?;
        serde_json::from_str(&result).map_err(Error::cannot("read the sandbox's result"))
    })
}

/// Starts the worker, and maps its ids. The worker then waits for its job.
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
    let mut reply = [0; 1];
    let ready = child.stdout.as_mut().is_some_and(|out| out.read_exact(&mut reply).is_ok());
    if !ready || reply[0] == b'N' {
        let _ = child.wait();
        return fail(
            "this kernel allows no user namespaces, and without them a package's scripts could reach the host; set \
             kernel.unprivileged_userns_clone=1 and user.max_user_namespaces above 0, also if bakehouse runs as root",
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

/// Reads the job's progress and result, and waits until the worker ends.
fn finish(mut child: Child, stop: std::sync::mpsc::Sender<()>, progress: &mut dyn FnMut(&str)) -> Result<String> {
    let errors = child.stderr.take();
    let reader = std::thread::spawn(move || {
        let mut text = Vec::new();
        if let Some(mut pipe) = errors {
            let _ = pipe.by_ref().take(ERRORS).read_to_end(&mut text);
            let _ = std::io::copy(&mut pipe, &mut std::io::sink());
        }
        String::from_utf8_lossy(&text).into_owned()
    });
    let mut result = String::new();
    if let Some(out) = child.stdout.take() {
        for line in BufReader::new(out).lines().map_while(Result::ok) {
            match line.strip_prefix(PROGRESS) {
                Some(text) => progress(text),
                None => result = line,
            }
        }
    }
    // The watching thread must end before `wait`: until then the pid cannot belong to another process.
    drop(stop);
    let status = child.wait().map_err(Error::io("wait for", "the sandbox"))?;
    let errors = reader.join().unwrap_or_default();
    if !status.success() {
        let how = status.signal().map(|s| format!(" (killed by signal {s})")).unwrap_or_default();
        return Err(Error::Sandbox(format!("{}{how}", errors.trim_end())));
    }
    Ok(result)
}

/// Kills the worker, and with it the sandbox, if it exceeds a limit. Returns a message about that limit.
fn watch(worker: Pid, stopped: &Receiver<()>, work: &Path, limits: &Limits) -> Option<String> {
    let start = Instant::now();
    loop {
        match stopped.recv_timeout(Duration::from_millis(100)) {
            Err(RecvTimeoutError::Timeout) => {}
            _ => return None,
        }
        let exceeded = if start.elapsed() > limits.deadline {
            format!(
                "the sandbox was ended after {} s, because a package's script or a program of the image does not end",
                limits.deadline.as_secs()
            )
        } else if free_bytes(work).is_some_and(|free| free < limits.disk_reserve) {
            format!(
                "the sandbox was ended because less than {} MB are free at {}; free some space, or find the package \
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

/// Runs the worker until the inner process ends. Returns the exit code.
pub fn worker(ids: Option<&OsStr>) -> u8 {
    let _ = set_pdeathsig(Signal::SIGKILL);
    match work(ids.and_then(OsStr::to_str).and_then(IdMap::from_argument)) {
        Ok(code) => code,
        Err(e) => {
            eprintln!("{}", e.chain());
            1
        }
    }
}

fn work(ids: Option<IdMap>) -> Result<u8> {
    let ids = ids.ok_or_else(|| Error::Failed("the sandbox got no ids".to_owned()))?;
    let step = |what: &str, e: std::io::Error| Error::at(format!("the sandbox cannot {what}"))(e);
    // If memory runs out, the kernel ends the sandbox before the host's own processes.
    let _ = fs::write("/proc/self/oom_score_adj", "1000");
    limit_processes(ids).map_err(|e| step("limit its processes", e))?;
    if let IdMap::Range { uid, gid } = ids {
        take_ids(uid, gid).map_err(|e| step("take its ids", e))?;
    }
    let report = |reply: &[u8]| {
        let mut out = std::io::stdout();
        let _ = out.write_all(reply).and_then(|()| out.flush());
    };
    if unshare(CloneFlags::CLONE_NEWUSER).is_err() {
        report(b"N");
        return Ok(1);
    }
    report(b"Y");
    // The builder sends one byte when it has mapped the ids. The inner process reads everything after that byte.
    let mut socket =
        UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned().map_err(|e| step("reach the builder", e))?);
    socket.read_exact(&mut [0; 1]).map_err(|e| step("reach the builder", e))?;
    nix::unistd::setgroups(&[])
        .and_then(|()| nix::unistd::setgid(Gid::from_raw(0)))
        .and_then(|()| nix::unistd::setuid(Uid::from_raw(0)))
        .map_err(|e| step("become its root", e.into()))?;
    // The kernel clears PDEATHSIG when a process changes its ids.
    let _ = set_pdeathsig(Signal::SIGKILL);
    let flags = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS;
    unshare(flags)
        .and_then(|()| nix::unistd::sethostname("localhost"))
        .map_err(Error::at("the kernel allows no namespaces"))?;
    // A script must not create a user namespace, in which it would regain capabilities. This is a second barrier, so an
    // error on an old kernel is ignored.
    let _ = fs::write("/proc/sys/user/max_user_namespaces", "0");
    let mut inner = Command::new("/proc/self/exe")
        .arg(INNER)
        .spawn()
        .map_err(Error::at("the sandbox cannot start\n  help: make bakehouse executable for all users (chmod 755)"))?;
    let status = inner.wait().map_err(|e| step("wait for its inner process", e))?;
    if let Some(signal) = status.signal() {
        return fail(format!("the sandbox was killed by signal {signal}"));
    }
    Ok(u8::from(!status.success()))
}

/// Limits processes and threads. The kernel counts them by user. The limit of the process that creates a user namespace
/// applies to the whole namespace.
fn limit_processes(ids: IdMap) -> std::io::Result<()> {
    let existing = match ids {
        IdMap::Own => tasks_of(Uid::current()),
        IdMap::Range { .. } => 0,
    };
    let hard = getrlimit(Resource::Nproc).maximum.unwrap_or(u64::MAX);
    let limit = Some((PROCESSES + existing).min(hard));
    Ok(setrlimit(Resource::Nproc, Rlimit { current: limit, maximum: limit })?)
}

/// Returns the number of threads of all processes of a user.
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

/// Changes to the first user of the subordinate range. That user then owns the user namespace, and the namespace's
/// processes count towards that user's limit. The process keeps `CAP_SYS_ADMIN` until `unshare`, for kernels on which
/// ordinary users cannot create namespaces.
fn take_ids(uid: u32, gid: u32) -> std::io::Result<()> {
    if uid == 0 {
        // The container's own ids. The container's 0 is not the host's 0.
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

/// Reports the progress of the task to the builder. Call it in the sandbox's inner process.
pub fn report(text: &str) {
    // If the builder is gone, the kernel ends this process.
    let _ = writeln!(std::io::stdout(), "{PROGRESS}{text}");
}

/// Runs the sandbox's inner process, pid 1 of its namespace. Reads a task's name, its job and its files from standard
/// input, and writes the result of `work` to standard output. Returns the exit code.
pub fn inner(work: impl FnOnce(&str, serde_json::Value, &Files) -> Result<String>) -> u8 {
    let _ = set_pdeathsig(Signal::SIGKILL);
    // The modes of the tree must not depend on the user's umask.
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    let result = Files::receive::<(String, serde_json::Value)>()
        .map_err(Error::cannot("read the job"))
        .and_then(|((task, job), files)| work(&task, job, &files));
    match result {
        Ok(result) => u8::from(writeln!(std::io::stdout(), "{result}").is_err()),
        Err(e) => {
            eprintln!("{}", e.chain());
            1
        }
    }
}
