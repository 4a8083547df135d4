//! Maintainer scripts: run by dpkg itself, inside the tree, with nothing of the host in it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, Permissions};
use std::io::{Read, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use serde::{Deserialize, Serialize};

/// First argument that makes the binary run commands inside a tree.
pub const IN_ROOT: &str = "__in-root";

/// Time of everything a maintainer script stamps; files get the lock's time later.
const SOURCE_DATE_EPOCH: &str = "1735689600";

const NOTHING: &str = "#!/bin/sh\nexit 0\n";

/// Maintainer work that is done once by us, or not at all: program → stand-in.
const STAND_INS: [(&str, &str); 9] = [
    // The initrd is composed from the tree's own files.
    ("/usr/sbin/update-initramfs", NOTHING),
    // Once, beside the rest of the work, not in the kernel's turn.
    ("/usr/sbin/depmod", NOTHING),
    // One compileall over everything follows, with hashes for times.
    ("/usr/bin/py3compile", NOTHING),
    // A database cluster is a node's, and Patroni makes it.
    ("/usr/bin/pg_createcluster", NOTHING),
    // A key made now would be in every copy of the image.
    ("/usr/sbin/make-ssl-cert", NOTHING),
    // Profiles say what is enabled; each of these calls costs 0.2 s of Perl.
    ("/usr/bin/deb-systemd-helper", NOTHING),
    ("/usr/bin/deb-systemd-invoke", NOTHING),
    // The bundle only: OpenSSL's default file, GnuTLS and curl read it, and hashing each of
    // 150 certificates for the folder costs a second, twice.
    (
        "/usr/sbin/update-ca-certificates",
        "#!/bin/sh\nset -e\ncd /etc/ssl/certs\n\
         sed -e '/^$/d;/^[#!]/d;s,^,/usr/share/ca-certificates/,' /etc/ca-certificates.conf |\n\
         xargs sed -e '$a\\' > ca-certificates.crt\nchmod 644 ca-certificates.crt\n",
    ),
    // No service is started while an image is made.
    ("/usr/sbin/policy-rc.d", "#!/bin/sh\nexit 101\n"),
];

/// Takes every unpacked package of `names` to "installed".
pub fn configure(
    root: &Path,
    names: &[String],
    essential: &[String],
    users: &BTreeMap<String, (u32, String, bool)>,
) -> Result<(), String> {
    let has = |name: &str| names.iter().any(|n| n == name);
    // Preinsts run after the fact: on a fresh tree only these look at what is there, and
    // they look for the database that is already written.
    let mut script = String::from(
        "set -e\nexport DPKG_MAINTSCRIPT_NAME=preinst DPKG_MAINTSCRIPT_PACKAGE_REFCOUNT=1 DPKG_ROOT= \
         DPKG_ADMINDIR=/var/lib/dpkg DPKG_RUNNING_VERSION=1.22 DPKG_MAINTSCRIPT_ARCH=amd64\n",
    );
    let first = ["base-passwd", "base-files"].into_iter().filter(|p| has(p)).map(str::to_owned);
    let rest = names.iter().filter(|n| !["base-passwd", "base-files"].contains(&n.as_str())).cloned();
    for name in first.chain(rest) {
        let file = format!("var/lib/dpkg/info/{name}.preinst");
        if root.join(&file).exists() {
            let package = name.split(':').next().unwrap_or(&name);
            let _ = writeln!(
                script,
                "DPKG_MAINTSCRIPT_PACKAGE={package} /{file} install || {{ echo 'preinst of {package} failed' >&2; exit 1; }}"
            );
        }
    }
    in_root(root, &[vec!["/bin/sh".to_owned(), "-c".to_owned(), script]], true)?;
    seed_users(root, users).map_err(|e| format!("cannot write the fixed users: {e}"))?;
    let dpkg = |what: &[String]| -> Vec<String> {
        ["dpkg", "--force-unsafe-io", "--configure"]
            .into_iter()
            .map(str::to_owned)
            .chain(what.iter().cloned())
            .collect()
    };
    let mut commands = Vec::new();
    if !essential.is_empty() {
        commands.push(dpkg(essential));
    }
    commands.push(dpkg(&["-a".to_owned()]));
    // Reading every module takes as long as half the scripts, and needs none of them.
    std::thread::scope(|scope| {
        let modules = scope.spawn(|| depmod(root, names));
        in_root(root, &commands, true)?;
        modules.join().map_err(|_| "depmod panicked".to_owned())?
    })
}

/// Indexes the modules of a kernel that came with these packages.
fn depmod(root: &Path, names: &[String]) -> Result<(), String> {
    let mut kernels = names.iter().filter_map(|n| n.strip_prefix("linux-image-"));
    let Some(version) = kernels.find(|v| root.join("usr/lib/modules").join(v).is_dir()) else { return Ok(()) };
    in_root(root, &[["/usr/sbin/depmod", version].map(str::to_owned).into()], false)
}

/// Users whose ids are the same in every image, before any maintainer script can choose one.
fn seed_users(root: &Path, users: &BTreeMap<String, (u32, String, bool)>) -> std::io::Result<()> {
    let add = |file: &str, name: &str, line: String| -> std::io::Result<()> {
        let path = root.join(file);
        let mut text = fs::read_to_string(&path)?;
        if !text.lines().any(|l| l.split(':').next() == Some(name)) {
            text.push_str(&line);
            fs::write(&path, text)?;
        }
        Ok(())
    };
    for (name, (id, home, group_only)) in users {
        add("etc/group", name, format!("{name}:x:{id}:\n"))?;
        if !group_only {
            // `*`: no password; pwconv moves it to the shadow file.
            add("etc/passwd", name, format!("{name}:*:{id}:{id}::{home}:/usr/sbin/nologin\n"))?;
        }
    }
    Ok(())
}

#[derive(Debug, Serialize, Deserialize)]
struct Commands {
    root: PathBuf,
    commands: Vec<Vec<String>>,
    stand_ins: bool,
    /// Files to write below / once inside: path → content.
    files: Vec<(String, String)>,
    /// A network with nothing in it, not even the other commands'.
    own_network: bool,
}

/// What a command said, and whether it was content.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Said {
    pub ok: bool,
    pub text: String,
}

