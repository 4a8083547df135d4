//! Network boot of bare machines: runs `bakehouse netboot` on their virtual network, in a network namespace without a
//! route out.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::TestFleet;
use crate::lan::{end, enter, wait};

/// Interface of this host on the machines' network.
const CARD: &str = "rack0";
/// Address of that interface, beyond those of the machines.
pub const ADDRESS: &str = "198.18.255.254/16";
const NET: &str = "198.18.0.0/16";
/// Interface, address and range of the other DHCP server.
const OTHER: &str = "rack1";
const OTHER_ADDRESS: &str = "198.18.255.253/16";
const OTHER_RANGE: &str = "198.18.64.1,198.18.64.99,255.255.0.0";

/// A network for machines that boot from it: a bridge on this host, and `bakehouse netboot`. Dropping it ends both.
pub struct NetbootRack {
    lan: String,
    bridge: Child,
    log: PathBuf,
    server: Option<Child>,
    /// Another DHCP server of the network, and the socat process of its interface.
    other: Option<[Child; 2]>,
}

impl NetbootRack {
    /// Moves this thread and its child processes into a network namespace with an interface on the machines' network.
    ///
    /// # Panics
    /// If the process is not root.
    #[must_use]
    pub fn open(lab: &TestFleet, lan: &str) -> Self {
        enter();
        let bridge = end(lan, &format!("TUN:{ADDRESS},tun-type=tap,tun-name={CARD},iff-no-pi,iff-up"), CARD);
        Self { lan: lan.to_owned(), bridge, log: lab.dir.join("netboot.log"), server: None, other: None }
    }

    /// Starts `bakehouse netboot`, or restarts it.
    pub fn serve(&mut self, lab: &TestFleet, more: &[&str]) {
        self.stop();
        let log = File::create(&self.log).expect("the lab is writable");
        let mut command = lab.command(&["netboot", "--interface", CARD]);
        if self.other.is_none() {
            command.args(["--dhcp", NET]);
        }
        command.args(more).stdin(Stdio::null()).stdout(log.try_clone().expect("a file")).stderr(log);
        self.server = Some(command.spawn().expect("bakehouse starts"));
        self.hears("Ctrl-C ends it");
    }

    /// Starts another DHCP server in a namespace of its own. `bakehouse netboot` then gives out no addresses.
    pub fn has_dhcp(&mut self) {
        self.stop();
        let bridge = end(&self.lan, &format!("TUN,tun-type=tap,tun-name={OTHER},iff-no-pi"), OTHER);
        let server = Command::new("unshare")
            .args(["--net", "--", "sh", "-ec"])
            .arg(format!(
                "until ip link show {OTHER}; do sleep 0.05; done; ip address add {OTHER_ADDRESS} dev {OTHER}; \
                 ip link set {OTHER} up; exec dnsmasq --conf-file=/dev/null --keep-in-foreground --port=0 \
                 --interface={OTHER} --user=root --dhcp-range={OTHER_RANGE},1h --dhcp-leasefile=/dev/null --pid-file"
            ))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("unshare");
        let id = server.id().to_string();
        self.other = Some([bridge, server]);
        let own = fs::read_link("/proc/thread-self/ns/net").expect("a namespace");
        wait("the other namespace", || fs::read_link(format!("/proc/{id}/ns/net")).is_ok_and(|of| of != own));
        let moved = Command::new("ip").args(["link", "set", OTHER, "netns", &id]).status().expect("ip");
        assert!(moved.success());
    }

    /// Returns the server's resident memory in kB.
    #[must_use]
    pub fn memory(&self) -> u64 {
        let id = self.server.as_ref().map_or(0, Child::id);
        let status = fs::read_to_string(format!("/proc/{id}/status")).unwrap_or_default();
        let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"));
        line.and_then(|l| l.trim().strip_suffix(" kB")?.parse().ok()).expect("VmRSS of a running server")
    }

    /// Returns the server's output since its start.
    #[must_use]
    pub fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits until the server has printed these words.
    #[track_caller]
    pub fn hears(&mut self, words: &str) {
        let until = Instant::now() + Duration::from_secs(600);
        while !self.said().contains(words) {
            let ended = self.server.as_mut().and_then(|s| s.try_wait().expect("a child"));
            assert!(ended.is_none() && Instant::now() < until, "the server did not print `{words}`:\n{}", self.said());
            sleep(Duration::from_millis(200));
        }
    }

    fn stop(&mut self) {
        if let Some(mut server) = self.server.take() {
            let _ = server.kill().and_then(|()| server.wait());
        }
    }
}

impl Drop for NetbootRack {
    fn drop(&mut self) {
        self.stop();
        for child in self.other.iter_mut().flatten().chain([&mut self.bridge]) {
            let _ = child.kill().and_then(|()| child.wait());
        }
        if std::thread::panicking() {
            eprintln!("output of bakehouse netboot:\n{}", self.said());
        }
    }
}
