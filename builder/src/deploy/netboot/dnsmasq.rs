//! Configuration of dnsmasq. dnsmasq assigns addresses to machines, or only names the boot file beside another DHCP
//! server (proxy DHCP). It serves the installer over TFTP.

use std::fmt::Write as _;
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

/// Name of the installer on the TFTP server and the HTTP server.
pub(super) const LOADER: &str = "bakehouse.efi";
/// Name of iPXE's script on the HTTP server.
pub(super) const SCRIPT: &str = "bakehouse.ipxe";
/// Folder of the TFTP server, relative to dnsmasq's folder.
pub(super) const TFTP: &str = "tftp";
/// Folder of the list of installed machines, relative to dnsmasq's folder.
pub(super) const HOSTS: &str = "hosts";

/// Network boot service of this host.
#[derive(Clone, Debug)]
pub(super) struct Service {
    /// Network interface.
    pub interface: String,
    /// This host's address on the interface.
    pub address: Ipv4Addr,
    /// Network of that address.
    pub net: Ipv4Net,
    /// Whether dnsmasq assigns addresses. If not, the network has another DHCP server.
    pub dhcp: bool,
    /// Port of the HTTP server.
    pub port: u16,
    /// dnsmasq's folder.
    pub dir: String,
}

impl Service {
    /// Returns the address of the HTTP server.
    #[must_use]
    pub(super) fn url(&self) -> String {
        format!("http://{}:{}", self.address, self.port)
    }

    /// Returns the content of `dnsmasq.conf`.
    #[must_use]
    pub(super) fn config(&self) -> String {
        let Self { interface, address, net, dir, .. } = self;
        let url = self.url();
        let mut text = format!(
            "# No DNS.\nport=0\nno-resolv\nno-hosts\nbind-interfaces\ninterface={interface}\nexcept-interface=lo\n\
             log-facility=-\nlog-dhcp\nuser=root\ngroup=root\npid-file\n\
             enable-tftp\ntftp-root={dir}/{TFTP}\ntftp-secure\ntftp-no-fail\n\
             # Installed machines boot from their disks.\ndhcp-hostsdir={dir}/{HOSTS}\n"
        );
        if self.dhcp {
            let (first, last) = range(*net, *address);
            let _ = writeln!(
                text,
                "dhcp-range={first},{last},{},1h\ndhcp-authoritative\ndhcp-leasefile={dir}/leases\n\
                 # This network has no router and no name server.\ndhcp-option=3\ndhcp-option=6",
                net.netmask()
            );
        } else {
            let _ = writeln!(text, "dhcp-range={},proxy,{}", net.network(), net.netmask());
        }
        // Client architectures (RFC 4578): x86-64 firmware sends 7 or 9, and 16 for UEFI HTTP boot.
        for arch in [7, 9] {
            let _ = writeln!(text, "dhcp-match=set:uefi,option:client-arch,{arch}");
        }
        let _ = writeln!(text, "dhcp-match=set:http,option:client-arch,16\ndhcp-match=set:ipxe,175");
        if self.dhcp {
            let _ = writeln!(text, "dhcp-boot=tag:uefi,tag:!ipxe,tag:!installed,{LOADER},,{address}");
        } else {
            let _ = writeln!(text, "pxe-prompt=tag:uefi,tag:!ipxe,tag:!installed,\"Bakehouse\",0");
            for name in ["X86-64_EFI", "BC_EFI"] {
                let _ = writeln!(
                    text,
                    "pxe-service=tag:uefi,tag:!ipxe,tag:!installed,{name},\"Bakehouse\",{LOADER},{address}"
                );
            }
        }
        let _ = writeln!(text, "dhcp-boot=tag:uefi,tag:ipxe,tag:!installed,{url}/{SCRIPT}");
        let _ = writeln!(
            text,
            "dhcp-option-force=tag:http,tag:!installed,60,HTTPClient\ndhcp-boot=tag:http,tag:!installed,{url}/{LOADER}"
        );
        text
    }
}

/// Returns iPXE's script. By default, iPXE passes the file's name as the command line, which would replace the command
/// line in the installer's UKI, so the script passes that one.
#[must_use]
pub(super) fn script(service: &Service, cmdline: &str) -> String {
    format!("#!ipxe\nchain {}/{LOADER} {cmdline}\n", service.url())
}

/// Returns the first and the last address to assign: the upper half of the network, without this host's address.
fn range(net: Ipv4Net, own: Ipv4Addr) -> (Ipv4Addr, Ipv4Addr) {
    let (network, broadcast) = (u32::from(net.network()), u32::from(net.broadcast()));
    let middle = network + (broadcast - network) / 2 + 1;
    let (first, last) = (middle, broadcast - 1);
    match u32::from(own) {
        own if own == first => (Ipv4Addr::from(first + 1), Ipv4Addr::from(last)),
        own if own > first && own <= last => (Ipv4Addr::from(first), Ipv4Addr::from(own - 1)),
        _ => (Ipv4Addr::from(first), Ipv4Addr::from(last)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(dhcp: bool) -> Service {
        Service {
            interface: "lan".into(),
            address: Ipv4Addr::new(192, 0, 2, 1),
            net: "192.0.2.0/24".parse().unwrap(),
            dhcp,
            port: 8080,
            dir: "/run/x".into(),
        }
    }

    #[test]
    fn range_is_the_upper_half_without_the_hosts_address() {
        let net: Ipv4Net = "192.0.2.0/24".parse().unwrap();
        let of = |own: u8| range(net, Ipv4Addr::new(192, 0, 2, own));
        assert_eq!(of(1), (Ipv4Addr::new(192, 0, 2, 128), Ipv4Addr::new(192, 0, 2, 254)));
        assert_eq!(of(128).0, Ipv4Addr::new(192, 0, 2, 129));
        assert_eq!(of(200).1, Ipv4Addr::new(192, 0, 2, 199));
    }

    #[test]
    fn dnsmasq_accepts_the_configuration() {
        for dhcp in [true, false] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("dnsmasq.conf");
            for folder in [TFTP, HOSTS] {
                std::fs::create_dir(dir.path().join(folder)).unwrap();
            }
            let service = Service { dir: dir.path().display().to_string(), ..service(dhcp) };
            std::fs::write(&path, service.config()).unwrap();
            let output = std::process::Command::new("dnsmasq").arg("--test").arg("-C").arg(&path).output();
            let output = output.expect("dnsmasq is installed: builder/host-deps.sh dnsmasq-base");
            assert!(output.status.success(), "{}\n{}", String::from_utf8_lossy(&output.stderr), service.config());
        }
    }
}