/// Runs commands inside a tree, one after the other up to the first that fails; its words are
/// the error. Call it inside a sandbox only.
pub fn in_root(root: &Path, commands: &[Vec<String>], stand_ins: bool) -> Result<(), String> {
    let commands = commands.to_vec();
    enter_with(&Commands { root: root.to_owned(), commands, stand_ins, files: Vec::new(), own_network: false })
}

/// The same without stand-ins, in a network of its own, with files written first: into /run,
/// which is fresh for each call.
pub fn in_root_with(root: &Path, commands: Vec<Vec<String>>, files: Vec<(String, String)>) -> Result<(), String> {
    enter_with(&Commands { root: root.to_owned(), commands, stand_ins: false, files, own_network: true })
}

fn enter_with(job: &Commands) -> Result<(), String> {
    let job = serde_json::to_vec(job).map_err(|e| e.to_string())?;
    let mut child = Command::new("/proc/self/exe")
        .arg(IN_ROOT)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .map_err(|e| format!("cannot start: {e}"))?;
    if let Some(mut stdin) = child.stdin.take() {
        let _ = stdin.write_all(&job);
    }
    let output = child.wait_with_output().map_err(|e| e.to_string())?;
    let said: Said = serde_json::from_slice(&output.stdout).map_err(|_| "the tree could not be entered".to_owned())?;
    if said.ok { Ok(()) } else { Err(said.text) }
}

/// The process that enters the tree. Returns its exit code.
pub fn enter() -> u8 {
    let said = match entered() {
        Ok(()) => Said { ok: true, text: String::new() },
        Err(text) => Said { ok: false, text },
    };
    let answer = serde_json::to_vec(&said).unwrap_or_default();
    u8::from(std::io::stdout().write_all(&answer).is_err())
}

