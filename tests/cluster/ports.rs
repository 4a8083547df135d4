//! The packet filters of a whole fleet in the kernel. Each node is a network namespace with the node's own rules, and
//! the test connects from every node to every port of the table on every other node. Needs root, nft, ip and python3.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use bakehouse_tests::root;
use builder::project::Project;
use fleet::ports::{Protocol, allowed, rows};
use fleet::{Membership, Node, Topology};

/// Runs on each node: connects to every address and port, and prints the connections that succeeded. UDP and VRRP are
/// one-way, so the receiver prints the source of each packet.
const PEER: &str = r"
import json, selectors, socket, sys, threading, time
job = json.load(open(sys.argv[1]))
own, got, lock = job['address'], set(), threading.Lock()
def heard(what):
    with lock:
        got.add(what)
selector = selectors.DefaultSelector()
for protocol, port in job['ports']:
    if protocol == 'tcp':
        selector.register(socket.create_server((own, port), backlog=64), selectors.EVENT_READ, ('accept', port))
    elif protocol == 'udp':
        s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        s.bind((own, port))
        selector.register(s, selectors.EVENT_READ, ('udp', port))
raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, 112)
raw.bind((own, 0))
selector.register(raw, selectors.EVENT_READ, ('vrrp', 0))
def serve():
    while True:
        for key, _ in selector.select():
            kind, port = key.data
            if kind == 'accept':
                line, (peer, _) = key.fileobj.accept()
                line.sendall(b'yes')
                line.close()
            else:
                _, (peer, _) = key.fileobj.recvfrom(100)
                heard((kind, peer, own, port))
threading.Thread(target=serve, daemon=True).start()
print('ready', flush=True)
sys.stdin.readline()
def send(line, to):
    try:
        line.sendto(b'x', to)
    except OSError:
        pass
def connect(to, port):
    s = socket.socket()
    s.settimeout(job['patience'])
    try:
        s.bind((own, 0))
        s.connect((to, port))
        if s.recv(3) == b'yes':
            heard(('tcp', own, to, port))
    except OSError:
        pass
    s.close()
threads = []
for to in job['others']:
    for protocol, port in job['ports']:
        if protocol == 'tcp':
            threads.append(threading.Thread(target=connect, args=(to, port)))
            threads[-1].start()
        elif protocol == 'udp':
            s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            s.bind((own, 0))
            send(s, (to, port))
    send(raw, (to, 0))
for thread in threads:
    thread.join()
print('done', flush=True)
sys.stdin.readline()
print(json.dumps(sorted(got)), flush=True)
";

/// A fleet in namespaces. Each worker has a link to one hub, so packets cross one or two hubs.
pub(crate) struct Namespaces<'a> {
    topology: &'a Topology,
    prefix: String,
}

impl<'a> Namespaces<'a> {
    pub(crate) fn new(project: &'a Project, dir: &Path) -> Self {
        let topology = &project.topology;
        // Another run of the tests must not use the same namespaces.
        let own = Self { topology, prefix: format!("bh-{}-{}-", std::process::id(), topology.name) };
        let mut script = String::from("set -e\n");
        for node in &topology.nodes {
            own.node(node, &mut script);
        }
        for hub in &topology.hubs {
            for other in topology.hubs.iter().filter(|h| h.hub > hub.hub) {
                own.link((hub, &format!("wg-hub{}", other.hub)), (other, &format!("wg-hub{}", hub.hub)), &mut script);
                let (here, there) = (hub.transport, other.transport);
                let _ = writeln!(
                    script,
                    "ip -n {} address add {here} peer {there} dev wg-hub{}\n\
                     ip -n {} address add {there} peer {here} dev wg-hub{}",
                    own.name(hub),
                    other.hub,
                    own.name(other),
                    hub.hub
                );
                own.route(hub, &format!("wg-hub{}", other.hub), other, other, &mut script);
                own.route(other, &format!("wg-hub{}", hub.hub), hub, hub, &mut script);
            }
        }
        for (i, worker) in topology.nodes.iter().filter(|n| n.hub == 0).enumerate() {
            let hub = &topology.hubs[i % topology.hubs.len()];
            let port = format!("w{i}");
            own.link((worker, &format!("wg-hub{}", hub.hub)), (hub, &port), &mut script);
            let _ = writeln!(script, "ip -n {} link set {port} master wg0", own.name(hub));
            own.route(hub, "wg0", worker, worker, &mut script);
            let mesh = topology.mesh.subnet;
            let (space, gateway) = (own.name(worker), hub.transport);
            let _ = writeln!(
                script,
                "ip -n {space} address add {1} peer {gateway} dev wg-hub{0}\n\
                 ip -n {space} route add {mesh} via {gateway} dev wg-hub{0} src {2}\n\
                 ip -n {space} route add {3} via {gateway} dev wg-hub{0} src {1}",
                hub.hub, worker.transport, worker.address, topology.mesh.transport
            );
            for other in topology.hubs.iter().filter(|h| h.name != hub.name) {
                own.route(other, &format!("wg-hub{}", hub.hub), worker, hub, &mut script);
            }
        }
        // The filters name the links, so nft loads them after the links exist.
        for node in &topology.nodes {
            let file = dir.join(format!("{}.nft", node.name));
            fs::write(&file, rendered(project, node, "nftables", "nftables.conf")).expect("a folder");
            let _ = writeln!(script, "ip netns exec {} nft -f {}", own.name(node), file.display());
        }
        run(&script);
        own
    }

