//! The fleet's page in Chromium: `bakehouse open page`, real hubs, the monitor's node API, the page's own server, and the
//! images' Prometheus with exporters of a fleet that does not exist. Needs root, chromium, ip and nft.
//!
//! `PICTURES=1` writes the pictures of `docs/`.

mod large;

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use bakehouse_tests::browser::Browser;
use bakehouse_tests::exporters::{Exporters, Story};
use bakehouse_tests::network::in_own_network;
use bakehouse_tests::packages::unpack;
use bakehouse_tests::root;
use bakehouse_tests::site::{HUB_PORT, TestCluster};
use fleet::{MachineSize, Membership, Node, NodeContext, OperatorRole, Topology};
use page::config::Fleet;
use serde_json::json;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, UnixListener, UnixStream};

use super::{TestNode, TestOperator, ask, now, page_socket, refused};

const GROUPS: &str = "app.count = 3\ndb.count = 2\nmonitor.count = 1\n";
/// Longest time until the page shows that a hub is down.
const DEATH: Duration = Duration::from_secs(5);

/// Processes that end with the test.
#[derive(Default)]
struct Processes(Vec<Child>);

impl Processes {
    fn start(&mut self, command: &mut Command) {
        self.0.push(command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().expect("a program of the images"));
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill().and_then(|()| child.wait());
        }
    }
}

fn ip(args: &str) {
    assert!(Command::new("ip").args(args.split(' ')).status().expect("ip").success(), "ip {args}");
}

/// Drops, or passes again, every packet of a hub's services. Its address may be that of other programs of the test.
fn cut(address: std::net::Ipv4Addr, is_cut: bool) {
    let ports = format!("{{ {HUB_PORT}, 2381, 8404, 9100, 9324 }}");
    let script = if is_cut {
        format!(
            "add table ip cut\nadd chain ip cut in {{ type filter hook input priority 0; }}\n\
             add rule ip cut in ip daddr {address} tcp dport {ports} drop\n\
             add rule ip cut in ip saddr {address} tcp sport {ports} drop\n"
        )
    } else {
        "delete table ip cut\n".to_owned()
    };
    let file = tempfile::NamedTempFile::new().expect("a file");
    fs::write(file.path(), script).expect("a file");
    assert!(Command::new("nft").arg("-f").arg(file.path()).status().expect("nft").success());
}

fn story() -> Story {
    Story {
        vip: "hub-1".to_owned(),
        primary: "db-1".to_owned(),
        leader: "hub-2".to_owned(),
        version: "7".to_owned(),
        versions: [].into(),
        failed: [].into(),
        down: [].into(),
    }
}

/// Returns what the nodes reported some seconds ago: a rollout, and a hub that was down.
fn past(topology: &Topology, ago: f64) -> Story {
    let mut story = story();
    let hours = ago / 3600.0;
    if hours > 2.6 {
        "db-2".clone_into(&mut story.primary);
        "hub-3".clone_into(&mut story.vip);
    }
    if (5.0..5.07).contains(&hours) {
        story.down.insert("hub-2".to_owned());
        "hub-1".clone_into(&mut story.leader);
    }
    for (i, node) in topology.nodes.iter().enumerate() {
        if hours > 3.0 - 0.07 * i as f64 {
            story.versions.insert(node.name.clone(), "6".to_owned());
        }
    }
    story
}

/// Renders a file of an overlay as the agent of a node does.
fn render(topology: &Topology, node: &Node, file: &str) -> String {
    let member = Membership::sample();
    let text = fs::read_to_string(root().join("overlays").join(file)).expect("a template");
    let context = NodeContext {
        fleet: topology,
        node,
        epoch: 1,
        machine: MachineSize { memory: 2048, var: 4096, cpus: 2, timeout_scale: 1 },
        tls: &member.tls,
        secrets: &member.secrets,
        web: "",
        lan: &[],
    };
    fleet::render(file, &text, &context).expect("a valid template")
}

