//! The address of the local network (`[vip] lan`): the real keepalived, HAProxy, BIRD and nftables of three hubs in
//! network namespaces, and a browser outside the mesh. Needs root, haproxy, bird, nft, ip and python3.

use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use bakehouse_tests::packages::unpack;
use bakehouse_tests::root;
use builder::keys::authority::FleetKey;
use builder::project::Project;
use firstboot::lan::{links, places};
use fleet::{LanPlace, Membership, Node, NodeContext};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::ports::{Namespaces, run};

const ADDRESS: &str = "192.168.7.100";
const ADDRESS6: &str = "fd07::100";
/// Longest time without a page when a hub dies.
const LIMIT: Duration = Duration::from_secs(3);

const FLEET: &str = "name = \"lan\"\n[vip]\nlan = \"192.168.7.100/24\"\nlan6 = \"fd07::100/64\"\n[groups.hub]\ncount = 3\n\
     endpoints = [\"192.168.7.11\", \"192.168.7.12\", \"192.168.7.13\"]\n[groups.app]\ncount = 2\n";

/// Browser: requests a page every 50 ms, each over a new connection, and prints the time of each page.
const BROWSER: &str = r"
import socket, sys, time
family = socket.AF_INET6 if ':' in sys.argv[1] else socket.AF_INET
while True:
    begun = time.monotonic()
    s = socket.socket(family)
    s.settimeout(0.4)
    try:
        s.connect((sys.argv[1], 80))
        s.sendall(b'GET /web/login HTTP/1.1\r\nHost: erp\r\nConnection: close\r\n\r\n')
        if s.recv(12).endswith(b' 200'):
            print('%.3f' % time.monotonic(), flush=True)
    except OSError:
        pass
    s.close()
    time.sleep(max(0, 0.05 - (time.monotonic() - begun)))
";

/// Prints each VRRP packet of the local network.
const SNIFFER: &str = r"
import socket
s = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3))
while True:
    packet, _ = s.recvfrom(2000)
    if (packet[0] >> 4 == 4 and packet[9] == 112) or (packet[0] >> 4 == 6 and packet[6] == 112):
        print(packet.hex(), flush=True)
";

/// A machine of the local network that wants to be master: VRRPv3 adverts of priority 255 for both instances, by
/// multicast and to each hub.
const FORGER: &str = r"
import socket, struct, time
def advert(source, to, router):
    body = struct.pack('!BBBBHH4s', 0x31, router, 255, 1, 20, 0, socket.inet_aton('192.168.7.100'))
    head = socket.inet_aton(source) + socket.inet_aton(to) + struct.pack('!BBH', 0, 112, len(body))
    words = struct.unpack('!%dH' % (len(head + body) // 2), head + body)
    total = sum(words)
    total = (total >> 16) + (total & 0xffff)
    total += total >> 16
    return body[:6] + struct.pack('!H', ~total & 0xffff) + body[8:]
s = socket.socket(socket.AF_INET, socket.SOCK_RAW, 112)
s.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 255)
s.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton('192.168.7.50'))
s.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 255)
for _ in range(100):
    for to in ['224.0.0.18', '192.168.7.11', '192.168.7.12', '192.168.7.13', '192.168.7.100']:
        for router in [51, 52]:
            s.sendto(advert('192.168.7.50', to, router), (to, 0))
    time.sleep(0.02)
print('sent')
";

/// Starts keepalived in the tree of the images' packages, because Debian 12's has no unicast without an interface.
const IN_ROOT: &str = r#"
tree=$1
shift
mount --rbind /run "$tree/run"
mount --rbind /dev "$tree/dev"
mount -t proc proc "$tree/proc"
exec chroot "$tree" /usr/sbin/keepalived "$@"
"#;

