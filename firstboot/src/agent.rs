//! The steps of a boot, in order.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use fleet::{Node, NodeContext, Tls, etcd_client_anchor};
use futures_util::future::try_join_all;
use tokio::sync::watch;
use tokio_rustls::rustls::ServerConfig;
use tracing::{error, info, warn};

use crate::api::{self, JOURNAL_SOCKET, NodeApi, POSTGRES_SOCKET, Tasks};
use crate::client::backoff::Backoff;
use crate::client::patroni::Patroni;
use crate::dns::NameService;
use crate::error::{Error, Result};
use crate::host::console::log_event;
use crate::host::dbus::{Phase, Status};
use crate::host::journal::Event;
use crate::host::machine;
use crate::host::notify::notify;
use crate::host::screen;
use crate::host::systemd::{self, Systemd};
use crate::hub::web::web_file_for_start;
use crate::lan::Lan;
use crate::member::{ALL_HAVE_ASKED, Member, drainer, locker, recorder};
use crate::node::drained::DrainState;
use crate::node::hubs::Hubs;
use crate::node::identity::{Identity, identity, node_of};
use crate::node::image::Image;
use crate::node::outbox::Outbox;
use crate::node::renewal::{is_pending, renew, take_missing_passwords, warn_of_sealed_passwords};
use crate::node::seal::Sealer;
use crate::node::state::StateDir;
use crate::render::render_all;
use crate::update::Updates;
use crate::update::boot_entries::ENTRIES;

/// Commands of the agent.
pub const USAGE: &str = "\
usage: firstboot run              make this machine a node, and run the node (firstboot.service)
       firstboot status [--json]  print this node's slot and phase
       firstboot leave            hand over, stop, and free this node's slot
       firstboot healthy          wait until all units of this boot run (firstboot-healthy.service)
       firstboot load             download a newer image to the other root partition (firstboot-install.service)
       firstboot signed           write the signature time of the update folder as a metric (firstboot-check.service)
       firstboot grub [--good]    on a legacy BIOS: synchronize boot entries with GRUB's count of tries;
                                  --good: this boot is good (firstboot-grub.service)
       firstboot rescue DEVICE    open the maintenance console that a rescue disk orders (firstboot-rescue@.service)
       firstboot capture INTERFACE SECONDS BYTES SNAP  write packets to standard output (`bakehouse pcap`)
";

/// Paths on a node; tests use another root.
pub struct Paths {
    /// Folder of the image with `fleet.json`, `image.json` and `templates/`.
    pub image: PathBuf,
    /// Folder of the agent's state.
    pub state: StateDir,
    /// Root below which templates are rendered.
    pub root: PathBuf,
    /// Folder of systemd's credentials.
    pub credentials: Option<PathBuf>,
}

impl Paths {
    /// Returns the paths of this node, with the folders that systemd sets.
    #[must_use]
    pub fn for_node() -> Self {
        let state = env::var_os("STATE_DIRECTORY").map_or_else(|| "/var/lib/bakehouse".into(), PathBuf::from);
        Self {
            image: Path::new("/").join(fleet::IMAGE_DIR),
            state: StateDir::new(&state, Sealer::for_node()),
            root: "/".into(),
            credentials: env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from),
        }
    }
}