/// Writes the configuration of a monitor's Prometheus and Alertmanager. `jobs`: further jobs, as YAML.
fn configure(topology: &Topology, monitor: &Node, jobs: &str, dir: &Path) {
    let rules = root().join("overlays/prometheus/usr/share/bakehouse/prometheus/rules.yml");
    let config = render(topology, monitor, "prometheus/run/bakehouse/prometheus.yml.j2")
        .replace("/usr/share/bakehouse/prometheus/rules.yml", &rules.display().to_string())
        .replace("/run/bakehouse/rules.yml", &dir.join("rules.yml").display().to_string())
        // The exporters have no certificates.
        .replace("    scheme: https\n    tls_config:\n      ca_file: /run/bakehouse/tls/ca.crt\n", "");
    let own =
        render(topology, monitor, "prometheus/run/bakehouse/rules.yml.j2").replace("interval: 30s", "interval: 5s");
    for (name, text) in [
        ("prometheus.yml", config + jobs),
        ("rules.yml", own),
        ("alertmanager.yml", "route: { receiver: none }\nreceivers: [{ name: none }]\n".to_owned()),
    ] {
        fs::write(dir.join(name), text).expect("a folder");
    }
}

/// Makes Prometheus' data of a history in the OpenMetrics format.
fn remember(history: &str, dir: &Path, tools: &Path) {
    fs::write(dir.join("history"), history).expect("a folder");
    let mut promtool = Command::new(tools.join("usr/bin/promtool"));
    let done =
        promtool.args(["tsdb", "create-blocks-from", "openmetrics"]).arg(dir.join("history")).arg(dir.join("data"));
    let done = done.output().expect("promtool");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

/// Starts Prometheus and Alertmanager.
fn start_prometheus(monitor: &Node, dir: &Path, tools: &Path) -> Processes {
    let path = |name: &str| dir.join(name).display().to_string();
    let mut processes = Processes::default();
    processes.start(
        Command::new(tools.join("usr/bin/prometheus"))
            .arg(format!("--config.file={}", path("prometheus.yml")))
            .arg(format!("--web.listen-address={}:9090", monitor.address))
            .arg(format!("--storage.tsdb.path={}", path("data")))
            .stderr(fs::File::create(dir.join("log")).expect("a folder")),
    );
    processes.start(
        Command::new(tools.join("usr/bin/prometheus-alertmanager"))
            .arg(format!("--config.file={}", path("alertmanager.yml")))
            .arg(format!("--web.listen-address={}:9093", monitor.address))
            .args([&format!("--storage.path={}", path("alerts")), "--cluster.listen-address="])
            .stderr(Stdio::null()),
    );
    processes
}

/// `bakehouse open page` of an operator.
struct Opened {
    child: Child,
    link: String,
}

impl Opened {
    fn new(site: &TestCluster, operator: &TestOperator, dir: &Path) -> Self {
        let file = dir.join(format!("{}.operator", operator.name));
        fs::write(&file, operator_file(site, operator).to_string()).expect("a folder");
        let mut command = Command::new(root().join("target/release/bakehouse"));
        command.arg("-C").arg(dir).args(["open", "page", "--operator"]).arg(&file);
        for hub in 1..=3 {
            command.arg("--endpoint").arg(format!("hub-{hub}=127.0.0.{hub}"));
        }
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("bakehouse is built");
        let mut link = String::new();
        BufReader::new(child.stdout.take().expect("a pipe")).read_line(&mut link).expect("a pipe");
        assert!(link.starts_with("http://127.0.0.1:"), "{link}");
        Self { child, link: link.trim().to_owned() }
    }

    /// Returns scheme, host and port.
    fn origin(&self) -> String {
        self.link.split('/').take(3).collect::<Vec<_>>().join("/")
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        let _ = self.child.kill().and_then(|()| self.child.wait());
    }
}

fn operator_file(site: &TestCluster, operator: &TestOperator) -> serde_json::Value {
    let nodes = site.topology.nodes.iter().map(|node| {
        let Node { name, group, roles, address, endpoint, .. } = node;
        json!({ "name": name, "group": group, "roles": roles, "address": address, "endpoint": endpoint })
    });
    let nodes: Vec<serde_json::Value> = nodes.collect();
    json!({
        "version": 1, "fleet": "acme", "name": operator.name, "role": operator.role, "expires": now() + 3600,
        "root": site.root.certificate(), "certificate": operator.pem[0], "public_key": operator.key,
        "key": operator.pem[1], "port": HUB_PORT, "nodes": nodes,
    })
}

/// Serves the page on a socket, on a thread of its own, as the monitor's own process.
fn serve_page(fleet: Fleet, socket: &Path) {
    let listener = std::os::unix::net::UnixListener::bind(socket).expect("a socket");
    listener.set_nonblocking(true).expect("a socket");
    thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async { page::serve(fleet, UnixListener::from_std(listener).expect("a socket")).await });
    });
}

