//! Network interfaces, addresses and routes of the kernel, over netlink.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use fleet::node_api::{LinkStatus, RouteStatus};
use futures_util::TryStreamExt as _;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteType};
use rtnetlink::{Handle, RouteMessageBuilder};

use crate::error::{Error, Result};

/// Reads the kernel's network over netlink.
pub(crate) struct Network(Handle);

impl Network {
    /// Opens the client.
    ///
    /// # Errors
    /// If the netlink socket cannot be opened.
    pub(crate) fn open() -> Result<Self> {
        let (task, handle, _) = rtnetlink::new_connection().map_err(Error::io("open", "a netlink socket"))?;
        tokio::spawn(task);
        Ok(Self(handle))
    }

    /// Returns the interfaces, with their addresses, in the kernel's order.
    ///
    /// # Errors
    /// If the kernel does not list them.
    pub(crate) async fn links(&self) -> Result<Vec<LinkStatus>> {
        let links: Vec<LinkMessage> =
            self.0.link().get().execute().try_collect().await.map_err(cannot("interfaces"))?;
        let addresses = self.0.address().get().execute().try_collect::<Vec<AddressMessage>>();
        let addresses = addresses.await.map_err(cannot("addresses"))?;
        Ok(links.iter().map(|message| link(message, &addresses)).collect())
    }

    /// Returns the routes of the main table.
    ///
    /// # Errors
    /// If the kernel does not list them.
    pub(crate) async fn routes(&self) -> Result<Vec<RouteStatus>> {
        let links: Vec<LinkMessage> =
            self.0.link().get().execute().try_collect().await.map_err(cannot("interfaces"))?;
        let names: BTreeMap<u32, String> = links.iter().map(|m| (m.header.index, name(m))).collect();
        let v4 = self.0.route().get(RouteMessageBuilder::<Ipv4Addr>::new().build()).execute();
        let mut all: Vec<RouteMessage> = v4.try_collect().await.map_err(cannot("routes"))?;
        let v6 = self.0.route().get(RouteMessageBuilder::<Ipv6Addr>::new().build()).execute();
        // A kernel without IPv6 refuses to list its routes.
        all.extend(v6.try_collect::<Vec<RouteMessage>>().await.unwrap_or_default());
        Ok(all.iter().filter_map(|message| route(message, &names)).collect())
    }
}

fn cannot(what: &str) -> impl FnOnce(rtnetlink::Error) -> Error {
    Error::cannot(format!("list the kernel's {what}"))
}

fn name(message: &LinkMessage) -> String {
    let name = message.attributes.iter().find_map(|a| match a {
        LinkAttribute::IfName(name) => Some(name.clone()),
        _ => None,
    });
    name.unwrap_or_else(|| message.header.index.to_string())
}

fn link(message: &LinkMessage, addresses: &[AddressMessage]) -> LinkStatus {
    let up = LinkFlags::Up | LinkFlags::Running;
    let mut status = LinkStatus { name: name(message), up: message.header.flags.contains(up), ..LinkStatus::default() };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::Mtu(mtu) => status.mtu = *mtu,
            LinkAttribute::Address(bytes) => status.mac = mac(bytes),
            LinkAttribute::LinkInfo(infos) => {
                let kind = infos.iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind.to_string()),
                    _ => None,
                });
                status.kind = kind.unwrap_or_default();
            }
            LinkAttribute::Stats64(stats) => {
                (status.received, status.sent) = (stats.rx_bytes, stats.tx_bytes);
                status.errors = stats.rx_errors + stats.tx_errors;
                status.dropped = stats.rx_dropped + stats.tx_dropped;
            }
            _ => {}
        }
    }
    let own = addresses.iter().filter(|address| address.header.index == message.header.index);
    status.addresses = own.filter_map(address).collect();
    status
}

/// Returns an Ethernet address; `None` for other hardware addresses, and for the loopback interface's.
fn mac(bytes: &[u8]) -> Option<String> {
    let is_ethernet = bytes.len() == 6 && bytes.iter().any(|byte| *byte != 0);
    is_ethernet.then(|| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":"))
}

