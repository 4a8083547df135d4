//! The hubs' certificate for browsers: three hubs with the real etcd and HAProxy, and Debian's pebble, the test server of
//! RFC 8555, in its strict mode. Needs root, haproxy, pebble, openssl, curl and python3.

mod hubs;

use std::fs;
use std::io::Write as _;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bakehouse_tests::network::in_own_network;
use firstboot::hub::web::{Pace, web_file_for_start};
use firstboot::node::state::StateDir;
use fleet::{Secrets, Tls, encoding};
use fleet_https::Identity;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio::time::sleep;
use tokio_rustls::TlsAcceptor;

use hubs::{Hubs, LIMIT, certificate, plain};

const HOUR: Duration = Duration::from_secs(3600);
const DAY: u64 = 86_400;
/// Life of most certificates, in seconds: 90 days. They are due for renewal after 57 to 60 days.
const LIFE: u64 = 90 * DAY;
/// Life of a certificate that is not due when the clock is weeks ahead of pebble's, in seconds.
const LONG_LIFE: u64 = 1000 * DAY;
/// A lease of 20 s: another hub continues an order after this time at the latest.
const PACE: Pace = Pace {
    check: Duration::from_millis(300),
    lock: 20,
    first_retry: Duration::from_secs(2),
    longest_retry: Duration::from_secs(4),
    spread: Duration::from_secs(2),
};

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

