//! The hubs' certificate for browsers: three hubs with the real etcd and HAProxy, and Debian's pebble, the test server of
//! RFC 8555, in its strict mode. Needs root, haproxy, pebble, openssl, curl and python3.

use std::fs;
use std::io::Write as _;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bakehouse_tests::network::in_own_network;
use bakehouse_tests::root;
use bakehouse_tests::site::TestCluster;
use firstboot::hub::web::{Pace, WebKeeper, WebPaths};
use firstboot::node::state::StateDir;
use fleet::{Authority, HubKey, HubSecrets, MachineSize, NodeContext, PrivateKey, Secrets, Tls, Web, encoding};
use fleet_https::Identity;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio::time::sleep;
use tokio_rustls::TlsAcceptor;

const NAME: &str = "erp.example.com";
const DIRECTORY: &str = "https://127.0.0.1:14000/dir";
/// Longest wait for a certificate.
const LIMIT: Duration = Duration::from_secs(120);
/// A lease of 30 s: another hub continues an order after this time at the latest.
const PACE: Pace = Pace {
    check: Duration::from_secs(1),
    lock: 30,
    first_retry: Duration::from_secs(2),
    longest_retry: Duration::from_secs(4),
    spread: Duration::from_secs(2),
};
/// HMAC key of pebble's configuration for external-account binding.
const HMAC: &str = "zWNDZM6eQGHWpSRTPal5eIUYFTu7EajVIoguysqZ9wG44nMEtx3MUAsUDkMTQ12W";

/// Sends requests to each hub over a connection that stays open, and over new ones, until the file `stop` exists. Prints
/// the number of requests, the failed ones, and the certificates that new connections met.
const CLIENTS: &str = r"
import os, socket, ssl, sys, time
context = ssl._create_unverified_context()
def connect(host):
    raw = socket.create_connection((host, 443), timeout=10)
    return context.wrap_socket(raw, server_hostname='erp.example.com')
def ask(s):
    s.sendall(b'GET /web/login HTTP/1.1\r\nHost: erp.example.com\r\n\r\n')
    answer = b''
    while b'\r\n\r\n' not in answer:
        part = s.recv(4096)
        assert part, 'closed'
        answer += part
    assert answer.startswith(b'HTTP/1.1 200'), answer
hosts = ['127.0.0.1', '127.0.0.2', '127.0.0.3']
kept = {host: connect(host) for host in hosts}
done = failed = 0
seen = set()
while not os.path.exists(sys.argv[1]):
    for host in hosts:
        for new in (False, True):
            try:
                s = connect(host) if new else kept[host]
                ask(s)
                if new:
                    seen.add(s.getpeercert(True))
                    s.close()
            except Exception as e:
                print(host, new, repr(e), file=sys.stderr)
                failed += 1
                kept[host] = connect(host)
            done += 1
    time.sleep(0.05)
print(done, failed, len(seen))
";

/// A process that ends with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill().and_then(|()| self.0.wait());
    }
}

/// Three hubs: etcd, HAProxy, and an Odoo that replies at once.
struct Hubs {
    site: TestCluster,
    dir: tempfile::TempDir,
    haproxy: Vec<Running>,
    _odoo: JoinHandle<()>,
    /// Certificate and key of the directory's server, which the fleet's root signed.
    server: (String, PrivateKey),
}

impl Hubs {
    async fn start(eab: Option<&str>) -> Self {
        let site = TestCluster::open_with("[groups.app]\ncount = 1\n", |topology| {
            let authority = Authority {
                directory: DIRECTORY.to_owned(),
                eab_key_id: eab.map(str::to_owned),
                ..Authority::default()
            };
            let web = Web { name: Some(NAME.to_owned()), acme: true, authority, ..Web::default() };
            topology.web = web.resolved();
            let app = topology.nodes.iter_mut().find(|n| n.has_role("app")).expect("an app node");
            app.address = [127, 0, 0, 20].into();
            if eab.is_some() {
                let mut secrets = HubSecrets::default();
                let key = HubKey::derive("acme", &Secrets::sample().etcd_root).expect("a password");
                secrets.seal(&key, Web::EAB, HMAC.as_bytes()).expect("a secret");
                topology.web_secrets = secrets;
            }
        });
        let key = PrivateKey::generate().expect("randomness");
        let hub = &site.topology.hubs[0];
        let issuer = site.root.issuer("acme", &hub.name).expect("a root");
        let cert = issuer.node(&site.topology, hub, &key.public().expect("a key")).expect("an issuer");
        let listener = TcpListener::bind("127.0.0.20:8069").await.expect("a port");
        let odoo = tokio::spawn(serve_odoo(listener));
        let dir = tempfile::tempdir().expect("a folder");
        // HAProxy changes its user, and connects to the agent's socket.
        open_to_all(dir.path());
        let mut hubs = Self { haproxy: Vec::new(), server: (cert, key), _odoo: odoo, dir, site };
        for i in 0..3 {
            let haproxy = hubs.start_haproxy(i);
            hubs.haproxy.push(haproxy);
        }
        hubs
    }