/// Returns an address with its prefix length.
fn address(message: &AddressMessage) -> Option<String> {
    let (mut local, mut other) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            // On an interface to one peer, the attribute `Address` is the peer's.
            AddressAttribute::Local(at) => local = Some(at),
            AddressAttribute::Address(at) => other = Some(at),
            _ => {}
        }
    }
    let prefix = match (local, other) {
        (Some(IpAddr::V4(own)), Some(IpAddr::V4(partner))) if own != partner => 32,
        _ => message.header.prefix_len,
    };
    Some(format!("{}/{prefix}", local.or(other)?))
}

/// Returns a route of the main table; `None` for another table, and for clones and local addresses.
fn route(message: &RouteMessage, names: &BTreeMap<u32, String>) -> Option<RouteStatus> {
    let RouteHeader { kind, protocol, destination_prefix_length: prefix, table, .. } = message.header;
    if table != RouteHeader::RT_TABLE_MAIN || matches!(kind, RouteType::Local | RouteType::Multicast) {
        return None;
    }
    let mut status = RouteStatus {
        to: "default".to_owned(),
        kind: format!("{kind:?}").to_lowercase(),
        source: protocol.to_string().to_lowercase(),
        ..RouteStatus::default()
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(to) => status.to = format!("{}/{prefix}", host(to)?),
            RouteAttribute::Gateway(via) => status.via = host(via).map(|via| via.to_string()),
            RouteAttribute::Oif(link) => status.link = names.get(link).cloned(),
            RouteAttribute::Priority(metric) => status.metric = *metric,
            RouteAttribute::MultiPath(hops) => {
                let first = hops.first()?;
                status.link = names.get(&first.interface_index).cloned();
            }
            _ => {}
        }
    }
    Some(status)
}

fn host(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(at) => Some(IpAddr::V4(*at)),
        RouteAddress::Inet6(at) => Some(IpAddr::V6(*at)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rtnetlink::packet_route::route::RouteProtocol;

    #[tokio::test]
    async fn reads_this_machine() {
        let network = Network::open().unwrap();
        let links = network.links().await.unwrap();
        let lo = links.iter().find(|link| link.name == "lo").unwrap();
        assert!(lo.mtu >= 1500 && lo.mac.is_none(), "{lo:?}");
        if lo.up {
            assert!(lo.addresses.contains(&"127.0.0.1/8".to_owned()), "{lo:?}");
        }
        for route in network.routes().await.unwrap() {
            assert!(!route.kind.is_empty() && !route.source.is_empty(), "{route:?}");
        }
    }

    #[test]
    fn a_route_has_its_next_hop_and_its_interface() {
        let names = BTreeMap::from([(7, "wg-hub1".to_owned())]);
        let mut message = RouteMessage::default();
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        message.header.kind = RouteType::Unicast;
        message.header.protocol = RouteProtocol::Bird;
        message.header.destination_prefix_length = 16;
        message.attributes = vec![
            RouteAttribute::Destination(RouteAddress::Inet([10, 10, 0, 0].into())),
            RouteAttribute::Gateway(RouteAddress::Inet([10, 11, 0, 1].into())),
            RouteAttribute::Oif(7),
            RouteAttribute::Priority(32),
        ];
        let expected = RouteStatus {
            to: "10.10.0.0/16".to_owned(),
            via: Some("10.11.0.1".to_owned()),
            link: Some("wg-hub1".to_owned()),
            kind: "unicast".to_owned(),
            source: "bird".to_owned(),
            metric: 32,
        };
        assert_eq!(route(&message, &names), Some(expected.clone()));
        message.attributes.remove(0);
        let default = RouteStatus { to: "default".to_owned(), ..expected };
        assert_eq!(route(&message, &names), Some(default));
        message.header.kind = RouteType::Local;
        assert_eq!(route(&message, &names), None);
        (message.header.kind, message.header.table) = (RouteType::Unicast, 255);
        assert_eq!(route(&message, &names), None);
    }

    #[test]
    fn an_address_of_a_link_to_one_peer_is_the_own_one() {
        let mut message = AddressMessage::default();
        message.header.prefix_len = 32;
        let partner = IpAddr::from([10, 11, 0, 1]);
        message.attributes =
            vec![AddressAttribute::Address(partner), AddressAttribute::Local(IpAddr::from([10, 11, 0, 20]))];
        assert_eq!(address(&message).as_deref(), Some("10.11.0.20/32"));
        message.header.prefix_len = 64;
        message.attributes = vec![AddressAttribute::Address("fe80::1".parse().unwrap())];
        assert_eq!(address(&message).as_deref(), Some("fe80::1/64"));
    }
}
