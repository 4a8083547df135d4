//! A hub's mesh while no name server answers: wireguard-go and the C library's resolver, in a network and a mount
//! namespace. Needs root.

use std::collections::BTreeMap;
use std::fs;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bakehouse_tests::lan;
use firstboot::mesh::Mesh;
use firstboot::node::keys::Keys;
use firstboot::node::neighbours::PeerTable;
use fleet::{Fleet, MeshKey, Topology};
use nix::sched::{CloneFlags, unshare};

/// The agent configures interfaces and fences a node without delay although every lookup hangs. The peers get their
/// endpoints once a name server answers.
#[test]
fn fences_node_while_no_name_server_answers() {
    // Namespaces belong to a thread, so the other threads of this process keep theirs.
    std::thread::spawn(fence_node_without_dns).join().expect("no panic in the thread");
}

fn fence_node_without_dns() {
    lan::enter();
    let dir = tempfile::tempdir().expect("a folder");
    private_mounts(dir.path());
    let names = ["one.hub.test", "two.hub.test", "three.hub.test"];
    let toml = format!("name = \"acme\"\n[groups]\napp.count = 1\n[groups.hub]\ncount = 3\nendpoints = {names:?}\n");
    let topology = Topology::from_fleet(&Fleet::parse("fleet.toml", toml.as_bytes()).expect("a fleet"));
    let node = topology.node("hub-1").expect("a hub");
    let _programs: Vec<Program> = ["wg0", "wg-hub2", "wg-hub3"].map(Program::start).into();
    // The name server receives every query, and answers only after the test allows it.
    let server = UdpSocket::bind("127.0.0.1:53").expect("a namespace of its own");
    let answers = Arc::new(AtomicBool::new(false));
    let told = answers.clone();
    std::thread::spawn(move || serve_names(&server, &told));

    let key = |i: u8| MeshKey([i; 32]);
    let keys = [("hub-2", key(2)), ("hub-3", key(3)), ("app-1", key(9))].map(|(slot, key)| (slot.to_owned(), key));
    let neighbourhood = Arc::new(PeerTable::load(dir.path(), keys.into()));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let keys = Keys::make().expect("randomness");
        let mut mesh = Mesh::new(&topology, node, &BTreeMap::new(), &keys).expect("netlink");
        let begun = Instant::now();
        mesh.apply(&neighbourhood).await.expect("interfaces");
        assert!(begun.elapsed() < Duration::from_secs(2), "the mesh waited for names: {:?}", begun.elapsed());
        let hex = |i: u8| format!("public_key={}", format!("{i:02x}").repeat(32));
        assert!(ask("wg0").contains(&hex(9)) && ask("wg-hub2").contains(&hex(2)));
        tokio::spawn(mesh.keep(neighbourhood.clone()));
        // All lookups are pending by then.
        tokio::time::sleep(Duration::from_millis(500)).await;
        let begun = Instant::now();
        neighbourhood.fence_node("app-1").await;
        assert!(begun.elapsed() < Duration::from_millis(100), "it took {:?}", begun.elapsed());
        assert!(!ask("wg0").contains(&hex(9)), "WireGuard still has the peer");

        answers.store(true, Ordering::Relaxed);
        let until = Instant::now() + Duration::from_secs(30);
        while !(ask("wg-hub2").contains("endpoint=192.0.2.2:") && ask("wg-hub3").contains("endpoint=192.0.2.3:")) {
            assert!(Instant::now() < until, "no endpoints: {}", ask("wg-hub2"));
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        neighbourhood.unfence_node("app-1");
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(ask("wg0").contains(&hex(9)));
    });
    runtime.shutdown_background();
}

/// Gives this thread and its child processes another resolv.conf and an empty /run/wireguard.
fn private_mounts(dir: &std::path::Path) {
    unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace, as root");
    let mount = |args: &[&str]| {
        assert!(Command::new("mount").args(args).status().expect("mount").success(), "mount {args:?}");
    };
    mount(&["--make-rprivate", "/"]);
    fs::create_dir_all("/run/wireguard").expect("a folder");
    mount(&["-t", "tmpfs", "tmpfs", "/run/wireguard"]);
    let (resolv, switch) = (dir.join("resolv.conf"), dir.join("nsswitch.conf"));
    fs::write(&resolv, "nameserver 127.0.0.1\noptions timeout:2\n").expect("a folder");
    fs::write(&switch, "hosts: files dns\n").expect("a folder");
    for (file, at) in [(&resolv, "/etc/resolv.conf"), (&switch, "/etc/nsswitch.conf")] {
        let target = fs::canonicalize(at).expect("this host resolves names");
        mount(&["--bind", file.to_str().expect("text"), target.to_str().expect("text")]);
    }
}

/// Answers A queries for `*.hub.test` once `may` is set, with 192.0.2.1 for `one`, 192.0.2.2 for `two`, and so on.
fn serve_names(server: &UdpSocket, may: &AtomicBool) {
    let mut packet = [0; 512];
    while let Ok((length, from)) = server.recv_from(&mut packet) {
        if !may.load(Ordering::Relaxed) || length < 13 {
            continue;
        }
        let question = &packet[12..length];
        let end = question.iter().position(|b| *b == 0).expect("a name") + 5;
        let number = ["one", "two", "three"].iter().position(|n| question[1..].starts_with(n.as_bytes()));
        let is_a = question[end - 4..end] == [0, 1, 0, 1];
        let mut answer = packet[..2].to_vec();
        answer.extend([0x81, 0x80, 0, 1, 0, u8::from(is_a), 0, 0, 0, 0]);
        answer.extend(&question[..end]);
        if is_a {
            let address = Ipv4Addr::new(192, 0, 2, 1 + number.expect("a known name") as u8);
            answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
            answer.extend(address.octets());
        }
        let _ = server.send_to(&answer, from);
    }
}

/// The wireguard-go process of an interface.
struct Program(Child);

impl Program {
    fn start(interface: &str) -> Self {
        let mut program = Command::new("wireguard-go");
        program.args(["-f", interface]).stdout(Stdio::null()).stderr(Stdio::null());
        let program = program.env("WG_PROCESS_FOREGROUND", "1").env("LOG_LEVEL", "silent").spawn();
        let program = Self(program.expect("wireguard-go is installed"));
        lan::wait(interface, || UnixStream::connect(format!("/run/wireguard/{interface}.sock")).is_ok());
        program
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Reads an interface's configuration from wireguard-go, see https://www.wireguard.com/xplatform/.
fn ask(interface: &str) -> String {
    use std::io::{Read as _, Write as _};
    let mut program = UnixStream::connect(format!("/run/wireguard/{interface}.sock")).expect("wireguard-go");
    program.write_all(b"get=1\n\n").expect("wireguard-go");
    let mut said = Vec::new();
    while !said.ends_with(b"\n\n") {
        let mut part = [0; 4096];
        match program.read(&mut part).expect("wireguard-go") {
            0 => break,
            length => said.extend(&part[..length]),
        }
    }
    String::from_utf8(said).expect("text")
}
