//! `bakehouse netboot`: machines that boot from the network become nodes. dnsmasq answers their
//! firmware; the installer asks here what its machine is to be, and writes that to the disk.

mod approvals;
#[cfg(test)]
mod attacks;
mod dnsmasq;
mod front;
mod offer;
mod progress;
mod record;
mod registry;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, IsTerminal as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use fleet::encoding::encode;
use fleet::netboot::InstallerTrust;
use ipnet::Ipv4Net;
use nix::ifaddrs::getifaddrs;
use tokio::net::TcpListener;

use crate::assemble::layout::slots;
use crate::deploy::flash::group_of;
use crate::error::{Error, Result, fail};
use crate::image::{Build, BuiltImage};
use crate::keys::authority::FleetKey;
use crate::project::Project;
use crate::util::http_server::{self, FileServer};
use approvals::Approvals;
use dnsmasq::{HOSTS, LOADER, SCRIPT, Service, TFTP, script};
use front::{FleetPlan, NetbootHandler, installed};
use offer::ImageOffer;
use progress::NetbootProgress;
use registry::MachineRegistry;

/// Of the HTTP server.
const PORT: u16 = 8470;
/// Folder of the records, below the project's.
const RECORDS: &str = "build/netboot";

/// Where machines are answered.
pub struct NetbootOptions<'a> {
    pub interface: &'a str,
    /// Give addresses of this network out.
    pub dhcp: Option<Ipv4Net>,
    /// Machines that are to be installed again, by MAC address or serial number.
    pub again: &'a [String],
    /// What machines do, as lines of JSON on standard output.
    pub json: bool,
}

/// Groups whose images machines may ask for.
///
/// # Errors
/// fleet.toml says of no machine what it is to be.
pub fn groups(project: &Project) -> Result<Vec<String>> {
    let rules = project.fleet.netboot.get_ref();
    if rules.machines.is_empty() && rules.others.is_none() {
        return Err(Error::Usage(
            "fleet.toml says of no machine what it is to be; [netboot.machines] \"52:54:00:aa:bb:cc\" = \"hub-1\", or \
             [netboot] others = \"app\""
                .to_owned(),
        ));
    }
    let named = rules.machines.values().chain(&rules.others);
    let groups: Result<BTreeSet<&str>> = named.map(|to| group_of(&project.topology, to)).collect();
    Ok(groups?.into_iter().map(str::to_owned).collect())
}

/// Confirms codes that machines show on their consoles, for the server that runs or for the next one.
///
/// # Errors
/// One is not a code; the project's folder can't be written.
pub fn approve(project: &Project, codes: &[String]) -> Result<Vec<String>> {
    let approvals = Approvals::new(&project.dir.join(RECORDS));
    codes.iter().map(|code| approvals.add(code)).collect()
}

