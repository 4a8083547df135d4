//! One machine: its files, its power, QEMU's command line and monitor.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect};
use nix::unistd::Pid;

use super::command::{EXEC_UNIT, EXEC_WANTED, last_word};
use super::container::Container;
use super::firmware::{Firmware, accelerator, is_emulated};
use super::start::{Netboot, VmOptions};
use crate::error::{Error, Result, fail};
use crate::progress::Step;
use crate::project::Project;
use crate::project::machine_id::uuid_of;
use crate::util::fs::{private_dir, write_private};
use crate::util::process::run;

/// Before what the agent says on the console.
pub(super) const AGENT: &str = "bakehouse: ";
/// What it says when its node serves.
pub(super) const READY: &str = "bakehouse: ready";
/// Emulated machines take their time.
const BOOT_TIMEOUT: Duration = Duration::from_secs(1800);
const STARTED_AGAIN: &str = "bakehouse: the emulated processors have stopped; switched off and on";
/// Room on the disk beyond what the node's roles ask for; the file holds only what is written.
pub(super) const SPARE_DISK: u64 = 4 << 30;

/// A node's machine, running or not.
pub struct Vm {
    pub node: String,
    dir: PathBuf,
}

pub(super) fn host_cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Processors that are worth emulating in each of so many machines: a kernel waits for each of its
/// own to answer, and one that the host does not run answers late. (Two in each of three machines on
/// a host of two: most of the time went into that.)
fn emulated(wished: u16, machines: usize, host: usize) -> u16 {
    let share = host / machines.max(1);
    wished.min(u16::try_from(share).unwrap_or(u16::MAX)).max(1)
}

impl Vm {
    /// The machine of a node of this fleet.
    ///
    /// # Errors
    /// No such node.
    pub fn of(project: &Project, node: &str) -> Result<Self> {
        project.node(node)?;
        Ok(Self::at(node, project.dir.join("build/vm").join(node)))
    }

    /// A machine whose files are in `dir`.
    #[must_use]
    pub fn at(node: &str, dir: PathBuf) -> Self {
        Self { node: node.to_owned(), dir }
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Where it is no machine.
    pub(super) fn container(&self) -> Option<Container<'_>> {
        Container::is_one(&self.dir).then_some(Container { node: &self.node, dir: &self.dir })
    }

    /// Takes all that the machine keeps.
    ///
    /// # Errors
    /// It can't be removed.
    pub fn wipe(&self) -> Result<()> {
        match self.container() {
            Some(container) => container.wipe(),
            None => fs::remove_file(self.disk()).map_err(Error::io("remove", self.disk())),
        }
    }

    /// The machine's disk: a qcow2 over the image.
    #[must_use]
    pub fn disk(&self) -> PathBuf {
        self.path("disk.qcow2")
    }

    /// Whether QEMU lives: it holds a lock on its pid's file, whatever became of the number.
    #[must_use]
    pub fn is_running(&self) -> bool {
        if let Some(container) = self.container() {
            return container.is_running();
        }
        let Ok(file) = File::open(self.path("pid")) else { return false };
        let mut lock = libc::flock {
            l_type: libc::F_RDLCK as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: 0,
            l_len: 0,
            l_pid: 0,
        };
        let asked = fcntl(&file, FcntlArg::F_GETLK(&mut lock));
        asked.is_ok() && lock.l_type != libc::F_UNLCK as libc::c_short
    }

