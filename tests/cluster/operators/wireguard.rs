//! Operators' machines as WireGuard peers: their registration, and the packet filter of a hub.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Stdio};

use builder::project::Project;
use fleet::{MeshKey, OperatorPeerRequest, OperatorPeering, operator_peer_message};

use super::*;
use crate::ports::{Namespaces, run};

const PATH: &str = "/v1/operators/wireguard";

/// An operator who registers machines.
struct TestOwner {
    tls: Arc<ClientConfig>,
    key: PrivateKey,
}

impl TestOwner {
    fn new(site: &TestCluster, name: &str) -> Self {
        let key = PrivateKey::generate().expect("randomness");
        let operator = Operator::new(name, OperatorRole::Viewer).expect("a name");
        let public = key.public().expect("a key");
        let cert = site.root.operator(&operator, &public, (now() - 60, now() + 3600)).expect("a root");
        let own = Identity { cert: &cert, key: key.pem() };
        Self { tls: fleet_https::client(site.root.certificate(), Some(own)).expect("a certificate"), key }
    }

    fn request(&self, mesh_key: MeshKey) -> OperatorPeerRequest {
        let signature = self.key.sign(&operator_peer_message("acme", &mesh_key)).expect("a key");
        OperatorPeerRequest { version: PROTOCOL, mesh_key, signature: encoding::encode(&signature) }
    }
}

async fn post(tls: &Arc<ClientConfig>, hub: u8, request: &OperatorPeerRequest) -> Result<OperatorPeering, Error> {
    let (host, name) = (format!("127.0.0.{hub}"), format!("hub-{hub}"));
    let mut hub = Connection::open(&host, HUB_PORT, &name, tls).await?;
    let reply = ask(&mut hub, "POST", PATH, &serde_json::to_string(request).expect("JSON")).await?;
    Ok(serde_json::from_slice(&reply).expect("JSON"))
}

#[test]
fn each_operator_gets_one_address_for_one_machine() {
    in_own_network(async {
        let range = "10.10.200.0/30".parse().expect("a network");
        let site = TestCluster::open_with("db.count = 1\n", |topology| topology.mesh.operators = Some(range));
        site.register_hubs().await;
        let member = site.members("db", 1).await.remove(0);
        let (anna, ben, carl) =
            (TestOwner::new(&site, "anna"), TestOwner::new(&site, "ben"), TestOwner::new(&site, "carl"));
        let first = anna.request(MeshKey([21; 32]));
        let peering = post(&anna.tls, 1, &first).await.expect("a hub takes it");
        assert_eq!((peering.address.to_string().as_str(), peering.port), ("10.10.200.1", HUB_PORT));
        assert_eq!(peering.hubs.keys().collect::<Vec<_>>(), ["hub-1", "hub-2", "hub-3"]);
        // Again, through another hub, and with a new key.
        for request in [&first, &anna.request(MeshKey([22; 32]))] {
            let again = post(&anna.tls, 2, request).await.expect("a hub takes it");
            assert_eq!(again.address, peering.address);
        }
        let second = post(&ben.tls, 3, &ben.request(MeshKey([23; 32]))).await.expect("a hub takes it");
        assert_eq!(second.address.to_string(), "10.10.200.2");

        let forged = OperatorPeerRequest { mesh_key: MeshKey([24; 32]), ..first.clone() };
        let own = Identity { cert: &member.1.cert, key: member.0.tls.pem() };
        let node = fleet_https::client(site.root.certificate(), Some(own)).expect("a certificate");
        for (tls, request, expected) in [
            (&ben.tls, ben.request(MeshKey([22; 32])), "another machine has this WireGuard key"),
            (&ben.tls, ben.request(member.0.mesh_key), "another machine has this WireGuard key"),
            (&anna.tls, forged, "did not sign the WireGuard key"),
            (&ben.tls, first, "did not sign the WireGuard key"),
            (&carl.tls, carl.request(MeshKey([25; 32])), "each address of `[mesh] operators`"),
            (&node, anna.request(MeshKey([26; 32])), "requires a valid certificate of an operator"),
        ] {
            let text = refused(post(tls, 1, &request).await, expected);
            assert!(text.contains(expected), "{expected}: {text}");
        }

        // The address of a revoked operator is free.
        let order = OperatorRevocation {
            version: PROTOCOL,
            fleet: "acme".to_owned(),
            name: "anna".to_owned(),
            key: encoding::encode(anna.key.public().expect("a key").as_bytes()),
            expires: now() + 3600,
            scope: None,
        };
        site.revoke_operator(&order, &site.root).await.expect("a hub takes the order");
        let text = refused(post(&anna.tls, 2, &anna.request(MeshKey([27; 32]))).await, "a revoked operator");
        assert!(text.contains("401"), "{text}");
        let third = post(&carl.tls, 2, &carl.request(MeshKey([25; 32]))).await.expect("a free address");
        assert_eq!(third.address, peering.address);
    });
}

/// Each hub checks the key before it writes, so the transaction has to compare it.
#[test]
fn two_machines_never_have_one_key() {
    in_own_network(async {
        let range = "10.10.200.0/24".parse().expect("a network");
        let site = TestCluster::open_with("db.count = 1\n", |topology| topology.mesh.operators = Some(range));
        site.register_hubs().await;
        let owners: Vec<TestOwner> = (0..9).map(|n| TestOwner::new(&site, &format!("owner{n}"))).collect();
        for round in 0..3 {
            let key = MeshKey([40 + round; 32]);
            let asked = owners.iter().zip([1, 2, 3].into_iter().cycle()).map(|(owner, hub)| {
                let request = owner.request(key);
                async move { post(&owner.tls, hub, &request).await.is_ok() }
            });
            let granted = futures_util::future::join_all(asked).await;
            assert_eq!(granted.iter().filter(|is_granted| **is_granted).count(), 1, "round {round}: {granted:?}");
        }
    });
}

