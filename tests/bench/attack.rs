//! Benchmark of attacks on the join API: delays for members, the fence and HAProxy's clients, and the agent's memory.
//!
//! The hub is a process with the parts of an agent: the API on its own thread, the fence and the watch on the main
//! thread. Three real etcd members run beside it. The attackers are a process of low priority, because in a real attack
//! other machines do their work. All processes share this machine's processors.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bakehouse_tests::attack::{Target, join_request, peers, source};
use bakehouse_tests::site::{HUB_PORT, TestCluster, granted};
use firstboot::client::etcd::Etcd;
use firstboot::host::ticker::Ticker;
use firstboot::hub::api::Hub;
use firstboot::hub::claims::SlotAllocator;
use firstboot::hub::fence::{self, Fence};
use firstboot::hub::listener::serve;
use firstboot::hub::orders::OrderLog;
use firstboot::node::neighbours::PeerTable;
use firstboot::node::revocations::Revocations;
use fleet::{Issuer, PrivateKey, Secrets, Topology};
use fleet_https::{Identity, request};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::task::JoinSet;

/// Address of the hub under attack, which is a second hub-1.
const AT: &str = "127.0.0.4";
const PAGE: u16 = 25_790;
/// Duration of an attack.
const LASTS: Duration = Duration::from_secs(12);
/// Duration of the measurement, which begins 1 s after the attack.
const MEASURED: Duration = Duration::from_secs(10);
/// Members that send one request a second. The last `BEHIND_ATTACKERS` of them share the attackers' addresses.
const MEMBERS: usize = 20;
const BEHIND_ATTACKERS: usize = 4;
const ATTACKS: [(&str, &str); 7] = [
    ("none", "none"),
    ("idle", "1,024 idle connections"),
    ("slow", "1,024 headers, a byte a second"),
    ("headers", "1,024 headers of 400 kB"),
    ("handshakes", "TLS handshakes, 256 at once"),
    ("forged", "3,000 joins/s, forged tokens"),
    ("spent", "3,000 joins/s, a spent token"),
];

fn main() {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
    setrlimit(Resource::RLIMIT_NOFILE, most.min(65_536), most).expect("a limit");
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["hub", dir] => hub(Path::new(dir)),
        ["attack", kind, dir] => attack(kind, Path::new(dir)),
        _ => bench(),
    }
}

