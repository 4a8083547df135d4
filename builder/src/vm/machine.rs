//! One local machine: its files, its power, QEMU's monitor.

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

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect};
use nix::unistd::Pid;

use super::container::Container;
use super::firmware::{Firmware, accelerator};
use super::phase::phase;
use super::qemu::QemuCommand;
use super::start::VmOptions;
use crate::error::{Error, Result, fail};
use crate::progress::Step;
use crate::project::Project;
use crate::util::fs::private_dir;
use crate::util::process::run;

/// Prefix of the agent's lines on the console.
pub(super) const AGENT: &str = "bakehouse: ";
/// The agent's line when its node is ready.
pub(super) const READY: &str = "bakehouse: ready";
/// Time until a machine is ready; emulated machines are slow.
const BOOT_TIMEOUT: Duration = Duration::from_secs(1800);
const RESTARTED: &str = "bakehouse: the emulated processors have stopped; switched off and on";
/// Bytes of the disk beyond what the node's roles need. The disk's file is sparse.
pub(super) const SPARE_DISK: u64 = 4 << 30;

/// A node's local machine.
pub struct Vm {
    /// Name of the node.
    pub node: String,
    dir: PathBuf,
}

impl Vm {
    /// Returns the machine of a node of this fleet.
    ///
    /// # Errors
    /// If the fleet has no such node.
    pub fn for_node(project: &Project, node: &str) -> Result<Self> {
        project.node(node)?;
        Ok(Self::at(node, project.dir.join("build/vm").join(node)))
    }

    /// Returns the machine whose files are in `dir`.
    #[must_use]
    pub fn at(node: &str, dir: PathBuf) -> Self {
        Self { node: node.to_owned(), dir }
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Returns the node's container, if it runs as one.
    pub(super) fn container(&self) -> Option<Container<'_>> {
        Container::exists(&self.dir).then_some(Container { node: &self.node, dir: &self.dir })
    }

    /// Removes the machine's disk, so that the next start creates a blank one.
    ///
    /// # Errors
    /// If the disk's file cannot be removed.
    pub fn wipe(&self) -> Result<()> {
        match self.container() {
            Some(container) => container.wipe(),
            None => fs::remove_file(self.disk()).map_err(Error::io("remove", self.disk())),
        }
    }

    /// Returns the path of the machine's disk, a qcow2 file with the image as its backing file.
    #[must_use]
    pub fn disk(&self) -> PathBuf {
        self.path("disk.qcow2")
    }

