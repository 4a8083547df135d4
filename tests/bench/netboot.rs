//! Benchmark of `bakehouse netboot` against nginx with the same files: 50 concurrent clients in a network namespace.
//! Needs root.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use bakehouse_tests::rack::{ADDRESS, NetbootRack};
use bakehouse_tests::{Machine, TestFleet};

const MACHINES: usize = 50;
const ROUNDS: usize = 3;
/// Ports of `bakehouse netboot` and nginx.
const PORTS: [u16; 2] = [8470, 8471];

fn main() {
    let lab = TestFleet::empty("bench-netboot");
    lab.write(
        "fleet.toml",
        "name = \"rack\"\n[netboot]\ntrust_lan = true\nothers = \"hub-1\"\n[groups.hub]\ncount = 1\nendpoints = [\"198.18.0.1\"]\n",
    );
    lab.init();
    lab.ok(&["lock"]);
    lab.ok(&["build"]);
    let mut rack = NetbootRack::open(&lab, &Machine::for_node(&lab, "hub-1").lan());
    rack.serve(&lab, &[]);
    let nginx = Nginx::start(&lab);

    let size = fs::metadata(lab.dir.join("build/hub/rack-hub_1.raw")).expect("the built image").len();
    let of = [(PORTS[0], "/images/hub.raw"), (PORTS[1], "/rack-hub_1.raw")];
    let before = rack.memory();
    let mut rates = [const { Vec::new() }; 2];
    for round in 0..=ROUNDS {
        for (i, (port, path)) in of.into_iter().enumerate() {
            let rate = serve_all(port, path, size);
            // The first round fills the page cache.
            if round > 0 {
                rates[i].push(rate);
            }
        }
    }
    let [own, peer] = rates.map(median);
    println!("{MACHINES} machines at once, {:.0} MB each, median of {ROUNDS} rounds in turn:", size as f64 / 1e6);
    println!("  bakehouse netboot  {own:>6.0} MB/s");
    println!("  nginx              {peer:>6.0} MB/s   ratio {:.2}", own / peer);
    println!("  bakehouse's memory {before:>6} kB before, {} kB after", rack.memory());
    drop(nginx);
}

/// Returns the total rate in MB/s. Each client reads the whole image, and half of them in ranges like the installer.
fn serve_all(port: u16, path: &str, size: u64) -> f64 {
    let begun = Instant::now();
    thread::scope(|scope| {
        for machine in 0..MACHINES {
            scope.spawn(move || {
                if machine % 2 == 0 {
                    return get(port, path, 0, size);
                }
                let part = size.div_ceil(4);
                (0..4).for_each(|i| get(port, path, i * part, ((i + 1) * part).min(size)));
            });
        }
    });
    MACHINES as f64 * size as f64 / 1e6 / begun.elapsed().as_secs_f64()
}

fn get(port: u16, path: &str, start: u64, end: u64) {
    let host = ADDRESS.split('/').next().expect("an address");
    let mut stream = TcpStream::connect((host, port)).expect("a server");
    let ask =
        format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nRange: bytes={start}-{}\r\n\r\n", end - 1);
    stream.write_all(ask.as_bytes()).expect("a server");
    let mut buffer = vec![0; 256 << 10];
    let (mut head, mut body) = (Vec::new(), 0);
    loop {
        let read = stream.read(&mut buffer).expect("a server");
        if read == 0 {
            break;
        }
        if body > 0 {
            body += read as u64;
            continue;
        }
        head.extend_from_slice(&buffer[..read]);
        if let Some(at) = head.windows(4).position(|w| w == b"\r\n\r\n") {
            assert!(head.starts_with(b"HTTP/1.1 206"), "{}", String::from_utf8_lossy(&head[..at]));
            body = (head.len() - at - 4) as u64;
        }
    }
    assert_eq!(body, end - start);
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

struct Nginx(Child);

impl Nginx {
    /// Starts nginx with the settings that its documentation recommends for large files.
    fn start(lab: &TestFleet) -> Self {
        let dir = lab.dir.display();
        let host = ADDRESS.split('/').next().expect("an address");
        let text = format!(
            "daemon off; user root; worker_processes 2; pid {dir}/nginx.pid; error_log stderr crit;\n\
             events {{ worker_connections 256; }}\n\
             http {{ access_log off; sendfile on; tcp_nopush on;\n\
             server {{ listen {host}:{}; root {dir}/build/hub; }} }}\n",
            PORTS[1]
        );
        lab.write("nginx.conf", &text);
        let child = Command::new("nginx").arg("-c").arg(lab.dir.join("nginx.conf")).stdout(Stdio::null()).spawn();
        let nginx = Self(child.expect("nginx"));
        let until = Instant::now() + Duration::from_secs(10);
        while TcpStream::connect((host, PORTS[1])).is_err() {
            assert!(Instant::now() < until, "nginx does not answer");
            thread::sleep(Duration::from_millis(50));
        }
        nginx
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        // SIGTERM, because after SIGKILL nginx's workers would keep running.
        let _ = Command::new("kill").arg(self.0.id().to_string()).status().and_then(|_| self.0.wait());
    }
}
