//! Memory of the host.

use std::fs;

/// Returns the available memory in bytes, `MemAvailable` in
/// [/proc/meminfo](https://man7.org/linux/man-pages/man5/proc_meminfo.5.html); 0 if it is unknown.
pub(crate) fn available() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib =
        text.lines().find_map(|l| l.strip_prefix("MemAvailable:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}
