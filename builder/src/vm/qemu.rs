//! QEMU's command line for one machine.

use std::path::{Path, PathBuf};
use std::process::Command;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;

use super::command::{EXEC_UNIT, EXEC_WANTED};
use super::firmware::{Firmware, is_emulated};
use super::start::{Netboot, VmOptions};
use crate::error::Result;
use crate::project::machine_id::uuid_of;
use crate::util::fs::write_private;

/// Builds QEMU's command line. Each method adds the options of one part of the machine.
pub(super) struct QemuCommand<'a> {
    command: Command,
    node: &'a str,
    /// Folder of the machine's files.
    dir: &'a Path,
}

pub(super) fn host_cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Returns the number of processors to emulate in each of `machines` machines, so that all machines together use at
/// most `host` processors, but each has at least one.
///
/// A kernel waits for replies from all its processors (IPI), and a processor that the host does not schedule replies
/// late. On a host with two processors, three machines with two each spent most of their time in such waits.
fn emulated_cpus(wanted: u16, machines: usize, host: usize) -> u16 {
    let share = host / machines.max(1);
    wanted.min(u16::try_from(share).unwrap_or(u16::MAX)).max(1)
}

impl<'a> QemuCommand<'a> {
    /// Starts a command line without any default device.
    pub(super) fn new(node: &'a str, dir: &'a Path) -> Self {
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-name", node, "-nodefaults", "-no-user-config", "-display", "none"]);
        Self { command, node, dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Adds the chipset.
    pub(super) fn chipset(&mut self, options: &VmOptions) -> &mut Self {
        self.command.arg("-machine");
        if options.secure_boot {
            // With SMM, only the firmware can write its variables, among them the keys.
            self.command.args(["q35,smm=on", "-global", "driver=cfi.pflash01,property=secure,value=on"]);
        } else if options.bios {
            self.command.arg("q35,graphics=off");
        } else {
            self.command.arg("q35");
        }
        self
    }

    /// Adds processors, memory and the machine's UUID. `accelerator`: QEMU's options for KVM or for emulation.
    pub(super) fn processors(&mut self, options: &VmOptions, accelerator: [&str; 4]) -> &mut Self {
        let emulated = is_emulated(accelerator);
        let cpus = if emulated { emulated_cpus(options.cpus, options.machines, host_cpus()) } else { options.cpus };
        self.command.args(accelerator);
        self.command.args(["-smp", &cpus.to_string(), "-m", &format!("{}M", options.memory >> 20)]);
        self.command.args(["-uuid", &uuid_of(self.node), "-device", "virtio-rng-pci"]);
        self
    }

    /// Adds the UEFI firmware and its variables.
    pub(super) fn firmware(&mut self, firmware: &Firmware) -> &mut Self {
        let drive = |unit: &str, options: &str| format!("if=pflash,format=raw,unit={unit},{options}");
        let variables = format!("file={}", self.path("vars.fd").display());
        self.command.arg("-drive").arg(drive("0", &format!("readonly=on,file={}", firmware.code.display())));
        self.command.arg("-drive").arg(drive("1", &variables));
        self
    }

    /// Adds the machine's disk, and a second, read-only one with the image `seed`.
    pub(super) fn disks(&mut self, seed: Option<&Path>) -> &mut Self {
        let disk = self.path("disk.qcow2");
        self.command.arg("-drive").arg(format!("if=none,id=disk,format=qcow2,file={}", disk.display()));
        self.command.args(["-device", "virtio-blk-pci,drive=disk,bootindex=1"]);
        if let Some(seed) = seed {
            self.command.arg("-drive").arg(format!("if=none,id=seed,format=raw,readonly=on,file={}", seed.display()));
            self.command.args(["-device", "virtio-blk-pci,drive=seed"]);
        }
        self
    }

    /// Adds the TPM that swtpm emulates.
    pub(super) fn tpm(&mut self) -> &mut Self {
        let socket = self.path("tpm.sock");
        self.command.arg("-chardev").arg(format!("socket,id=tpm,path={}", socket.display()));
        self.command.args(["-tpmdev", "emulator,id=tpm,chardev=tpm", "-device", "tpm-crb,tpmdev=tpm"]);
        self
    }

    /// Adds the network card of the fleet's network, and the one that forwards ports of the host.
    pub(super) fn network(&mut self, options: &VmOptions) -> &mut Self {
        let nic = &options.nic;
        self.command.args(["-netdev", &format!("socket,id=wire,mcast={},localaddr=127.0.0.1", nic.group)]);
        let boot = match options.netboot {
            Some(Netboot::Ipxe) => ",bootindex=2",
            // An empty ROM disables the card's iPXE, so the firmware's own client boots.
            Some(Netboot::Pxe | Netboot::Http) => ",bootindex=2,romfile=",
            None => "",
        };
        if options.netboot == Some(Netboot::Http) {
            for version in ["4", "6"] {
                self.command.args(["-fw_cfg", &format!("name=opt/org.tianocore/IPv{version}PXESupport,string=no")]);
            }
        }
        self.command.args(["-device", &format!("virtio-net-pci,id=wire-card,netdev=wire,mac={}{boot}", nic.mac)]);
        if let Some(forward) = &nic.forward {
            self.command.args(["-netdev", &forward.netdev()]);
            self.command.args(["-device", &format!("virtio-net-pci,netdev=door,mac={}", forward.mac)]);
        }
        self
    }

    /// Adds the serial console, the port for commands, and QEMU's monitor. Each is a socket in the machine's folder.
    pub(super) fn sockets(&mut self) -> &mut Self {
        let log = format!(",logappend=on,logfile={}", self.path("console.log").display());
        let socket = |id: &str, more: &str| {
            format!("socket,id={id},path={},server=on,wait=off{more}", self.path(&format!("{id}.sock")).display())
        };
        let (console, exec, monitor) = (socket("console", &log), socket("exec", ""), socket("monitor", ""));
        self.command.args(["-chardev", &console, "-serial", "chardev:console"]);
        // Not a second serial port: firmware and boot loader would read commands from it as keyboard input.
        self.command.args(["-device", "virtio-serial-pci", "-chardev", &exec]);
        self.command.args(["-device", "virtserialport,chardev=exec,name=bakehouse.exec"]);
        self.command.args(["-chardev", &monitor, "-mon", "chardev=monitor,mode=readline"]);
        self
    }

    /// Adds systemd credentials (name and content), and those with the unit that runs the builder's commands.
    ///
    /// # Errors
    /// If a credential's file cannot be written.
    pub(super) fn credentials(&mut self, credentials: &[(String, Vec<u8>)]) -> Result<&mut Self> {
        let ours = [
            ("systemd.extra-unit.bakehouse-exec.service".to_owned(), EXEC_UNIT.into()),
            ("systemd.unit-dropin.multi-user.target".to_owned(), EXEC_WANTED.into()),
        ];
        for (i, (name, content)) in credentials.iter().chain(&ours).enumerate() {
            // In a file, because every user of this host can read the command line.
            let path = self.path(&format!("credential-{i}"));
            let value = format!("io.systemd.credential.binary:{name}={}", BASE64.encode(content));
            write_private(&path, value.as_bytes())?;
            // QEMU separates options with commas; a doubled comma is part of the value.
            self.command.arg("-smbios").arg(format!("type=11,path={}", path.display().to_string().replace(',', ",,")));
        }
        Ok(self)
    }

    /// Returns the command, which continues in the background and writes its process id to `pid`.
    pub(super) fn finish(mut self) -> Command {
        let pid = self.path("pid");
        self.command.arg("-pidfile").arg(pid).arg("-daemonize");
        self.command
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::vm::VirtualNic;

    #[test]
    fn machines_share_the_hosts_processors() {
        assert_eq!(emulated_cpus(2, 1, 2), 2);
        assert_eq!(emulated_cpus(2, 3, 2), 1);
        assert_eq!(emulated_cpus(2, 8, 64), 2);
        assert_eq!(emulated_cpus(4, 2, 6), 3);
    }

    #[test]
    fn command_line_has_all_parts_in_a_fixed_order() {
        let dir = tempfile::tempdir().unwrap();
        let options = VmOptions {
            image: Path::new("/image"),
            memory: 512 << 20,
            cpus: 2,
            machines: 1,
            disk: 1 << 30,
            keep: false,
            nic: VirtualNic {
                group: "230.0.0.1:4000".to_owned(),
                mac: "52:54:00:00:00:01".to_owned(),
                address: Ipv4Addr::new(198, 18, 0, 1),
                forward: None,
            },
            seed: Some(Path::new("/seed")),
            tpm: None,
            netboot: Some(Netboot::Http),
            secure_boot: false,
            bios: false,
            credentials: vec![("ticket".to_owned(), b"secret".to_vec())],
            container: None,
        };
        let mut qemu = QemuCommand::new("db-1", dir.path());
        qemu.chipset(&options).processors(&options, ["-accel", "kvm", "-cpu", "host"]).disks(options.seed).tpm();
        qemu.network(&options).sockets().credentials(&options.credentials).unwrap();
        let command = qemu.finish();
        let line: Vec<&str> = command.get_args().map(|arg| arg.to_str().unwrap()).collect();
        let line = line.join(" ").replace(dir.path().to_str().unwrap(), "DIR");
        let mut at = 0;
        for part in [
            "-name db-1 -nodefaults",
            "-machine q35 -accel kvm",
            "-smp 2 -m 512M -uuid ",
            "id=disk,format=qcow2,file=DIR/disk.qcow2",
            "id=seed,format=raw,readonly=on,file=/seed",
            "socket,id=tpm,path=DIR/tpm.sock",
            "IPv4PXESupport,string=no",
            "netdev=wire,mac=52:54:00:00:00:01,bootindex=2,romfile=",
            "path=DIR/console.sock,server=on,wait=off,logappend=on,logfile=DIR/console.log -serial chardev:console",
            "type=11,path=DIR/credential-0 -smbios type=11,path=DIR/credential-1",
            "-pidfile DIR/pid -daemonize",
        ] {
            at += line[at..].find(part).unwrap_or_else(|| panic!("`{part}` is missing or too early in {line}"));
        }
        assert!(!line.contains("secret") && !line.contains(&BASE64.encode("secret")), "{line}");
    }
}