    fn path(&self, i: usize, name: &str) -> PathBuf {
        self.dir.path().join(format!("hub-{}", i + 1)).join(name)
    }

    /// Starts a hub's HAProxy with the configuration of the images, at the hub's own address.
    fn start_haproxy(&self, i: usize) -> Running {
        let node = &self.site.topology.hubs[i];
        let home = self.path(i, "");
        fs::create_dir_all(home.join("tls")).expect("a folder");
        open_to_all(&home);
        let (cert, key) = &self.server;
        let own = format!("{cert}{}", key.pem());
        fs::write(home.join("tls/ca.crt"), self.site.root.certificate()).expect("a folder");
        fs::write(home.join("tls/node.pem"), &own).expect("a folder");
        fs::write(home.join("tls/web.pem"), &own).expect("a folder");
        let template = "overlays/haproxy/run/bakehouse/haproxy.cfg.j2";
        let text = fs::read_to_string(root().join(template)).expect("the template exists");
        let tls = Tls { ca: String::new(), cert: String::new(), key: String::new(), etcd_clients: String::new() };
        let context = NodeContext {
            fleet: &self.site.topology,
            node,
            epoch: 1,
            machine: MachineSize { memory: 1024, var: 1024, cpus: 2, timeout_scale: 1 },
            tls: &tls,
            secrets: &Secrets::sample(),
            web: "",
        };
        let text = fleet::render(template, &text, &context).expect("a valid template");
        let text = text.replace("/run/bakehouse", home.to_str().expect("UTF-8"));
        let text = text.replace("bind :", &format!("bind {}:", node.address));
        let file = home.join("haproxy.cfg");
        fs::write(&file, text).expect("a folder");
        let child = Command::new("haproxy").arg("-db").arg("-f").arg(&file).spawn().expect("haproxy is installed");
        let begun = Instant::now();
        while TcpStream::connect((node.address, 443)).is_err() {
            assert!(begun.elapsed() < LIMIT, "HAProxy does not start");
            std::thread::sleep(Duration::from_millis(50));
        }
        Running(child)
    }

    /// Starts a hub's part in the certificate, like a new process with only the state on its disk.
    fn keep(&self, i: usize) -> JoinHandle<()> {
        let ca = self.path(i, "directory.crt");
        fs::write(&ca, self.site.root.certificate()).expect("a folder");
        let paths = WebPaths {
            state: StateDir::new(&self.path(i, ""), None),
            pem: self.path(i, "tls/web.pem"),
            haproxy: self.path(i, "haproxy.sock"),
            answers: self.path(i, "acme.sock"),
            metrics: self.path(i, "metrics/web.prom"),
            authorities: vec![ca],
        };
        let (name, password) = (&self.site.topology.hubs[i].name, Secrets::sample().etcd_root);
        let keeper = WebKeeper::new(self.site.etcd(i), &self.site.topology, name, &password, paths);
        let keeper = keeper.expect("the fleet has acme").with_pace(PACE);
        tokio::spawn(async move { keeper.keep().await })
    }

