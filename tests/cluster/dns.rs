//! The name that the hubs serve (`[dns]`): the real Knot, HAProxy and nftables of three hubs in network namespaces, with
//! the agent's view of the hubs, and a resolver outside the mesh. Needs what `lan` needs, and knot, kdig and delv.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use bakehouse_tests::{lan, root};
use builder::project::Project;
use firstboot::dns::Observer;
use fleet::{Membership, Node};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::Signal;

use crate::lan::{Process, Site, path};

const NAME: &str = "erp.acme.test";
/// Seconds for which a resolver may keep an address.
const TTL: u64 = 10;
/// Longest time until a resolver has no address of a dead hub, with its cache.
const LIMIT: Duration = Duration::from_secs(30);

const FLEET: &str = "name = \"dns\"\n[vip]\nlan = \"192.168.7.100/24\"\nlan6 = \"fd07::100/64\"\n\
     [dns]\nname = \"erp.acme.test\"\ndnssec = true\n[groups.hub]\ncount = 3\n\
     endpoints = [\"192.168.7.11\", \"192.168.7.12\", \"192.168.7.13\"]\n[groups.app]\ncount = 2\n";

/// Starts Knot on a hub as the image does, with the zone's key.
fn knot(project: &Project, space: &str, node: &Node, dir: &Path) -> Process {
    let member = Membership::sample();
    let context = project.context(node, &member);
    let run = dir.join("knot");
    fs::create_dir_all(&run).expect("a folder");
    let place = |text: String| {
        let text = text.replace("/run/bakehouse/knot.conf", &path(&dir.join("knot.conf")));
        text.replace("/run/bakehouse/dns", &path(&dir.join("dns"))).replace("/run/knot", &path(&run))
    };
    for name in ["knot.conf", "dnssec-key.pem"] {
        let overlay = project.overlay("dns").expect("the overlay exists");
        let file = format!("/{name}.j2");
        let (template, text) = overlay.files.iter().find(|(n, _)| n.ends_with(&file)).expect("a template");
        let text = fleet::render(template, &String::from_utf8_lossy(text), &context).expect("a valid template");
        fs::write(dir.join(name), place(text)).expect("a folder");
    }
    let script = fs::read_to_string(root().join("overlays/dns/usr/lib/bakehouse/import-dnssec-key")).expect("a script");
    let import = dir.join("import-dnssec-key");
    fs::write(&import, place(script).replace("#!/bin/dash", "#!/bin/sh")).expect("a folder");
    fs::set_permissions(&import, fs::Permissions::from_mode(0o755)).expect("a file");
    let done = Command::new(&import).arg(dir.join("dnssec-key.pem")).arg(NAME).output().expect("keymgr");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let config = format!("--config={}", path(&dir.join("knot.conf")));
    let knot = Process::start(space, "knotd", &[&config], &dir.join("knot.log"));
    // Before that, SIGHUP would end it. systemd waits for its notification.
    lan::wait("Knot's control socket", || run.join("knot.sock").exists());
    knot
}

/// Keeps the zone of a hub as its agent does, until `stop`.
fn observe(project: &Project, space: &str, node: &Node, dir: &Path, knot: &Process, stop: &AtomicBool) {
    // A namespace belongs to a thread.
    setns(File::open(format!("/run/netns/{space}")).expect("a namespace"), CloneFlags::CLONE_NEWNET).expect("root");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let endpoints = BTreeMap::new();
    runtime.block_on(async {
        let mut observer = Observer::new(&project.topology, node, &endpoints);
        let mut known = String::new();
        while !stop.load(Ordering::Relaxed) {
            let zone = observer.look().await;
            if zone != known {
                fs::write(dir.join("dns/zone.new"), &zone).expect("a folder");
                fs::rename(dir.join("dns/zone.new"), dir.join("dns/zone")).expect("a folder");
                knot.signal(Signal::SIGHUP);
                known = zone;
            }
            tokio::time::sleep(Duration::from_secs(2)).await;
        }
    });
}

/// A resolver outside the mesh.
struct Resolver<'a>(&'a str);

impl Resolver<'_> {
    fn run(&self, program: &str, args: &[&str]) -> String {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", self.0, program]).args(args).stdin(Stdio::null());
        let done = command.output().expect("ip");
        format!("{}{}", String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr))
    }

    fn ask(&self, hub: u8, what: &[&str]) -> String {
        let server = format!("@192.168.7.1{hub}");
        self.run("kdig", &[&[server.as_str(), "+time=1", "+retry=0"], what].concat())
    }

    /// Returns the addresses of the name, as a hub returns them.
    fn addresses(&self, hub: u8) -> BTreeSet<String> {
        let text = self.ask(hub, &["+short", NAME, "A"]);
        text.lines().filter(|line| line.starts_with("192.168.7.")).map(str::to_owned).collect()
    }

    /// Waits until a hub returns these addresses, and returns the time.
    fn wait(&self, hub: u8, wanted: &[&str]) -> Duration {
        let begun = Instant::now();
        let wanted: BTreeSet<String> = wanted.iter().map(|a| (*a).to_owned()).collect();
        while self.addresses(hub) != wanted {
            assert!(begun.elapsed() < LIMIT, "hub-{hub} returns {:?}", self.ask(hub, &[NAME, "A"]));
            thread::sleep(Duration::from_millis(100));
        }
        begun.elapsed()
    }
}

