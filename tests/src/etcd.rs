//! A real etcd cluster on loopback, with the etcd package of the images.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;

use fleet::{Issuer, MachineSize, Membership, NodeContext, PrivateKey, Topology, etcd_client_anchor};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::packages::unpack;

/// An etcd cluster. Each member has a folder of its own, with certificates of the fleet.
pub struct Cluster {
    binary: PathBuf,
    dir: tempfile::TempDir,
    members: Vec<Option<Child>>,
    first_port: u16,
}

impl Cluster {
    /// Starts the voters of `topology` on 127.0.0.1. Member `i` serves clients on port `first_port + 2 i` and peers on
    /// the next one.
    #[must_use]
    pub fn start(topology: &Topology, root: &Issuer, first_port: u16) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        for name in &topology.voters {
            let node = topology.node(name).expect("a voter is a node");
            let key = PrivateKey::generate().expect("randomness");
            let issuer = root.issuer(&topology.name, name).expect("a root");
            let cert = issuer.node(topology, node, &key.public().expect("a key")).expect("an issuer");
            let home = dir.path().join(name);
            fs::create_dir(&home).expect("a folder");
            fs::write(home.join("ca.crt"), root.certificate()).expect("a folder");
            let clients = etcd_client_anchor(root.certificate(), topology, node).expect("a root");
            fs::write(home.join("etcd-clients.crt"), clients).expect("a folder");
            fs::write(home.join("node.crt"), cert).expect("a folder");
            fs::write(home.join("node.key"), key.pem()).expect("a folder");
        }
        let mut cluster =
            Self { binary: binary(), dir, members: topology.voters.iter().map(|_| None).collect(), first_port };
        for i in 0..topology.voters.len() {
            cluster.start_member(topology, i);
        }
        cluster
    }

    /// Returns host and client port of each member.
    #[must_use]
    pub fn clients(&self) -> Vec<(String, u16)> {
        (0..self.members.len()).map(|i| ("127.0.0.1".to_owned(), self.port(i))).collect()
    }

    /// Kills a member with SIGKILL, like a power cut.
    pub fn kill(&mut self, i: usize) {
        if let Some(mut child) = self.members[i].take() {
            child.kill().and_then(|()| child.wait()).expect("a child");
        }
    }

    /// Stops a member with SIGSTOP: its connections stay open, and after `thaw` it continues from an outdated state.
    pub fn freeze(&self, i: usize) {
        self.signal(i, Signal::SIGSTOP);
    }

    /// Continues a stopped member with SIGCONT.
    pub fn thaw(&self, i: usize) {
        self.signal(i, Signal::SIGCONT);
    }

    fn signal(&self, i: usize, signal: Signal) {
        let child = self.members[i].as_ref().expect("the member runs");
        kill(Pid::from_raw(i32::try_from(child.id()).expect("a pid")), signal).expect("a child");
    }

    /// Starts a member with the configuration of the images, on this cluster's ports.
    pub fn start_member(&mut self, topology: &Topology, i: usize) {
        let name = &topology.voters[i];
        let home = self.dir.path().join(name);
        fs::write(home.join("etcd.yml"), self.configuration(topology, i)).expect("a folder");
        let log = fs::File::create(home.join("log")).expect("a folder");
        let mut etcd = Command::new(&self.binary);
        etcd.arg("--config-file").arg(home.join("etcd.yml"));
        self.members[i] = Some(etcd.stderr(log).stdout(Stdio::null()).spawn().expect("etcd starts"));
    }

    fn configuration(&self, topology: &Topology, i: usize) -> String {
        let node = topology.node(&topology.voters[i]).expect("a voter is a node");
        let member = Membership::sample();
        let context = NodeContext {
            fleet: topology,
            node,
            epoch: 1,
            machine: MachineSize { var: 4096, memory: 1024, cpus: 2, timeout_scale: 1 },
            tls: &member.tls,
            secrets: &member.secrets,
            web: "",
            lan: &[],
        };
        let template = "overlays/etcd/run/bakehouse/etcd.yml.j2";
        let text = fs::read_to_string(crate::root().join(template)).expect("the template exists");
        let mut text = fleet::render(template, &text, &context).expect("a valid template");
        let home = self.dir.path().join(&node.name);
        for (i, voter) in topology.voters.iter().enumerate() {
            let address = topology.node(voter).expect("a voter is a node").address;
            text = text.replace(&format!("https://{address}:2380"), &self.peer_url(i));
        }
        let client = format!("https://127.0.0.1:{}", self.port(i));
        text = text.replace(",https://127.0.0.1:2379", "").replace(&format!("https://{}:2379", node.address), &client);
        let mut changed = String::new();
        for line in text.lines().filter(|line| !line.starts_with("listen-metrics-urls:")) {
            changed += &match line.split_once(':') {
                Some(("data-dir", _)) => format!("data-dir: {}", home.join("data").display()),
                Some(("log-level", _)) => "log-level: error".to_owned(),
                _ => line.replace("/run/credentials/etcd.service", &home.display().to_string()),
            };
            changed.push('\n');
        }
        changed
    }

    fn peer_url(&self, i: usize) -> String {
        format!("https://127.0.0.1:{}", self.port(i) + 1)
    }

    /// Returns host and peer port of a member.
    #[must_use]
    pub fn peer(&self, i: usize) -> (String, u16) {
        ("127.0.0.1".to_owned(), self.port(i) + 1)
    }

    fn port(&self, i: usize) -> u16 {
        self.first_port + 2 * i as u16
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for i in 0..self.members.len() {
            self.kill(i);
        }
    }
}

/// Returns the etcd binary that the fleet `ha` locks. A process unpacks the package only once.
pub(crate) fn binary() -> PathBuf {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| unpack("etcd", &["etcd-server"]).join("usr/bin/etcd")).clone()
}