/// Returns the serial number of a certificate in PEM.
fn serial(pem: &str) -> String {
    let mut x509 = Command::new("openssl");
    x509.args(["x509", "-noout", "-serial"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut x509 = x509.spawn().expect("openssl is installed");
    x509.stdin.take().expect("a pipe").write_all(pem.as_bytes()).expect("a pipe");
    String::from_utf8_lossy(&x509.wait_with_output().expect("openssl").stdout).trim().to_owned()
}

#[test]
fn hubs_order_renew_and_use_a_certificate_without_dropping_a_connection() {
    in_own_network(async {
        let mut hubs = Hubs::start(None).await;
        assert!((0..3).all(|i| !certificate(i).1), "before the first one, hubs show the fleet's own");
        let pebble = hubs.pebble(LIFE, false);
        let keepers = [0, 1, 2].map(|i| hubs.keep(i, PACE));
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
        hubs.clock.advance(56 * 24 * HOUR);
        sleep(Duration::from_secs(1)).await;
        assert!((0..3).all(|i| certificate(i) == (first.clone(), true)), "it is not due yet");
        // The directory restarts without its accounts.
        drop(pebble);
        let _pebble = hubs.pebble(LONG_LIFE, false);
        hubs.clock.advance(4 * 24 * HOUR);
        let second = hubs.shown(&[0, 1, 2], &first).await;
        sleep(Duration::from_secs(1)).await;
        fs::write(&stop, "").expect("a folder");
        let said = clients.wait_with_output().expect("a child");
        let said = String::from_utf8_lossy(&said.stdout).into_owned();
        println!("requests, failed ones, certificates: {}", said.trim());
        let numbers: Vec<u64> = said.split_whitespace().filter_map(|n| n.parse().ok()).collect();
        let [requests, failed, seen] = numbers[..] else { panic!("{said}") };
        assert!(requests > 50 && failed == 0 && seen >= 2, "{said}");

        let other = plain(0, "/web/login");
        assert!(other.starts_with("HTTP/1.1 308") && other.contains("https://erp.example.com/web/login"), "{other}");
        assert!(!other.contains("Strict-Transport-Security"), "{other}");
        assert!(plain(1, "/web/health").starts_with("HTTP/1.1 200"));
        assert!(plain(2, "/.well-known/acme-challenge/nothing").starts_with("HTTP/1.1 404"));
        // A hub that restarts without etcd has the certificate.
        keepers.iter().for_each(JoinHandle::abort);
        (0..3).for_each(|i| hubs.site.cluster.kill(i));
        let secrets = Secrets::sample();
        let tls = Tls { ca: String::new(), cert: "own".into(), key: "own".into(), etcd_clients: String::new() };
        for i in 0..3 {
            let state = StateDir::new(&hubs.path(i, ""), None);
            let pem = web_file_for_start(&hubs.site.topology, &secrets, &state, None, &tls);
            assert_eq!(serial(&pem), second, "hub-{}", i + 1);
        }
    });
}

#[test]
fn another_hub_continues_the_order_of_a_hub_that_was_killed() {
    in_own_network(async {
        let hubs = Hubs::start(Some("kid-1")).await;
        let _pebble = hubs.pebble(LIFE, true);
        let killed = hubs.keep(0, PACE);
        let etcd = hubs.site.etcd(1);
        let begun = Instant::now();
        loop {
            let (_, all) = etcd.list("/bakehouse/web-certificate/challenges/").await.expect("etcd");
            // The hub has ordered, and the authority has not asked yet.
            if !all.is_empty() {
                break;
            }
            assert!(begun.elapsed() < LIMIT, "no order: {}", hubs.log());
            sleep(Duration::from_millis(20)).await;
        }
        killed.abort();
        // The authority asks only the hub whose agent is dead: its HAProxy forwards the question.
        Hubs::set_addresses(&[1]);
        let begun = Instant::now();
        let _others = [hubs.keep(1, PACE), hubs.keep(2, PACE)];
        let first = hubs.shown(&[1, 2], "").await;
        println!("another hub had the certificate after {:.0?}", begun.elapsed());
        assert!(!hubs.log().contains("There are now 2 orders"), "the hub continued the order: {}", hubs.log());
        assert!(!certificate(0).1);
        // Without any agent, HAProxy replies at once.
        let asked = Instant::now();
        let missing = plain(0, "/.well-known/acme-challenge/nothing");
        assert!(missing.starts_with("HTTP/1.1 404") && asked.elapsed() < Duration::from_secs(3), "{missing}");
        // The killed hub returns, and uses the certificate.
        let returned = hubs.keep(0, PACE);
        assert_eq!(hubs.shown(&[0, 1, 2], "").await, first);
        // It is dead again when the renewal is due. The others use the account of before.
        returned.abort();
        hubs.clock.advance(60 * 24 * HOUR);
        hubs.shown(&[1, 2], &first).await;
        assert!(!hubs.log().contains("There are now 2 accounts"), "{}", hubs.log());
        // By the hubs' clock, pebble's new certificate is due, too: they do not order without a pause.
        hubs.until("a pause", |hubs| hubs.metric(1, "failures") >= 1).await;
    });
}

/// Replies 429 with `Retry-After` to every request, and stores the times of the requests.
async fn refuse(hubs: &Hubs, seconds: u64) -> (JoinHandle<()>, Arc<Mutex<Vec<Instant>>>) {
    let own = Identity { cert: &hubs.server.0, key: hubs.server.1.pem() };
    let tls = fleet_https::server(hubs.site.root.certificate(), own).expect("a certificate");
    let acceptor = TlsAcceptor::from(tls);
    let listener = TcpListener::bind("127.0.0.1:14000").await.expect("a port");
    let times = Arc::new(Mutex::new(Vec::new()));
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
fn hubs_wait_for_a_directory_that_is_down_for_a_week_or_limits_orders() {
    in_own_network(async {
        // The pauses of images.
        let Pace { first_retry, longest_retry, .. } = Pace::default();
        let pace = Pace { lock: 60, first_retry, longest_retry, ..PACE };
        let hubs = Hubs::start(None).await;
        let (refusing, times) = refuse(&hubs, DAY).await;
        let _keepers = [0, 1].map(|i| hubs.keep(i, pace));
        hubs.until("a refused order", |hubs| hubs.metric(0, "failures") == 1).await;
        assert_eq!(hubs.metric(0, "expires_timestamp_seconds"), 0);
        hubs.clock.advance(23 * HOUR);
        sleep(Duration::from_secs(2)).await;
        assert_eq!(times.lock().expect("the times").len(), 1, "the hubs respect Retry-After");
        hubs.clock.advance(4 * HOUR);
        hubs.until("another refused order", |hubs| hubs.metric(0, "failures") == 2).await;
        assert_eq!(times.lock().expect("the times").len(), 2);
        assert!(!certificate(0).1, "the hub shows the certificate of before");
        refusing.abort();
        let _ = refusing.await;

        let pebble = hubs.pebble(LIFE, false);
        hubs.clock.advance(27 * HOUR);
        let first = hubs.shown(&[0, 1], "").await;
        hubs.until("no failures", |hubs| (0..2).all(|i| hubs.metric(i, "failures") == 0)).await;
        assert_eq!(hubs.metric(1, "life_seconds").div_ceil(DAY), 90);

        // The directory is down for a week when the renewal is due, and returns without its accounts and orders.
        drop(pebble);
        hubs.clock.advance(60 * 24 * HOUR);
        hubs.until("a failed renewal", |hubs| hubs.metric(0, "failures") == 1).await;
        let since = hubs.metric(0, "failed_since_timestamp_seconds");
        for failures in 2..=29 {
            // No pause is longer.
            hubs.clock.advance(6 * HOUR);
            hubs.until("one more attempt", |hubs| hubs.metric(0, "failures") == failures).await;
        }
        assert_eq!(hubs.metric(1, "failed_since_timestamp_seconds"), since, "the alert counts from the first failure");
        assert!((0..2).all(|i| certificate(i) == (first.clone(), true)), "hubs show the certificate of before");
        let _pebble = hubs.pebble(LONG_LIFE, false);
        hubs.clock.advance(6 * HOUR);
        hubs.shown(&[0, 1], &first).await;
        hubs.until("no failures", |hubs| (0..2).all(|i| hubs.metric(i, "failures") == 0)).await;
    });
}