fn page_config(topology: &Topology, monitor: &Node) -> Fleet {
    serde_json::from_str(&render(topology, monitor, "page/run/bakehouse/page.json.j2")).expect("a configuration")
}

/// Pictures of the documentation.
const PICTURES: [&str; 4] = ["page-light", "page-alert-dark", "page-large-light", "page-phone"];

/// Takes pictures of the page in `target/page`, and with `PICTURES=1` those of the documentation.
fn take_pictures(browser: &mut Browser, name: &str) {
    let dir = root().join("target/page");
    fs::create_dir_all(&dir).expect("a folder");
    for (kind, scheme, width, height, phone) in
        [("light", "light", 1360, 1000, false), ("dark", "dark", 1360, 1000, false), ("phone", "light", 390, 844, true)]
    {
        browser.resize(width, height, if phone { 2.0 } else { 1.0 }, phone);
        browser.prefer(scheme);
        browser.eval("new Promise((done) => setTimeout(done, 300))");
        let name = format!("{name}-{kind}");
        let picture = dir.join(format!("{name}.png"));
        browser.screenshot(&picture);
        if PICTURES.contains(&name.as_str()) && std::env::var_os("PICTURES").is_some() {
            fs::copy(&picture, root().join("docs/pictures").join(format!("{name}.png"))).expect("a folder");
        }
    }
    browser.resize(1360, 1000, 1.0, false);
    browser.prefer("light");
}

/// Returns Chromium's own figure of the time until the page is interactive, in milliseconds.
fn interactive(browser: &mut Browser) -> f64 {
    browser.eval("performance.getEntriesByType('navigation')[0].domInteractive").as_f64().expect("a time")
}

/// Checks what holds for every page: nothing from elsewhere, and nothing in the console.
#[track_caller]
fn is_clean(browser: &mut Browser, origin: &str) {
    assert_eq!(browser.problems(), [""; 0]);
    let foreign: Vec<String> =
        browser.requests().into_iter().filter(|url| !url.starts_with(origin) && url != "about:blank").collect();
    assert_eq!(foreign, [""; 0]);
}

#[test]
fn the_page_shows_the_fleet_and_steers_it_for_operators() {
    let tools = unpack("page", &["prometheus", "promtool", "prometheus-alertmanager"]);
    in_own_network(async {
        let site = TestCluster::open(GROUPS);
        let members = site.members("monitor", 1).await;
        let node = TestNode::start(&site, &members[0]);
        let topology = site.topology.clone();
        let monitor = topology.node("monitor-1").expect("a monitor");
        for other in topology.nodes.iter().filter(|other| other.hub == 0 && other.name != monitor.name) {
            ip(&format!("addr add {}/32 dev lo", other.address));
        }
        let exporters = Exporters::start(&topology, story());
        let dir = tempfile::tempdir().expect("a folder");
        // Coarse for a day, and as fine as the graphs of 6 h need it.
        let history = exporters.history(&[(90_000, 24_000, 300), (24_000, 5, 30)], |ago| past(&topology, ago));
        configure(&topology, monitor, "", dir.path());
        remember(&history, dir.path(), &tools);
        let _prometheus = start_prometheus(monitor, dir.path(), &tools);
        serve_page(page_config(&topology, monitor), &page_socket(node.dir.path()));

        let viewer = TestOperator::new(&site, "anna", OperatorRole::Viewer);
        without_open(&node, &viewer).await;
        let operator = TestOperator::new(&site, "ben", OperatorRole::Operator);
        let (browser, opened) = tokio::task::block_in_place(|| {
            let opened = Opened::new(&site, &viewer, dir.path());
            let mut browser = Browser::start();
            browser.resize(1360, 1000, 1.0, false);
            shows_the_fleet(&mut browser, &opened);
            a_death_is_seen(&mut browser, &topology, &exporters);
            drop(opened);
            let opened = Opened::new(&site, &operator, dir.path());
            operators_steer(&mut browser, &opened);
            (browser, opened)
        });
        site.revoke_operator(&operator.revocation(), &site.root).await.expect("a hub takes the order");
        tokio::task::block_in_place(|| is_closed(browser, &opened));
    });
}

