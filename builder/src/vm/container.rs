//! Nodes as containers: the image's own systemd and services, in namespaces, as fast as this host is. For machines
//! without KVM, where emulated ones show what happens, but not how long it takes.
//!
//! What is not the image's: this host's kernel, so no verified root, a watchdog in shell, and WireGuard as a program
//! (`wireguard-go`). One that updates itself has the image's disk with both slots, and is started by what GRUB's
//! configuration says (`grub.rs`), in shell. Who cuts the power of one loses processes, not what the kernel has yet
//! to write.

use std::fs::{self, OpenOptions, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, Uid};

use super::command::Done;
use super::network::{HostForward, VirtualNic};
use super::start::VmOptions;
use crate::assemble::layout::{ESP_START, ROOT_START};
use crate::error::{Error, Result, fail};
use crate::project::machine_id::uuid_of;
use crate::util::fs::write_private;
use crate::util::process::run;

const SCRIPT: &str = include_str!("container.sh");
/// How long laying the file systems may take, and ending.
const PATIENCE: Duration = Duration::from_secs(30);

/// What the program serves one WireGuard interface with: as long as the kernel would, to the very end.
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
/// What the kernel's watchdog would be: it resets who opened it and then says nothing for too long. Patroni speaks to a
/// pipe as it does in its own tests: `Ctimeout=SECONDS`, a byte each time it lives, `V` when it is done. A reset is
/// the system call that restarts a machine at once; it ends all of the container's processes, and starts it again.
const WATCHDOG: &str = "\
[Unit]
Description=Watchdog of a container
DefaultDependencies=no
[Service]
Slice=system.slice
ExecStartPre=/bin/bash -c '[ -p /dev/watchdog ] || mkfifo -m 600 /dev/watchdog; chown postgres /dev/watchdog'
ExecStart=/bin/bash -c 'exec 3<>/dev/watchdog; limit=; \
while :; do \
if read -r -N 1 -u 3 $${limit:+-t $$limit} said; then \
case $$said in V) limit= ;; C) read -r -u 3 said; limit=$${said#timeout=} ;; esac; \
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
ExecStart=
ExecStart=/bin/sh -c 'sed \"s/^  mode: required/&\\\\n  driver: testing/\" $CREDENTIALS_DIRECTORY/patroni.yml \
>/run/postgresql/patroni.yml && exec /usr/lib/bakehouse/patroni /run/postgresql/patroni.yml'
";
/// This host's kernel may have no dummies: the mesh's own address is on one end of a pair.
const MESH: &str = "[NetDev]\nName=mesh0\nKind=veth\n[Peer]\nName=mesh0-end\n";
const MESH_END: &str = "[Match]\nName=mesh0-end\n[Link]\nRequiredForOnline=no\n[Network]\nLinkLocalAddressing=no\n";

/// The EFI partition is a folder there: nobody but systemd's own tools asks what it is on.
const ESP: &str = "[Service]\nEnvironment=SYSTEMD_ESP_PATH=/efi\n";

/// A node's container.
pub(super) struct Container<'a> {
    pub(super) node: &'a str,
    pub(super) dir: &'a Path,
}

