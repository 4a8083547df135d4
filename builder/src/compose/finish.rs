//! From a configured tree to an image's: what belongs to the build or to one node goes, what
//! lies in /var becomes a recipe for making it on the node.

use std::fmt::Write as _;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use walkdir::WalkDir;

use crate::sandbox::chroot::Commands;
use crate::sandbox::tree_root::Runner;

/// Paths that go, relative to the root; a trailing `/*` empties a folder.
const DROPPED: [&str; 34] = [
    "boot/*",
    "dev/*",
    "etc/.pwd.lock",
    "etc/apt",
    "etc/group-",
    "etc/gshadow-",
    "etc/hostname",
    "etc/hosts",
    "etc/machine-id",
    "etc/passwd-",
    "etc/resolv.conf",
    "etc/shadow-",
    "etc/subgid-",
    "etc/subuid-",
    "home",
    "initrd.img",
    "initrd.img.old",
    "media",
    "mnt",
    "opt",
    "root",
    "run/*",
    "srv",
    "tmp/*",
    "usr/local",
    "usr/sbin/policy-rc.d",
    "var/backups",
    "var/cache/*",
    "var/lib/apt",
    "var/lib/dbus",
    "var/lib/dpkg",
    "var/lib/systemd",
    "var/log/*",
    "var/tmp",
];

/// Folders whose place is on the node's own disk.
const IN_VAR: [(&str, &str); 4] =
    [("root", "var/roothome"), ("home", "var/home"), ("srv", "var/srv"), ("usr/local", "../var/usrlocal")];

/// Makes the tree an image's; the kernel goes to `vmlinuz`. Returns the kernel's version.
pub fn finish(root: &Path, runner: &Runner, vmlinuz: &mut File) -> Result<String, String> {
    let told = |what: &'static str| move |e: io::Error| format!("{what}: {e}");
    if root.join("usr/bin/python3").exists() {
        compile_python(root, runner)?;
    }
    let kernel = take_kernel(root, vmlinuz).map_err(told("cannot take the kernel"))?;
    for path in DROPPED {
        drop_path(root, path).map_err(|e| format!("cannot remove {path}: {e}"))?;
    }
    private_keys(root).map_err(told("cannot remove keys"))?;
    disable_units(root).map_err(told("cannot disable units"))?;
    shadow_without_dates(root).map_err(told("cannot clean etc/shadow"))?;
    var_to_factory(root).map_err(told("cannot empty /var"))?;
    for (link, target) in IN_VAR {
        symlink(target, root.join(link)).map_err(told("cannot link into /var"))?;
    }
    // var/tmp: services with a private one start before /var is mounted.
    for dir in ["boot", "dev", "efi", "mnt", "opt", "proc", "run", "sys", "tmp", "var/tmp"] {
        fs::create_dir_all(root.join(dir)).map_err(told("cannot make a folder"))?;
    }
    // Empty, not absent: systemd mounts the node's own over it.
    fs::write(root.join("etc/machine-id"), "").map_err(told("cannot write etc/machine-id"))?;
    Ok(kernel)
}

/// `.pyc` that hold a hash, not a time, of their source: times are rewritten later.
fn compile_python(root: &Path, runner: &Runner) -> Result<(), String> {
    let mut args: Vec<String> =
        ["python3", "-m", "compileall", "-q", "-j0", "--invalidation-mode", "unchecked-hash"].map(str::to_owned).into();
    let dirs = fs::read_dir(root.join("usr/lib")).map_err(|e| e.to_string())?.flatten();
    let mut names: Vec<String> =
        dirs.filter_map(|d| d.file_name().into_string().ok()).filter(|n| n.starts_with("python3")).collect();
    names.sort();
    args.extend(names.into_iter().map(|n| format!("/usr/lib/{n}")));
    runner.run(Commands::new(vec![args]))
}

fn take_kernel(root: &Path, vmlinuz: &mut File) -> io::Result<String> {
    let mut versions: Vec<String> = match fs::read_dir(root.join("usr/lib/modules")) {
        Ok(dir) => dir.flatten().filter_map(|d| d.file_name().into_string().ok()).collect(),
        Err(_) => Vec::new(),
    };
    versions.sort();
    let [version] = &versions[..] else {
        return Err(io::Error::other(format!("the image must have exactly one kernel, it has {}", versions.len())));
    };
    io::copy(&mut File::open(root.join(format!("boot/vmlinuz-{version}")))?, vmlinuz)?;
    Ok(version.clone())
}

