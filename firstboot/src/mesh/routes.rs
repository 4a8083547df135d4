//! Whom there is a way to: what BIRD gave the kernel.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use futures_util::TryStreamExt as _;
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteType};
use rtnetlink::{Handle, RouteMessageBuilder};

use crate::error::{Error, Result};

/// The kernel's routes, as they are asked for.
pub struct Routes(Handle);

impl Routes {
    /// # Errors
    /// The kernel does not speak netlink with this process.
    pub fn open() -> Result<Self> {
        let (task, handle, _) = rtnetlink::new_connection().map_err(Error::io("open", "a netlink socket"))?;
        tokio::spawn(task);
        Ok(Self(handle))
    }

    /// Single addresses that have a route to another machine.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub async fn hosts(&self) -> Result<BTreeSet<Ipv4Addr>> {
        let all = self.0.route().get(RouteMessageBuilder::<Ipv4Addr>::new().build()).execute();
        let told = |e| Error::Failed(format!("the kernel does not tell its routes: {e}"));
        let routes: Vec<_> = all.try_collect().await.map_err(told)?;
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