    /// Starts pebble and its DNS server, in which the name has the addresses of all hubs. `life`: seconds for which its
    /// certificates are valid.
    fn pebble(&self, life: u64, is_bound: bool) -> (Running, Running) {
        let path = |name: &str| self.dir.path().join(name);
        fs::write(path("server.crt"), &self.server.0).expect("a folder");
        fs::write(path("server.key"), self.server.1.pem()).expect("a folder");
        let config = serde_json::json!({ "pebble": {
            "listenAddress": "127.0.0.1:14000", "managementListenAddress": "127.0.0.1:15000",
            "certificate": path("server.crt"), "privateKey": path("server.key"),
            "httpPort": 80, "tlsPort": 443, "certificateValidityPeriod": life,
            "externalAccountBindingRequired": is_bound, "externalAccountMACKeys": { "kid-1": HMAC },
        } });
        fs::write(path("pebble.json"), config.to_string()).expect("a folder");
        let log = || fs::File::options().create(true).append(true).open(path("pebble.log")).expect("a folder");
        let dns = Command::new("pebble-challtestsrv")
            .args(["-dns01", "127.0.0.1:8053", "-management", "127.0.0.1:8055", "-defaultIPv6", ""])
            .args(["-http01", "", "-https01", "", "-tlsalpn01", ""])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("pebble is installed");
        let pebble = Command::new("pebble")
            .args(["-strict", "-dnsserver", "127.0.0.1:8053", "-config"])
            .arg(path("pebble.json"))
            .env("PEBBLE_VA_NOSLEEP", "1")
            .env("PEBBLE_AUTHZREUSE", "0")
            .stdout(log())
            .stderr(log())
            .spawn()
            .expect("pebble is installed");
        let both = (Running(pebble), Running(dns));
        let body = format!("{{\"host\":\"{NAME}.\",\"addresses\":[\"127.0.0.1\",\"127.0.0.2\",\"127.0.0.3\"]}}");
        for (url, body) in [("http://127.0.0.1:8055/add-a", body.as_str()), (DIRECTORY, "")] {
            let begun = Instant::now();
            let ask = || Command::new("curl").args(["-sfk", "-o", "/dev/null", url]).args(["-d", body]).status();
            let get = || Command::new("curl").args(["-sfk", "-o", "/dev/null", url]).status();
            while !if body.is_empty() { get() } else { ask() }.expect("curl").success() {
                assert!(begun.elapsed() < LIMIT, "{url} does not answer");
                std::thread::sleep(Duration::from_millis(100));
            }
        }
        both
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("pebble.log")).unwrap_or_default()
    }

    /// Returns the value of a metric of a hub.
    fn metric(&self, i: usize, name: &str) -> u64 {
        let text = fs::read_to_string(self.path(i, "metrics/web.prom")).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix(&format!("bakehouse_web_certificate_{name} ")));
        line.and_then(|value| value.parse().ok()).unwrap_or_default()
    }

    /// Waits until each of these hubs shows a certificate of pebble other than `before`. Returns its serial number.
    async fn shown(&self, hubs: &[usize], before: &str) -> String {
        let begun = Instant::now();
        loop {
            let all: Vec<(String, bool)> = hubs.iter().map(|i| certificate(*i)).collect();
            let (first, _) = &all[0];
            if all.iter().all(|(serial, is_pebble)| *is_pebble && serial == first) && first != before {
                return first.clone();
            }
            assert!(begun.elapsed() < LIMIT, "{all:?}: {}", self.log());
            sleep(Duration::from_millis(300)).await;
        }
    }

    async fn until(&self, what: &str, is_so: impl Fn(&Self) -> bool) {
        let begun = Instant::now();
        while !is_so(self) {
            assert!(begun.elapsed() < LIMIT, "not in time: {what}: {}", self.log());
            sleep(Duration::from_millis(100)).await;
        }
    }
}

fn open_to_all(dir: &Path) {
    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).expect("a folder");
}

/// Replies 200 to every request.
async fn serve_odoo(listener: TcpListener) {
    loop {
        let Ok((mut stream, _)) = listener.accept().await else { return };
        tokio::spawn(async move {
            let mut buffer = [0; 8192];
            while stream.read(&mut buffer).await.is_ok_and(|n| n > 0) {
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await;
            }
        });
    }
}

/// Returns the serial number of the certificate that a hub shows, and whether pebble signed it.
fn certificate(i: usize) -> (String, bool) {
    let script = format!(
        "openssl s_client -connect 127.0.0.{}:443 -servername {NAME} </dev/null 2>/dev/null \
         | openssl x509 -noout -serial -issuer",
        i + 1
    );
    let done = Command::new("sh").args(["-c", &script]).output().expect("openssl is installed");
    let text = String::from_utf8_lossy(&done.stdout).into_owned();
    (text.lines().next().unwrap_or_default().to_owned(), text.contains("Pebble Intermediate"))
}

/// Returns status and headers of a request without TLS.
fn plain(i: usize, path: &str) -> String {
    let url = format!("http://127.0.0.{}{path}", i + 1);
    let done =
        Command::new("curl").args(["-s", "-D-", "-o", "/dev/null", "-H", &format!("Host: {NAME}"), &url]).output();
    String::from_utf8_lossy(&done.expect("curl").stdout).into_owned()
}

