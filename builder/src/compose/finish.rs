//! Turns a configured tree into the tree of an image. Removes the files that belong to the build or to one node, and
//! replaces the content of /var by tmpfiles.d lines that create it on the node.

use std::fmt::Write as _;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use walkdir::WalkDir;

use crate::error::{Error, Result};
use crate::sandbox::chroot::Commands;
use crate::sandbox::tree_root::Runner;

/// Paths to remove, relative to the root. A trailing `/*` empties a folder.
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

/// Folders that the node keeps on its own disk: link → target.
const IN_VAR: [(&str, &str); 4] =
    [("root", "var/roothome"), ("home", "var/home"), ("srv", "var/srv"), ("usr/local", "../var/usrlocal")];

/// Turns the tree into the tree of an image, and writes the kernel to `vmlinuz`. Returns the kernel's version.
pub(super) fn finish(root: &Path, runner: &Runner, vmlinuz: &mut File) -> Result<String> {
    let context = |action: &'static str| Error::cannot::<io::Error>(action);
    if root.join("usr/bin/python3").exists() {
        compile_python(root, runner)?;
    }
    let kernel = take_kernel(root, vmlinuz).map_err(context("take the kernel"))?;
    for path in DROPPED {
        drop_path(root, path).map_err(Error::cannot(format!("remove {path}")))?;
    }
    private_keys(root).map_err(context("remove keys"))?;
    disable_units(root).map_err(context("disable units"))?;
    shadow_without_dates(root).map_err(context("clean etc/shadow"))?;
    var_to_factory(root).map_err(context("empty /var"))?;
    for (link, target) in IN_VAR {
        symlink(target, root.join(link)).map_err(context("link into /var"))?;
    }
    // var/tmp: services with `PrivateTmp=` start before /var is mounted.
    for dir in ["boot", "dev", "efi", "mnt", "opt", "proc", "run", "sys", "tmp", "var/tmp"] {
        fs::create_dir_all(root.join(dir)).map_err(context("create a folder"))?;
    }
    // systemd mounts the node's machine id over the empty file.
    fs::write(root.join("etc/machine-id"), "").map_err(context("write etc/machine-id"))?;
    Ok(kernel)
}

/// Compiles Python's modules. A `.pyc` file has the hash of its source instead of the time, because times change later.
fn compile_python(root: &Path, runner: &Runner) -> Result<()> {
    let mut args: Vec<String> =
        ["python3", "-m", "compileall", "-q", "-j0", "--invalidation-mode", "unchecked-hash"].map(str::to_owned).into();
    let dirs = fs::read_dir(root.join("usr/lib")).map_err(Error::io("read", "/usr/lib"))?.flatten();
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
        return Err(io::Error::other(format!("the image must have exactly one kernel, but has {}", versions.len())));
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

/// Removes keys that maintainer scripts have created. They would be the same on all nodes.
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

/// Disables all units. Packages enable their services when installed, but an image starts only those of its profiles.
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

/// Replaces the third field, the day of the last password change, which is the day of the build.
fn shadow_without_dates(root: &Path) -> io::Result<()> {
    let path = root.join("etc/shadow");
    let text = fs::read_to_string(&path)?;
    let mut clean = String::new();
    for line in text.lines() {
        let fields: Vec<&str> = line.split(':').collect();
        for (i, field) in fields.iter().enumerate() {
            let field = match i {
                // An empty field would allow a login without a password.
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

/// Moves the packages' files in /var to /usr/share/factory. systemd-tmpfiles creates /var from them on the node.
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

/// Quotes a path in the C style of tmpfiles.d.
fn quoted(path: &Path) -> String {
    let text = path.to_string_lossy();
    if text.chars().any(|c| c.is_whitespace() || "\"'\\%".contains(c)) {
        format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\"").replace('%', "%%"))
    } else {
        text.into_owned()
    }
}