    pub(crate) fn name(&self, node: &Node) -> String {
        format!("{}{}", self.prefix, node.name)
    }

    fn node(&self, node: &Node, script: &mut String) {
        let space = self.name(node);
        let _ = writeln!(
            script,
            "ip netns add {space}\nip -n {space} link set lo up\nip -n {space} address add {} dev lo",
            node.address
        );
        if node.hub > 0 {
            let _ = writeln!(
                script,
                "ip -n {space} link add wg0 type bridge\nip -n {space} link set wg0 up\n\
                 ip -n {space} address add {}/{} dev wg0\n\
                 ip netns exec {space} sh -c 'echo 1 >/proc/sys/net/ipv4/ip_forward'",
                node.transport,
                self.topology.mesh.transport.prefix_len()
            );
        }
    }

    fn link(&self, (a, a_port): (&Node, &str), (b, b_port): (&Node, &str), script: &mut String) {
        let (a, b) = (self.name(a), self.name(b));
        let _ = writeln!(
            script,
            "ip link add {a_port} netns {a} type veth peer name {b_port} netns {b}\n\
             ip -n {a} link set {a_port} up\nip -n {b} link set {b_port} up"
        );
    }

    /// Adds a route on `at` to the address of `to` through `by`.
    fn route(&self, at: &Node, dev: &str, to: &Node, by: &Node, script: &mut String) {
        let space = self.name(at);
        let own = at.address;
        let _ = writeln!(script, "ip -n {space} route add {} via {} dev {dev} src {own}", to.address, by.transport);
    }

    fn remove(&self) {
        for node in &self.topology.nodes {
            let _ = Command::new("ip").args(["netns", "del", &self.name(node)]).stderr(Stdio::null()).status();
        }
    }
}

impl Drop for Namespaces<'_> {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Renders a configuration of a node.
fn rendered(project: &Project, node: &Node, overlay: &str, file: &str) -> String {
    let member = Membership::sample();
    let overlay = project.overlay(overlay).expect("the overlay exists");
    let (name, text) = overlay.files.iter().find(|(n, _)| n.ends_with(&format!("/{file}.j2"))).expect("a template");
    fleet::render(name, &String::from_utf8_lossy(text), &project.context(node, &member)).expect("a valid template")
}

#[track_caller]
pub(crate) fn run(script: &str) {
    let done = Command::new("sh").args(["-c", script]).output().expect("a shell");
    assert!(done.status.success(), "{script}\n{}", String::from_utf8_lossy(&done.stderr));
}

/// A packet or connection that passed: protocol, source, destination, port.
type Flow = (String, String, String, u16);

/// Returns every port of the table, and some ports that are not in it.
fn tried(topology: &Topology) -> Vec<(Protocol, u16)> {
    let mut ports: BTreeSet<(Protocol, u16)> = BTreeSet::from([(Protocol::Tcp, 22), (Protocol::Udp, 53)]);
    for rule in rows().iter().filter(|r| matches!(r.protocol, Protocol::Tcp | Protocol::Udp)) {
        ports.extend(rule.ports.range(topology).map(|range| (rule.protocol, *range.start())));
    }
    ports.into_iter().collect()
}

fn word(protocol: Protocol) -> String {
    protocol.to_string().to_lowercase()
}

