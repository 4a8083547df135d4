//! The process that runs commands in a tree. It is pid 1 of a new pid namespace and has the tree as its `/`. It has
//! only the capabilities that the packages' scripts need.

use std::collections::VecDeque;
use std::fs::{self, Permissions};
use std::io::{Read, Write as _};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::thread::{
    CapabilitySet, CapabilitySets, clear_ambient_capability_set, remove_capability_from_bounding_set, set_capabilities,
    set_no_new_privs,
};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// First argument of the process that runs commands in a tree.
pub const IN_ROOT: &str = "__in-root";

/// Time for maintainer scripts that write times into files. mkfs.erofs sets the files' own times later.
const SOURCE_DATE_EPOCH: &str = "1735689600";

/// Maximum size of a command's standard output, and of its standard error, in an error message, in bytes.
const OUTPUT: usize = 64 << 10;

/// Capabilities with which the packages' scripts set up files and users.
const CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::KILL)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    // `setcap` on a package's program.
    .union(CapabilitySet::SETFCAP);

/// Further capabilities of daemons that validate their configuration in a network namespace without the host's devices.
const NETWORK_CAPABILITIES: CapabilitySet =
    CapabilitySet::NET_ADMIN.union(CapabilitySet::NET_RAW).union(CapabilitySet::NET_BIND_SERVICE);

/// Parts of /proc that are read-only for scripts, because most belong to the whole kernel.
const READ_ONLY: [&str; 5] = ["proc/sys", "proc/sysrq-trigger", "proc/irq", "proc/bus", "proc/fs"];

/// Parts of /proc that are hidden, because they show the host or the kernel's memory.
const MASKED: [&str; 15] = [
    "proc/acpi",
    "proc/asound",
    "proc/config.gz",
    "proc/interrupts",
    "proc/kallsyms",
    "proc/kcore",
    "proc/key-users",
    "proc/keys",
    "proc/kmsg",
    "proc/latency_stats",
    "proc/modules",
    "proc/sched_debug",
    "proc/scsi",
    "proc/timer_list",
    "proc/vmallocinfo",
];

/// Commands to run in a tree, one after the other.
#[derive(Debug, Serialize, Deserialize)]
pub struct Commands {
    /// Programs with their arguments, in the order of execution.
    pub commands: Vec<Vec<String>>,
    /// Scripts that replace programs of the tree while the commands run: program → text.
    pub stand_ins: Vec<(String, String)>,
    /// Files to write into the tree first: path → content. /run is empty for each call.
    pub files: Vec<(String, String)>,
    /// Whether the commands run in a new network namespace.
    pub own_network: bool,
}

impl Commands {
    /// Commands without files and without a new network namespace.
    pub fn new(commands: Vec<Vec<String>>) -> Self {
        Self { commands, stand_ins: Vec::new(), files: Vec::new(), own_network: false }
    }

    /// Replaces programs of the tree while the commands run: program → script.
    #[must_use]
    pub fn with_stand_ins(mut self, programs: &[(&str, &str)]) -> Self {
        self.stand_ins = programs.iter().map(|(program, text)| ((*program).to_owned(), (*text).to_owned())).collect();
        self
    }
}

/// The input of the process.
#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    root: PathBuf,
    commands: Commands,
    /// Size of /tmp, and of /run, in bytes.
    scratch: u64,
}

/// Result of commands.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct CommandOutput {
    /// Whether all commands succeeded.
    pub ok: bool,
    /// Output of the command that failed.
    pub text: String,
}

/// Runs commands in a tree, in a process that is pid 1 of a new pid namespace. The commands see no other process of the
/// sandbox, and the kernel kills their processes at the end. Call it in a thread that ends afterwards.
///
/// # Errors
/// If a command fails. The error is the command's output.
pub(crate) fn start(root: &Path, commands: Commands, scratch: u64) -> Result<()> {
    let job = Entry { root: root.to_owned(), commands, scratch };
    let job = serde_json::to_vec(&job).map_err(Error::Json)?;
    unshare(CloneFlags::CLONE_NEWPID).map_err(Error::cannot("create a pid namespace"))?;
    let mut child = Command::new("/proc/self/exe")
        .arg(IN_ROOT)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .map_err(Error::cannot("start"))?;
    if let Some(mut stdin) = child.stdin.take() {
        let _ = stdin.write_all(&job);
    }
    let output = child.wait_with_output().map_err(Error::cannot("wait for the commands"))?;
    let result: CommandOutput = serde_json::from_slice(&output.stdout).map_err(Error::cannot("enter the tree"))?;
    if result.ok { Ok(()) } else { Err(Error::Sandbox(result.text)) }
}

/// Runs the process that enters the tree. Returns the exit code.
pub fn enter() -> u8 {
    let _ = nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL);
    let result = match enter_and_run() {
        Ok(()) => CommandOutput { ok: true, text: String::new() },
        Err(e) => CommandOutput { ok: false, text: e.chain() },
    };
    let json = serde_json::to_vec(&result).unwrap_or_default();
    u8::from(std::io::stdout().write_all(&json).is_err())
}

