//! Memory of this host.

use std::fs;

/// Bytes that the kernel can give to programs now, `MemAvailable` in
/// [/proc/meminfo](https://man7.org/linux/man-pages/man5/proc_meminfo.5.html); 0 where it is not known.
pub fn available() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib =
        text.lines().find_map(|l| l.strip_prefix("MemAvailable:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}
