//! `bakehouse netboot`: a server that installs nodes on machines that boot from the network. dnsmasq serves DHCP and
//! TFTP for their firmware. The installer then requests its assignment from this server and writes the image to the
//! disk.

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
pub(crate) use progress::{MachineChange, MachineEvents};
use registry::MachineRegistry;

/// Port of the HTTP server.
const PORT: u16 = 8470;
/// Folder of the records, relative to the project's folder.
const RECORDS: &str = "build/netboot";

/// Options of the server.
pub(crate) struct NetbootOptions<'a> {
    /// Network interface that the machines are connected to.
    pub interface: &'a str,
    /// Network from which the server assigns addresses.
    pub dhcp: Option<Ipv4Net>,
    /// Machines to install again, by MAC address or serial number.
    pub again: &'a [String],
    /// Gets each change of a machine, in place of lines on standard error.
    pub on_change: Option<MachineEvents>,
}

/// Returns the groups that `[netboot]` assigns to machines.
///
/// # Errors
/// If `[netboot]` has no rule.
pub(crate) fn groups(project: &Project) -> Result<Vec<String>> {
    let rules = project.fleet.netboot.get_ref();
    if rules.machines.is_empty() && rules.others.is_none() {
        return Err(Error::Usage(
            "fleet.toml assigns no node to a machine\n  help: set [netboot.machines] \"52:54:00:aa:bb:cc\" = \
             \"hub-1\", or [netboot] others = \"app\""
                .to_owned(),
        ));
    }
    let named = rules.machines.values().chain(&rules.others);
    let groups: Result<BTreeSet<&str>> = named.map(|to| group_of(&project.topology, to)).collect();
    Ok(groups?.into_iter().map(str::to_owned).collect())
}

/// Confirms codes from machines' consoles. A running server reads them, otherwise the next one.
///
/// # Errors
/// If a code is malformed, or the project's folder cannot be written.
pub(crate) fn approve(project: &Project, codes: &[String]) -> Result<Vec<String>> {
    let approvals = Approvals::new(&project.dir.join(RECORDS));
    codes.iter().map(|code| approvals.add(code)).collect()
}

/// Serves machines until the operator interrupts it.
///
/// # Errors
/// If the interface does not exist, dnsmasq does not run, or a port is in use.
pub(crate) fn netboot(build: &Build, images: &[BuiltImage], options: &NetbootOptions) -> Result<()> {
    let project = build.project;
    let rules = project.fleet.netboot.get_ref();
    let Some(first) = images.first() else { return fail("there is no image to serve") };
    let dir = tempfile::tempdir().map_err(Error::io("create", "a temporary folder"))?;
    let (address, net) = address(options)?;
    let service = Service {
        interface: options.interface.to_owned(),
        address,
        net,
        dhcp: options.dhcp.is_some(),
        port: PORT,
        dir: dir.path().display().to_string(),
    };
    let mut registry = MachineRegistry::open(&project.dir.join(RECORDS), rules)?;
    options.again.iter().try_for_each(|name| registry.again(name))?;
    let authority = FleetKey::load(project)?;

    // dnsmasq reads the folder with few capabilities, and its files are not secret.
    let make_readable = |path: &Path| {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).map_err(Error::io("make readable", path))
    };
    make_readable(dir.path())?;
    for folder in [TFTP, HOSTS] {
        let path = dir.path().join(folder);
        fs::create_dir(&path)
            .and_then(|()| make_readable(&path).map_err(std::io::Error::other))
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
    fs::set_permissions(&loader, fs::Permissions::from_mode(0o644)).map_err(Error::io("make readable", &loader))?;
    for mac in registry.installed() {
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
    let progress = NetbootProgress::new(build.progress.clone(), options.on_change.clone());
    let handler = Arc::new(NetbootHandler::new(fleet, registry, dir.path().to_owned(), progress));
    if rules.trust_lan {
        build.progress.say("netboot", "[netboot] trust_lan: tickets of hubs and voters need no code from a console");
    } else if std::io::stdin().is_terminal() {
        let handler = handler.clone();
        std::thread::spawn(move || {
            std::io::stdin().lines().map_while(Result::ok).for_each(|line| handler.approve(&line));
        });
    }
    let server = Arc::new(FileServer { files, handler: Box::new(move |path, body| handler.handle(path, body)) });

    let config = dir.path().join("dnsmasq.conf");
    fs::write(&config, service.config()).map_err(Error::io("write", &config))?;
    let dnsmasq = Dnsmasq::start(&config)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.map_err(Error::cannot("start the server's threads"))?;
    build.progress.say("netboot", &format!("serving {} on {}; Ctrl-C ends it", service.url(), options.interface));
    runtime.block_on(async {
        let at = SocketAddr::new(IpAddr::V4(service.address), PORT);
        let listener = TcpListener::bind(at).await.map_err(Error::cannot(format!("listen at {at}")))?;
        let ended = tokio::task::spawn_blocking(move || dnsmasq.wait());
        tokio::select! {
            never = http_server::serve(listener, server) => match never {},
            ended = ended => fail(ended.map_err(Error::cannot("wait for dnsmasq"))?),
        }
    })
}

/// Returns this host's address and network on the interface.
fn address(options: &NetbootOptions) -> Result<(Ipv4Addr, Ipv4Net)> {
    let all = getifaddrs().map_err(Error::cannot("list network interfaces"))?;
    let mut known = Vec::new();
    for found in all {
        known.push(found.interface_name.clone());
        let v4 = |a: Option<nix::sys::socket::SockaddrStorage>| Some(a?.as_sockaddr_in()?.ip());
        let (Some(address), Some(mask)) = (v4(found.address), v4(found.netmask)) else { continue };
        let Ok(net) = Ipv4Net::with_netmask(address, mask) else { continue };
        if found.interface_name == options.interface && options.dhcp.is_none_or(|wanted| wanted.contains(&address)) {
            return Ok((address, net.trunc()));
        }
    }
    known.sort();
    known.dedup();
    Err(Error::Usage(match options.dhcp {
        Some(net) if known.iter().any(|k| k == options.interface) => {
            let interface = options.interface;
            format!("{interface} has no address in {net}\n  help: ip address add ADDRESS/PREFIX dev {interface}")
        }
        _ => {
            let (interface, known) = (options.interface, known.join(", "));
            format!("there is no interface `{interface}` with an IPv4 address; interfaces are: {known}")
        }
    }))
}

/// The dnsmasq process, which ends with the builder.
struct Dnsmasq(Child);

impl Dnsmasq {
    fn start(config: &Path) -> Result<Self> {
        // The kernel kills dnsmasq if the builder dies. It clears that setting when a process changes its user, so
        // dnsmasq stays root with only the capabilities that it needs.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--no-new-privs"]);
        command.args(["--bounding-set", "-all,+net_admin,+net_bind_service,+net_raw,+setgid"]);
        command.args(["dnsmasq", "--keep-in-foreground", "-C"]).arg(config);
        command.stdin(Stdio::null()).stderr(Stdio::piped());
        let missing = Error::cannot("start dnsmasq\n  help: apt install dnsmasq-base");
        command.spawn().map_err(missing).map(Self)
    }

    /// Waits until dnsmasq ends. Returns a message with the last line of its standard error.
    fn wait(mut self) -> String {
        let mut last = String::new();
        if let Some(stderr) = self.0.stderr.take() {
            last = BufReader::new(stderr).lines().map_while(Result::ok).last().unwrap_or_default();
        }
        let _ = self.0.wait();
        format!("dnsmasq ended: {last}")
    }
}
