//! A rack: bare machines on the lab's wire, and `bakehouse netboot` on the same wire, in a network
//! namespace that nothing leads out of.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};

use crate::Lab;

/// This host's end of the wire.
const CARD: &str = "rack0";
/// Its address there, beyond those that machines have.
pub const ADDRESS: &str = "198.18.255.254/16";
const NET: &str = "198.18.0.0/16";

pub struct Rack {
    bridge: Child,
    log: PathBuf,
    server: Option<Child>,
}

impl Rack {
    /// Takes this thread, and what it starts, into a namespace with an end of the wire in it.
    ///
    /// # Panics
    /// Not as root.
    #[must_use]
    pub fn open(lab: &Lab, wire: &str) -> Self {
        unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace, as root");
        let up = Command::new("ip").args(["link", "set", "lo", "up"]).status().expect("ip");
        assert!(up.success());
        let (group, port) = wire.split_once(':').expect("an address and a port");
        let bridge = Command::new("socat")
            .arg(format!("TUN:{ADDRESS},tun-type=tap,tun-name={CARD},iff-no-pi,iff-up"))
            .arg(format!(
                "UDP4-DATAGRAM:{wire},bind=:{port},reuseaddr,ip-add-membership={group}:127.0.0.1,\
                 ip-multicast-if=127.0.0.1"
            ))
            .spawn()
            .expect("socat");
        let there =
            || Command::new("ip").args(["link", "show", CARD]).stderr(Stdio::null()).stdout(Stdio::null()).status();
        wait("the wire's end", || there().expect("ip").success());
        Self { bridge, log: lab.dir.join("netboot.log"), server: None }
    }

    /// Starts `bakehouse netboot`, or starts it anew.
    pub fn serve(&mut self, lab: &Lab, more: &[&str]) {
        self.stop();
        let log = File::create(&self.log).expect("the lab is writable");
        let mut command = lab.command(&["netboot", "--interface", CARD, "--dhcp", NET]);
        command.args(more).stdin(Stdio::null()).stdout(log.try_clone().expect("a file")).stderr(log);
        self.server = Some(command.spawn().expect("bakehouse starts"));
        self.hears("Ctrl-C ends it");
    }

    /// Memory that the server has now, in kB.
    #[must_use]
    pub fn memory(&self) -> u64 {
        let id = self.server.as_ref().map_or(0, Child::id);
        let status = fs::read_to_string(format!("/proc/{id}/status")).unwrap_or_default();
        let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"));
        line.and_then(|l| l.trim().strip_suffix(" kB")?.parse().ok()).expect("a server that runs")
    }

    /// What the server said since it was started.
    #[must_use]
    pub fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits until the server has said it.
    #[track_caller]
    pub fn hears(&mut self, words: &str) {
        let until = Instant::now() + Duration::from_secs(600);
        while !self.said().contains(words) {
            let ended = self.server.as_mut().and_then(|s| s.try_wait().expect("a child"));
            assert!(ended.is_none() && Instant::now() < until, "`{words}` was not said:\n{}", self.said());
            sleep(Duration::from_millis(200));
        }
    }

    fn stop(&mut self) {
        if let Some(mut server) = self.server.take() {
            let _ = server.kill().and_then(|()| server.wait());
        }
    }
}

impl Drop for Rack {
    fn drop(&mut self) {
        self.stop();
        let _ = self.bridge.kill().and_then(|()| self.bridge.wait());
        if std::thread::panicking() {
            eprintln!("netboot said:\n{}", self.said());
        }
    }
}

fn wait(what: &str, is: impl Fn() -> bool) {
    let until = Instant::now() + Duration::from_secs(30);
    while !is() {
        assert!(Instant::now() < until, "{what} does not come");
        sleep(Duration::from_millis(50));
    }
}