/// Makes this machine a node, and runs the node until the process ends.
///
/// # Errors
/// If a step of the boot fails, or the node is fenced or has left. [`Error::exit_code`] controls whether systemd
/// restarts the agent.
pub async fn run(paths: &Paths) -> Result<()> {
    let image = Image::read(&paths.image)?;
    screen::name(&format!("{} of {}, without a slot", image.info.group, image.topology.name));
    screen::keep();
    let bus = zbus::Connection::system().await?;
    let status = Status::publish(&bus, &image.topology.name).await?;
    // D-Bus clients can reach the agent now. Units are ordered after this notification, not after the join, because
    // the hubs may be unreachable for hours.
    notify("READY=1");
    let units = Systemd::new(&bus).await?;
    let who = identity(&paths.state, paths.credentials.as_ref(), &image).await?;
    let (who, renewed) = renew(&paths.state, who, &image).await?;
    let who = take_missing_passwords(&paths.state, who, &image).await?;
    // A stolen disk must not contain the ticket.
    if let Err(e) = units.start("firstboot-forget.service").await {
        error!("the ticket is not removed from the disk: {}", e.chain());
    }
    let node = node_of(&who.state, &image)?;
    // Before the roles, because operators need it most while a role does not start.
    let drained = Arc::new(DrainState::load(paths.state.path(), &paths.root.join("run/bakehouse")));
    let (api, api_tls) = node_api(&image, node, &who, paths.state.path(), status.phase(), drained.clone())?;
    tokio::spawn(api::keep(Arc::new(api), api_tls));
    screen::name(&format!("{} of {}", node.name, image.topology.name));
    warn_of_sealed_passwords(&who, node, &image);
    let tls = Tls {
        ca: who.state.root.clone(),
        cert: who.state.cert.clone(),
        key: who.keys.tls.pem().to_owned(),
        etcd_clients: etcd_client_anchor(&who.state.root, &image.topology, node)?,
    };
    let (secrets, endpoints) = (who.state.secrets.clone(), who.state.endpoints.clone());
    let credentials = paths.credentials.as_deref();
    let web = web_file_for_start(&image.topology, &secrets, &paths.state, credentials, &tls);
    let context = NodeContext {
        fleet: &image.topology,
        node,
        epoch: who.state.epoch,
        machine: machine::read(&units.virtualization().await?)?,
        tls: &tls,
        secrets: &secrets,
        web: &web,
        // The network may be up only later.
        lan: &[],
    };
    let slow = u32::try_from(context.machine.timeout_scale).unwrap_or(u32::MAX);
    let count = render_all(&paths.image.join("templates"), &paths.root, &context)?;
    info!(slot = node.name, "{}: rendered {count} configuration files", node.name);
    status.is(&node.name, who.state.epoch).await?;
    status.enter(Phase::Starting).await?;
    systemd::set_hostname(&bus, &node.name).await?;
    // networkd reads the node's mesh address from a file that was just rendered.
    systemd::reload_networkd(&bus).await?;
    let updates = Updates {
        systemd: &units,
        image: &image.info,
        topology: &image.topology,
        node,
        patroni: Patroni::for_node(node, who.client()?),
        entries: paths.root.join("efi").join(ENTRIES),
        offer: paths.root.join("run/bakehouse/offer"),
        state: &paths.state,
    };
    let hubs = Hubs::new(&image.topology, &who.state.endpoints, &node.name, who.client()?);
    let hubs = hubs.known_by(who.neighbourhood.clone()).over_mesh();
    let member = Member::new(who, node, &image, &paths.state)?.built_at(built(&paths.image));
    let mesh = member.mesh().await?;
    let serve = async {
        if renewed && node.hub > 0 {
            // The other hubs restart only while this hub is ready. So this hub is not ready before every node has read
            // its new keys.
            tokio::time::sleep(ALL_HAVE_ASKED).await;
        }
        // Before the roles, so that a drained node gets no work while it boots.
        api::restore_drain(&bus, node, &drained).await;
        let mut pause = Backoff::default();
        // The agent keeps running while a role does not start: operators reach the node through it.
        while let Err(e) = start(&units, node).await {
            if !matches!(e, Error::Job { .. }) {
                return Err(e);
            }
            error!("cannot start the roles: {}", e.chain());
            tokio::time::sleep(pause.next_delay()).await;
        }
        log_event(Event::Ready, &format!("ready ({})", node.name));
        status.enter(Phase::Ready).await
    };
    // `firstboot leave` sends a request to a hub, as the operator does. The node then receives the hub's order.
    let leave_requests = status.leave_requests(async || hubs.leave().await);
    let lan = Lan { templates: paths.image.join("templates"), root: paths.root.clone(), context, systemd: &units };
    let (topology, root) = (&image.topology, paths.root.clone());
    let names = NameService { root, topology, node, endpoints, systemd: &units };
    let kept = tokio::try_join!(member.keep(mesh, &updates, slow), serve, leave_requests, lan.keep(), names.keep());
    let kept = kept.map(|((), (), (), (), ())| ());
    match &kept {
        Err(Error::Leaving) => leave(&units, node, &hubs, updates.patroni.as_ref()).await,
        Err(Error::Fenced { .. }) if is_pending(&paths.state) => {
            Err(Error::Failed("the hubs may already have this node's next keys; restarting".to_owned()))
        }
        Err(Error::Fenced { .. } | Error::Left { .. }) => stop(&units, node).await.and(kept),
        _ => kept,
    }
}

