//! Nodes as containers: the image's systemd and services in namespaces, at the host's speed. They are for hosts without
//! KVM, where emulated machines behave as real ones but are too slow to measure times.
//!
//! Some parts differ from a machine. The kernel is the host's, so the root file system is not verified. The watchdog is
//! a shell script, and WireGuard is a program (`wireguard-go`). A container that updates itself has the image's disk
//! with root A and root B, and `container.sh` selects the boot entry as GRUB's configuration does (`grub.rs`). A power
//! failure kills the processes, but the host's kernel still writes its page cache to the disk.

use std::fs::{self, OpenOptions, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, Uid};

use super::command::Done;
use super::enter;
use super::network::{HostForward, VirtualNic};
use super::start::VmOptions;
use crate::assemble::layout::{ESP_START, ROOT_START};
use crate::error::{Error, Result, fail};
use crate::project::machine_id::uuid_of;
use crate::util::fs::write_private;
use crate::util::process::run;

const SCRIPT: &str = include_str!("container.sh");
/// Time to mount the file systems and start systemd, and time to stop.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Unit for one WireGuard interface. systemd does not stop it at shutdown, because services that stop use the mesh.
const WIREGUARD: &str = "\
[Unit]
Description=WireGuard interface %i
DefaultDependencies=no
[Service]
Slice=system.slice
ExecStart=/run/host/wireguard-go -f %i
ExecStartPost=/bin/sh -c 'until [ -S /run/wireguard/%i.sock ]; do sleep 0.05; done'
Restart=always
";
/// Unit that replaces the kernel's watchdog: it resets the container if Patroni opens the watchdog and then stops
/// writing to it. With the driver that Patroni has for its own tests, Patroni writes to a pipe: `Ctimeout=SECONDS`, a
/// byte as keepalive, and `V` to disarm the watchdog. `reboot -ffn` calls `reboot(2)`, which kills all processes of the
/// container; `container.sh` then starts the container again.
const WATCHDOG: &str = "\
[Unit]
Description=Watchdog of a container
DefaultDependencies=no
[Service]
Slice=system.slice
ExecStartPre=/bin/bash -c '[ -p /dev/watchdog ] || mkfifo -m 600 /dev/watchdog; chown postgres /dev/watchdog'
ExecStart=/bin/bash -c 'exec 3<>/dev/watchdog; limit=; \
while :; do \
if read -r -N 1 -u 3 $${limit:+-t $$limit} input; then \
case $$input in V) limit= ;; C) read -r -u 3 input; limit=$${input#timeout=} ;; esac; \
else reboot -ffn; fi; \
done'
Restart=always
";
const SOFTDOG: &str = "\
[Unit]
Requires=container-watchdog.service
After=container-watchdog.service
[Service]
ExecStart=
ExecStart=/bin/true
";
const PATRONI: &str = "\
[Service]
ExecStartPre=+/bin/sh -c 'printf \"watchdog:\\n  driver: testing\\n\" >/run/bakehouse/patroni.d/testing.yml'
ExecStartPre=+/bin/chmod 0644 /run/bakehouse/patroni.d/testing.yml
";
/// The host's kernel may lack dummy interfaces, so one end of a veth pair has the mesh address.
const MESH: &str = "[NetDev]\nName=mesh0\nKind=veth\n[Peer]\nName=mesh0-end\n";
const MESH_END: &str = "[Match]\nName=mesh0-end\n[Link]\nRequiredForOnline=no\n[Network]\nLinkLocalAddressing=no\n";

/// In a container, the EFI partition is a folder. systemd's tools need its path, because they find no partition.
const ESP: &str = "[Service]\nEnvironment=SYSTEMD_ESP_PATH=/efi\n";

/// A node's container.
pub(super) struct Container<'a> {
    pub(super) node: &'a str,
    pub(super) dir: &'a Path,
}

