//! Configures packages: dpkg runs their maintainer scripts inside the tree, without access to the host.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use crate::error::{Error, Result, fail};
use crate::sandbox::chroot::Commands;
use crate::sandbox::tree_root::Runner;

const NO_OP: &str = "#!/bin/sh\nexit 0\n";

/// Programs that maintainer scripts call, and the scripts that replace them: program → replacement.
const STAND_INS: [(&str, &str); 9] = [
    // The builder composes the initrd from the tree's files.
    ("/usr/sbin/update-initramfs", NO_OP),
    // The builder runs depmod once, in parallel with the scripts.
    ("/usr/sbin/depmod", NO_OP),
    // The builder runs compileall once over all files, with hashes instead of times.
    ("/usr/bin/py3compile", NO_OP),
    // Patroni creates the database cluster on the node.
    ("/usr/bin/pg_createcluster", NO_OP),
    // A key that is created during the build would be the same on all nodes.
    ("/usr/sbin/make-ssl-cert", NO_OP),
    // Profiles enable units; each of these calls takes 0.2 s.
    ("/usr/bin/deb-systemd-helper", NO_OP),
    ("/usr/bin/deb-systemd-invoke", NO_OP),
    // Writes only the bundle, which OpenSSL, GnuTLS and curl read by default. Hashing the 150 certificates of the
    // folder would take 1 s, twice.
    (
        "/usr/sbin/update-ca-certificates",
        "#!/bin/sh\nset -e\ncd /etc/ssl/certs\n\
         sed -e '/^$/d;/^[#!]/d;s,^,/usr/share/ca-certificates/,' /etc/ca-certificates.conf |\n\
         xargs sed -e '$a\\' > ca-certificates.crt\nchmod 644 ca-certificates.crt\n",
    ),
    // The build starts no services.
    ("/usr/sbin/policy-rc.d", "#!/bin/sh\nexit 101\n"),
];

/// Configures the unpacked packages, `essential` first.
pub(super) fn configure(
    root: &Path,
    runner: &Runner,
    names: &[String],
    essential: &[String],
    users: &BTreeMap<String, (u32, String, bool)>,
) -> Result<()> {
    let has = |name: &str| names.iter().any(|n| n == name);
    // dpkg would run preinst scripts before it unpacks a package. On a new tree they may run afterwards: there are no
    // older files to convert, and the database that they read exists already.
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
                "DPKG_MAINTSCRIPT_PACKAGE={package} /{file} install || \
                 {{ echo 'preinst of {package} failed' >&2; exit 1; }}"
            );
        }
    }
    let script = vec!["/bin/sh".to_owned(), "-c".to_owned(), script];
    runner.run(Commands::new(vec![script]).with_stand_ins(&STAND_INS))?;
    seed_users(root, users).map_err(Error::cannot("write the fixed users"))?;
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
    // depmod takes half as long as the scripts, and does not depend on them.
    std::thread::scope(|scope| {
        let modules = scope.spawn(|| depmod(root, runner, names));
        runner.run(Commands::new(commands).with_stand_ins(&STAND_INS))?;
        modules.join().unwrap_or_else(|_| fail("depmod panicked"))
    })
}

/// Indexes the modules of the kernel, if these packages include one.
fn depmod(root: &Path, runner: &Runner, names: &[String]) -> Result<()> {
    let mut kernels = names.iter().filter_map(|n| n.strip_prefix("linux-image-"));
    let Some(version) = kernels.find(|v| root.join("usr/lib/modules").join(v).is_dir()) else { return Ok(()) };
    runner.run(Commands::new(vec![["/usr/sbin/depmod", version].map(str::to_owned).into()]))
}

/// Adds the users with fixed ids before a maintainer script can assign another id.
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
            // `*`: no password. pwconv moves it to the shadow file.
            add("etc/passwd", name, format!("{name}:*:{id}:{id}::{home}:/usr/sbin/nologin\n"))?;
        }
    }
    Ok(())
}
