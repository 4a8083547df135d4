//! Description of this machine: network cards, serial number, disks and memory.

use std::fs;
use std::path::Path;

use fleet::netboot::{Mac, MachineDisk, NetbootMachine};

use crate::error::{Error, Result};

/// Reads the description from the kernel.
pub(super) fn look() -> Result<NetbootMachine> {
    let memory = crate::host::machine::read("")?.memory << 20;
    Ok(NetbootMachine { memory, ..look_in(Path::new("/sys"))? })
}

fn look_in(sys: &Path) -> Result<NetbootMachine> {
    let read = |path: &Path| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    let mut macs = Vec::new();
    for card in entries(&sys.join("class/net"))? {
        // Only Ethernet, and only interfaces with a device.
        if card.join("device").exists() && read(&card.join("type")) == "1" {
            // A card that is not up yet may have no address.
            macs.extend(read(&card.join("address")).parse::<Mac>().ok());
        }
    }
    let mut disks = Vec::new();
    for disk in entries(&sys.join("class/block"))? {
        let size = read(&disk.join("size")).parse::<u64>().unwrap_or(0) * 512;
        // Optical drives (sr) also have a device.
        let name = disk.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        if disk.join("device").exists() && !disk.join("partition").exists() && size > 0 && !name.starts_with("sr") {
            let removable = read(&disk.join("removable")) == "1";
            disks.push(MachineDisk { path: format!("/dev/{name}"), size, removable });
        }
    }
    let serial = read(&sys.join("class/dmi/id/product_serial"));
    Ok(NetbootMachine { version: NetbootMachine::VERSION, macs, serial, disks, memory: 0, key: String::new() })
}

fn entries(dir: &Path) -> Result<Vec<std::path::PathBuf>> {
    let read = fs::read_dir(dir).map_err(Error::io("read", dir))?;
    let mut found: Vec<_> = read.filter_map(|e| Some(e.ok()?.path())).collect();
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_only_real_cards_and_disks() {
        let dir = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("class/net/lo/address", "00:00:00:00:00:00\n");
        write("class/net/eth0/address", "52:54:00:aa:bb:cc\n");
        write("class/net/eth0/type", "1\n");
        write("class/net/eth0/device/x", "");
        for (name, size, device) in
            [("vda", "2048", true), ("loop0", "8", false), ("sr0", "8", true), ("vdb", "0", true)]
        {
            write(&format!("class/block/{name}/size"), size);
            write(&format!("class/block/{name}/removable"), "0\n");
            if device {
                write(&format!("class/block/{name}/device/x"), "");
            }
        }
        write("class/block/vda1/size", "1024");
        write("class/block/vda1/device/x", "");
        write("class/block/vda1/partition", "1");
        write("class/dmi/id/product_serial", "A1\n");
        let found = look_in(dir.path()).unwrap();
        assert_eq!(found.macs, ["52:54:00:aa:bb:cc".parse().unwrap()]);
        assert_eq!(found.serial, "A1");
        assert_eq!(found.disks, [MachineDisk { path: "/dev/vda".into(), size: 1 << 20, removable: false }]);
    }
}
