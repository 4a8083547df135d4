//! Bringing this node up to date: tells the hubs what it runs and would like to run, and changes
//! when its turn comes. systemd-sysupdate loads and verifies; the boot loader counts the tries;
//! firstboot-healthy says whether the new image is a good one.

pub mod boot_entries;
pub mod download;
pub mod grub;
pub mod health;

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use fleet::grubenv::TRIES;
use fleet::{Node, PROTOCOL, Report, Topology, UpdateDecision, UpdateState, compare_versions};

use crate::client::patroni::Patroni;
use crate::error::{Error, Result};
use crate::host::console::say;
use crate::host::journal::Event;
use crate::host::systemd::Systemd;
use crate::node::image::ImageInfo;
use crate::node::state::{PassedOver, StateDir};
use crate::update::boot_entries::Boots;

/// How often it is told.
const ROUND: Duration = Duration::from_secs(30);
/// While somebody waits for this node: it is starting, or its turn may come.
const SHORT_ROUND: Duration = Duration::from_secs(10);
/// How long an offer holds; nodes look again before.
const FRESH: Duration = Duration::from_secs(900);

/// One node's way to newer images.
pub struct Updates<'a> {
    pub systemd: &'a Systemd,
    pub image: &'a ImageInfo,
    pub topology: &'a Topology,
    pub node: &'a Node,
    pub patroni: Option<Patroni>,
    /// Where the boot loader's entries are.
    pub entries: PathBuf,
    /// What `firstboot-check.service` writes.
    pub offer: PathBuf,
    pub state: &'a StateDir,
}

impl Updates<'_> {
    /// Reports for ever, by `tell`, and changes when the answer says so.
    ///
    /// # Errors
    /// systemd can't be asked any more.
    pub async fn keep(&self, tell: impl AsyncFn(&Report) -> Result<UpdateDecision>) -> Result<()> {
        if !self.node.has_role(fleet::UPDATE) {
            return std::future::pending().await;
        }
        let given_up = self.given_up().unwrap_or_else(|e| {
            println!("{e}");
            None
        });
        let mut told = String::new();
        // The hubs know of a version that failed here once they were told.
        let mut reported_rollback = None;
        loop {
            let mut pause = ROUND;
            match self.doing(given_up.as_deref(), reported_rollback.as_deref()).await {
                Ok(doing) => {
                    if !matches!(doing, UpdateState::Serving | UpdateState::RolledBack { .. }) {
                        pause = SHORT_ROUND;
                    }
                    let report = Report { version: PROTOCOL, image: self.image.version.clone(), doing };
                    match (tell(&report).await, &report.doing) {
                        (Ok(UpdateDecision { granted: true, .. }), UpdateState::Available { image, .. }) => {
                            self.change(image).await?
                        }
                        (Ok(_), UpdateState::RolledBack { from }) => {
                            reported_rollback = Some(from.clone());
                            pause = SHORT_ROUND;
                        }
                        (Ok(answer), _) if answer.why != told => {
                            if !answer.why.is_empty() {
                                println!("no change of the image now: {}", answer.why);
                            }
                            told = answer.why;
                        }
                        (Ok(_), _) => {}
                        (Err(e), _) => println!("{e}"),
                    }
                }
                Err(e) => println!("{e}"),
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// The version that the boot loader has passed over too often: nobody loops.
    fn given_up(&self) -> Result<Option<String>> {
        let boots = Boots::read(&self.entries, &self.image.id)?;
        let path = "/proc/sys/kernel/random/boot_id";
        let boot_id = fs::read_to_string(path).map_err(Error::io("read", path))?;
        let found = PassedOver::count(self.state, boots.waiting(&self.image.version), boot_id.trim())?;
        if found.boots > 0 {
            println!("the boot loader passed over version {} ({} times)", found.image, found.boots);
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
        // Its turn for a newer image would interrupt a start.
        if unwell && uptime()? < health::PATIENCE {
            return Ok(UpdateState::Starting);
        }
        // One that is there, and was passed over, is not offered again.
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

    /// Whether all roles have come up.
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

    /// Loads the image, hands the work over, and restarts.
    async fn change(&self, image: &str) -> Result<()> {
        let running = &self.image.version;
        say(Event::Changing, &format!("{}: changing from version {running} to {image}", self.node.name));
        let loaded = match self.systemd.start("firstboot-install.service").await {
            Ok(()) if Boots::read(&self.entries, &self.image.id)?.waiting(running) != Some(image) => {
                Err(Error::Failed("the update folder does not have it now".to_owned()))
            }
            loaded => loaded,
        };
        if let Err(e) = loaded {
            // The world's fault, or the image's: in either case this node stays as it is.
            say(Event::NotLoaded, &format!("{}: version {image} was not loaded: {e}", self.node.name));
            let _ = fs::remove_file(&self.offer);
            return Ok(());
        }
        // Without a standby there is nobody to hand it to, and the restart is the outage.
        if let Some(patroni) = &self.patroni
            && let Err(e) = patroni.hand_over().await
        {
            println!("{e}");
        }
        say(Event::Restarting, &format!("{}: restarting with version {image}", self.node.name));
        self.systemd.reboot().await?;
        // systemd ends this service in a moment.
        std::future::pending().await
    }
}

/// How long the machine runs. (The agent starts again whenever a role does not come up.)
fn uptime() -> Result<Duration> {
    let path = "/proc/uptime";
    let text = fs::read_to_string(path).map_err(Error::io("read", path))?;
    let seconds = text.split_whitespace().next().and_then(|s| s.parse().ok());
    seconds.map(Duration::from_secs_f64).ok_or_else(|| Error::Failed(format!("{path}: no number")))
}
