//! Where maintainer scripts run: a process of our own in fresh user, mount, pid, network,
//! IPC and UTS namespaces.
//!
//! The builder starts itself as a *worker*. The worker leaves the host's user namespace and
//! waits; the builder, from outside, maps ids 0..65535 into it (itself when it is root, with
//! `newuidmap` when it is not); the worker then enters the other namespaces and starts the
//! *inner* process as their pid 1. All of it dies with the builder.

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command, Stdio};

use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::unistd::{Gid, Uid, User};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, Result, fail};

/// First argument that makes the binary a worker, or the worker's inner process.
pub const WORKER: &str = "__worker";
pub const INNER: &str = "__inner";

const IDS: u32 = 65_536;

/// Runs `job` in a sandbox and returns what it answered. Lines that the job prints to its
/// standard error belong to the answer when it fails.
///
/// # Errors
/// The kernel allows no namespaces, or the job failed: its own words.
pub fn run<J: Serialize, A: DeserializeOwned>(job: &J) -> Result<A> {
    let root = Uid::effective().is_root();
    match start(job, true) {
        // Root needs no user namespace, and some kernels allow none.
        Err(Start::NoUserNamespace) if root => start(job, false).map_err(Start::into_error)?.finish(),
        other => other.map_err(Start::into_error)?.finish(),
    }
}

enum Start {
    NoUserNamespace,
    Other(Error),
}

impl Start {
    fn into_error(self) -> Error {
        match self {
            Self::NoUserNamespace => Error::Failed(
                "this kernel allows no user namespaces; run bakehouse as root, or set \
                 kernel.unprivileged_userns_clone=1 and user.max_user_namespaces above 0"
                    .to_owned(),
            ),
            Self::Other(e) => e,
        }
    }
}

struct Running {
    child: Child,
}

fn start<J: Serialize>(job: &J, user_namespace: bool) -> Result<Running, Start> {
    let other = |e: Error| Start::Other(e);
    let exe = std::env::current_exe().map_err(Error::io("find", "bakehouse's own program")).map_err(other)?;
    let mut child = Command::new(&exe)
        .arg(WORKER)
        .arg(if user_namespace { "user" } else { "root" })
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(Error::io("start", &exe))
        .map_err(other)?;
    let mut word = [0; 1];
    let ready = child.stdout.as_mut().is_some_and(|out| out.read_exact(&mut word).is_ok());
    if !ready || word[0] == b'N' {
        let _ = child.wait();
        return Err(Start::NoUserNamespace);
    }
    if user_namespace && let Err(e) = map_ids(child.id()) {
        let _ = child.kill();
        let _ = child.wait();
        return Err(other(e));
    }
    let text = serde_json::to_vec(job).map_err(|e| Start::Other(Error::Failed(e.to_string())))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A worker that died says why on its standard error.
        let _ = stdin.write_all(&text);
    }
    Ok(Running { child })
}

impl Running {
    fn finish<A: DeserializeOwned>(mut self) -> Result<A> {
        let mut errors = self.child.stderr.take();
        let reader = std::thread::spawn(move || {
            let mut text = Vec::new();
            if let Some(pipe) = &mut errors {
                let _ = pipe.read_to_end(&mut text);
            }
            String::from_utf8_lossy(&text).into_owned()
        });
        let mut answer = String::new();
        if let Some(out) = self.child.stdout.take() {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                answer = line;
            }
        }
        let status = self.child.wait().map_err(Error::io("wait for", "the sandbox"))?;
        let errors = reader.join().unwrap_or_default();
        if !status.success() {
            let how = status.signal().map(|s| format!(" (killed by signal {s})")).unwrap_or_default();
            return fail(format!("{}{how}", errors.trim_end()));
        }
        serde_json::from_str(&answer)
            .map_err(|e| Error::Failed(format!("the sandbox answered nonsense: {e}\n{errors}")))
    }
}

