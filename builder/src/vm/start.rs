//! Options for the start of a machine.

use std::path::Path;

use super::network::VirtualNic;

/// Network boot client of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Netboot {
    /// The firmware's PXE client: DHCP and TFTP.
    Pxe,
    /// The firmware's HTTP boot client: DHCP and HTTP.
    Http,
    /// iPXE in the option ROM of QEMU's network card.
    Ipxe,
}

/// Options for one start of a machine.
pub struct VmOptions<'a> {
    /// Image of the disk, raw.
    pub image: &'a Path,
    /// Memory in bytes.
    pub memory: u64,
    /// Processors that the node's profiles ask for.
    pub cpus: u16,
    /// Number of machines that run at the same time, including this one.
    pub machines: usize,
    /// Size of the disk in bytes.
    pub disk: u64,
    /// Keeps an existing disk, even if it was created from another image.
    pub keep: bool,
    /// Network card in the fleet's local network.
    pub nic: VirtualNic,
    /// Image of a second disk, raw and read-only.
    pub seed: Option<&'a Path>,
    /// Folder with the TPM's state. `None` starts a machine without a TPM.
    pub tpm: Option<&'a Path>,
    /// Network boot client that the machine uses if its disk is not bootable.
    pub netboot: Option<Netboot>,
    /// Uses the firmware build that enforces Secure Boot once the fleet's key is enrolled.
    pub secure_boot: bool,
    /// Uses a legacy BIOS instead of UEFI, with its screen on the serial console.
    pub bios: bool,
    /// systemd credentials: name and content.
    pub credentials: Vec<(String, Vec<u8>)>,
    /// Starts a container instead of a machine, with these WireGuard interfaces.
    pub container: Option<Vec<String>>,
}
