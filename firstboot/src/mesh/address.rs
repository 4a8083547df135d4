//! Addresses of this machine.

use std::net::{IpAddr, Ipv4Addr};

use futures_util::TryStreamExt as _;

use crate::error::{Error, Result};

/// Whether this machine has an address now. Binding to it would not tell: hubs may bind to what
/// they don't have.
///
/// # Errors
/// The kernel does not speak netlink with this process.
pub async fn has_address(address: Ipv4Addr) -> Result<bool> {
    let (task, handle, _) = rtnetlink::new_connection().map_err(Error::io("open", "a netlink socket"))?;
    let task = tokio::spawn(task);
    let found = handle.address().get().set_address_filter(IpAddr::V4(address)).execute().try_next().await;
    task.abort();
    found.map(|f| f.is_some()).map_err(|e| Error::Failed(format!("the kernel does not tell its addresses: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn loopback_is_there_and_a_documentation_address_is_not() {
        assert!(has_address(Ipv4Addr::LOCALHOST).await.unwrap());
        assert!(!has_address(Ipv4Addr::new(192, 0, 2, 77)).await.unwrap());
    }
}