#[test]
fn addresses_of_a_dead_hub_leave_the_name() {
    let dir = tempfile::tempdir_in("/run").expect("a folder, as root");
    fs::write(dir.path().join("fleet.toml"), FLEET).expect("a folder");
    let project = Project::load(&dir.path().join("fleet.toml")).expect("a valid fleet.toml");
    let site = Site::start(&project, dir.path());
    let hubs = &project.topology.hubs;
    let folders: Vec<_> = hubs.iter().map(|hub| dir.path().join(&hub.name)).collect();
    for folder in &folders {
        fs::create_dir_all(folder.join("dns")).expect("a folder");
    }
    let spaces: Vec<String> = hubs.iter().map(|hub| site.spaces.name(hub)).collect();
    let knots: Vec<Process> = (0..3).map(|i| knot(&project, &spaces[i], &hubs[i], &folders[i])).collect();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        for i in 0..3 {
            let (project, stop, knots, folders, spaces) = (&project, &stop, &knots, &folders, &spaces);
            scope.spawn(move || observe(project, &spaces[i], &hubs[i], &folders[i], &knots[i], stop));
        }
        // Also if an assertion fails.
        let checked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| check(&site)));
        stop.store(true, Ordering::Relaxed);
        checked.unwrap_or_else(|panic| {
            for folder in &folders {
                println!("{}", fs::read_to_string(folder.join("knot.log")).unwrap_or_default());
            }
            std::panic::resume_unwind(panic)
        });
    });
}

fn check(site: &Site) {
    let resolver = Resolver(&site.lan);
    let all = ["192.168.7.11", "192.168.7.12", "192.168.7.13"];
    for hub in 1..=3 {
        resolver.wait(hub, &all);
    }
    // Signed, with one key, and nothing else is served.
    let keys: BTreeSet<String> = (1..=3).map(|hub| resolver.ask(hub, &["+short", NAME, "DNSKEY"])).collect();
    assert!(keys.len() == 1 && keys.iter().all(|key| key.starts_with("257 3 15 ")), "{keys:?}");
    let anchor = Path::new("/run").join(format!("{}.anchor", site.lan));
    let parts: Vec<String> = keys.iter().flat_map(|key| key.split_whitespace().map(str::to_owned)).collect();
    let text = format!("trust-anchors {{ {NAME}. static-key 257 3 15 \"{}\"; }};\n", parts[3..].concat());
    fs::write(&anchor, text).expect("a folder");
    let root = format!("+root={NAME}");
    for hub in 1..=3 {
        let server = format!("@192.168.7.1{hub}");
        let validated = resolver.run("delv", &[&server, "-a", &path(&anchor), &root, NAME, "A"]);
        assert!(validated.contains("; fully validated"), "hub-{hub}: {validated}");
        let denied = resolver.run("delv", &[&server, "-a", &path(&anchor), &root, &format!("no.{NAME}"), "A"]);
        assert!(denied.contains("negative response, fully validated"), "hub-{hub}: {denied}");
    }
    fs::remove_file(&anchor).expect("a file");
    assert!(resolver.ask(1, &["example.org", "A"]).contains("status: REFUSED"));
    assert!(resolver.ask(1, &["-c", "CH", "version.server", "TXT"]).contains("status: REFUSED"));
    let transfer = resolver.ask(1, &["+tcp", NAME, "AXFR"]);
    assert!(transfer.contains("NOTAUTH") && !transfer.contains("192.168.7.12"), "{transfer}");
    assert!(resolver.ask(2, &["+tcp", "+short", NAME, "A"]).contains("192.168.7.12"), "no answer over TCP");
    let ttl = resolver.ask(2, &[NAME, "A"]);
    assert!(ttl.contains(&format!("{NAME}.    \t{TTL}\tIN\tA\t")) || ttl.contains(&format!("\t{TTL}\tIN\tA")), "{ttl}");

    site.cut(0);
    let begun = Instant::now();
    let left: Vec<Duration> = (2..=3).map(|hub| resolver.wait(hub, &all[1..])).collect();
    let took = begun.elapsed();
    println!(
        "the dead hub's address leaves the other hubs' answers after {took:.1?} ({left:.1?}), caches {TTL} s later"
    );
    assert!(took + Duration::from_secs(TTL) <= LIMIT, "{took:?}");
}