/// keepalived, and the programs of its scripts, with their libraries.
#[rustfmt::skip]
const PACKAGES: [&str; 40] = [
    "bash", "bird2", "dash", "keepalived", "libatomic1", "libblkid1", "libc6", "libcap2", "libcom-err2", "libcrypt1",
    "libffi8", "libgcc-s1", "libglib2.0-0t64", "libgssapi-krb5-2", "libk5crypto3", "libkeyutils1", "libkrb5-3",
    "libkrb5support0", "libmnl0", "libmount1", "libnftnl11", "libnl-3-200", "libnl-genl-3-200", "libpci3",
    "libpcre2-8-0", "libperl5.40", "libreadline8t64", "libselinux1", "libsensors5", "libsnmp40t64", "libssh-4",
    "libssl3t64", "libsystemd0", "libtinfo6", "libudev1", "libwrap0", "libxtables12", "libzstd1", "perl-base", "zlib1g",
];

/// Returns a tree with keepalived of the images.
fn tree() -> &'static Path {
    static TREE: OnceLock<PathBuf> = OnceLock::new();
    TREE.get_or_init(|| {
        let tree = unpack("keepalived", &PACKAGES);
        for name in ["bin", "sbin", "lib", "lib64"] {
            let _ = symlink(format!("usr/{name}"), tree.join(name));
        }
        for name in ["dev", "proc", "run", "tmp"] {
            fs::create_dir_all(tree.join(name)).expect("a folder");
        }
        fs::write(tree.join("etc/passwd"), "root:x:0:0::/root:/bin/dash\n").expect("a folder");
        fs::write(tree.join("etc/group"), "root:x:0:\n").expect("a folder");
        tree
    })
}

/// Odoo's stand-in behind the hubs: every page is 200.
const APP: &str = r"
import http.server, sys
class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'page')
    def log_message(self, *_):
        pass
http.server.ThreadingHTTPServer((sys.argv[1], 8069), Page).serve_forever()
";

/// A child process that ends with the test.
pub(crate) struct Process(Child);

impl Process {
    pub(crate) fn start(space: &str, program: &str, args: &[&str], log: &Path) -> Self {
        let log = File::create(log).expect("a log");
        let errors = log.try_clone().expect("a log");
        let mut command = Command::new("ip");
        command.args(["netns", "exec", space, program]).args(args).stdin(Stdio::null());
        Self(command.stdout(log).stderr(errors).spawn().expect("ip"))
    }

    /// `ip netns exec` replaces itself by the program, so the process has the child's id.
    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(i32::try_from(self.0.id()).expect("a process id")), signal).expect("a running child");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // keepalived ends its child process only after SIGTERM.
        let _ = kill(Pid::from_raw(i32::try_from(self.0.id()).unwrap_or(i32::MAX)), Signal::SIGCONT);
        let _ = kill(Pid::from_raw(i32::try_from(self.0.id()).unwrap_or(i32::MAX)), Signal::SIGTERM);
        let until = Instant::now() + Duration::from_secs(2);
        while Instant::now() < until && matches!(self.0.try_wait(), Ok(None)) {
            thread::sleep(Duration::from_millis(20));
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The daemons of a hub.
struct Hub {
    space: String,
    haproxy: Process,
    bird: Process,
    _keepalived: Process,
}

/// Three hubs on a local network with a browser's machine.
pub(crate) struct Site<'a> {
    project: &'a Project,
    pub(crate) spaces: Namespaces<'a>,
    /// Folder that only root can write, as keepalived requires for its scripts.
    dir: &'a Path,
    /// Namespace of the browser's machine, which is also the switch.
    pub(crate) lan: String,
    hubs: Vec<Hub>,
    _app: Process,
}