#[test]
fn fleet_without_addresses_for_operators_refuses_machines() {
    in_own_network(async {
        let site = TestCluster::open("db.count = 1\n");
        let anna = TestOwner::new(&site, "anna");
        let text = refused(post(&anna.tls, 1, &anna.request(MeshKey([21; 32]))).await, "no range");
        assert!(text.contains("403") && text.contains("[mesh] operators"), "{text}");
    });
}

/// Replies to each connection with the client's address.
const SERVER: &str = r"
import socket, sys, threading
def serve(port):
    listener = socket.create_server((sys.argv[1], port))
    while True:
        line, (peer, _) = listener.accept()
        line.sendall(peer.encode())
        line.close()
for port in sys.argv[2:]:
    threading.Thread(target=serve, args=(int(port),)).start()
print('ready', flush=True)
";

/// Connects from the first address to each `HOST:PORT`, and prints what it replies with, or `-`.
const CLIENT: &str = r"
import socket, sys
for target in sys.argv[2:]:
    host, port = target.split(':')
    s = socket.socket()
    s.settimeout(2)
    try:
        s.bind((sys.argv[1], 0))
        s.connect((host, int(port)))
        print(s.recv(100).decode() or '-')
    except OSError:
        print('-')
    s.close()
";

struct Servers(Vec<Child>);

impl Drop for Servers {
    fn drop(&mut self) {
        for server in &mut self.0 {
            let _ = server.kill();
            let _ = server.wait();
        }
    }
}

#[test]
fn operators_with_wireguard_reach_the_node_api_and_nothing_else() {
    let dir = tempfile::tempdir().expect("a folder");
    let file = bakehouse_tests::root().join("profiles/fleets/ha.toml");
    let mut project = Project::load(&file).expect("a valid fleet.toml");
    project.topology.name = "operators".to_owned();
    project.topology.mesh.operators = Some("10.10.0.192/26".parse().expect("a network"));
    let topology = &project.topology;
    let spaces = Namespaces::new(&project, dir.path());
    let [hub, other, db] = ["hub-1", "hub-2", "db-1"].map(|name| topology.node(name).expect("a node"));
    // The laptop has a link to hub-1, as a worker has. WireGuard binds its source address to its key.
    let (hub_space, laptop) = (spaces.name(hub), format!("{}-laptop", spaces.name(hub)));
    run(&format!(
        "set -e\nip netns add {laptop}\nip -n {laptop} link set lo up\n\
         ip link add op netns {hub_space} type veth peer name op netns {laptop}\n\
         ip -n {hub_space} link set op master wg0 up\nip -n {laptop} link set op up\n\
         ip -n {laptop} address add 10.10.0.193/32 dev op\n\
         ip -n {laptop} route add {1} dev op\nip -n {laptop} route add {0} via {1} dev op\n\
         ip -n {hub_space} route add 10.10.0.192/26 dev wg0\n\
         ip -n {2} address add 10.10.0.194/32 dev lo",
        topology.mesh.subnet,
        hub.transport,
        spaces.name(other),
    ));
    let mut servers = Servers(Vec::new());
    for node in [hub, other, db] {
        let mut server = Command::new("ip");
        server.args(["netns", "exec", &spaces.name(node), "python3", "-c", SERVER, &node.address.to_string()]);
        server.args(["7443", "5432", "2379", &topology.mesh.port.to_string()]).stdout(Stdio::piped());
        servers.0.push(server.spawn().expect("python3"));
        let output = servers.0.last_mut().and_then(|server| server.stdout.take()).expect("a pipe");
        BufReader::new(output).read_line(&mut String::new()).expect("a line");
    }
    let connect = |space: &str, from: &str, targets: &[(&fleet::Node, u16)]| -> Vec<String> {
        let targets: Vec<String> = targets.iter().map(|(node, port)| format!("{}:{port}", node.address)).collect();
        let mut client = Command::new("ip");
        let client = client.args(["netns", "exec", space, "python3", "-c", CLIENT, from]).args(targets);
        let output = client.output().expect("python3");
        String::from_utf8(output.stdout).expect("text").lines().map(str::to_owned).collect()
    };
    let (port, via) = (topology.mesh.port, hub.address.to_string());
    let from_laptop = connect(
        &laptop,
        "10.10.0.193",
        &[(db, 7443), (other, 7443), (hub, 7443), (hub, port), (db, 5432), (hub, 2379), (other, 2379), (other, port)],
    );
    assert_eq!(from_laptop, [&via, &via, "10.10.0.193", "10.10.0.193", "-", "-", "-", "-"]);
    // Another hub's link does not carry operators' packets, also if that hub translates none.
    run(&format!("ip netns exec {} nft flush chain inet bakehouse from_operators", spaces.name(other)));
    assert_eq!(connect(&spaces.name(other), "10.10.0.194", &[(hub, 7443), (hub, port)]), ["-", "-"]);
    run(&format!("ip netns del {laptop}"));
}
