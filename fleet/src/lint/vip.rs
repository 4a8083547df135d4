//! Rules for the addresses of `[vip]` outside the mesh.

use std::net::{IpAddr, Ipv4Addr};
use std::ops::Range;

use ipnet::IpNet;
use toml::Spanned;

use super::Lint;
use crate::lan::LanAddress;

impl Lint<'_> {
    /// Reports addresses that no hub can hold on a local network, or that another machine has.
    pub(super) fn lan_addresses(&mut self) {
        let fleet = self.fleet;
        let found: Vec<LanAddress> = [("lan", &fleet.vip.lan, false), ("lan6", &fleet.vip.lan6, true)]
            .into_iter()
            .filter_map(|(key, text, v6)| self.lan_address(key, text.as_ref()?, v6))
            .collect();
        if found.is_empty() {
            return;
        }
        let span = fleet.vip.lan.as_ref().or(fleet.vip.lan6.as_ref()).map_or(0..0, Spanned::span);
        if self.topology.hubs.len() == 1 {
            self.warning(
                span.clone(),
                "[vip] the fleet has one hub: no other hub can take the address of the local network".to_owned(),
                "have at least two hubs on that network".to_owned(),
            );
        }
        self.hubs_are_beside(&found, &span);
    }

    /// Reads an address, and reports what makes it unusable.
    fn lan_address(&mut self, key: &str, text: &Spanned<String>, v6: bool) -> Option<LanAddress> {
        let (span, written) = (text.span(), text.get_ref().escape_debug().to_string());
        let Some(lan) = LanAddress::parse(text.get_ref()).filter(|lan| lan.address.is_ipv6() == v6) else {
            let (family, example) = if v6 { ("IPv6", "fd00:1::100/64") } else { ("IPv4", "192.168.1.100/24") };
            let fix = format!("write it as in `{key} = \"{example}\"`; the other family has a key of its own");
            self.error(span, format!("[vip] `{written}` is not an {family} address"), fix);
            return None;
        };
        let help = "choose a free address of the hubs' local network, outside the range of its DHCP server".to_owned();
        if let Some(what) = unusable(lan) {
            self.error(span, format!("[vip] {key}: {} {what}", lan.address), help);
            return None;
        }
        if let IpAddr::V4(address) = lan.address {
            let mesh = &self.topology.mesh;
            if let Some(network) = [mesh.subnet, mesh.transport].into_iter().find(|n| n.contains(&address)) {
                let fix = "the address inside the mesh is `[vip] address`; `lan` is outside the mesh".to_owned();
                self.error(span, format!("[vip] {key}: {address} is in the mesh's network {network}"), fix);
                return None;
            }
        }
        let owner = self.topology.nodes.iter().find(|n| n.endpoint.as_deref().is_some_and(|e| is(e, lan.address)));
        if let Some(name) = owner.map(|n| n.name.clone()) {
            self.error(span, format!("[vip] {key}: {} is the endpoint of {name}", lan.address), help);
            return None;
        }
        Some(lan)
    }

    /// Compares the hubs' endpoints that are addresses with the networks that have a prefix length.
    fn hubs_are_beside(&mut self, found: &[LanAddress], span: &Range<usize>) {
        let hubs = self.topology.hubs.iter().filter_map(|hub| Some((&hub.name, address(hub.endpoint.as_deref()?)?)));
        let hubs: Vec<(&String, IpAddr)> = hubs.collect();
        let mut wrong = Vec::new();
        for network in found.iter().filter_map(LanAddress::network) {
            let of_family = || hubs.iter().filter(|(_, own)| own.is_ipv4() == network.addr().is_ipv4());
            let here = of_family().filter(|(_, own)| network.contains(own)).count();
            // Behind a router, an endpoint may be a public address. A private address is one of the hub itself.
            for (name, own) in of_family().filter(|(_, own)| !network.contains(own)) {
                if here > 0 || (is_private(*own) && is_private(network.addr())) {
                    wrong.push(format!("{name} has {own}, which is not in {network}"));
                }
            }
        }
        // Without a prefix length, endpoints that share no /16 are hardly on one local network.
        if found.iter().all(|lan| lan.prefix.is_none()) {
            let private = hubs.iter().filter(|(_, own)| is_private(*own) && own.is_ipv4());
            let mut nets: Vec<(IpNet, &String)> = Vec::new();
            for (name, own) in private {
                if let Ok(net) = IpNet::new(*own, 16)
                    && !nets.iter().any(|(known, _)| *known == net.trunc())
                {
                    nets.push((net.trunc(), name));
                }
            }
            if let [(one, first), (other, second), ..] = &nets[..] {
                wrong.push(format!("{first} is in {one} and {second} in {other}"));
            }
        }
        if !wrong.is_empty() {
            self.warning(
                span.clone(),
                format!("[vip] hubs that are not on one local network: {}", wrong.join("; ")),
                "a hub without an interface on the network of the address never holds it; use `[dns]` for hubs on \
                 several networks"
                    .to_owned(),
            );
        }
    }
}