impl<'a> Site<'a> {
    pub(crate) fn start(project: &'a Project, dir: &'a Path) -> Self {
        let spaces = Namespaces::new(project, dir);
        let lan = format!("bh-{}-{}-lan", std::process::id(), project.topology.name);
        let mut script = format!(
            "set -e\nip netns add {lan}\nip -n {lan} link set lo up\nip -n {lan} link add eth0 type bridge\n\
             ip -n {lan} link set eth0 up\nip -n {lan} address add 192.168.7.50/24 dev eth0\n\
             ip -n {lan} address add fd07::50/64 dev eth0 nodad\n"
        );
        for hub in &project.topology.hubs {
            let (space, i) = (spaces.name(hub), hub.hub);
            script += &format!(
                "ip link add eth0 netns {space} type veth peer name p{i} netns {lan}\n\
                 ip -n {lan} link set p{i} master eth0 up\nip -n {space} link set eth0 up\n\
                 ip -n {space} address add 192.168.7.1{i}/24 dev eth0\n\
                 ip -n {space} address add fd07::1{i}/64 dev eth0 nodad\n"
            );
        }
        run(&script);
        let node = project.topology.node("app-2").expect("app-2");
        let app = Process::start(
            &spaces.name(node),
            "python3",
            &["-c", APP, &node.address.to_string()],
            &dir.join("app.log"),
        );
        let authority = FleetKey::create(&project.topology.name).expect("an authority");
        let mut site = Self { project, spaces, dir, lan, hubs: Vec::new(), _app: app };
        for hub in &project.topology.hubs {
            let member = authority.membership(&project.topology, hub).expect("a member");
            let hub = site.hub(hub, &member);
            site.hubs.push(hub);
        }
        site
    }

    fn hub(&self, node: &Node, member: &Membership) -> Hub {
        let (space, dir) = (self.spaces.name(node), self.dir.join(&node.name));
        let lib = dir.join("lib");
        fs::create_dir_all(&lib).expect("a folder");
        for script in ["mesh-alive", "web-alive"] {
            let text = fs::read_to_string(root().join("overlays/keepalived/usr/lib/bakehouse").join(script));
            let text = text.expect("a script").replace("/run/bird/bird.ctl", &path(&dir.join("bird.ctl")));
            fs::write(lib.join(script), text).expect("a folder");
            fs::set_permissions(lib.join(script), fs::Permissions::from_mode(0o755)).expect("a file");
        }
        for (name, text) in [
            ("ca.crt", member.tls.ca.clone()),
            ("node.pem", format!("{}{}", member.tls.cert, member.tls.key)),
            ("web.pem", format!("{}{}", member.tls.cert, member.tls.key)),
        ] {
            fs::write(dir.join(name), text).expect("a folder");
        }
        let found = self.places(&space);
        assert_eq!(found.iter().map(|p| p.interface.as_str()).collect::<Vec<_>>(), ["eth0", "eth0"], "{found:?}");
        let context = NodeContext { lan: &found, ..self.project.context(node, member) };
        let write = |overlay: &str, name: &str, change: &dyn Fn(String) -> String| -> PathBuf {
            let overlay = self.project.overlay(overlay).expect("the overlay exists");
            let file = format!("/{name}.j2");
            let (template, text) = overlay.files.iter().find(|(n, _)| n.ends_with(&file)).expect("a template");
            let text = fleet::render(template, &String::from_utf8_lossy(text), &context).expect("a valid template");
            let file = dir.join(name);
            fs::write(&file, change(text)).expect("a folder");
            file
        };
        let bird = write("bird", "bird.conf", &|text| text);
        let haproxy = write("haproxy", "haproxy.cfg", &|text| {
            text.replace("/run/bakehouse/tls", &path(&dir)).replace("/run/bakehouse", &path(&dir))
        });
        let keepalived = write("keepalived", "keepalived.conf", &|text| {
            text.replace("/usr/lib/bakehouse", &path(&lib)).replace("/run/bakehouse", &path(&dir))
        });
        let log = |name: &str| dir.join(format!("{name}.log"));
        let control = path(&dir.join("bird.ctl"));
        let pid = |name: &str| format!("--{name}={}", path(&dir.join(name)));
        let file = format!("--use-file={}", path(&keepalived));
        let (own, vrrp, checkers) = (pid("pid"), pid("vrrp_pid"), pid("checkers_pid"));
        Hub {
            haproxy: Process::start(&space, "haproxy", &["-db", "-f", &path(&haproxy)], &log("haproxy")),
            bird: Process::start(&space, "bird", &["-f", "-c", &path(&bird), "-s", &control], &log("bird")),
            _keepalived: Process::start(
                &space,
                "unshare",
                &[
                    "--mount",
                    "sh",
                    "-c",
                    IN_ROOT,
                    "sh",
                    &path(tree()),
                    "--dont-fork",
                    "--log-console",
                    &file,
                    &own,
                    &vrrp,
                    &checkers,
                ],
                &log("keepalived"),
            ),
            space,
        }
    }

