//! The real installer against a malicious server. The test runs as root, in a mount namespace with the files of the
//! installer's initrd.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use bakehouse_tests::root;
use fleet::encoding::encode;
use fleet::netboot::{
    Assignment, Extent, ImageStatement, InstallerTrust, NetbootMachine, Run, SignedImage, code, seal,
};
use ring::signature::{Ed25519KeyPair, KeyPair as _};

const TIMEOUT: Duration = Duration::from_secs(60);

fn update_key(seed: u8) -> Ed25519KeyPair {
    Ed25519KeyPair::from_seed_unchecked(&[seed; 32]).expect("32 bytes are a key")
}

/// A line that the installer prints, or its request for a file.
#[derive(Debug)]
enum Event {
    Printed(String),
    Loads(String),
}

struct Installer {
    child: Child,
    events: Receiver<Event>,
    _dir: tempfile::TempDir,
}

impl Installer {
    /// Starts the installer, and a server that sends `answer`.
    fn start(answer: impl Fn(&NetbootMachine) -> Assignment + Send + 'static) -> Self {
        let (sender, events) = channel();
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("a port").port();
        let of_server = sender.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                serve(stream.expect("a connection"), &answer, &of_server);
            }
        });

        let dir = tempfile::tempdir().expect("a folder");
        let path = |name: &str| dir.path().join(name);
        let trust = InstallerTrust {
            fleet: "acme".into(),
            version: "1".into(),
            key: encode(update_key(1).public_key().as_ref()),
        };
        fs::write(path("trust"), serde_json::to_vec(&trust).expect("JSON")).expect("a file");
        fs::write(path("cmdline"), format!("quiet {}=http://127.0.0.1:{port}\n", NetbootMachine::SERVER))
            .expect("a file");
        let (etc, name) = InstallerTrust::PATH.rsplit_once('/').expect("a folder and a name");
        // The installer's losetup would detach the host's loop devices.
        let script = format!(
            "mount --bind {cmdline} /proc/cmdline && mount -t tmpfs none /etc && mount -t tmpfs none /run \
             && mount --bind /bin/false \"$(command -v losetup)\" && mkdir -p /{etc} \
             && cp {trust} /{etc}/{name} && exec {installer}",
            cmdline = path("cmdline").display(),
            trust = path("trust").display(),
            installer = root().join("target/release/firstboot-install").display(),
        );
        let mut child = Command::new("unshare")
            .args(["--mount", "--", "sh", "-ec", &script])
            .stdout(Stdio::piped())
            .spawn()
            .expect("unshare, as root");
        let out = child.stdout.take().expect("a pipe");
        std::thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                let _ = sender.send(Event::Printed(line));
            }
        });
        Self { child, events, _dir: dir }
    }

    fn next(&self) -> Event {
        self.events.recv_timeout(TIMEOUT).expect("the installer prints or requests something")
    }
}

impl Drop for Installer {
    fn drop(&mut self) {
        let _ = self.child.kill().and_then(|()| self.child.wait());
    }
}

fn serve(stream: TcpStream, answer: &impl Fn(&NetbootMachine) -> Assignment, events: &Sender<Event>) {
    let mut reader = BufReader::new(stream);
    let (mut first, mut length) = (String::new(), 0);
    reader.read_line(&mut first).expect("a request");
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).expect("a header");
        if line.trim().is_empty() {
            break;
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().expect("a number");
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).expect("a body");
    let path = first.split(' ').nth(1).expect("a path").to_owned();
    let (status, body) = if path == "/v1/machine" {
        let machine = serde_json::from_slice(&body).expect("a machine");
        ("200 OK", serde_json::to_vec(&answer(&machine)).expect("JSON"))
    } else {
        if !path.starts_with("/v1/") {
            events.send(Event::Loads(path)).expect("the test listens");
        }
        ("404 Not Found", Vec::new())
    };
    let head = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", body.len());
    // The installer may have exited.
    let _ = reader.get_mut().write_all(&[head.as_bytes(), &body].concat());
}

/// Assigns an image that runs from memory, with a statement about the root hash `signed`, signed with the key of
/// `seed`.
fn run(machine: &NetbootMachine, roothash: &str, signed: &str, seed: u8) -> Assignment {
    let statement =
        ImageStatement { fleet: "acme".into(), group: "app".into(), version: "1".into(), roothash: signed.to_owned() };
    let statement = serde_json::to_string(&statement).expect("JSON");
    let signature = encode(update_key(seed).sign(&SignedImage::message(&statement)).as_ref());
    Assignment::Run(Run {
        to: "app-1".to_owned(),
        image: "/images/app.raw".to_owned(),
        root: Extent { start: 0, size: 4096 },
        verity: Extent { start: 4096, size: 4096 },
        roothash: roothash.to_owned(),
        signed: Some(SignedImage { statement, signature }),
        var: None,
        ticket: seal(b"a ticket", &machine.key).expect("a key").0,
    })
}

/// An attack on Secure Boot: the signed installer starts, and another host replies with its own root file system.
#[test]
fn installer_rejects_root_that_the_fleet_did_not_sign() {
    let (good, evil) = ("ab".repeat(32), "cd".repeat(32));
    // A signed statement about the fleet's root, and a statement about the other root with another key's signature.
    for (signed, seed) in [(good.clone(), 1), (evil.clone(), 2)] {
        let evil = evil.clone();
        let installer = Installer::start(move |machine| run(machine, &evil, &signed, seed));
        loop {
            match installer.next() {
                Event::Printed(line) if line.contains("the server's image for app-1 is refused") => break,
                Event::Printed(_) => {}
                Event::Loads(path) => panic!("the installer requests {path}"),
            }
        }
    }
}

#[test]
fn installer_loads_root_that_the_fleet_signed() {
    let good = "ab".repeat(32);
    let installer = Installer::start(move |machine| run(machine, &good, &good, 1));
    loop {
        match installer.next() {
            Event::Printed(line) => assert!(!line.contains("is refused"), "{line}"),
            Event::Loads(path) => {
                assert_eq!(path, "/images/app.raw");
                break;
            }
        }
    }
}

#[test]
fn installer_prints_the_code_of_its_key() {
    let (sender, keys) = channel();
    let installer = Installer::start(move |machine| {
        sender.send(machine.key.clone()).expect("the test listens");
        Assignment::Confirm { to: "hub-1".to_owned() }
    });
    let key = keys.recv_timeout(TIMEOUT).expect("a request");
    let Event::Printed(line) = installer.next() else { panic!("the installer requests a file") };
    assert!(line.ends_with(&format!("bakehouse netboot --approve {}", code(&key, "hub-1"))), "{line}");
    // The next request has the same key, so the code does not change.
    assert_eq!(keys.recv_timeout(TIMEOUT).expect("a second request"), key);
}