/// Returns why no hub can have the address on a local network.
fn unusable(lan: LanAddress) -> Option<&'static str> {
    let address = lan.address;
    if address.is_loopback() || address.is_multicast() || address.is_unspecified() {
        return Some("is not the address of one machine");
    }
    match address {
        IpAddr::V4(v4) if v4.is_link_local() || v4.is_broadcast() => Some("is not an address of a network"),
        IpAddr::V6(v6) if v6.is_unicast_link_local() => Some("is a link-local address, which browsers cannot use"),
        IpAddr::V4(v4) if lan.prefix.is_some_and(|p| p < 31) => {
            let Some(IpNet::V4(network)) = lan.network() else { return None };
            let is_host = v4 != network.network() && v4 != network.broadcast();
            (!is_host).then_some("is the network's own or its broadcast address")
        }
        _ => None,
    }
}

fn address(endpoint: &str) -> Option<IpAddr> {
    endpoint.parse().ok()
}

fn is(endpoint: &str, lan: IpAddr) -> bool {
    address(endpoint) == Some(lan)
}

fn is_private(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_private() || is_shared(v4),
        IpAddr::V6(v6) => v6.is_unique_local(),
    }
}

/// Whether the address belongs to a provider's shared range, RFC 6598.
fn is_shared(address: Ipv4Addr) -> bool {
    address.octets()[0] == 100 && (64..128).contains(&address.octets()[1])
}

#[cfg(test)]
mod tests {
    use super::super::tests::{errors, one, warnings};

    fn with(vip: &str, endpoints: [&str; 3]) -> String {
        format!("name = \"acme\"\n[vip]\n{vip}\n[groups.hub]\ncount = 3\nendpoints = {endpoints:?}\n")
    }

    const LAN: [&str; 3] = ["192.168.1.11", "192.168.1.12", "192.168.1.13"];

    #[test]
    fn unusable_address_of_a_local_network_is_an_error() {
        assert_eq!(errors(&with("lan = \"192.168.1.100\"\nlan6 = \"fd00::100/64\"", LAN)), Vec::<String>::new());
        for (vip, message) in [
            ("lan = \"fd00::100\"", "`fd00::100` is not an IPv4 address"),
            ("lan = \"192.168.1.100/33\"", "is not an IPv4 address"),
            ("lan6 = \"192.168.1.100\"", "is not an IPv6 address"),
            ("lan = \"10.10.0.101\"", "10.10.0.101 is in the mesh's network 10.10.0.0/24"),
            ("lan = \"10.11.0.9/24\"", "10.11.0.9 is in the mesh's network 10.11.0.0/24"),
            ("lan = \"192.168.1.12\"", "192.168.1.12 is the endpoint of hub-2"),
            ("lan = \"192.168.1.255/24\"", "is the network's own or its broadcast address"),
            ("lan = \"127.0.0.1\"", "is not the address of one machine"),
            ("lan = \"169.254.7.7\"", "is not an address of a network"),
            ("lan6 = \"fe80::1\"", "is a link-local address"),
        ] {
            one(&with(vip, LAN), 3, message);
        }
    }

    #[test]
    fn warns_about_hubs_of_several_networks() {
        let found = |vip: &str, endpoints| -> Vec<String> {
            warnings(&with(vip, endpoints)).into_iter().filter(|w| w.contains("not on one local network")).collect()
        };
        assert!(found("lan = \"192.168.1.100/24\"", LAN).is_empty());
        let two = ["192.168.1.11", "192.168.1.12", "10.99.0.3"];
        let warned = found("lan = \"192.168.1.100/24\"", two);
        assert!(warned.len() == 1 && warned[0].contains("hub-3 has 10.99.0.3, which is not in 192.168.1.0/24"));
        assert!(
            found("lan = \"192.168.1.100\"", two)[0].contains("hub-1 is in 192.168.0.0/16 and hub-3 in 10.99.0.0/16")
        );
        // Public endpoints behind a router tell nothing about the local network.
        assert!(found("lan = \"192.168.1.100/24\"", ["a.acme.test", "198.18.0.1", "198.18.0.2"]).is_empty());
    }
}
