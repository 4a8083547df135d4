//! The firmware machines boot with, and whether KVM can run it here.

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
    /// Debian's OVMF: as it is most often, or one that enforces signatures once it has a key.
    pub(super) fn find(secure: bool) -> Result<Self> {
        let dir = Path::new("/usr/share/OVMF");
        let code = if secure { "OVMF_CODE_4M.secboot.fd" } else { "OVMF_CODE_4M.fd" };
        let (code, vars) = (dir.join(code), dir.join("OVMF_VARS_4M.fd"));
        if code.exists() && vars.exists() {
            return Ok(Self { code, vars });
        }
        fail(format!("{} is missing: apt install ovmf (or `make deps`)", code.display()))
    }

    /// Whether this firmware, with these options, gets as far as looking for something to boot.
    fn comes_up(&self, options: [&str; 4], timeout: Duration) -> bool {
        // Where KVM hangs it would stay for ever, if nobody were there to end it.
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
            let came = BufReader::new(serial)
                .split(b'\n')
                .map_while(std::result::Result::ok)
                .any(|l| l.windows(6).any(|w| w == b"BdsDxe"));
            let _ = send.send(came);
        });
        let came = receive.recv_timeout(timeout).unwrap_or(false);
        let _ = child.kill();
        let _ = child.wait();
        came
    }
}

/// How long KVM may take to bring the firmware up; where it is emulated itself it never does.
const PROBE_TIMEOUT: Duration = Duration::from_secs(8);

/// Of what can be emulated, not a fifth level of page tables to walk, nor virtualisation, for which the
/// guest would load KVM: a boot takes 6 % less of the host's time (median of five pairs).
const EMULATION: [&str; 4] = ["-accel", "tcg,thread=multi", "-cpu", "max,-la57,-svm"];

/// Options for the fastest way to run a machine here. A device file says nothing about KVM, and
/// neither does a boot sector that runs: where a hypervisor emulates KVM, some of it works, slower
/// than QEMU's own emulation, or until the firmware's first unusual instruction. So KVM has to
/// bring up the firmware once; the answer is kept in `dir` until the host boots again.
pub(super) fn accelerator(firmware: &Firmware, dir: &Path) -> Result<[&'static str; 4]> {
    let kvm = ["-accel", "kvm", "-cpu", "host"];
    let tcg = EMULATION;
    if !Path::new("/dev/kvm").exists() {
        return Ok(tcg);
    }
    let boot = Path::new("/proc/sys/kernel/random/boot_id");
    let boot = fs::read_to_string(boot).map_err(Error::io("read", boot))?;
    let kept = dir.join("accelerator");
    let (yes, no) = (format!("kvm {boot}"), format!("tcg {boot}"));
    let works = match fs::read_to_string(&kept) {
        Ok(text) if text == yes => true,
        Ok(text) if text == no => false,
        _ => {
            let works = firmware.comes_up(kvm, PROBE_TIMEOUT);
            fs::write(&kept, if works { yes } else { no }).map_err(Error::io("write", &kept))?;
            works
        }
    };
    Ok(if works { kvm } else { tcg })
}

/// Whether these are emulation's.
pub(super) fn is_emulated(accelerator: [&str; 4]) -> bool {
    accelerator == EMULATION
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_brings_up_the_firmware_works() {
        let firmware = Firmware::find(false).unwrap();
        let works = |options| firmware.comes_up(options, Duration::from_secs(60));
        assert!(works(EMULATION));
        assert!(!works(["-accel", "nothing-of-that-name", "-cpu", "max"]));
    }
}
