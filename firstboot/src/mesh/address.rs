//! Addresses of this machine.

use std::net::{IpAddr, Ipv4Addr};

use futures_util::TryStreamExt as _;

use crate::error::{Error, Result};

/// Whether this machine has an address now. A test by `bind` would not work, because hubs may bind to addresses that
/// they do not have (`ip_nonlocal_bind`).
///
/// # Errors
/// If the netlink socket cannot be opened, or the kernel does not list its addresses.
pub async fn has_address(address: Ipv4Addr) -> Result<bool> {
    let (task, handle, _) = rtnetlink::new_connection().map_err(Error::io("open", "a netlink socket"))?;
    let task = tokio::spawn(task);
    let found = handle.address().get().set_address_filter(IpAddr::V4(address)).execute().try_next().await;
    task.abort();
    found.map(|f| f.is_some()).map_err(Error::cannot("list the kernel's addresses"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn finds_loopback_and_no_documentation_address() {
        assert!(has_address(Ipv4Addr::LOCALHOST).await.unwrap());
        assert!(!has_address(Ipv4Addr::new(192, 0, 2, 77)).await.unwrap());
    }
}
