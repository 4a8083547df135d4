//! The name of `[dns]` on a hub: which hubs work, as this hub sees them, and the zone that Knot serves.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fleet::{DNS, HubAnswer, Node, Topology, serving_hubs, zone_file};
use fleet_https::{Connection, request};
use futures_util::future::join_all;
use tracing::{info, warn};

use crate::error::{Error, Result};
use crate::host::systemd::Systemd;
use crate::mesh::Resolver;

/// Time between two rounds of questions to all hubs.
const INTERVAL: Duration = Duration::from_secs(2);
/// Time limit of a hub's reply.
const ANSWER: Duration = Duration::from_secs(2);
/// Rounds in which a hub has to answer otherwise before its addresses leave the zone or return.
const ROUNDS: u32 = 2;
/// Folder of the zone, below the root.
const FOLDER: &str = "run/bakehouse/dns";
/// File with the metrics for node_exporter, below the root.
const METRICS: &str = "run/bakehouse/metrics/dns.prom";
const SERVICE: &str = "knot.service";
/// HAProxy's port, and the page that needs an application server.
const WEB: u16 = 80;
const PAGE: &str = "/web/health";

/// Keeps the zone of a hub up to date.
pub struct NameService<'a> {
    /// Root below which the zone is written.
    pub root: PathBuf,
    /// All nodes, and the settings of the fleet.
    pub topology: &'a Topology,
    /// This hub.
    pub node: &'a Node,
    /// Endpoints of nodes that differ from those of `fleet.toml`.
    pub endpoints: BTreeMap<String, String>,
    /// systemd's manager.
    pub systemd: &'a Systemd,
}

impl NameService<'_> {
    /// Follows the hubs until the process ends. On nodes without the role `dns`, it only waits.
    ///
    /// # Errors
    /// Never. It logs what fails, and tries again.
    pub async fn keep(&self) -> Result<()> {
        if !self.node.has_role(DNS) {
            return std::future::pending().await;
        }
        let mut observer = Observer::new(self.topology, self.node, &self.endpoints);
        let mut known = String::new();
        loop {
            let zone = observer.look().await;
            match self.publish(&zone, &known, &observer).await {
                Ok(()) => known = zone,
                Err(e) => warn!("cannot publish the addresses of the hubs: {}", e.chain()),
            }
            tokio::time::sleep(INTERVAL).await;
        }
    }

    /// Writes the zone if it has changed, and passes it to Knot.
    async fn publish(&self, zone: &str, known: &str, observer: &Observer<'_>) -> Result<()> {
        let folder = self.root.join(FOLDER);
        replace(&self.root.join(METRICS), &observer.metrics())?;
        if zone == known {
            return Ok(());
        }
        fs::create_dir_all(&folder).map_err(Error::io("create", &folder))?;
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o755)).map_err(Error::io("open", &folder))?;
        replace(&folder.join("zone"), zone)?;
        // Without a running Knot, the next start reads the file.
        if self.systemd.is_active(SERVICE).await? {
            self.systemd.reload(SERVICE).await?;
        }
        let serving: Vec<&str> = observer.serving.iter().map(String::as_str).collect();
        info!("the name of [dns] leads to {}", serving.join(", "));
        Ok(())
    }
}

/// What this hub sees of the hubs.
pub struct Observer<'a> {
    topology: &'a Topology,
    own: &'a str,
    zone: String,
    endpoints: &'a BTreeMap<String, String>,
    resolver: Resolver,
    seen: BTreeMap<String, Seen>,
    serving: BTreeSet<String>,
}

/// A hub's answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    /// The answer that counts.
    answer: HubAnswer,
    /// Last rounds in which the hub answered otherwise.
    others: u32,
}

impl<'a> Observer<'a> {
    /// Returns an observer on the hub `node`. `endpoints` replace those of `fleet.toml`.
    #[must_use]
    pub fn new(topology: &'a Topology, node: &'a Node, endpoints: &'a BTreeMap<String, String>) -> Self {
        let zone = topology.dns.name.clone().unwrap_or_default();
        let (seen, serving) = (BTreeMap::new(), BTreeSet::new());
        Self { topology, own: &node.name, zone, endpoints, resolver: Resolver::new(), seen, serving }
    }

