//! Three hubs with the real etcd and HAProxy, and Debian's pebble in its strict mode.

use std::fs;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bakehouse_tests::root;
use bakehouse_tests::site::TestCluster;
use firstboot::hub::web::{Clock, Pace, WebKeeper, WebPaths};
use firstboot::node::state::StateDir;
use fleet::{Authority, HubKey, HubSecrets, MachineSize, NodeContext, PrivateKey, Secrets, Tls, Web};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio::time::sleep;

pub(super) const NAME: &str = "erp.example.com";
pub(super) const DIRECTORY: &str = "https://127.0.0.1:14000/dir";
/// Longest wait for a certificate.
pub(super) const LIMIT: Duration = Duration::from_secs(120);
/// HMAC key of pebble's configuration for external-account binding.
const HMAC: &str = "zWNDZM6eQGHWpSRTPal5eIUYFTu7EajVIoguysqZ9wG44nMEtx3MUAsUDkMTQ12W";

/// A process that ends with the test.
pub(super) struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill().and_then(|()| self.0.wait());
    }
}

/// Three hubs: etcd, HAProxy, and an Odoo that replies at once.
pub(super) struct Hubs {
    pub(super) site: TestCluster,
    pub(super) dir: tempfile::TempDir,
    haproxy: Vec<Running>,
    _odoo: JoinHandle<()>,
    /// Certificate and key of the directory's server, which the fleet's root signed.
    pub(super) server: (String, PrivateKey),
    /// Clock of the hubs.
    pub(super) clock: Clock,
}

impl Hubs {
    pub(super) async fn start(eab: Option<&str>) -> Self {
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
        let mut hubs =
            Self { haproxy: Vec::new(), server: (cert, key), _odoo: odoo, dir, site, clock: Clock::default() };
        for i in 0..3 {
            let haproxy = hubs.start_haproxy(i);
            hubs.haproxy.push(haproxy);
        }
        hubs
    }

    pub(super) fn path(&self, i: usize, name: &str) -> PathBuf {
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
            lan: &[],
        };
        let text = fleet::render(template, &text, &context).expect("a valid template");
        // HAProxy and the hub need the same path of the certificate.
        let text = text.replace("/run/bakehouse", home.to_str().expect("UTF-8").trim_end_matches('/'));
        let text = text.replace("bind :", &format!("bind {}:", node.address));
        let file = home.join("haproxy.cfg");
        fs::write(&file, text).expect("a folder");
        let mut haproxy = Command::new("haproxy");
        haproxy.arg("-db").arg("-f").arg(&file).stderr(fs::File::create(home.join("haproxy.log")).expect("a folder"));
        let child = haproxy.spawn().expect("haproxy is installed");
        let begun = Instant::now();
        while TcpStream::connect((node.address, 443)).is_err() {
            assert!(begun.elapsed() < LIMIT, "HAProxy does not start");
            std::thread::sleep(Duration::from_millis(50));
        }
        Running(child)
    }

    /// Starts a hub's part in the certificate, like a new process with only the state on its disk.
    pub(super) fn keep(&self, i: usize, pace: Pace) -> JoinHandle<()> {
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
        let keeper = keeper.expect("the fleet has acme").with_pace(pace, self.clock.clone());
        tokio::spawn(async move { Box::pin(keeper.keep()).await })
    }

    /// Starts pebble and its DNS server, in which the name has the addresses of all hubs. `life`: seconds for which its
    /// certificates are valid.
    pub(super) fn pebble(&self, life: u64, is_bound: bool) -> (Running, Running) {
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
            // Per cent. The default is 5.
            .env("PEBBLE_WFE_NONCEREJECT", "15")
            .env("PEBBLE_AUTHZREUSE", "0")
            .stdout(log())
            .stderr(log())
            .spawn()
            .expect("pebble is installed");
        let both = (Running(pebble), Running(dns));
        Self::set_addresses(&[1, 2, 3]);
        retry(DIRECTORY, || curl(&[DIRECTORY]));
        both
    }

    /// Sets the hubs whose addresses the name has.
    pub(super) fn set_addresses(hubs: &[u8]) {
        let addresses: Vec<String> = hubs.iter().map(|number| format!("127.0.0.{number}")).collect();
        let host = format!("{NAME}.");
        let body = serde_json::json!({ "host": host, "addresses": addresses }).to_string();
        let clear = serde_json::json!({ "host": host }).to_string();
        retry("the DNS server", || curl(&["-d", &clear, "http://127.0.0.1:8055/clear-a"]));
        retry("the DNS server", || curl(&["-d", &body, "http://127.0.0.1:8055/add-a"]));
    }

    pub(super) fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("pebble.log")).unwrap_or_default()
    }

    /// Returns the value of a metric of a hub.
    pub(super) fn metric(&self, i: usize, name: &str) -> u64 {
        let text = fs::read_to_string(self.path(i, "metrics/web.prom")).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix(&format!("bakehouse_web_certificate_{name} ")));
        line.and_then(|value| value.parse().ok()).unwrap_or_default()
    }

    /// Waits until each of these hubs shows a certificate of pebble other than `before`. Returns its serial number.
    pub(super) async fn shown(&self, hubs: &[usize], before: &str) -> String {
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

    pub(super) async fn until(&self, what: &str, is_so: impl Fn(&Self) -> bool) {
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
pub(super) fn certificate(i: usize) -> (String, bool) {
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
pub(super) fn plain(i: usize, path: &str) -> String {
    let url = format!("http://127.0.0.{}{path}", i + 1);
    let done =
        Command::new("curl").args(["-s", "-D-", "-o", "/dev/null", "-H", &format!("Host: {NAME}"), &url]).output();
    String::from_utf8_lossy(&done.expect("curl").stdout).into_owned()
}

fn curl(args: &[&str]) -> bool {
    let done = Command::new("curl").args(["-sfk", "-o", "/dev/null"]).args(args).status();
    done.expect("curl is installed").success()
}

fn retry(what: &str, is_done: impl Fn() -> bool) {
    let begun = Instant::now();
    while !is_done() {
        assert!(begun.elapsed() < LIMIT, "{what} does not answer");
        std::thread::sleep(Duration::from_millis(50));
    }
}
