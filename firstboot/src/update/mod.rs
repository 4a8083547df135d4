//! Updates of this node: it reports its version and the available one to the hubs, and installs the new image when a
//! hub grants the update lock. systemd-sysupdate downloads and verifies the image, the boot loader counts its tries,
//! and firstboot-healthy checks it after the boot.

pub mod boot_entries;
pub mod download;
pub mod grub;
pub mod health;

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use fleet::grubenv::TRIES;
use fleet::{Node, PROTOCOL, Report, Topology, UpdateDecision, UpdateState, compare_versions};
use tracing::{info, warn};

use crate::client::patroni::Patroni;
use crate::error::{Error, Result};
use crate::host::console::log_event;
use crate::host::journal::Event;
use crate::host::systemd::Systemd;
use crate::node::image::ImageInfo;
use crate::node::state::{PassedOver, StateDir};
use crate::update::boot_entries::Boots;

/// Time between two reports.
const REPORT_INTERVAL: Duration = Duration::from_secs(30);
/// Time between two reports while the node starts, or waits for the update lock.
const SHORT_INTERVAL: Duration = Duration::from_secs(10);
/// How long an offer is valid after `firstboot-check.service` wrote it.
const FRESH: Duration = Duration::from_secs(900);

/// Installs newer images on one node.
pub struct Updates<'a> {
    /// Starts units, and reads their state.
    pub systemd: &'a Systemd,
    /// Version and identifier of the running image.
    pub image: &'a ImageInfo,
    /// All nodes, and the settings of the fleet.
    pub topology: &'a Topology,
    /// This node.
    pub node: &'a Node,
    /// Client of Patroni, on nodes with the role `db`.
    pub patroni: Option<Patroni>,
    /// Folder of the boot loader's entries.
    pub entries: PathBuf,
    /// File with the available version, written by `firstboot-check.service`.
    pub offer: PathBuf,
    /// The node's files below /var/lib/bakehouse.
    pub state: &'a StateDir,
}