impl Container<'_> {
    /// Whether the node was a container when it was last started.
    pub(super) fn is_one(dir: &Path) -> bool {
        dir.join("container.sh").exists()
    }

    /// It is a machine from now on.
    pub(super) fn was_one(dir: &Path) {
        let _ = fs::remove_file(dir.join("container.sh"));
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Takes what the node keeps, if it keeps something.
    pub(super) fn wipe(&self) -> Result<()> {
        let disk = self.path("disk.raw");
        if disk.exists() {
            fs::remove_file(&disk).map_err(Error::io("remove", &disk))?;
        }
        let kept = self.path("var");
        if kept.exists() { fs::remove_dir_all(&kept).map_err(Error::io("remove", &kept)) } else { Ok(()) }
    }

    /// The pid of its systemd, if it lives; when it restarts, there is none for a moment.
    pub(super) fn pid(&self) -> Option<Pid> {
        self.process("init")
    }

    /// Whether it is on.
    pub(super) fn is_running(&self) -> bool {
        self.process("outside").is_some()
    }

    /// Kills all that is in it.
    pub(super) fn cut_power(&self) {
        let until = Instant::now() + PATIENCE;
        while self.is_running() && Instant::now() < until {
            if let Some(pid) = self.pid() {
                // It may be gone already.
                let _ = kill(pid, Signal::SIGKILL);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The process that a file names, if it lives.
    fn process(&self, file: &str) -> Option<Pid> {
        let said = fs::read_to_string(self.path(file)).ok()?;
        let (pid, began) = said.trim().split_once(' ')?;
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name may have spaces; after it, the state is the third field and the start the 22nd.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        let lives = fields.first() != Some(&"Z") && fields.get(19) == Some(&began);
        pid.parse().ok().filter(|_| lives).map(Pid::from_raw)
    }

    /// # Errors
    /// Something of this host's is missing; the image can't be mounted.
    pub(super) fn start(&self, start: &VmOptions, interfaces: &[String]) -> Result<()> {
        if !Uid::effective().is_root() {
            return fail("containers are started by root; machines (`bakehouse up`) are not");
        }
        let mtools = start.keep.then_some(("mcopy", "mtools"));
        let needed = [("wireguard-go", "wireguard-go"), ("ip", "iproute2"), ("socat", "socat")];
        for (program, package) in needed.into_iter().chain(mtools) {
            let path = std::env::var_os("PATH").unwrap_or_default();
            if !std::env::split_paths(&path).any(|dir| dir.join(program).exists()) {
                return fail(format!("{program} is missing: apt install {package}"));
            }
        }
        let image = start.image.canonicalize().map_err(Error::io("find", start.image))?;
        for dir in ["var", "root", "credentials"] {
            fs::create_dir_all(self.path(dir)).map_err(Error::io("create", self.path(dir)))?;
        }
        // What the node keeps belongs to its own users, whose numbers others may have on this host.
        fs::set_permissions(self.dir, Permissions::from_mode(0o700)).map_err(Error::io("close", self.dir))?;
        if start.keep {
            self.lay_disk(&image, start.disk)?;
        }
        self.hand_in(start, interfaces)?;
        let wire = wire_of(&start.wire)?;
        let door = start.wire.door.as_ref();
        let inwards = door.filter(|door| door.address.is_some()).map_or(Vec::new(), |door| door.inwards().to_vec());
        let settings = [
            ("IMAGE", image.display().to_string()),
            ("OFFSET", ROOT_START.to_string()),
            ("DISK", if start.keep { "disk.raw".to_owned() } else { String::new() }),
            ("UUID", uuid_of(self.node)),
            ("CGROUP", control_groups()?.join(&wire).join(self.node).display().to_string()),
            ("WIRE", wire),
            ("MAC", start.wire.mac.clone()),
            ("PORT", start.wire.mac[start.wire.mac.len() - 5..].replace(':', "-")),
            ("HOST", HostForward::HOST.to_owned()),
            ("OUTWARDS", door.map_or(String::new(), |door| words(door.outside.iter()))),
            ("DOOR", door.and_then(|door| door.address).map_or(String::new(), |address| address.to_string())),
            ("INWARDS", words(inwards.iter().map(|(outside, inside)| format!("{outside}:{inside}")))),
        ];
        let text: String =
            settings.iter().map(|(name, value)| format!("{name}='{}'\n", value.replace('\'', r"'\''"))).collect();
        fs::write(self.path("settings"), text).map_err(Error::io("write", self.path("settings")))?;
        fs::write(self.path("container.sh"), SCRIPT).map_err(Error::io("write", self.path("container.sh")))?;
        let log = self.path("console.log");
        let console = OpenOptions::new().create(true).append(true).open(&log).map_err(Error::io("open", &log))?;
        let dir = self.dir.canonicalize().map_err(Error::io("find", self.dir))?;
        // In a session of its own: it outlives this command, and Ctrl-C.
        let mut script = Command::new("setsid");
        script.arg("sh").arg(dir.join("container.sh")).arg("outside").arg(&dir);
        script.stdin(Stdio::null()).stdout(Stdio::null()).stderr(console);
        let mut child = script.spawn().map_err(|e| Error::Failed(format!("setsid does not start: {e}")))?;
        let until = Instant::now() + PATIENCE;
        while self.pid().is_none() {
            if child.try_wait().is_ok_and(|ended| ended.is_some()) || Instant::now() > until {
                return fail(format!("{} does not start: see {}", self.node, log.display()));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// The disk of one that updates itself: the image, and what is on its EFI partition as files, for kernels that
    /// know no FAT.
    fn lay_disk(&self, image: &Path, size: u64) -> Result<()> {
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

    /// Its credentials, and what its units need to know of where they are.
    fn hand_in(&self, start: &VmOptions, interfaces: &[String]) -> Result<()> {
        let units: Vec<String> = interfaces.iter().map(|name| format!("wireguard-go@{name}.service")).collect();
        let wanted = format!("[Unit]\nWants={0}\nAfter={0}\n", units.join(" "));
        let ours = [
            ("systemd.extra-unit.wireguard-go@.service", WIREGUARD),
            // After the image's own, which are sorted by name.
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

    /// Pulls the cable, or puts it back.
    pub(super) fn plug(&self, plugged: bool) -> Result<()> {
        let setting = |name: &str| -> Result<String> {
            let path = self.path("settings");
            let text = fs::read_to_string(&path).map_err(Error::io("read", &path))?;
            let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix("='")?.strip_suffix('\''));
            value.map(str::to_owned).ok_or_else(|| Error::Failed(format!("{}: no {name}", path.display())))
        };
        let mut ip = Command::new("ip");
        ip.args(["-n", &setting("WIRE")?, "link", "set", &setting("PORT")?, if plugged { "up" } else { "down" }]);
        run(&mut ip, "ip")
    }

    /// Runs a shell command as root inside.
    pub(super) fn exec(&self, command: &str, patience: Duration) -> Result<Done> {
        let until = Instant::now() + patience;
        let pid = loop {
            match self.pid() {
                Some(pid) => break pid,
                None if self.is_running() && Instant::now() < until => std::thread::sleep(Duration::from_millis(50)),
                None => return fail(format!("{} was switched off", self.node)),
            }
        };
        let mut enter = Command::new("nsenter");
        enter.args(["--target", &pid.to_string(), "--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--"]);
        enter.args(["env", "-i", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin", "bash", "-c"]);
        enter.arg(format!("exec 2>&1\n{command}")).stdin(Stdio::null());
        let (send, receive) = std::sync::mpsc::channel();
        std::thread::spawn(move || send.send(enter.output()));
        let told = |e: &dyn std::fmt::Display| Error::Failed(format!("{} does not answer: {e}", self.node));
        let output = receive.recv_timeout(patience).map_err(|e| told(&e))?.map_err(|e| told(&e))?;
        if self.pid() != Some(pid) {
            return fail(format!("{} was switched off", self.node));
        }
        let output = (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned());
        Ok(Done { status: output.0.unwrap_or(-1), output: output.1 })
    }
}

/// Name of the network namespace with the bridge that is the fleet's wire.
fn name_of(wire: &VirtualNic) -> String {
    format!("bakehouse-{}", wire.group.replace([':', '.'], "-"))
}

/// Takes the wire away, if it is there; nobody is on it any more.
pub(super) fn take_away(wire: &VirtualNic) -> Result<()> {
    let name = name_of(wire);
    if !Path::new("/run/netns").join(&name).exists() {
        return Ok(());
    }
    run(Command::new("ip").args(["netns", "delete", &name]), "ip")
}

/// The fleet's wire.
fn wire_of(wire: &VirtualNic) -> Result<String> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let name = name_of(wire);
    if !Path::new("/run/netns").join(&name).exists() {
        let ip = |words: &[&str]| run(Command::new("ip").args(words), "ip (apt install iproute2)");
        ip(&["netns", "add", &name])?;
        ip(&["-n", &name, "link", "add", "wire", "type", "bridge"])?;
        ip(&["-n", &name, "link", "set", "wire", "up"])?;
    }
    Ok(name)
}

/// Where the second version of control groups is mounted.
fn control_groups() -> Result<PathBuf> {
    let path = Path::new("/proc/self/mounts");
    let mounts = fs::read_to_string(path).map_err(Error::io("read", path))?;
    let place = mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let place = fields.next()?;
        (fields.next()? == "cgroup2").then(|| PathBuf::from(place))
    });
    place.ok_or_else(|| {
        Error::Failed("containers need control groups, version 2; this host has none mounted".to_owned())
    })
}

fn words<T: ToString>(of: impl Iterator<Item = T>) -> String {
    of.map(|word| word.to_string()).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The names that an entry may have, tried in this order.
    #[test]
    fn a_container_looks_for_entries_where_grub_does() {
        let names = |text: &str| text.lines().map(str::trim).find(|l| l.starts_with("for end in ")).map(str::to_owned);
        assert!(names(SCRIPT).is_some());
        assert_eq!(names(SCRIPT), names(crate::assemble::grub::CONFIG));
    }

    /// What its unit runs, but for what it does then.
    #[test]
    fn the_watchdog_bites_who_falls_silent_and_nobody_else() {
        let (start, end) = ("ExecStart=/bin/bash -c '", "'\nRestart=");
        let script = WATCHDOG.split_once(start).and_then(|(_, rest)| rest.split_once(end)).unwrap().0;
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("watchdog");
        run(Command::new("mkfifo").arg(&pipe), "mkfifo").unwrap();
        let script = script.replace("$$", "$").replace("/dev/watchdog", pipe.to_str().unwrap());
        let mut bash = Command::new("bash");
        let mut dog = bash.args(["-c", &format!("reboot() {{ exit 7; }}\n{script}")]).spawn().unwrap();
        // Both ends, as Patroni has it: it does not wait for who reads.
        let mut patroni = OpenOptions::new().read(true).write(true).open(&pipe).unwrap();
        let mut say = |what: &str| std::io::Write::write_all(&mut patroni, what.as_bytes()).unwrap();
        let wait = || std::thread::sleep(Duration::from_secs(1));
        let mut lives = || dog.try_wait().unwrap().is_none();
        wait();
        assert!(lives(), "nobody has opened it");
        say("Ctimeout=2\n");
        for _ in 0..3 {
            say("1");
            wait();
            assert!(lives(), "it hears of Patroni in time");
        }
        say("V");
        (0..3).for_each(|_| wait());
        assert!(lives(), "Patroni has closed it");
        say("Ctimeout=1\n1");
        assert_eq!(dog.wait().unwrap().code(), Some(7));
    }

    #[test]
    fn a_process_is_itself_and_no_other() {
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
        // Another has its number by now; who wrote it has not come so far; nobody has it.
        for said in [format!("{own} {}\n", began - 1), format!("{own}"), String::new(), format!("{} {began}", i32::MAX)]
        {
            fs::write(dir.path().join("outside"), &said).unwrap();
            assert!(!container.is_running(), "{said}");
        }
    }
}
