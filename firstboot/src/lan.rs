//! Addresses of the local network on a hub (`[vip] lan`): which interface can hold them, and whether it does. The network
//! may appear, move or disappear at any time, so the hub looks at its interfaces as long as it runs.

use std::fmt::Write as _;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fleet::node_api::LinkStatus;
use fleet::{LanAddress, LanPlace, NodeContext};
use ipnet::IpNet;
use tracing::{info, warn};

use crate::error::{Error, Result};
use crate::host::network::Network;
use crate::host::systemd::Systemd;
use crate::render::render;

/// Time between two looks at the interfaces.
const INTERVAL: Duration = Duration::from_secs(2);
/// keepalived's configuration, below the templates and below the root.
const CONFIG: &str = "run/bakehouse/keepalived.conf";
const SERVICE: &str = "keepalived.service";
/// File with the metrics for node_exporter, below the root.
const METRICS: &str = "run/bakehouse/metrics/lan.prom";

/// Keeps keepalived's configuration in step with the interfaces of a hub.
pub struct Lan<'a> {
    /// Folder of the templates.
    pub templates: PathBuf,
    /// Root below which templates are rendered.
    pub root: PathBuf,
    /// Variables of the templates.
    pub context: NodeContext<'a>,
    /// systemd's manager.
    pub systemd: &'a Systemd,
}

impl Lan<'_> {
    /// Follows the interfaces until the process ends. On other nodes than hubs, and without addresses, it only waits.
    ///
    /// # Errors
    /// Never. It logs what fails, and tries again.
    pub async fn keep(&self) -> Result<()> {
        let wanted = &self.context.fleet.lan;
        if self.context.node.hub == 0 || wanted.is_empty() {
            return std::future::pending().await;
        }
        let mut known = Vec::new();
        let mut last = String::new();
        loop {
            match self.look(wanted, &mut known).await {
                Ok(()) => last.clear(),
                // Once for each cause, because it may last for hours.
                Err(e) if e.chain() != last => {
                    last = e.chain();
                    warn!("cannot follow the interfaces of the local network: {last}");
                }
                Err(_) => {}
            }
            tokio::time::sleep(INTERVAL).await;
        }
    }

    /// Looks at the interfaces once, and passes changes to keepalived.
    async fn look(&self, wanted: &[LanAddress], known: &mut Vec<LanPlace>) -> Result<()> {
        let links = links().await?;
        write_metrics(&self.root.join(METRICS), &metrics(&links, wanted))?;
        let now = places(&links, wanted);
        if now == *known {
            return Ok(());
        }
        let context = NodeContext { lan: &now, ..self.context };
        render(&self.templates, &self.root, Path::new(CONFIG), &context)?;
        // Without a running keepalived, the next start reads the file.
        if self.systemd.is_active(SERVICE).await? {
            self.systemd.reload(SERVICE).await?;
        }
        for lan in wanted.iter().filter(|lan| !now.iter().any(|place| place.address == lan.address)) {
            warn!("no interface is on the network of {}: this hub cannot hold the address", lan.address);
        }
        for LanPlace { address, interface } in &now {
            info!("this hub can hold {address} on {interface}");
        }
        *known = now;
        Ok(())
    }
}

/// Returns the interfaces of this machine.
///
/// # Errors
/// If the kernel does not list them.
pub async fn links() -> Result<Vec<LinkStatus>> {
    Network::open()?.links().await
}

/// Returns where each address can be: the first interface, in the kernel's order, that is on its network.
#[must_use]
pub fn places(links: &[LinkStatus], wanted: &[LanAddress]) -> Vec<LanPlace> {
    let find = |lan: &LanAddress| {
        let is_on = |link: &&LinkStatus| is_outside(link) && addresses(link).any(|own| lan.is_beside(own));
        let link = links.iter().find(is_on)?;
        Some(LanPlace { address: lan.address, interface: link.name.clone() })
    };
    wanted.iter().filter_map(find).collect()
}

/// Whether an interface belongs to neither the mesh nor the machine itself.
fn is_outside(link: &LinkStatus) -> bool {
    !(link.name == "lo" || link.name == "mesh0" || link.name.starts_with("wg"))
}

fn addresses(link: &LinkStatus) -> impl Iterator<Item = IpNet> {
    link.addresses.iter().filter_map(|text| text.parse().ok())
}

/// Returns the metrics: whether this hub can hold each address, and whether it does.
fn metrics(links: &[LinkStatus], wanted: &[LanAddress]) -> String {
    let held = |at: IpAddr| links.iter().any(|link| addresses(link).any(|own| own.addr() == at));
    let places = places(links, wanted);
    let mut text = String::new();
    for (name, value) in [
        ("bakehouse_lan_address_possible", &(|at| places.iter().any(|p| p.address == at)) as &dyn Fn(IpAddr) -> bool),
        ("bakehouse_lan_address_held", &held),
    ] {
        let _ = writeln!(text, "# TYPE {name} gauge");
        for lan in wanted {
            let _ = writeln!(text, "{name}{{address=\"{}\"}} {}", lan.address, u8::from(value(lan.address)));
        }
    }
    text
}

/// Replaces the file, so that node_exporter reads the old or the new one.
fn write_metrics(path: &Path, text: &str) -> Result<()> {
    let beside = path.with_extension("new");
    fs::write(&beside, text).map_err(Error::io("write", &beside))?;
    fs::rename(&beside, path).map_err(Error::io("rename", &beside))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(name: &str, addresses: &[&str]) -> LinkStatus {
        let addresses = addresses.iter().map(|a| (*a).to_owned()).collect();
        LinkStatus { name: name.to_owned(), addresses, ..LinkStatus::default() }
    }

    fn wanted() -> Vec<LanAddress> {
        ["192.168.1.100", "fd00::100"].map(|text| LanAddress::parse(text).unwrap()).into()
    }

    #[test]
    fn address_is_on_the_interface_of_its_network() {
        let links = [
            link("lo", &["127.0.0.1/8", "192.168.1.1/24"]),
            link("wg0", &["192.168.1.2/24"]),
            link("eth0", &["203.0.113.7/24"]),
            link("eth1", &["192.168.1.11/24", "192.168.1.100/32", "fe80::1/64"]),
        ];
        let found = places(&links, &wanted());
        assert_eq!(found, [LanPlace { address: [192, 168, 1, 100].into(), interface: "eth1".to_owned() }]);
        // The address that the hub holds does not keep it on an interface that has left the network.
        assert!(places(&[link("eth1", &["192.168.1.100/32"])], &wanted()).is_empty());
    }

    #[test]
    fn metrics_say_whether_the_hub_can_hold_an_address_and_does() {
        let text = metrics(&[link("eth1", &["192.168.1.11/24", "fd00::100/128"])], &wanted());
        for line in [
            "bakehouse_lan_address_possible{address=\"192.168.1.100\"} 1",
            "bakehouse_lan_address_possible{address=\"fd00::100\"} 0",
            "bakehouse_lan_address_held{address=\"192.168.1.100\"} 0",
            "bakehouse_lan_address_held{address=\"fd00::100\"} 1",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is missing:\n{text}");
        }
    }
}
