//! Addresses of `[vip]` outside the mesh: one hub holds them on its local network.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// An address of `[vip] lan` or `[vip] lan6`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LanAddress {
    /// The address that clients use.
    pub address: IpAddr,
    /// Length of its network's prefix, if `fleet.toml` has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefix: Option<u8>,
}

/// Where a hub holds a [`LanAddress`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LanPlace {
    /// The address.
    pub address: IpAddr,
    /// Interface whose network contains the address.
    pub interface: String,
}

impl LanAddress {
    /// Reads an address, which may have a prefix length: `192.168.1.100` or `192.168.1.100/24`.
    ///
    /// # Examples
    ///
    /// ```
    /// use fleet::LanAddress;
    ///
    /// let read = LanAddress::parse("192.168.1.100/24").unwrap();
    /// assert_eq!((read.address.to_string().as_str(), read.prefix), ("192.168.1.100", Some(24)));
    /// assert_eq!(LanAddress::parse("fd00::100").unwrap().prefix, None);
    /// assert_eq!(LanAddress::parse("192.168.1.100/33"), None);
    /// ```
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        if text.contains('/') {
            let network: IpNet = text.parse().ok()?;
            return Some(Self { address: network.addr(), prefix: Some(network.prefix_len()) });
        }
        Some(Self { address: text.parse().ok()?, prefix: None })
    }

    /// Returns the network of the address, if `fleet.toml` has its prefix length.
    #[must_use]
    pub fn network(&self) -> Option<IpNet> {
        Some(IpNet::new(self.address, self.prefix?).ok()?.trunc())
    }

    /// Whether an interface with this address and prefix length is on the network of the address.
    #[must_use]
    pub fn is_beside(&self, own: IpNet) -> bool {
        // The hub that holds the address has it as a host route. It says nothing about the network.
        own.addr() != self.address
            && (own.contains(&self.address) || self.network().is_some_and(|network| network.contains(&own.addr())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interface_is_found_by_its_network_or_by_the_prefix_of_the_address() {
        let beside = |lan: &str, own: &str| LanAddress::parse(lan).unwrap().is_beside(own.parse().unwrap());
        assert!(beside("192.168.1.100", "192.168.1.11/24"));
        assert!(!beside("192.168.1.100", "192.168.2.11/24") && !beside("192.168.1.100", "192.168.1.11/32"));
        // A cloud gives a /32, and the user names the network.
        assert!(beside("192.168.1.100/24", "192.168.1.11/32"));
        assert!(beside("fd00::100", "fd00::5/64") && !beside("fd00::100", "192.168.1.11/24"));
        assert!(!beside("192.168.1.100/24", "192.168.1.100/32"), "the held address itself");
    }
}