    /// Asks each hub once. Returns the text of the zone.
    pub async fn look(&mut self) -> String {
        let hubs = &self.topology.hubs;
        let answers = join_all(hubs.iter().map(|hub| ask(hub.address))).await;
        for (hub, answer) in hubs.iter().zip(answers) {
            let seen = self.seen.get(&hub.name).copied();
            self.seen.insert(hub.name.clone(), next(seen, answer));
        }
        let seen = self.seen.iter().map(|(hub, seen)| (hub.clone(), seen.answer)).collect();
        self.serving = serving_hubs(&seen, self.own);
        let hubs: Vec<(&Node, Option<String>)> =
            hubs.iter().map(|hub| (hub, hub.endpoint_in(self.endpoints))).collect();
        let mut addresses: BTreeMap<String, Vec<IpAddr>> = BTreeMap::new();
        for (hub, endpoint) in &hubs {
            let Some(endpoint) = endpoint else { continue };
            let found = self.resolver.addresses(&(endpoint.clone(), WEB));
            let mut found: Vec<IpAddr> = found.iter().map(std::net::SocketAddr::ip).collect();
            // Resolvers return the addresses of a name in any order.
            found.sort_unstable();
            found.dedup();
            addresses.insert(hub.name.clone(), found);
        }
        zone_file(&self.zone, &hubs, &addresses, &self.serving)
    }

    /// Returns the metrics: to which hubs the name leads.
    fn metrics(&self) -> String {
        let mut text = "# TYPE bakehouse_dns_serves gauge\n".to_owned();
        for hub in &self.topology.hubs {
            let serves = u8::from(self.serving.contains(&hub.name));
            let _ = writeln!(text, "bakehouse_dns_serves{{hub=\"{}\"}} {serves}", hub.name);
        }
        text
    }
}

/// Returns a hub's state after one more answer. The first one counts at once.
fn next(seen: Option<Seen>, answer: HubAnswer) -> Seen {
    match seen {
        Some(seen) if seen.answer == answer => Seen { others: 0, ..seen },
        Some(seen) if seen.others + 1 < ROUNDS => Seen { others: seen.others + 1, ..seen },
        _ => Seen { answer, others: 0 },
    }
}

/// Asks the HAProxy of a hub for the page that Odoo answers.
async fn ask(hub: Ipv4Addr) -> HubAnswer {
    let host = hub.to_string();
    let asked = async {
        let mut connection = Connection::plain(&host, WEB).await?;
        connection.send(request("GET", &host, PAGE, &[], "".into())?).await
    };
    match tokio::time::timeout(ANSWER, asked).await {
        Ok(Ok(response)) if response.status().is_success() => HubAnswer::Page,
        Ok(Ok(_)) => HubAnswer::Error,
        _ => HubAnswer::None,
    }
}

/// Replaces a file that daemons of other users read.
fn replace(path: &Path, text: &str) -> Result<()> {
    let beside = path.with_extension("new");
    fs::write(&beside, text).map_err(Error::io("write", &beside))?;
    fs::set_permissions(&beside, fs::Permissions::from_mode(0o644)).map_err(Error::io("set the mode of", &beside))?;
    fs::rename(&beside, path).map_err(Error::io("rename", &beside))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_lost_answer_changes_nothing() {
        let page = next(None, HubAnswer::Page);
        assert_eq!(page.answer, HubAnswer::Page);
        let once = next(Some(page), HubAnswer::None);
        assert_eq!(once.answer, HubAnswer::Page);
        assert_eq!(next(Some(once), HubAnswer::Page), page);
        let twice = next(Some(once), HubAnswer::None);
        assert_eq!(twice, Seen { answer: HubAnswer::None, others: 0 });
        assert_eq!(next(Some(next(Some(twice), HubAnswer::Page)), HubAnswer::Page), page);
    }

    #[tokio::test]
    async fn hub_without_a_web_server_gives_no_answer() {
        // No test of this process listens on port 80 of this address.
        assert_eq!(ask([127, 88, 77, 66].into()).await, HubAnswer::None);
    }
}
