//! State of the machine: load, memory, file systems, and addresses.

use std::collections::BTreeMap;
use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;

use fleet::node_api::Space;
use nix::ifaddrs::getifaddrs;
use nix::sys::statvfs::statvfs;
use nix::sys::sysinfo::sysinfo;

use crate::error::{Error, Result};

/// Mount points of an image.
const MOUNTS: [&str; 3] = ["/", "/efi", "/var"];

/// Load, memory and uptime of the machine.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Load {
    pub(super) uptime: u64,
    pub(super) averages: [f64; 3],
    pub(super) memory: Space,
}

/// Reads load, memory and uptime.
pub(super) fn load() -> Result<Load> {
    let info = sysinfo().map_err(|e| Error::io("read", "sysinfo(2)")(e.into()))?;
    let (one, five, fifteen) = info.load_average();
    let text = fs::read_to_string("/proc/meminfo").map_err(Error::io("read", "/proc/meminfo"))?;
    Ok(Load { uptime: info.uptime().as_secs(), averages: [one, five, fifteen], memory: memory(&text) })
}

/// Parses `/proc/meminfo`. `MemAvailable` counts the page cache as free, and sysinfo(2) does not.
fn memory(text: &str) -> Space {
    let bytes = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.and_then(|value| value.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) * 1024
    };
    Space { total: bytes("MemTotal"), available: bytes("MemAvailable") }
}

/// Returns the sizes of the file systems that are mounted.
pub(super) fn disks() -> BTreeMap<String, Space> {
    let mounted = MOUNTS.iter().filter(|mount| Path::new(mount).is_dir());
    let sizes = mounted.filter_map(|mount| {
        let found = statvfs(*mount).ok()?;
        let block = found.fragment_size();
        // Without the blocks that services cannot use, as `df` counts.
        let usable = found.blocks() - found.blocks_free() + found.blocks_available();
        Some(((*mount).to_owned(), Space { total: usable * block, available: found.blocks_available() * block }))
    });
    sizes.collect()
}

/// Returns whether an interface of this machine has this address.
pub(super) fn has_address(address: Ipv4Addr) -> Result<bool> {
    let all = getifaddrs().map_err(|e| Error::io("read", "the addresses of the interfaces")(e.into()))?;
    let mut ips = all.filter_map(|interface| Some(interface.address?.as_sockaddr_in()?.ip()));
    Ok(ips.any(|ip| ip == address))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_this_machine() {
        let load = load().unwrap();
        assert!(load.uptime > 0 && load.memory.total > load.memory.available && load.memory.available > 1 << 20);
        let disks = disks();
        assert!(disks["/"].total > 1 << 20 && disks["/"].available <= disks["/"].total);
        assert!(has_address(Ipv4Addr::LOCALHOST).unwrap());
        assert!(!has_address(Ipv4Addr::new(192, 0, 2, 1)).unwrap());
    }

    #[test]
    fn available_memory_counts_the_page_cache() {
        let text = "MemTotal:        1000000 kB\nMemFree:           10000 kB\nMemAvailable:     600000 kB\n";
        assert_eq!(memory(text), Space { total: 1_024_000_000, available: 614_400_000 });
        assert_eq!(memory("MemTotal: x\n"), Space::default());
    }
}