/// A browser with the operator's certificate reaches the node itself, as over WireGuard.
async fn without_open(node: &TestNode, viewer: &TestOperator) {
    let mut connection = node.direct(&viewer.tls).await.expect("a connection");
    let html = ask(&mut connection, "GET", "/?range=24h", "").await.expect("the page");
    let html = String::from_utf8_lossy(&html);
    assert!(html.contains("You are anna (viewer).") && html.contains("data-range=\"24h\""), "{html}");
    let style = ask(&mut connection, "GET", "/page.css", "").await.expect("the style sheet");
    assert!(style.starts_with(b":root"));
    for (method, path) in [("POST", "/"), ("GET", "/act"), ("GET", "/page.html")] {
        let text = refused(ask(&mut connection, method, path, "").await, path);
        assert!(text.contains("unknown path"), "{text}");
    }
}

/// The page does not open for an operator who is revoked.
fn is_closed(mut browser: Browser, opened: &Opened) {
    browser.open(&format!("{}/", opened.origin()));
    browser.wait_for("document.body.innerText.includes('revoked')", Duration::from_secs(30));
}

/// The content of the page for a viewer, and what a viewer may not.
fn shows_the_fleet(browser: &mut Browser, opened: &Opened) {
    let second = Duration::from_secs(1);
    browser.open(&opened.link);
    browser.wait_for("document.querySelector('.headline.good')", 60 * second);
    // Again, now that Prometheus has its first data: what an operator waits for.
    // The tests of other files run at the same time, so the best of three counts.
    let mut times = Vec::new();
    for _ in 0..3 {
        browser.open(&format!("{}/?range=6h", opened.origin()));
        times.push(interactive(browser));
    }
    println!("interactive after {times:.0?} ms");
    assert!(times.iter().any(|time| *time <= 1000.0), "{times:?} ms");
    browser.wait_for("document.getElementById('live').classList.contains('on')", 5 * second);
    browser.wait_for("document.querySelectorAll('.graph .line').length >= 20", 20 * second);
    assert_eq!(browser.text(".headline .sentence"), "All 9 nodes work");
    for (label, value) in [
        ("Alerts", "None"),
        ("VIP", "hub-1"),
        ("Primary", "db-1"),
        ("etcd", "3 of 3 votes"),
        ("Odoo", "3 of 3 nodes"),
        ("Paths", "21 of 21"),
        ("Version", "7"),
    ] {
        let tiles = "Object.fromEntries([...document.querySelectorAll('.tile')].map((tile) => [tile.querySelector('.label')\
                     .textContent, tile.querySelector('strong').textContent]))";
        assert_eq!(browser.eval(tiles)[label], value, "{label}");
    }
    for (part, text) in [
        ("#nodes", "synchronous standby"),
        ("#rollout", "History of 30 days"),
        ("#backups", "No restore of a backup is recorded"),
        ("#record", "Odoo answers through the VIP"),
        ("#recent", "NodeDown"),
        ("footer", "anna (viewer)"),
    ] {
        browser.wait_for(&format!("document.querySelector('{part}').innerText.includes('{text}')"), 20 * second);
    }
    // The map has every node, with a name for those who do not see it.
    let labels = browser.eval("[...document.querySelectorAll('.map.wide a')].map((a) => a.getAttribute('aria-label'))");
    assert_eq!(labels.as_array().expect("labels").len(), 9);
    assert!(labels.to_string().contains("hub-1: works, holds the VIP"), "{labels}");
    is_clean(browser, &opened.origin());
    take_pictures(browser, "page");
    // A viewer has no buttons, and the operator's machine refuses a link that the page might have.
    assert_eq!(browser.eval("document.querySelectorAll('a.button').length"), 0);
    browser.open(&format!("{}/act?verb=reboot&node=hub-1", opened.origin()));
    assert!(browser.text("body").contains("a viewer changes nothing"));
    browser.problems();
    // Without the secret of the link, the page is closed.
    let mut stranger = Browser::start();
    stranger.open(&format!("{}/", opened.origin()));
    assert!(stranger.text("body").contains("does not have the secret"));
    browser.open(&format!("{}/?range=6h", opened.origin()));
    browser.wait_for("document.getElementById('live').classList.contains('on')", 5 * second);
}

