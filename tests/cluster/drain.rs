//! Drained nodes in the hubs' etcd: the last node of a role is refused, by the real HAProxy's checks of the app nodes, and
//! etcd's leadership moves. Needs root, haproxy and ip.

use std::fs;
use std::net::TcpListener;
use std::process::{Child, Command};
use std::time::Duration;

use bakehouse_tests::network::in_own_network;
use bakehouse_tests::site::TestCluster;
use fleet::UpdateDecision;
use fleet::node_api::{DRAINED_PATH, DrainAnswer, DrainRequest, LOCK_PATH, LockRequest};
use fleet_https::{Connection, Identity, request};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::sleep;

const CHECK: DrainRequest = DrainRequest { drained: Some(true), check: true };
const DRAINED: DrainRequest = DrainRequest { drained: Some(true), check: false };
const UNDRAINED: DrainRequest = DrainRequest { drained: Some(false), check: false };
/// Time in which HAProxy notices a change of a server.
const NOTICED: Duration = Duration::from_secs(2);

/// HAProxy of hub-1, with the part of its configuration that the hub reads.
struct HaProxy {
    child: Child,
    _dir: tempfile::TempDir,
}

impl HaProxy {
    fn start(servers: &[(&str, u16)]) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let mut config =
            "defaults\n    mode http\n    timeout connect 1s\n    timeout client 5s\n    timeout server 5s\n\
            frontend stats\n    bind 127.0.0.1:8404\n    stats enable\n    stats uri /\n\
            backend odoo\n    default-server inter 200ms fall 1 rise 1\n"
                .to_owned();
        for (name, port) in servers {
            config += &format!("    server {name} 127.0.0.1:{port} check\n");
        }
        let file = dir.path().join("haproxy.cfg");
        fs::write(&file, config).expect("a folder");
        let child = Command::new("haproxy").arg("-db").arg("-f").arg(&file).spawn().expect("haproxy is installed");
        Self { child, _dir: dir }
    }
}

impl Drop for HaProxy {
    fn drop(&mut self) {
        let _ = self.child.kill().and_then(|()| self.child.wait());
    }
}

/// Sends a request of a hub to hub-1.
async fn ask_hub<T: DeserializeOwned>(site: &TestCluster, number: usize, path: &str, asked: &impl Serialize) -> T {
    let (node, key) = (&site.topology.hubs[number], &site.keys[number]);
    let issuer = site.root.issuer("acme", &node.name).expect("a root");
    let cert = issuer.node(&site.topology, node, &key.public().expect("a key")).expect("an issuer");
    let own = Identity { cert: &cert, key: key.pem() };
    let tls = fleet_https::client(site.root.certificate(), Some(own)).expect("a certificate");
    let mut connection = Connection::open("127.0.0.1", site.topology.mesh.port, "hub-1", &tls).await.expect("hub-1");
    let body = serde_json::to_vec(asked).expect("JSON");
    let asked = request("POST", "hub", path, &[], body.into()).expect("HTTP");
    let answer = connection.ask(asked, 1 << 20).await.expect("a reply");
    serde_json::from_slice(&answer).expect("JSON")
}

/// Sends a drain of a hub to hub-1, with the fleet's lock for a check.
async fn of_hub(site: &TestCluster, number: usize, asked: DrainRequest) -> DrainAnswer {
    let lock = async |seconds| -> UpdateDecision { ask_hub(site, number, LOCK_PATH, &LockRequest { seconds }).await };
    assert!(!asked.check || lock(600).await.granted);
    let answer = ask_hub(site, number, DRAINED_PATH, &asked).await;
    assert!(lock(0).await.granted);
    answer
}