/// Runs the peers with these addresses and returns what passed.
fn flows(spaces: &Namespaces, dir: &Path, address: impl Fn(&Node) -> String) -> BTreeSet<Flow> {
    let topology = spaces.topology;
    let ports: Vec<(String, u16)> = tried(topology).iter().map(|(p, port)| (word(*p), *port)).collect();
    fs::write(dir.join("peer.py"), PEER).expect("a folder");
    let mut peers: Vec<_> = topology
        .nodes
        .iter()
        .map(|node| {
            let others = topology.nodes.iter().filter(|n| n.name != node.name).map(&address);
            let others: Vec<String> = others.collect();
            let job = dir.join(format!("{}.json", node.name));
            let job_of = serde_json::json!({
                "address": address(node), "others": others, "ports": ports, "patience": 8,
            });
            fs::write(&job, job_of.to_string()).expect("a folder");
            let mut peer = Command::new("ip");
            peer.args(["netns", "exec", &spaces.name(node), "python3"]).arg(dir.join("peer.py")).arg(job);
            peer.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("python3")
        })
        .collect();
    let mut found = BTreeSet::new();
    let mut outputs: Vec<_> =
        peers.iter_mut().map(|p| std::io::BufReader::new(p.stdout.take().expect("a pipe"))).collect();
    let line = |output: &mut std::io::BufReader<_>| {
        let mut line = String::new();
        std::io::BufRead::read_line(output, &mut line).expect("a pipe");
        line
    };
    let go = |peer: &mut std::process::Child| {
        std::io::Write::write_all(peer.stdin.as_mut().expect("a pipe"), b"\n").expect("a running peer");
    };
    for output in &mut outputs {
        assert_eq!(line(output).trim(), "ready");
    }
    peers.iter_mut().for_each(go);
    for output in &mut outputs {
        assert_eq!(line(output).trim(), "done");
    }
    thread::sleep(Duration::from_millis(500));
    peers.iter_mut().for_each(go);
    for output in &mut outputs {
        found.extend(serde_json::from_str::<Vec<Flow>>(&line(output)).expect("JSON"));
    }
    for mut peer in peers {
        peer.wait().expect("a child");
    }
    found
}

#[test]
fn kernel_passes_exactly_the_flows_of_the_port_table() {
    for fleet in ["ha", "minimal-ha"] {
        let dir = tempfile::tempdir().expect("a folder");
        let project = Project::load(&root().join(format!("profiles/fleets/{fleet}.toml"))).expect("a valid fleet.toml");
        let topology = &project.topology;
        let spaces = Namespaces::new(&project, dir.path());
        let got = flows(&spaces, dir.path(), |n| n.address.to_string());
        let mut wrong = Vec::new();
        let mut cells = BTreeMap::from([(true, 0), (false, 0)]);
        for from in &topology.nodes {
            for to in topology.nodes.iter().filter(|n| n.name != from.name) {
                for (protocol, port) in tried(topology).into_iter().chain([(Protocol::Vrrp, 0)]) {
                    // BGP and BFD run only between transport addresses, see below.
                    let wanted = allowed(topology, from, to, protocol, port) && ![179, 3784].contains(&port);
                    let flow = (word(protocol), from.address.to_string(), to.address.to_string(), port);
                    *cells.entry(wanted).or_default() += 1;
                    if got.contains(&flow) != wanted {
                        let is = if wanted { "is dropped" } else { "passes" };
                        wrong.push(format!("{} → {} {protocol} {port} {is}", from.name, to.name));
                    }
                }
            }
        }
        println!("{fleet}: {} flows pass, {} are dropped", cells[&true], cells[&false]);
        assert!(wrong.is_empty(), "{fleet}: {} flows differ:\n{}", wrong.len(), wrong.join("\n"));

        // Between transport addresses only BGP and BFD pass, and one end is a hub.
        let links = flows(&spaces, dir.path(), |n| n.transport.to_string());
        let hubs: BTreeSet<String> = topology.hubs.iter().map(|h| h.transport.to_string()).collect();
        assert!(links.iter().any(|(_, _, to, port)| *port == 179 && hubs.contains(to)), "BGP is dropped: {links:?}");
        for (protocol, from, to, port) in &links {
            let routing = matches!((protocol.as_str(), *port), ("tcp", 179) | ("udp", 3784));
            assert!(routing && (hubs.contains(from) || hubs.contains(to)), "{protocol} {from} → {to} {port}");
        }
    }
}