/// A hub that forwards the operator's own connections goes silent. Then it comes back.
fn a_death_is_seen(browser: &mut Browser, topology: &Topology, exporters: &Exporters) {
    for (hub, next) in topology.hubs.iter().zip(["hub-2", "hub-3", "hub-1"]) {
        exporters.tell(|story| {
            story.down.insert(hub.name.clone());
        });
        cut(hub.address, true);
        let row = format!("document.querySelector('#node-{} .health').classList.contains('down')", hub.name);
        let took = browser.wait_for(&row, DEATH);
        println!("the death of {} is on the page after {took:.1?}", hub.name);
        browser.wait_for("document.querySelector('.headline.bad')", Duration::from_secs(1));
        // keepalived moves the VIP, and etcd elects a leader.
        exporters.tell(|story| {
            next.clone_into(&mut story.vip);
            next.clone_into(&mut story.leader);
        });
        if hub.name == "hub-1" {
            browser.wait_for("document.querySelector('.alert.critical .steps code')", Duration::from_secs(90));
            browser.wait_for("document.querySelectorAll('.tile.bad').length == 1", Duration::from_secs(20));
            take_pictures(browser, "page-alert");
        }
        cut(hub.address, false);
        exporters.tell(|story| story.down.clear());
        browser.wait_for(&format!("!{row}"), Duration::from_secs(30));
    }
    // Chromium logs each connection that broke, and that a plain text has no icon.
    let mut problems = browser.problems();
    problems.retain(|text| !text.contains("net::ERR") && !text.contains("/favicon.ico"));
    assert_eq!(problems, [""; 0]);
}

/// An operator's button leads to a question on another origin, and only the answer there acts.
fn operators_steer(browser: &mut Browser, opened: &Opened) {
    let limit = Duration::from_secs(20);
    browser.open(&opened.link);
    browser.wait_for("document.querySelectorAll('#node-monitor-1 a.button').length == 2", limit);
    assert!(browser.text("footer").contains("ben (operator)"));
    // The page itself can neither read the question, nor send an answer.
    let read = "fetch('act?verb=reboot&node=monitor-1').then(() => 'read', () => 'refused')";
    assert_eq!(browser.eval(read), "refused");
    browser.problems();
    let link = "document.querySelector('#node-monitor-1 a.button').href";
    let link = browser.eval(link).as_str().expect("a link").to_owned();
    assert!(link.starts_with(&format!("{}/act?", opened.origin())), "{link}");
    browser.open(&link);
    assert_eq!(browser.text("h1"), "Restart prometheus.service on monitor-1?");
    let text = browser.text("main");
    assert!(text.contains("Fleet acme, as ben (operator)") && text.contains("bakehouse restart monitor-1"), "{text}");
    let question = browser.eval("location.href").as_str().expect("an address").to_owned();
    assert!(!question.starts_with(&opened.origin()), "{question}");
    // An answer from another site.
    let answer = browser.eval("document.querySelector('input').value").as_str().expect("an answer").to_owned();
    let run = question.split("/ask").next().expect("a path").to_owned() + "/run";
    for (origin, status) in [("http://evil.example", "403"), (opened.origin().as_str(), "403")] {
        let mut curl = Command::new("curl");
        let sent = curl.args(["-s", "-o", "/dev/null", "-w", "%{http_code}", "-H", &format!("origin: {origin}")]);
        let sent = sent.args(["-d", &format!("answer={answer}"), &run]).output().expect("curl");
        assert_eq!(String::from_utf8_lossy(&sent.stdout), status, "{origin}");
    }
    thread::sleep(Duration::from_millis(1200));
    browser.eval("document.querySelector('button').click()");
    // The test's node has no systemd. Its refusal is the proof that the operator's certificate got there.
    browser.wait_for("document.querySelector('h1').innerText == 'Not done'", limit);
    let text = browser.text("main");
    println!("{text}");
    assert!(text.contains("monitor-1"), "{text}");
}