/// Returns the node API, and its TLS configuration.
fn node_api(
    image: &Image,
    node: &Node,
    who: &Identity,
    state: &Path,
    phase: watch::Receiver<Phase>,
    drained: Arc<DrainState>,
) -> Result<(NodeApi, Arc<ServerConfig>)> {
    let own = fleet_https::Identity { cert: &who.state.cert, key: who.keys.tls.pem() };
    let tls = fleet_https::mutual_server(&who.state.root, own)?;
    let api = NodeApi {
        topology: image.topology.clone(),
        node: node.clone(),
        image: image.info.version.clone(),
        epoch: who.state.epoch,
        root: who.state.root.clone(),
        tls: who.client()?,
        revocations: who.revocations.clone(),
        phase,
        bus: None,
        journal: JOURNAL_SOCKET.into(),
        postgres: POSTGRES_SOCKET.into(),
        locker: locker(who, node, &image.topology)?,
        outbox: Arc::new(Outbox::load(state, &node.name, recorder(who, node, &image.topology)?)),
        drained,
        drainer: drainer(who, node, &image.topology)?,
        tasks: Tasks::default(),
    };
    Ok((api, tls))
}

/// Returns the Unix time of the image's build: the modification time of all its files.
fn built(image: &Path) -> u64 {
    let modified = fs::metadata(image.join("image.json")).and_then(|m| m.modified()).ok();
    modified.and_then(|at| at.duration_since(UNIX_EPOCH).ok()).map_or(0, |at| at.as_secs())
}

/// Stops the node's roles.
async fn stop(units: &Systemd, node: &Node) -> Result<()> {
    for role in &node.roles {
        units.stop_with_all(&format!("role-{role}.target"), &[]).await?;
    }
    // nftables keeps filtering for the units that still run.
    units.stop_with_all("role-base.target", &["nftables.service"]).await
}

/// Leaves the fleet: switches the primary over, stops the roles, and reports to a hub that the slot is free. After a
/// power cut, the hubs repeat the order to leave.
async fn leave(units: &Systemd, node: &Node, hubs: &Hubs, patroni: Option<&Patroni>) -> Result<()> {
    log_event(Event::Leaving, &format!("{}: leaving the fleet", node.name));
    if let Some(patroni) = patroni
        && let Err(e) = patroni.hand_over().await
    {
        warn!("switchover before leaving failed: {}", e.chain());
    }
    stop(units, node).await?;
    let mut pause = Backoff::default();
    while let Err(e) = hubs.left().await {
        warn!("cannot report to a hub that this node has stopped: {}", e.chain());
        tokio::time::sleep(pause.next_delay()).await;
    }
    Err(Error::Left { slot: node.name.clone() })
}

/// Starts the node's roles; returns when all of them run.
async fn start(units: &Systemd, node: &Node) -> Result<()> {
    units.start("role-base.target").await?;
    log_event(Event::Starting, &format!("{}: starting {}", node.name, node.roles.join(", ")));
    // In parallel, because a role may wait for another one, on this node or elsewhere.
    try_join_all(node.roles.iter().map(async |role| {
        units.start(&format!("role-{role}.target")).await?;
        info!(slot = node.name, role, "{}: {role} runs", node.name);
        Ok::<_, Error>(())
    }))
    .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::USAGE;

    /// Page of the agent in every image.
    const PAGE: &str = include_str!("../../overlays/firstboot/usr/share/man/man8/firstboot.8");

    #[test]
    fn man_page_has_every_command() {
        let mut count = 0;
        for line in USAGE.lines() {
            let Some(command) = line.trim_start_matches("usage:").trim_start().strip_prefix("firstboot ") else {
                continue;
            };
            let command = command.split("  ").next().unwrap().replace('-', "\\-");
            assert!(PAGE.contains(&format!("\nfirstboot {command}\n")), "{command} is not in the synopsis");
            assert!(PAGE.contains(&format!("\n.B {command}\n")), "{command} is not described");
            count += 1;
        }
        assert_eq!(count, 9);
    }
}