#[test]
fn hubs_order_renew_and_use_a_certificate_without_dropping_a_connection() {
    in_own_network(async {
        let hubs = Hubs::start(None).await;
        assert!((0..3).all(|i| !certificate(i).1), "before the first one, hubs show the fleet's own");
        let _pebble = hubs.pebble(90, false);
        let keepers = [0, 1, 2].map(|i| hubs.keep(i));
        let first = hubs.shown(&[0, 1, 2], "").await;
        assert!(hubs.log().contains("There are now 1 orders"), "{}", hubs.log());
        assert!(!hubs.log().contains("There are now 2 orders"), "one hub orders: {}", hubs.log());
        // Private keys in etcd are sealed, because its members need not be hubs.
        let (_, all) = hubs.site.etcd(0).list("/bakehouse/web-certificate/").await.expect("etcd");
        let names: Vec<&str> = all.iter().map(|pair| pair.key.rsplit('/').next().unwrap_or_default()).collect();
        assert!(names.contains(&"certificate"), "{names:?}");
        for pair in &all {
            let text = String::from_utf8_lossy(&pair.value).into_owned();
            let open = encoding::decode(&text).unwrap_or_default();
            let both = text + &String::from_utf8_lossy(&open);
            assert!(!both.contains("PRIVATE") && !both.contains("key_pkcs8"), "{}", pair.key);
        }
        let stop = hubs.dir.path().join("stop");
        let clients = Command::new("python3").args(["-c", CLIENTS]).arg(&stop).stdout(Stdio::piped()).spawn();
        let clients = clients.expect("python3");
        let second = hubs.shown(&[0, 1, 2], &first).await;
        sleep(Duration::from_secs(2)).await;
        fs::write(&stop, "").expect("a folder");
        let said = clients.wait_with_output().expect("a child");
        let said = String::from_utf8_lossy(&said.stdout).into_owned();
        println!("requests, failed ones, certificates: {}", said.trim());
        let numbers: Vec<u64> = said.split_whitespace().filter_map(|n| n.parse().ok()).collect();
        let [requests, failed, seen] = numbers[..] else { panic!("{said}") };
        assert!(requests > 50 && failed == 0 && seen >= 2, "{said}");

        let other = plain(0, "/web/login");
        assert!(other.starts_with("HTTP/1.1 308") && other.contains(&format!("https://{NAME}/web/login")), "{other}");
        assert!(plain(1, "/web/health").starts_with("HTTP/1.1 200"));
        assert!(plain(2, "/.well-known/acme-challenge/nothing").starts_with("HTTP/1.1 404"));
        // A hub that restarts without etcd has the certificate.
        keepers.iter().for_each(JoinHandle::abort);
        let mut hubs = hubs;
        (0..3).for_each(|i| hubs.site.cluster.kill(i));
        let secrets = Secrets::sample();
        let tls = Tls { ca: String::new(), cert: "own".into(), key: "own".into(), etcd_clients: String::new() };
        for i in 0..3 {
            let state = StateDir::new(&hubs.path(i, ""), None);
            let pem = firstboot::hub::web::web_file_for_start(&hubs.site.topology, &secrets, &state, None, &tls);
            let mut x509 = Command::new("openssl")
                .args(["x509", "-noout", "-serial"])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .expect("openssl");
            x509.stdin.take().expect("a pipe").write_all(pem.as_bytes()).expect("a pipe");
            let serial = String::from_utf8_lossy(&x509.wait_with_output().expect("openssl").stdout).trim().to_owned();
            assert_eq!(serial, second, "hub-{}", i + 1);
        }
    });
}

