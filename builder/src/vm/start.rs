//! How a machine is started.

use std::path::Path;

use super::network::VirtualNic;

/// By what its firmware asks the network for something to boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Netboot {
    /// DHCP and TFTP.
    Pxe,
    /// DHCP and HTTP.
    Http,
    /// iPXE's own, as it is on QEMU's network cards.
    Ipxe,
}

/// How to start a machine.
pub struct VmOptions<'a> {
    pub image: &'a Path,
    /// Bytes.
    pub memory: u64,
    pub cpus: u16,
    /// Machines that run at the same time, this one too.
    pub machines: usize,
    /// Bytes of the disk.
    pub disk: u64,
    /// A disk that is there stays, also where the image is another by now.
    pub keep: bool,
    pub wire: VirtualNic,
    /// A second disk, raw.
    pub seed: Option<&'a Path>,
    /// The folder of what its TPM remembers; it has one then.
    pub tpm: Option<&'a Path>,
    /// Where its disk has nothing to boot, the machine asks on the wire.
    pub netboot: Option<Netboot>,
    /// Its firmware runs what is signed, and nothing else, once it has the fleet's key.
    pub secure_boot: bool,
    /// Its firmware is no UEFI but a legacy BIOS, with its screen on the serial console.
    pub bios: bool,
    /// systemd credentials: name → content.
    pub credentials: Vec<(String, Vec<u8>)>,
    /// It is no machine but a container, with these WireGuard interfaces.
    pub container: Option<Vec<String>>,
}
