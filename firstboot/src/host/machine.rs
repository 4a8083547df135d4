//! What the machine has.

use std::fs;
use std::path::Path;
use std::thread;

use fleet::{EMULATED_TIMEOUT_SCALE, MachineSize};
use nix::sys::statvfs::statvfs;

use crate::error::{Error, Result};

/// Memory, CPUs and the size of /var of this machine, as the kernel reports them; `virtualization` is what systemd
/// calls it.
///
/// # Errors
/// /proc/meminfo cannot be read, or the file system of /var cannot be asked.
pub fn read(virtualization: &str) -> Result<MachineSize> {
    let path = Path::new("/proc/meminfo");
    let text = fs::read_to_string(path).map_err(Error::io("read", path))?;
    let memory = memory(&text)
        .ok_or_else(|| Error::Configuration("/proc/meminfo does not say how much memory there is".to_owned()))?;
    let cpus = thread::available_parallelism().map_or(1, |n| n.get() as u64);
    // `kvm` is the name of QEMU with real processors.
    let patience = if virtualization == "qemu" { EMULATED_TIMEOUT_SCALE } else { 1 };
    let var = statvfs("/var").map_err(|e| Error::io("look at the size of", "/var")(e.into()))?;
    let var = (var.blocks() * var.fragment_size()) >> 20;
    Ok(MachineSize { memory, var, cpus, patience })
}

/// MiB of `MemTotal`.
fn memory(meminfo: &str) -> Option<u64> {
    let total = meminfo.lines().find_map(|l| l.strip_prefix("MemTotal:"))?;
    let kib: u64 = total.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib / 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_own_words() {
        assert_eq!(memory("MemTotal:        2037048 kB\nMemFree: 1 kB\n"), Some(1989));
        assert_eq!(memory("nothing of it"), None);
    }
}