#[test]
fn another_hub_continues_the_order_of_a_hub_that_was_killed() {
    in_own_network(async {
        let hubs = Hubs::start(Some("kid-1")).await;
        let _pebble = hubs.pebble(3600, true);
        let killed = hubs.keep(0);
        let prefix = "/bakehouse/web-certificate/";
        let etcd = hubs.site.etcd(1);
        let begun = Instant::now();
        loop {
            let (_, all) = etcd.list(prefix).await.expect("etcd");
            // The hub has ordered, and the authority has not asked yet.
            if all.iter().any(|pair| pair.key.contains("/challenges/")) {
                break;
            }
            assert!(begun.elapsed() < LIMIT, "no order: {}", hubs.log());
            sleep(Duration::from_millis(20)).await;
        }
        killed.abort();
        // The killed hub does not answer the authority, either.
        let rest = format!("{{\"host\":\"{NAME}.\",\"addresses\":[\"127.0.0.2\",\"127.0.0.3\"]}}");
        let dns = Command::new("curl").args(["-sf", "-d", &rest, "http://127.0.0.1:8055/add-a"]).status();
        assert!(dns.expect("curl").success());
        let begun = Instant::now();
        let _others = [hubs.keep(1), hubs.keep(2)];
        hubs.shown(&[1, 2], "").await;
        println!("another hub had the certificate after {:.0?}", begun.elapsed());
        assert!(!hubs.log().contains("There are now 2 orders"), "the hub continued the order: {}", hubs.log());
        // The killed hub returns, and uses the certificate.
        let _returned = hubs.keep(0);
        hubs.shown(&[0, 1, 2], "").await;
    });
}

/// Replies 429 with `Retry-After` to every request, and stores the times of the requests.
async fn refuse(hubs: &Hubs, seconds: u64) -> (JoinHandle<()>, Arc<std::sync::Mutex<Vec<Instant>>>) {
    let own = Identity { cert: &hubs.server.0, key: hubs.server.1.pem() };
    let tls = fleet_https::server(hubs.site.root.certificate(), own).expect("a certificate");
    let acceptor = TlsAcceptor::from(tls);
    let listener = TcpListener::bind("127.0.0.1:14000").await.expect("a port");
    let times = Arc::new(std::sync::Mutex::new(Vec::new()));
    let noted = times.clone();
    let task = tokio::spawn(async move {
        loop {
            let Ok((tcp, _)) = listener.accept().await else { return };
            noted.lock().expect("the times").push(Instant::now());
            let Ok(mut stream) = acceptor.accept(tcp).await else { continue };
            let mut buffer = [0; 8192];
            let _ = stream.read(&mut buffer).await;
            let body = r#"{"type":"urn:ietf:params:acme:error:rateLimited","detail":"too many orders"}"#;
            let text = format!(
                "HTTP/1.1 429 Too Many Requests\r\nRetry-After: {seconds}\r\nContent-Type: application/problem+json\r\n\
                 Content-Length: {}\r\nConnection: close\r\n\r\n{body}",
                body.len()
            );
            let _ = stream.write_all(text.as_bytes()).await;
            let _ = stream.shutdown().await;
        }
    });
    (task, times)
}

#[test]
fn hubs_wait_for_a_directory_that_is_down_or_limits_orders() {
    in_own_network(async {
        let hubs = Hubs::start(None).await;
        let _keepers = [0, 1].map(|i| hubs.keep(i));
        // Nothing listens at the directory's address.
        hubs.until("two failures", |hubs| hubs.metric(0, "failures") >= 2).await;
        let since = hubs.metric(0, "failed_since_timestamp_seconds");
        assert!(since > 0 && hubs.metric(0, "expires_timestamp_seconds") == 0);
        assert!(!certificate(0).1, "the hub shows the certificate of before");

        let (refusing, times) = refuse(&hubs, 15).await;
        hubs.until("a refused order", |_| times.lock().expect("the times").len() == 1).await;
        let refused = Instant::now();
        sleep(Duration::from_secs(12)).await;
        let count = times.lock().expect("the times").len();
        assert_eq!(count, 1, "the hubs respect Retry-After");
        hubs.until("another attempt", |_| times.lock().expect("the times").len() == 2).await;
        println!("the next attempt came after {:.0?}", refused.elapsed());
        refusing.abort();
        let _ = refusing.await;

        let pebble = hubs.pebble(60, false);
        let first = hubs.shown(&[0, 1], "").await;
        hubs.until("no failures", |hubs| hubs.metric(0, "failures") == 0).await;
        assert_eq!(hubs.metric(1, "life_seconds").div_ceil(60), 1);
        // The directory is down when the renewal is due, and returns without its accounts and orders.
        drop(pebble);
        hubs.until("a failed renewal", |hubs| hubs.metric(0, "failures") >= 1).await;
        assert_eq!(certificate(0), (first.clone(), true));
        let _pebble = hubs.pebble(3600, false);
        hubs.shown(&[0, 1], &first).await;
        hubs.until("no failures", |hubs| hubs.metric(1, "failures") == 0).await;
    });
}
