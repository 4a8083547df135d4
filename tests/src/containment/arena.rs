//! The fleet under attack, and functions that observe its state from a trusted hub.

use std::collections::BTreeMap;
use std::fs;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::Command;

use builder::project::Project;
use fleet::{Credential, Joiner, Node, Ticket, Topology};

use crate::{ETCDCTL, Machine, TestFleet};

/// Address of an internet host, on the virtual network between the fleet's machines.
pub(super) const INTERNET: &str = "198.18.250.1";
/// Prefix of the keys that attacks write. No daemon of the fleet reads them.
pub(super) const SCRATCH: &str = "/bakehouse/containment/";

/// A fleet in containers, on one virtual network that stands for the internet.
pub struct Arena {
    /// The fleet's folder.
    pub lab: TestFleet,
    /// All nodes, and the settings of the fleet.
    pub topology: Topology,
    /// The running containers, by node.
    pub machines: BTreeMap<String, Machine>,
    /// Every password of the fleet, by name.
    pub secrets: BTreeMap<String, String>,
}

impl Arena {
    /// Starts these nodes of the lab's fleet, and waits until they are ready.
    ///
    /// # Panics
    /// If a node does not become ready.
    #[must_use]
    pub fn up(lab: TestFleet, nodes: &[&str]) -> Self {
        let topology = Project::load(&lab.dir).expect("a valid fleet.toml").topology;
        // `Drop` switches them off when the test ends, also after a panic.
        let machines = nodes.iter().map(|name| ((*name).to_owned(), Machine::for_node(&lab, name))).collect();
        lab.ok(&[&["up", "--containers"], nodes].concat());
        let key: serde_json::Value = serde_json::from_str(&lab.read("fleet.key")).expect("JSON");
        let secrets = serde_json::from_value(key["secrets"].clone()).expect("passwords by name");
        let arena = Self { lab, topology, machines, secrets };
        arena.join_internet();
        arena
    }

    /// Gives the network's bridge an address, so that its namespace is a host on the internet. Its route to the mesh
    /// goes through a hub, as an attacker would configure it.
    fn join_internet(&self) {
        let hub = self.public(&self.topology.hubs[0]).to_string();
        let mesh = self.topology.mesh.subnet.to_string();
        let address = format!("{INTERNET}/16");
        // Processes of this namespace reach a server on the bridge's own address through loopback.
        let commands = [
            vec!["link", "set", "lo", "up"],
            vec!["address", "replace", &address, "dev", "wire"],
            vec!["route", "replace", &mesh, "via", &hub],
        ];
        for words in commands {
            let mut ip = Command::new("ip");
            ip.args(["-n", &self.wire_name()]).args(&words);
            assert!(ip.status().expect("ip").success(), "ip {words:?}");
        }
    }

    /// Waits until etcd requires authentication. The hubs enable it once every hub and db node has joined.
    ///
    /// # Panics
    /// If the hubs do not enable it within 120 s.
    pub fn has_users(&self) {
        let enabled = format!("{ETCDCTL} auth status | grep -q 'Authentication Status: true'");
        self.witness().ok(&format!("for i in $(seq 120); do {enabled} && exit; sleep 1; done; exit 1"));
    }

    fn wire_name(&self) -> String {
        let lan = self.machines.values().next().expect("a machine").lan();
        format!("bakehouse-{}", lan.replace([':', '.'], "-"))
    }

    /// Returns the path of the internet host's network namespace.
    #[must_use]
    pub fn internet(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(self.wire_name())
    }

    /// Returns the process id of a node's init.
    ///
    /// # Panics
    /// If the node does not run.
    #[must_use]
    pub fn pid(&self, node: &str) -> String {
        let path = self.lab.dir.join("build/vm").join(node).join("init");
        let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        text.split(' ').next().expect("a pid").to_owned()
    }

    /// Returns the container of a node.
    #[must_use]
    pub fn machine(&self, node: &str) -> &Machine {
        &self.machines[node]
    }

    /// Returns a node of the topology.
    #[must_use]
    pub fn node(&self, name: &str) -> &Node {
        self.topology.node(name).expect("the fleet has this node")
    }

    /// Returns the hub that no attack starts from. The tests trust its output.
    #[must_use]
    pub fn witness(&self) -> &Machine {
        self.machine("hub-1")
    }

    /// Returns a node's public address.
    #[must_use]
    pub fn public(&self, node: &Node) -> Ipv4Addr {
        let host = u32::from(node.address) - u32::from(self.topology.mesh.subnet.network());
        Ipv4Addr::from(u32::from(Ipv4Addr::new(198, 18, 0, 0)) + host)
    }

    /// Returns a node's addresses: in the mesh and on the internet.
    #[must_use]
    pub fn addresses(&self, node: &Node) -> [String; 2] {
        [node.address.to_string(), self.public(node).to_string()]
    }

    /// Returns Patroni's prefix in etcd.
    #[must_use]
    pub fn scope(&self) -> String {
        format!("/bakehouse/{}/", self.topology.name)
    }

    /// Reads the value of an etcd key on the trusted hub.
    #[must_use]
    pub fn get(&self, key: &str) -> String {
        self.witness().ok(&format!("{ETCDCTL} get --print-value-only '{key}'"))
    }

    /// Lists the etcd keys below a prefix, without the prefix.
    #[must_use]
    pub fn keys(&self, prefix: &str) -> Vec<String> {
        let listed = self.witness().ok(&format!("{ETCDCTL} get --prefix --keys-only '{prefix}'"));
        listed.lines().filter_map(|line| line.strip_prefix(prefix)).map(str::to_owned).collect()
    }

    /// Writes an etcd key on the trusted hub.
    pub fn put(&self, key: &str, value: &str) {
        self.witness().ok(&format!("{ETCDCTL} put '{key}' '{value}'"));
    }

    /// Deletes an etcd key on the trusted hub.
    pub fn delete(&self, key: &str) {
        self.witness().ok(&format!("{ETCDCTL} del '{key}'"));
    }

    /// Mints a joiner's ticket of a group for this number of nodes.
    ///
    /// # Panics
    /// If the group's tickets are founders' tickets.
    #[must_use]
    pub fn ticket(&self, group: &str, uses: u32) -> Joiner {
        let text = self.lab.ok(&["ticket", group, "--uses", &uses.to_string()]).out;
        match Ticket::parse(text.as_bytes()).expect("a ticket").right {
            Credential::Joiner(joiner) => joiner,
            Credential::Founder(_) => panic!("{group} has founders' tickets"),
        }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        self.machines.clear();
        // Removes the virtual network, and the attacker's address with it.
        self.lab.run(&["down"]);
    }
}