fn enter_and_run() -> Result<()> {
    let mut text = Vec::new();
    std::io::stdin().read_to_end(&mut text).map_err(Error::cannot("read the job"))?;
    let Entry { root, commands: job, scratch } =
        serde_json::from_slice(&text).map_err(Error::cannot("read the job"))?;
    if job.own_network {
        unshare(CloneFlags::CLONE_NEWNET).map_err(Error::cannot("create a network namespace"))?;
    }
    enter_tree(&root, &job.stand_ins, scratch)?;
    for (path, content) in &job.files {
        let path = Path::new("/").join(path);
        let context = |e: std::io::Error| Error::at(path.display().to_string())(e);
        fs::create_dir_all(path.parent().unwrap_or(Path::new("/"))).map_err(context)?;
        fs::write(&path, content).map_err(context)?;
    }
    confine(job.own_network).map_err(Error::cannot("drop capabilities"))?;
    job.commands.iter().try_for_each(|argv| run(argv))
}

fn run(argv: &[String]) -> Result<()> {
    let Some((program, args)) = argv.split_first() else { return Ok(()) };
    let failed = |e: std::io::Error| Error::at(program)(e);
    let mut child = Command::new(program)
        .args(args)
        .env_clear()
        .envs([
            ("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
            ("HOME", "/root"),
            ("LC_ALL", "C.UTF-8"),
            ("TERM", "dumb"),
            ("TZ", "UTC"),
            ("DEBIAN_FRONTEND", "noninteractive"),
            ("DEBCONF_NONINTERACTIVE_SEEN", "true"),
            ("SOURCE_DATE_EPOCH", SOURCE_DATE_EPOCH),
            ("PYTHONHASHSEED", "0"),
            // A module that a script imports would be compiled with the time at which its source was unpacked.
            ("PYTHONDONTWRITEBYTECODE", "1"),
            ("INITRD", "No"),
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let (out, err) = (child.stdout.take(), child.stderr.take());
    let output = std::thread::scope(|scope| {
        let out = scope.spawn(|| end_of(out));
        let err = end_of(err);
        [out.join().unwrap_or_default(), err].concat()
    });
    if child.wait().map_err(failed)?.success() {
        return Ok(());
    }
    Err(Error::Sandbox(last_lines(&String::from_utf8_lossy(&output), 25)))
}

/// Reads a pipe to its end. Returns only the last bytes, because a script may write without limit.
fn end_of(pipe: Option<impl Read>) -> Vec<u8> {
    let mut end = VecDeque::new();
    let mut buffer = vec![0; OUTPUT];
    let Some(mut pipe) = pipe else { return Vec::new() };
    while let Ok(n @ 1..) = pipe.read(&mut buffer) {
        end.extend(&buffer[..n]);
        end.drain(..end.len().saturating_sub(OUTPUT));
    }
    end.into()
}

/// Makes `root` this process's `/`, with a new /dev, /proc, /run and /tmp, and unmounts the host's root.
fn enter_tree(root: &Path, stand_ins: &[(String, String)], scratch: u64) -> Result<()> {
    let none = None::<&Path>;
    let io = |e: std::io::Error| Error::cannot("prepare the tree")(e);
    step("create a mount namespace", unshare(CloneFlags::CLONE_NEWNS))?;
    step("make mounts private", mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none))?;
    step("bind the tree", mount(Some(root), root, none, MsFlags::MS_BIND | MsFlags::MS_REC, none))?;
    let inside = |path: &str| Inside::new(root, path);
    for dir in ["proc", "dev", "run", "sys", "tmp"] {
        inside(dir).make_dir().map_err(io)?;
    }
    let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    let proc = inside("proc").0;
    step("mount /proc", mount(Some("proc"), &proc, Some("proc"), quiet | MsFlags::MS_NOEXEC, none))?;
    let tmpfs = |dir: &str, flags: MsFlags, options: String| {
        let options = Some(options.as_str());
        step("mount a tmpfs", mount(Some("tmpfs"), &inside(dir).0, Some("tmpfs"), flags, options))
    };
    tmpfs("dev", MsFlags::MS_NOSUID, "mode=0755,size=1m,nr_inodes=1024".to_owned())?;
    tmpfs("run", quiet, format!("mode=0755,size={scratch},nr_inodes=262144"))?;
    tmpfs("tmp", quiet, format!("mode=1777,size={scratch},nr_inodes=262144"))?;
    // A user namespace cannot create devices, so these devices of the host are bind-mounted.
    for device in ["null", "zero", "full", "random", "urandom", "tty"] {
        let target = root.join("dev").join(device);
        fs::write(&target, "").map_err(io)?;
        let source = Path::new("/dev").join(device);
        step("bind a device", mount(Some(&source), &target, none, MsFlags::MS_BIND, none))?;
    }
    for (link, target) in [("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")] {
        symlink(target, root.join("dev").join(link)).map_err(io)?;
    }
    for dir in ["dev/shm", "dev/pts"] {
        fs::create_dir(root.join(dir)).map_err(io)?;
    }
    protect_proc(root)?;
    // After pivot_root, no link of the tree can point to the host.
    step("enter the tree", nix::unistd::chdir(root))?;
    step("enter the tree", nix::unistd::pivot_root(".", "."))?;
    step("unmount the host's root", umount2(".", MntFlags::MNT_DETACH))?;
    step("enter the tree", nix::unistd::chdir("/"))?;
    put_stand_ins(stand_ins)
}

/// A top-level path of the tree, before the process enters the tree. No link is part of it.
struct Inside(PathBuf);

impl Inside {
    fn new(root: &Path, path: &str) -> Self {
        Self(root.join(path))
    }

    /// Creates the folder. Fails if it is a link, because a mount would follow the link out of the tree.
    fn make_dir(&self) -> std::io::Result<()> {
        match fs::symlink_metadata(&self.0) {
            Ok(meta) if meta.is_dir() => Ok(()),
            Ok(_) => Err(std::io::Error::other(format!("{} is not a folder; a package replaced it", self.0.display()))),
            Err(_) => fs::create_dir(&self.0),
        }
    }
}

fn step(what: &str, done: nix::Result<()>) -> Result<()> {
    done.map_err(Error::cannot(what))
}

/// Makes [`READ_ONLY`] parts of /proc read-only, and hides [`MASKED`] parts.
fn protect_proc(root: &Path) -> Result<()> {
    let none = None::<&Path>;
    let bare = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | bare;
    for path in READ_ONLY.map(|p| root.join(p)).into_iter().filter(|p| p.exists()) {
        step("bind a part of /proc", mount(Some(&path), &path, none, MsFlags::MS_BIND | MsFlags::MS_REC, none))?;
        step("make a part of /proc read-only", mount(none, &path, none, read_only, none))?;
    }
    let null = root.join("dev/null");
    for path in MASKED.map(|p| root.join(p)).into_iter().filter(|p| p.exists()) {
        if path.is_dir() {
            let options = Some("mode=0555,size=0,nr_inodes=1");
            step(
                "hide a part of /proc",
                mount(Some("tmpfs"), &path, Some("tmpfs"), bare | MsFlags::MS_RDONLY, options),
            )?;
        } else {
            step("hide a part of /proc", mount(Some(&null), &path, none, MsFlags::MS_BIND, none))?;
        }
    }
    Ok(())
}

/// Mounts stand-ins over programs of the tree. Call it after entering the tree.
fn put_stand_ins(stand_ins: &[(String, String)]) -> Result<()> {
    let io = |e: std::io::Error| Error::cannot("write a stand-in")(e);
    for (i, (program, text)) in stand_ins.iter().enumerate() {
        let target = Path::new(program);
        let stand_in = format!("/run/stand-in-{i}");
        // A program that is not installed needs no stand-in. No package has policy-rc.d, so it is created.
        if program == "/usr/sbin/policy-rc.d" {
            fs::write(target, "").map_err(io)?;
        } else if !target.exists() {
            continue;
        }
        fs::write(&stand_in, text).map_err(io)?;
        fs::set_permissions(&stand_in, Permissions::from_mode(0o755)).map_err(io)?;
        step(
            "mount a stand-in",
            mount(Some(stand_in.as_str()), target, None::<&Path>, MsFlags::MS_BIND, None::<&Path>),
        )?;
    }
    Ok(())
}

/// Drops privileges that the tree's programs do not need, for this process and its children.
fn confine(network: bool) -> std::io::Result<()> {
    // No controlling terminal, and no core dump, which a program of the host might process.
    nix::unistd::setsid()?;
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
    let kept = if network { CAPABILITIES.union(NETWORK_CAPABILITIES) } else { CAPABILITIES };
    for bit in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << bit);
        // Numbers above the kernel's last capability return an error, and need no removal.
        if !kept.contains(capability) && rustix::thread::capability_is_in_bounding_set(capability).unwrap_or(false) {
            remove_capability_from_bounding_set(capability)?;
        }
    }
    clear_ambient_capability_set()?;
    set_capabilities(None, CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() })?;
    set_no_new_privs(true)?;
    // Scripts must not access /proc/1, which has the builder's program and open files.
    Ok(nix::sys::prctl::set_dumpable(false)?)
}

/// Returns the last lines of a command's output, without control characters.
fn last_lines(text: &str, n: usize) -> String {
    let plain: String = text.chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).collect();
    let lines: Vec<&str> = plain.lines().collect();
    lines[lines.len().saturating_sub(n)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_only_the_end_of_long_output() {
        let text = [vec![b'a'; 3 * OUTPUT], b"end".to_vec()].concat();
        let end = end_of(Some(text.as_slice()));
        assert_eq!(end.len(), OUTPUT);
        assert!(end.ends_with(b"aend"));
    }

    #[test]
    fn removes_control_characters() {
        assert_eq!(last_lines("a\nb\x1b[2J\rc\n\td", 2), "b[2Jc\n\td");
    }
}