    /// Starts the machine; its disk is made when there is none, or when the image is another.
    ///
    /// # Errors
    /// QEMU or the firmware is missing, or does not start.
    pub fn start(&self, start: &VmOptions) -> Result<()> {
        // Disks, consoles and firmware variables hold what the node holds: its keys and the fleet's passwords.
        if let Some(all) = self.dir.parent().filter(|dir| dir.ends_with("build/vm")) {
            private_dir(all)?;
        }
        private_dir(&self.dir)?;
        let image = start.image.canonicalize().map_err(Error::io("find", start.image))?;
        let meta = fs::metadata(&image).map_err(Error::io("read", &image))?;
        let changed = meta.modified().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok()).unwrap_or_default();
        let from = format!("{} {}", image.display(), changed.as_nanos());
        let of = self.path(if start.container.is_some() { "var.image" } else { "image" });
        let other = fs::read_to_string(&of).ok().as_deref() != Some(&from);
        if let Some(interfaces) = &start.container {
            let container = Container { node: &self.node, dir: &self.dir };
            if other && !start.keep {
                container.wipe()?;
            }
            fs::write(&of, &from).map_err(Error::io("write", &of))?;
            let _ = fs::remove_file(self.path("console.log"));
            return container.start(start, interfaces);
        }
        Container::was_one(&self.dir);
        let firmware = Firmware::find(start.secure_boot)?;
        if !self.disk().exists() || other && !start.keep {
            let _ = fs::remove_file(self.disk());
            let mut create = Command::new("qemu-img");
            create.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]).arg(&image).arg(self.disk());
            create.arg(start.disk.to_string());
            run(&mut create, "qemu-img (apt install qemu-utils)")?;
            fs::copy(&firmware.vars, self.path("vars.fd")).map_err(Error::io("copy", &firmware.vars))?;
            for file in [self.disk(), self.path("vars.fd")] {
                fs::set_permissions(&file, Permissions::from_mode(0o600)).map_err(Error::io("make private", &file))?;
            }
            fs::write(&of, &from).map_err(Error::io("write", &of))?;
        }
        let _ = fs::remove_file(self.path("console.log"));
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args(["-name", &self.node, "-nodefaults", "-no-user-config", "-display", "none", "-machine"]);
        if start.secure_boot {
            // Only the firmware itself may write its keys.
            qemu.args(["q35,smm=on", "-global", "driver=cfi.pflash01,property=secure,value=on"]);
        } else if start.bios {
            qemu.arg("q35,graphics=off");
        } else {
            qemu.arg("q35");
        }
        let accelerator = accelerator(&Firmware::find(false)?, self.dir.parent().unwrap_or(&self.dir))?;
        let cpus =
            if is_emulated(accelerator) { emulated(start.cpus, start.machines, host_cpus()) } else { start.cpus };
        qemu.args(accelerator);
        qemu.args(["-smp", &cpus.to_string(), "-m", &format!("{}M", start.memory >> 20)]);
        qemu.args(["-uuid", &uuid_of(&self.node), "-device", "virtio-rng-pci"]);
        let drive = |unit: &str, options: &str| format!("if=pflash,format=raw,unit={unit},{options}");
        if !start.bios {
            qemu.arg("-drive").arg(drive("0", &format!("readonly=on,file={}", firmware.code.display())));
            qemu.arg("-drive").arg(drive("1", &format!("file={}", self.path("vars.fd").display())));
        }
        qemu.arg("-drive").arg(format!("if=none,id=disk,format=qcow2,file={}", self.disk().display()));
        qemu.args(["-device", "virtio-blk-pci,drive=disk,bootindex=1"]);
        if let Some(seed) = start.seed {
            qemu.arg("-drive").arg(format!("if=none,id=seed,format=raw,readonly=on,file={}", seed.display()));
            qemu.args(["-device", "virtio-blk-pci,drive=seed"]);
        }
        let _ = fs::remove_file(self.path("tpm"));
        if let Some(memory) = start.tpm {
            private_dir(memory)?;
            let memory = memory.canonicalize().map_err(Error::io("find", memory))?;
            symlink(&memory, self.path("tpm")).map_err(Error::io("link", self.path("tpm")))?;
            self.start_tpm()?;
            qemu.arg("-chardev").arg(format!("socket,id=tpm,path={}", self.path("tpm.sock").display()));
            qemu.args(["-tpmdev", "emulator,id=tpm,chardev=tpm", "-device", "tpm-crb,tpmdev=tpm"]);
        }
        qemu.args(["-netdev", &format!("socket,id=wire,mcast={},localaddr=127.0.0.1", start.wire.group)]);
        let boot = match start.netboot {
            Some(Netboot::Ipxe) => ",bootindex=2",
            // The firmware's own client, not the card's.
            Some(Netboot::Pxe | Netboot::Http) => ",bootindex=2,romfile=",
            None => "",
        };
        if start.netboot == Some(Netboot::Http) {
            for version in ["4", "6"] {
                qemu.args(["-fw_cfg", &format!("name=opt/org.tianocore/IPv{version}PXESupport,string=no")]);
            }
        }
        qemu.args(["-device", &format!("virtio-net-pci,id=wire-card,netdev=wire,mac={}{boot}", start.wire.mac)]);
        if let Some(door) = &start.wire.door {
            qemu.args(["-netdev", &door.netdev()]);
            qemu.args(["-device", &format!("virtio-net-pci,netdev=door,mac={}", door.mac)]);
        }
        let socket = |id: &str, more: &str| {
            format!("socket,id={id},path={},server=on,wait=off{more}", self.path(&format!("{id}.sock")).display())
        };
        qemu.arg("-chardev")
            .arg(socket("console", &format!(",logappend=on,logfile={}", self.path("console.log").display())));
        qemu.args(["-serial", "chardev:console"]);
        // No second serial line: firmware and boot loader take what comes by one for a keyboard.
        qemu.args(["-device", "virtio-serial-pci", "-chardev"]).arg(socket("exec", ""));
        qemu.args(["-device", "virtserialport,chardev=exec,name=bakehouse.exec"]);
        qemu.arg("-chardev").arg(socket("monitor", "")).args(["-mon", "chardev=monitor,mode=readline"]);
        let ours = [
            ("systemd.extra-unit.bakehouse-exec.service".to_owned(), EXEC_UNIT.into()),
            ("systemd.unit-dropin.multi-user.target".to_owned(), EXEC_WANTED.into()),
        ];
        for (i, (name, content)) in start.credentials.iter().chain(&ours).enumerate() {
            // By file: everybody on this machine can read a command line.
            let path = self.path(&format!("credential-{i}"));
            let value = format!("io.systemd.credential.binary:{name}={}", BASE64.encode(content));
            write_private(&path, value.as_bytes())?;
            // QEMU's options are separated by commas, and a doubled one is part of the value.
            qemu.arg("-smbios").arg(format!("type=11,path={}", path.display().to_string().replace(',', ",,")));
        }
        qemu.arg("-pidfile").arg(self.path("pid")).arg("-daemonize");
        run(&mut qemu, "qemu-system-x86_64 (apt install qemu-system-x86)")
    }

    /// Starts the TPM that remembers in the folder `tpm`; it ends with the machine.
    fn start_tpm(&self) -> Result<()> {
        let mut tpm = Command::new("swtpm");
        tpm.args(["socket", "--tpm2", "--terminate", "--daemon"]);
        tpm.arg("--tpmstate").arg(format!("dir={}", self.path("tpm").display()));
        tpm.arg("--ctrl").arg(format!("type=unixio,path={}", self.path("tpm.sock").display()));
        run(&mut tpm, "swtpm (apt install swtpm)")
    }

    /// Waits until this is said on the console.
    pub(super) fn comes_so_far(&self, word: &str, step: &Step) -> Result<()> {
        self.wait_console(BOOT_TIMEOUT, |text| {
            step.message(&format!("{}: {}", self.node, last_word(text).chars().take(90).collect::<String>()));
            text.contains(word).then_some(())
        })
    }

    /// Pulls the machine's network cable, or puts it back.
    ///
    /// # Errors
    /// It does not run.
    pub fn plug(&self, plugged: bool) -> Result<()> {
        if let Some(container) = self.container() {
            return container.plug(plugged);
        }
        self.order(&format!("set_link wire-card {}", if plugged { "on" } else { "off" }))
    }

    /// Presses the power button and waits until the machine is off.
    ///
    /// # Errors
    /// It is still on after three minutes; then it is switched off.
    pub fn power_down(&self) -> Result<()> {
        if !self.is_running() {
            return Ok(());
        }
        match self.container() {
            // It may be gone before it has answered.
            Some(container) => drop(container.exec("systemctl --no-block poweroff", Duration::from_secs(30))),
            None => self.order("system_powerdown")?,
        }
        // systemd gives each service 90 seconds to end, and some wait for others.
        if self.is_off_within(Duration::from_secs(180)) {
            return Ok(());
        }
        self.cut_power()?;
        fail(format!("{} did not shut down in 180 s and was switched off", self.node))
    }

    /// Switches the machine off and on, as it is; what comes on its console follows what was there.
    pub(super) fn start_again(&self) -> Result<()> {
        let command = Path::new("/proc").join(self.pid()?.to_string()).join("cmdline");
        let words = fs::read(&command).map_err(Error::io("read", &command))?;
        self.cut_power()?;
        let log = self.path("console.log");
        OpenOptions::new()
            .append(true)
            .open(&log)
            .and_then(|mut log| writeln!(log, "\n{STARTED_AGAIN}"))
            .map_err(Error::io("write", &log))?;
        if self.path("tpm").exists() {
            self.start_tpm()?;
        }
        let words = words.strip_suffix(b"\0").unwrap_or(&words).split(|byte| *byte == 0).map(OsStr::from_bytes);
        let mut words = words.collect::<Vec<_>>().into_iter();
        run(Command::new(words.next().unwrap_or_default()).args(words), "qemu-system-x86_64")
    }

    fn pid(&self) -> Result<Pid> {
        let path = self.path("pid");
        let text = fs::read_to_string(&path).map_err(Error::io("read", &path))?;
        let number = text.trim().parse().map_err(|e| Error::Failed(format!("{}: {e}", path.display())))?;
        Ok(Pid::from_raw(number))
    }

    /// Switches the machine off, as a power cut does.
    ///
    /// # Errors
    /// QEMU can't be killed.
    pub fn cut_power(&self) -> Result<()> {
        if !self.is_running() {
            return Ok(());
        }
        let told = |e| Error::Failed(format!("cannot switch {} off: {e}", self.node));
        match self.container() {
            Some(container) => container.cut_power(),
            None => kill(self.pid()?, Signal::SIGKILL).map_err(told)?,
        }
        if self.is_off_within(Duration::from_secs(30)) {
            return Ok(());
        }
        fail(format!("{} can't be switched off", self.node))
    }

    fn is_off_within(&self, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        while self.is_running() {
            if Instant::now() > until {
                return false;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        true
    }

    /// Connects to one of the machine's sockets. QEMU serves one client at a time, and does not
    /// see that one has gone as long as the machine does not read: others wait, but not for ever.
    pub(super) fn knock(&self, socket: &str, until: Instant) -> std::io::Result<UnixStream> {
        let address = UnixAddr::new(&self.path(socket))?;
        loop {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let fd = nix::sys::socket::socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
            match connect(fd.as_raw_fd(), &address) {
                Ok(()) => {
                    let stream = UnixStream::from(fd);
                    stream.set_nonblocking(false)?;
                    return Ok(stream);
                }
                Err(nix::Error::EAGAIN) if Instant::now() < until => std::thread::sleep(Duration::from_millis(50)),
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Gives QEMU an order, and waits until it was carried out.
    fn order(&self, order: &str) -> Result<()> {
        let told = |e: std::io::Error| Error::Failed(format!("{} does not listen: {e}", self.node));
        let mut monitor = self.knock("monitor.sock", Instant::now() + Duration::from_secs(30)).map_err(told)?;
        monitor.set_read_timeout(Some(Duration::from_secs(30))).map_err(told)?;
        monitor.write_all(format!("{order}\n").as_bytes()).map_err(told)?;
        // Prompts, once at the greeting, once after the order.
        let mut said = BufReader::new(monitor);
        for _ in 0..2 {
            said.read_until(b')', &mut Vec::new()).map_err(told)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_processors_are_emulated_than_the_host_has() {
        assert_eq!(emulated(2, 1, 2), 2);
        assert_eq!(emulated(2, 3, 2), 1);
        assert_eq!(emulated(2, 8, 64), 2);
        assert_eq!(emulated(4, 2, 6), 3);
    }
}