fn drop_path(root: &Path, path: &str) -> io::Result<()> {
    if let Some(dir) = path.strip_suffix("/*") {
        let Ok(entries) = fs::read_dir(root.join(dir)) else { return Ok(()) };
        for entry in entries {
            remove(&entry?.path())?;
        }
        return Ok(());
    }
    remove(&root.join(path))
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
    }
}

/// Keys that a maintainer script made would be the same on every node.
fn private_keys(root: &Path) -> io::Result<()> {
    for dir in ["etc/ssh", "etc/ssl/private"] {
        let Ok(entries) = fs::read_dir(root.join(dir)) else { continue };
        for entry in entries {
            let path = entry?.path();
            if dir == "etc/ssl/private"
                || path.file_name().is_some_and(|n| n.to_string_lossy().starts_with("ssh_host_"))
            {
                remove(&path)?;
            }
        }
    }
    Ok(())
}

/// Packages enable their services when installed; an image starts only what its profiles say.
fn disable_units(root: &Path) -> io::Result<()> {
    let dir = root.join("etc/systemd/system");
    let Ok(entries) = fs::read_dir(&dir) else { return Ok(()) };
    for entry in entries {
        let path = entry?.path();
        let name = path.to_string_lossy().into_owned();
        if name.ends_with(".wants") || name.ends_with(".requires") {
            fs::remove_dir_all(&path)?;
        }
    }
    Ok(())
}

/// The third field is the day the password was set: the day of the build.
fn shadow_without_dates(root: &Path) -> io::Result<()> {
    let path = root.join("etc/shadow");
    let text = fs::read_to_string(&path)?;
    let mut clean = String::new();
    for line in text.lines() {
        let fields: Vec<&str> = line.split(':').collect();
        for (i, field) in fields.iter().enumerate() {
            let field = match i {
                // No account has a password, the empty one included.
                1 => {
                    if field.is_empty() {
                        "*"
                    } else {
                        field
                    }
                }
                2 => "20000",
                _ => field,
            };
            let _ = write!(clean, "{}{field}", if i == 0 { "" } else { ":" });
        }
        clean.push('\n');
    }
    fs::write(&path, clean)
}

/// /var is the node's: what packages put there is made on it by systemd-tmpfiles.
fn var_to_factory(root: &Path) -> io::Result<()> {
    let mut lines = String::from("# What the packages have in /var.\n");
    let factory = root.join("usr/share/factory/var");
    for entry in WalkDir::new(root.join("var")).min_depth(1).sort_by_file_name() {
        let entry = entry?;
        let below = entry.path().strip_prefix(root.join("var")).map_err(io::Error::other)?;
        let name = quoted(&Path::new("/var").join(below));
        let meta = entry.path().symlink_metadata()?;
        let (mode, uid, gid) = (meta.mode() & 0o7777, meta.uid(), meta.gid());
        let line = if meta.is_dir() {
            format!("d {name} {mode:04o} {uid} {gid} -\n")
        } else if meta.is_symlink() {
            let target = fs::read_link(entry.path())?;
            format!("L {name} - - - - {}\n", quoted(&target))
        } else {
            let copy = factory.join(below);
            if let Some(dir) = copy.parent() {
                fs::create_dir_all(dir)?;
            }
            fs::copy(entry.path(), &copy)?;
            fs::set_permissions(&copy, Permissions::from_mode(mode))?;
            std::os::unix::fs::chown(&copy, Some(uid), Some(gid))?;
            format!("C {name} {mode:04o} {uid} {gid} -\n")
        };
        lines.push_str(&line);
    }
    fs::write(root.join("usr/lib/tmpfiles.d/bakehouse-var.conf"), lines)?;
    drop_path(root, "var/*")
}

/// tmpfiles.d's C-style quoting.
fn quoted(path: &Path) -> String {
    let text = path.to_string_lossy();
    if text.chars().any(|c| c.is_whitespace() || "\"'\\%".contains(c)) {
        format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\"").replace('%', "%%"))
    } else {
        text.into_owned()
    }
}
