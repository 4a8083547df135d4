//! The attacker: a program in a package that the package's postinst script runs as root of the sandbox.

use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};

/// Targets of the attacks on the host.
pub(crate) struct Aim<'a> {
    secret: &'a str,
    port: &'a str,
    socket: &'a str,
}

/// `Ok` says how the attack broke out of the sandbox, `Err` why it failed.
pub(crate) type Outcome = Result<String, String>;

pub(crate) type Attack = (&'static str, fn(&Aim) -> Outcome);

pub(crate) const ALL: [Attack; 17] = [
    ("write /proc/sys/kernel/core_pattern", |_| writable("/proc/sys/kernel/core_pattern")),
    ("write /proc/sysrq-trigger", |_| writable("/proc/sysrq-trigger")),
    ("read the kernel's memory, symbols and keys", |_| {
        any(["kcore", "kallsyms", "keys"].map(|f| readable(&format!("/proc/{f}"))))
    }),
    ("act as the host's root", |_| host_root()),
    ("have dangerous capabilities", |_| capabilities()),
    ("gain capabilities by a set-uid program", |_| set_uid()),
    ("mount", |_| mounts()),
    ("make /proc/sys writable again", |_| remounts()),
    ("make a block device and a memory device", |_| any([SFlag::S_IFBLK, SFlag::S_IFCHR].map(device))),
    ("open files of the host by /proc", |aim| host_files(aim.secret)),
    ("trace the builder and take its files", |_| trace()),
    ("see processes of the host", |_| processes()),
    ("load a kernel module", |_| module()),
    ("connect to a port of the host", |aim| done("connected", TcpStream::connect(format!("127.0.0.1:{}", aim.port)))),
    ("connect to an abstract socket of the host", |aim| {
        done("connected", SocketAddr::from_abstract_name(aim.socket).and_then(|name| UnixStream::connect_addr(&name)))
    }),
    ("write to the builder's terminal", |_| writable("/dev/tty")),
    // The last one, because later attacks would run in the new user namespace.
    ("gain capabilities in a user namespace", |_| done("created", unshare(CloneFlags::CLONE_NEWUSER))),
];

pub(crate) fn run(name: &str, more: &[&str]) -> ExitCode {
    match (name, more) {
        ("all", [secret, port, socket]) => {
            let aim = Aim { secret, port, socket };
            let mut results = String::new();
            for (attack, attempt) in ALL {
                let (word, detail) = match attempt(&aim) {
                    Ok(how) => ("BROKEN", how),
                    Err(why) => ("held", why),
                };
                results.push_str(&format!("{word}\t{attack}\t{}\n", detail.replace('\n', " ")));
            }
            ExitCode::from(u8::from(fs::write("/usr/share/attack", results).is_err()))
        }
        ("euid", _) => {
            println!("{}", nix::unistd::geteuid());
            ExitCode::SUCCESS
        }
        ("threads", _) => threads(),
        ("fill", [folder]) => fill(Path::new(folder)),
        _ => ExitCode::FAILURE,
    }
}

fn done<T, E: std::fmt::Display>(how: &str, result: Result<T, E>) -> Outcome {
    result.map(|_| how.to_owned()).map_err(|e| e.to_string())
}

/// Returns the first attack that broke out, or the last failure.
fn any(outcomes: impl IntoIterator<Item = Outcome>) -> Outcome {
    let mut why = String::new();
    for outcome in outcomes {
        match outcome {
            Ok(how) => return Ok(how),
            Err(e) => why = e,
        }
    }
    Err(why)
}

/// Opens a file for writing, and writes nothing.
fn writable(path: &str) -> Outcome {
    done("opened for writing", OpenOptions::new().write(true).open(path))
}

fn readable(path: &str) -> Outcome {
    let mut text = Vec::new();
    match File::open(path).and_then(|file| file.take(100).read_to_end(&mut text)) {
        Ok(0) => Err(format!("{path} is empty")),
        Ok(n) => Ok(format!("{n} bytes of {path}")),
        Err(e) => Err(e.to_string()),
    }
}

fn host_root() -> Outcome {
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let outer = map.split_whitespace().nth(1).unwrap_or("0").to_owned();
    if outer == "0" { Ok("its 0 is the host's 0".to_owned()) } else { Err(format!("its 0 is the host's {outer}")) }
}

fn capabilities() -> Outcome {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let field = |name: &str| status.lines().find_map(|l| l.strip_prefix(name)).unwrap_or_default().trim().to_owned();
    // DAC_READ_SEARCH, NET_ADMIN, SYS_MODULE, SYS_RAWIO, SYS_PTRACE, SYS_ADMIN, SYS_BOOT, SYS_TIME, MKNOD, BPF.
    let dangerous = [2, 12, 16, 17, 19, 21, 22, 25, 27, 39].iter().fold(0u64, |set, bit| set | 1 << bit);
    let (bounding, privileges) = (field("CapBnd:"), field("NoNewPrivs:"));
    let bits = u64::from_str_radix(&bounding, 16).unwrap_or(u64::MAX);
    let detail = format!("CapBnd {bounding}, NoNewPrivs {privileges}");
    if bits & dangerous == 0 && privileges == "1" { Err(detail) } else { Ok(detail) }
}

fn set_uid() -> Outcome {
    let copy = "/usr/bin/set-uid";
    fs::copy("/usr/bin/attack", copy).map_err(|e| e.to_string())?;
    fs::set_permissions(copy, fs::Permissions::from_mode(0o4755)).map_err(|e| e.to_string())?;
    let output = Command::new(copy).args(["attack", "euid"]).uid(1).gid(1).output().map_err(|e| e.to_string())?;
    let _ = fs::remove_file(copy);
    match String::from_utf8_lossy(&output.stdout).trim() {
        "0" => Ok("user 1 became root".to_owned()),
        user => Err(format!("user 1 stays user {user}")),
    }
}

fn mounts() -> Outcome {
    fs::create_dir_all("/mnt").map_err(|e| e.to_string())?;
    done("a tmpfs", mount(Some("tmpfs"), "/mnt", Some("tmpfs"), MsFlags::empty(), None::<&str>))
}

fn remounts() -> Outcome {
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND;
    mount(None::<&str>, "/proc/sys", None::<&str>, flags, None::<&str>).map_err(|e| e.to_string())?;
    writable("/proc/sys/kernel/hostname")
}

fn device(kind: SFlag) -> Outcome {
    let number = if kind == SFlag::S_IFBLK { makedev(8, 0) } else { makedev(1, 1) };
    let path = "/usr/device";
    mknod(path, kind, Mode::from_bits_truncate(0o600), number).map_err(|e| e.to_string())?;
    let _ = fs::remove_file(path);
    Ok("created".to_owned())
}

fn pids() -> Vec<PathBuf> {
    let all = fs::read_dir("/proc").into_iter().flatten().flatten();
    all.filter(|p| p.file_name().to_string_lossy().bytes().all(|b| b.is_ascii_digit())).map(|p| p.path()).collect()
}

fn host_files(secret: &str) -> Outcome {
    any(pids().iter().flat_map(|pid| {
        ["root", "cwd"].map(|to| {
            let path = pid.join(to).join(secret.trim_start_matches('/'));
            done(&path.display().to_string(), fs::read(&path))
        })
    }))
}

fn trace() -> Outcome {
    let open = |path: &str| done(path, OpenOptions::new().read(true).write(true).open(path));
    // The sandbox may list the descriptors' numbers, but must not open them.
    let files = fs::read_dir("/proc/1/fd").into_iter().flatten().flatten().map(|f| f.path());
    let files: Vec<Outcome> = files.map(|f| done(&f.display().to_string(), File::open(&f))).collect();
    let program = done("the builder's program", fs::read_link("/proc/1/exe"));
    any([open("/proc/1/mem"), open("/proc/1/exe"), program].into_iter().chain(files))
}

fn processes() -> Outcome {
    let names: Vec<String> = pids().iter().filter_map(|p| fs::read_to_string(p.join("cmdline")).ok()).collect();
    let detail = format!("{} processes", names.len());
    // Pid 1, dpkg, and the script that became this program. Any other process belongs to the builder.
    if names.len() > 3 || names.iter().any(|n| n.contains("__inner")) { Ok(detail) } else { Err(detail) }
}

/// Loads a file that is not a kernel module. The kernel checks capabilities before it parses the file.
fn module() -> Outcome {
    let program = ["/usr/bin/insmod", "/usr/sbin/insmod"].into_iter().find(|p| Path::new(p).exists());
    let Some(program) = program else {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let set = status.lines().find_map(|l| l.strip_prefix("CapEff:")).unwrap_or_default().trim().to_owned();
        let has = u64::from_str_radix(&set, 16).unwrap_or(u64::MAX) & (1 << 16) != 0;
        return if has { Ok("it has CAP_SYS_MODULE".to_owned()) } else { Err("no CAP_SYS_MODULE".to_owned()) };
    };
    let output = Command::new(program).arg("/usr/bin/attack").output().map_err(|e| e.to_string())?;
    let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    if text.contains("not permitted") { Err(text) } else { Ok(text) }
}

fn threads() -> ExitCode {
    for n in 0..8000 {
        let thread = std::thread::Builder::new().stack_size(16 << 10);
        if let Err(e) = thread.spawn(std::thread::park) {
            println!("no more threads after {n}: {e}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

fn fill(folder: &Path) -> ExitCode {
    let block = vec![1; 1 << 20];
    let written = File::create(folder.join("filling")).and_then(|mut file| {
        (0..1024).try_for_each(|_| {
            file.write_all(&block)?;
            // The builder measures the disk's free space, which does not include dirty pages.
            file.sync_data()
        })
    });
    match written {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            println!("{e}");
            ExitCode::FAILURE
        }
    }
}
