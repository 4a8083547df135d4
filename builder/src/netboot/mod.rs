//! `bakehouse netboot`: machines that boot from the network become nodes. dnsmasq answers their
//! firmware; the installer asks here what its machine is to be, and writes that to the disk.

mod board;
mod desk;
mod dnsmasq;
pub(crate) mod server;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use firstboot::install::seal;
use fleet::Ticket;
use fleet::netboot::{Errand, Extent, Install, Machine, News, Run, Step};
use ipnet::Ipv4Net;
use nix::ifaddrs::getifaddrs;
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use tokio::net::TcpListener;

use crate::authority::Authority;
use crate::bake::{slots, var_size};
use crate::digest::hex;
use crate::disk::{ESP_SIZE, ESP_START, ROOT_START};
use crate::error::{Error, Result, fail};
use crate::flash::{Carried, group_of};
use crate::image::{Build, Image};
use crate::ledger;
use crate::project::Project;
use crate::ticket::{CARRIED, Terms, mint};
use crate::verity::tree_size;
use board::Board;
use desk::{Desk, Plan, Way};
use dnsmasq::{HOSTS, LOADER, SCRIPT, Service, TFTP, script};
use server::Shelf;

/// Of the HTTP server.
const PORT: u16 = 8470;
/// Parts of an image begin and end at multiples of this.
const GRAIN: u64 = 1 << 20;

/// Where machines are answered.
pub struct Order<'a> {
    pub interface: &'a str,
    /// Give addresses of this network out.
    pub dhcp: Option<Ipv4Net>,
    /// Machines that are to be installed again, by MAC address.
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

/// Answers machines until it is interrupted.
///
/// # Errors
/// No such interface; dnsmasq does not run; a port is taken.
pub fn netboot(build: &Build, images: &[Image], order: &Order) -> Result<()> {
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
    let mut desk = Desk::open(&project.dir.join("build/netboot"), rules)?;
    order.again.iter().try_for_each(|mac| desk.again(mac))?;

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
    let installer = build.installer(&first.group, &service.url())?;
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
        offers.insert(image.group.clone(), Offer::of(&file, path.clone(), image, slots.verity_start())?);
        files.insert(path, file);
    }
    let front = Front {
        fleet: Known { project: project.clone(), authority: Authority::of(project)?, offers },
        desk: Mutex::new(desk),
        dir: dir.path().to_owned(),
        board: Board::new(build.progress.clone(), order.json),
    };
    let shelf = Arc::new(Shelf { files, desk: Box::new(move |path, body| front.answer(path, body)) });

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
            served = server::serve(listener, shelf) => served.map_err(|e| Error::Failed(format!("the server ended: {e}"))),
            ended = ended => fail(ended.unwrap_or_else(|e| e.to_string())),
        }
    })
}

