//! Routes of the kernel, which BIRD sets.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use futures_util::TryStreamExt as _;
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteType};
use rtnetlink::{Handle, RouteMessageBuilder};

use crate::error::{Error, Result};

/// Netlink client for routes.
pub struct Routes(Handle);

impl Routes {
    /// Opens the client.
    ///
    /// # Errors
    /// If the netlink socket cannot be opened.
    pub fn open() -> Result<Self> {
        let (task, handle, _) = rtnetlink::new_connection().map_err(Error::io("open", "a netlink socket"))?;
        tokio::spawn(task);
        Ok(Self(handle))
    }

    /// Returns the addresses that have a host route (/32) to another machine.
    ///
    /// # Errors
    /// If the kernel does not list its routes.
    pub async fn hosts(&self) -> Result<BTreeSet<Ipv4Addr>> {
        let all = self.0.route().get(RouteMessageBuilder::<Ipv4Addr>::new().build()).execute();
        let routes: Vec<_> = all.try_collect().await.map_err(Error::cannot("list the kernel's routes"))?;
        let host = |attributes: &[RouteAttribute]| {
            attributes.iter().find_map(|a| match a {
                RouteAttribute::Destination(RouteAddress::Inet(host)) => Some(*host),
                _ => None,
            })
        };
        let to_others = |r: &&rtnetlink::packet_route::route::RouteMessage| {
            r.header.destination_prefix_length == 32 && r.header.kind == RouteType::Unicast
        };
        Ok(routes.iter().filter(to_others).filter_map(|r| host(&r.attributes)).collect())
    }
}