impl Updates<'_> {
    /// Reports to the hubs with `send`, and installs the available image when a hub grants the update lock. Returns
    /// only on failure.
    ///
    /// # Errors
    /// If the boot loader's entries cannot be read before the restart, or systemd refuses the restart.
    pub async fn keep(&self, send: impl AsyncFn(&Report) -> Result<UpdateDecision>) -> Result<()> {
        if !self.node.has_role(fleet::UPDATE) {
            return std::future::pending().await;
        }
        let given_up = self.given_up().unwrap_or_else(|e| {
            warn!("cannot count the boots that passed over a version: {}", e.chain());
            None
        });
        let mut last_reason = String::new();
        // A rollback is reported until a hub has replied.
        let mut reported_rollback = None;
        loop {
            let mut pause = REPORT_INTERVAL;
            match self.doing(given_up.as_deref(), reported_rollback.as_deref()).await {
                Ok(doing) => {
                    if !matches!(doing, UpdateState::Serving | UpdateState::RolledBack { .. }) {
                        pause = SHORT_INTERVAL;
                    }
                    let report = Report { version: PROTOCOL, image: self.image.version.clone(), doing };
                    match (send(&report).await, &report.doing) {
                        (Ok(UpdateDecision { granted: true, .. }), UpdateState::Available { image, .. }) => {
                            self.change(image).await?;
                        }
                        (Ok(_), UpdateState::RolledBack { from }) => {
                            reported_rollback = Some(from.clone());
                            pause = SHORT_INTERVAL;
                        }
                        (Ok(answer), _) if answer.why != last_reason => {
                            if !answer.why.is_empty() {
                                info!("the update waits: {}", answer.why);
                            }
                            last_reason = answer.why;
                        }
                        (Ok(_), _) => {}
                        (Err(e), _) => warn!("cannot report to the hubs: {}", e.chain()),
                    }
                }
                Err(e) => warn!("cannot read the state of updates: {}", e.chain()),
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// Returns the version that the boot loader has passed over [`TRIES`] times. The node does not install this version
    /// again.
    fn given_up(&self) -> Result<Option<String>> {
        let boots = Boots::read(&self.entries, &self.image.id)?;
        let path = "/proc/sys/kernel/random/boot_id";
        let boot_id = fs::read_to_string(path).map_err(Error::io("read", path))?;
        let found = PassedOver::count(self.state, boots.waiting(&self.image.version), boot_id.trim())?;
        if found.boots > 0 {
            let PassedOver { image, boots, .. } = &found;
            warn!(version = image, "the boot loader has passed over version {image} {boots} times");
        }
        Ok((found.boots >= TRIES).then_some(found.image))
    }

    async fn doing(&self, given_up: Option<&str>, reported_rollback: Option<&str>) -> Result<UpdateState> {
        let running = &self.image.version;
        let boots = Boots::read(&self.entries, &self.image.id)?;
        if let Some(from) = boots.failed(running).or(given_up).filter(|from| reported_rollback != Some(from)) {
            return Ok(UpdateState::RolledBack { from: from.to_owned() });
        }
        if !boots.is_blessed(running) {
            return Ok(UpdateState::Starting);
        }
        let unwell = !self.is_whole().await?;
        // The roles may still start. An update would interrupt them.
        if unwell && uptime()? < health::TIMEOUT {
            return Ok(UpdateState::Starting);
        }
        // A pending version that the boot loader has given up does not count as available.
        let pending = boots.pending(running).filter(|v| given_up != Some(v)).map(str::to_owned);
        let wanted = pending.into_iter().chain(self.offered()).max_by(|a, b| compare_versions(a, b));
        Ok(match wanted {
            Some(image) => {
                let primary = self.has_primary().await;
                UpdateState::Available { image, leads: primary || self.holds_vip().await, primary, unwell }
            }
            None if unwell => UpdateState::Starting,
            None => UpdateState::Serving,
        })
    }

    /// Returns whether all roles run.
    async fn is_whole(&self) -> Result<bool> {
        for role in &self.node.roles {
            if !self.systemd.is_active(&format!("role-{role}.target")).await? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn offered(&self) -> Option<String> {
        let age = fs::metadata(&self.offer).and_then(|m| m.modified()).ok()?.elapsed().ok()?;
        let text = fs::read_to_string(&self.offer).ok().filter(|_| age < FRESH)?;
        let version = text.trim();
        (!version.is_empty()).then(|| version.to_owned())
    }

    async fn holds_vip(&self) -> bool {
        self.node.hub > 0 && crate::mesh::has_address(self.topology.vip).await.unwrap_or(false)
    }

    async fn has_primary(&self) -> bool {
        match &self.patroni {
            Some(patroni) => patroni.is_primary().await,
            None => false,
        }
    }

    /// Downloads the image, switches the primary over, and restarts.
    async fn change(&self, image: &str) -> Result<()> {
        let running = &self.image.version;
        log_event(Event::Changing, &format!("{}: changing from version {running} to {image}", self.node.name));
        let loaded = match self.systemd.start("firstboot-install.service").await {
            Ok(()) if Boots::read(&self.entries, &self.image.id)?.waiting(running) != Some(image) => {
                Err(Error::Failed("the update folder does not have this version now".to_owned()))
            }
            loaded => loaded,
        };
        if let Err(e) = loaded {
            // The node keeps its version, whether the server or the image caused the failure.
            log_event(
                Event::NotLoaded,
                &format!("{}: version {image} was not downloaded: {}", self.node.name, e.chain()),
            );
            let _ = fs::remove_file(&self.offer);
            return Ok(());
        }
        // Without a standby the restart interrupts the database.
        if let Some(patroni) = &self.patroni
            && let Err(e) = patroni.hand_over().await
        {
            warn!("switchover before the restart failed: {}", e.chain());
        }
        log_event(Event::Restarting, &format!("{}: restarting with version {image}", self.node.name));
        self.systemd.reboot().await?;
        // systemd stops this service during the shutdown.
        std::future::pending().await
    }
}

/// Returns the uptime of the machine. The agent's own run time would be too short, because systemd restarts the agent
/// when a role does not start.
fn uptime() -> Result<Duration> {
    let path = "/proc/uptime";
    let text = fs::read_to_string(path).map_err(Error::io("read", path))?;
    let seconds = text.split_whitespace().next().and_then(|s| s.parse().ok());
    seconds.map(Duration::from_secs_f64).ok_or_else(|| Error::Failed(format!("cannot parse {path}")))
}