impl Container<'_> {
    /// Returns whether the node last started as a container.
    pub(super) fn exists(dir: &Path) -> bool {
        dir.join("container.sh").exists()
    }

    /// Records that the node starts as a machine.
    pub(super) fn forget(dir: &Path) {
        let _ = fs::remove_file(dir.join("container.sh"));
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Removes the node's disk and `/var`, if they exist.
    pub(super) fn wipe(&self) -> Result<()> {
        let disk = self.path("disk.raw");
        if disk.exists() {
            fs::remove_file(&disk).map_err(Error::io("remove", &disk))?;
        }
        let kept = self.path("var");
        if kept.exists() { fs::remove_dir_all(&kept).map_err(Error::io("remove", &kept)) } else { Ok(()) }
    }

    /// Returns the pid of the container's systemd, or `None` while the container restarts or is off.
    pub(super) fn pid(&self) -> Option<Pid> {
        self.process("init")
    }

    /// Returns whether the container runs.
    pub(super) fn is_running(&self) -> bool {
        self.process("outside").is_some()
    }

    /// Kills all processes of the container.
    pub(super) fn cut_power(&self) {
        let until = Instant::now() + TIMEOUT;
        while self.is_running() && Instant::now() < until {
            if let Some(pid) = self.pid() {
                // The process may have exited in between.
                let _ = kill(pid, Signal::SIGKILL);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Returns the process that a file names, if it runs. The file has its pid and its start time, because the kernel
    /// may give the same pid to another process.
    fn process(&self, file: &str) -> Option<Pid> {
        let text = fs::read_to_string(self.path(file)).ok()?;
        let (pid, began) = text.trim().split_once(' ')?;
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // proc_pid_stat(5): the name, which may contain spaces, then the state (field 3) and the start time (field 22).
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        let runs = fields.first() != Some(&"Z") && fields.get(19) == Some(&began);
        pid.parse().ok().filter(|_| runs).map(Pid::from_raw)
    }

    /// Starts the container.
    ///
    /// # Errors
    /// If the caller is not root, the host lacks a program, or the image cannot be mounted.
    pub(super) fn start(&self, start: &VmOptions, interfaces: &[String]) -> Result<()> {
        if !Uid::effective().is_root() {
            return fail("only root can start containers\n  help: use sudo, or start machines with `bakehouse up`");
        }
        let mtools = start.keep.then_some(("mcopy", "mtools"));
        let needed = [("wireguard-go", "wireguard-go"), ("ip", "iproute2"), ("socat", "socat")];
        for (program, package) in needed.into_iter().chain(mtools) {
            let path = std::env::var_os("PATH").unwrap_or_default();
            if !std::env::split_paths(&path).any(|dir| dir.join(program).exists()) {
                return fail(format!("cannot find the program {program}\n  help: apt install {package}"));
            }
        }
        let image = start.image.canonicalize().map_err(Error::io("find", start.image))?;
        for dir in ["var", "root", "credentials"] {
            fs::create_dir_all(self.path(dir)).map_err(Error::io("create", self.path(dir)))?;
        }
        // The node's files belong to users of the image. Users of this host may have the same ids.
        fs::set_permissions(self.dir, Permissions::from_mode(0o700)).map_err(Error::io("make private", self.dir))?;
        if start.keep {
            self.create_disk(&image, start.disk)?;
        }
        self.write_credentials(start, interfaces)?;
        let lan = create_lan(&start.nic)?;
        let forward = start.nic.forward.as_ref();
        let inwards = forward
            .filter(|forward| forward.address.is_some())
            .map_or(Vec::new(), |forward| forward.inwards().to_vec());
        let settings = [
            ("IMAGE", image.display().to_string()),
            ("OFFSET", ROOT_START.to_string()),
            ("DISK", if start.keep { "disk.raw".to_owned() } else { String::new() }),
            ("UUID", uuid_of(self.node)),
            ("CGROUP", cgroup_root()?.join(&lan).join(self.node).display().to_string()),
            ("WIRE", lan),
            ("MAC", start.nic.mac.clone()),
            ("PORT", start.nic.mac[start.nic.mac.len() - 5..].replace(':', "-")),
            ("HOST", HostForward::HOST.to_owned()),
            ("OUTWARDS", forward.map_or(String::new(), |forward| joined(forward.outside.iter()))),
            ("DOOR", forward.and_then(|forward| forward.address).map_or(String::new(), |address| address.to_string())),
            ("INWARDS", joined(inwards.iter().map(|(outside, inside)| format!("{outside}:{inside}")))),
        ];
        let text: String =
            settings.iter().map(|(name, value)| format!("{name}='{}'\n", value.replace('\'', r"'\''"))).collect();
        fs::write(self.path("settings"), text).map_err(Error::io("write", self.path("settings")))?;
        fs::write(self.path("container.sh"), SCRIPT).map_err(Error::io("write", self.path("container.sh")))?;
        let log = self.path("console.log");
        let console = OpenOptions::new().create(true).append(true).open(&log).map_err(Error::io("open", &log))?;
        let dir = self.dir.canonicalize().map_err(Error::io("find", self.dir))?;
        // A new session, so that the container outlives this command and ignores its Ctrl-C.
        let mut script = Command::new("setsid");
        script.arg("sh").arg(dir.join("container.sh")).arg("outside").arg(&dir);
        script.stdin(Stdio::null()).stdout(Stdio::null()).stderr(console);
        let mut child = script.spawn().map_err(Error::cannot("run setsid"))?;
        let until = Instant::now() + TIMEOUT;
        while self.pid().is_none() {
            if child.try_wait().is_ok_and(|status| status.is_some()) || Instant::now() > until {
                let log = log.display();
                return fail(format!("the container of {} does not start\n  help: the reason is in {log}", self.node));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Creates the disk of a container that updates itself. Copies the files of its EFI partition to a folder, because
    /// the host's kernel may lack FAT.
    fn create_disk(&self, image: &Path, size: u64) -> Result<()> {
        let (disk, new, esp) = (self.path("disk.raw"), self.path("disk.new"), self.path("esp"));
        if disk.exists() {
            return Ok(());
        }
        run(Command::new("cp").args(["--reflink=auto", "--sparse=always"]).args([image, &new]), "cp")?;
        OpenOptions::new().write(true).open(&new).and_then(|f| f.set_len(size)).map_err(Error::io("size", &new))?;
        if esp.exists() {
            fs::remove_dir_all(&esp).map_err(Error::io("remove", &esp))?;
        }
        fs::create_dir(&esp).map_err(Error::io("create", &esp))?;
        let from = format!("{}@@{ESP_START}", new.display());
        run(Command::new("mcopy").args(["-s", "-i", &from, "::*"]).arg(&esp), "mcopy")?;
        fs::rename(&new, &disk).map_err(Error::io("name", &disk))
    }

    /// Writes the node's credentials, and units and drop-ins for a container.
    fn write_credentials(&self, start: &VmOptions, interfaces: &[String]) -> Result<()> {
        let units: Vec<String> = interfaces.iter().map(|name| format!("wireguard-go@{name}.service")).collect();
        let wanted = format!("[Unit]\nWants={0}\nAfter={0}\n", units.join(" "));
        let ours = [
            ("systemd.extra-unit.wireguard-go@.service", WIREGUARD),
            // `~container` sorts after the names of the image's drop-ins, so systemd applies it last.
            ("systemd.unit-dropin.firstboot.service~container", &wanted),
            ("systemd.extra-unit.container-watchdog.service", WATCHDOG),
            ("systemd.unit-dropin.softdog.service~container", SOFTDOG),
            ("systemd.unit-dropin.patroni.service~container", PATRONI),
            ("systemd.unit-dropin.firstboot-check.service~container", ESP),
            ("systemd.unit-dropin.firstboot-install.service~container", ESP),
            ("network.netdev.10-mesh0", MESH),
            ("network.network.04-mesh0-end", MESH_END),
        ];
        let dir = self.path("credentials");
        fs::remove_dir_all(&dir).and_then(|()| fs::create_dir(&dir)).map_err(Error::io("empty", &dir))?;
        for (name, content) in ours {
            write_private(&dir.join(name), content.as_bytes())?;
        }
        for (name, content) in &start.credentials {
            write_private(&dir.join(name), content)?;
        }
        Ok(())
    }

    /// Takes the container's network interface down, or brings it up.
    pub(super) fn plug(&self, plugged: bool) -> Result<()> {
        let setting = |name: &str| -> Result<String> {
            let path = self.path("settings");
            let text = fs::read_to_string(&path).map_err(Error::io("read", &path))?;
            let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix("='")?.strip_suffix('\''));
            value.map(str::to_owned).ok_or_else(|| Error::Failed(format!("{} has no {name}", path.display())))
        };
        let mut ip = Command::new("ip");
        ip.args(["-n", &setting("WIRE")?, "link", "set", &setting("PORT")?, if plugged { "up" } else { "down" }]);
        run(&mut ip, "ip")
    }

    /// Runs a shell command as root in the container.
    pub(super) fn exec(&self, command: &str, timeout: Duration) -> Result<Done> {
        let until = Instant::now() + timeout;
        let pid = loop {
            match self.pid() {
                Some(pid) => break pid,
                None if self.is_running() && Instant::now() < until => std::thread::sleep(Duration::from_millis(50)),
                None => return fail(format!("{} was switched off", self.node)),
            }
        };
        let left = until.saturating_duration_since(Instant::now());
        let done = enter::output(enter::command(pid, command), left, self.node)?;
        if self.pid() != Some(pid) {
            return fail(format!("{} was switched off", self.node));
        }
        Ok(done)
    }
}

/// Returns the name of the network namespace with the bridge that connects the fleet's containers.
fn lan_name(nic: &VirtualNic) -> String {
    format!("bakehouse-{}", nic.group.replace([':', '.'], "-"))
}

/// Removes the network namespace of the fleet's local network, if it exists. All containers must be off.
pub(super) fn remove_lan(nic: &VirtualNic) -> Result<()> {
    let name = lan_name(nic);
    if !Path::new("/run/netns").join(&name).exists() {
        return Ok(());
    }
    run(Command::new("ip").args(["netns", "delete", &name]), "ip")
}

/// Creates the network namespace of the fleet's local network, if it does not exist. Returns its name.
fn create_lan(nic: &VirtualNic) -> Result<String> {
    static LOCK: Mutex<()> = Mutex::new(());
    let _guard = LOCK.lock().unwrap_or_else(PoisonError::into_inner);
    let name = lan_name(nic);
    if !Path::new("/run/netns").join(&name).exists() {
        let ip = |args: &[&str]| run(Command::new("ip").args(args), "ip (apt install iproute2)");
        ip(&["netns", "add", &name])?;
        ip(&["-n", &name, "link", "add", "wire", "type", "bridge"])?;
        ip(&["-n", &name, "link", "set", "wire", "up"])?;
    }
    Ok(name)
}

/// Returns the mount point of the cgroup v2 hierarchy.
fn cgroup_root() -> Result<PathBuf> {
    let path = Path::new("/proc/self/mounts");
    let mounts = fs::read_to_string(path).map_err(Error::io("read", path))?;
    let root = mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let mount_point = fields.next()?;
        (fields.next()? == "cgroup2").then(|| PathBuf::from(mount_point))
    });
    root.ok_or_else(|| Error::Failed("containers need cgroup v2, which this host has not mounted".to_owned()))
}

fn joined<T: ToString>(items: impl Iterator<Item = T>) -> String {
    items.map(|item| item.to_string()).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Compares the names of boot entries, and their order.
    #[test]
    fn container_and_grub_try_the_same_boot_entries() {
        let names = |text: &str| text.lines().map(str::trim).find(|l| l.starts_with("for end in ")).map(str::to_owned);
        assert!(names(SCRIPT).is_some());
        assert_eq!(names(SCRIPT), names(crate::assemble::grub::CONFIG));
    }

    /// Runs the unit's script, with an exit in place of the reboot.
    #[test]
    fn watchdog_resets_only_after_missed_keepalives() {
        let (start, end) = ("ExecStart=/bin/bash -c '", "'\nRestart=");
        let script = WATCHDOG.split_once(start).and_then(|(_, rest)| rest.split_once(end)).unwrap().0;
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("watchdog");
        run(Command::new("mkfifo").arg(&pipe), "mkfifo").unwrap();
        let script = script.replace("$$", "$").replace("/dev/watchdog", pipe.to_str().unwrap());
        let mut bash = Command::new("bash");
        let mut watchdog = bash.args(["-c", &format!("reboot() {{ exit 7; }}\n{script}")]).spawn().unwrap();
        // For reading and writing, as Patroni opens it, so that open() does not block.
        let mut patroni = OpenOptions::new().read(true).write(true).open(&pipe).unwrap();
        let mut write = |text: &str| std::io::Write::write_all(&mut patroni, text.as_bytes()).unwrap();
        let wait = || std::thread::sleep(Duration::from_secs(1));
        let mut runs = || watchdog.try_wait().unwrap().is_none();
        wait();
        assert!(runs(), "it reset before Patroni armed it");
        write("Ctimeout=2\n");
        for _ in 0..3 {
            write("1");
            wait();
            assert!(runs(), "it reset despite keepalives");
        }
        write("V");
        (0..3).for_each(|_| wait());
        assert!(runs(), "it reset after Patroni disarmed it");
        write("Ctimeout=1\n1");
        assert_eq!(watchdog.wait().unwrap().code(), Some(7));
    }

    #[test]
    fn a_process_is_identified_by_pid_and_start_time() {
        let dir = tempfile::tempdir().unwrap();
        let container = Container { node: "hub-1", dir: dir.path() };
        assert!(container.pid().is_none() && !container.is_running());
        let stat = fs::read_to_string("/proc/self/stat").unwrap();
        let began: u64 = stat.rsplit_once(')').unwrap().1.split_whitespace().nth(19).unwrap().parse().unwrap();
        let own = Pid::this();
        for file in ["init", "outside"] {
            fs::write(dir.path().join(file), format!("{own} {began}\n")).unwrap();
        }
        assert_eq!(container.pid(), Some(own));
        assert!(container.is_running());
        // Another process has the pid, the file is incomplete, the file is empty, no process has the pid.
        for text in [format!("{own} {}\n", began - 1), format!("{own}"), String::new(), format!("{} {began}", i32::MAX)]
        {
            fs::write(dir.path().join("outside"), &text).unwrap();
            assert!(!container.is_running(), "{text}");
        }
    }
}