/// Answers machines until it is interrupted.
///
/// # Errors
/// No such interface; dnsmasq does not run; a port is taken.
pub fn netboot(build: &Build, images: &[BuiltImage], order: &NetbootOptions) -> Result<()> {
    let project = build.project;
    let rules = project.fleet.netboot.get_ref();
    let Some(first) = images.first() else { return fail("there is no image") };
    let dir = tempfile::tempdir().map_err(Error::io("create", "a temporary folder"))?;
    let (address, net) = address(order)?;
    let service = Service {
        interface: order.interface.to_owned(),
        address,
        net,
        dhcp: order.dhcp.is_some(),
        port: PORT,
        dir: dir.path().display().to_string(),
    };
    let mut desk = MachineRegistry::open(&project.dir.join(RECORDS), rules)?;
    order.again.iter().try_for_each(|name| desk.again(name))?;
    let authority = FleetKey::of(project)?;

    // Public, all of it.
    let world = |path: &Path| {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).map_err(Error::io("open to all", path))
    };
    world(dir.path())?;
    for folder in [TFTP, HOSTS] {
        let path = dir.path().join(folder);
        fs::create_dir(&path)
            .and_then(|()| world(&path).map_err(std::io::Error::other))
            .map_err(Error::io("create", &path))?;
    }
    let loader = dir.path().join(TFTP).join(LOADER);
    let trust = InstallerTrust {
        fleet: project.topology.name.clone(),
        version: project.fleet.version.get_ref().clone(),
        key: encode(authority.update_key()?.public()),
    };
    let installer = build.installer(&first.group, &service.url(), &trust)?;
    fs::write(&loader, installer.program).map_err(Error::io("write", &loader))?;
    let ipxe = dir.path().join(SCRIPT);
    fs::write(&ipxe, script(&service, &installer.cmdline)).map_err(Error::io("write", &ipxe))?;
    fs::set_permissions(&loader, fs::Permissions::from_mode(0o644)).map_err(Error::io("open to all", &loader))?;
    for mac in desk.installed() {
        installed(dir.path(), mac)?;
    }

    let mut files = BTreeMap::new();
    let mut offers = BTreeMap::new();
    let open = |path: &Path| File::open(path).map(Arc::new).map_err(Error::io("open", path));
    files.insert(format!("/{LOADER}"), open(&loader)?);
    files.insert(format!("/{SCRIPT}"), open(&ipxe)?);
    for image in images {
        let path = format!("/images/{}.raw", image.group);
        let file = open(&image.disk)?;
        let slots = slots(project, &project.recipe(&image.group))?;
        let offer = ImageOffer::read(&file, path.clone(), image, slots.verity_start(), &authority)?;
        offers.insert(image.group.clone(), offer);
        files.insert(path, file);
    }
    let fleet = FleetPlan { project: project.clone(), authority, offers };
    let board = NetbootProgress::new(build.progress.clone(), order.json);
    let front = Arc::new(NetbootHandler::new(fleet, desk, dir.path().to_owned(), board));
    if rules.trust_lan {
        build.progress.say("netboot", "[netboot] trust_lan: tickets of hubs and voters need no code from a console");
    } else if std::io::stdin().is_terminal() {
        // It ends with the process.
        let front = front.clone();
        std::thread::spawn(move || {
            std::io::stdin().lines().map_while(Result::ok).for_each(|line| front.approve(&line));
        });
    }
    let shelf = Arc::new(FileServer { files, desk: Box::new(move |path, body| front.answer(path, body)) });

    let config = dir.path().join("dnsmasq.conf");
    fs::write(&config, service.config()).map_err(Error::io("write", &config))?;
    let dnsmasq = Dnsmasq::start(&config)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.map_err(|e| Error::Failed(format!("no threads: {e}")))?;
    build.progress.say("netboot", &format!("{} answers on {}; Ctrl-C ends it", service.url(), order.interface));
    runtime.block_on(async {
        let at = SocketAddr::new(IpAddr::V4(service.address), PORT);
        let listener = TcpListener::bind(at).await.map_err(|e| Error::Failed(format!("cannot listen at {at}: {e}")))?;
        let ended = tokio::task::spawn_blocking(move || dnsmasq.wait());
        tokio::select! {
            never = http_server::serve(listener, shelf) => match never {},
            ended = ended => fail(ended.unwrap_or_else(|e| e.to_string())),
        }
    })
}

/// This host's address on the interface.
fn address(order: &NetbootOptions) -> Result<(Ipv4Addr, Ipv4Net)> {
    let all = getifaddrs().map_err(|e| Error::Failed(format!("cannot list network interfaces: {e}")))?;
    let mut known = Vec::new();
    for found in all {
        known.push(found.interface_name.clone());
        let v4 = |a: Option<nix::sys::socket::SockaddrStorage>| Some(a?.as_sockaddr_in()?.ip());
        let (Some(address), Some(mask)) = (v4(found.address), v4(found.netmask)) else { continue };
        let Ok(net) = Ipv4Net::with_netmask(address, mask) else { continue };
        if found.interface_name == order.interface && order.dhcp.is_none_or(|wanted| wanted.contains(&address)) {
            return Ok((address, net.trunc()));
        }
    }
    known.sort();
    known.dedup();
    Err(Error::Usage(match order.dhcp {
        Some(net) if known.iter().any(|k| k == order.interface) => {
            format!("{} has no address in {net}; `ip address add … dev {}`", order.interface, order.interface)
        }
        _ => {
            format!("there is no interface `{}` with an IPv4 address; there are {}", order.interface, known.join(", "))
        }
    }))
}

/// dnsmasq, which ends with us.
struct Dnsmasq(Child);

impl Dnsmasq {
    fn start(config: &Path) -> Result<Self> {
        // It would outlive a builder that is killed. The kernel forgets that signal when a program takes
        // another user's rights, as dnsmasq does: it stays root's, of which it has its trade's rights only.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--no-new-privs"]);
        command.args(["--bounding-set", "-all,+net_admin,+net_bind_service,+net_raw,+setgid"]);
        command.args(["dnsmasq", "--keep-in-foreground", "-C"]).arg(config);
        command.stdin(Stdio::null()).stderr(Stdio::piped());
        let child = command.spawn();
        Ok(Self(child.map_err(|e| Error::Failed(format!("dnsmasq does not start ({e}); apt install dnsmasq-base")))?))
    }

    /// Until it ends; its last words.
    fn wait(mut self) -> String {
        let mut last = String::new();
        if let Some(said) = self.0.stderr.take() {
            last = BufReader::new(said).lines().map_while(Result::ok).last().unwrap_or_default();
        }
        let _ = self.0.wait();
        format!("dnsmasq ended: {last}")
    }
}
