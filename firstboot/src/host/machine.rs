//! Size of the machine.

use std::fs;
use std::path::Path;
use std::thread;

use fleet::{EMULATED_TIMEOUT_SCALE, MachineSize};
use nix::sys::statvfs::statvfs;

use crate::error::{Error, Result};

/// Reads memory, CPUs and the size of /var from the kernel. `virtualization` is systemd's name of the hypervisor.
///
/// # Errors
/// If /proc/meminfo or the size of /var cannot be read.
pub(crate) fn read(virtualization: &str) -> Result<MachineSize> {
    let path = Path::new("/proc/meminfo");
    let text = fs::read_to_string(path).map_err(Error::io("read", path))?;
    let memory =
        memory(&text).ok_or_else(|| Error::Configuration("/proc/meminfo has no valid line `MemTotal`".to_owned()))?;
    let cpus = thread::available_parallelism().map_or(1, |n| n.get() as u64);
    // systemd's name is `kvm` for QEMU with real processors, and `qemu` for emulated ones.
    let timeout_scale = if virtualization == "qemu" { EMULATED_TIMEOUT_SCALE } else { 1 };
    let var = statvfs("/var").map_err(|e| Error::io("read the size of", "/var")(e.into()))?;
    let var = (var.blocks() * var.fragment_size()) >> 20;
    Ok(MachineSize { memory, var, cpus, timeout_scale })
}

/// Returns `MemTotal` in MiB.
fn memory(meminfo: &str) -> Option<u64> {
    let total = meminfo.lines().find_map(|l| l.strip_prefix("MemTotal:"))?;
    let kib: u64 = total.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib / 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_meminfo_of_the_kernel() {
        assert_eq!(memory("MemTotal:        2037048 kB\nMemFree: 1 kB\n"), Some(1989));
        assert_eq!(memory("nothing of it"), None);
    }
}