    /// Returns what the agent finds on a hub.
    fn places(&self, space: &str) -> Vec<LanPlace> {
        let namespace = File::open(format!("/run/netns/{space}")).expect("a namespace");
        let wanted = &self.project.topology.lan;
        // A namespace belongs to a thread.
        let look = move || {
            setns(namespace, CloneFlags::CLONE_NEWNET).expect("root");
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            places(&runtime.block_on(links()).expect("netlink"), wanted)
        };
        thread::scope(|scope| scope.spawn(look).join().expect("no panic in the thread"))
    }

    /// Returns the numbers of the hubs that have an address.
    fn holders(&self, address: &str) -> Vec<usize> {
        let has = |hub: &Hub| {
            let out = Command::new("ip").args(["-n", &hub.space, "-o", "address", "show", "dev", "eth0"]).output();
            String::from_utf8_lossy(&out.expect("ip").stdout).contains(&format!(" {address}/"))
        };
        (0..self.hubs.len()).filter(|i| has(&self.hubs[*i])).collect()
    }

    /// Waits until one hub has both addresses, and returns its number.
    fn holder(&self) -> usize {
        let until = Instant::now() + Duration::from_secs(40);
        loop {
            let (v4, v6) = (self.holders(ADDRESS), self.holders(ADDRESS6));
            match v4[..] {
                [one] if v6 == [one] => return one,
                _ => assert!(Instant::now() < until, "holders: {v4:?} {v6:?}\n{}", self.logs()),
            }
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// Waits until one hub has both addresses and is not `gone`, and returns its number.
    fn holder_except(&self, gone: usize) -> usize {
        let until = Instant::now() + Duration::from_secs(15);
        while self.holders(ADDRESS).contains(&gone) {
            assert!(Instant::now() < until, "hub-{} keeps the address\n{}", gone + 1, self.logs());
            thread::sleep(Duration::from_millis(50));
        }
        self.holder()
    }

    /// Lets a hub lose the addresses, and returns the number of the next holder.
    fn push_away(&self, holder: usize) -> usize {
        self.hubs[holder].haproxy.signal(Signal::SIGSTOP);
        let next = self.holder_except(holder);
        self.hubs[holder].haproxy.signal(Signal::SIGCONT);
        next
    }

    fn logs(&self) -> String {
        let read = |i: usize| fs::read_to_string(self.dir.join(format!("hub-{i}/keepalived.log"))).unwrap_or_default();
        (1..=3).map(|i| format!("hub-{i}:\n{}", read(i))).collect()
    }

    /// Runs a script on the browser's machine, with its output in a file.
    fn client(&self, name: &str, script: &str, args: &[&str]) -> (Process, PathBuf) {
        let out = self.dir.join(name);
        let args: Vec<&str> = ["-c", script].into_iter().chain(args.iter().copied()).collect();
        (Process::start(&self.lan, "python3", &args, &out), out)
    }

    /// Returns the longest time without a page while `fault` happens, measured by a browser.
    fn longest_wait(&self, name: &str, address: &str, fault: impl FnOnce()) -> Duration {
        let (browser, out) = self.client(&format!("{name}.pages"), BROWSER, &[address]);
        let times = || -> Vec<f64> {
            let text = fs::read_to_string(&out).unwrap_or_default();
            text.lines().filter_map(|line| line.parse().ok()).collect()
        };
        let until = Instant::now() + Duration::from_secs(30);
        while times().len() < 10 {
            assert!(Instant::now() < until, "{name}: no page from {address}\n{}", self.logs());
            thread::sleep(Duration::from_millis(50));
        }
        fault();
        let before = times().len();
        thread::sleep(Duration::from_secs(5));
        drop(browser);
        let times = times();
        assert!(times.len() > before + 5, "{name}: no page after the fault\n{}", self.logs());
        let longest = times.windows(2).map(|pair| pair[1] - pair[0]).fold(0.0, f64::max);
        println!("{name}: longest wait for a page from {address}: {longest:.2} s");
        Duration::from_secs_f64(longest)
    }

    /// Cuts the power of a hub: all its links at the same time.
    pub(crate) fn cut(&self, i: usize) {
        let space = &self.hubs[i].space;
        let links = Command::new("ip").args(["-n", space, "-o", "link"]).output().expect("ip");
        let links = String::from_utf8_lossy(&links.stdout).into_owned();
        let names = links.lines().filter_map(|line| line.split(": ").nth(1)).map(|n| n.split('@').next().unwrap_or(n));
        let script: String = names.filter(|n| *n != "lo").map(|n| format!("link set {n} down\n")).collect();
        let file = self.dir.join("cut");
        fs::write(&file, script).expect("a folder");
        let done = Command::new("ip").args(["-n", space, "-batch", &path(&file)]).status().expect("ip");
        assert!(done.success());
    }
}

impl Drop for Site<'_> {
    fn drop(&mut self) {
        self.hubs.clear();
        let _ = Command::new("ip").args(["netns", "del", &self.lan]).status();
    }
}

pub(crate) fn path(path: &Path) -> String {
    path.to_str().expect("a UTF-8 path").to_owned()
}

#[test]
fn address_of_the_local_network_never_dies() {
    let dir = tempfile::tempdir_in("/run").expect("a folder, as root");
    fs::write(dir.path().join("fleet.toml"), FLEET).expect("a folder");
    let project = Project::load(&dir.path().join("fleet.toml")).expect("a valid fleet.toml");
    let site = Site::start(&project, dir.path());
    let (_sniffer, vrrp) = site.client("vrrp", SNIFFER, &[]);
    let first = site.holder();

    // A HAProxy that hangs keeps its sockets open.
    let hung = site.longest_wait("hung HAProxy", ADDRESS, || site.hubs[first].haproxy.signal(Signal::SIGSTOP));
    let second = site.holder_except(first);
    site.hubs[first].haproxy.signal(Signal::SIGCONT);

    // A machine of the local network cannot take part in the election.
    let forged = site.longest_wait("forged adverts", ADDRESS, || {
        let (mut forger, out) = site.client("forger", FORGER, &[]);
        forger.0.wait().expect("a child");
        assert_eq!(fs::read_to_string(out).expect("a file").trim(), "sent");
    });
    assert_eq!(site.holder(), second, "forged adverts move the address");
    assert!(forged < Duration::from_secs(1), "forged adverts interrupt browsers for {forged:?}");
    let own = fs::read_to_string(&vrrp).expect("a file");
    let theirs = own.lines().filter(|packet| !packet.contains("c0a80732")).count();
    assert_eq!(theirs, 0, "a hub sends VRRP to the local network:\n{own}");
    assert!(own.lines().count() > 100, "the sniffer did not see the forged adverts");

    // A hub whose mesh is dead must not keep browsers.
    site.hubs[second].bird.signal(Signal::SIGSTOP);
    let third = site.holder_except(second);
    site.hubs[second].bird.signal(Signal::SIGCONT);
    // The application server is behind hub-2, which stays.
    let third = if third == 1 { site.push_away(third) } else { third };

    let died = site.longest_wait("dead hub", ADDRESS, || site.cut(third));
    let quiet = site.longest_wait("IPv6, after that", ADDRESS6, || {});
    // Two checks with a time limit of 1 s each have to fail, and the first one begins up to 1 s after the fault.
    assert!(hung <= Duration::from_secs(6), "hung HAProxy: {hung:?} without a page");
    assert!(died <= LIMIT, "dead hub: {died:?} without a page");
    assert!(quiet < Duration::from_secs(1), "IPv6: {quiet:?} without a page");
}