/// This host's address on the interface.
fn address(order: &Order) -> Result<(Ipv4Addr, Ipv4Net)> {
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

/// From now on the machine's firmware is not sent to the installer.
fn installed(dir: &Path, mac: &str) -> Result<()> {
    let path = dir.join(HOSTS).join(mac.replace(':', "-"));
    fs::write(&path, format!("{mac},set:installed\n")).map_err(Error::io("write", &path))
}

/// An image, as machines are told of it.
#[derive(Clone)]
struct Offer {
    path: String,
    size: u64,
    table: String,
    extents: Vec<Extent>,
    sha256: String,
    root: Extent,
    verity: Extent,
    roothash: String,
}

impl Offer {
    fn of(file: &File, path: String, image: &Image, verity_start: u64) -> Result<Self> {
        /// What is asked of the manifest.
        #[derive(Deserialize)]
        struct Manifest {
            roothash: String,
            sizes: Sizes,
        }
        #[derive(Deserialize)]
        struct Sizes {
            root: u64,
        }
        let manifest = fs::read(&image.manifest).map_err(Error::io("read", &image.manifest))?;
        let manifest: Manifest = serde_json::from_slice(&manifest)
            .map_err(|e| Error::Failed(format!("{}: {e}", image.manifest.display())))?;
        let root = Extent { start: ROOT_START, size: manifest.sizes.root };
        let verity = Extent { start: verity_start, size: tree_size(root.size) };
        let read = |e| Error::io("read", &image.disk)(e);
        let size = file.metadata().map_err(read)?.len();
        let mut hash = Sha256::new();
        let mut extents: Vec<Extent> = Vec::new();
        let mut table = Vec::new();
        let mut chunk = vec![0; GRAIN as usize];
        let mut at = 0;
        let mut source = file;
        while at < size {
            let part = usize::try_from(GRAIN.min(size - at)).unwrap_or(0);
            source.read_exact(&mut chunk[..part]).map_err(read)?;
            let bytes = &chunk[..part];
            if at == 0 {
                let end = bytes.iter().rposition(|b| *b != 0).map_or(0, |last| last + 1);
                table.extend_from_slice(&bytes[..end]);
            } else if bytes.iter().any(|b| *b != 0) {
                hash.update(bytes);
                match extents.last_mut() {
                    Some(last) if last.start + last.size == at => last.size += part as u64,
                    _ => extents.push(Extent { start: at, size: part as u64 }),
                }
            }
            at += part as u64;
        }
        let (table, sha256) = (BASE64.encode(table), hex(&hash.finalize()));
        Ok(Self { path, size, table, extents, sha256, root, verity, roothash: manifest.roothash })
    }
}

/// The fleet, as far as machines are told of it.
struct Known {
    project: Project,
    authority: Authority,
    offers: BTreeMap<String, Offer>,
}

impl Plan for Known {
    fn group_of(&self, to: &str) -> String {
        self.project.topology.node(to).map_or(to.to_owned(), |n| n.group.clone())
    }

    fn slots(&self, group: &str) -> Vec<String> {
        self.project.topology.nodes.iter().filter(|n| n.group == group).map(|n| n.name.clone()).collect()
    }

    fn is_volatile(&self, group: &str) -> bool {
        self.project.recipe(group).profiles.iter().all(|p| p.disk.volatile)
    }

    fn disk(&self, group: &str, way: &Way) -> u64 {
        let recipe = self.project.recipe(group);
        let var = var_size(&recipe);
        match way {
            Way::Install(_) => slots(&self.project, &recipe).map_or(0, |slots| slots.machine_disk(var)),
            Way::Run(_) => var,
        }
    }

    fn memory(&self, group: &str) -> u64 {
        let root = self.offers.get(group).map_or(0, |o| o.root.size + o.verity.size);
        // The kernel keeps a part of what the machine has for itself.
        root + (self.project.machine(group).memory << 20) / 10 * 9
    }

    fn mint(&self, to: &str, replace: bool) -> Result<Ticket> {
        let terms = Terms { replace, ..CARRIED };
        let ticket = mint(&self.authority, &self.project.topology, to, &terms, BTreeMap::new())?;
        ledger::note(&self.project.dir, &ticket)?;
        Ok(ticket)
    }
}

/// What answers machines.
struct Front {
    fleet: Known,
    desk: Mutex<Desk>,
    dir: std::path::PathBuf,
    board: Board,
}

impl Front {
    fn answer(&self, path: &str, body: &[u8]) -> Result<Vec<u8>, String> {
        let told = |e: Error| e.to_string();
        match path {
            "/v1/machine" => {
                let machine: Machine = serde_json::from_slice(body).map_err(|e| e.to_string())?;
                let errand = self.errand(&machine).map_err(told)?;
                serde_json::to_vec(&errand).map_err(|e| e.to_string())
            }
            "/v1/news" => {
                let news: News = serde_json::from_slice(body).map_err(|e| e.to_string())?;
                self.news(&news).map_err(told)?;
                Ok(b"{}".to_vec())
            }
            _ => Err("nobody answers that".to_owned()),
        }
    }

    fn errand(&self, machine: &Machine) -> Result<Errand> {
        let mac = machine.macs.first().map_or("", String::as_str);
        let decision = self.desk.lock().unwrap_or_else(PoisonError::into_inner).decide(machine, &self.fleet)?;
        let decision = match decision {
            Ok(decision) => decision,
            Err(why) => {
                self.board.tell(mac, None, &why);
                return Ok(Errand::Nothing { why });
            }
        };
        let Some(offer) = self.fleet.offers.get(&self.fleet.group_of(&decision.to)).cloned() else {
            return fail(format!("there is no image of `{}`", decision.to));
        };
        let text = serde_json::to_vec(&decision.ticket).map_err(|e| Error::Failed(e.to_string()))?;
        let sealed = |bytes: &[u8]| seal(bytes, &machine.key).map_err(|e| Error::Failed(e.to_string()));
        let to = decision.to;
        Ok(match decision.way {
            Way::Install(disk) => {
                self.board.tell(mac, Some(&to), &format!("goes to {disk}"));
                let secure = self.fleet.project.fleet.secure_boot.is_some();
                let (ticket_path, ticket) = Carried::file(&decision.ticket, secure)?;
                Errand::Install(Install {
                    to,
                    disk,
                    image: offer.path,
                    size: offer.size,
                    table: offer.table,
                    extents: offer.extents,
                    sha256: offer.sha256,
                    esp: Extent { start: ESP_START, size: ESP_SIZE },
                    ticket_path,
                    ticket: sealed(&ticket)?,
                })
            }
            Way::Run(var) => {
                self.board.tell(mac, Some(&to), "goes to its memory");
                Errand::Run(Run {
                    to,
                    image: offer.path,
                    root: offer.root,
                    verity: offer.verity,
                    roothash: offer.roothash,
                    var,
                    ticket: sealed(&text)?,
                })
            }
        })
    }

    fn news(&self, news: &News) -> Result<()> {
        let heard = self.desk.lock().unwrap_or_else(PoisonError::into_inner).hear(news)?;
        let Some(to) = heard else { return Ok(()) };
        let line = match &news.step {
            Step::Writing { bytes, of } => format!("{} % of {} MB", bytes * 100 / of.max(&1), of / 1_000_000),
            Step::Installed => {
                installed(&self.dir, &news.mac)?;
                "is on its disk".to_owned()
            }
            Step::Started => "runs from its memory".to_owned(),
            Step::Failed { why } => why.clone(),
        };
        self.board.tell(&news.mac, Some(&to), &line);
        Ok(())
    }
}
