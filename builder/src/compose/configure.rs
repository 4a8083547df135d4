//! Maintainer scripts: run by dpkg itself, inside the tree, with nothing of the host in it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use crate::sandbox::chroot::Commands;
use crate::sandbox::tree_root::Runner;

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
    runner: &Runner,
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
    let script = vec!["/bin/sh".to_owned(), "-c".to_owned(), script];
    runner.run(Commands::new(vec![script]).with_stand_ins(&STAND_INS))?;
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
        let modules = scope.spawn(|| depmod(root, runner, names));
        runner.run(Commands::new(commands).with_stand_ins(&STAND_INS))?;
        modules.join().map_err(|_| "depmod panicked".to_owned())?
    })
}

/// Indexes the modules of a kernel that came with these packages.
fn depmod(root: &Path, runner: &Runner, names: &[String]) -> Result<(), String> {
    let mut kernels = names.iter().filter_map(|n| n.strip_prefix("linux-image-"));
    let Some(version) = kernels.find(|v| root.join("usr/lib/modules").join(v).is_dir()) else { return Ok(()) };
    runner.run(Commands::new(vec![["/usr/sbin/depmod", version].map(str::to_owned).into()]))
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