/// Runs a hub until the parent kills it. Prints once a second how late the main thread's timer was.
fn hub(dir: &Path) {
    // `LimitNOFILE=` of firstboot.service.
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
    setrlimit(Resource::RLIMIT_NOFILE, most.min(4096), most).expect("a limit");
    let read = |file: &str| fs::read_to_string(dir.join(file)).expect("a file of the bench");
    let topology: Topology = serde_json::from_str(&read("topology.json")).expect("JSON");
    let issuer: Issuer = serde_json::from_str(&read("issuer.json")).expect("JSON");
    let members: Vec<(String, u16)> = serde_json::from_str(&read("etcd.json")).expect("JSON");
    let root = read("root.pem");
    let node = topology.node("hub-1").expect("a hub");
    let key = PrivateKey::generate().expect("randomness");
    let cert = issuer.node(&topology, node, &key.public().expect("a key")).expect("an issuer");
    let own = Identity { cert: &cert, key: key.pem() };
    let etcd = || Etcd::new(members.clone(), fleet_https::client(&root, Some(own)).expect("a certificate"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let neighbourhood = Arc::new(PeerTable::load(dir, BTreeMap::new()));
        let allocator = SlotAllocator::new(etcd(), topology.clone(), "hub-1");
        let hub = Arc::new(Hub {
            topology: topology.clone(),
            root: root.clone(),
            issuer: issuer.clone(),
            epoch: 1,
            secrets: Secrets::sample(),
            allocator: Arc::new(allocator.beside(etcd())),
            neighbourhood: neighbourhood.clone(),
            orders: OrderLog::default(),
            revocations: Arc::new(Revocations::load(dir, &topology.name, &root)),
            operator_peers: None,
        });
        let at: SocketAddr = format!("{AT}:{HUB_PORT}").parse().expect("an address");
        let tls = fleet_https::server(&root, own).expect("a certificate");
        let fencing = etcd().with_timeout(fence::ANSWER);
        let fence = Fence { etcd: &fencing, topology: &topology, own: node, neighbourhood: &neighbourhood, slow: 1 };
        let followed = async {
            loop {
                let _ = allocator.follow(|_| {}).await;
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        let measured = async {
            loop {
                let mut ticker = Ticker::new("the bench", Duration::from_millis(250));
                for _ in 0..4 {
                    ticker.tick().await;
                }
                println!("late {}", ticker.worst().as_micros());
            }
        };
        tokio::select! {
            served = serve(hub, at, tls) => served.expect("the port is free"),
            kept = fence.keep() => kept.expect("netlink"),
            () = followed => {}
            () = measured => {}
        }
    });
}

/// Attacks for the duration of an attack. Prints the number of connections or requests.
fn attack(kind: &str, dir: &Path) {
    let root = fs::read_to_string(dir.join("root.pem")).expect("a file of the bench");
    let target = Target::new(&root, format!("{AT}:{HUB_PORT}").parse().expect("an address"), "hub-1");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.expect("a runtime").block_on(async {
        let mut attackers = JoinSet::new();
        let hello = Arc::new(target.hello());
        let join = |file: &str| Arc::new(fs::read(dir.join(file)).unwrap_or_default());
        let (forged, spent) = (join("forged"), join("spent"));
        for i in 0..1024 {
            let (one, from) = (target.clone(), source(i));
            // 192 clients with one request every 64 ms are 3,000 requests a second.
            let pause = Duration::from_millis(64);
            match kind {
                "idle" => drop(attackers.spawn(one.idle(from))),
                "slow" => drop(attackers.spawn(one.slow_header(from))),
                "headers" => drop(attackers.spawn(one.endless_header(from, 400 << 10))),
                "handshakes" if i < 256 => drop(attackers.spawn(one.half_handshakes(from, hello.clone()))),
                "forged" if i < 192 => drop(attackers.spawn(one.joins(from, forged.clone(), pause))),
                "spent" if i < 192 => drop(attackers.spawn(one.joins(from, spent.clone(), pause))),
                _ => {}
            }
        }
        tokio::time::sleep(LASTS).await;
        println!("{}", target.made.load(Ordering::Relaxed));
        attackers.abort_all();
    });
}

/// Measurements of one attack.
struct Row {
    made: u64,
    members: Vec<Duration>,
    behind: Vec<Duration>,
    failed: usize,
    late: Duration,
    memory: u64,
    pages: Vec<Duration>,
}

fn bench() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let rows = runtime.expect("a runtime").block_on(measure());
    println!(
        "| attack, {} s from 16 networks | made | members p50 | p99 | failed | behind an attacker p99 | fence late | agent's memory | HAProxy p50 | p99 |",
        LASTS.as_secs()
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |");
    for ((_, name), mut row) in ATTACKS.into_iter().zip(rows) {
        let mut at = |times: u8, percent: usize| {
            let times = match times {
                0 => &mut row.members,
                1 => &mut row.behind,
                _ => &mut row.pages,
            };
            times.sort();
            let at = times.len().saturating_sub(1) * percent / 100;
            times.get(at).map_or("-".to_owned(), |t| format!("{:.1} ms", t.as_secs_f64() * 1e3))
        };
        println!(
            "| {name} | {} | {} | {} | {} | {} | {:.0} ms | {} MB | {} | {} |",
            row.made,
            at(0, 50),
            at(0, 99),
            row.failed,
            at(1, 99),
            row.late.as_secs_f64() * 1e3,
            row.memory >> 10,
            at(2, 50),
            at(2, 99),
        );
    }
}

async fn measure() -> Vec<Row> {
    let site = TestCluster::open("app.count = 40\ndb.count = 2\n");
    let members = site.members("app", MEMBERS).await;
    let dir = tempfile::tempdir().expect("a folder");
    let write = |file: &str, bytes: &[u8]| fs::write(dir.path().join(file), bytes).expect("a folder");
    let issuer = site.root.issuer("acme", "hub-1").expect("a root");
    write("topology.json", &serde_json::to_vec(&site.topology).expect("JSON"));
    write("issuer.json", &serde_json::to_vec(&issuer).expect("JSON"));
    write("etcd.json", &serde_json::to_vec(&site.cluster.clients()).expect("JSON"));
    write("root.pem", site.root.certificate().as_bytes());
    let spent = site.token("app", |_| {});
    granted(site.insist(&TestCluster::asker(&spent, "app"), 0).await);
    write("spent", &join_request(&TestCluster::asker(&spent, "app")));
    let mut forged = site.token("app", |_| {});
    forged.token.claims = forged.token.claims.replace("\"uses\":1", "\"uses\":9");
    write("forged", &join_request(&TestCluster::asker(&forged, "app")));

    let this = std::env::current_exe().expect("a path");
    let mut hub = Command::new(&this);
    let hub = hub.arg("hub").arg(dir.path()).stdout(Stdio::piped()).spawn().expect("this program");
    let mut hub = Running(hub);
    let late = Arc::new(AtomicU64::new(0));
    let (lines, worst) = (BufReader::new(hub.0.stdout.take().expect("a pipe")), late.clone());
    std::thread::spawn(move || {
        for line in lines.lines().map_while(Result::ok) {
            match line.strip_prefix("late ").and_then(|us| us.parse().ok()) {
                Some(us) => drop(worst.fetch_max(us, Ordering::Relaxed)),
                None if line.starts_with("refused") => {}
                None => println!("hub: {line}"),
            }
        }
    });
    let _haproxy = haproxy(dir.path());
    let at: SocketAddr = format!("{AT}:{HUB_PORT}").parse().expect("an address");
    let target = Target::new(site.root.certificate(), at, "hub-1");
    while target.connect(source(200)).await.is_err() {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let mut rows = Vec::new();
    for (kind, _) in ATTACKS {
        // The connections of the previous attack end within 3 s.
        tokio::time::sleep(Duration::from_secs(3)).await;
        let status = format!("/proc/{}", hub.0.id());
        // Resets the peak of the process's memory, see proc_pid_clear_refs(5).
        fs::write(format!("{status}/clear_refs"), "5").expect("a child");
        late.store(0, Ordering::Relaxed);
        let mut attackers = Command::new("nice");
        attackers.args(["-n", "10"]).arg(&this).args(["attack", kind]).arg(dir.path()).stdout(Stdio::piped());
        let attackers = attackers.spawn().expect("nice");
        // All attackers are connected after 1 s.
        tokio::time::sleep(Duration::from_secs(1)).await;
        let mut row = ask_all(&site, &members, &target).await;
        let said = tokio::task::spawn_blocking(move || attackers.wait_with_output().expect("a child")).await;
        row.made = String::from_utf8_lossy(&said.expect("the task ends").stdout).trim().parse().unwrap_or(0);
        row.late = Duration::from_micros(late.load(Ordering::Relaxed));
        let status = fs::read_to_string(format!("{status}/status")).expect("a child");
        let peak = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).expect("a peak");
        row.memory = peak.trim().trim_end_matches(" kB").parse().expect("a number");
        eprintln!("{kind}: done");
        rows.push(row);
    }
    rows
}

/// Whether a member shares an attacker's address, and the duration of its request if that succeeded.
type JoinOutcome = (bool, Option<Duration>);

/// Sends one request a second for each member, and 20 a second to HAProxy, until shortly before the attack ends.
async fn ask_all(
    site: &TestCluster,
    members: &[(bakehouse_tests::site::TestJoiner, fleet::Grant)],
    target: &Target,
) -> Row {
    let until = Instant::now() + MEASURED;
    let answers: Arc<Mutex<Vec<JoinOutcome>>> = Arc::default();
    let mut asking = JoinSet::new();
    for (i, (who, grant)) in members.iter().enumerate() {
        let behind = i >= MEMBERS - BEHIND_ATTACKERS;
        let from = if behind { source(i) } else { "127.0.0.1".parse().expect("an address") };
        let own = Identity { cert: &grant.cert, key: who.tls.pem() };
        let tls = fleet_https::client(site.root.certificate(), Some(own)).expect("a certificate");
        let (member, answers) = (Target { tls, ..target.clone() }, answers.clone());
        asking.spawn(async move {
            tokio::time::sleep(Duration::from_millis(50 * i as u64)).await;
            while Instant::now() < until {
                let asked = Instant::now();
                let answered = peers(&member, from).await;
                let took = answered.is_ok().then(|| asked.elapsed());
                answers.lock().expect("no panics").push((behind, took));
                tokio::time::sleep(Duration::from_secs(1).saturating_sub(asked.elapsed())).await;
            }
        });
    }
    let mut pages = Vec::new();
    while Instant::now() < until {
        let asked = Instant::now();
        let fetched = async {
            let mut haproxy = fleet_https::Connection::plain("127.0.0.1", PAGE).await?;
            haproxy.ask(request("GET", "page", "/", &[], "".into())?, 1 << 16).await
        };
        if fetched.await.is_ok() {
            pages.push(asked.elapsed());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    asking.join_all().await;
    let answers = std::mem::take(&mut *answers.lock().expect("no panics"));
    let of =
        |which: bool| answers.iter().filter(|(behind, _)| *behind == which).filter_map(|(_, took)| *took).collect();
    let failed = answers.iter().filter(|(_, took)| took.is_none()).count();
    Row { made: 0, members: of(false), behind: of(true), failed, late: Duration::ZERO, memory: 0, pages }
}

/// Starts HAProxy with a static page. `None` if it is not installed.
fn haproxy(dir: &Path) -> Option<Running> {
    let config = format!(
        "global\n    maxconn 1000\ndefaults\n    mode http\n    timeout client 5s\n    timeout connect 5s\n    timeout server 5s\n\
         frontend page\n    bind 127.0.0.1:{PAGE}\n    use_backend odoo\n\
         backend odoo\n    server odoo 127.0.0.1:{0}\n\
         frontend odoo\n    bind 127.0.0.1:{0}\n    http-request return status 200 content-type text/plain string \"page\"\n",
        PAGE + 1
    );
    let file = dir.join("haproxy.cfg");
    fs::write(&file, config).expect("a folder");
    let started = Command::new("haproxy").arg("-f").arg(&file).stderr(Stdio::null()).spawn();
    started.inspect_err(|e| eprintln!("without HAProxy: {e}")).ok().map(Running)
}

/// A child process that ends with the bench.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
