//! Connection limits of a hub's HAProxy: the real program with a hub's configuration, in a network namespace. Needs
//! root, haproxy, ip and python3.

use std::fmt::Write as _;
use std::fs;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use bakehouse_tests::root;
use builder::keys::authority::FleetKey;
use builder::project::Project;

/// Connections of the slow client, more than HAProxy's global `maxconn`.
const SLOW: usize = 4200;

/// Opens connections from one address, sends the beginning of a request on each, and holds them.
const CLIENT: &str = r"
import resource, socket, sys, time
resource.setrlimit(resource.RLIMIT_NOFILE, (20000, 20000))
lines = []
for i in range(int(sys.argv[2])):
    s = socket.socket()
    s.settimeout(1)
    try:
        s.bind((sys.argv[1], 0))
        s.connect(('10.10.0.100', 80))
        s.sendall(b'POST /web/login HTTP/1.1\r\nHost: x\r\n')
        lines.append(s)
    except OSError:
        s.close()
print('open', flush=True)
time.sleep(60)
";

/// Script of another client: prints the seconds until a response of the site, and until PostgreSQL's port accepts a
/// connection.
const OTHER: &str = r"
import socket, time
def ask(to, port, text):
    begun = time.monotonic()
    s = socket.socket()
    s.settimeout(5)
    try:
        s.bind(('10.10.0.21', 0))
        s.connect((to, port))
        if text:
            s.sendall(text)
            assert s.recv(9).startswith(b'HTTP/1.1 ')
        else:
            # HAProxy has no database here and closes each connection that it has accepted.
            s.recv(1)
        return '%.2f' % (time.monotonic() - begun)
    except (OSError, AssertionError) as e:
        return 'no answer: %s' % type(e).__name__
print(ask('10.10.0.100', 80, b'GET /web/health HTTP/1.1\r\nHost: x\r\n\r\n'), ask('10.10.0.1', 5000, None), sep=';')
";

/// Returns the name of the network namespace, which is different for each run.
fn space() -> String {
    format!("bh-web-{}", std::process::id())
}

fn within(program: &str, args: &[&str]) -> Command {
    let mut command = Command::new("ip");
    command.args(["netns", "exec", &space(), program]).args(args);
    command
}

#[test]
fn slow_client_cannot_use_all_connections() {
    let dir = tempfile::tempdir().expect("a folder");
    let project = Project::load(&root().join("profiles/fleets/ha.toml")).expect("a valid fleet.toml");
    let hub = project.topology.node("hub-1").expect("hub-1");
    let authority = FleetKey::create("ha").expect("an authority");
    let member = authority.membership(&project.topology, hub).expect("a member");
    let path = |name: &str| dir.path().join(name);
    for (name, text) in [
        ("ca.crt", member.tls.ca.clone()),
        ("node.pem", format!("{}{}", member.tls.cert, member.tls.key)),
        ("web.pem", format!("{}{}", member.tls.cert, member.tls.key)),
    ] {
        fs::write(path(name), text).expect("a folder");
    }
    let overlay = project.overlay("haproxy").expect("the overlay exists");
    let (name, text) = overlay.files.iter().find(|(n, _)| n.ends_with("haproxy.cfg.j2")).expect("a template");
    let config =
        fleet::render(name, &String::from_utf8_lossy(text), &project.context(hub, &member)).expect("a valid template");
    let folder = dir.path().to_str().expect("a UTF-8 path");
    let config = config.replace("/run/bakehouse/tls", folder).replace("/run/bakehouse", folder);
    fs::write(path("haproxy.cfg"), config).expect("a folder");
    let space = space();
    let mut script = format!("set -e\nip netns add {space}\nip -n {space} link set lo up\n");
    for address in ["10.10.0.1", "10.10.0.100", "10.10.0.20", "10.10.0.21"] {
        let _ = writeln!(script, "ip -n {space} address add {address} dev lo");
    }
    assert!(Command::new("sh").args(["-c", &script]).status().expect("a shell").success());
    let file = path("haproxy.cfg");
    let limit = "ulimit -n 20000; exec haproxy -db -f";
    let mut haproxy =
        within("sh", &["-c", &format!("{limit} {}", file.display())]).spawn().expect("haproxy is installed");
    thread::sleep(Duration::from_secs(2));
    let mut slow = within("python3", &["-c", CLIENT, "10.10.0.20", &SLOW.to_string()])
        .stdout(Stdio::piped())
        .spawn()
        .expect("python3");
    let mut line = String::new();
    let mut said = std::io::BufReader::new(slow.stdout.take().expect("a pipe"));
    std::io::BufRead::read_line(&mut said, &mut line).expect("a pipe");
    let begun = Instant::now();
    let seen = within("python3", &["-c", OTHER]).output().expect("python3");
    let took = begun.elapsed();
    for child in [&mut slow, &mut haproxy] {
        child.kill().expect("a child");
        child.wait().expect("a child");
    }
    let _ = Command::new("ip").args(["netns", "del", &space]).status();
    let seen = String::from_utf8_lossy(&seen.stdout).into_owned();
    println!("{SLOW} slow requests from one address; another client: {} (all: {took:.1?})", seen.trim());
    let times: Vec<f64> = seen.trim().split(';').filter_map(|t| t.parse().ok()).collect();
    assert!(times.len() == 2 && times.iter().all(|t| *t < 4.0), "another client waits: {seen}");
}