    /// Returns whether QEMU runs. QEMU locks its pid file, so a process that got the same pid later does not count.
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
        let result = fcntl(&file, FcntlArg::F_GETLK(&mut lock));
        result.is_ok() && lock.l_type != libc::F_UNLCK as libc::c_short
    }

    /// Starts the machine. Creates its disk if there is none, or if the image has changed.
    ///
    /// # Errors
    /// If QEMU or the firmware is missing, or QEMU does not start.
    pub fn start(&self, options: &VmOptions) -> Result<()> {
        // Disks and consoles hold the node's secrets: its keys and the fleet's passwords.
        if let Some(all) = self.dir.parent().filter(|dir| dir.ends_with("build/vm")) {
            private_dir(all)?;
        }
        private_dir(&self.dir)?;
        let image = options.image.canonicalize().map_err(Error::io("find", options.image))?;
        let meta = fs::metadata(&image).map_err(Error::io("read", &image))?;
        let changed = meta.modified().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok()).unwrap_or_default();
        let from = format!("{} {}", image.display(), changed.as_nanos());
        let of = self.path(if options.container.is_some() { "var.image" } else { "image" });
        let other = fs::read_to_string(&of).ok().as_deref() != Some(&from);
        if let Some(interfaces) = &options.container {
            let container = Container { node: &self.node, dir: &self.dir };
            if other && !options.keep {
                container.wipe()?;
            }
            fs::write(&of, &from).map_err(Error::io("write", &of))?;
            let _ = fs::remove_file(self.path("console.log"));
            return container.start(options, interfaces);
        }
        Container::forget(&self.dir);
        let firmware = Firmware::find(options.secure_boot)?;
        if !self.disk().exists() || other && !options.keep {
            self.create_disk(&image, options.disk, &firmware)?;
            fs::write(&of, &from).map_err(Error::io("write", &of))?;
        }
        let _ = fs::remove_file(self.path("console.log"));
        let accelerator = accelerator(&Firmware::find(false)?, self.dir.parent().unwrap_or(&self.dir))?;
        let mut qemu = QemuCommand::new(&self.node, &self.dir);
        qemu.chipset(options).processors(options, accelerator);
        if !options.bios {
            qemu.firmware(&firmware);
        }
        qemu.disks(options.seed);
        let _ = fs::remove_file(self.path("tpm"));
        if let Some(state) = options.tpm {
            private_dir(state)?;
            let state = state.canonicalize().map_err(Error::io("find", state))?;
            symlink(&state, self.path("tpm")).map_err(Error::io("link", self.path("tpm")))?;
            self.start_tpm()?;
            qemu.tpm();
        }
        qemu.network(options).sockets().credentials(&options.credentials)?;
        run(&mut qemu.finish(), "qemu-system-x86_64 (apt install qemu-system-x86)")
    }

    /// Creates a disk of `size` bytes over the image, and blank firmware variables.
    fn create_disk(&self, image: &Path, size: u64, firmware: &Firmware) -> Result<()> {
        let _ = fs::remove_file(self.disk());
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]).arg(image).arg(self.disk());
        create.arg(size.to_string());
        run(&mut create, "qemu-img (apt install qemu-utils)")?;
        fs::copy(&firmware.vars, self.path("vars.fd")).map_err(Error::io("copy", &firmware.vars))?;
        for file in [self.disk(), self.path("vars.fd")] {
            fs::set_permissions(&file, Permissions::from_mode(0o600)).map_err(Error::io("make private", &file))?;
        }
        Ok(())
    }

    /// Starts swtpm with its state in the folder `tpm`. swtpm ends when QEMU disconnects.
    fn start_tpm(&self) -> Result<()> {
        let mut tpm = Command::new("swtpm");
        tpm.args(["socket", "--tpm2", "--terminate", "--daemon"]);
        tpm.arg("--tpmstate").arg(format!("dir={}", self.path("tpm").display()));
        tpm.arg("--ctrl").arg(format!("type=unixio,path={}", self.path("tpm.sock").display()));
        run(&mut tpm, "swtpm (apt install swtpm)")
    }

    /// Waits until the console prints this text.
    pub(super) fn wait_for(&self, wanted: &str, step: &Step) -> Result<()> {
        self.wait_console(BOOT_TIMEOUT, |text| {
            step.message(&format!("{}: {}", self.node, phase(text)));
            text.contains(wanted).then_some(())
        })
    }

    /// Pulls the machine's network cable, or plugs it in.
    ///
    /// # Errors
    /// If QEMU's monitor does not reply, for example because the machine is off.
    pub fn plug(&self, plugged: bool) -> Result<()> {
        if let Some(container) = self.container() {
            return container.plug(plugged);
        }
        self.monitor(&format!("set_link wire-card {}", if plugged { "on" } else { "off" }))
    }

    /// Presses the power button and waits until the machine is off.
    ///
    /// # Errors
    /// If the machine is still on after 180 s. The function switches it off.
    pub fn power_down(&self) -> Result<()> {
        if !self.is_running() {
            return Ok(());
        }
        match self.container() {
            // The container may stop before its reply arrives.
            Some(container) => drop(container.exec("systemctl --no-block poweroff", Duration::from_secs(30))),
            None => self.monitor("system_powerdown")?,
        }
        // systemd gives each service 90 s to stop, and some services stop after others.
        if self.is_off_within(Duration::from_secs(180)) {
            return Ok(());
        }
        self.cut_power()?;
        fail(format!("{} did not shut down in 180 s and was switched off", self.node))
    }

    /// Kills QEMU and starts it with the same command line. The console's log continues.
    pub(super) fn restart(&self) -> Result<()> {
        let command = Path::new("/proc").join(self.pid()?.to_string()).join("cmdline");
        let line = fs::read(&command).map_err(Error::io("read", &command))?;
        self.cut_power()?;
        let log = self.path("console.log");
        OpenOptions::new()
            .append(true)
            .open(&log)
            .and_then(|mut log| writeln!(log, "\n{RESTARTED}"))
            .map_err(Error::io("write", &log))?;
        if self.path("tpm").exists() {
            self.start_tpm()?;
        }
        let args = line.strip_suffix(b"\0").unwrap_or(&line).split(|byte| *byte == 0).map(OsStr::from_bytes);
        let mut args = args.collect::<Vec<_>>().into_iter();
        run(Command::new(args.next().unwrap_or_default()).args(args), "qemu-system-x86_64")
    }

    fn pid(&self) -> Result<Pid> {
        let path = self.path("pid");
        let text = fs::read_to_string(&path).map_err(Error::io("read", &path))?;
        let number = text.trim().parse::<i32>();
        let number = number.map_err(Error::at(format!("{} has no process id", path.display())))?;
        Ok(Pid::from_raw(number))
    }

    /// Switches the machine off like a power failure, without a shutdown.
    ///
    /// # Errors
    /// If QEMU cannot be killed.
    pub fn cut_power(&self) -> Result<()> {
        if !self.is_running() {
            return Ok(());
        }
        let context = Error::cannot(format!("switch {} off", self.node));
        match self.container() {
            Some(container) => container.cut_power(),
            None => kill(self.pid()?, Signal::SIGKILL).map_err(context)?,
        }
        if self.is_off_within(Duration::from_secs(30)) {
            return Ok(());
        }
        fail(format!("cannot switch {} off: it still runs after 30 s", self.node))
    }

    fn is_off_within(&self, timeout: Duration) -> bool {
        let until = Instant::now() + timeout;
        while self.is_running() {
            if Instant::now() > until {
                return false;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        true
    }

    /// Connects to one of the machine's sockets. QEMU serves one client at a time, and does not notice a disconnect
    /// while the machine does not read. Until `until`, this function retries a connection that QEMU does not accept.
    pub(super) fn connect(&self, socket: &str, until: Instant) -> std::io::Result<UnixStream> {
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

    /// Sends a command to QEMU's monitor and waits until QEMU has run it.
    fn monitor(&self, command: &str) -> Result<()> {
        let context = |e: std::io::Error| Error::cannot(format!("reach the QEMU monitor of {}", self.node))(e);
        let mut monitor = self.connect("monitor.sock", Instant::now() + Duration::from_secs(30)).map_err(context)?;
        monitor.set_read_timeout(Some(Duration::from_secs(30))).map_err(context)?;
        monitor.write_all(format!("{command}\n").as_bytes()).map_err(context)?;
        // QEMU prints the prompt `(qemu)` after its greeting, and again after the command.
        let mut output = BufReader::new(monitor);
        for _ in 0..2 {
            output.read_until(b')', &mut Vec::new()).map_err(context)?;
        }
        Ok(())
    }
}