#[test]
fn hubs_keep_a_node_of_each_role_in_service() {
    in_own_network(async {
        let site = TestCluster::open("app.count = 2\n");
        let members = site.members("app", 2).await;
        site.register_hubs().await;
        let asked = async |i: usize, request: DrainRequest| -> DrainAnswer {
            let (who, grant) = &members[i];
            let body = serde_json::to_vec(&request).expect("JSON");
            let answer = site.member(0, (who, grant), ("POST", DRAINED_PATH), body).await.expect("a reply");
            serde_json::from_slice(&answer).expect("a reply")
        };
        let lock = async |i: usize, seconds: u32| {
            let (who, grant) = &members[i];
            let body = serde_json::to_vec(&LockRequest { seconds }).expect("JSON");
            let answer = site.member(0, (who, grant), ("POST", LOCK_PATH), body).await.expect("a reply");
            assert!(serde_json::from_slice::<UpdateDecision>(&answer).expect("a reply").granted);
        };
        let of_app = async |i: usize, request: DrainRequest| -> DrainAnswer {
            if !request.check {
                return asked(i, request).await;
            }
            lock(i, 600).await;
            let answer = asked(i, request).await;
            lock(i, 0).await;
            answer
        };
        let [first, second] = [0, 1].map(|i| members[i].1.slot.clone());
        let refused = async |i: usize, expected: &str| {
            let answer = of_app(i, CHECK).await;
            assert!(!answer.granted && answer.why.contains(expected), "{answer:?}");
        };
        // A node that has lost the fleet's lock is not drained: another node may check its own drain now.
        for other_has_it in [false, true] {
            if other_has_it {
                lock(1, 600).await;
            }
            let answer = asked(0, CHECK).await;
            assert!(!answer.granted && answer.why.contains("does not have the fleet's lock"), "{answer:?}");
        }
        lock(1, 0).await;
        // Without HAProxy, no hub can tell whether the other node serves.
        refused(0, "is unknown to HAProxy of hub-1").await;
        let listeners = [0, 1].map(|_| TcpListener::bind("127.0.0.1:0").expect("a port"));
        let ports = [0, 1].map(|i: usize| listeners[i].local_addr().expect("a port").port());
        let _haproxy = HaProxy::start(&[(&first, ports[0]), (&second, ports[1])]);
        sleep(NOTICED).await;
        let answer = of_app(0, CHECK).await;
        assert!(answer.granted && answer.drained.contains_key(&first), "{answer:?}");
        // A repeated check does not count the node itself.
        assert!(of_app(0, CHECK).await.granted);
        refused(1, &format!("{first} is drained")).await;
        // A node that is drained by force is recorded without a check.
        assert!(of_app(1, DRAINED).await.granted);
        assert_eq!(of_app(0, DrainRequest::default()).await.drained.len(), 2);
        for i in [0, 1] {
            assert!(of_app(i, UNDRAINED).await.granted);
        }
        assert!(of_app(0, DrainRequest::default()).await.drained.is_empty());
        let [closed, _open] = listeners;
        drop(closed);
        sleep(NOTICED).await;
        refused(1, &format!("{first} is DOWN")).await;

        // etcd's leadership goes to a hub that is not drained.
        site.lead_etcd("hub-1").await;
        assert!(of_hub(&site, 1, DRAINED).await.granted);
        let answer = of_hub(&site, 0, DRAINED).await;
        assert_eq!(answer.drained.keys().collect::<Vec<_>>(), ["hub-1", "hub-2"]);
        let etcd = site.etcd(1);
        assert_eq!(etcd.move_leader("hub-1", &[]).await.expect("etcd answers"), None, "hub-1 still leads etcd");
        assert_eq!(etcd.move_leader("hub-2", &[]).await.expect("etcd answers"), None, "hub-2 leads etcd");
        let answer = of_hub(&site, 2, CHECK).await;
        let why = "hub-3 is the last hub that can hold the VIP: hub-1 is drained, hub-2 is drained";
        assert_eq!((answer.granted, answer.why.as_str()), (false, why));
        assert!(of_hub(&site, 1, UNDRAINED).await.granted && of_hub(&site, 2, CHECK).await.granted);
    });
}