/// Attack: root on an app node connects from a source port that replies come from, and from the address of a hub.
#[test]
fn forged_source_port_or_address_reaches_no_closed_port() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut project = Project::load(&root().join("profiles/fleets/ha.toml")).expect("a valid fleet.toml");
    project.topology.name = "attack".to_owned();
    let topology = &project.topology;
    let spaces = Namespaces::new(&project, dir.path());
    let (app, hub) = (topology.node("app-1").expect("app-1"), topology.node("hub-1").expect("hub-1"));
    let within = |node: &Node, script: &str| {
        let done = Command::new("ip").args(["netns", "exec", &spaces.name(node), "python3", "-c", script]).output();
        let done = done.expect("ip");
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        String::from_utf8(done.stdout).expect("text")
    };
    // A new connection whose source port is one that replies come from.
    let serve = format!(
        "import socket, threading\ns = socket.create_server(('{}', 2379))\n\
         threading.Timer(300, lambda: __import__('os')._exit(0)).start()\nwhile True: s.accept()",
        hub.address
    );
    let mut server = Command::new("ip");
    let mut server =
        server.args(["netns", "exec", &spaces.name(hub), "python3", "-c", &serve]).spawn().expect("python3");
    thread::sleep(Duration::from_secs(1));
    let attack = |from: &Node, source: &str, port: u16| {
        within(
            from,
            &format!(
                "import socket\ns = socket.socket()\ns.settimeout(3)\ns.bind(('{source}', {port}))\n\
                 try:\n    s.connect(('{}', 2379)); print('open')\nexcept OSError: print('closed')",
                hub.address
            ),
        )
    };
    let own = app.address.to_string();
    for port in [0, 5432, 8008, 8069] {
        assert_eq!(attack(app, &own, port), "closed\n", "from port {port}");
    }
    // With a hub's address the client gets no reply in any case, so the test reads the filter's counter.
    let other = topology.node("hub-2").expect("hub-2").address;
    run(&format!("ip -n {} address add {other} dev lo", spaces.name(app)));
    let dropped = || {
        let listed = Command::new("ip")
            .args(["netns", "exec", &spaces.name(hub), "nft", "list", "counter", "inet", "bakehouse", "mesh_dropped"])
            .output()
            .expect("nft");
        let text = String::from_utf8(listed.stdout).expect("text");
        let words = text.split_whitespace().skip_while(|w| *w != "packets").nth(1);
        words.and_then(|n| n.parse::<u64>().ok()).expect("a counter")
    };
    let before = dropped();
    assert_eq!(attack(app, &other.to_string(), 0), "closed\n");
    assert!(dropped() > before, "the filter took a worker for a hub");
    // The real hub-2 can connect, so the filter dropped the connections above, and the server listens.
    assert_eq!(attack(topology.node("hub-2").expect("hub-2"), &other.to_string(), 0), "open\n");
    server.kill().expect("a child");
    server.wait().expect("a child");
}

/// A compromised app node announces the address of a database, and no hub accepts the route. Runs the real BIRD with
/// the real packet filters.
#[test]
fn hub_accepts_only_a_workers_own_route() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut project = Project::load(&root().join("profiles/fleets/ha.toml")).expect("a valid fleet.toml");
    project.topology.name = "routes".to_owned();
    let topology = &project.topology;
    let spaces = Namespaces::new(&project, dir.path());
    let (app, hub) = (topology.node("app-1").expect("app-1"), topology.node("hub-1").expect("hub-1"));
    let database = topology.node("db-1").expect("db-1").address;
    let stolen = rendered(&project, app, "bird", "bird.conf")
        .replace("export where source = RTS_DEVICE;", "export all;")
        + &format!("\nprotocol static stolen {{ ipv4; route {database}/32 blackhole; }}\n");
    assert!(stolen.contains("export all;"), "the template has another export filter");
    let mut birds = Vec::new();
    for (node, config) in [(hub, rendered(&project, hub, "bird", "bird.conf")), (app, stolen)] {
        let file = dir.path().join(format!("{}.bird", node.name));
        fs::write(&file, config).expect("a folder");
        let socket = dir.path().join(format!("{}.ctl", node.name));
        let mut bird = Command::new("ip");
        bird.args(["netns", "exec", &spaces.name(node), "bird", "-f", "-c"]).arg(&file).arg("-s").arg(socket);
        birds.push(bird.spawn().expect("bird2 is installed"));
    }
    let asks = |node: &Node, what: &str| {
        let socket = dir.path().join(format!("{}.ctl", node.name));
        let said = Command::new("birdc").arg("-s").arg(socket).args(what.split(' ')).output().expect("birdc");
        String::from_utf8_lossy(&said.stdout).into_owned()
    };
    let own = format!("show route for {}/32 all protocol w0001", app.address);
    for _ in 0..60 {
        if asks(hub, &own).contains("BGP.next_hop") {
            break;
        }
        thread::sleep(Duration::from_secs(1));
    }
    let routes = asks(hub, "show route");
    let announced = asks(app, "show route export 'hub-1'");
    for mut bird in birds {
        bird.kill().expect("a child");
        bird.wait().expect("a child");
    }
    assert!(announced.contains(&format!("{database}/32")), "app-1 did not announce the stolen route:\n{announced}");
    assert!(routes.contains(&format!("{}/32", app.address)), "the hub has no route to app-1's own address:\n{routes}");
    assert!(!routes.contains(&format!("{database}/32")), "the hub accepted the stolen route:\n{routes}");
}