fn map_ids(pid: u32) -> Result<()> {
    if Uid::effective().is_root() {
        for map in ["uid_map", "gid_map"] {
            let path = format!("/proc/{pid}/{map}");
            fs::write(&path, format!("0 0 {IDS}\n")).map_err(Error::io("write", path))?;
        }
        return Ok(());
    }
    let user = User::from_uid(Uid::current()).ok().flatten().map(|u| u.name).unwrap_or_default();
    let tools =
        [("newuidmap", "/etc/subuid", Uid::current().as_raw()), ("newgidmap", "/etc/subgid", Gid::current().as_raw())];
    for (tool, file, own) in tools {
        let ranges = fs::read_to_string(file).unwrap_or_default();
        let Some(first) = subordinate_range(&ranges, &user, Uid::current().as_raw()) else {
            return fail(format!(
                "{file} gives `{user}` no range of {IDS} ids; as root: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}"
            ));
        };
        let args = [pid, 0, own, 1, 1, first, IDS - 1].map(|n| n.to_string());
        let done = Command::new(tool).args(args).output();
        match done {
            Ok(o) if o.status.success() => {}
            Ok(o) => return fail(format!("{tool}: {}", String::from_utf8_lossy(&o.stderr).trim_end())),
            Err(e) => return fail(format!("cannot run {tool}: {e}; install uidmap (`make deps`)")),
        }
    }
    Ok(())
}

/// First id of a range in /etc/subuid that is large enough.
fn subordinate_range(text: &str, user: &str, uid: u32) -> Option<u32> {
    text.lines().find_map(|line| {
        let [name, first, count] = line.split(':').collect::<Vec<_>>()[..] else { return None };
        let ours = name == user || name == uid.to_string();
        (ours && count.trim().parse::<u32>().ok()? >= IDS - 1).then(|| first.parse().ok())?
    })
}

/// The worker's life, up to the inner process's end. Returns its exit code.
pub fn worker(mode: Option<&OsStr>) -> u8 {
    let _ = set_pdeathsig(Signal::SIGKILL);
    let user = mode == Some(OsStr::new("user"));
    let say = |word: &[u8]| {
        let mut out = std::io::stdout();
        let _ = out.write_all(word).and_then(|()| out.flush());
    };
    if user && unshare(CloneFlags::CLONE_NEWUSER).is_err() {
        say(b"N");
        return 1;
    }
    say(b"Y");
    // The job arrives after the ids are mapped.
    let mut job = Vec::new();
    if let Err(e) = std::io::stdin().read_to_end(&mut job) {
        eprintln!("the sandbox got no job: {e}");
        return 1;
    }
    let ids = nix::unistd::setgroups(&[])
        .and_then(|()| nix::unistd::setgid(Gid::from_raw(0)))
        .and_then(|()| nix::unistd::setuid(Uid::from_raw(0)));
    if let Err(e) = ids {
        eprintln!("the sandbox can't become its root: {e}");
        return 1;
    }
    // Changing ids forgets the wish to die with the parent.
    let _ = set_pdeathsig(Signal::SIGKILL);
    let flags = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS;
    if let Err(e) = unshare(flags).and_then(|()| nix::unistd::sethostname("localhost")) {
        eprintln!("the kernel allows no namespaces: {e}");
        return 1;
    }
    let mut inner = match Command::new("/proc/self/exe").arg(INNER).stdin(Stdio::piped()).spawn() {
        Ok(inner) => inner,
        Err(e) => {
            eprintln!("the sandbox can't start: {e}");
            return 1;
        }
    };
    if let Some(mut stdin) = inner.stdin.take() {
        let _ = stdin.write_all(&job);
    }
    match inner.wait() {
        Ok(status) if status.success() => 0,
        Ok(status) => {
            if let Some(signal) = status.signal() {
                eprintln!("the sandbox was killed by signal {signal}");
            }
            1
        }
        Err(_) => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subordinate_ranges() {
        let text = "a:100000:65536\nb:200000:10\n1003:300000:65536\n";
        assert_eq!(subordinate_range(text, "a", 1001), Some(100_000));
        assert_eq!(subordinate_range(text, "b", 1002), None);
        assert_eq!(subordinate_range(text, "c", 1003), Some(300_000));
    }
}
