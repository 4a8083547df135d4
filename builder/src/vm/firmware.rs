//! Firmware of local machines, and a check whether KVM on this host can run it.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::error::{Error, Result, fail};

/// UEFI firmware for QEMU.
pub(super) struct Firmware {
    pub(super) code: PathBuf,
    pub(super) vars: PathBuf,
}

impl Firmware {
    /// Finds Debian's OVMF. `secure` selects the build that enforces signatures once a key is enrolled.
    pub(super) fn find(secure: bool) -> Result<Self> {
        let dir = Path::new("/usr/share/OVMF");
        let code = if secure { "OVMF_CODE_4M.secboot.fd" } else { "OVMF_CODE_4M.fd" };
        let (code, vars) = (dir.join(code), dir.join("OVMF_VARS_4M.fd"));
        if code.exists() && vars.exists() {
            return Ok(Self { code, vars });
        }
        fail(format!("cannot find {}\n  help: apt install ovmf (or `make deps`)", code.display()))
    }

    /// Returns whether this firmware reaches boot device selection (BDS) with these QEMU options.
    fn reaches_boot_selection(&self, options: [&str; 4], timeout: Duration) -> bool {
        // A hung KVM never returns: the kernel kills QEMU if the builder dies first.
        let mut qemu = Command::new("setpriv");
        qemu.args(["--pdeathsig", "KILL", "qemu-system-x86_64"]);
        qemu.args(options).args(["-machine", "q35", "-nodefaults", "-no-user-config", "-display", "none"]);
        qemu.args(["-m", "256M", "-no-reboot", "-serial", "stdio"]);
        let drive = |unit: u8, file: &Path, how: &str| {
            format!("if=pflash,format=raw,unit={unit},{how}=on,file={}", file.display())
        };
        qemu.arg("-drive").arg(drive(0, &self.code, "readonly")).arg("-drive").arg(drive(1, &self.vars, "snapshot"));
        qemu.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let Ok(mut child) = qemu.spawn() else { return false };
        let Some(serial) = child.stdout.take() else { return false };
        let (send, receive) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let reached = BufReader::new(serial)
                .split(b'\n')
                .map_while(std::result::Result::ok)
                .any(|l| l.windows(6).any(|w| w == b"BdsDxe"));
            let _ = send.send(reached);
        });
        let reached = receive.recv_timeout(timeout).unwrap_or(false);
        let _ = child.kill();
        let _ = child.wait();
        reached
    }
}

/// Time that KVM gets to start the firmware. KVM that a hypervisor emulates does not reach the boot device selection.
const PROBE_TIMEOUT: Duration = Duration::from_secs(8);

/// All features that QEMU emulates, except five-level page tables and virtualisation, for which the guest would load
/// KVM. Without them, a boot takes 6 % less processor time on the host (median of five pairs).
const EMULATION: [&str; 4] = ["-accel", "tcg,thread=multi", "-cpu", "max,-la57,-svm"];

/// Returns QEMU's options for the fastest accelerator on this host.
///
/// `/dev/kvm` may exist and a boot sector may run although KVM is not usable. A hypervisor that emulates KVM is slower
/// than QEMU's own emulation, or stops at an instruction that the firmware needs. KVM therefore has to start the
/// firmware once. The result is stored in `dir` and is valid until the host reboots.
pub(super) fn accelerator(firmware: &Firmware, dir: &Path) -> Result<[&'static str; 4]> {
    let kvm = ["-accel", "kvm", "-cpu", "host"];
    let tcg = EMULATION;
    if !Path::new("/dev/kvm").exists() {
        return Ok(tcg);
    }
    let boot = Path::new("/proc/sys/kernel/random/boot_id");
    let boot = fs::read_to_string(boot).map_err(Error::io("read", boot))?;
    let kept = dir.join("accelerator");
    let (usable, unusable) = (format!("kvm {boot}"), format!("tcg {boot}"));
    let works = match fs::read_to_string(&kept) {
        Ok(text) if text == usable => true,
        Ok(text) if text == unusable => false,
        _ => {
            let works = firmware.reaches_boot_selection(kvm, PROBE_TIMEOUT);
            fs::write(&kept, if works { usable } else { unusable }).map_err(Error::io("write", &kept))?;
            works
        }
    };
    Ok(if works { kvm } else { tcg })
}

/// Returns whether these options select QEMU's emulation.
pub(super) fn is_emulated(accelerator: [&str; 4]) -> bool {
    accelerator == EMULATION
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_accelerator_works_if_it_starts_the_firmware() {
        let firmware = Firmware::find(false).unwrap();
        let works = |options| firmware.reaches_boot_selection(options, Duration::from_secs(60));
        assert!(works(EMULATION));
        assert!(!works(["-accel", "nothing-of-that-name", "-cpu", "max"]));
    }
}