fn entered() -> Result<(), String> {
    let mut text = Vec::new();
    std::io::stdin().read_to_end(&mut text).map_err(|e| e.to_string())?;
    let job: Commands = serde_json::from_slice(&text).map_err(|e| e.to_string())?;
    if job.own_network {
        unshare(CloneFlags::CLONE_NEWNET).map_err(|e| format!("cannot leave the network: {e}"))?;
    }
    enter_tree(&job.root, job.stand_ins)?;
    for (path, content) in &job.files {
        let path = Path::new("/").join(path);
        let told = |e: std::io::Error| format!("{}: {e}", path.display());
        fs::create_dir_all(path.parent().unwrap_or(Path::new("/"))).map_err(told)?;
        fs::write(&path, content).map_err(told)?;
    }
    for argv in &job.commands {
        let Some((program, args)) = argv.split_first() else { continue };
        let output = Command::new(program)
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
                ("INITRD", "No"),
            ])
            .stdin(Stdio::null())
            .output()
            .map_err(|e| format!("{program}: {e}"))?;
        if !output.status.success() {
            let said = [&output.stdout[..], &output.stderr[..]].concat();
            return Err(last_lines(&String::from_utf8_lossy(&said), 25));
        }
    }
    Ok(())
}

/// Makes `root` this process's `/`, with a bare /dev, /proc and /run, and the host's gone.
fn enter_tree(root: &Path, stand_ins: bool) -> Result<(), String> {
    let none = None::<&Path>;
    let step = |what: &str, done: nix::Result<()>| done.map_err(|e| format!("cannot {what}: {e}"));
    let io = |e: std::io::Error| format!("cannot prepare the tree: {e}");
    step("leave the mounts", unshare(CloneFlags::CLONE_NEWNS))?;
    step("make mounts private", mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none))?;
    step("bind the tree", mount(Some(root), root, none, MsFlags::MS_BIND | MsFlags::MS_REC, none))?;
    for dir in ["proc", "dev", "run", "sys", "tmp"] {
        fs::create_dir_all(root.join(dir)).map_err(io)?;
    }
    let tmpfs = |dir: &str, mode: &str| {
        step("mount a tmpfs", mount(Some("tmpfs"), &root.join(dir), Some("tmpfs"), MsFlags::MS_NOSUID, Some(mode)))
    };
    step("mount /proc", mount(Some("proc"), &root.join("proc"), Some("proc"), MsFlags::empty(), none))?;
    tmpfs("dev", "mode=0755")?;
    tmpfs("run", "mode=0755")?;
    tmpfs("tmp", "mode=1777")?;
    // Devices can't be made in a user namespace; the host's harmless ones are lent.
    for device in ["null", "zero", "full", "random", "urandom", "tty"] {
        let target = root.join("dev").join(device);
        fs::write(&target, "").map_err(io)?;
        let source = Path::new("/dev").join(device);
        step("lend a device", mount(Some(&source), &target, none, MsFlags::MS_BIND, none))?;
    }
    for (link, target) in [("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")] {
        symlink(target, root.join("dev").join(link)).map_err(io)?;
    }
    for dir in ["dev/shm", "dev/pts"] {
        fs::create_dir(root.join(dir)).map_err(io)?;
    }
    if stand_ins {
        for (i, (program, text)) in STAND_INS.iter().enumerate() {
            let target = root.join(&program[1..]);
            let stand_in = root.join(format!("run/stand-in-{i}"));
            // What is not installed needs no stand-in; policy-rc.d is nobody's file.
            if *program == "/usr/sbin/policy-rc.d" {
                fs::write(&target, "").map_err(io)?;
            } else if !target.exists() {
                continue;
            }
            fs::write(&stand_in, text).map_err(io)?;
            fs::set_permissions(&stand_in, Permissions::from_mode(0o755)).map_err(io)?;
            step("put a stand-in", mount(Some(&stand_in), &target, none, MsFlags::MS_BIND, none))?;
        }
    }
    step("enter the tree", nix::unistd::chdir(root))?;
    step("enter the tree", nix::unistd::pivot_root(".", "."))?;
    step("let go of the host's tree", umount2(".", MntFlags::MNT_DETACH))?;
    step("enter the tree", nix::unistd::chdir("/"))
}

fn last_lines(text: &str, n: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(n)..].join("\n")
}
